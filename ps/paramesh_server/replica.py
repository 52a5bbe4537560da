"""One replica of a partition: its role, what it promised, and what it has not applied yet. Pure.

    replica = Replica(machine, me)
    replica.lead(row, now)                      # the map names this process as primary
    replica.appended(now)                       # the machine's log has grown
    replica.commit                              # released up to here

    replica.heed(row.epoch)                     # the map names another one
    replica.greet(epoch)                        # a primary's stream begins
    replica.offer(previous, record)             # in memory, in order: acknowledge replica.last
    replica.learn(commit); replica.due()        # records that may be applied now

A primary applies a record when it appends it, and releases answers when it is committed
(docs/decisions/0010); a follower applies only what is committed, so what it has of an
uncommitted tail can still be replaced. The state machine is a dense partition or the ledger.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from paramesh.errors import refuse
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from paramesh_server.insync import InSync, Ref
from paramesh_server.log import Log, Position, Record
from paramesh_server.writes import SlotFrame


class Machine(Protocol):
    """What is replicated: a state that is a function of its records."""

    id: int
    epoch: int
    log: Log

    def replay(self, record: Record) -> None:
        """Apply a committed record."""

    def raise_epoch(self, epoch: int) -> None:
        """Append the EPOCH record of a new primary."""

    def mark(self) -> int:
        """Append a MARK with the state's checksum; its lsn."""

    def capture(self) -> rp.ReplicaState:
        """The state but for its tensors."""

    def restore(self, state: rp.ReplicaState, writes: Sequence[SlotFrame]) -> None:
        """Become what a snapshot says."""

    def close(self) -> None:
        """Let go of what is volatile."""


class Role(enum.Enum):
    """What a replica does now."""

    PRIMARY = "primary"
    FOLLOWER = "follower"


