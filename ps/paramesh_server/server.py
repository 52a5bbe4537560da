"""A parameter server, in this process.

    server = ParameterServer(ServerConfig(coordinator="127.0.0.1:7070"))
    await server.start()            # ports open, registered, following the map
    server.address                  # host:port of the data plane
    await server.stop(grace=1.0)

Several of them, a coordinator and clients can live on one event loop; that is how
`paramesh.testing` runs a cluster in one process.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import paramesh
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from paramesh import failpoints
from paramesh.admission import Admission
from paramesh.bounds import Bounds
from paramesh.channel import MAX_REQUEST_BYTES, add_parameter_server, add_port, grpc, header, server_options
from paramesh.coordinator_link import CoordinatorLink
from paramesh.descriptors import connections_within
from paramesh.errors import ConfigError, ParameshError
from paramesh.framing import MAX_MESSAGE_BYTES
from paramesh.gate import Gate
from paramesh.headroom import Headroom
from paramesh.listening import why_not_listen
from paramesh.routing import Routes
from paramesh.status import typed_errors
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb

from paramesh_server.beat import Figures
from paramesh_server.checkpoint_service import CheckpointControl
from paramesh_server.config import ServerConfig, parse_address
from paramesh_server.control import ServerControl
from paramesh_server.counters import Counters
from paramesh_server.cuts import Cuts
from paramesh_server.draining import Draining
from paramesh_server.handover import Handover
from paramesh_server.inbound import Inbound
from paramesh_server.insync import Ref
from paramesh_server.ledger_host import LedgerHost
from paramesh_server.marks import Marks
from paramesh_server.metrics import Seen, serve_metrics
from paramesh_server.outbound import Outbound
from paramesh_server.pace import Pace
from paramesh_server.placement import LEDGER, Placement
from paramesh_server.process import fingerprint, host_id, rss_bytes
from paramesh_server.reads import Reads
from paramesh_server.recovery import Recovery
from paramesh_server.registration import Registration
from paramesh_server.replica import Machine, Role
from paramesh_server.room import Room
from paramesh_server.servicer import DataPlane, PlaneLimits
from paramesh_server.shards import Shards, Slot
from paramesh_server.staging import Budget
from paramesh_server.wishes import Wishes

log = logging.getLogger(__name__)

_DATA_SERVICES = ("paramesh.v1.ParameterServer", "paramesh.v1.Ledger", "paramesh.v1.Recovery")
_CONTROL_SERVICES = (
    "paramesh.v1.ServerControl",
    "paramesh.v1.Replication",
    "paramesh.v1.CheckpointControl",
    "paramesh.v1.Recovery",
)


class ParameterServer:
    """One server process' worth of partitions, on the running event loop.

    Args:
        config: checked settings.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.address = ""
        """host:port of the data plane, as advertised; empty before `start`."""
        self.control_address = ""
        """host:port of the control port, as advertised."""
        self.incarnation = secrets.randbits(63) | 1
        self.counters = Counters()
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="paramesh-compute")
        self._budget = Budget(config.staged_bytes)
        self._admission = Admission(Bounds(config.max_calls, config.max_uploads))
        self._room = Room(Headroom(config.memory_watermark))
        self._cuts = Cuts()
        self._ended: asyncio.Future[None] | None = None
        self._metrics: Any = None

    async def start(self) -> None:
        """Open the ports, register (however long the coordinator takes), follow the map.

        Raises:
            ConfigError: a port cannot be had.
            ParameshError: the coordinator refuses for good: NODE_NAME, ADDRESS,
                WRONG_CLUSTER, VERSION.
        """
        self._ended = asyncio.get_running_loop().create_future()
        self._wire()
        self._serve()
        try:
            # Pays torch's lazy imports while nobody waits, and tells odd machines apart.
            arithmetic = await asyncio.get_running_loop().run_in_executor(self._pool, fingerprint)
            self._registration.introduce(self._hello(arithmetic))
            await self._data.start()
            await self._control.start()
            await self._registration.start()
        except BaseException:
            await self.stop(0)
            raise
        self._link.start_watch()
        self._wishes.start()
        self._marks.start()
        await self._health_serving(True)
        log.info(
            "serving name=%s address=%s control=%s job=%s",
            self.config.name,
            self.address,
            self.control_address,
            self.config.job,
        )

    def _wire(self) -> None:
        """Make the parts and tie them together."""
        config = self.config
        me = pb.ReplicaRef(node=config.name, incarnation=self.incarnation)
        self._link = CoordinatorLink(config.coordinator, config.job, config.security)
        self._shards = Shards(self._pool, lambda p: self._placement.mine(p), lambda: self._placement.refresh())
        self._ledger = LedgerHost(config.job, Ref.of(me), self._pool, lambda: self._shards.fenced, self._room)
        ref = Ref.of(me)
        self._outbound = Outbound(
            config.job, self._generation, ref, lambda: self._shards.routes, Pace(config.copy_rate), config.security
        )
        self._placement = Placement(
            me, config.job, self._link, self._shards, self._ledger, self._budget, self._outbound.sync
        )
        self._handover = Handover(
            config.job, self._generation, ref, lambda: self._shards.routes, self._outbound.channel, self._replica
        )
        self._placement.hand_over = self._handover.deposed
        self._inbound = Inbound(config.job, self._generation, ref, self._replica, self._empty, self.counters)
        self._marks = Marks(self._slots)
        self._wishes = Wishes(config.job, self._generation, ref, self._link, self._slots)
        self._registration = Registration(config, self._link, self._figures, self._end)
        self._link.listeners.append(self._on_map)
        self._plane = DataPlane(
            config.job, self._newest_generation, self._shards, self.counters,
            PlaneLimits(config.in_flight_bytes, config.max_queue, config.max_lag_bytes), self._room,
        )  # fmt: skip
        self._orders = ServerControl(config.job, self._generation, self._plane, self._ledger)
        self._plane.ledger_info = self._ledger.info
        self._placement.on_cut = self._cuts.take
        self._recovery = Recovery(
            config.job, config.coordinator, lambda: self._registration.hello, lambda: self._shards.routes, self._slots,
            lambda: self._placement.schemas, lambda: self._shards.fenced,
            lambda: max(self._orders.term, self._registration.term),
        )  # fmt: skip
        self._checkpoints = CheckpointControl(
            self._orders.check, self._shards, self._ledger, self._placement, self._cuts
        )

    def _slots(self) -> list[Slot]:
        ledger = [self._ledger.slot] if self._ledger.slot is not None else []
        return [*ledger, *self._shards.held.values()]

    async def _replica(self, partition: int) -> Slot | None:
        if partition == LEDGER:
            return self._ledger.slot
        return await self._shards.replica(partition, lambda: self._placement.listed(partition))

    async def _empty(self, partition: int) -> Machine:
        if partition == LEDGER:
            return self._ledger.fresh()
        assert self._shards.routes is not None
        return await self._placement.make(self._shards.routes.partition(partition))

    def _generation(self) -> int:
        return max(self._placement.generation, self._registration.generation)

    def _newest_generation(self) -> int:
        """Also of a map that is not followed yet: what is asked for by the one before is going already."""
        routes = self._shards.routes
        return max(self._generation(), routes.generation if routes is not None else 0)

    def _on_map(self, routes: Routes) -> None:
        self._orders.saw(routes.map.term)
        self._placement.on_map(routes)

    def _serve(self) -> None:
        """Make the two gRPC servers and open their ports."""
        config = self.config
        gate = Gate.of(config.security)
        self._data = self._server(_DATA_SERVICES, gate, MAX_REQUEST_BYTES)
        add_parameter_server(_Both(self._plane, Reads(self._plane, self.counters)), self._data)
        self._ledger.register(self._data)
        self._control: grpc.aio.Server = self._server(_CONTROL_SERVICES, gate)
        self._orders.register(self._control)
        self._inbound.register(self._control)
        self._handover.register(self._control)
        self._checkpoints.register(self._control)
        self._recovery.register(self._data, self._control)
        host = config.advertised_host
        self.address = f"{host}:{self._open(self._data, 'bind', config.bind)}"
        control = config.control_bind or f"{config.host}:0"
        self.control_address = f"{host}:{self._open(self._control, 'control_bind', control)}"
        if config.metrics_port:
            try:
                seen = Seen(self.counters, self._shards, self._budget, self._admission, self._room)
                self._metrics = serve_metrics(config.metrics_host, config.metrics_port, seen)
            except OSError as error:
                raise _port_taken("metrics_port", str(config.metrics_port), error.strerror or str(error)) from error

    def _server(
        self, services: tuple[str, ...], gate: Gate | None, request_bytes: int = MAX_MESSAGE_BYTES
    ) -> grpc.aio.Server:
        connections = connections_within(self.config.max_connections, 2)
        options = server_options(connections, self.config.max_streams, request_bytes)
        lets_in = typed_errors(self._count_refusal, gate, self._admission)
        server = grpc.aio.server(options=options, interceptors=[lets_in])
        checker = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checker, server)
        self._checkers = [*getattr(self, "_checkers", []), (checker, services)]
        if self.config.reflection:
            from grpc_reflection.v1alpha import reflection

            reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _open(self, server: grpc.aio.Server, key: str, bind: str) -> int:
        why = why_not_listen(*parse_address(key, bind))
        if why:
            raise _port_taken(key, bind, why)
        try:
            return add_port(server, bind, self.config.security, self._count_handshake)
        except RuntimeError as error:
            raise _port_taken(key, bind, "somebody else came first") from error

    def _count_handshake(self) -> None:
        self.counters.tls_handshakes += 1

    def _count_refusal(self, reason: str) -> None:
        self.counters.refused[reason] += 1

    async def _health_serving(self, serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if serving else states.NOT_SERVING
        for checker, services in self._checkers:
            for service in ("", *services):
                await checker.set(service, state)

    def _hello(self, arithmetic: bytes) -> co.RegisterServerRequest:
        return co.RegisterServerRequest(
            request=header(self.config.job),
            name=self.config.name,
            incarnation=self.incarnation,
            address=self.address,
            control_address=self.control_address,
            host_id=host_id(),
            version=paramesh.__version__,
            fingerprint=arithmetic,
            capacity_bytes=self.config.capacity_bytes,
            replace=self.config.replace,
        )

    def _figures(self) -> Figures:
        self._cuts.sweep()
        if self._room.tight and (ended := self._admission.end_slow()):
            log.warning("memory tight, ended %d calls whose request was slow to come", ended)
        failpoints.reach("loop")
        now = time.monotonic()
        stalled, number = max(((slot.stalled(now), slot.number) for slot in self._slots()), default=(0.0, 0))
        led = [slot for slot in self._slots() if slot.replica.role is Role.PRIMARY]
        partitions = [held.partition for held in self._shards.held.values()]
        return Figures(
            applied_lsn=sum(p.log.lsn for p in partitions),
            queue_depth=sum(held.queue for held in self._shards.held.values()),
            value_bytes=sum(p.layout.nbytes for p in partitions),
            bytes_in=self.counters.bytes_in,
            bytes_out=self.counters.bytes_out,
            rss_bytes=rss_bytes(),
            stalled_ms=int(stalled * 1000),
            stalled_at=f"partition {number}" if stalled else "",
            memory_tight=self._room.tight,
            loads=tuple((slot.number, slot.requests) for slot in led if slot.requests),
        )

    def _end(self, error: ParameshError) -> None:
        """This process is not wanted any more: `wait` tells."""
        log.error("ended name=%s reason=%s: %s", self.config.name, error.reason, error)
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # seen, even if nobody waits

    async def wait(self) -> None:
        """Wait until the coordinator says that this process is not wanted.

        Raises:
            ParameshError: why.
        """
        assert self._ended is not None, "start first"
        await asyncio.shield(self._ended)

    async def drain(self, timeout: float = 25.0) -> list[int]:
        """Give away what is held here, before `stop`.

        Args:
            timeout: seconds that it may take.

        Returns:
            Partitions that only this process has although they could have gone elsewhere.
        """
        await self._health_serving(False)
        me = pb.ReplicaRef(node=self.config.name, incarnation=self.incarnation)
        return await Draining(me, self.config.job, self._link).run(timeout)

    async def stop(self, grace: float = 1.0) -> None:
        """Say goodbye and stop; calls under way have `grace` seconds."""
        await self._stop(grace, goodbye=True)

    async def kill(self) -> None:
        """Stop as a crash would, for tests: no goodbye, calls under way are cut off."""
        await self._stop(0, goodbye=False)

    async def _stop(self, grace: float, *, goodbye: bool) -> None:
        await self._health_serving(False)
        await self._registration.stop(goodbye=goodbye)
        await asyncio.gather(self._data.stop(grace), self._control.stop(grace))
        await self._wishes.stop()
        await self._marks.stop()
        await self._handover.close()
        await self._outbound.close()
        await self._placement.close()
        await self._checkpoints.close()
        await self._link.close()
        if self._metrics is not None:
            self._metrics.shutdown()
            self._metrics.server_close()
            self._metrics = None
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Both:
    """The writing and the reading half of the data plane as one servicer."""

    def __init__(self, plane: DataPlane, reads: Reads) -> None:
        self.Push, self.Assign = plane.Push, plane.Assign
        self.Norms, self.Inspect = plane.Norms, plane.Inspect
        self.Pull, self.Snapshot = reads.Pull, reads.Snapshot


def _port_taken(key: str, address: str, why: str) -> ConfigError:
    return ConfigError(
        f"{key}: {address} cannot be listened on: {why}; is another process there? (ss -ltnp shows it)",
        metadata={"key": key},
    )
