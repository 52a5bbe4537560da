"""What the coordinator stores: one frozen row per thing, as JSON under a key.

The state of the cluster is a function of these rows, so a restart is a scan. Rows never
change in place: a decision writes new ones (see `state.Draft`). Pure.
"""

from __future__ import annotations

import base64
import enum
import json
import typing
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "ClientRow", "ClientState", "EventRow", "HostRow", "JobRow", "LossRow", "MoveRow", "MoveStage", "NodeState",
    "OperationRow", "PartitionRow", "PartitionState", "Ref", "Row", "STALLED", "ServerRow", "Stage", "TableRow",
    "decode", "encode", "moved",
]  # fmt: skip


class NodeState(enum.StrEnum):
    """The judgement on a server or host."""

    LIVE = "live"
    DEAD = "dead"
    LEFT = "left"


class ClientState(enum.StrEnum):
    """The judgement on a client."""

    LIVE = "live"
    LEFT = "left"
    EVICTED = "evicted"


class PartitionState(enum.StrEnum):
    """Whether a partition can acknowledge."""

    ONLINE = "online"
    OFFLINE = "offline"
    RESTORING = "restoring"
    """Its primary loads it from a checkpoint; it holds nothing else."""


class Stage(enum.StrEnum):
    """How far a pending operation on a closed client is."""

    EVICT = "evict"
    FENCE = "fence"
    DONE = "done"


class MoveStage(enum.StrEnum):
    """How far a move of a replica is."""

    WANTED = "wanted"
    """Its target does not copy yet: its turn comes."""
    COPYING = "copying"
    """Its target catches up, or has caught up."""
    DONE = "done"
    CANCELLED = "cancelled"


# The legal moves, by enum: members of two StrEnums with one value would share a key. A
# dead node lives again only when the very process that fell silent is heard again; nothing
# brings back one whose death is certain (`membership` sees to that). An evicted client
# never returns: it registers as a new one.
_MOVES: dict[type[enum.StrEnum], dict[enum.StrEnum, frozenset[enum.StrEnum]]] = {
    NodeState: {
        NodeState.LIVE: frozenset({NodeState.DEAD, NodeState.LEFT}),
        NodeState.DEAD: frozenset({NodeState.LIVE}),
        NodeState.LEFT: frozenset(),
    },
    ClientState: {
        ClientState.LIVE: frozenset({ClientState.LEFT, ClientState.EVICTED}),
        ClientState.LEFT: frozenset(),
        ClientState.EVICTED: frozenset(),
    },
    PartitionState: {
        PartitionState.ONLINE: frozenset({PartitionState.OFFLINE}),
        PartitionState.OFFLINE: frozenset({PartitionState.ONLINE}),
        PartitionState.RESTORING: frozenset({PartitionState.ONLINE}),
    },
    Stage: {
        Stage.EVICT: frozenset({Stage.FENCE}),
        Stage.FENCE: frozenset({Stage.DONE}),
        Stage.DONE: frozenset(),
    },
    MoveStage: {
        # A swap, and a target that happens to be in sync, have nothing to copy.
        MoveStage.WANTED: frozenset({MoveStage.COPYING, MoveStage.DONE, MoveStage.CANCELLED}),
        MoveStage.COPYING: frozenset({MoveStage.DONE, MoveStage.CANCELLED}),
        MoveStage.DONE: frozenset(),
        MoveStage.CANCELLED: frozenset(),
    },
}

StateT = typing.TypeVar("StateT", bound=enum.StrEnum)


def moved(old: StateT, new: StateT) -> StateT:
    """Return `new` if the move from `old` is legal.

    Raises:
        ValueError: it is not; a bug in the decision that asked for it.
    """
    if type(old) is not type(new) or new not in _MOVES[type(old)][old]:
        raise ValueError(f"illegal move {type(old).__name__} {old} -> {new}")
    return new


class Ref(typing.NamedTuple):
    """One process: a name and the incarnation of it."""

    name: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.name}#{self.incarnation:x}"


