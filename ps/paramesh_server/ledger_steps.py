"""Decisions of synchronous steps. Pure.

    answer = steps.ready(request)      # pb.ReadyResponse, or Wait
    steps.settle()                     # decides what can be decided
    steps.tick()                       # gathers that ran out, members that never get ready

A step is decided when every ACTIVE member is ready and no BETWEEN member is gathered any
more: all contributions, or with `backup_workers=b` the first N - b. The STEP record is the
step's truth; it is never changed, but for the clip factor that is added once.
Readys are volatile: callers repeat them until the step is decided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from paramesh.errors import refuse
from paramesh.v1 import ledger_pb2 as pb
from paramesh.v1.types_pb2 import Contributor, StepRecord

from paramesh_server import ledger_hyper
from paramesh_server.ledger_epochs import Epochs
from paramesh_server.ledger_groups import Groups, GroupState
from paramesh_server.ledger_log import ActivitySet, Desk, HyperNoted, Left, StepDecided, Wait
from paramesh_server.ledger_members import Members, MemberState

KEEP_STEPS = 64
"""Decisions kept even when everybody has applied them: a partition that restarts its pull,
or an evicted worker that asks whether it was named, is at most a few steps behind."""

MAX_STEPS = 4096
"""Decisions kept at most, about 100 bytes a contributor each: a straggler that backup
workers leave behind by more than this must rejoin anyway."""

MAX_WEIGHT = 1e15
"""Above this a count of samples is not exact in the fp64 sum of weights."""

MIN_WEIGHT = 1e-30
"""Below this w * g leaves the range of fp32."""


@dataclass(slots=True)
class _Round:
    """Readys of the undecided step of one group. Volatile."""

    pending: dict[int, pb.ReadyRequest] = field(default_factory=dict)
    """By client, in order of arrival; without headers."""
    first_at: float = 0.0
    """Seconds of the first Ready; meaningful while `pending` is not empty."""
    applied: dict[int, int] = field(default_factory=dict)
    """For each member, `applied_through` as it last told; its first step before that."""
    contributors: tuple[int, ...] = ()
    """Those of the last decision, to notice that nothing about settings can have changed."""
    disagreed: bool = False
    """Whether the last decision's contributors disagreed about settings."""


