"""Data leases: who trains on which samples of an epoch. Pure.

    answer = leases.lease(request)            # LeaseResponse, or Wait
    leases.check_held(client_id, ranges)      # a Ready or Clock names foreign samples: LEASE
    leases.consume(client_id, ranges)         # when its record commits

An epoch's permutation is cut into chunks. In lockstep modes the i-th lease of position r
among W is chunk i * W + r, so arrival order does not matter; when who takes part changes,
what is left and what came back is dealt anew. In async and ssp chunks go to whoever asks.

A chunk is undealt, returned, held by one member, or consumed. Those held by a member that
declared them delivered, or that has moved on to a later epoch, do not hold the epoch open.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Iterator

from paramesh.errors import ParameshError, refuse
from paramesh.routing import check_name
from paramesh.v1.ledger_pb2 import (
    ACTIVITY_ACTIVE,
    ACTIVITY_BETWEEN,
    ACTIVITY_IDLE,
    LeaseRequest,
    LeaseResponse,
    ReturnLeasesRequest,
)
from paramesh.v1.types_pb2 import SampleRange

from paramesh_server.ledger_deal import Deal, merge
from paramesh_server.ledger_groups import Groups
from paramesh_server.ledger_log import (
    START,
    ActivitySet,
    Dealt,
    Desk,
    EpochClosed,
    EpochKey,
    EpochOpened,
    Joined,
    Leased,
    Left,
    MovedOn,
    Returned,
    Wait,
)
from paramesh_server.ledger_members import Members, MemberState

MAX_WANT = 1024
"""Leases in one answer: a range is about 20 bytes, so an answer stays near 20 KB."""

MAX_OPEN_EPOCHS = 1024
"""Epochs open at once over all datasets; a job has a handful, a flood must not fill memory."""

MAX_CHUNKS = 1 << 32
"""Chunks of one epoch; far above any, far below where sizes overflow."""


@dataclasses.dataclass(slots=True)
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
    returned: list[int] = dataclasses.field(default_factory=list)
    """Chunks that came back since, a heap."""
    held: dict[int, set[int]] = dataclasses.field(default_factory=dict)
    """Chunks by the member that may train on them."""
    grants: dict[int, tuple[int, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
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

    def range(self, chunk: int) -> SampleRange:
        """A chunk as it travels."""
        begin = chunk * self.chunk
        return SampleRange(dataset=self.key[0], epoch=self.key[1], begin=begin, end=begin + self.size(chunk))


@dataclasses.dataclass(slots=True)
class LeasesState:
    """What replicas agree on about data."""

    epochs: dict[EpochKey, EpochState] = dataclasses.field(default_factory=dict)
    """Open ones, and closed ones in which somebody still holds chunks or that are the newest."""
    closed: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    """Closed epochs of each dataset: they yield nothing, for ever."""
    positions: dict[tuple[int, str], int] = dataclasses.field(default_factory=dict)
    """For (member, dataset), the epoch it leases from."""


class Leases:
    """Deals the samples of every epoch."""

    def __init__(self, desk: Desk, members: Members, groups: Groups):
        self._desk = desk
        self._members = members
        self._groups = groups
        self.state = LeasesState()
        self._open: dict[EpochKey, EpochState] = {}
        """Those of `state.epochs` that are not closed."""
        self._delivered: dict[tuple[EpochKey, int], set[int]] = {}
        """Chunks that a member said it handed to its loop. Volatile: each Lease tells anew."""
        self._moves = 0
        """Counts MovedOn records."""
        self._dealt_at: dict[EpochKey, tuple[int, int, bool]] = {}
        """What the owners of a deal were derived from, to notice changes cheaply. Volatile."""
        desk.on(EpochOpened, self._apply_opened)
        desk.on(Dealt, self._apply_dealt)
        desk.on(Leased, self._apply_leased)
        desk.on(Returned, self._apply_returned)
        desk.on(MovedOn, self._apply_moved)
        desk.on(EpochClosed, self._apply_closed)
        desk.on(Left, self._apply_left)
        desk.on(Joined, lambda _: self._wake_all())
        desk.on(ActivitySet, self._apply_activity)

    # ------------------------------------------------------------------ Lease

    def lease(self, request: LeaseRequest) -> LeaseResponse | Wait:
        """Hand out chunks, say that the epoch is over, or wait.

        Raises:
            RequestRefused: NAME, MISSING_FIELD.
            StateRefused: SCHEMA, QUOTA.
            Fenced: EVICTED, NOT_MEMBER.
        """
        member = self._members.need(request.request.client_id)
        _check_request(request)
        if request.epoch in self.state.closed.get(request.dataset, ()):
            return self._answer(member, finished=True)
        if not self._members.state.started:
            return Wait(START, "the job's first lease", lambda: ())
        epoch = self._opened(member, request)
        repeated = self._repeated(epoch, member, request)
        if repeated is not None:
            return repeated
        self._declare(epoch, member, request.delivered)
        self._deal_anew(epoch)
        chunks = self._grant(epoch, member, min(request.want or 1, MAX_WANT), request.call)
        if chunks:
            return self._answer(member, [epoch.range(chunk) for chunk in chunks])
        self.settle()
        if epoch.closed:
            return self._answer(member, finished=True)
        return self._park(epoch, member) if request.wait else self._answer(member)

    @staticmethod
    def _answer(member: MemberState, leases: Iterable[SampleRange] = (), *, finished: bool = False) -> LeaseResponse:
        return LeaseResponse(
            leases=leases,
            finished=finished,
            lease_epoch=member.joined_order,
            between=member.activity != ACTIVITY_ACTIVE,
        )

    def _opened(self, member: MemberState, request: LeaseRequest) -> EpochState:
        key = (request.dataset, request.epoch)
        epoch = self.state.epochs.get(key)
        if epoch is not None:
            self._compare(epoch, request)
        elif len(self._open) >= MAX_OPEN_EPOCHS:
            raise refuse("QUOTA", f"at most {MAX_OPEN_EPOCHS} epochs may be open at once")
        if member.activity == ACTIVITY_IDLE:  # it asks for work, so it is expected back
            self._members.set_activity(member, ACTIVITY_BETWEEN)
        if self.state.positions.get((member.client_id, key[0])) != key[1]:
            self._desk.commit(MovedOn(key, member.client_id))
        if epoch is None:
            terms = (request.length, request.chunk, request.seed, request.drop_last)
            self._desk.commit(EpochOpened(key, *terms, self._owners(key)))
            self._dealt_at[key] = self._basis()
        return self.state.epochs[key]

    @staticmethod
    def _compare(epoch: EpochState, request: LeaseRequest) -> None:
        for name in ("length", "chunk", "seed", "drop_last"):
            if getattr(epoch, name) != getattr(request, name):
                raise refuse(
                    "SCHEMA",
                    f"epoch {request.epoch} of dataset {request.dataset!r} has {name} {getattr(epoch, name)}, this "
                    f"worker says {getattr(request, name)}: every worker must use the same",
                    field=name,
                    expected=getattr(epoch, name),
                )

    def _repeated(self, epoch: EpochState, member: MemberState, request: LeaseRequest) -> LeaseResponse | None:
        call, chunks = epoch.grants.get(member.client_id, (0, ()))
        if not request.call or call != request.call:
            return None
        held = epoch.held.get(member.client_id, set())
        return self._answer(member, [epoch.range(chunk) for chunk in chunks if chunk in held])

    def _declare(self, epoch: EpochState, member: MemberState, delivered: Iterable[SampleRange]) -> None:
        held = epoch.held.get(member.client_id, set())
        self._delivered[epoch.key, member.client_id] = {
            chunk for r in delivered if (r.dataset, r.epoch) == epoch.key for chunk in _held_of(epoch, r, held)
        }

    def _grant(self, epoch: EpochState, member: MemberState, want: int, call: int) -> list[int]:
        position = self._position(epoch, member)
        own = epoch.deal.peek(position, want) if position is not None else []
        returned = [] if own else heapq.nsmallest(want, epoch.returned)
        if own or returned:
            self._desk.commit(Leased(epoch.key, member.client_id, len(own), tuple(returned), call))
        return own or returned

    @staticmethod
    def _position(epoch: EpochState, member: MemberState) -> int | None:
        if not epoch.owners:
            return 0
        return epoch.owners.index(member.client_id) if member.client_id in epoch.owners else None

    def _park(self, epoch: EpochState, member: MemberState) -> Wait:
        """Let a member wait; steps do not wait for it unless it has batches left to train on."""
        held = epoch.held.get(member.client_id, set())
        if held <= self._delivered.get((epoch.key, member.client_id), set()):
            self._members.set_activity(member, ACTIVITY_BETWEEN, parked=epoch.key)
        return Wait(
            ("data", *epoch.key),
            f"the end of epoch {epoch.key[1]} of dataset {epoch.key[0]!r}",
            lambda: self._members.ranks(list(self._holders(epoch))),
        )

    # ------------------------------------------------------------------ dealing

    def _basis(self) -> tuple[int, int, bool]:
        return (self._members.version, self._moves, self._groups.first_come())

    def _owners(self, key: EpochKey) -> tuple[int, ...]:
        """Who takes part in an epoch, in rank order; none when served first come."""
        if self._groups.first_come():
            return ()
        return tuple(m.client_id for m in self._members.by_rank() if self._takes_part(m, key))

    def _takes_part(self, member: MemberState, key: EpochKey) -> bool:
        moved_on = self.state.positions.get((member.client_id, key[0]), -1) > key[1]
        return member.activity != ACTIVITY_IDLE and not moved_on

    def _deal_anew(self, epoch: EpochState) -> None:
        """Deal what is left to those who take part now, if that is a change."""
        basis = self._basis()
        if self._dealt_at.get(epoch.key) == basis:
            return
        self._dealt_at[epoch.key] = basis
        owners = self._owners(epoch.key)
        if owners != epoch.owners and (epoch.deal.left or epoch.returned):
            self._desk.commit(Dealt(epoch.key, owners))

    # ------------------------------------------------------------------ the end of an epoch

    def settle(self) -> None:
        """Close every epoch whose samples are all consumed or delivered."""
        for epoch in list(self._open.values()):
            done = not epoch.deal.left and not epoch.returned and not any(self._holders(epoch))
            if done or self._abandoned(epoch):
                self._desk.commit(EpochClosed(epoch.key))

    def _holders(self, epoch: EpochState) -> Iterator[int]:
        """Members whose chunks, or whose share, hold the epoch open."""
        for client_id, held in epoch.held.items():
            moved_on = self.state.positions.get((client_id, epoch.key[0]), -1) > epoch.key[1]
            if not moved_on and not held <= self._delivered.get((epoch.key, client_id), set()):
                yield client_id
        for position, client_id in enumerate(epoch.owners):
            if epoch.deal.available(position):
                yield client_id

    def _abandoned(self, epoch: EpochState) -> bool:
        """Whether every member leases from a later epoch by now (all left their loops early)."""
        members = self._members.state.members
        positions = self.state.positions
        dataset, number = epoch.key
        return bool(members) and all(positions.get((c, dataset), -1) > number for c in members)

    # ------------------------------------------------------------------ giving back, consuming

    def return_leases(self, request: ReturnLeasesRequest) -> None:
        """Take back what a member will not train on; what it does not hold is ignored.

        Raises:
            Fenced: EVICTED, NOT_MEMBER.
        """
        member = self._members.need(request.request.client_id)
        epoch = self.state.epochs.get((request.dataset, request.epoch))
        if epoch is not None:
            self._give_back(epoch, member.client_id, request.leases)

    def give_back(self, client_id: int, ranges: Iterable[SampleRange]) -> None:
        """Take back the samples of a contribution that was too late; foreign ones are ignored."""
        by_epoch: dict[EpochKey, list[SampleRange]] = {}
        for r in ranges:
            by_epoch.setdefault((r.dataset, r.epoch), []).append(r)
        for key, some in by_epoch.items():
            epoch = self.state.epochs.get(key)
            if epoch is not None:
                self._give_back(epoch, client_id, some)

    def _give_back(self, epoch: EpochState, client_id: int, ranges: Iterable[SampleRange]) -> None:
        held = epoch.held.get(client_id, set())
        chunks = sorted({chunk for r in ranges for chunk in _held_of(epoch, r, held)})
        if chunks:
            self._desk.commit(Returned(epoch.key, client_id, tuple(chunks)))

    def check_held(self, client_id: int, ranges: Iterable[SampleRange]) -> None:
        """Refuse ranges that are not leased to a member, or that are named twice.

        Raises:
            StateRefused: LEASE.
        """
        seen: set[tuple[EpochKey, int]] = set()
        for r in ranges:
            epoch = self.state.epochs.get((r.dataset, r.epoch))
            held = epoch.held.get(client_id, set()) if epoch is not None else set()
            chunks = _chunks(epoch, r) if epoch is not None else range(0)
            # Lengths first: a range of 2^60 samples must not be counted out.
            if epoch is None or not 0 < len(chunks) <= len(held) or not held.issuperset(chunks):
                raise _foreign(r)
            named = {(epoch.key, chunk) for chunk in chunks}
            if named & seen:
                raise _foreign(r)
            seen |= named

    def consume(self, client_id: int, ranges: Iterable[SampleRange]) -> None:
        """Count the samples of a committed record; part of applying it."""
        member = self._members.get(client_id)
        for r in ranges:
            epoch = self.state.epochs.get((r.dataset, r.epoch))
            held = epoch.held.get(client_id) if epoch is not None else None
            if epoch is None or held is None:
                continue
            taken = _held_of(epoch, r, held)
            held -= taken
            samples = sum(epoch.size(chunk) for chunk in taken)
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
        self.state.epochs[body.key] = self._open[body.key] = epoch

    def _apply_dealt(self, body: Dealt) -> None:
        epoch = self.state.epochs[body.key]
        epoch.deal = Deal(merge(epoch.deal.remaining(), epoch.returned), max(1, len(body.owners)))
        epoch.owners, epoch.returned = body.owners, []
        self._desk.wake(("data", *body.key))

    def _apply_leased(self, body: Leased) -> None:
        epoch = self.state.epochs[body.key]
        member = self._members.state.members[body.client_id]
        position = self._position(epoch, member)
        chunks = epoch.deal.take(position, body.own) if body.own and position is not None else []
        chunks += [heapq.heappop(epoch.returned) for _ in body.returned]
        epoch.held.setdefault(body.client_id, set()).update(chunks)
        if body.call:
            epoch.grants[body.client_id] = (body.call, tuple(chunks))
        self._members.unpark(member)

    def _apply_returned(self, body: Returned) -> None:
        epoch = self.state.epochs[body.key]
        epoch.held[body.client_id] -= set(body.chunks)
        self._take_back(epoch, body.chunks)

    def _take_back(self, epoch: EpochState, chunks: Iterable[int]) -> None:
        if not epoch.closed:
            for chunk in chunks:
                heapq.heappush(epoch.returned, chunk)
            self._desk.wake(("data", *epoch.key))
        else:
            lost = sum(epoch.size(chunk) for chunk in chunks)
            self._desk.notice(
                f"samples delivered but in no step dataset={epoch.key[0]!r} epoch={epoch.key[1]} count={lost}"
            )
            self._forget_if_done(epoch)

    def _apply_moved(self, body: MovedOn) -> None:
        self.state.positions[body.client_id, body.key[0]] = body.key[1]
        self._moves += 1
        self._wake_all()

    def _apply_closed(self, body: EpochClosed) -> None:
        epoch = self.state.epochs[body.key]
        epoch.closed = True
        epoch.grants.clear()
        epoch.returned.clear()
        epoch.deal = Deal([], 1)
        epoch.owners = ()
        del self._open[body.key]
        self._dealt_at.pop(body.key, None)
        self.state.closed.setdefault(body.key[0], set()).add(body.key[1])
        for member in self._members.state.members.values():
            self._delivered.pop((body.key, member.client_id), None)
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
            self._delivered.pop((epoch.key, body.client_id), None)
            chunks = epoch.held.pop(body.client_id, set())
            if chunks:
                self._take_back(epoch, sorted(chunks))
        for key in [key for key in self.state.positions if key[0] == body.client_id]:
            del self.state.positions[key]
        self._wake_all()

    def _apply_activity(self, body: ActivitySet) -> None:
        if body.parked is None:
            self._wake_all()

    def _wake_all(self) -> None:
        for key in self._open:
            self._desk.wake(("data", *key))


def _check_request(request: LeaseRequest) -> None:
    if request.dataset:
        check_name(request.dataset, "dataset")
    if not request.chunk:
        raise refuse("MISSING_FIELD", "chunk is required: the number of samples of one lease", field="chunk")
    if request.length // request.chunk > MAX_CHUNKS:
        raise refuse("QUOTA", f"an epoch has at most {MAX_CHUNKS} chunks; use larger batches")


def _chunks(epoch: EpochState, r: SampleRange) -> range:
    """The chunks of a range of whole chunks; empty if it is not one."""
    whole_end = r.end % epoch.chunk == 0 or r.end == epoch.limit
    if r.begin % epoch.chunk or not whole_end or not r.begin < r.end <= epoch.limit:
        return range(0)
    return range(r.begin // epoch.chunk, -(-r.end // epoch.chunk))


def _held_of(epoch: EpochState, r: SampleRange, held: set[int]) -> set[int]:
    """Those chunks of a range that a member holds, at the cost of the smaller of the two."""
    chunks = _chunks(epoch, r)
    if len(chunks) > len(held):
        return {chunk for chunk in held if chunk in chunks}
    return held.intersection(chunks)


def _foreign(r: SampleRange) -> ParameshError:
    return refuse(
        "LEASE",
        f"samples {r.begin} to {r.end} of epoch {r.epoch} of dataset {r.dataset!r} are not leased to this worker",
        begin=r.begin,
        end=r.end,
        epoch=r.epoch,
        dataset=r.dataset,
    )
