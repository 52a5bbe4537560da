"""A `ps-server` whose interpreter stands still for a while when it gets SIGUSR1.

    python -m tests.cluster.hog_main [options of ps-server]

As a large allocation, a C extension or an import does it: the process runs, its sockets are
open, and no Python in it comes to its turn, on any thread.
"""

from __future__ import annotations

import ctypes
import signal

SECONDS = 3.0
"""Longer than the failure timeout."""


def hog(_signal: int, _frame: object) -> None:
    """Sleep in C and keep the GIL: `PyDLL`, unlike `CDLL`, does not let go of it."""
    ctypes.PyDLL(None).usleep(int(SECONDS * 1e6))


if __name__ == "__main__":
    from paramesh_server.cli import main

    signal.signal(signal.SIGUSR1, hog)
    main()
