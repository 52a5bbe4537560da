"""Members of the job: ranks, activity, tombstones. Pure.

    member = members.need(client_id)     # or NOT_MEMBER, EVICTED
    members.active                       # how many members steps wait for

Death is the coordinator's to judge: it calls `evict`, which leaves a tombstone, so that a
late Join of a dead client does not pass for a new one. Leaving gracefully leaves none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from paramesh.errors import refuse
from paramesh.routing import check_name
from paramesh.v1.ledger_pb2 import (
    ACTIVITY_ACTIVE,
    ACTIVITY_BETWEEN,
    ACTIVITY_IDLE,
    JoinRequest,
)

from paramesh_server.ledger_log import START, ActivitySet, Desk, EpochKey, Joined, Left, Started, require

START_GATHER_FACTOR = 10
"""Before the first step, of a job or after a restore, every process builds its model and compiles,
which takes seconds; a first step that went without a slow starter would make two runs of the same
job differ. So members that were never active are waited for this many `gather_ms` there."""

MAX_RANK = 65_535
"""Preferred ranks above this are ignored: nothing has that many workers, and a typing
mistake must not make a rank that nobody can print."""


@dataclass(slots=True)
class MemberState:
    """One member."""

    client_id: int
    rank: int
    slot: str
    joined_order: int
    """Counts joins from 1; the lowest is the longest-joined. Fixed."""
    activity: int = ACTIVITY_BETWEEN
    """ACTIVE, BETWEEN or IDLE. By ActivitySet records, BETWEEN at first."""
    parked: EpochKey | None = None
    """The epoch whose leases it waits for; then BETWEEN, and no step gathers it."""
    arrived: bool = False
    """It was ACTIVE or IDLE once. Never falls."""
    samples: int = 0
    """Consumed by committed steps and clocks."""


@dataclass(slots=True)
class MembersState:
    """What replicas agree on about members."""

    members: dict[int, MemberState] = field(default_factory=dict)
    tombstones: set[int] = field(default_factory=set)
    """Evicted clients, for ever. Ids are never reused."""
    slot_ranks: dict[str, int] = field(default_factory=dict)
    """The last rank of each supervisor's slot, kept over restarts."""
    joins: int = 0
    started: bool = False
    """`start_workers` were joined at some time. Never falls."""
    evictions: int = 0


