"""A lost store made anew from what servers know. Pure: testimony in, rows or problems out.

    rebuilt = rebuild(testimony, Choices(), wall_ms)
    rebuilt.problems                     # what is missing and what to do; nothing is written then
    rebuilt.rows, rebuilt.term           # what a new store is to hold

Every server follows the whole map, so the newest map among those that answer is the state of the
cluster as of the last decision that any of them acted upon. What was decided later was acted upon
by nobody but servers that do not answer: that is why each of those must be accounted for.
Counters leap, so that nothing decided from here on is taken for something decided before.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from paramesh.routing import cut, schema_digest
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import recovery_pb2 as rc
from paramesh.v1 import types_pb2 as pb

from paramesh_coordinator.membership import UNKNOWN_EXIT, exit_of_server
from paramesh_coordinator.operators import LEDGER
from paramesh_coordinator.replicas import promote_with_loss
from paramesh_coordinator.rows import (
    ClientRow,
    JobRow,
    NodeState,
    OperationRow,
    PartitionRow,
    PartitionState,
    Ref,
    Row,
    ServerRow,
    Stage,
    TableRow,
)
from paramesh_coordinator.state import ClusterState, Draft

__all__ = ["LEAP", "Choices", "Rebuilt", "rebuild"]

LEAP = 1_000_000
"""How far terms, map versions, epochs and client ids go on above the highest that was told of: above all
that a coordinator can have decided, or a client can have been given, without any server knowing."""

_DRAINING = (pb.NODE_STATE_DRAINING, pb.NODE_STATE_STALLED)
_ENDED = {pb.NODE_STATE_DEAD: NodeState.DEAD, pb.NODE_STATE_LEFT: NodeState.LEFT}


@dataclass(frozen=True)
class Choices:
    """What only a person can know, or may decide."""

    without: frozenset[str] = frozenset()
    """Servers that do not answer and have certainly ended, none later than the coordinator."""
    accept_loss: bool = False
    """Go on with incomplete copies, or without what nobody has."""


@dataclass
class Rebuilt:
    """What came of it.

    Attributes:
        rows: of the new store, by key; empty if there are problems.
        term: that the new store's must be above.
        problems: why it cannot be made, each with its remedy.
        base: the map that it was made of; None if nobody has one.
        answered: servers of the map that answered.
        promoted: partitions whose primary is another server than before.
        lossy: partitions that go on with an incomplete copy.
        offline: partitions that wait for a server to be heard again, or for ever.
        dropped: names of tables that nobody knows the schema of.
        clients: live ones.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    term: int = 0
    problems: list[str] = field(default_factory=list)
    base: pb.PartitionMap | None = None
    answered: list[str] = field(default_factory=list)
    promoted: list[int] = field(default_factory=list)
    lossy: list[int] = field(default_factory=list)
    offline: list[int] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    clients: list[int] = field(default_factory=list)


def rebuild(testimony: Sequence[rc.TestifyResponse], choices: Choices, wall_ms: int) -> Rebuilt:
    """Make the rows of a new store.

    Args:
        testimony: one of each process that answered.
        choices: the operator's.
        wall_ms: for the audit line.

    Returns:
        Rows and term; or, if `problems` is not empty, none.
    """
    done = Rebuilt()
    maps = [said.map for said in testimony if said.map.partitions]
    if not maps:
        done.problems.append(
            "no server that answers follows a map with partitions: give the address of one that does with --server; "
            "if all were started anew, nothing is left of the job but its checkpoints"
        )
        return done
    clusters = {one.cluster for one in maps}
    if len(clusters) > 1:
        names = ", ".join(f"{said.server.name}: {said.map.cluster}" for said in testimony if said.map.partitions)
        done.problems.append(f"the servers are of different clusters ({names}): give the addresses of one")
        return done
    done.base = max(maps, key=lambda one: one.version)
    _Rebuilder(testimony, choices, done, done.base, wall_ms).run()
    if done.problems:
        done.rows = {}
    return done


