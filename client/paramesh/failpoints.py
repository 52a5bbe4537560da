"""Named places at which a test can end or stop this process. Inert unless PARAMESH_FAILPOINTS is set at its start.

    failpoints.reach("commit.before.server_dead")

PARAMESH_FAILPOINTS names a folder. A place whose file is there does what the file says: `kill`
(SIGKILL of this process; the file goes first, so the next process passes) or `hang` (the calling
thread waits until the file goes). So a test arms and disarms places of a process that runs.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

__all__ = ["ARMED", "reach"]

_FOLDER = os.environ.get("PARAMESH_FAILPOINTS", "")

ARMED = bool(_FOLDER)
"""Whether any place may do anything in this process."""

LOOK_SECONDS = 0.02


def reach(place: str) -> None:
    """This process is at `place`."""
    if ARMED:
        _act(Path(_FOLDER, place))


def _act(file: Path) -> None:
    try:
        act = file.read_text().strip()
    except OSError:
        return
    if act == "kill":
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    while act == "hang" and file.exists():
        time.sleep(LOOK_SECONDS)