@dataclass(frozen=True)
class JobRow:
    """The job: its agreed configuration and its counters."""

    PREFIX: ClassVar[str] = "job"

    name: str
    start_workers: int
    min_workers: int
    replicas: int
    gather_ms: int
    step_timeout_ms: int
    push_timeout_ms: int
    min_isr: int = 1
    """Writes are refused while a partition has fewer in-sync replicas."""
    generation: int = 1
    """Raised by a restore; requests of an older one are refused."""
    restoring: str = ""
    """URL of the checkpoint that is being loaded; empty: none."""
    map_version: int = 0
    """Raised by every change of the map."""
    next_client: int = 1
    """The next client id. Ids are never reused."""
    next_table: int = 1
    next_partition: int = 1
    """Partition 0 is the ledger."""
    next_operation: int = 1
    next_event: int = 1
    next_move: int = 1
    cluster: str = ""
    """Random, made at the first start on an empty store: tells this cluster from another of the same name."""
    unsettled: bool = False
    """Servers came or went since bytes were last looked at: a rebalance is due."""

    @property
    def key(self) -> str:
        """Where it is stored."""
        return self.PREFIX


STALLED = "makes no progress"
"""How the reason begins for which such a server drains."""


@dataclass(frozen=True)
class ServerRow:
    """One process of a server."""

    PREFIX: ClassVar[str] = "server/"

    name: str
    incarnation: int
    address: str
    control_address: str
    host_id: str
    version: str
    fingerprint: bytes
    capacity_bytes: int
    state: NodeState = NodeState.LIVE
    reason: str = ""
    certain: bool = False
    """A dead one is known to have ended: an exit report, a successor. Silence is not that."""
    draining: str = ""
    """Why a live one gets nothing new and gives away what it holds; empty: it does not."""

    @property
    def stalled(self) -> bool:
        """Whether it drains because it makes no progress."""
        return self.draining.startswith(STALLED)

    @property
    def ref(self) -> Ref:
        """The process."""
        return Ref(self.name, self.incarnation)

    @property
    def key(self) -> str:
        """Where it is stored."""
        return f"{self.PREFIX}{self.name}/{self.incarnation}"


@dataclass(frozen=True)
class HostRow:
    """A worker supervisor; the newest process of that name."""

    PREFIX: ClassVar[str] = "host/"

    name: str
    incarnation: int
    host_id: str
    slots: int
    state: NodeState = NodeState.LIVE
    reason: str = ""
    certain: bool = False
    """As in `ServerRow`."""

    @property
    def ref(self) -> Ref:
        """The process."""
        return Ref(self.name, self.incarnation)

    @property
    def key(self) -> str:
        """Where it is stored."""
        return f"{self.PREFIX}{self.name}"


@dataclass(frozen=True)
class ClientRow:
    """One client id and the process that it was given to."""

    PREFIX: ClassVar[str] = "client/"

    client_id: int
    incarnation: int
    slot: str
    host: str
    """The supervisor that beats for it; empty if it beats for itself."""
    host_incarnation: int
    host_id: str
    role: str
    state: ClientState = ClientState.LIVE
    reason: str = ""

    @property
    def key(self) -> str:
        """Where it is stored."""
        return f"{self.PREFIX}{self.client_id:020d}"


@dataclass(frozen=True)
class TableRow:
    """A table: its schema and where its partitions begin."""

    PREFIX: ClassVar[str] = "table/"

    table_id: int
    name: str
    group: str
    first_partition: int
    partition_count: int
    digest: bytes
    spec: bytes
    """The TableSpec, serialised."""

    @property
    def key(self) -> str:
        """Where it is stored."""
        return f"{self.PREFIX}{self.table_id:010d}"


@dataclass(frozen=True)
class PartitionRow:
    """One partition and the processes that hold it."""

    PREFIX: ClassVar[str] = "partition/"

    partition: int
    table_id: int
    """0 for the ledger."""
    index: int
    nbytes: int
    """Bytes of its values."""
    server: str
    incarnation: int
    epoch: int = 1
    """Only rises, at every change of primary."""
    state: PartitionState = PartitionState.ONLINE
    isr: tuple[Ref, ...] = ()
    """Who has everything that was ever acknowledged; never empty. The primary comes first,
    unless OFFLINE: then whom it waits for. Rows of before replication mean the primary alone."""
    learners: tuple[Ref, ...] = ()
    """Who is catching up."""
    replicas: int = 1
    """How many in-sync replicas are wanted."""
    version: int = 0
    """Of the map in which the row last changed; `Draft.put` sets it. Rows of before replication
    have 0 until the coordinator's first decision."""

    def __post_init__(self) -> None:
        if not self.isr:
            object.__setattr__(self, "isr", (self.primary,))

    @property
    def primary(self) -> Ref:
        """The process that acknowledges under this epoch."""
        return Ref(self.server, self.incarnation)

    @property
    def holders(self) -> tuple[Ref, ...]:
        """Every process that holds a replica, complete or not."""
        return (*self.isr, *self.learners)

    @property
    def key(self) -> str:
        """Where it is stored."""
        return f"{self.PREFIX}{self.partition:010d}"