class Members:
    """Who is in the job."""

    def __init__(self, desk: Desk):
        self._desk = desk
        self.state = MembersState()
        self.active = 0
        """How many members are ACTIVE. Derived from the state."""
        self.version = 0
        """Counts changes of who takes part (joins, leaves, to and from IDLE). Volatile: only
        compared with itself."""
        self._founders: frozenset[int] = frozenset()
        """Who was there when the job started, anew or from a checkpoint. Volatile."""
        self._since: dict[int, float] = {}
        """Seconds at which each member's activity last changed. Volatile."""
        self._gone_at: dict[int, float] = {}
        """Seconds at which clients left or were evicted. Volatile."""
        desk.on(Joined, self._apply_joined)
        desk.on(Started, self._apply_started)
        desk.on(Left, self._apply_left)
        desk.on(ActivitySet, self._apply_activity)

    def install(self, state: MembersState) -> None:
        """Replace the state by a snapshot's; derive what is derived."""
        self.state = state
        self.active = sum(member.activity == ACTIVITY_ACTIVE for member in state.members.values())
        self.version += 1

    def forget_times(self) -> None:
        """Let everything that is timed begin anew: a replay stamps no time of this clock."""
        self._since.clear()
        self._gone_at.clear()

    # ------------------------------------------------------------------ asking

    def get(self, client_id: int) -> MemberState | None:
        """The member, or None."""
        return self.state.members.get(client_id)

    def need(self, client_id: int) -> MemberState:
        """The member of a request.

        Raises:
            RequestRefused: MISSING_FIELD, the request names no client.
            Fenced: EVICTED, NOT_MEMBER.
        """
        member = self.state.members.get(client_id)
        if member is not None:
            return member
        require(client_id, "request.client_id")
        self.refuse_evicted(client_id)
        raise refuse("NOT_MEMBER", f"client {client_id} has not joined, or has left: join first")

    def refuse_evicted(self, client_id: int) -> None:
        """Refuse a client that has a tombstone.

        Raises:
            Fenced: EVICTED.
        """
        if client_id in self.state.tombstones:
            raise refuse(
                "EVICTED", f"client {client_id} was evicted: register and join as a new client", client_id=client_id
            )

    def by_rank(self) -> list[MemberState]:
        """All members, in rank order."""
        return sorted(self.state.members.values(), key=lambda m: m.rank)

    def ranks(self, client_ids: list[int]) -> tuple[int, ...]:
        """Ranks of those of the clients that are members, sorted."""
        found = (self.state.members.get(client_id) for client_id in client_ids)
        return tuple(sorted(m.rank for m in found if m is not None))

    def since(self, client_id: int) -> float:
        """Seconds at which a member's activity last changed."""
        return self._since.setdefault(client_id, self._desk.now)

    def gone_since(self, client_id: int) -> float:
        """Seconds at which a client that is no member went."""
        return self._gone_at.setdefault(client_id, self._desk.now)

    def start_workers(self) -> int:
        """How many must join before anything starts."""
        return max(1, self._desk.config.start_workers)

    def world_size(self) -> int:
        """Members; before the start, those that are to be there at least."""
        count = len(self.state.members)
        return count if self.state.started else max(count, self.start_workers())

    def enough(self) -> bool:
        """Whether steps may go on, as far as the number of members is concerned."""
        return self.state.started and len(self.state.members) >= max(1, self._desk.config.min_workers)

    def gather_seconds(self, member: MemberState, first_step: bool) -> float:
        """How long a step waits for a BETWEEN member."""
        seconds = self._desk.config.gather_ms / 1000
        starting = first_step or member.client_id in self._founders
        return seconds * START_GATHER_FACTOR if starting and not member.arrived else seconds

    # ------------------------------------------------------------------ deciding

    def join(self, request: JoinRequest) -> MemberState:
        """Make a client a member, or find it one.

        Raises:
            RequestRefused: MISSING_FIELD, NAME.
            Fenced: EVICTED.
        """
        client_id = request.request.client_id
        require(client_id, "request.client_id")
        self.refuse_evicted(client_id)
        if client_id not in self.state.members:
            if request.slot:
                check_name(request.slot, "slot")
            self._desk.commit(Joined(client_id, self._pick_rank(request), request.slot))
            self.start_if_enough()
        return self.state.members[client_id]

    def _pick_rank(self, request: JoinRequest) -> int:
        taken = {m.rank for m in self.state.members.values()}
        wishes = []
        if request.has_preferred_rank and request.preferred_rank <= MAX_RANK:
            wishes.append(request.preferred_rank)
        if request.slot in self.state.slot_ranks:
            wishes.append(self.state.slot_ranks[request.slot])
        for wish in wishes:
            if wish not in taken:
                return wish
        return next(rank for rank in range(len(taken) + 1) if rank not in taken)

    def start_if_enough(self) -> None:
        """Start the job when `start_workers` are there."""
        if not self.state.started and len(self.state.members) >= self.start_workers():
            self._desk.commit(Started())

    def leave(self, client_id: int) -> bool:
        """Take a member out gracefully; False if it is none."""
        if client_id not in self.state.members:
            return False
        self._desk.commit(Left(client_id, evicted=False, why="left"))
        return True

    def evict(self, client_id: int, why: str) -> bool:
        """Take a client out for ever; returns whether it was a member."""
        require(client_id, "client_id")
        was_member = client_id in self.state.members
        if client_id not in self.state.tombstones:
            self._desk.commit(Left(client_id, evicted=True, why=why[:200]))
        return was_member

    def set_activity(self, member: MemberState, activity: int, parked: EpochKey | None = None) -> None:
        """Change a member's activity, if it is a change.

        Raises:
            RequestRefused: MISSING_FIELD.
        """
        if activity not in (ACTIVITY_ACTIVE, ACTIVITY_BETWEEN, ACTIVITY_IDLE):
            raise refuse("MISSING_FIELD", f"activity {activity} must be ACTIVE, BETWEEN or IDLE")
        if (member.activity, member.parked) != (activity, parked):
            self._desk.commit(ActivitySet(member.client_id, activity, parked))

    # ------------------------------------------------------------------ applying

    def unpark(self, member: MemberState) -> None:
        """Count a member that waited for leases as about to return; part of applying a record."""
        if member.parked is not None:
            member.parked = None
            self._since[member.client_id] = self._desk.now

    def _apply_joined(self, body: Joined) -> None:
        state = self.state
        state.joins += 1
        state.members[body.client_id] = MemberState(body.client_id, body.rank, body.slot, state.joins)
        if body.slot:
            state.slot_ranks[body.slot] = body.rank
        self._since[body.client_id] = self._desk.now
        self.version += 1

    def _apply_started(self, _: Started) -> None:
        self.state.started = True
        self._founders = frozenset(self.state.members)
        self._desk.wake(START)

    def _apply_left(self, body: Left) -> None:
        if body.evicted:
            self.state.tombstones.add(body.client_id)
        member = self.state.members.pop(body.client_id, None)
        self._gone_at[body.client_id] = self._desk.now
        if member is None:
            return
        self.state.evictions += body.evicted
        self.active -= member.activity == ACTIVITY_ACTIVE
        self._since.pop(body.client_id, None)
        self.version += 1

    def _apply_activity(self, body: ActivitySet) -> None:
        member = self.state.members[body.client_id]
        if ACTIVITY_IDLE in (member.activity, body.activity):
            self.version += 1
        self.active += (body.activity == ACTIVITY_ACTIVE) - (member.activity == ACTIVITY_ACTIVE)
        member.activity, member.parked = body.activity, body.parked
        if body.activity != ACTIVITY_BETWEEN:
            member.arrived = True
        self._since[body.client_id] = self._desk.now
