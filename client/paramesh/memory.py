"""Memory of processes that serve: buffers that are kept, and objects that the collector may forget.

*Big buffers*: tell glibc's malloc to reuse freed memory instead of returning it.

A frame is 2 MiB. By default glibc maps such a block anew each time, or gives the top of
its heap back after each free, and every step pays the page faults again: on two cores a
256 MB push moved 0.8 GB/s so, and 1.9 GB/s with these settings (bare gRPC: 1.9). What is
kept is at most the process's own peak.

*Imports*: torch and grpc are 185,000 objects that live as long as the process. Each full collection
looks at all of them, with the GIL held: 33-55 ms on a quiet machine, several times that on a busy one,
in which a server answers nobody.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

_MMAP_THRESHOLD = 32 << 20
"""glibc's own maximum on 64-bit; blocks below it come from the heap."""

_TRIM_THRESHOLD = 2**31 - 1
"""The largest that `mallopt` takes: never trim."""

_TOP_PAD = 64 << 20
"""Grow the heap in steps of 64 MiB: one system call for 32 frames."""


def keep_big_buffers() -> bool:
    """Apply the settings to this process; whether they took.

    Does nothing off Linux's glibc, with PARAMESH_MALLOC=0, or where the user has set
    glibc's own MALLOC_ variables.
    """
    if sys.platform != "linux" or os.environ.get("PARAMESH_MALLOC") == "0":
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl and others have no such call
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, _TRIM_THRESHOLD),
        (_M_TOP_PAD, _TOP_PAD),
    )
    return all(mallopt(name, value) == 1 for name, value in settings)


def keep_imports() -> None:
    """Have the garbage collector take what is there now for permanent. For our own processes, once they serve."""
    gc.collect()
    gc.freeze()
