"""The coordinator's memory, and how a decision on it is written down. Pure.

    draft = Draft(state, wall_ms)
    answer = membership.register_server(draft, hello)      # reads and writes the draft only
    store.transact(draft.compare, draft.encoded())         # commit ...
    state.apply(draft.writes)                              # ... then know ...
    for effect in draft.effects: ...                       # ... then act

`ClusterState` holds committed rows and nothing else: loading the store gives an equal one.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from paramesh.v1 import types_pb2 as pb

from paramesh_coordinator.rows import (
    ClientRow,
    ClientState,
    EventRow,
    HostRow,
    JobRow,
    LossRow,
    MoveRow,
    NodeState,
    OperationRow,
    PartitionRow,
    PartitionState,
    Ref,
    Row,
    ServerRow,
    TableRow,
    decode,
    encode,
    event_key,
)

__all__ = [
    "KEPT_EVENTS",
    "NODE_STATES",
    "ClusterState",
    "Draft",
    "Dropped",
    "Effect",
    "Ended",
    "FailedOver",
    "Kind",
    "NodeKey",
    "Registered",
    "Senses",
    "build_map",
    "map_node",
    "table_entry",
]

KEPT_EVENTS = 10_000
"""Audit lines kept: months of a calm cluster, some 3 MB."""

Kind = typing.Literal["server", "host", "client"]


class NodeKey(typing.NamedTuple):
    """Who beats: a process by name and incarnation; a client's name is its id."""

    kind: Kind
    name: str
    incarnation: int

    @classmethod
    def client(cls, client_id: int) -> NodeKey:
        """The key of a client that beats for itself."""
        return cls("client", str(client_id), 0)


@dataclass(frozen=True)
class Registered:
    """Effect: begin to watch for silence; a registration counts as a fresh echo."""

    node: NodeKey


@dataclass(frozen=True)
class Ended:
    """Effect: stop watching for silence."""

    node: NodeKey


@dataclass(frozen=True)
class FailedOver:
    """Effect: a partition got another primary although the old one is only silent."""

    partition: int


@dataclass(frozen=True)
class Dropped:
    """Effect: a primary has taken a process out of an in-sync set."""

    partition: int
    ref: Ref


Effect = Registered | Ended | FailedOver | Dropped


@dataclass(frozen=True)
class Senses:
    """What only the running coordinator knows at the moment of a decision; lost at a restart."""

    fresh: Callable[[Ref], bool] = lambda _: True
    """Whether a server's echo came less than two beats ago."""
    held_back: frozenset[int] = frozenset()
    """Partitions that failed over for silence lately: the next time needs positive death."""
    dropped: Mapping[tuple[int, Ref], float] = field(default_factory=dict)
    """(partition, server) -> seconds since its primary took it out of the in-sync set."""
    stuck: frozenset[tuple[int, Ref]] = frozenset()
    """(partition, server) of learners that should have caught up long ago."""
    rates: Mapping[int, int] = field(default_factory=dict)
    """Partition -> requests a second, of those that are known."""
    uneven: bool = False
    """Requests have been uneven for so long that a plan for their sake is due."""


RowT = typing.TypeVar("RowT", ServerRow, HostRow, ClientRow, TableRow, PartitionRow, OperationRow, LossRow, MoveRow)


