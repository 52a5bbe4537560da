"""Named places where a test may end or stop this process, or have its file system say no. Inert in use.

    PARAMESH_FAILPOINTS=checkpoint.file.synced=exit             # at any of them
    PARAMESH_FAILPOINTS=checkpoint.file.synced/ledger.bin=exit,checkpoint.manifest.begun=ENOSPC
    PARAMESH_FAILPOINTS=@/tmp/points                            # a folder: of each place a file that says what

    failpoints.reach("checkpoint.file.synced", "ledger.bin")    # in the code: the name, and what it is about

What there is to do at a place:

- `exit` ends the process at once with status EXIT: no handler, no `finally`, no buffer written out;
- `kill` the same by SIGKILL; its file goes first, so that the next process passes;
- `hang` has the thread wait until the file goes;
- the name of an errno raises that OSError.

In a folder a file is named as the place, with % for /; a test arms and disarms places of a process that runs.
Only the environment of a process can switch this on, nothing that arrives from outside it.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

__all__ = ["EXIT", "VARIABLE", "armed", "check", "file_of", "reach"]

VARIABLE = "PARAMESH_FAILPOINTS"

EXIT = 86
"""Exit status of a process that ended at a failpoint: no other part of Paramesh uses it."""

LOOK_SECONDS = 0.02


def armed() -> bool:
    """Whether any place may do anything in this process."""
    return VARIABLE in os.environ


def reach(name: str, about: str = "") -> None:
    """Do what the environment says for this place: nothing, almost always.

    Args:
        name: of the place, dotted.
        about: what it is about just now, such as a file's name; a point may name it too.

    Raises:
        OSError: the environment asks for one.
        ValueError: it asks for something that there is not; a misspelt test must not pass.
    """
    said = os.environ.get(VARIABLE)
    if not said:
        return
    places = [f"{name}/{about}", name]
    if not said.startswith("@"):
        points = check(said)
        _act(name, next((points[place] for place in places if place in points), ""), None)
        return
    for place in places:
        file = file_of(said[1:], place)
        try:
            action = file.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        _act(name, _checked(action, place), file)
        return


def check(said: str) -> dict[str, str]:
    """What is to happen where.

    Raises:
        ValueError: the text names an action that there is not.
    """
    points = {}
    for item in filter(None, (part.strip() for part in said.split(","))):
        point, _, action = item.partition("=")
        if not point or action == "hang":  # which only a file that goes can end
            raise ValueError(f"{VARIABLE}: {item!r} is not NAME=exit, NAME=kill or NAME=ERRNO")
        points[point] = _checked(action, point)
    return points


def file_of(folder: str | Path, place: str) -> Path:
    """Where a folder says what happens at a place."""
    return Path(folder, place.replace("/", "%"))


def _checked(action: str, place: str) -> str:
    if action not in ("exit", "kill", "hang") and action not in errno.errorcode.values():
        raise ValueError(f"{VARIABLE}: {place}={action} is not exit, kill, hang or an errno, such as ENOSPC")
    return action


def _act(name: str, action: str, file: Path | None) -> None:
    if action == "exit":
        os._exit(EXIT)
    elif action == "kill":
        if file is not None:
            file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        while file is not None and file.exists():
            time.sleep(LOOK_SECONDS)
    elif action:
        code = getattr(errno, action)
        raise OSError(code, os.strerror(code), f"failpoint {name}")
