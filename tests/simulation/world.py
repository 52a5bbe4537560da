"""One seed: a cluster, its clients, what goes wrong, and whether every promise was kept.

outcome = simulate(seed=17)         # raises Failure: what does not hold, and the story
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from paramesh import hyper
from paramesh.errors import ParameshError
from paramesh.framing import checksum
from paramesh.routing import PartitionLayout, cut
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator.config import CoordinatorConfig
from paramesh_coordinator.rows import ClientState, PartitionState
from paramesh_coordinator.store.base import StoreError
from paramesh_coordinator.store.memory import MemoryMedium
from paramesh_server import ledger_service, roles
from paramesh_server import log as log_module
from paramesh_server import partition as partition_module
from paramesh_server.decisions import Decided
from paramesh_server.insync import Ref
from paramesh_server.replica import Role
from paramesh_server.staging import Contribution, FrameBytes, Staging, assemble
from paramesh_server.writes import SlotBytes, SlotFrame

from tests.simulation.checks import Checks
from tests.simulation.clients import AsyncPusher, Client, Owner, Reader
from tests.simulation.coordinator import Coordinator
from tests.simulation.faults import Faults
from tests.simulation.kernel import Kernel, Violation
from tests.simulation.loop import Loop
from tests.simulation.network import Network
from tests.simulation.profile import Profile
from tests.simulation.scenarios import DRAWN, Scenario
from tests.simulation.server import Server
from tests.simulation.slots import Slot
from tests.simulation.workers import Worker

ELEMENTS = 192
"""Of the asynchronous table: one per push."""

GATHER_S = 1.0
"""How long a step waits for a worker between two loaders; 2 s by default."""

PATIENCE_S = 60.0
"""17: after the faults, everything is done within that much of the world's time."""


class Failure(AssertionError):
    """A seed that fails: the message is the whole report."""


def _spec(name: str, elements: int, partition_bytes: int) -> pb.TableSpec:
    return pb.TableSpec(
        name=name,
        group=name,
        tensors=[pb.TensorSpec(name="w", shape=[elements], dtype=pb.DTYPE_FLOAT32)],
        optimizer=pb.OptimizerSpec(class_name="SGD", hyper_parameters=hyper.to_protos({"lr": 1.0})),
        partition_bytes=partition_bytes,
    )


SPECS = (_spec("pushed", ELEMENTS, 4096), _spec("stepped", 256, 512))


@functools.cache
def layouts(table: int) -> tuple[PartitionLayout, ...]:
    """Of a table id."""
    return cut(SPECS[table - 1])


def contribution_of(layout: PartitionLayout, values: numpy.ndarray) -> Contribution:
    """A gradient of all elements, as it would be received."""
    data = values.astype(numpy.float32).tobytes()
    return assemble(layout, b"", [FrameBytes(0, len(data), memoryview(data), checksum((data,)))])


