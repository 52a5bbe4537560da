"""Table groups: what every member must agree on, and who sets first values. Pure.

group = groups.open(client_id, spec)      # same name: same spec, or TENSOR_MISMATCH, SCHEMA
groups.await_init(client_id, number)      # the lowest rank that waits becomes owner
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest

from paramesh.errors import refuse
from paramesh.routing import check_name
from paramesh.v1.ledger_pb2 import (
    ACTIVITY_IDLE,
    MODE_ASYNC,
    MODE_LOCAL,
    MODE_SSP,
    MODE_SYNC,
    AwaitInitResponse,
    GroupSpec,
)
from paramesh.v1.types_pb2 import HyperParameter, StepRecord

from paramesh_server.ledger_log import START, Desk, GroupOpened, InitCommitted, InitOwned, Left, Wait
from paramesh_server.ledger_members import START_GATHER_FACTOR, Members, MemberState

MAX_GROUPS = 256
"""Groups in one job; a model has a handful, and a flood must not fill memory."""

Floors = dict[int, tuple[int, int]]
"""For each partition, (epoch, lsn)."""

Setting = tuple[int, str]
"""(table id, hyper-parameter name)."""


@dataclass(slots=True)
class GroupState:
    """What replicas agree on about one table group."""

    number: int
    spec: GroupSpec
    """Fixed at opening."""
    next_step: int = 0
    """The first undecided step (sync, local), by StepDecided; the first clock after a restore (ssp, async)."""
    records: dict[int, StepRecord] = field(default_factory=dict)
    """Decisions by step, contiguous from `first_kept` to `next_step - 1`."""
    first_kept: int = 0
    committed: dict[Setting, HyperParameter] = field(default_factory=dict)
    """Settings that hold, as steps committed them."""
    settings: dict[int, dict[Setting, HyperParameter]] = field(default_factory=dict)
    """Each member's own settings, as its Readys told; dropped when it leaves."""
    disagreements: int = 0
    """Steps in which contributors' settings differed."""
    skipped: int = 0
    degraded: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    """For (step, partition), the clients it may go without; dropped with the step's record."""
    init_owner: int = 0
    """Who assigns first values; 0: nobody yet, or no longer."""
    init_attempt: int = 0
    initialised: bool = False
    clocks: dict[int, int] = field(default_factory=dict)
    """Clocks that each member has finished (ssp, async)."""
    floors: dict[int, Floors] = field(default_factory=dict)
    """For each recent clock, what its pushes were acknowledged at, over all members (ssp)."""
    old_floors: Floors = field(default_factory=dict)
    """The same over all clocks before those of `floors`."""


@dataclass(slots=True)
class _InitRound:
    """Members that wait for first values. Volatile: they ask again."""

    waiting: set[int] = field(default_factory=set)
    first_at: float = 0.0