@dataclass(frozen=True)
class OperationRow:
    """What is committed about closed clients and must still be told to servers."""

    PREFIX: ClassVar[str] = "operation/"

    operation: int
    stage: Stage
    clients: tuple[int, ...]
    why: str
    only: str = ""
    """Name of the one server to fence at; empty: every live server."""
    confirmed: tuple[str, ...] = ()
    """Servers that have confirmed the FENCE, as `str(Ref)`."""

    @property
    def key(self) -> str:
        """Where it is stored."""
        return f"{self.PREFIX}{self.operation:020d}"


@dataclass(frozen=True)
class LossRow:
    """Acknowledged updates of a partition that were lost with primaries (acks=primary)."""

    PREFIX: ClassVar[str] = "loss/"

    partition: int
    total: int

    @property
    def key(self) -> str:
        """Where it is stored."""
        return f"{self.PREFIX}{self.partition:010d}"


@dataclass(frozen=True)
class MoveRow:
    """One replica on its way from one server to another; or the primary's role, without any copying."""

    PREFIX: ClassVar[str] = "move/"

    move: int
    partition: int
    epoch: int
    """Of the partition when it was planned: the plan dies with it."""
    source: Ref
    target: Ref
    swap: bool
    """Only the primary's role goes to `target`, which is in sync; `source` stays as follower."""
    why: str
    """For people: "psctl move", "rebalance", "drain of server-1"."""
    stage: MoveStage = MoveStage.WANTED
    reason: str = ""
    """Why it was cancelled."""

    @property
    def active(self) -> bool:
        """Whether something is still to be done."""
        return self.stage in (MoveStage.WANTED, MoveStage.COPYING)

    @property
    def key(self) -> str:
        """Where it is stored."""
        return f"{self.PREFIX}{self.move:020d}"


@dataclass(frozen=True)
class EventRow:
    """One line of the audit table."""

    PREFIX: ClassVar[str] = "event/"

    event: int
    wall_time_ms: int
    term: int
    kind: str
    subject: str
    evidence: str
    """JSON."""

    @property
    def key(self) -> str:
        """Where it is stored."""
        return event_key(self.event)


def event_key(event: int) -> str:
    """Key of an audit line; keys sort as numbers do."""
    return f"{EventRow.PREFIX}{event:020d}"


Row = JobRow | ServerRow | HostRow | ClientRow | TableRow | PartitionRow | OperationRow | LossRow | MoveRow | EventRow
_CLASSES: tuple[type[Row], ...] = typing.get_args(Row)
_HINTS = {cls: {n: h for n, h in typing.get_type_hints(cls).items() if n != "PREFIX"} for cls in _CLASSES}


def encode(row: Row) -> bytes:
    """Row to JSON bytes; equal rows give equal bytes."""
    # Not `asdict`, which copies deeply: a big table is tens of thousands of rows at once.
    return json.dumps(vars(row), default=_plain, sort_keys=True).encode()


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} cannot be stored")


def decode(key: str, data: bytes) -> Row:
    """The row stored under `key`.

    Raises:
        ValueError: the key or the bytes are none of ours; the message names the key.
    """
    cls = next((c for c in _CLASSES if key.startswith(c.PREFIX)), None)
    if cls is None:
        raise ValueError(f"unknown key {key!r} in the store")
    try:
        fields = json.loads(data)
        return cls(**{name: _typed(_HINTS[cls][name], value) for name, value in fields.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"row {key!r} in the store cannot be read: {error}") from error


def _typed(hint: typing.Any, value: typing.Any) -> typing.Any:
    if hint is bytes:
        return base64.b64decode(value, validate=True)
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return hint(value)
    if hint is Ref:
        return Ref(*value)
    if typing.get_origin(hint) is tuple:
        return tuple(Ref(*item) if typing.get_args(hint)[0] is Ref else item for item in value)
    return value
