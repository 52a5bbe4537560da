"""Epochs of datasets: which chunks are undealt, returned, held or consumed. Pure.

    epochs.check_held(client_id, ranges)      # a Ready or Clock names foreign samples: LEASE
    epochs.consume(client_id, ranges)         # when its record commits
    epochs.give_back(client_id, ranges)       # it was too late

An epoch's permutation is cut into chunks. Who gets which is `ledger_leases`' to decide;
this is what replicas agree on.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from paramesh.errors import ParameshError, refuse
from paramesh.v1.ledger_pb2 import ACTIVITY_IDLE
from paramesh.v1.types_pb2 import SampleRange

from paramesh_server.ledger_deal import Deal, merge
from paramesh_server.ledger_log import (
    ActivitySet,
    Dealt,
    Delivered,
    Desk,
    EpochClosed,
    EpochKey,
    EpochOpened,
    Joined,
    Leased,
    Left,
    MovedOn,
    Returned,
)
from paramesh_server.ledger_members import Members

KEEP_EPOCHS = 64
"""Closed epochs of a dataset in which a member's chunks are remembered: batches that were
delivered may be stepped on later (accumulation over a tiny dataset), but those of an
evaluation never are, and must not add up."""


@dataclass(slots=True)
class EpochState:
    """What replicas agree on about one epoch of one dataset."""

    key: EpochKey
    length: int
    chunk: int
    seed: int
    drop_last: bool
    deal: Deal
    """Chunks that nobody took since they were dealt last."""
    owners: tuple[int, ...]
    """Members dealt to, in rank order; none: first come, first served."""
    absent: set[int] = field(default_factory=set)
    """Members that get no share until they lease from it: idle ones, those whose loop ended."""
    returned: list[int] = field(default_factory=list)
    """Chunks that came back since, a heap."""
    held: dict[int, set[int]] = field(default_factory=dict)
    """Chunks by the member that may train on them."""
    delivered: dict[int, set[int]] = field(default_factory=dict)
    """Of them, by member, what it said it handed to its loop; none: no entry."""
    grants: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    """For each member, (call number, chunks) of its last numbered Lease."""
    consumed: int = 0
    """Samples."""
    closed: bool = False

    @property
    def limit(self) -> int:
        """Samples that are dealt at all."""
        return self.length - self.length % self.chunk if self.drop_last else self.length

    def size(self, chunk: int) -> int:
        """Samples in a chunk; the last may be short."""
        return min(self.chunk, self.limit - chunk * self.chunk)

    def sample_range(self, chunk: int) -> SampleRange:
        """A chunk as it travels."""
        begin = chunk * self.chunk
        return SampleRange(dataset=self.key[0], epoch=self.key[1], begin=begin, end=begin + self.size(chunk))

    def chunks(self, r: SampleRange) -> range:
        """The chunks of a range of whole chunks; empty if it is not one."""
        whole_end = r.end % self.chunk == 0 or r.end == self.limit
        if r.begin % self.chunk or not whole_end or not r.begin < r.end <= self.limit:
            return range(0)
        return range(r.begin // self.chunk, -(-r.end // self.chunk))

    def held_of(self, client_id: int, r: SampleRange) -> set[int]:
        """Those chunks of a range that a member holds, at the cost of the smaller of the two."""
        held, chunks = self.held.get(client_id, set()), self.chunks(r)
        if len(chunks) > len(held):
            return {chunk for chunk in held if chunk in chunks}
        return held.intersection(chunks)

    def position(self, client_id: int) -> int | None:
        """A member's position in the deal; None if it gets no share."""
        if not self.owners:
            return 0
        return self.owners.index(client_id) if client_id in self.owners else None


