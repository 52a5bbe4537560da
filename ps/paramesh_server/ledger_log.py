"""The ledger's records, and the desk that its parts share. Pure.

Every change of the ledger's state is one numbered record: a part *decides*, hands a body
to `Desk.commit`, which numbers it, offers it to the sink (the replicated log) and lets
every part that cares *apply* it. So the state is a function of the records: applying them
on a fresh ledger gives an equal `digest`.

    desk.on(Joined, members.apply_joined)      # parts say which bodies they apply, once
    desk.commit(Joined(7, 0, "host/0"))        # decide -> record -> apply
    desk.wake(("step", 1, 12))                 # whoever waits for this key asks again

What is not in a record (Readys, norms, gather timers) is volatile: callers repeat it.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.message import Message
from paramesh.errors import refuse
from paramesh.v1.ledger_pb2 import Floor, GroupSpec
from paramesh.v1.types_pb2 import JobConfig, SampleRange, StepRecord, TableHyperParameters

Key = tuple[str | int, ...]
"""What is waited for, such as `("step", group, step)`."""

START: Key = ("start",)
"""Waited for by everybody who comes before `start_workers` have joined."""

EpochKey = tuple[str, int]
"""(dataset, epoch)."""


class Kind(enum.Enum):
    """What a record is about."""

    MEMBERS = "members"
    GROUP = "group"
    INIT = "init"
    STEP = "step"
    CLIP = "clip"
    DEGRADED = "degraded"
    CLOCK = "clock"
    DATA = "data"
    STATE = "state"
    GATHER = "gather"


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """A client became a member."""

    client_id: int
    rank: int
    slot: str


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """`start_workers` members were there: step 0 and the first lease may go."""


@dataclasses.dataclass(frozen=True, slots=True)
class Left:
    """A member left, or a client (member or not) was evicted for ever."""

    client_id: int
    evicted: bool
    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class ActivitySet:
    """A member is ACTIVE, BETWEEN or IDLE from here on."""

    client_id: int
    activity: int
    parked: EpochKey | None = None
    """BETWEEN because it waits for leases of this epoch: no step gathers it."""


@dataclasses.dataclass(frozen=True, slots=True)
class GroupOpened:
    """A table group exists; its number is the count of such records."""

    spec: GroupSpec


@dataclasses.dataclass(frozen=True, slots=True)
class InitOwned:
    """A member owns first values under an attempt; 0: nobody does."""

    group: int
    client_id: int
    attempt: int


@dataclasses.dataclass(frozen=True, slots=True)
class InitCommitted:
    """First values of a group are in every partition."""

    group: int


@dataclasses.dataclass(frozen=True, slots=True)
class StepDecided:
    """A step's decision, with what else follows from it."""

    record: StepRecord
    consumed: tuple[tuple[int, tuple[SampleRange, ...]], ...]
    """(client, ranges) of every contributor."""
    hyper: tuple[tuple[int, tuple[TableHyperParameters, ...]], ...]
    """(client, changed settings) of every Ready that was there, contributing or not."""
    disagreement: bool
    """Some contributor's settings differ from those that hold."""
    keep_from: int
    """Records of earlier steps may be forgotten."""


