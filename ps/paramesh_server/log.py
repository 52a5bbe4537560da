"""A partition's log: contiguous record headers, the newest few kept. Pure.

    header = log.append(RECORD_KIND_STEP, epoch=1, step=7)
    log.lsn                     # the number of the last record

With one replica the log keeps headers only (nobody reads the payloads again), in a ring,
so that people and tests can see what a partition did last and memory stays bounded.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

RING = 1024
"""Headers kept. About 100 bytes each, so 100 KB a partition; enough to cover the 256
records that a follower may lag, four times over."""


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What identifies one record; zero where a field does not apply to its kind."""

    epoch: int
    """Epoch under which it was appended."""
    lsn: int
    """Its number, contiguous from 1."""
    kind: int
    """A `RecordKind`."""
    client_id: int = 0
    """Who caused it."""
    seq: int = 0
    """The client's sequence number (PUSH, NOOP) or assign id (ASSIGN)."""
    step: int = 0
    """The step that it decided (STEP)."""
    checksum: int = 0
    """crc32 over what the record was made from, for comparing replicas."""


class Log:
    """The headers of one partition's records, in order, without gaps."""

    def __init__(self, keep: int = RING) -> None:
        self._ring: deque[RecordHeader] = deque(maxlen=keep)
        self._lsn = 0

    @property
    def lsn(self) -> int:
        """The number of the last record; 0 when there is none."""
        return self._lsn

    def append(
        self, kind: int, *, epoch: int, client_id: int = 0, seq: int = 0, step: int = 0, checksum: int = 0
    ) -> RecordHeader:
        """Append a record under the next number."""
        self._lsn += 1
        header = RecordHeader(epoch, self._lsn, kind, client_id, seq, step, checksum)
        self._ring.append(header)
        return header

    def tail(self, after: int = 0) -> tuple[RecordHeader, ...]:
        """The kept headers with a number above `after`, oldest first."""
        return tuple(header for header in self._ring if header.lsn > after)
