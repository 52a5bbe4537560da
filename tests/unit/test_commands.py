"""What all five commands have in common: one layout of --help, --version, defaults that are shown."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import paramesh
import pytest

COMMANDS = ("ps-coordinator", "ps-server", "ps-worker", "ps-run", "psctl")


def said(command: str, *arguments: str, columns: int = 100) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PARAMESH_")} | {"COLUMNS": str(columns)}
    program = pathlib.Path(sys.executable).with_name(command)
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_version(command: str) -> None:
    assert said(command, "--version") == f"{command} {paramesh.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_its_parts_in_order(command: str) -> None:
    text = said(command, "--help")
    assert text == said(command, "-h")
    lines = text.splitlines()
    assert lines[0].startswith(f"usage: {command} [options]")
    assert lines[1] == ""
    assert re.fullmatch(r"[A-Z].*\.", lines[2]), "one line says what it is for"
    assert lines[3] == ""
    headings = [line for line in lines if re.fullmatch(r"[a-z][a-z ,-]*:", line)]
    assert "options:" in headings
    assert len(headings) >= 4, "options in groups"
    assert headings.index("options:") < headings.index("examples:") == len(headings) - 1 or command == "ps-worker"
    assert f"\n  {command} " in text[text.index("\nexamples:") :]
    assert "\nexit status: 0 " in text
    assert "(default: " in text
    assert not set("╭│") & set(text)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [60, 100, 200])
def test_options_fit_the_terminal(command: str, columns: int) -> None:
    text = said(command, "--help", columns=columns)
    options = text[text.index("\noptions:") : text.index("\nexamples:")]
    assert max(map(len, options.splitlines())) <= columns
