"""A coordinator's brain with a store in memory, and the invariants checked after every decision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from paramesh.routing import cut
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator import catalog, membership, moves, operators, replicas
from paramesh_coordinator.checkers import Silent
from paramesh_coordinator.config import CoordinatorConfig
from paramesh_coordinator.driver import fresh_job
from paramesh_coordinator.replicas import Wish
from paramesh_coordinator.rows import (
    ClientRow,
    ClientState,
    EventRow,
    HostRow,
    JobRow,
    MoveRow,
    NodeState,
    OperationRow,
    PartitionRow,
    PartitionState,
    Ref,
    ServerRow,
    TableRow,
    decode,
    encode,
)
from paramesh_coordinator.state import ClusterState, Draft, Effect, NodeKey, Senses, build_map
from paramesh_coordinator.store import MemoryStore
from paramesh_coordinator.store.memory import MemoryMedium

T = TypeVar("T")

LIMITS = catalog.Limits(table_bytes=1 << 40, partitions=1 << 16)


def table_spec(name: str = "g0/0", elements: int = 1000, partition_bytes: int = 1024) -> pb.TableSpec:
    """A table of one fp32 vector; about `elements * 4 / partition_bytes` partitions."""
    return pb.TableSpec(
        name=name,
        group="g0",
        tensors=[pb.TensorSpec(name="w", shape=[elements], dtype=pb.DTYPE_FLOAT32)],
        optimizer=pb.OptimizerSpec(class_name="SGD"),
        partition_bytes=partition_bytes,
    )


class World:
    """Takes decisions as the driver does, with no clock, thread or socket."""

    def __init__(self, min_servers: int = 1, medium: MemoryMedium | None = None, replicas: int = 1) -> None:
        self.min_servers = min_servers
        self.config = CoordinatorConfig(replicas=replicas)
        self.senses = Senses()
        """What the next decisions know beside the rows."""
        self.medium = medium or MemoryMedium()
        self.restart()
        if self.state.job.map_version == 0:
            self.store.transact({}, {JobRow.PREFIX: encode(self.state.job)})
        self.effects: list[Effect] = []

    def restart(self) -> None:
        """A coordinator that starts on the same store."""
        self.store = MemoryStore(self.medium)
        self.state = ClusterState.load(self.store.scan(""), fresh_job(self.config))

    def do(self, decision: Callable[[Draft], T]) -> T:
        """Decide, commit, apply; check every invariant on the way."""
        draft = Draft(self.state, self.store.term, 0, self.senses)
        result = decision(draft)
        before = _picture(self.state)
        if draft.writes:
            self.store.transact(draft.compare, draft.encoded())
            self.state.apply(draft.writes)
        self.effects = draft.effects
        self._check(before)
        return result

    # --- events, in few words ---

    def server(
        self, name: str, incarnation: int = 1, *, replace: bool = False, gone: bool = False, host: str = "h",
        capacity: int = 0, kind: bytes = b"\x01\xff",
    ) -> None:  # fmt: skip
        hello = ServerRow(name, incarnation, f"{name}:1", f"{name}:2", host, "0", kind, capacity)
        self.do(
            lambda d: membership.register_server(
                d, hello, replace=replace, old_is_gone=gone, min_servers=self.min_servers
            )
        )

    def exit(self, name: str, incarnation: int = 1, code: int = -9) -> None:
        self.do(lambda d: membership.exit_of_server(d, Ref(name, incarnation), code))

    def silent(self, *names: str, incarnation: int = 1) -> None:
        """All of them in one decision."""
        dead = [Silent(NodeKey("server", name, incarnation), 2.1, 2.0) for name in names]
        self.do(lambda d: membership.all_silent(d, dead))

    def leave(self, name: str, incarnation: int = 1) -> None:
        self.do(lambda d: membership.server_left(d, Ref(name, incarnation)))

    def plan(self, *, auto: bool = False) -> int:
        """`auto`: bytes are evened out when servers came or went."""
        return self.do(lambda d: replicas.plan(d, auto=auto))

    def move(self, partition: int, source: str, target: str) -> MoveRow:
        return self.do(lambda d: moves.ask(d, partition, source, target))

    def drain(self, name: str, *, leaving: bool = False) -> moves.Drained:
        return self.do(lambda d: moves.drain(d, name, "a test", leaving=leaving))

    def undrain(self, name: str) -> moves.Drained:
        return self.do(lambda d: moves.undrain(d, name))

    def even_out(self) -> list[MoveRow]:
        return self.do(lambda d: moves.even_out(d, "a test"))

    def catch_up(self) -> None:
        """Every primary asks for its learners."""
        for row in self.partitions():
            if row.learners and row.state is PartitionState.ONLINE:
                assert self.change_isr(row.partition, row.holders)

    def run_moves(self, *, auto: bool = False) -> int:
        """Plan and catch up until nothing is left to do; in how many rounds."""
        for rounds in range(1000):
            changed = self.plan(auto=auto)
            self.catch_up()
            if not changed and not self.state.moves():
                return rounds
        raise AssertionError("moves never end")

    def change_isr(self, partition: int, isr: str | tuple[Ref, ...], **change: Any) -> bool:
        """The primary's wish, as of now but for what `change` says; names mean incarnation 1."""
        row = self.row(partition)
        refs = tuple(Ref(name, 1) for name in isr) if isinstance(isr, str) else isr
        asking = change.pop("asking", row.primary)
        fields = {"partition": partition, "epoch": row.epoch, "version": row.version, "isr": refs, "why": "x"}
        wish = Wish(**fields | change)
        return self.do(lambda d: replicas.change_isr(d, asking, [wish])) == [partition]

    def host(self, name: str, incarnation: int = 1, *, replace: bool = False) -> None:
        self.do(lambda d: membership.register_host(d, HostRow(name, incarnation, "h", 2), replace=replace))

    def client(
        self, slot: str, incarnation: int, host: str = "", host_incarnation: int = 1, role: str = "worker"
    ) -> int:
        hello = membership.ClientHello(incarnation, slot, host, host_incarnation if host else 0, "h", role)
        return self.do(lambda d: membership.register_client(d, hello))

    def table(self, spec: pb.TableSpec | None = None, limits: catalog.Limits = LIMITS) -> TableRow:
        spec = spec or table_spec()
        catalog.admit(spec, limits)
        sizes = [layout.nbytes for layout in cut(spec)]
        return self.do(lambda d: catalog.create_table(d, spec, sizes, limits))

    def confirm_everything(self) -> list[operators.Call]:
        """Let every server confirm every call, until nothing is pending or can be done."""
        made: list[operators.Call] = []
        for _ in range(1000):
            calls = [c for op in self.state.operations() for c in operators.next_calls(op, self.state)]
            for call in calls:
                made.append(call)
                self.do(lambda d, c=call: operators.confirm(d, c))
            for op in self.state.operations():
                if operators.finished(op, self.state):
                    self.do(lambda d, o=op: operators.finish(d, o))
            if not calls:
                return made
        raise AssertionError("operations never end")

    # --- looks ---

    def partitions(self) -> list[PartitionRow]:
        return [row for _, row in sorted(self.state.rows(PartitionRow).items())]

    def row(self, partition: int) -> PartitionRow:
        row = self.state.partition(partition)
        assert row is not None
        return row

    def sets(self, partition: int) -> tuple[str, str]:
        """Names of the in-sync set, the primary first, and of learners."""
        row = self.row(partition)
        return "".join(ref.name for ref in row.isr), "".join(ref.name for ref in row.learners)

    def servers(self) -> dict[Ref, ServerRow]:
        return {row.ref: row for row in self.state.rows(ServerRow).values()}

    def client_row(self, client_id: int) -> ClientRow:
        row = self.state.client(client_id)
        assert row is not None
        return row

    def events(self) -> list[EventRow]:
        return [row for k, v in self.store.scan(EventRow.PREFIX) if isinstance(row := decode(k, v), EventRow)]

    # --- invariants ---

    def _check(self, before: dict[str, Any]) -> None:
        after = _picture(self.state)
        assert ClusterState.load(self.store.scan(""), self.state.job) == self.state, "memory and store part ways"
        live = {row.ref for row in self.state.live_servers()}
        names = [row.name for row in self.state.live_servers()]
        assert len(names) == len(set(names)), "two live processes of one name"
        for row in self.partitions():
            # 22: each partition has exactly one owner or is OFFLINE.
            assert (row.primary in live) == (row.state is PartitionState.ONLINE), row
            assert {row.primary, *row.holders} <= set(self.servers()), "the map must be able to say who and why"
            # 9: nobody outside the in-sync set is primary, and nobody is in it twice.
            assert row.primary in row.isr or row.state is PartitionState.OFFLINE, row
            names = [ref.name for ref in row.holders]
            assert len(names) == len(set(names)), "two replicas on one server"
            assert set(row.learners) <= live, "a learner that is not live"
            assert 0 < row.version <= self.state.job.map_version
        for partition, epoch in _epochs(before).items():
            assert _epochs(after)[partition] >= epoch, "4: epochs only rise"
        assert after["version"] >= before["version"], "the version only rises"
        if before["map"] != after["map"]:
            assert after["version"] > before["version"], "watchers would miss the change"
        for row in self.state.rows(ClientRow).values():
            if row.state is ClientState.LIVE and row.host:
                host = self.state.rows(HostRow)[f"host/{row.host}"]
                assert host.state is NodeState.LIVE, "a client lived on after its host"


def _picture(state: ClusterState) -> dict[str, Any]:
    shown = build_map(state, 0)
    version, shown.version = shown.version, 0
    return {"map": shown, "version": version}


def _epochs(picture: dict[str, Any]) -> dict[int, int]:
    return {row.id: row.epoch for row in picture["map"].partitions}


def pending(world: World) -> list[OperationRow]:
    """Operations not finished."""
    return world.state.operations()
