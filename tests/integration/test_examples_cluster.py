"""Every example on a cluster of two servers and two workers, started as a person would start it."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PS_RUN = pathlib.Path(sys.executable).with_name("ps-run")
WORKERS = 2


def ps_run(folder: pathlib.Path, *arguments: str) -> str:
    """Run `ps-run --servers 2 --workers 2 ARGUMENTS`; return all that it and its workers printed."""
    # One torch thread each: five processes share few cores here.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PARAMESH_")}
    command = [PS_RUN, "--servers", "2", "--workers", str(WORKERS), "--plain", "--log-dir", folder / "logs"]
    done = subprocess.run(
        [str(part) for part in [*command, *arguments]],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    logs = "".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(folder.rglob("*.log")))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{logs}"
    return done.stdout


def every_worker(pattern: str, output: str) -> list[float]:
    """The number that each worker printed once."""
    found = [float(value) for value in re.findall(pattern, output)]
    assert len(found) == WORKERS, output
    return found


def test_digits_reach_the_same_accuracy_on_both_workers(tmp_path: pathlib.Path) -> None:
    first, second = every_worker(r"test accuracy ([\d.]+)%", ps_run(tmp_path, "examples/digits.py"))
    assert first == second
    assert first >= 97


@pytest.mark.parametrize("mode", ["async", "ssp", "local"])
def test_digits_learn_in_the_other_modes(mode: str, tmp_path: pathlib.Path) -> None:
    extra = ["--every", "8"] if mode == "local" else []
    output = ps_run(tmp_path, "--mode", mode, *extra, "examples/digits.py")
    assert min(every_worker(r"test accuracy ([\d.]+)%", output)) >= 95


@pytest.mark.parametrize("samples", [2000, 2050], ids=["even", "one-batch-more-for-one"])
def test_linear_regression_finds_the_closed_form(samples: int, tmp_path: pathlib.Path) -> None:
    output = ps_run(tmp_path, "examples/linear_regression.py", "--samples", str(samples))
    first, second = every_worker(r"largest difference of a coefficient (\S+)", output)
    assert first == second
    assert first < 0.01


def test_the_transformer_learns(tmp_path: pathlib.Path) -> None:
    output = ps_run(tmp_path, "examples/char_transformer.py", "--epochs", "1", "--characters", "40000")
    before = every_worker(r"([\d.]+) before", output)
    after = every_worker(r"([\d.]+) after", output)
    assert after[0] == after[1]
    assert after[0] < before[0] - 1


def test_both_networks_of_the_gan_train(tmp_path: pathlib.Path) -> None:
    output = ps_run(tmp_path, "examples/gan.py", "--epochs", "20")
    first, second = every_worker(r"the generator found (\d+) of 8 modes", output)
    assert first == second
    assert first >= 5