class ClusterState:
    """Every committed row, by class and key. Written only by `apply`."""

    def __init__(self, job: JobRow):
        self.job = job
        self._rows: dict[type[Row], dict[str, Row]] = {
            cls: {} for cls in (ServerRow, HostRow, ClientRow, TableRow, PartitionRow, OperationRow, LossRow, MoveRow)
        }

    @classmethod
    def load(cls, pairs: Iterable[tuple[str, bytes]], fresh: JobRow) -> ClusterState:
        """The state that a store holds; of an empty store, a new job.

        Raises:
            ValueError: a row cannot be read; names its key.
        """
        state = cls(fresh)
        state.apply({key: decode(key, data) for key, data in pairs if not key.startswith(EventRow.PREFIX)})
        return state

    def apply(self, writes: Mapping[str, Row | None]) -> None:
        """Take in what was committed."""
        for key, row in writes.items():
            if isinstance(row, JobRow):
                self.job = row
            elif isinstance(row, EventRow) or key.startswith(EventRow.PREFIX):
                continue  # people read these from the store
            elif row is not None:
                self._rows[type(row)][key] = row
            else:
                for rows in self._rows.values():
                    rows.pop(key, None)

    def rows(self, cls: type[RowT]) -> Mapping[str, RowT]:
        """All rows of a class, by key."""
        return typing.cast("Mapping[str, RowT]", self._rows[cls])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClusterState) and (self.job, self._rows) == (other.job, other._rows)

    __hash__ = None  # type: ignore[assignment]

    def live_servers(self) -> list[ServerRow]:
        """Servers that are neither dead nor gone, by name."""
        return [row for _, row in sorted(self.rows(ServerRow).items()) if row.state is NodeState.LIVE]

    def partition(self, partition: int) -> PartitionRow | None:
        """A partition's row, or None before it exists."""
        return self.rows(PartitionRow).get(f"{PartitionRow.PREFIX}{partition:010d}")

    def table(self, table_id: int) -> TableRow | None:
        """A table's row, or None."""
        return self.rows(TableRow).get(f"{TableRow.PREFIX}{table_id:010d}")

    def client(self, client_id: int) -> ClientRow | None:
        """A client's row, or None if it never was or was forgotten long after its end."""
        return self.rows(ClientRow).get(f"{ClientRow.PREFIX}{client_id:020d}")

    def operations(self) -> list[OperationRow]:
        """What is committed and not yet confirmed, oldest first."""
        return [row for _, row in sorted(self.rows(OperationRow).items())]

    def moves(self) -> list[MoveRow]:
        """Moves that are not over, oldest first."""
        return [row for _, row in sorted(self.rows(MoveRow).items()) if row.active]

    def beating(self) -> list[NodeKey]:
        """Everybody whose silence counts."""
        keys = [NodeKey("server", *row.ref) for row in self.live_servers()]
        keys += [NodeKey("host", *h.ref) for h in self.rows(HostRow).values() if h.state is NodeState.LIVE]
        keys += [
            NodeKey.client(c.client_id)
            for c in self.rows(ClientRow).values()
            if c.state is ClientState.LIVE and not c.host
        ]
        return keys


class Draft:
    """One decision in the making: reads see its own writes, nothing is committed yet.

    Attributes:
        writes: rows to put, None to delete; by key.
        effects: what to do once they are committed, in order.
        audited: (kind, subject, evidence) of each audit line, for the log.
        wall_ms: the wall clock, for audit lines only.
        senses: what is known beside the rows.
    """

    def __init__(self, state: ClusterState, term: int, wall_ms: int, senses: Senses | None = None):
        self.state = state
        self.senses = senses or Senses()
        self.term = term
        self.wall_ms = wall_ms
        self.writes: dict[str, Row | None] = {}
        self.effects: list[Effect] = []
        self.audited: list[tuple[str, str, str]] = []
        self._map_raised = False

    @property
    def job(self) -> JobRow:
        """The job as of this draft."""
        row = self.writes.get(JobRow.PREFIX, self.state.job)
        assert isinstance(row, JobRow)
        return row

    @property
    def compare(self) -> dict[str, bytes]:
        """What the store must still hold: the job's row, which every decision raises."""
        return {self.state.job.key: encode(self.state.job)}

    def encoded(self) -> dict[str, bytes | None]:
        """The writes as the store takes them."""
        return {key: None if row is None else encode(row) for key, row in self.writes.items()}

    def put(self, row: Row) -> None:
        """Write a row; the map's version rises if the map shows it, and a partition's with it."""
        if isinstance(row, ServerRow | TableRow | PartitionRow):
            self.raise_map()
        if isinstance(row, PartitionRow):
            row = dataclasses.replace(row, version=self.job.map_version)
        self.writes[row.key] = row

    def delete(self, row: Row) -> None:
        """Remove a row."""
        self.writes[row.key] = None
        if isinstance(row, ServerRow):
            self.raise_map()

    def change_job(self, **fields: typing.Any) -> None:
        """Write counters or settings of the job."""
        self.put(dataclasses.replace(self.job, **fields))

    def raise_map(self) -> None:
        """One decision, one version: watchers see it whole."""
        if not self._map_raised:
            self._map_raised = True
            self.change_job(map_version=self.job.map_version + 1)

    def count(self, counter: str, by: int = 1) -> int:
        """Take `by` numbers from a counter of the job; returns the first."""
        first = int(getattr(self.job, counter))
        self.change_job(**{counter: first + by})
        return first

    def audit(self, kind: str, subject: str, **evidence: object) -> None:
        """Record what was decided and why, in the same transaction."""
        event = self.count("next_event")
        text = json.dumps(evidence, sort_keys=True, default=str)
        self.audited.append((kind, subject, text))
        self.put(EventRow(event, self.wall_ms, self.term, kind, subject, text))
        if event > KEPT_EVENTS:
            self.writes[event_key(event - KEPT_EVENTS)] = None

    def rows(self, cls: type[RowT]) -> list[RowT]:
        """All rows of a class as of this draft, in key order."""
        merged: dict[str, Row | None] = dict(self.state.rows(cls))
        merged.update({k: r for k, r in self.writes.items() if k.startswith(cls.PREFIX)})
        return [row for _, row in sorted(merged.items()) if isinstance(row, cls)]

    def live_servers(self) -> list[ServerRow]:
        """Servers that are neither dead nor gone, by name."""
        return [row for row in self.rows(ServerRow) if row.state is NodeState.LIVE]

    def partition(self, partition: int) -> PartitionRow | None:
        """A partition's row, or None before it exists."""
        key = f"{PartitionRow.PREFIX}{partition:010d}"
        row = self.writes.get(key, self.state.rows(PartitionRow).get(key))
        return row if isinstance(row, PartitionRow) else None

    def host(self, name: str) -> HostRow | None:
        """The newest process of a supervisor."""
        return next((row for row in self.rows(HostRow) if row.name == name), None)

    def client(self, client_id: int) -> ClientRow | None:
        """A client's row, or None if it never was or was forgotten long after its end."""
        return next((row for row in self.rows(ClientRow) if row.client_id == client_id), None)


