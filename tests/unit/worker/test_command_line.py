"""Where our options end and the script's begin."""

from __future__ import annotations

from pathlib import Path

import pytest
from paramesh.errors import ConfigError
from paramesh_worker.command import Command, split

FLAGS = {"--nproc": True, "--tee": False, "-h": False}


@pytest.mark.parametrize(
    ("line", "options", "command"),
    [
        ("train.py", "", Command("train.py", (), False)),
        ("--nproc 2 train.py --nproc 9", "--nproc 2", Command("train.py", ("--nproc", "9"), False)),
        ("--nproc=2 --tee train.py -h", "--nproc=2 --tee", Command("train.py", ("-h",), False)),
        ("train.py -m x -- y", "", Command("train.py", ("-m", "x", "--", "y"), False)),
        ("--tee -- train.py -- z", "--tee", Command("train.py", ("--", "z"), False)),
        ("-- --odd.py a", "", Command("--odd.py", ("a",), False)),
        ("-m pkg.train --nproc 9", "", Command("pkg.train", ("--nproc", "9"), True)),
        ("--nproc 2 -m pkg -m other", "--nproc 2", Command("pkg", ("-m", "other"), True)),
        ("--nproc -- train.py", "--nproc --", Command("train.py", (), False)),
        ("- x", "", Command("-", ("x",), False)),
    ],
)
def test_split(line: str, options: str, command: Command):
    assert split(line.split(), FLAGS) == (options.split(), command)


def test_arguments_pass_through_byte_for_byte():
    arguments = ["", " ", "--x=a b", "'quoted\"", "ünï", "--", "-m", "\n"]
    _, command = split(["t.py", *arguments], FLAGS)
    assert command is not None
    assert command.argv("python")[2:] == arguments


def test_no_command():
    assert split(["--nproc", "2"], FLAGS) == (["--nproc", "2"], None)
    assert split([], FLAGS) == ([], None)
    assert split(["--tee", "--"], FLAGS) == (["--tee"], None)


def test_an_unknown_option_before_the_script_is_named():
    with pytest.raises(ConfigError, match=r"unknown option --lr; the script's own options go after"):
        split(["--lr=0.1", "train.py"], FLAGS)


def test_m_needs_a_module():
    with pytest.raises(ConfigError, match="-m: expected a module"):
        split(["-m"], FLAGS)


def test_argv_is_what_a_person_would_type():
    assert Command("a/t.py", ("x",), False).argv("py") == ["py", "a/t.py", "x"]
    assert Command("pkg.t", ("x",), True).argv("py") == ["py", "-m", "pkg.t", "x"]


def test_a_script_must_exist(tmp_path: Path):
    script = tmp_path / "t.py"
    with pytest.raises(ConfigError, match=r"SCRIPT.*does not exist"):
        Command(str(script), (), False).check()
    with pytest.raises(ConfigError, match=r"SCRIPT.*is a folder without __main__"):
        Command(str(tmp_path), (), False).check()
    script.touch()
    (tmp_path / "__main__.py").touch()
    Command(str(script), (), False).check()
    Command(str(tmp_path), (), False).check()


def test_a_script_that_is_no_python_is_refused_with_its_line(tmp_path: Path):
    script = tmp_path / "t.py"
    script.write_text("import os\nfor x in\n")
    with pytest.raises(ConfigError, match=r"argument SCRIPT: .*t\.py:2: SyntaxError: invalid syntax"):
        Command(str(script), (), False).check()
    script.write_bytes(b"x = 1\0")
    with pytest.raises(ConfigError, match=r"argument SCRIPT: .*t\.py"):
        Command(str(script), (), False).check()
    # What is not called .py may be an archive or compiled: Python decides.
    odd = tmp_path / "odd"
    odd.write_text("for x in\n")
    Command(str(odd), (), False).check()


def test_a_module_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="-m: there is no module 'no_such_package'"):
        Command("no_such_package.train", (), True).check()
    (tmp_path / "mine.py").touch()
    monkeypatch.chdir(tmp_path)
    for module in ("mine", "json.tool", "sys", "paramesh_worker.cli"):
        Command(module, (), True).check()
