"""Data leases: who trains on which samples of an epoch. Pure.

    answer = leases.lease(request)      # LeaseResponse, or Wait
    leases.settle()                     # closes epochs that are through
    leases.tick()                       # stops waiting for shares that nobody comes for

In lockstep modes the i-th lease of position r among W is chunk i * W + r, so arrival order
does not matter; when who takes part changes, what is left and what came back is dealt anew.
In async and ssp chunks go to whoever asks.

Chunks held by a member that declared them delivered, or that has moved on to a later epoch,
do not hold an epoch open. A share whose owner does not come (its loop broke off, it never
started one) is waited for as long as a step gathers a member, then dealt to the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from paramesh.errors import refuse
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

from paramesh_server.ledger_epochs import Epochs, EpochState
from paramesh_server.ledger_groups import Groups
from paramesh_server.ledger_log import START, Dealt, Desk, EpochClosed, EpochKey, EpochOpened, Leased, MovedOn, Wait
from paramesh_server.ledger_members import Members, MemberState

MAX_WANT = 1024
"""Leases in one answer: a range is about 20 bytes, so an answer stays near 20 KB."""

MAX_OPEN_EPOCHS = 1024
"""Epochs open at once over all datasets; a job has a handful, a flood must not fill memory."""

MAX_SAMPLES = 1 << 48
"""Samples of one epoch: what a member consumed, over all epochs, must fit 64 bits."""

MAX_CHUNKS = 1 << 32
"""Chunks of one epoch; far above any, far below where sizes overflow."""


class Leases:
    """Deals the samples of every epoch."""

    def __init__(self, desk: Desk, members: Members, groups: Groups, epochs: Epochs):
        self._desk = desk
        self._members = members
        self._groups = groups
        self._epochs = epochs
        self._dealt_at: dict[EpochKey, tuple[int, int, bool]] = {}
        """What the owners of a deal were derived from, to notice changes cheaply. Volatile."""
        self._dry_since: dict[EpochKey, float] = {}
        """Seconds since when somebody waits while others' shares are left. Volatile."""
        desk.on(EpochClosed, self._apply_closed)
        desk.on(Dealt, self._apply_dealt)

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
        if request.epoch in self._epochs.state.closed.get(request.dataset, ()):
            return _answer(member, finished=True)
        if not self._members.state.started:
            return Wait(START, "the job's first lease", lambda: ())
        epoch = self._opened(member, request)
        repeated = _repeated(epoch, member, request)
        if repeated is not None:
            return repeated
        self._epochs.declare(epoch, member.client_id, request.delivered)
        self._deal_anew(epoch)
        chunks = self._grant(epoch, member, min(request.want or 1, MAX_WANT), request.call)
        if chunks:
            return _answer(member, [epoch.sample_range(chunk) for chunk in chunks])
        self.settle()
        if epoch.closed or not (request.wait or self._unfinished(epoch)):
            return _answer(member, finished=True)
        if not request.wait:
            return _answer(member)
        wait = self._wait(epoch, member)
        self.settle()  # it may have been the last one in the loop
        return _answer(member, finished=True) if epoch.closed else wait

    def _opened(self, member: MemberState, request: LeaseRequest) -> EpochState:
        key = (request.dataset, request.epoch)
        epoch = self._epochs.open.get(key)
        if epoch is not None:
            _compare(epoch, request)
        elif len(self._epochs.open) >= MAX_OPEN_EPOCHS:
            raise refuse("QUOTA", f"at most {MAX_OPEN_EPOCHS} epochs may be open at once")
        absent = epoch is not None and member.client_id in epoch.absent
        if absent or self._epochs.state.positions.get((member.client_id, key[0])) != key[1]:
            self._desk.commit(MovedOn(key, member.client_id))
        if epoch is None:
            terms = (request.length, request.chunk, request.seed, request.drop_last)
            self._desk.commit(EpochOpened(key, *terms, self._owners(key)))
            self._dealt_at[key] = self._basis()
        return self._epochs.open[key]

    def _grant(self, epoch: EpochState, member: MemberState, want: int, call: int) -> list[int]:
        position = epoch.position(member.client_id)
        own = epoch.deal.peek(position, want) if position is not None else []
        if self._groups.first_come() and epoch.returned:
            own = []  # what came back is the oldest: a lone worker that is restored goes on in its own order
        returned = [] if own else heapq.nsmallest(want, epoch.returned)
        if own or returned:
            self._desk.commit(Leased(epoch.key, member.client_id, len(own), tuple(returned), call))
        return own or returned

    def _wait(self, epoch: EpochState, member: MemberState) -> Wait:
        """Let a member wait; steps do not wait for it, unless it has batches left to train on."""
        held = epoch.held.get(member.client_id, set())
        spent = held <= epoch.delivered.get(member.client_id, set())
        if spent and member.activity != ACTIVITY_IDLE:
            self._members.set_activity(member, ACTIVITY_BETWEEN, parked=epoch.key)
        if epoch.deal.left:
            self._dry_since.setdefault(epoch.key, self._desk.now)
        return Wait(
            ("data", *epoch.key),
            f"the end of epoch {epoch.key[1]} of dataset {epoch.key[0]!r}",
            lambda: self._members.ranks(list(self._epochs.holders(epoch))),
        )

    def return_leases(self, request: ReturnLeasesRequest) -> None:
        """Take back what a member will not train on, and deal its share to the others.

        What it does not hold is ignored: returning twice is returning.

        Raises:
            Fenced: EVICTED, NOT_MEMBER.
        """
        member = self._members.need(request.request.client_id)
        epoch = self._epochs.state.epochs.get((request.dataset, request.epoch))
        if epoch is not None:
            self._epochs.take_back(epoch, member.client_id, request.leases, gone=True)

    # ------------------------------------------------------------------ dealing

    def _basis(self) -> tuple[int, int, bool]:
        return (self._members.version, self._epochs.version, self._groups.first_come())

    def _owners(self, key: EpochKey) -> tuple[int, ...]:
        """Who takes part in an epoch, in rank order; none when served first come."""
        if self._groups.first_come():
            return ()
        return tuple(m.client_id for m in self._members.by_rank() if self._takes_part(m, key))

    def _takes_part(self, member: MemberState, key: EpochKey) -> bool:
        client_id = member.client_id
        if self._epochs.state.positions.get((client_id, key[0])) == key[1]:
            here = True
        else:
            here = member.activity != ACTIVITY_IDLE and not self._epochs.moved_on(client_id, key)
        epoch = self._epochs.open.get(key)
        return here and (epoch is None or client_id not in epoch.absent)

    def _deal_anew(self, epoch: EpochState) -> None:
        """Deal what is left to those who take part now, if that is a change."""
        basis = self._basis()
        if self._dealt_at.get(epoch.key) == basis:
            return
        self._dealt_at[epoch.key] = basis
        owners = self._owners(epoch.key)
        if owners != epoch.owners and (epoch.deal.left or epoch.returned):
            self._desk.commit(Dealt(epoch.key, owners))

    # ------------------------------------------------------------------ time

    def tick(self) -> None:
        """Deal the shares of those who did not come to those who wait."""
        for key in list(self._dry_since):
            epoch = self._epochs.open[key]
            late = [m.client_id for m in self._missing(epoch) if self._desk.now >= self._share_until(key, m)]
            if late:
                owners = tuple(c for c in epoch.owners if c not in late)
                self._desk.commit(Dealt(key, owners, tuple(late)))

    def next_deadline(self) -> float | None:
        """When `tick` may find something to do."""
        times = [
            self._share_until(key, member)
            for key in self._dry_since
            for member in self._missing(self._epochs.open[key])
        ]
        return min(times, default=None)

    def _missing(self, epoch: EpochState) -> list[MemberState]:
        """Members with a share left that they may never come for."""
        owed = [c for position, c in enumerate(epoch.owners) if epoch.deal.available(position)]
        members = [self._members.state.members[c] for c in owed if c in self._members.state.members]
        positions = self._epochs.state.positions
        return [
            m
            for m in members
            if positions.get((m.client_id, epoch.key[0])) != epoch.key[1]
            or (m.activity == ACTIVITY_BETWEEN and m.parked is None)
        ]

    def _share_until(self, key: EpochKey, member: MemberState) -> float:
        start = max(self._dry_since[key], self._members.since(member.client_id))
        return start + self._members.gather_seconds(member, first_step=True)

    # ------------------------------------------------------------------ the end of an epoch

    def settle(self) -> None:
        """Close every epoch whose samples are all consumed or delivered, and whose loops are done."""
        for epoch in list(self._epochs.open.values()):
            if not (self._unfinished(epoch) or self._stepping(epoch)) or self._abandoned(epoch):
                self._desk.commit(EpochClosed(epoch.key))

    def _unfinished(self, epoch: EpochState) -> bool:
        """Whether samples are left, or held by somebody who will train on them."""
        return bool(epoch.deal.left or epoch.returned) or any(self._epochs.holders(epoch))

    def _stepping(self, epoch: EpochState) -> bool:
        """Whether a member is still in this epoch's loop, and steps.

        Its samples may be consumed by one group and its step in the next be still to come (a
        GAN): were the others let into the next epoch, that step would wait for them, and they
        for it in the other group.
        """
        dataset, number = epoch.key
        return any(
            member.activity == ACTIVITY_ACTIVE
            and self._epochs.state.positions.get((member.client_id, dataset)) == number
            and member.client_id not in epoch.absent
            for member in self._members.state.members.values()
        )

    def _abandoned(self, epoch: EpochState) -> bool:
        """Whether every member leases from a later epoch by now (all left their loops early)."""
        members = self._members.state.members
        return bool(members) and all(self._epochs.moved_on(client_id, epoch.key) for client_id in members)

    # ------------------------------------------------------------------ applying

    def _apply_closed(self, body: EpochClosed) -> None:
        self._dealt_at.pop(body.key, None)
        self._dry_since.pop(body.key, None)

    def _apply_dealt(self, body: Dealt) -> None:
        self._dry_since.pop(body.key, None)