NODE_STATES = {
    NodeState.LIVE: pb.NODE_STATE_LIVE,
    NodeState.DEAD: pb.NODE_STATE_DEAD,
    NodeState.LEFT: pb.NODE_STATE_LEFT,
}
_PARTITION_STATES = {
    PartitionState.ONLINE: pb.PARTITION_STATE_ONLINE,
    PartitionState.OFFLINE: pb.PARTITION_STATE_OFFLINE,
    PartitionState.RESTORING: pb.PARTITION_STATE_RESTORING,
}


def build_map(state: ClusterState, term: int) -> pb.PartitionMap:
    """The map as everybody sees it."""
    job = state.job
    live = {row.ref for row in state.live_servers()}
    return pb.PartitionMap(
        version=job.map_version,
        job=job.name,
        cluster=job.cluster,
        generation=job.generation,
        term=term,
        nodes=[map_node(row) for _, row in sorted(state.rows(ServerRow).items())],
        tables=[table_entry(row) for _, row in sorted(state.rows(TableRow).items())],
        partitions=[_partition(row, live) for _, row in sorted(state.rows(PartitionRow).items())],
        config=pb.JobConfig(
            start_workers=job.start_workers,
            min_workers=job.min_workers,
            replicas=job.replicas,
            step_timeout_ms=job.step_timeout_ms,
            gather_ms=job.gather_ms,
            push_timeout_ms=job.push_timeout_ms,
            min_isr=job.min_isr,
        ),
    )


def _ref(ref: Ref) -> pb.ReplicaRef:
    return pb.ReplicaRef(node=ref.name, incarnation=ref.incarnation)


def shown_state(row: ServerRow) -> pb.NodeState.ValueType:
    """A server's state as people and processes see it: draining is a way of being live, and so is standing still."""
    if row.state is NodeState.LIVE and row.stalled:
        return pb.NODE_STATE_STALLED
    if row.state is NodeState.LIVE and row.draining:
        return pb.NODE_STATE_DRAINING
    return NODE_STATES[row.state]


def map_node(row: ServerRow) -> pb.Node:
    """A server as the map shows it."""
    return pb.Node(
        ref=_ref(row.ref),
        address=row.address,
        control_address=row.control_address,
        host_id=row.host_id,
        state=shown_state(row),
        reason=row.reason or row.draining,
    )


def table_entry(row: TableRow) -> pb.TableEntry:
    """A table as the map shows it."""
    return pb.TableEntry(
        table_id=row.table_id,
        name=row.name,
        group=row.group,
        first_partition=row.first_partition,
        partition_count=row.partition_count,
        schema_digest=row.digest,
    )


def _partition(row: PartitionRow, live: set[Ref]) -> pb.Partition:
    shown = _PARTITION_STATES[row.state]
    if row.state is PartitionState.ONLINE and sum(ref in live for ref in row.isr) < row.replicas:
        shown = pb.PARTITION_STATE_DEGRADED
    return pb.Partition(
        id=row.partition,
        table_id=row.table_id,
        index=row.index,
        epoch=row.epoch,
        primary=_ref(row.primary),
        isr=[_ref(ref) for ref in row.isr],
        learners=[_ref(ref) for ref in row.learners],
        state=shown,
        version=row.version,
    )
