"""The docs: links lead somewhere, Python in them compiles, generated tables are current."""

import ast
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import paramesh
import pytest
from paramesh import errors
from paramesh_coordinator import psctl

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BACKTICKS = re.compile(r"`([^`]+)`")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def name_of(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: pathlib.Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: pathlib.Path) -> list[str]:
    """The internal links of a page that lead nowhere."""
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def python_blocks() -> list[object]:
    """Every code block that is marked as Python, with a name for the test."""
    return [
        pytest.param(code, id=f"{name_of(page)}-{i}")
        for page in PAGES
        for i, (language, code) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
        if language == "python"
    ]


def test_the_pages_are_there() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/tutorial.md"} <= {
        name_of(page) for page in PAGES
    }


def test_the_table_of_roles_is_that_of_the_code() -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "gen_role_docs.py", "--check"], check=True, timeout=60)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Here\n[a](other.md) [b](#here) [c](#there) [d](https://example.org)\n", encoding="utf-8")
    assert broken_links(page) == ["other.md", "#there"]


@pytest.mark.parametrize("code", python_blocks())
def test_python_compiles(code: str) -> None:
    ast.parse(textwrap.dedent(code))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_fences_are_closed(page: pathlib.Path) -> None:
    assert page.read_text(encoding="utf-8").count("\n```") % 2 == 0


def test_every_decision_is_listed_and_has_its_parts() -> None:
    folder = ROOT / "docs" / "decisions"
    decisions = sorted(folder.glob("[0-9]*.md"))
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert [int(page.name[:4]) for page in decisions] == list(range(1, len(decisions) + 1))
    for page in decisions:
        title, *parts = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert parts == ["Context", "Decision", "Consequences"], page.name
        assert f"[{title}]({page.name})" in index


def generator() -> object:
    """The module tools/gen_error_docs.py."""
    spec = importlib.util.spec_from_file_location("gen_error_docs", ROOT / "tools" / "gen_error_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_error_table_is_current() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert generator().render(page) == page, "run python tools/gen_error_docs.py"


def test_every_reason_has_a_remedy_and_no_remedy_lacks_its_reason() -> None:
    module = generator()
    assert all(module.remedy(name) for name in errors.REASONS)
    assert set(module.REMEDIES) <= set(errors.REASONS)


def _kinds(node: ast.expr) -> list[str]:
    """The kinds of event that an expression may be, as patterns."""
    match node:
        case ast.Constant(value=str(kind)):
            return [kind]
        case ast.IfExp(body=body, orelse=orelse):
            return _kinds(body) + _kinds(orelse)
        case ast.JoinedStr(values=values):
            return ["".join(v.value if isinstance(v, ast.Constant) else "[a-z]+" for v in values)]
    return []  # a name: bound to one of the others, below


def event_kinds() -> set[str]:
    """Patterns of all kinds of event that the coordinator may write."""
    found: set[str] = set()
    for source in (ROOT / "coordinator").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(attr="audit" | "_audit") | ast.Name(id="Change"), args=[first, *_]):
                    found.update(_kinds(first))
                case ast.Assign(targets=[ast.Name(id="kind")], value=value):
                    found.update(_kinds(value))
    return found


def test_the_playbook_has_every_event_and_no_other() -> None:
    table = (ROOT / "docs" / "playbook.md").read_text(encoding="utf-8").split("## What the events mean")[1]
    told = {
        name for line in table.splitlines() if line.startswith("| `") for name in BACKTICKS.findall(line.split("|")[1])
    }
    written = event_kinds()
    assert {kind for kind in written if not any(re.fullmatch(kind, name) for name in told)} == set()
    assert {name for name in told if not any(re.fullmatch(kind, name) for kind in written)} == set()


def test_reasons_and_classes_that_the_docs_name_exist() -> None:
    classes = {row.error.__name__ for row in errors.REASONS.values()} | {"ParameshError"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"paramesh\.errors\.([A-Z]\w+)", text):
            assert name in classes or name in errors.__all__, (name_of(page), name)


COMMANDS = ("ps-coordinator", "ps-server", "ps-worker", "ps-run", "psctl")
TOLD_BY_HELP_ONLY = {"--help", "--version"}


@functools.cache
def flags_of(*command: str) -> frozenset[str]:
    """The long flags that a command's own help lists."""
    program = pathlib.Path(sys.executable).with_name(command[0])
    # Wide and plain, so that no flag is cut or coloured.
    env = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [program, *command[1:], "--help"], capture_output=True, text=True, timeout=60, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    declared = re.findall(r"^[ │]*(?:-\w,? +)?(--[a-z][a-z-]*)", done.stdout, re.MULTILINE)
    return frozenset(declared) - TOLD_BY_HELP_ONLY


def documented_flags(command: str) -> set[str]:
    """The flags in a command's table in docs/operations.md."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = re.search(rf"^### {command}\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL)
    assert section, command
    return set(re.findall(r"^\| `(--[a-z-]+)", section.group(1), re.MULTILINE))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "psctl"])
def test_every_flag_is_documented_and_no_other(command: str) -> None:
    assert documented_flags(command) == flags_of(command)


def test_every_verb_of_psctl_is_documented_and_no_other() -> None:
    verbs = re.findall(
        r"^\| `psctl (\w+)`", (ROOT / "docs" / "operations.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(verbs) == {command.name or command.callback.__name__ for command in psctl.app.registered_commands}
    assert documented_flags("psctl") == flags_of("psctl").union(*(flags_of("psctl", verb) for verb in verbs))


def command_lines() -> list[tuple[str, str]]:
    """(page, line) of every command line of ours in an indented block or in code marks."""
    pattern = re.compile(rf"(?:^    |`)(?:\.venv/bin/)?((?:{'|'.join(COMMANDS)}) [^`\n#]+)", re.MULTILINE)
    return [
        (name_of(page), line.strip()) for page in PAGES for line in pattern.findall(page.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_command_lines_use_flags_that_exist(page: str, line: str) -> None:
    program, *words = line.split()
    script = next((i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"), len(words))
    verbs = words[:1] if program == "psctl" and words and not words[0].startswith("-") else []
    if verbs in (["meta"], ["certs"], ["tokens"]):
        verbs = words[:2]
    known = flags_of(program, *verbs) | (flags_of(program) if verbs else frozenset())
    used = {word.partition("=")[0] for word in words[:script] if word.startswith("--")}
    negated = {f"--no-{flag.removeprefix('--')}" for flag in known}  # listed beside the other, `--wait, --no-wait`
    assert used <= known | negated | TOLD_BY_HELP_ONLY, page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_public_names_exist(page: pathlib.Path) -> None:
    # `paramesh.routing.cut` and the like are internal paths; a name of the package itself must be public.
    text = re.sub(r"^.*paramesh/.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    # Nor is it one behind a dot or a slash: a host's name, a file's.
    named = set(re.findall(r"(?<![./])\bparamesh\.([A-Za-z]\w*)(?!\.)\b", text))
    modules = {path.stem for path in (ROOT / "client" / "paramesh").iterdir()}
    assert named <= set(paramesh.__all__) | modules | {"__all__"}