class Steps:
    """Decides the steps of every sync and local group."""

    def __init__(self, desk: Desk, members: Members, groups: Groups, epochs: Epochs):
        self._desk = desk
        self._members = members
        self._groups = groups
        self._epochs = epochs
        self._rounds: dict[int, _Round] = {}
        self._cutting: dict[int, int] | None = None
        """While a checkpoint is wanted: for each group whose decision carried it, that step. Volatile."""
        self._checkpoint = ""
        """The id of the checkpoint that is wanted. Volatile."""
        desk.on(StepDecided, self._apply_decided)
        desk.on(HyperNoted, self._apply_noted)
        desk.on(ActivitySet, self._apply_activity)
        desk.on(Left, self._apply_left)

    def _round(self, group: GroupState) -> _Round:
        return self._rounds.setdefault(group.number, _Round())

    def installed(self) -> None:
        """Begin anew on a snapshot: what a member has not told, it has not applied."""
        members = self._members.state.members.values()
        active = [m.client_id for m in members if m.activity == pb.ACTIVITY_ACTIVE]
        for group in self._groups.state.values():
            self._round(group).applied = dict.fromkeys(active, group.first_kept)

    def group(self, number: int) -> GroupState:
        """A group that takes steps.

        Raises:
            RequestRefused: UNKNOWN_GROUP.
            StateRefused: SCHEMA, it has clocks, not steps.
        """
        group = self._groups.get(number)
        if group.spec.mode not in (pb.MODE_SYNC, pb.MODE_LOCAL):
            raise refuse("SCHEMA", f"group {group.spec.name} trains without common steps", group=group.spec.name)
        return group

    # ------------------------------------------------------------------ Ready

    def ready(self, request: pb.ReadyRequest) -> pb.ReadyResponse | Wait:
        """Take note of a staged contribution; answer the decision, or wait for it.

        Raises:
            RequestRefused: UNKNOWN_GROUP, MISSING_FIELD, WEIGHT, HYPER_PARAMETER, SEQ_REUSED, SAMPLE_*.
            StateRefused: SCHEMA, STEP_OUT_OF_RANGE, LEASE.
            Fenced: EVICTED, NOT_MEMBER; never for a decided step.
        """
        group = self.group(request.group)
        client_id = request.request.client_id
        if request.step < group.next_step:
            return self._decided(group, request)
        member = self._members.need(client_id)
        if request.step > group.next_step:
            raise refuse(
                "STEP_OUT_OF_RANGE",
                f"step {request.step} of group {group.spec.name} is not the next one, {group.next_step}",
                next_step=group.next_step,
            )
        self._accept(group, member, request)
        applied = self._round(group).applied
        applied[client_id] = max(applied.get(client_id, 0), request.applied_through)
        self._decide(group)
        if request.step < group.next_step:
            return self._decided(group, request)
        return self._wait(group)

    def _wait(self, group: GroupState) -> Wait:
        step = group.next_step
        return Wait(
            ("step", group.number, step),
            f"step {step} of group {group.spec.name}",
            lambda: self.waiting_for(group) if group.next_step == step else (),
        )

    def _decided(self, group: GroupState, request: pb.ReadyRequest) -> pb.ReadyResponse:
        record = self.record(group, request.step)
        client_id = request.request.client_id
        mine = [(c.attempt, list(c.overrides)) for c in record.contributors if c.client_id == client_id]
        included = mine == [(request.attempt, list(request.overrides))]  # another try's bytes are not these
        if not included and self._members.get(client_id) is not None:
            # TOO_LATE: the samples go to somebody's later step, the settings still hold.
            self._epochs.give_back(client_id, request.samples)
            self._note_settings(group, client_id, request)
        return pb.ReadyResponse(record=record, included=included)

    def _note_settings(self, group: GroupState, client_id: int, request: pb.ReadyRequest) -> None:
        tables = tuple(request.hyper_parameters)
        ledger_hyper.check(tables)
        known = group.settings.get(client_id, {})
        if ledger_hyper.merged(known, tables) != known:
            self._desk.commit(HyperNoted(group.number, client_id, tables))

    def _accept(self, group: GroupState, member: MemberState, request: pb.ReadyRequest) -> None:
        plain = pb.ReadyRequest()
        plain.CopyFrom(request)
        plain.ClearField("request")
        plain.ClearField("applied_through")
        round_ = self._round(group)
        earlier = round_.pending.get(member.client_id)
        if earlier is not None:
            if earlier == plain:
                return
            if _attempt(plain) <= _attempt(earlier):
                raise refuse(
                    "SEQ_REUSED",
                    f"rank {member.rank} was ready for step {request.step} with other content under attempt "
                    f"{_attempt(earlier)}: a correction needs a higher attempt",
                    step=request.step,
                )
        self._check(plain, member)
        if member.activity != pb.ACTIVITY_ACTIVE:
            self._members.set_activity(member, pb.ACTIVITY_ACTIVE)
        if not round_.pending:
            round_.first_at = self._desk.now
        round_.pending[member.client_id] = plain

    def _check(self, request: pb.ReadyRequest, member: MemberState) -> None:
        if not all((request.attempt, *(o.attempt for o in request.overrides))):  # nothing is ever staged under it
            raise refuse("MISSING_FIELD", f"attempt of step {request.step} counts from 1", field="attempt")
        if not MIN_WEIGHT <= request.weight <= MAX_WEIGHT:
            problem = f"weight {request.weight} must be between {MIN_WEIGHT} and {MAX_WEIGHT}"
            raise refuse("WEIGHT", problem, weight=request.weight)
        ledger_hyper.check(request.hyper_parameters)
        self._epochs.check_held(member.client_id, request.samples)

    # ------------------------------------------------------------------ deciding

    def settle(self) -> None:
        """Decide every step that can be decided."""
        for number, round_ in self._rounds.items():
            if round_.pending:
                self._decide(self._groups.state[number])

    def _decide(self, group: GroupState) -> None:
        round_ = self._round(group)
        backup = group.spec.backup_workers
        if not round_.pending or len(round_.pending) + backup < self._members.active:
            return
        if not self._members.enough():
            return
        missing = len(self._missing(group))
        need = max(1, len(round_.pending) + missing - backup)
        if len(round_.pending) >= need:
            decision = self._decision(group, round_, list(round_.pending)[:need])
            self._desk.commit(decision)
            if decision.record.checkpoint and self._cutting is not None:
                self._cutting[group.number] = decision.record.step

    def _missing(self, group: GroupState) -> list[MemberState]:
        """Members that the undecided step still waits for."""
        round_ = self._round(group)
        return [
            member
            for member in self._members.state.members.values()
            if member.client_id not in round_.pending
            and (
                member.activity == pb.ACTIVITY_ACTIVE
                or (self._gathered(member) and self._desk.now < self._gather_until(group, member))
            )
        ]

    @staticmethod
    def _gathered(member: MemberState) -> bool:
        return member.activity == pb.ACTIVITY_BETWEEN and member.parked is None

    def _gather_until(self, group: GroupState, member: MemberState) -> float:
        # From the first Ready, or from when the member fell idle if that was later: a fast
        # worker that waits already must not cost a slower one its whole gather.
        start = max(self._round(group).first_at, self._members.since(member.client_id))
        return start + self._members.gather_seconds(member, group.next_step == 0)

    def waiting_for(self, group: GroupState) -> tuple[int, ...]:
        """Ranks that the undecided step lacks; none while nobody is ready."""
        if not self._round(group).pending:
            return ()
        return tuple(sorted(member.rank for member in self._missing(group)))

    def _decision(self, group: GroupState, round_: _Round, chosen: Sequence[int]) -> StepDecided:
        members = self._members.state.members
        ranked = sorted(chosen, key=lambda client_id: members[client_id].rank)
        requests = [round_.pending[client_id] for client_id in ranked]
        record = StepRecord(
            group=group.number,
            step=group.next_step,
            skip=any(request.skip for request in requests),
            loss_reduction=group.spec.loss_reduction,
            checkpoint=self._cut_with(group),
            contributors=[
                Contributor(
                    client_id=client_id,
                    rank=members[client_id].rank,
                    weight=request.weight,
                    attempt=request.attempt,
                    overrides=request.overrides,
                )
                for client_id, request in zip(ranked, requests, strict=True)
            ],
        )
        # A skipped step changes no value, so there is nothing to clip.
        record.needs_clip = group.spec.max_grad_norm > 0 and not record.skip
        disagreement = self._settle_settings(group, round_, record)
        return StepDecided(
            record,
            consumed=tuple((c, tuple(r.samples)) for c, r in zip(ranked, requests, strict=True) if r.samples),
            hyper=tuple((c, tuple(r.hyper_parameters)) for c, r in round_.pending.items() if r.hyper_parameters),
            disagreement=disagreement,
            keep_from=self._keep_from(group, round_),
        )

    def _settle_settings(self, group: GroupState, round_: _Round, record: StepRecord) -> bool:
        """Put what changed into the record; say whether contributors disagree."""
        chosen = tuple(c.client_id for c in record.contributors)
        if chosen == round_.contributors and not any(r.hyper_parameters for r in round_.pending.values()):
            return round_.disagreed
        members = self._members.state.members
        views = {c: ledger_hyper.merged(group.settings.get(c, {}), round_.pending[c].hyper_parameters) for c in chosen}
        leader = min(chosen, key=lambda client_id: members[client_id].joined_order)
        record.hyper_parameters.extend(ledger_hyper.difference(group.committed, views[leader]))
        other = ledger_hyper.first_disagreement(views, leader)
        round_.contributors, round_.disagreed = chosen, other is not None
        if other is not None and not group.disagreements:
            client_id, (table, name) = other
            self._desk.notice(
                f"hyper-parameters differ group={group.spec.name} step={group.next_step} table={table} name={name} "
                f"rank={members[client_id].rank}; those of rank {members[leader].rank}, the longest-joined, hold"
            )
        return round_.disagreed

    def _keep_from(self, group: GroupState, round_: _Round) -> int:
        after = group.next_step + 1
        active = [c for c, m in self._members.state.members.items() if m.activity == pb.ACTIVITY_ACTIVE]
        applied = min((round_.applied.get(c, after) for c in active), default=after)
        keep = max(min(applied, after - KEEP_STEPS), after - MAX_STEPS)
        return max(keep, group.first_kept)

    # ------------------------------------------------------------------ checkpoints

    def want_cut(self, checkpoint: str) -> None:
        """Have the next decision of each group carry a checkpoint's id; "": no longer."""
        self._checkpoint, self._cutting = checkpoint, {} if checkpoint else None

    def taken_cut(self) -> tuple[str, dict[int, int]] | None:
        """(id, step by group) as soon as every group that steps has its cut; once."""
        if self._cutting is None or not self._cutting or self._cutting.keys() < self._stepping().keys():
            return None
        found = (self._checkpoint, self._cutting)
        self.want_cut("")
        return found

    def _stepping(self) -> dict[int, int]:
        """The next step of every group that has taken one, by number."""
        modes = (pb.MODE_SYNC, pb.MODE_LOCAL)
        return {n: g.next_step for n, g in self._groups.state.items() if g.spec.mode in modes and g.next_step}

    def _cut_with(self, group: GroupState) -> str:
        """The checkpoint's id, if a group's next decision is to carry it.

        Groups that step in turns are cut between two rounds of turns: when all are equally far.
        If one takes several steps to another's one, the first group begins.
        """
        if self._cutting is None or group.number in self._cutting:
            return ""
        if not self._cutting:
            steps = self._stepping() | {group.number: group.next_step}
            spread = max(steps.values()) - min(steps.values())
            if spread == 1 or (spread > 1 and group.number != min(steps)):
                return ""
        return self._checkpoint

    # ------------------------------------------------------------------ decided steps

    def record(self, group: GroupState, step: int) -> StepRecord:
        """The decision of a step.

        Raises:
            StateRefused: STEP_OUT_OF_RANGE, undecided or forgotten.
        """
        record = group.records.get(step)
        if record is None:
            raise refuse(
                "STEP_OUT_OF_RANGE",
                f"step {step} of group {group.spec.name} is not among those kept, {group.first_kept} to "
                f"{group.next_step - 1}",
                next_step=group.next_step,
                first_kept=group.first_kept,
            )
        return record

    def get_steps(self, number: int, first: int, limit: int) -> pb.GetStepsResponse:
        """Decisions from `first` on, in order, at most `limit` (0: 64).

        Raises:
            RequestRefused: UNKNOWN_GROUP.
            StateRefused: STEP_OUT_OF_RANGE, `first` is forgotten already.
        """
        group = self._groups.get(number)
        if first < group.first_kept:
            self.record(group, first)
        last = min(group.next_step, first + min(limit or KEEP_STEPS, KEEP_STEPS))
        return pb.GetStepsResponse(
            records=[group.records[step] for step in range(first, last)], next_step=group.next_step
        )

    # ------------------------------------------------------------------ time

    def tick(self) -> None:
        """Let members be idle that a step gathered long enough; evict those that never get ready."""
        for number, round_ in self._rounds.items():
            if not round_.pending:
                continue
            group = self._groups.state[number]
            for member in list(self._members.state.members.values()):
                if member.client_id in round_.pending:
                    continue
                if self._gathered(member) and self._desk.now >= self._gather_until(group, member):
                    self._members.set_activity(member, pb.ACTIVITY_IDLE)
                elif self._desk.now >= self._overdue_at(group, member):
                    self._members.evict(member.client_id, f"not ready for step {group.next_step} in time")
                    self._desk.notice(
                        f"evicted client_id={member.client_id} rank={member.rank} group={group.spec.name} "
                        f"step={group.next_step} reason=step_timeout"
                    )

    def _overdue_at(self, group: GroupState, member: MemberState) -> float:
        timeout = self._desk.config.step_timeout_ms / 1000
        if not timeout or member.activity != pb.ACTIVITY_ACTIVE or not self._members.enough():
            return math.inf
        return max(self._round(group).first_at, self._members.since(member.client_id)) + timeout

    def next_deadline(self) -> float | None:
        """When `tick` may find something to do."""
        times = []
        for number, round_ in self._rounds.items():
            if not round_.pending:
                continue
            group = self._groups.state[number]
            for member in self._missing(group):
                if self._gathered(member):
                    times.append(self._gather_until(group, member))
                else:
                    times.append(self._overdue_at(group, member))
        soonest = min(times, default=math.inf)
        return None if soonest == math.inf else soonest

    # ------------------------------------------------------------------ applying

    def _apply_decided(self, body: StepDecided) -> None:
        record = body.record
        group = self._groups.state[record.group]
        for client_id, tables in body.hyper:
            group.settings[client_id] = ledger_hyper.merged(group.settings.get(client_id, {}), tables)
        group.committed = ledger_hyper.merged(group.committed, record.hyper_parameters)
        group.records[record.step] = record
        group.next_step = record.step + 1
        group.skipped += record.skip
        group.disagreements += body.disagreement
        for client_id, ranges in body.consumed:
            self._epochs.consume(client_id, ranges)
        for step in range(group.first_kept, body.keep_from):
            group.records.pop(step, None)
        group.first_kept = body.keep_from
        for key in [key for key in group.degraded if key[0] < body.keep_from]:
            del group.degraded[key]
        self._round(group).pending.clear()
        self._desk.wake(("step", group.number, record.step))

    def _apply_noted(self, body: HyperNoted) -> None:
        group = self._groups.state[body.group]
        group.settings[body.client_id] = ledger_hyper.merged(group.settings.get(body.client_id, {}), body.tables)
        self._round(group).contributors = ()

    def _apply_activity(self, body: ActivitySet) -> None:
        if body.activity == pb.ACTIVITY_ACTIVE:
            for group in self._groups.state.values():
                self._round(group).applied.setdefault(body.client_id, group.next_step)

    def _apply_left(self, body: Left) -> None:
        for number, round_ in self._rounds.items():
            group = self._groups.state[number]
            round_.applied.pop(body.client_id, None)
            if round_.pending.pop(body.client_id, None) is not None:
                self._desk.wake(("step", number, group.next_step))


def _attempt(request: pb.ReadyRequest) -> int:
    return max((request.attempt, *(o.attempt for o in request.overrides)))
