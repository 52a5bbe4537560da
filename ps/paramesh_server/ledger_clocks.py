"""Clocks of ssp and async groups. Pure.

    answer = clocks.clock(request)       # ClockResponse with floors, or Wait

A member that finished `c` clocks starts clock `c` iff `min(live clocks) >= c - staleness`,
and its pull then reflects every clock `<= c - staleness - 1` of everybody, by floors.
Live are ACTIVE members: one whose loop ended, or that is paused, holds nobody back. Who
becomes ACTIVE starts at the minimum. Async never waits and has no floors. A restored group goes
on from the furthest clock of before, which is its `next_step`.
"""

from __future__ import annotations

from paramesh.errors import refuse
from paramesh.v1.ledger_pb2 import (
    ACTIVITY_ACTIVE,
    MODE_ASYNC,
    MODE_SSP,
    ClockRequest,
    ClockResponse,
    Floor,
)

from paramesh_server.ledger_epochs import Epochs
from paramesh_server.ledger_groups import Floors, Groups, GroupState
from paramesh_server.ledger_log import ActivitySet, ClockEntered, ClockFinished, Desk, Left, Wait
from paramesh_server.ledger_members import Members
from paramesh_server.ledger_pause import Pause


class Clocks:
    """Bounds how far members of an ssp group drift."""

    def __init__(self, desk: Desk, members: Members, groups: Groups, epochs: Epochs, pause: Pause):
        self._desk = desk
        self._pause = pause
        self._members = members
        self._groups = groups
        self._epochs = epochs
        self.widest: dict[int, int] = {}
        """For each group, the widest gap between a started clock and the slowest live member.
        Volatile, for people and tests."""
        desk.on(ClockEntered, self._apply_entered)
        desk.on(ClockFinished, self._apply_finished)
        desk.on(Left, self._apply_left)
        desk.on(ActivitySet, lambda _: self._wake_all())

    # ------------------------------------------------------------------ asking

    @staticmethod
    def has_clocks(group: GroupState) -> bool:
        """Whether a group's members have clocks of their own."""
        return group.spec.mode in (MODE_SSP, MODE_ASYNC)

    def live(self, group: GroupState) -> dict[int, int]:
        """Finished clocks of those who hold others back, by member."""
        members = self._members.state.members
        return {
            client_id: clock
            for client_id, clock in group.clocks.items()
            if members[client_id].activity == ACTIVITY_ACTIVE
        }

    def bounds(self, group: GroupState) -> tuple[int, int]:
        """Slowest and fastest of the live members; of all members if none is live."""
        clocks = (self.live(group) or group.clocks).values()
        return min(clocks, default=0), max(clocks, default=0)

    def slowest(self, group: GroupState) -> tuple[int, ...]:
        """Ranks of the live members with the lowest clock."""
        live = self.live(group)
        return self._members.ranks([c for c, clock in live.items() if clock == min(live.values())])

    def position(self, group: GroupState, client_id: int) -> int:
        """The clock that a member computes next."""
        return group.clocks.get(client_id, self._entry(group, client_id))

    def _entry(self, group: GroupState, client_id: int) -> int:
        """Where a member starts: at the minimum of the live ones, never behind itself."""
        others = {c: clock for c, clock in self.live(group).items() if c != client_id}
        # Nobody is live at an epoch's end: whoever is first back goes on from the furthest,
        # else the others would be held back by clocks that nobody trains any more.
        start = min(others.values()) if others else max(group.clocks.values(), default=group.next_step)
        return max(start, group.clocks.get(client_id, 0))

    # ------------------------------------------------------------------ deciding

    def enter(self, group: GroupState, client_id: int) -> None:
        """Let a member take part in a group's clocks, from the minimum on."""
        if not self.has_clocks(group) or client_id in self.live(group):
            return
        entry = self._entry(group, client_id)
        if group.clocks.get(client_id) != entry:
            self._desk.commit(ClockEntered(group.number, client_id, entry))

    def enter_all(self, client_id: int) -> None:
        """As `enter`, for every group; before the member becomes ACTIVE."""
        for group in self._groups.state.values():
            self.enter(group, client_id)

    def clock(self, request: ClockRequest) -> ClockResponse | Wait:
        """Take note of a finished clock; answer when the next may start.

        Raises:
            RequestRefused: UNKNOWN_GROUP, CLOCK (not the next one; metadata `clock` is its own).
            StateRefused: SCHEMA, LEASE.
            Fenced: EVICTED, NOT_MEMBER.
        """
        group = self._groups.get(request.group)
        if not self.has_clocks(group):
            raise refuse("SCHEMA", f"group {group.spec.name} takes common steps, it has no clocks")
        member = self._members.need(request.request.client_id)
        own = self.position(group, member.client_id)
        if request.finished not in (own, own + 1):
            raise refuse(
                "CLOCK",
                f"rank {member.rank} says it finished {request.finished} clocks of group {group.spec.name}; it stands "
                f"at {own}",
                clock=own,
            )
        if request.finished == own + 1:
            self._finish(group, request)
            self._pause.went_on(member.client_id)
        return self._pause.hold(member.client_id) or self._start(group, member.client_id, request.finished)

    def pause(self, checkpoint: str) -> None:
        """Hold clocks for a checkpoint; those that wait for the slowest hear of it too."""
        self._pause.begin(checkpoint)
        self._wake_all()

    def _finish(self, group: GroupState, request: ClockRequest) -> None:
        client_id = request.request.client_id
        self._check_floors(group, request)
        self._epochs.check_held(client_id, request.samples)
        member = self._members.need(client_id)
        if member.activity != ACTIVITY_ACTIVE:
            self._members.set_activity(member, ACTIVITY_ACTIVE)
        self._desk.commit(
            ClockFinished(group.number, client_id, request.finished, tuple(request.floors), tuple(request.samples))
        )

    @staticmethod
    def _check_floors(group: GroupState, request: ClockRequest) -> None:
        known = set(group.spec.partitions)
        for floor in request.floors:
            if known and floor.partition not in known:
                raise refuse("WRONG_PARTITION", f"partition {floor.partition} is not of group {group.spec.name}")

    def _start(self, group: GroupState, client_id: int, clock: int) -> ClockResponse | Wait:
        slowest, fastest = self.bounds(group)
        if group.spec.mode == MODE_SSP and not self._may_start(group, clock):
            return Wait(
                ("clock", group.number),
                f"clock {clock} of group {group.spec.name} (the slowest is at {slowest}, staleness "
                f"{group.spec.staleness})",
                lambda: self.slowest(group),
            )
        self.widest[group.number] = max(self.widest.get(group.number, 0), clock - slowest)
        floors = self._floors_for(group, clock) if group.spec.mode == MODE_SSP else {}
        checkpoint, chief = self._pause.told(client_id)
        return ClockResponse(
            checkpoint=checkpoint,
            chief=chief,
            floors=[Floor(partition=p, epoch=e, lsn=n) for p, (e, n) in sorted(floors.items())],
            min_clock=slowest,
            max_clock=fastest,
        )

    def _may_start(self, group: GroupState, clock: int) -> bool:
        if not self._members.enough():
            return False
        live = self.live(group)
        return not live or min(live.values()) >= clock - group.spec.staleness

    def _floors_for(self, group: GroupState, clock: int) -> Floors:
        """Highest floors over all clocks <= clock - staleness - 1."""
        floors = dict(group.old_floors)
        for finished in range(min(group.floors, default=0), clock - group.spec.staleness):
            raise_floors(floors, group.floors.get(finished, {}))
        return floors

    # ------------------------------------------------------------------ applying

    def _apply_entered(self, body: ClockEntered) -> None:
        self._groups.state[body.group].clocks[body.client_id] = body.clock
        self._desk.wake(("clock", body.group))

    def _apply_finished(self, body: ClockFinished) -> None:
        group = self._groups.state[body.group]
        before = self.bounds(group)[0]
        group.clocks[body.client_id] = body.finished
        if group.spec.mode == MODE_SSP:
            told = {floor.partition: (floor.epoch, floor.lsn) for floor in body.floors}
            raise_floors(group.floors.setdefault(body.finished - 1, {}), told)
            self._fold(group)
        self._epochs.consume(body.client_id, body.consumed)
        if self.bounds(group)[0] != before:
            self._desk.wake(("clock", body.group))

    def _fold(self, group: GroupState) -> None:
        """Put floors of clocks that everybody's next pull must reflect into one."""
        slowest = self.bounds(group)[0]
        for clock in sorted(group.floors):
            if clock >= slowest - group.spec.staleness:
                break
            raise_floors(group.old_floors, group.floors.pop(clock))

    def _apply_left(self, body: Left) -> None:
        for group in self._groups.state.values():
            if group.clocks.pop(body.client_id, None) is not None:
                self._desk.wake(("clock", group.number))

    def _wake_all(self) -> None:
        for group in self._groups.state.values():
            if self.has_clocks(group):
                self._desk.wake(("clock", group.number))


def raise_floors(floors: Floors, others: Floors) -> None:
    """Raise `floors` to the higher of each partition's (epoch, lsn)."""
    for partition, floor in others.items():
        if floor > floors.get(partition, (0, 0)):
            floors[partition] = floor
