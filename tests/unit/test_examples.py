"""The examples: three lines away from their plain twins, and right when run alone."""

import ast
import difflib
import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
NAMES = ("char_transformer", "digits", "gan", "linear_regression")
SHORT = {
    "char_transformer": ["--epochs", "1", "--characters", "20000"],
    "digits": ["--epochs", "3"],
    "gan": ["--epochs", "2", "--points", "1000"],
    "linear_regression": ["--epochs", "15", "--samples", "1000"],
}


def code_lines(path: pathlib.Path) -> list[str]:
    """The lines after the module docstring, which says how to run and so must differ."""
    source = path.read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    assert isinstance(docstring, ast.Expr)
    return source.splitlines()[docstring.end_lineno :]


def changed_lines(plain: list[str], distributed: list[str]) -> tuple[int, int]:
    """Count (lines changed or added, lines only removed) on the way from plain to distributed."""
    matcher = difflib.SequenceMatcher(a=plain, b=distributed, autojunk=False)
    written = removed = 0
    for tag, a_begin, a_end, b_begin, b_end in matcher.get_opcodes():
        if tag != "equal":
            written += b_end - b_begin
            removed += max((a_end - a_begin) - (b_end - b_begin), 0)
    return written, removed


def run(script: pathlib.Path, *arguments: str) -> str:
    """Run a script alone and return what it printed."""
    # One thread, and no cluster in the environment: the tests share few cores.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PARAMESH_")}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**env, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def number(pattern: str, output: str) -> float:
    """The number that the pattern's one group finds."""
    found = re.search(pattern, output)
    assert found, output
    return float(found.group(1))


def test_every_example_has_a_twin() -> None:
    assert sorted(p.stem for p in EXAMPLES.glob("*.py")) == list(NAMES)
    assert sorted(p.stem for p in (EXAMPLES / "plain").glob("*.py")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_at_most_three_lines_differ(name: str) -> None:
    plain = code_lines(EXAMPLES / "plain" / f"{name}.py")
    distributed = code_lines(EXAMPLES / f"{name}.py")
    written, removed = changed_lines(plain, distributed)
    assert (written, removed) == (3, 0), "\n".join(difflib.unified_diff(plain, distributed, lineterm=""))
    assert sum("paramesh" in line for line in distributed) == 3
    assert not any("paramesh" in line for line in plain)


def test_the_count_sees_a_fourth_line() -> None:
    assert changed_lines(["a", "b"], ["a", "x", "b"]) == (1, 0)
    assert changed_lines(["a", "b", "c"], ["a", "B", "c", "d"]) == (2, 0)
    assert changed_lines(["a", "b", "c"], ["a", "c"]) == (0, 1)


@pytest.mark.parametrize("folder", ["plain", "."])
@pytest.mark.parametrize("name", NAMES)
def test_it_says_how_to_run(name: str, folder: str) -> None:
    docstring = ast.get_docstring(ast.parse((EXAMPLES / folder / f"{name}.py").read_text(encoding="utf-8")))
    where = "examples/plain" if folder == "plain" else "examples"
    assert docstring is not None
    assert f"python {where}/{name}.py" in docstring
    assert folder == "plain" or f"ps-run --servers 2 --workers 2 examples/{name}.py" in docstring


def check_digits(output: str) -> None:
    assert number(r"test accuracy ([\d.]+)%", output) >= 90, output


def check_linear_regression(output: str) -> None:
    assert number(r"largest difference of a coefficient (\S+)", output) < 0.02, output


def check_char_transformer(output: str) -> None:
    before = number(r"([\d.]+) before", output)
    assert number(r"([\d.]+) after", output) < before - 1, output


def check_gan(output: str) -> None:
    assert "of 8 modes" in output


CHECKS = {
    "char_transformer": check_char_transformer,
    "digits": check_digits,
    "gan": check_gan,
    "linear_regression": check_linear_regression,
}


@pytest.mark.parametrize("folder", ["plain", "."])
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_alone_and_learns(name: str, folder: str) -> None:
    CHECKS[name](run(EXAMPLES / folder / f"{name}.py", *SHORT[name]))


def test_seeds_make_runs_repeatable() -> None:
    def results() -> str:
        return re.sub(r"after [\d.]+ s", "", run(EXAMPLES / "plain" / "digits.py", "--epochs", "1"))

    assert results() == results()
