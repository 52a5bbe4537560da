"""What the user asks to run: `SCRIPT ARGS...` or `-m MODULE ARGS...`, found in a command line.

Everything after the script belongs to the script, also what looks like one of our options:

    split(["--nproc", "2", "train.py", "--nproc", "9"], {"--nproc": True})
    # (["--nproc", "2"], Command("train.py", ("--nproc", "9"), is_module=False))

That is why this is not left to argparse, which would take options from both sides.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder

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
        """Refuse what cannot be run, before anything is started for it.

        Raises:
            ConfigError: there is no such file or module, or the file is no Python.
        """
        if self.is_module:
            return self._check_module()
        if os.path.isfile(self.target):
            return self._check_syntax()
        if os.path.isdir(self.target) and os.path.isfile(os.path.join(self.target, "__main__.py")):
            return
        what = "is a folder without __main__.py" if os.path.isdir(self.target) else "does not exist"
        raise ConfigError(f"argument SCRIPT: {self.target!r} {what}")

    def _check_syntax(self) -> None:
        # Python runs archives and compiled files too; only sources can be looked into.
        if not self.target.endswith(".py"):
            return
        try:
            with open(self.target, "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # They are said when it runs.
                compile(file.read(), self.target, "exec", dont_inherit=True)
        except SyntaxError as error:
            where = f"{self.target}:{error.lineno}" if error.lineno else self.target
            raise ConfigError(f"argument SCRIPT: {where}: {type(error).__name__}: {error.msg}") from None
        except ValueError as error:
            raise ConfigError(f"argument SCRIPT: {self.target!r} is no Python source: {error}") from None
        except OSError as error:
            raise ConfigError(f"argument SCRIPT: {self.target!r} cannot be read: {error.strerror}") from None

    def _check_module(self) -> None:
        # The outermost package only: to look further would run its code here.
        package = self.target.partition(".")[0]
        if package in sys.builtin_module_names or PathFinder.find_spec(package, ["", *sys.path]):
            return
        for finder in sys.meta_path:  # as editable installs bring along
            if finder.find_spec(package, None) is not None:
                return
        raise ConfigError(f"argument -m: there is no module {package!r} here")


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
