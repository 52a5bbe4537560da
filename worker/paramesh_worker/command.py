"""What the user asks to run: `SCRIPT ARGS...` or `-m MODULE ARGS...`, found in a command line.

Everything after the script belongs to the script, also what looks like one of our options:

    split(["--nproc", "2", "train.py", "--nproc", "9"], {"--nproc": True})
    # (["--nproc", "2"], Command("train.py", ("--nproc", "9"), is_module=False))

That is why this is not left to argparse, which would take options from both sides.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paramesh.errors import ConfigError

__all__ = ["Command", "split"]


@dataclass(frozen=True)
class Command:
    """A user's script or module with its arguments."""

    target: str
    """Path of the script, or dotted name of the module."""
    arguments: tuple[str, ...]
    """What follows it, untouched."""
    is_module: bool

    @property
    def title(self) -> str:
        """A short name for displays: the script's file name or the module's."""
        return self.target if self.is_module else os.path.basename(self.target)

    def argv(self, python: str) -> list[str]:
        """The command line that runs it exactly as a person would, so that the user's folder
        is first on `sys.path`.
        """
        return [python, *(["-m"] if self.is_module else []), self.target, *self.arguments]

    def check(self) -> None:
        """Refuse a script that cannot be run.

        Raises:
            ConfigError: there is no such file.
        """
        if self.is_module or os.path.isfile(self.target):
            return
        if os.path.isdir(self.target) and os.path.isfile(os.path.join(self.target, "__main__.py")):
            return
        what = "is a folder without __main__.py" if os.path.isdir(self.target) else "does not exist"
        raise ConfigError(f"argument SCRIPT: {self.target!r} {what}")


def split(argv: Sequence[str], flags: Mapping[str, bool]) -> tuple[list[str], Command | None]:
    """Split a command line into our options and the user's command.

    Args:
        argv: the arguments without the program's name.
        flags: our options, each with whether it takes a value.

    Returns:
        Our options, and the command; None if the line names none.

    Raises:
        ConfigError: an option before the script is not ours, or `-m` lacks its module.
    """
    position = end = 0
    while position < len(argv):
        token = argv[position]
        if token == "--":
            end, position = position, position + 1
            break
        if token == "-m":
            if position + 1 == len(argv):
                raise ConfigError("argument -m: expected a module's name")
            rest = tuple(argv[position + 2 :])
            return list(argv[:position]), Command(argv[position + 1], rest, is_module=True)
        if not token.startswith("-") or token == "-":
            break
        position += _width(token, flags)
        end = position
    options = list(argv[:end])
    if position >= len(argv):
        return options, None
    return options, Command(argv[position], tuple(argv[position + 1 :]), is_module=False)


def _width(token: str, flags: Mapping[str, bool]) -> int:
    """How many arguments an option takes up, itself included."""
    name, equals, _ = token.partition("=")
    if name not in flags:
        raise ConfigError(f"unknown option {name}; the script's own options go after the script")
    return 2 if flags[name] and not equals else 1
