"""A partition's log: contiguous records, the newest few kept. Pure.

    header = log.append(RECORD_KIND_STEP, epoch=1, step=7)
    log.lsn                     # the number of the last record
    log.after(lsn)              # records with their payloads, or None: out of reach

Headers are kept in a ring, so that people and tests can see what a partition did last.
Payloads are kept only while `replicated`: until every in-sync replica has them, and a little
longer, so that a follower that was away for a moment need not fetch a snapshot.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from paramesh.framing import Buffer
from paramesh.v1 import replication_pb2 as rp

RING = 1024
"""Headers kept. About 100 bytes each, so 100 KB a partition; enough to cover the 256
records that a follower may lag, four times over."""

KEPT_RECORDS = 256
"""Records kept with their payloads although every in-sync replica has them."""

KEPT_BYTES = 4 << 20
"""Payload bytes kept so, per partition: a hundred of them keep less than the values of one GiB
table take. Steps of larger partitions are let go of at once; a snapshot is hardly more than one."""


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


@dataclass(frozen=True, slots=True)
class Record:
    """One record with everything that applying it needs."""

    header: RecordHeader
    body: rp.LogRecord
    """The record as it travels, but for its payload."""
    payload: tuple[Buffer, ...] = ()
    """Its bytes, laid end to end. Never changed: followers may still be reading."""

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return self.body.payload_bytes


class Position(NamedTuple):
    """A place in a log: two logs that agree on it agree on everything before."""

    lsn: int
    epoch: int


START = Position(0, 0)
"""Before the first record."""


class Log:
    """One partition's records, in order, without gaps.

    Attributes:
        lock: held while the records are touched. Nothing by itself; a shell whose pool appends
            while its event loop reads for followers gives a real one.
    """

    def __init__(self, keep: int = RING) -> None:
        self.lock: AbstractContextManager[object] = nullcontext()
        self._replicated = False
        self._ring: deque[RecordHeader] = deque(maxlen=keep)
        self._base = START
        """Where the ring began: a snapshot's place, or the start."""
        self._records: deque[Record] = deque()
        self._bytes = 0
        self._last = START

    @property
    def lsn(self) -> int:
        """The number of the last record; 0 when there is none."""
        return self._last.lsn

    @property
    def last(self) -> Position:
        """The last record's number and epoch."""
        return self._last

    @property
    def replicated(self) -> bool:
        """Whether payloads are kept for followers."""
        return self._replicated

    @replicated.setter
    def replicated(self, on: bool) -> None:
        with self.lock:
            self._replicated = on
            if not on:
                self._records.clear()
                self._bytes = 0

    def append(
        self,
        kind: int,
        *,
        epoch: int,
        client_id: int = 0,
        seq: int = 0,
        step: int = 0,
        checksum: int = 0,
        body: rp.LogRecord | None = None,
        payload: Sequence[Buffer] = (),
    ) -> RecordHeader:
        """Append a record under the next number.

        Args:
            kind: a `RecordKind`.
            epoch: the appending primary's.
            client_id: who caused it.
            seq: its sequence number or assign id.
            step: the step that it decided.
            checksum: crc32 over what it was made from.
            body: what its kind needs beyond that; taken over and completed.
            payload: its bytes; kept as they are, so they must not change any more.
        """
        header = RecordHeader(epoch, self.lsn + 1, kind, client_id, seq, step, checksum)
        self._take(header, _complete(header, body, payload) if self._replicated else None)
        return header

    def adopt(self, record: Record) -> RecordHeader:
        """Append a record that a primary has numbered.

        Raises:
            ValueError: its number is not the next one.
        """
        if record.header.lsn != self.lsn + 1:
            raise ValueError(f"record {record.header.lsn} does not follow {self.lsn}")
        self._take(record.header, record if self._replicated else None)
        return record.header

    def _take(self, header: RecordHeader, record: Record | None) -> None:
        with self.lock:
            if record is not None:
                self._records.append(record)
                self._bytes += record.nbytes
            self._ring.append(header)
            self._last = Position(header.lsn, header.epoch)

    def trim(self, held: int) -> None:
        """Let go of payloads up to `held`, which every in-sync replica has, beyond what is kept anyway."""
        with self.lock:
            while self._records and self._records[0].header.lsn <= held and self._too_much():
                self._bytes -= self._records.popleft().nbytes

    def _too_much(self) -> bool:
        return len(self._records) > KEPT_RECORDS or self._bytes > KEPT_BYTES

    def after(self, lsn: int) -> list[Record] | None:
        """Records with a number above `lsn`, oldest first; None if some are not kept any more."""
        with self.lock:
            if lsn >= self.lsn:
                return [] if lsn == self.lsn else None
            first = self._records[0].header.lsn if self._records else self.lsn + 1
            if lsn + 1 < first:
                return None
            return list(itertools.islice(self._records, lsn + 1 - first, None))

    def bytes_after(self, lsn: int) -> int:
        """Payload bytes that are kept of records with a number above `lsn`."""
        with self.lock:
            total, left = 0, self.lsn - lsn
            for record in itertools.islice(reversed(self._records), left):
                total += record.nbytes
            return total

    def holds(self, at: Position) -> bool:
        """Whether this log has a record of that number and epoch; so it agrees up to there."""
        with self.lock:
            if at in (self._base, self._last):
                return True
            if not self._ring or not self._ring[0].lsn <= at.lsn <= self.lsn:
                return False
            return self._ring[at.lsn - self._ring[0].lsn].epoch == at.epoch

    def before(self, lsn: int) -> Position:
        """The place before a record that `after` returned."""
        with self.lock:
            if lsn - 1 == self._base.lsn:
                return self._base
            header = self._ring[lsn - 1 - self._ring[0].lsn]
            return Position(header.lsn, header.epoch)

    def reset(self, at: Position) -> None:
        """Begin anew at a snapshot's place."""
        with self.lock:
            self._ring.clear()
            self._records.clear()
            self._bytes = 0
            self._base = self._last = at

    def tail(self, after: int = 0) -> tuple[RecordHeader, ...]:
        """The kept headers with a number above `after`, oldest first."""
        return tuple(header for header in self._ring if header.lsn > after)


def _complete(header: RecordHeader, body: rp.LogRecord | None, payload: Sequence[Buffer]) -> Record:
    body = body if body is not None else rp.LogRecord()
    body.epoch, body.lsn, body.kind = header.epoch, header.lsn, rp.RecordKind.ValueType(header.kind)
    body.client_id, body.seq, body.step, body.checksum = header.client_id, header.seq, header.step, header.checksum
    body.payload_bytes = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in payload)
    return Record(header, body, tuple(payload))


def record_of(body: rp.LogRecord, payload: Sequence[Buffer]) -> Record:
    """A record as it was received."""
    header = RecordHeader(body.epoch, body.lsn, body.kind, body.client_id, body.seq, body.step, body.checksum)
    return Record(header, body, tuple(payload))