class Replica:
    """One replica. Not thread-safe: `offer`, `learn` and the role change on the event loop; what
    touches the machine (`apply`, `take_over`) runs under the partition's lock.

    Args:
        machine: the state.
        me: this process.
        lock: held while log and tail are touched, if the pool applies while the event loop
            receives. Must be reentrant.

    Attributes:
        machine: the state and its log; replaced by `install`.
        role: what it does now.
        promised: the highest epoch heard of: nothing older is taken.
        insync: whom it waits for, as primary.
    """

    def __init__(self, machine: Machine, me: Ref, lock: AbstractContextManager[object] | None = None) -> None:
        self._lock = nullcontext() if lock is None else lock
        self.machine = machine
        machine.log.lock = self._lock
        self.me = me
        self.role = Role.FOLLOWER
        self.promised = 0
        self.insync = InSync(me)
        self.pins: dict[Ref, int] = {}
        """Followers that fetch a snapshot -> its number: what follows it is kept for them."""
        self.reign = 0
        """Counts the times that it began to lead: an answer formed in one is nothing in the next."""
        self.version = 0
        """Of the newest row that was followed here."""
        self.diverged = False
        """As follower: what it has applied is not what the primary has; only a snapshot mends it."""
        self._serves_from = 0
        """As primary: nothing is answered before this record, its own EPOCH, is committed."""
        self._tail: deque[Record] = deque()
        """As follower: received and not applied; follows on the machine's log."""
        self._commit = 0
        """As follower: what is committed and is here."""
        self._busy = 0
        """The record that the pool applies now: it is as good as applied."""
        self._matched = 0
        """As follower: up to here this log is known to be that of the primary of `promised`."""

    # Either role.

    @property
    def last(self) -> Position:
        """The last record in memory here."""
        with self._lock:
            return _at(self._tail[-1]) if self._tail else self.machine.log.last

    @property
    def matched(self) -> int:
        """As follower: up to here this log is that of the newest primary, and may be acknowledged to it.

        Beyond it may stand an older primary's records, under numbers that the new one uses for others.
        """
        return self._matched

    @property
    def commit(self) -> int:
        """Everything up to here is committed, as far as this replica knows."""
        return self.insync.commit if self.role is Role.PRIMARY else self._commit

    @property
    def serving(self) -> bool:
        """Whether requests may be answered here."""
        return self.role is Role.PRIMARY and self.insync.commit >= self._serves_from

    # The primary.

    def lead(self, row: pb.Partition, now: float, dead: frozenset[Ref] = frozenset()) -> None:
        """The map names this process: from a follower, `take_over` has run before.

        The first primary of a partition has nothing to take over, and no EPOCH record.
        """
        if self.role is not Role.PRIMARY:
            self.role = Role.PRIMARY
            self.reign += 1
            self._serves_from = self.machine.log.lsn
            self.insync = InSync(self.me, inherited=self._serves_from)
        self.promised = max(self.promised, row.epoch)
        self.insync.follow(row, now, dead)
        self.machine.log.replicated = bool(self.insync.followers)
        self.appended(now)

    def take_over(self, epoch: int) -> None:
        """Apply all that is in memory, whoever committed it, and begin a new epoch.

        Raises:
            Retryable: STALE_EPOCH, if a newer one was promised meanwhile: somebody else leads.
        """
        while self._tail:
            self._check_newest(epoch)
            self._apply_first()
        self._check_newest(epoch)
        self.machine.log.replicated = True
        self.machine.raise_epoch(epoch)

    def _check_newest(self, epoch: int) -> None:
        if self.promised > epoch:
            raise refuse("STALE_EPOCH", f"epoch {epoch} is over, {self.promised} was promised", epoch=self.promised)

    def appended(self, now: float) -> None:
        """The machine's log has grown."""
        if self.role is Role.PRIMARY:
            self.insync.appended(self.machine.log.lsn, now)
            self.trim()

    def early(self, lsn: int, now: float) -> bool:
        """Whether a record may be acknowledged before the followers have it, if the table allows that."""
        if not self.serving:
            return False
        return self.insync.early(lsn, self.machine.log.bytes_after(self.insync.commit), now)

    def trim(self) -> None:
        """Let go of payloads that nobody needs any more."""
        held = self.insync.held if self.role is Role.PRIMARY else self._commit
        self.machine.log.trim(min([held, *self.pins.values()]))

    # The follower.

    def promise(self, epoch: int) -> None:
        """Take nothing of an older epoch from now on."""
        if epoch > self.promised:
            self.promised = epoch
            self._matched = min(self._matched, self._commit)

    def heed(self, epoch: int) -> None:
        """Another process is primary under this epoch: never acknowledge to an older one.

        What this replica applied as primary and never released stays: it is a tail like any
        other, and goes when the new primary's records take its place.
        """
        self.promise(epoch)
        if self.role is Role.PRIMARY and epoch > self.machine.epoch:
            self._commit = self._matched = self.insync.commit
            self.role = Role.FOLLOWER
            self.pins.clear()
        self.machine.log.replicated = True

    def greet(self, epoch: int, version: int = 0) -> None:
        """A primary's stream begins.

        Args:
            epoch: the primary's.
            version: of the row that it follows.

        Raises:
            Retryable: STALE_EPOCH, if a newer one was promised; NOT_READY, if this replica is
                the primary of that very epoch, or follows an older row: by that or the next it
                may be dropped, and what it told the primary would be gone.
        """
        self._check_newest(epoch)
        if self.role is Role.PRIMARY and epoch == self.promised:
            raise refuse("NOT_READY", f"this is the primary of epoch {epoch}")
        if version > self.version:
            raise refuse("NOT_READY", f"the map here is older (row {self.version}) than the primary's ({version})")
        self.heed(epoch)

    def offer(self, epoch: int, previous: Position, record: Record) -> None:
        """Hold a record after the one before it; `last` is what may be acknowledged then.

        Raises:
            Retryable: STALE_EPOCH.
            ParameshError: LOG_GAP, if the record before is not here: send from an earlier one.
            StateRefused: DIVERGED, if it would replace a record that is applied, or the state is
                not the primary's: send a snapshot.
        """
        self.greet(epoch)
        if self.diverged:
            raise refuse("DIVERGED", f"partition {self.machine.id} has another state here than at its primary")
        at = _at(record)
        with self._lock:
            if not self._has(at):
                self._replace(at, previous, record)
            self._matched = max(self._matched, at.lsn)

    def _replace(self, at: Position, previous: Position, record: Record) -> None:
        if at.lsn <= max(self.machine.log.lsn, self._busy):
            raise refuse("DIVERGED", f"record {at.lsn} is applied here, of another epoch than {at.epoch}")
        if not self._has(previous):
            raise refuse("LOG_GAP", f"record {previous.lsn} of epoch {previous.epoch} is not here", lsn=previous.lsn)
        while self._tail and self._tail[-1].header.lsn >= at.lsn:
            self._tail.pop()  # of another epoch: replaced, in the same act as what takes its place
        self._tail.append(record)

    def _has(self, at: Position) -> bool:
        if not self._tail or at.lsn < self._tail[0].header.lsn:
            return self.machine.log.holds(at)
        index = at.lsn - self._tail[0].header.lsn
        return index < len(self._tail) and self._tail[index].header.epoch == at.epoch

    def learn(self, epoch: int, at: Position, commit: int) -> None:
        """The primary says how far is committed, and what it has sent so far.

        Only what is known to be the primary's own log counts: an older primary's record of
        the same number may still stand here.

        Raises:
            Retryable: STALE_EPOCH.
        """
        self.greet(epoch)
        with self._lock:
            if self._has(at):
                self._matched = max(self._matched, at.lsn)
            self._commit = max(self._commit, min(commit, self._matched))

    @property
    def due(self) -> bool:
        """Whether a record may be applied."""
        with self._lock:
            if self.diverged or self.role is not Role.FOLLOWER or not self._tail:
                return False
            return self._tail[0].header.lsn <= self._commit

    def apply(self) -> None:
        """Apply what is due.

        Raises:
            ParameshError: a record does not fit the state, or a MARK does not: it has diverged.
        """
        try:
            while self.due:
                self._apply_first()
        except Exception:
            self.diverged = True
            raise
        self.trim()

    def _apply_first(self) -> None:
        with self._lock:
            first = self._tail[0]
            self._busy = first.header.lsn
        try:
            self.machine.replay(first)
            with self._lock:
                self._tail.popleft()
        finally:
            self._busy = 0

    def install(self, machine: Machine) -> None:
        """Go on from a snapshot; what was there before goes in the same act.

        Raises:
            Retryable: LOG_GAP, if it came late: records after it were acknowledged to the primary.
        """
        machine.log.lock = self._lock
        with self._lock:
            if machine.log.lsn < self._matched:
                raise refuse(
                    "LOG_GAP", f"the snapshot at {machine.log.lsn} is older than {self._matched}, which is here"
                )
            old, self.machine = self.machine, machine
            self._tail.clear()
            self._commit = self._matched = machine.log.lsn
            self.diverged = False
        old.close()
        machine.log.replicated = True


def _at(record: Record) -> Position:
    return Position(record.header.lsn, record.header.epoch)