class Groups:
    """The job's table groups."""

    def __init__(self, desk: Desk, members: Members):
        self._desk = desk
        self._members = members
        self.state: dict[int, GroupState] = {}
        """By number, from 1."""
        self._names: dict[str, int] = {}
        """Numbers by name. Derived from the state."""
        self._rounds: dict[int, _InitRound] = {}
        desk.on(GroupOpened, self._apply_opened)
        desk.on(InitOwned, self._apply_owned)
        desk.on(InitCommitted, self._apply_committed)
        desk.on(Left, self._apply_left)

    def install(self, state: dict[int, GroupState]) -> None:
        """Replace the state by a snapshot's; derive what is derived."""
        self.state = state
        self._names = {group.spec.name: number for number, group in state.items()}

    def get(self, number: int) -> GroupState:
        """A group by number.

        Raises:
            RequestRefused: UNKNOWN_GROUP.
        """
        group = self.state.get(number)
        if group is None:
            raise refuse("UNKNOWN_GROUP", f"group {number} is not open: OpenGroup first", group=number)
        return group

    def first_come(self) -> bool:
        """Whether samples are dealt first come, first served: no group trains in lockstep."""
        modes = {group.spec.mode for group in self.state.values()}
        return bool(modes) and not modes & {MODE_SYNC, MODE_LOCAL}

    # ------------------------------------------------------------------ opening

    def open(self, spec: GroupSpec) -> GroupState:
        """Declare a group, or join those who did.

        Raises:
            RequestRefused: NAME, MISSING_FIELD.
            TensorMismatch: TENSOR_MISMATCH, naming the first tensor that differs.
            StateRefused: SCHEMA, QUOTA.
        """
        _check_spec(spec)
        number = self._names.get(spec.name)
        if number is None:
            if len(self.state) >= MAX_GROUPS:
                raise refuse("QUOTA", f"a job has at most {MAX_GROUPS} table groups")
            fixed = GroupSpec()
            fixed.CopyFrom(spec)
            self._desk.commit(GroupOpened(fixed))
            return self.state[self._names[spec.name]]
        group = self.state[number]
        _compare(group.spec, spec)
        return group

    # ------------------------------------------------------------------ first values

    def await_init(self, client_id: int, number: int) -> AwaitInitResponse | Wait:
        """First values are there; or the caller owns them; or wait.

        Raises:
            RequestRefused: UNKNOWN_GROUP.
            Fenced: EVICTED, NOT_MEMBER.
        """
        group = self.get(number)
        if group.initialised:
            return AwaitInitResponse(initialised=True, init_attempt=group.init_attempt)
        self._members.need(client_id)
        waiting = self._rounds.setdefault(number, _InitRound())
        if not waiting.waiting:
            waiting.first_at = self._desk.now
        waiting.waiting.add(client_id)
        self.settle()
        if group.init_owner == client_id:
            return AwaitInitResponse(owner=True, init_attempt=group.init_attempt)
        return Wait(
            ("init", number) if self._members.state.started else START,
            f"first values of group {group.spec.name}",
            lambda: self._awaited(group),
        )

    def _awaited(self, group: GroupState) -> tuple[int, ...]:
        if group.init_owner:
            return self._members.ranks([group.init_owner])
        return tuple(m.rank for m in self._ahead(group.number))

    def _ahead(self, number: int) -> list[MemberState]:
        """Members of lower rank than all who wait, who are still expected to ask."""
        waiting = self._rounds[number].waiting if number in self._rounds else set()
        ahead = []
        for member in self._members.by_rank():
            if member.client_id in waiting:
                break
            if member.activity != ACTIVITY_IDLE:
                ahead.append(member)
        return ahead

    def settle(self) -> None:
        """Give first values an owner where somebody waits and nobody owns."""
        if not self._members.state.started:
            return
        for number, waiting in list(self._rounds.items()):
            group = self.state[number]
            if group.initialised or not waiting.waiting:
                del self._rounds[number]
            elif not group.init_owner and (not self._ahead(number) or self._desk.now >= self._until(waiting)):
                ranks = {client: self._members.state.members[client].rank for client in waiting.waiting}
                owner = min(ranks, key=ranks.__getitem__)
                self._desk.commit(InitOwned(number, owner, group.init_attempt + 1))

    def _until(self, waiting: _InitRound) -> float:
        return waiting.first_at + self._desk.config.gather_ms / 1000 * START_GATHER_FACTOR

    def next_deadline(self) -> float | None:
        """When `settle` may find something to do without anybody asking."""
        if not self._members.state.started:
            return None
        open_rounds = (w for n, w in self._rounds.items() if w.waiting and not self.state[n].init_owner)
        return min((self._until(waiting) for waiting in open_rounds), default=None)

    def commit_init(self, client_id: int, number: int, attempt: int) -> None:
        """Take the owner's word that first values are in every partition.

        Raises:
            RequestRefused: UNKNOWN_GROUP.
            Fenced: EVICTED, NOT_MEMBER.
            Retryable: INITIALISING, somebody else owns them, or under another attempt.
        """
        group = self.get(number)
        member = self._members.need(client_id)
        if (group.init_owner, group.init_attempt) != (client_id, attempt):
            raise refuse(
                "INITIALISING",
                f"first values of group {group.spec.name} are not rank {member.rank}'s under attempt {attempt}: "
                "await them again",
                attempt=group.init_attempt,
            )
        if not group.initialised:
            self._desk.commit(InitCommitted(number))

    # ------------------------------------------------------------------ applying

    def _apply_opened(self, body: GroupOpened) -> None:
        number = len(self.state) + 1
        self.state[number] = GroupState(number, body.spec)
        self._names[body.spec.name] = number

    def _apply_owned(self, body: InitOwned) -> None:
        group = self.state[body.group]
        group.init_owner, group.init_attempt = body.client_id, body.attempt
        self._desk.wake(("init", body.group))

    def _apply_committed(self, body: InitCommitted) -> None:
        self.state[body.group].initialised = True
        self._rounds.pop(body.group, None)
        self._desk.wake(("init", body.group))

    def _apply_left(self, body: Left) -> None:
        for number, group in self.state.items():
            group.settings.pop(body.client_id, None)
            waiting = self._rounds.get(number)
            if waiting is not None:
                waiting.waiting.discard(body.client_id)
            if group.init_owner == body.client_id and not group.initialised:
                group.init_owner = 0
                self._desk.wake(("init", number))


def _check_spec(spec: GroupSpec) -> None:
    check_name(spec.name, "group")
    if spec.mode not in (MODE_SYNC, MODE_SSP, MODE_ASYNC, MODE_LOCAL):
        raise refuse("MISSING_FIELD", f"mode {spec.mode} of group {spec.name} must be sync, ssp, async or local")
    if not spec.structure_digest:
        raise refuse("MISSING_FIELD", f"structure_digest of group {spec.name} is required")
    if spec.max_grad_norm and not spec.partitions:
        raise refuse("MISSING_FIELD", f"partitions of group {spec.name} are required to clip by their norms")
    if not 0 <= spec.max_grad_norm < float("inf"):
        raise refuse("HYPER_PARAMETER", f"max_grad_norm {spec.max_grad_norm} must be finite and >= 0")


def _compare(first: GroupSpec, other: GroupSpec) -> None:
    """Refuse a member's group that differs from the one that was opened first."""
    if first.structure_digest != other.structure_digest:
        raise _mismatch(first, other)
    for name in ("mode", "staleness", "every", "backup_workers", "loss_reduction", "max_grad_norm"):
        if getattr(first, name) != getattr(other, name):
            raise refuse(
                "SCHEMA",
                f"group {first.name} was opened with {name} {getattr(first, name)}, this worker says "
                f"{getattr(other, name)}: every worker must use the same",
                field=name,
                group=first.name,
            )
    if list(first.partitions) != list(other.partitions):
        raise refuse("SCHEMA", f"group {first.name} has other partitions on this worker", field="partitions")


def _mismatch(first: GroupSpec, other: GroupSpec) -> Exception:
    pairs = enumerate(zip_longest(first.tensor_names, other.tensor_names, fillvalue=None))
    for index, (mine, theirs) in pairs:
        if mine != theirs:
            return refuse(
                "TENSOR_MISMATCH",
                f"group {first.name}: tensor {index} is {theirs or 'missing'} here and {mine or 'missing'} on the "
                "workers that came first: every worker must build the same model",
                tensor=theirs or mine or "",
                index=index,
                expected=mine or "",
            )
    return refuse(
        "TENSOR_MISMATCH",
        f"group {first.name}: tensor names agree, but a shape, a dtype or the optimizer differs from the workers "
        "that came first",
        group=first.name,
    )