@dataclasses.dataclass(frozen=True, slots=True)
class HyperNoted:
    """Settings that came with a Ready that was too late for its step."""

    group: int
    client_id: int
    tables: tuple[TableHyperParameters, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ClipSet:
    """The one clip factor of a decided step, an fp32 number."""

    group: int
    step: int
    factor: float | None
    """None: the gradient's norm is not finite, and the step is skipped."""


@dataclasses.dataclass(frozen=True, slots=True)
class Degraded:
    """A partition may go without the contributions of evicted clients."""

    group: int
    step: int
    partition: int
    client_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ClockEntered:
    """A member takes part in a group's clocks, from this one."""

    group: int
    client_id: int
    clock: int


@dataclasses.dataclass(frozen=True, slots=True)
class ClockFinished:
    """A member finished clocks 0..finished-1."""

    group: int
    client_id: int
    finished: int
    floors: tuple[Floor, ...]
    consumed: tuple[SampleRange, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class EpochOpened:
    """An epoch of a dataset is dealt for the first time."""

    key: EpochKey
    length: int
    chunk: int
    seed: int
    drop_last: bool
    owners: tuple[int, ...]
    """Members dealt to, in rank order; none: first come, first served."""


@dataclasses.dataclass(frozen=True, slots=True)
class Dealt:
    """What is left of an epoch is dealt anew."""

    key: EpochKey
    owners: tuple[int, ...]
    absent: tuple[int, ...] = ()
    """Members that nobody waits for any more in this epoch, until they lease from it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Leased:
    """A member got chunks."""

    key: EpochKey
    client_id: int
    own: int
    """How many from its own share."""
    returned: tuple[int, ...]
    """Which of the returned ones."""
    call: int
    """The caller's number of the request; 0: not numbered."""


@dataclasses.dataclass(frozen=True, slots=True)
class Delivered:
    """Of the chunks it holds, a member handed these to its loop: they hold no epoch open."""

    key: EpochKey
    client_id: int
    chunks: tuple[int, ...]
    """All of them, rising."""


@dataclasses.dataclass(frozen=True, slots=True)
class Returned:
    """A member gave chunks back."""

    key: EpochKey
    client_id: int
    chunks: tuple[int, ...]
    gone: bool
    """Its loop is over: it gets no share until it leases from this epoch again."""


@dataclasses.dataclass(frozen=True, slots=True)
class MovedOn:
    """A member leases from this epoch, is back in it, and is done with earlier ones."""

    key: EpochKey
    client_id: int


@dataclasses.dataclass(frozen=True, slots=True)
class EpochClosed:
    """Every sample of an epoch is consumed or delivered, or everybody has moved on."""

    key: EpochKey


@dataclasses.dataclass(frozen=True, slots=True)
class StatePut:
    """Small state under a key."""

    key: str
    version: int
    value: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Gathered:
    """A round of a barrier or mean is complete."""

    name: str
    round: int
    values: tuple[float, ...]
    client_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class GatherEntered:
    """A member that missed the last round of a barrier or mean was told its result."""

    name: str
    client_id: int


KINDS: dict[type, Kind] = {
    Joined: Kind.MEMBERS,
    Started: Kind.MEMBERS,
    Left: Kind.MEMBERS,
    ActivitySet: Kind.MEMBERS,
    GroupOpened: Kind.GROUP,
    InitOwned: Kind.INIT,
    InitCommitted: Kind.INIT,
    StepDecided: Kind.STEP,
    HyperNoted: Kind.STEP,
    ClipSet: Kind.CLIP,
    Degraded: Kind.DEGRADED,
    ClockEntered: Kind.CLOCK,
    ClockFinished: Kind.CLOCK,
    EpochOpened: Kind.DATA,
    Dealt: Kind.DATA,
    Leased: Kind.DATA,
    Delivered: Kind.DATA,
    Returned: Kind.DATA,
    MovedOn: Kind.DATA,
    EpochClosed: Kind.DATA,
    StatePut: Kind.STATE,
    Gathered: Kind.GATHER,
    GatherEntered: Kind.GATHER,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One numbered entry of the ledger's log."""

    lsn: int
    """Contiguous from 1."""
    kind: Kind
    body: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """The answer "not yet": ask again, the same, when `key` is woken."""

    key: Key
    what: str
    """What is waited for, for people."""
    who: Callable[[], tuple[int, ...]]
    """Ranks that are waited for, as of when it is called."""


class Desk:
    """What the parts of one ledger share.

    Attributes:
        config: the job's settings; replaced by `Ledger.update_config` only.
        now: seconds, of the call under way; set by the facade at the start of each. No record
            and no replicated state holds it: it is of one machine's clock.
        lsn: the number of the last record.
        woken: keys whose waiters must ask again; taken by the driver after each call.
        notices: lines for the log; taken by the driver after each call.
    """

    def __init__(self, config: JobConfig, sink: Callable[[Record], None]):
        self.sink: Callable[[Record], None] | None = sink
        """Takes each decision before it is applied; None: others decide, this one replays."""
        self.config = config
        self.now = 0.0
        self.lsn = 0
        self.woken: set[Key] = set()
        self.notices: list[str] = []
        self._appliers: dict[type, list[Callable[[Any], None]]] = {}

    def on(self, body: type, apply: Callable[[Any], None]) -> None:
        """Apply bodies of a type with `apply`; several appliers run in order of registration."""
        self._appliers.setdefault(body, []).append(apply)

    def commit(self, body: object) -> None:
        """Append a decision and apply it.

        Raises:
            RuntimeError: this ledger follows another; a mistake of its driver.
        """
        if self.sink is None:
            raise RuntimeError(f"a ledger that follows another decides nothing: {type(body).__name__}")
        record = Record(self.lsn + 1, KINDS[type(body)], body)
        self.sink(record)
        self.apply(record)

    def apply(self, record: Record) -> None:
        """Apply the next record.

        Raises:
            ValueError: its number is not the next one.
        """
        if record.lsn != self.lsn + 1:
            raise ValueError(f"record {record.lsn} does not follow {self.lsn}")
        self.lsn = record.lsn
        for apply in self._appliers.get(type(record.body), ()):
            apply(record.body)

    def wake(self, key: Key) -> None:
        """Let whoever waits for `key` ask again."""
        self.woken.add(key)

    def notice(self, line: str) -> None:
        """Say something in the log."""
        self.notices.append(line)


def digest(states: Iterable[object]) -> str:
    """A hash of replicated state that does not depend on the order of dicts and sets."""
    hasher = hashlib.sha256()
    for state in states:
        hasher.update(repr(_canonical(state)).encode())
    return hasher.hexdigest()


def _canonical(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return (type(value).__name__, *((f.name, _canonical(getattr(value, f.name))) for f in fields))
    if isinstance(value, Message):
        return value.SerializeToString(deterministic=True)
    if isinstance(value, dict):
        return ("dict", *sorted((repr(_canonical(k)), _canonical(v)) for k, v in value.items()))
    if isinstance(value, set | frozenset):
        return ("set", *sorted(repr(_canonical(item)) for item in value))
    if isinstance(value, list | tuple):
        return tuple(_canonical(item) for item in value)
    return value


def require(value: int | str, field: str) -> None:
    """Refuse a zero or empty field.

    Raises:
        RequestRefused: MISSING_FIELD.
    """
    if not value:
        raise refuse("MISSING_FIELD", f"{field} is required", field=field)
