"""Named places where a test may have a process die, or a file system say no. Inert in use.

    PARAMESH_FAILPOINTS=checkpoint.file.synced=exit          # at any of them
    PARAMESH_FAILPOINTS=checkpoint.file.synced/ledger.bin=exit,checkpoint.manifest.begun=ENOSPC
    PARAMESH_FAILPOINTS=@/tmp/points                          # what that file says at the moment; no file: nothing

    failpoints.reach("checkpoint.file.synced", "ledger.bin")  # in the code: the name, and what it is about

`exit` ends the process at once with status EXIT: no handler, no `finally`, no buffer written
out. The name of an errno raises that OSError. Only the environment of a process can switch
this on, nothing that arrives from outside it.
"""

from __future__ import annotations

import errno
import os

__all__ = ["EXIT", "VARIABLE", "check", "reach"]

VARIABLE = "PARAMESH_FAILPOINTS"

EXIT = 86
"""Exit status of a process that ended at a failpoint: no other part of Paramesh uses it."""


def reach(name: str, about: str = "") -> None:
    """Do what the environment says for this place: nothing, almost always.

    Args:
        name: of the place, dotted.
        about: what it is about just now, such as a file's name; a point may name it too.

    Raises:
        OSError: the environment asks for one.
    """
    said = os.environ.get(VARIABLE)
    if not said:
        return
    points = check(_read(said[1:]) if said.startswith("@") else said)
    action = points.get(f"{name}/{about}") or points.get(name)
    if action == "exit":
        os._exit(EXIT)
    if action:
        code = getattr(errno, action)
        raise OSError(code, os.strerror(code), f"failpoint {name}")


def check(said: str) -> dict[str, str]:
    """What is to happen where.

    Raises:
        ValueError: the text names an action that there is not; a misspelt test must not pass.
    """
    points = {}
    for item in filter(None, (part.strip() for part in said.replace("\n", ",").split(","))):
        point, _, action = item.partition("=")
        if not point or (action != "exit" and action not in errno.errorcode.values()):
            raise ValueError(f"{VARIABLE}: {item!r} is not NAME=exit or NAME=ERRNO, such as checkpoint.begun=ENOSPC")
        points[point] = action
    return points


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""