class World:
    """Everything of one seed."""

    specs: Sequence[pb.TableSpec] = SPECS
    async_partition = 1
    sync_partitions = (2, 3)
    floors = True
    """Whether pulls name one."""

    def __init__(self, seed: int, profile: Profile | None = None) -> None:
        self.kernel = Kernel(seed)
        self.rng = self.kernel.rng
        self.profile = profile or Profile.drawn(self.rng)
        self.config = CoordinatorConfig(
            replicas=self.profile.replicas, min_isr=self.profile.min_isr, min_servers=self.profile.servers,
            start_workers=max(1, self.profile.workers), gather=GATHER_S,
        )  # fmt: skip
        self.net = Network(self.kernel, self.rng)
        self.net.latency = self.profile.latency
        self.medium = MemoryMedium()
        self.checks = Checks(self, seed)
        self.servers: dict[Ref, Server] = {}
        self.names = [f"s{i}" for i in range(self.profile.servers)]
        self.elements: dict[tuple[int, int], int] = {}
        self.closed: dict[int, None] = {}
        """Clients that ended or were declared dead."""
        self.begun = False
        self.clients: list[Client] = []
        self.faults = Scenario(self) if self.profile.scenario else Faults(self)
        self.gradients: dict[tuple[int, int, int, int], numpy.ndarray] = {}
        """(client, step, partition, attempt) -> what that worker computed."""
        self._one_hot: dict[tuple[int, int], Contribution] = {}
        self.start_coordinator()
        for name in self.names:
            self.start_server(name)
        self.owner = self.join(Owner(self, "owner"))

    def join(self, client: Client) -> Client:
        """A client's process is there."""
        self.clients.append(client)
        return client

    def ready(self) -> None:
        """Every table has its first values: the others begin, and so do the faults."""
        self.begun = True
        profile = self.profile
        for i in range(profile.pushers):
            pushes, window = self.rng.randint(15, 45), self.rng.choice([1, 3, 5])
            self.join(AsyncPusher(self, f"pusher{i}", pushes, window))
        for i in range(profile.readers):
            self.join(Reader(self, f"reader{i}"))
        for i in range(profile.workers):
            self.join(Worker(self, f"worker{i}"))
        self.faults.start(self.kernel.now + profile.faulty_s)

    # --- processes ---

    def start_coordinator(self) -> None:
        """On whatever the store holds."""
        self.coordinator = self.net.nodes["coordinator"] = Coordinator(self)

    def start_server(self, name: str) -> None:
        """Another incarnation."""
        incarnation = 1 + sum(ref.node == name for ref in self.servers)
        server = Server(self, name, incarnation)
        self.net.nodes[name] = self.servers[server.ref] = server

    def end(self, server: Server, *, told: bool = True, back: float = 0.5) -> None:
        """A server's process ends; its memory is gone."""
        if not server.process.alive:
            return
        self.kernel.kill(server.process)
        self.net.died(server.process)
        if told:
            self.kernel.at(self.rng.uniform(0.01, 0.1), None, self._report, server, 10)
        self.kernel.at(back, None, self.start_server, server.ref.node)

    def _report(self, server: Server, tries: int) -> None:
        """The helper beside the server tells of its end."""
        node = self.coordinator
        if node.process.alive and not self.net.blocked(server.ref.node, "coordinator"):
            self.kernel.at(0.001, node.process, self._tell, node, server.ref)
        elif tries:
            self.kernel.at(0.5, None, self._report, server, tries - 1)

    def _tell(self, node: Coordinator, ref: Ref) -> None:
        self.kernel.spawn(node.process, node.report_exit(ref), "report exit")

    def end_client(self, client_id: int, told: float) -> None:
        """SIGKILL one; the coordinator hears of it so much later, and another worker comes."""
        for client in self.clients[1:]:
            if client.client_id == client_id and client.process.alive and not client.finished:
                self.kernel.note(f"KILL {client.name}, client {client_id}")
                self.kernel.at(told, None, self.declare_dead, client_id)
                self.kernel.kill(client.process)
                self.kernel.at(self.rng.uniform(0.1, 3.0), None, self._replace, client.name)

    def kill_some_client(self) -> None:
        """Of a pusher, the rest of its work is nobody's; in a worker's place another comes."""
        running = [c for c in self.clients[1:] if c.process.alive and not c.finished and c.client_id]
        if not running:
            return
        client = self.rng.choice(running)
        zombie = self.rng.random() < 0.3
        self.kernel.note(f"{'PAUSE' if zombie else 'KILL'} {client.name}, client {client.client_id}")
        self.kernel.at(self.rng.uniform(0.05, 2.0), None, self.declare_dead, client.client_id)
        if zombie:
            self.kernel.pause(client.process)
            self.kernel.at(self.rng.uniform(0.5, 4.0), None, self.kernel.resume, client.process)
            return
        self.kernel.kill(client.process)
        for address, method, request in client.sent:
            if self.rng.random() < 0.3:
                self.net.ghost(client.process, address, method, request, self.rng.uniform(0.0, 4.0))
        if isinstance(client, Worker):
            self.kernel.at(self.rng.uniform(0.1, 3.0), None, self._replace, client.name)

    def _replace(self, name: str) -> None:
        self.join(Worker(self, f"{name}x"))

    def declare_dead(self, client: int) -> None:
        """The coordinator is told until it knows."""
        self.closed[client] = None
        node = self.coordinator
        if node.process.alive and not node.process.paused:
            self.kernel.spawn(node.process, self._tell_gone(node, client), "client gone")
        else:
            self.kernel.at(0.5, None, self.declare_dead, client)

    async def _tell_gone(self, node: Coordinator, client: int) -> None:
        try:
            await node.client_gone(client)
        except ParameshError:
            self.kernel.at(0.5, None, self.declare_dead, client)

    def refuse_commit(self) -> None:
        """The store's disk says no, now and then.

        Raises:
            StoreError: nothing was committed.
        """
        if not self.faults.over and self.rng.random() < self.profile.failing_commits:
            self.kernel.note("the store refuses a commit")
            raise StoreError("no space left")

    def commit_delay(self) -> float:
        """Seconds of half a commit of the store."""
        slow = self.rng.random() < self.profile.slow_commits
        return self.rng.uniform(0.0, 0.5) if slow else self.rng.uniform(0.0002, 0.002)

    # --- tables ---

    def schema(self, table: int) -> tuple[pb.TableSpec, tuple[PartitionLayout, ...]]:
        """Of a table id."""
        return SPECS[table - 1], layouts(table)

    def group_spec(self) -> lg.GroupSpec:
        """What workers declare to the ledger."""
        return lg.GroupSpec(
            name="stepped", mode=lg.MODE_SYNC, loss_reduction=pb.LOSS_REDUCTION_MEAN, structure_digest=b"stepped",
            tensor_names=["w"], partitions=self.sync_partitions,
        )  # fmt: skip

    def layouts_of(self, spec: pb.TableSpec) -> tuple[PartitionLayout, ...]:
        """As `schema`."""
        return layouts(1 + [s.name for s in SPECS].index(spec.name))

    def layout(self, partition: int) -> PartitionLayout:
        """Of a partition."""
        return layouts(1)[0] if partition == self.async_partition else layouts(2)[partition - 2]

    def one_hot(self, client: int, seq: int) -> tuple[int, Contribution]:
        """The element and the gradient of a push: 1 at an element that no other push has."""
        key = (client, seq)
        if key not in self.elements:
            element = self.elements[key] = len(self.elements)
            values = numpy.zeros(ELEMENTS, dtype=numpy.float32)
            values[element] = 1.0
            self._one_hot[key] = contribution_of(self.layout(self.async_partition), values)
        return self.elements[key], self._one_hot[key]

    def first_values(self) -> dict[int, tuple[SlotFrame, ...]]:
        """Partition -> what its first assign writes."""
        found = {}
        for partition in (self.async_partition, *self.sync_partitions):
            nbytes = self.layout(partition).nbytes
            data = self.first_array(partition).tobytes()
            found[partition] = (SlotFrame(FrameBytes(0, nbytes, memoryview(data), checksum((data,))), ""),)
        return found

    def first_array(self, partition: int) -> numpy.ndarray:
        """First values: zeros where pushes are counted, anything where steps are summed."""
        count = self.layout(partition).nbytes // 4
        if partition == self.async_partition:
            return numpy.zeros(count, dtype=numpy.float32)
        return numpy.random.default_rng(partition).standard_normal(count, dtype=numpy.float32)

    def gradient(self, client: int, step: int, partition: int, attempt: int) -> Contribution:
        """What a worker computes; another attempt is other numbers."""
        layout, key = self.layout(partition), (client, step, partition, attempt)
        values = numpy.random.default_rng(key).standard_normal(layout.nbytes // 4, dtype=numpy.float32)
        self.gradients[key] = values
        return contribution_of(layout, values)

    def is_closed(self, client: int) -> bool:
        """Whether the coordinator has declared it dead, or will."""
        row = self.coordinator.state.client(client)
        return client in self.closed or (row is not None and row.state is not ClientState.LIVE)

    def frame_of(self, part: SlotBytes) -> SlotFrame:
        """A copy of a part of a cut, as it travels."""
        data = bytes(part.data)
        return SlotFrame(FrameBytes(part.offset, len(data), memoryview(data), 0), part.slot, part.segment, part.scalar)

    # --- the end ---

    def leader(self, number: int) -> Slot | None:
        """The primary of the store's row, if it serves under that epoch."""
        row = self.checks.rows.get(number)
        server = self.servers.get(Ref(*row.primary)) if row is not None else None
        slot = server.held.get(number) if server is not None and server.process.alive else None
        if slot is None or row is None or row.state is not PartitionState.ONLINE:
            return None
        return slot if slot.replica.serving and slot.replica.machine.epoch == row.epoch else None

    def lost(self) -> bool:
        """Whether a partition has no live member of its in-sync set: nothing is promised then."""
        rows = self.checks.rows.values()
        return any(not self._alive(ref) for row in rows for ref in [None] if not any(map(self._alive, row.isr)))

    def _alive(self, ref: Any) -> bool:
        server = self.servers.get(Ref(*ref)) if ref is not None else None
        return server is not None and server.process.alive

    def looked(self) -> bool:
        """What must hold always does; whether the faults are over."""
        self.checks.always()
        return self.faults.over

    def settled(self) -> bool:
        """Whether all work is done, and every replica has all of it."""
        self.checks.always()
        if not self.faults.over or any(not c.finished and c.process.alive for c in self.clients):
            return False
        return all(self._caught_up(number) for number in self.checks.rows)

    def _caught_up(self, number: int) -> bool:
        slot = self.leader(number)
        if slot is None:
            return False
        row, at = self.checks.rows[number], slot.replica.machine.log.last
        slots = [self.servers[Ref(*ref)].held.get(number) for ref in row.isr if self._alive(ref)]
        full = len(row.isr) >= min(self.profile.replicas, self.profile.servers)
        return full and all(s is not None and s.replica.machine.log.last == at for s in slots)

    def waits_for(self) -> str:
        """Why it is not settled."""
        open_clients = [c.name for c in self.clients if not c.finished and c.process.alive]
        behind = []
        for number, row in self.checks.rows.items():
            if not self._caught_up(number):
                slots = {r.name: self.servers[Ref(*r)].held.get(number) for r in row.holders if self._alive(r)}
                behind.append((row, {n: s and (s.replica.role.value, s.replica.last) for n, s in slots.items()}))
        return f"clients {open_clients}, partitions {behind}"

    def close(self) -> None:
        """End every process."""
        nodes = [*self.net.nodes.values(), *self.servers.values(), *self.clients]
        for process in [*(node.process for node in nodes), self.faults.operator]:
            self.kernel.kill(process)

    def run(self) -> str:
        """Until all is done; what became of it."""
        self.kernel.run(20.0, lambda: self.begun)
        if not self.begun:
            raise Violation("17: the cluster did not form")
        self.kernel.run(self.kernel.now + self.profile.faulty_s + 0.1, self.looked)
        self.kernel.run(self.kernel.now + PATIENCE_S, self.settled)
        if self.lost():
            return "lost"
        if not self.settled():
            raise Violation(f"17: not done {PATIENCE_S:g} s after the faults; waits for {self.waits_for()}")
        self.checks.quiescent()
        return "done"


class _Clock:
    """Stands in for `time` where the real code reads it."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def monotonic(self) -> float:
        return self._kernel.now


@contextlib.contextmanager
def _installed(world: World) -> Iterator[None]:
    """The world's clock and limits, in the modules that have their own."""
    before, level = (roles.time, log_module.KEPT_RECORDS), roles.log.level
    roles.log.setLevel(logging.ERROR)
    ledger_service.log.setLevel(logging.ERROR)
    gather = partition_module.gather

    def gathering(record: pb.StepRecord, partition: int, staging: Staging) -> Decided:
        decided = gather(record, partition, staging)
        world.checks.gathered[partition, record.step] = decided.without
        return decided

    partition_module.gather = gathering  # type: ignore[attr-defined]
    ledger_service.asyncio = Loop(world.kernel)  # type: ignore[assignment]
    roles.time, log_module.KEPT_RECORDS = _Clock(world.kernel), world.profile.kept_records  # type: ignore[assignment]
    try:
        yield
    finally:
        roles.time, log_module.KEPT_RECORDS = before
        roles.log.setLevel(level)
        ledger_service.log.setLevel(level)
        ledger_service.asyncio = asyncio
        partition_module.gather = gather  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Outcome:
    """Of a seed that holds."""

    seed: int
    how: str
    steps: int
    seconds: float
    world: World


def simulate(seed: int, replicas: int = 0, scenario: str = DRAWN, **changes: Any) -> Outcome:
    """Run one seed.

    Args:
        seed: of everything.
        replicas: 2 or 3; 0: as the seed draws it.
        scenario: of `SCENARIOS`, "" for none of them, or as the seed draws it.
        changes: of the profile.

    Raises:
        Failure: an invariant does not hold; the message is its story.
    """
    world = World(seed, Profile.drawn(random.Random(seed), replicas, scenario, **changes))
    try:
        with _installed(world):
            how = world.run()
    except Exception as error:
        raise Failure(_story(seed, replicas, scenario, world, error)) from error
    finally:
        world.close()
    return Outcome(seed, how, world.kernel.steps, world.kernel.now, world)


def _story(seed: int, replicas: int, scenario: str, world: World, error: Exception) -> str:
    again = f"make sim SEED={seed}" + (f" REPLICAS={replicas}" if replicas else "")
    again += f" SCENARIO='{scenario}'" if scenario != DRAWN else ""
    lines = "\n".join(world.kernel.trace)
    return f"seed {seed} fails: {error!r}\n{world.profile}\n{lines}\nreplay: {again}"


__all__ = ["Failure", "Outcome", "Profile", "Role", "World", "simulate"]