def _answer(member: MemberState, leases: Iterable[SampleRange] = (), *, finished: bool = False) -> LeaseResponse:
    return LeaseResponse(
        leases=leases,
        finished=finished,
        lease_epoch=member.joined_order,
        between=member.activity != ACTIVITY_ACTIVE,
    )


def _repeated(epoch: EpochState, member: MemberState, request: LeaseRequest) -> LeaseResponse | None:
    """The answer to a repeat of a member's last numbered Lease; None if it is not one."""
    call, chunks = epoch.grants.get(member.client_id, (0, ()))
    if not request.call or call != request.call:
        return None
    held = epoch.held.get(member.client_id, set())
    return _answer(member, [epoch.sample_range(chunk) for chunk in chunks if chunk in held])


def _check_request(request: LeaseRequest) -> None:
    if request.dataset:
        check_name(request.dataset, "dataset")
    if not request.chunk:
        raise refuse("MISSING_FIELD", "chunk is required: the number of samples of one lease", field="chunk")
    if request.length > MAX_SAMPLES:
        raise refuse("QUOTA", f"an epoch has at most {MAX_SAMPLES} samples", length=request.length)
    if request.length // request.chunk > MAX_CHUNKS:
        raise refuse("QUOTA", f"an epoch has at most {MAX_CHUNKS} chunks; use larger batches")


def _compare(epoch: EpochState, request: LeaseRequest) -> None:
    for name in ("length", "chunk", "seed", "drop_last"):
        if getattr(epoch, name) != getattr(request, name):
            raise refuse(
                "SCHEMA",
                f"epoch {request.epoch} of dataset {request.dataset!r} has {name} {getattr(epoch, name)}, this worker "
                f"says {getattr(request, name)}: every worker must use the same",
                field=name,
                expected=getattr(epoch, name),
            )