class _Rebuilder:
    """One attempt."""

    def __init__(
        self,
        testimony: Sequence[rc.TestifyResponse],
        choices: Choices,
        done: Rebuilt,
        base: pb.PartitionMap,
        wall_ms: int,
    ) -> None:
        self._said = {_ref(said.server): said for said in testimony}
        self._choices = choices
        self._done = done
        self._base = base
        self._wall_ms = wall_ms
        self._nodes = {Ref(node.ref.node, node.ref.incarnation): node for node in base.nodes}
        self._held = _held(base.partitions)
        self._copies: dict[int, dict[Ref, rc.ReplicaReport]] = defaultdict(dict)
        for ref, said in self._said.items():
            for copy in said.replicas:
                self._copies[copy.partition][ref] = copy
        self._specs = {known.table_id: known.spec for said in testimony for known in said.tables}
        self._ended: list[Ref] = []
        """Live in the map, and certainly not any more."""

    def run(self) -> None:
        servers = self._servers()
        tables = self._tables()
        parts = self._partitions({row.table_id for row in tables})
        job = self._job()
        state = ClusterState(job)
        clients = self._clients()
        state.apply({row.key: row for row in (*servers, *tables, *parts, *clients)})
        done = self._done
        done.term = max([self._base.term, *(said.term for said in self._said.values())]) + LEAP
        done.answered = sorted(ref.name for ref in self._said if ref in self._nodes)
        if done.problems:
            return
        draft = Draft(state, done.term, self._wall_ms)
        self._judge(draft)
        draft.audit(
            "state_rebuilt", job.name, map_version=self._base.version, answered=done.answered,
            without=sorted(str(ref) for ref in self._ended), promoted=done.promoted, lossy=done.lossy,
            offline=done.offline, dropped=done.dropped, accept_loss=self._choices.accept_loss,
        )  # fmt: skip
        rows: dict[str, Row | None] = {row.key: row for row in (job, *servers, *tables, *parts, *clients)}
        rows |= draft.writes
        done.rows = {key: row for key, row in rows.items() if row is not None}

    # Servers.

    def _servers(self) -> list[ServerRow]:
        names = {ref.name for ref in self._nodes}
        for name in sorted(self._choices.without - names):
            self._problem(f"--without {name}: no server of that name is in the map; it has {', '.join(sorted(names))}")
        rows = [self._server(ref, node) for ref, node in self._nodes.items()]
        # Rows name processes that the map has forgotten only if the map is damaged; it must load all the same.
        rows += [_gone(ref) for ref in self._held if ref not in self._nodes]
        return rows

    def _server(self, ref: Ref, node: pb.Node) -> ServerRow:
        ended = _ENDED.get(node.state)
        said = self._said.get(ref)
        row = ServerRow(
            ref.name, ref.incarnation, node.address, node.control_address, node.host_id, "", b"", 0,
            state=ended or NodeState.LIVE, reason=node.reason if ended else "", certain=ended is NodeState.LEFT,
            draining=node.reason if node.state in _DRAINING else "",
        )  # fmt: skip
        if said is not None:
            if ref.name in self._choices.without:
                self._problem(f"--without {ref.name}: it answers at {node.control_address}; end it, or leave that out")
            hello = said.server
            row = dataclasses.replace(
                row, version=hello.version, fingerprint=hello.fingerprint, capacity_bytes=hello.capacity_bytes
            )
        elif ended is None:
            row = self._absent(ref, node, row)
        return row

    def _absent(self, ref: Ref, node: pb.Node, row: ServerRow) -> ServerRow:
        """Live in the map, and silent: what it knew and did since must be no riddle."""
        succeeded = any(other.name == ref.name and other != ref for other in self._said)
        if ref.name in self._choices.without or succeeded:
            self._ended.append(ref)
            return row
        held = self._held.get(ref, [])
        if held:
            self._problem(
                f"server {ref.name} does not answer at {node.control_address}, and has copies of {_numbers(held)}. If "
                "it runs, make it reachable, or give its address with --server. If it has ended, and no later than "
                f"the coordinator did, say --without {ref.name}"
            )
        return dataclasses.replace(row, state=NodeState.DEAD, reason="did not answer when the state was made anew")

    # Tables and partitions.

    def _tables(self) -> list[TableRow]:
        rows = []
        for entry in self._base.tables:
            spec = self._specs.get(entry.table_id)
            if spec is None or schema_digest(spec) != entry.schema_digest:
                self._lost_table(entry)
                continue
            rows.append(
                TableRow(
                    entry.table_id, entry.name, entry.group, entry.first_partition, entry.partition_count,
                    entry.schema_digest, spec.SerializeToString(deterministic=True),
                )
            )  # fmt: skip
        return rows

    def _lost_table(self, entry: pb.TableEntry) -> None:
        if self._choices.accept_loss:
            self._done.dropped.append(entry.name)
        else:
            self._problem(
                f"no server that answers knows the schema of table {entry.name!r}: bring back one that holds a "
                "partition of it; --accept-loss goes on without the table"
            )

    def _partitions(self, tables: set[int]) -> list[PartitionRow]:
        layouts = {table: cut(self._specs[table]) for table in tables}
        rows = []
        for part in self._base.partitions:
            if part.id != LEDGER and part.table_id not in tables:
                continue
            if part.state == pb.PARTITION_STATE_RESTORING:
                self._problem(
                    f"partition {part.id} was being loaded from a checkpoint, and which one is lost with the state: "
                    "end the servers, and start anew with ps-coordinator --restore"
                )
            wanted = self._base.config.replicas if part.id == LEDGER else self._specs[part.table_id].replicas
            nbytes = 0 if part.id == LEDGER else layouts[part.table_id][part.index].nbytes
            rows.append(self._partition(part, wanted or self._base.config.replicas or 1, nbytes))
        return rows

    def _partition(self, part: pb.Partition, replicas: int, nbytes: int) -> PartitionRow:
        copies = self._copies[part.id]
        highest = max((copy.promised for copy in copies.values()), default=0)
        if highest > part.epoch and not self._choices.accept_loss:
            who = ", ".join(ref.name for ref, copy in copies.items() if copy.promised > part.epoch)
            self._problem(
                f"{who} heard of epoch {highest} of partition {part.id}, and no server that answers knows who leads it "
                f"under that one (the newest map has {part.epoch}): bring back the others; --accept-loss goes on with "
                f"{part.primary.node}"
            )
        return PartitionRow(
            part.id, part.table_id, part.index, nbytes, part.primary.node, part.primary.incarnation,
            epoch=max(part.epoch, highest) + LEAP,
            state=PartitionState.OFFLINE if part.state == pb.PARTITION_STATE_OFFLINE else PartitionState.ONLINE,
            isr=tuple(Ref(r.node, r.incarnation) for r in part.isr),
            learners=tuple(Ref(r.node, r.incarnation) for r in part.learners),
            replicas=replicas, version=self._base.version + LEAP,
        )  # fmt: skip

    # Job and clients.

    def _job(self) -> JobRow:
        base, config = self._base, self._base.config
        clients = [known.client_id for said in self._said.values() for known in said.clients]
        fenced = [client for said in self._said.values() for client in (*said.fenced, said.fenced_through)]
        return JobRow(
            base.job, config.start_workers, config.min_workers, config.replicas, config.gather_ms,
            config.step_timeout_ms, config.push_timeout_ms, config.min_isr,
            generation=base.generation, map_version=base.version + LEAP, cluster=base.cluster,
            next_client=max([0, *clients, *fenced]) + LEAP,
            next_table=max([0, *(table.table_id for table in base.tables)]) + 1,
            next_partition=max(part.id for part in base.partitions) + 1,
            next_operation=2, unsettled=True,
        )  # fmt: skip

    def _clients(self) -> list[ClientRow | OperationRow]:
        """Whoever is remembered and not forbidden lives until its silence says otherwise.

        Which supervisor beats for a member is not known at a server: supervisors come back within
        two beats and claim the slots that are theirs (`membership.register_host`).
        """
        fenced = {client for said in self._said.values() for client in said.fenced}
        through = max([0, *(said.fenced_through for said in self._said.values())])
        slots: dict[int, str] = {}
        for said in self._said.values():
            for known in said.clients:
                if known.client_id not in fenced and known.client_id > through:
                    slots[known.client_id] = known.slot if known.member else slots.get(known.client_id, "")
        self._done.clients = sorted(slots)
        rows: list[ClientRow | OperationRow] = [
            ClientRow(client, 0, slot or f"client/{client}", "", 0, "", "worker" if slot else "tool")
            for client, slot in sorted(slots.items())
        ]
        if fenced:  # a FENCE that some servers had not heard is not to be lost with the store
            rows.append(OperationRow(1, Stage.FENCE, tuple(sorted(fenced)), "fenced before the state was lost"))
        return rows

    # Who leads.

    def _judge(self, draft: Draft) -> None:
        before = {part.partition: part for part in draft.rows(PartitionRow)}
        for ref in self._ended:
            exit_of_server(draft, ref, UNKNOWN_EXIT)
        done = self._done
        for part in draft.rows(PartitionRow):
            if part.state is PartitionState.ONLINE:
                if part.primary != before[part.partition].primary:
                    done.promoted.append(part.partition)
                continue
            if before[part.partition].state is PartitionState.ONLINE:
                self._lost(draft, part)
            now = draft.partition(part.partition)
            if now is not None and now.state is PartitionState.OFFLINE:
                done.offline.append(part.partition)

    def _lost(self, draft: Draft, part: PartitionRow) -> None:
        """Every in-sync copy is gone: an incomplete one, if a person says so."""
        copies = self._copies[part.partition]
        live = {row.ref for row in draft.live_servers()}
        there = [ref for ref in part.learners if ref in copies and ref in live]
        if not self._choices.accept_loss:
            rest = f"; {', '.join(r.name for r in there)} has an incomplete copy" if there else "; nobody has a copy"
            self._problem(
                f"partition {part.partition} is lost with {', '.join(ref.name for ref in part.isr)}{rest}. "
                "--accept-loss goes on with what is there; or end all and start anew from a checkpoint"
            )
        elif there:
            best = max(there, key=lambda ref: (copies[ref].last_epoch, copies[ref].last_lsn, ref.name))
            promote_with_loss(draft, part.partition, best.name)
            self._done.lossy.append(part.partition)

    def _problem(self, text: str) -> None:
        if text not in self._done.problems:
            self._done.problems.append(text)


def _ref(server: co.RegisterServerRequest) -> Ref:
    return Ref(server.name, server.incarnation)


def _gone(ref: Ref) -> ServerRow:
    return ServerRow(
        ref.name, ref.incarnation, "", "", "", "", b"", 0, state=NodeState.DEAD, reason="the map had forgotten it"
    )


def _held(parts: Iterable[pb.Partition]) -> dict[Ref, list[int]]:
    """Who holds which partitions, complete or not."""
    held: dict[Ref, list[int]] = defaultdict(list)
    for part in parts:
        for ref in {Ref(r.node, r.incarnation) for r in (part.primary, *part.isr, *part.learners)}:
            held[ref].append(part.id)
    return held


def _numbers(partitions: Sequence[int]) -> str:
    shown = ", ".join(map(str, partitions[:8])) + (", ..." if len(partitions) > 8 else "")
    return f"partition{'s' if len(partitions) != 1 else ''} {shown}"