@dataclass(slots=True)
class EpochsState:
    """What replicas agree on about data."""

    epochs: dict[EpochKey, EpochState] = field(default_factory=dict)
    """Open ones, and closed ones in which somebody still holds chunks or that are the newest."""
    closed: dict[str, set[int]] = field(default_factory=dict)
    """Closed epochs of each dataset: they yield nothing, for ever."""
    positions: dict[tuple[int, str], int] = field(default_factory=dict)
    """For (member, dataset), the epoch it leases from."""


class Epochs:
    """Every epoch of every dataset."""

    def __init__(self, desk: Desk, members: Members):
        self._desk = desk
        self._members = members
        self.state = EpochsState()
        self.open: dict[EpochKey, EpochState] = {}
        """Those of `state.epochs` that are not closed."""
        self.version = 0
        """Counts changes of who takes part in which epoch. Volatile: only compared with itself."""
        for body, apply in (
            (EpochOpened, self._apply_opened),
            (Dealt, self._apply_dealt),
            (Leased, self._apply_leased),
            (Delivered, self._apply_delivered),
            (Returned, self._apply_returned),
            (MovedOn, self._apply_moved),
            (EpochClosed, self._apply_closed),
            (Left, self._apply_left),
            (Joined, self._apply_joined),
            (ActivitySet, self._apply_activity),
        ):
            desk.on(body, apply)

    def install(self, state: EpochsState) -> None:
        """Replace the state by a snapshot's; derive what is derived."""
        self.state = state
        self.open = {key: epoch for key, epoch in state.epochs.items() if not epoch.closed}
        self.version += 1

    # ------------------------------------------------------------------ asking

    def get(self, r: SampleRange) -> EpochState | None:
        """The epoch of a range, if it is remembered."""
        return self.state.epochs.get((r.dataset, r.epoch))

    def moved_on(self, client_id: int, key: EpochKey) -> bool:
        """Whether a member leases from a later epoch of the dataset."""
        return self.state.positions.get((client_id, key[0]), -1) > key[1]

    def holders(self, epoch: EpochState) -> Iterator[int]:
        """Members whose chunks, or whose share, hold the epoch open."""
        for client_id, held in epoch.held.items():
            if not self.moved_on(client_id, epoch.key) and not held <= epoch.delivered.get(client_id, set()):
                yield client_id
        for position, client_id in enumerate(epoch.owners):
            if epoch.deal.available(position):
                yield client_id

    def check_held(self, client_id: int, ranges: Iterable[SampleRange]) -> None:
        """Refuse ranges that are not leased to a member, or that are named twice.

        Raises:
            StateRefused: LEASE.
            RequestRefused: SAMPLE_RANGE, SAMPLE_OUT_OF_RANGE.
        """
        seen: set[tuple[EpochKey, int]] = set()
        for r in ranges:
            epoch = self.get(r)
            _check_range(r, epoch)
            if epoch is None:
                if self._long_over(client_id, r):
                    continue
                raise _foreign(r)
            held, chunks = epoch.held.get(client_id, set()), epoch.chunks(r)
            # Lengths first: a range of 2^60 samples must not be counted out.
            if not 0 < len(chunks) <= len(held) or not held.issuperset(chunks):
                raise _foreign(r)
            named = {(epoch.key, chunk) for chunk in chunks}
            if named & seen:
                raise _foreign(r)
            seen |= named

    def _long_over(self, client_id: int, r: SampleRange) -> bool:
        """Whether an epoch is so old that who held what in it is forgotten."""
        at = self.state.positions.get((client_id, r.dataset), -1)
        return r.epoch in self.state.closed.get(r.dataset, ()) and r.epoch < at - KEEP_EPOCHS

    # ------------------------------------------------------------------ giving back, consuming

    def declare(self, epoch: EpochState, client_id: int, delivered: Iterable[SampleRange]) -> None:
        """Note which of its chunks a member handed to its loop; each Lease tells all of them anew.

        A loop that broke off tells it once and never repeats it, so a record must hold it: else
        the others would wait for that worker after a failover.
        """
        ours = [r for r in delivered if (r.dataset, r.epoch) == epoch.key]
        chunks = {chunk for r in ours for chunk in epoch.held_of(client_id, r)}
        if chunks != epoch.delivered.get(client_id, set()):
            self._desk.commit(Delivered(epoch.key, client_id, tuple(sorted(chunks))))

    def give_back(self, client_id: int, ranges: Iterable[SampleRange]) -> None:
        """Take back the samples of a contribution that was too late; foreign ones are ignored."""
        by_epoch: dict[EpochKey, list[SampleRange]] = {}
        for r in ranges:
            by_epoch.setdefault((r.dataset, r.epoch), []).append(r)
        for key, some in by_epoch.items():
            if key in self.state.epochs:
                self.take_back(self.state.epochs[key], client_id, some, gone=False)

    def take_back(self, epoch: EpochState, client_id: int, ranges: Iterable[SampleRange], *, gone: bool) -> None:
        """Return those of the ranges that a member holds; `gone`: its loop is over."""
        chunks = sorted({chunk for r in ranges for chunk in epoch.held_of(client_id, r)})
        if chunks or (gone and not epoch.closed and client_id not in epoch.absent):
            self._desk.commit(Returned(epoch.key, client_id, tuple(chunks), gone))

    def consume(self, client_id: int, ranges: Iterable[SampleRange]) -> None:
        """Count the samples of a committed record; part of applying it."""
        member = self._members.get(client_id)
        for r in ranges:
            epoch = self.get(r)
            if epoch is None:
                continue
            taken = epoch.held_of(client_id, r)
            samples = sum(epoch.size(chunk) for chunk in taken)
            if taken:
                epoch.held[client_id] -= taken
            epoch.consumed += samples
            if member is not None:
                member.samples += samples
            self._forget_if_done(epoch)
            self._desk.wake(("data", *epoch.key))

    # ------------------------------------------------------------------ applying

    def _apply_opened(self, body: EpochOpened) -> None:
        usable = body.length - body.length % body.chunk if body.drop_last else body.length
        deal = Deal([(0, -(-usable // body.chunk))] if usable else [], max(1, len(body.owners)))
        epoch = EpochState(body.key, body.length, body.chunk, body.seed, body.drop_last, deal, body.owners)
        for member in self._members.state.members.values():
            at = self.state.positions.get((member.client_id, body.key[0]))
            if member.activity == ACTIVITY_IDLE and at != body.key[1]:
                epoch.absent.add(member.client_id)
        self.state.epochs[body.key] = self.open[body.key] = epoch

    def _apply_dealt(self, body: Dealt) -> None:
        epoch = self.state.epochs[body.key]
        epoch.deal = Deal(merge(epoch.deal.remaining(), epoch.returned), max(1, len(body.owners)))
        epoch.owners, epoch.returned = body.owners, []
        epoch.absent.update(body.absent)
        self.version += bool(body.absent)
        self._desk.wake(("data", *body.key))

    def _apply_leased(self, body: Leased) -> None:
        epoch = self.state.epochs[body.key]
        position = epoch.position(body.client_id)
        chunks = epoch.deal.take(position, body.own) if body.own and position is not None else []
        chunks += [heapq.heappop(epoch.returned) for _ in body.returned]
        epoch.held.setdefault(body.client_id, set()).update(chunks)
        if body.call:
            epoch.grants[body.client_id] = (body.call, tuple(chunks))
        self._members.unpark(self._members.state.members[body.client_id])

    def _apply_delivered(self, body: Delivered) -> None:
        delivered = self.state.epochs[body.key].delivered
        if body.chunks:
            delivered[body.client_id] = set(body.chunks)
        else:
            delivered.pop(body.client_id, None)

    def _apply_returned(self, body: Returned) -> None:
        epoch = self.state.epochs[body.key]
        if body.chunks:
            epoch.held[body.client_id] -= set(body.chunks)
            self._to_returned(epoch, body.chunks)
        if body.gone and not epoch.closed:
            epoch.absent.add(body.client_id)
            self._changed()

    def _to_returned(self, epoch: EpochState, chunks: Iterable[int]) -> None:
        if epoch.closed:  # delivered, and in no step any more
            self._forget_if_done(epoch)
            return
        for chunk in chunks:
            heapq.heappush(epoch.returned, chunk)
        self._desk.wake(("data", *epoch.key))

    def _apply_moved(self, body: MovedOn) -> None:
        dataset, number = body.key
        self.state.positions[body.client_id, dataset] = number
        if body.key in self.open:
            self.open[body.key].absent.discard(body.client_id)
        for epoch in [e for (d, n), e in self.state.epochs.items() if d == dataset and n < number - KEEP_EPOCHS]:
            if epoch.closed:
                epoch.held.pop(body.client_id, None)
                self._forget_if_done(epoch)
        self._changed()

    def _apply_closed(self, body: EpochClosed) -> None:
        epoch = self.open.pop(body.key)
        epoch.closed = True
        epoch.grants.clear()
        epoch.delivered.clear()
        epoch.returned.clear()
        epoch.absent.clear()
        epoch.deal, epoch.owners = Deal([], 1), ()
        self.state.closed.setdefault(body.key[0], set()).add(body.key[1])
        for member in self._members.state.members.values():
            if member.parked == body.key:
                self._members.unpark(member)
        for other in [e for e in self.state.epochs.values() if e.closed]:
            self._forget_if_done(other)
        self._desk.wake(("data", *body.key))

    def _forget_if_done(self, epoch: EpochState) -> None:
        """Drop a closed epoch that nobody holds chunks of, unless people still look at it."""
        newest = max((n for d, n in self.state.epochs if d == epoch.key[0]), default=0)
        if epoch.closed and epoch.key[1] != newest and not any(epoch.held.values()):
            self.state.epochs.pop(epoch.key, None)

    def _apply_left(self, body: Left) -> None:
        for epoch in list(self.state.epochs.values()):
            epoch.grants.pop(body.client_id, None)
            epoch.absent.discard(body.client_id)
            epoch.delivered.pop(body.client_id, None)
            chunks = epoch.held.pop(body.client_id, set())
            if chunks:
                self._to_returned(epoch, sorted(chunks))
        for key in [key for key in self.state.positions if key[0] == body.client_id]:
            del self.state.positions[key]
        self._changed()

    def _apply_joined(self, _: Joined) -> None:
        self._changed()

    def _apply_activity(self, body: ActivitySet) -> None:
        if body.activity == ACTIVITY_IDLE:
            for epoch in self.open.values():
                epoch.absent.add(body.client_id)
        if body.parked is None:
            self._changed()

    def _changed(self) -> None:
        """Who takes part may have changed: whoever waits for leases asks again."""
        self.version += 1
        for key in self.open:
            self._desk.wake(("data", *key))


def _check_range(r: SampleRange, epoch: EpochState | None) -> None:
    if r.begin >= r.end:
        raise refuse(
            "SAMPLE_RANGE", f"samples {r.begin} to {r.end} of dataset {r.dataset!r} are none", begin=r.begin, end=r.end
        )
    if epoch is not None and r.end > epoch.length:
        raise refuse(
            "SAMPLE_OUT_OF_RANGE",
            f"samples {r.begin} to {r.end} end beyond dataset {r.dataset!r}, which has {epoch.length}",
            end=r.end,
            length=epoch.length,
        )


def _foreign(r: SampleRange) -> ParameshError:
    return refuse(
        "LEASE",
        f"samples {r.begin} to {r.end} of epoch {r.epoch} of dataset {r.dataset!r} are not leased to this worker",
        begin=r.begin,
        end=r.end,
        epoch=r.epoch,
        dataset=r.dataset,
    )
