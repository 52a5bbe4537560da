"""What a training process said of the error that ended it, for the supervisor to judge.

`import paramesh` writes it (`paramesh.last_words`) to the file that PARAMESH_ERROR_FILE names: a file in
memory that only we hold open, so that nothing is left on a disk whatever happens to us.

    words = LastWords("worker 0")
    ... PARAMESH_ERROR_FILE=words.path ...
    words.read(pid)                        # Words(kind="PartitionOffline", reason="PARTITION_OFFLINE", ...)
"""

from __future__ import annotations

import json
import os

from .restarts import Words

__all__ = ["LastWords"]

LONGEST = 64 * 1024
"""Bytes that are read at most; the library writes a few hundred."""


class LastWords:
    """The last words of one slot's processes, one after the other."""

    def __init__(self, name: str) -> None:
        self._fd = os.memfd_create(name)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        """Opens the same file in a child of the same user, without a descriptor that its own children inherit."""

    def forget(self) -> None:
        """Empty it for the next process."""
        os.truncate(self._fd, 0)

    def read(self, pid: int) -> Words | None:
        """What the process `pid` said; None if it said nothing. Words of its children do not count."""
        try:
            said = json.loads(os.pread(self._fd, LONGEST, 0))
            words = Words(str(said["kind"]), str(said["reason"]), str(said["message"]), bool(said["of_the_script"]))
        except (ValueError, KeyError, TypeError):
            return None
        return words if said["pid"] == pid else None

    def close(self) -> None:
        """Give the memory back."""
        os.close(self._fd)
