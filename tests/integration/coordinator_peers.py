"""Peers of a coordinator under test: servers that confirm, nodes that beat. All on one loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from paramesh.channel import SERVER_OPTIONS, aio_channel, grpc, header
from paramesh.errors import ParameshError, refuse
from paramesh.status import from_rpc_error, typed_errors
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.coordinator_pb2_grpc import AdminStub, CatalogStub, MapServiceStub, MembershipStub, ReplicasStub
from paramesh.v1.replication_pb2_grpc import ServerControlServicer, add_ServerControlServicer_to_server
from paramesh_coordinator.config import CoordinatorConfig
from paramesh_coordinator.server import CoordinatorServer
from paramesh_coordinator.store import MemoryStore
from paramesh_coordinator.store.memory import MemoryMedium

POLL_SECONDS = 0.01


async def until(condition: Callable[[], Any], deadline: float, what: str) -> Any:
    """Look at a condition (a function or coroutine function) until it holds."""
    end = asyncio.get_running_loop().time() + deadline
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if asyncio.get_running_loop().time() > end:
            raise AssertionError(f"waited {deadline} s in vain for {what}")
        await asyncio.sleep(POLL_SECONDS)


class Caller:
    """Calls a coordinator with the right header; refusals come as typed errors."""

    def __init__(self, address: str, job: str = "default") -> None:
        self.job = job
        self.channel = aio_channel(address)
        self.membership = MembershipStub(self.channel)
        self.maps = MapServiceStub(self.channel)
        self.catalog = CatalogStub(self.channel)
        self.admin = AdminStub(self.channel)
        self.replicas = ReplicasStub(self.channel)

    async def close(self) -> None:
        await self.channel.close()

    async def call(self, method: Any, request: Any, timeout: float = 5.0) -> Any:
        if not request.request.protocol:
            request.request.CopyFrom(header(self.job, 1))
        try:
            return await method(request, timeout=timeout, wait_for_ready=True)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc) from None

    async def server(self, name: str, incarnation: int, address: str, **more: Any) -> co.RegisterServerResponse:
        more = {"control_address": address} | more
        request = co.RegisterServerRequest(name=name, incarnation=incarnation, address=address, **more)
        return await self.call(self.membership.RegisterServer, request)

    async def host(self, name: str, incarnation: int, **more: Any) -> co.RegisterHostResponse:
        return await self.call(
            self.membership.RegisterHost, co.RegisterHostRequest(name=name, incarnation=incarnation, **more)
        )

    async def client(self, slot: str, incarnation: int, host: str = "", host_incarnation: int = 0) -> int:
        request = co.RegisterClientRequest(
            slot=slot, incarnation=incarnation, host=host, host_incarnation=host_incarnation
        )
        return (await self.call(self.membership.RegisterClient, request)).client_id

    async def exit_of_slot(self, host: str, incarnation: int, slot: str, code: int) -> None:
        request = co.ReportExitRequest(
            kind=co.NODE_KIND_CLIENT, name=host, incarnation=incarnation, slot=slot, exit_code=code
        )
        await self.call(self.membership.ReportExit, request)

    async def exit_of_server(self, name: str, incarnation: int = 1, code: int = -9) -> None:
        request = co.ReportExitRequest(kind=co.NODE_KIND_SERVER, name=name, incarnation=incarnation, exit_code=code)
        await self.call(self.membership.ReportExit, request)

    async def change_isr(self, row: pb.Partition, isr: list[pb.ReplicaRef], why: str = "") -> co.ChangeIsrResponse:
        """What the primary of a row wishes who has seen it as it is given."""
        change = co.IsrChange(partition=row.id, epoch=row.epoch, version=row.version, isr=isr, why=why)
        request = co.ChangeIsrRequest(primary=row.primary, changes=[change])
        return await self.call(self.replicas.ChangeIsr, request)

    async def table(self, spec: pb.TableSpec, timeout: float = 5.0) -> co.CreateTableResponse:
        return await self.call(self.catalog.CreateTable, co.CreateTableRequest(spec=spec), timeout)

    async def map(self) -> pb.PartitionMap:
        return (await self.call(self.maps.GetMap, co.GetMapRequest())).map

    async def partition(self, partition: int) -> pb.Partition:
        return next(row for row in (await self.map()).partitions if row.id == partition)

    async def status(self) -> co.GetStatusResponse:
        return await self.call(self.admin.GetStatus, co.GetStatusRequest())

    async def events(self, after: int = 0, limit: int = 0) -> list[co.Event]:
        answer = await self.call(self.admin.ListEvents, co.ListEventsRequest(after=after, limit=limit))
        return list(answer.events)

    async def kinds(self) -> list[str]:
        return [event.kind for event in await self.events(limit=1000)]


class ControlServer(ServerControlServicer):
    """A server's control port: records what it is told; refuses while `failing`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...], int]] = []
        self.failing: str = ""
        self.answering = asyncio.Event()
        """Not set: an Evict gets no answer."""
        self.answering.set()
        self._server = grpc.aio.server(interceptors=[typed_errors()], options=SERVER_OPTIONS)
        add_ServerControlServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    async def start(self) -> ControlServer:
        await self._server.start()
        return self

    async def stop(self) -> None:
        await self._server.stop(None)

    def _note(self, what: str, clients: tuple[int, ...], term: int) -> None:
        if self.failing:
            raise refuse(self.failing, "as the test wishes")
        self.calls.append((what, clients, term))

    async def Evict(self, request: rp.EvictRequest, context: Any) -> rp.EvictResponse:
        await self.answering.wait()
        self._note("evict", (request.client_id,), request.term)
        return rp.EvictResponse(was_member=True)

    async def Fence(self, request: rp.FenceRequest, context: Any) -> rp.FenceResponse:
        self._note("fence", tuple(request.client_ids), request.term)
        return rp.FenceResponse()


class Heart:
    """Beats as a node does; survives coordinators that go and come.

    Attributes:
        unknown: how often it was told to register anew.
        answers: how many nonces came back.
    """

    def __init__(self, address: str, kind: int, name: str, incarnation: int, interval: float, client_id: int = 0):
        self._channel = aio_channel(address, heartbeat=True)
        self._beat = co.HeartbeatRequest(
            request=header("default", 1, client_id), kind=kind, name=name, incarnation=incarnation
        )
        self._interval = interval
        self.unknown = 0
        self.answers = 0
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """Fall silent."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._channel.close()

    async def _run(self) -> None:
        while True:
            nonce = 0

            async def beats() -> AsyncIterator[co.HeartbeatRequest]:
                for _ in itertools.count():
                    beat = co.HeartbeatRequest()
                    beat.CopyFrom(self._beat)
                    beat.echo = nonce  # noqa: B023 - the newest, on purpose
                    yield beat
                    await asyncio.sleep(self._interval)

            call = MembershipStub(self._channel).Heartbeat(beats())
            try:
                while (answer := await call.read()) is not grpc.aio.EOF:
                    nonce = answer.nonce
                    self.answers += bool(nonce)
                    self.unknown += answer.unknown
            except grpc.RpcError:
                await asyncio.sleep(0.05)
            finally:
                call.cancel()


async def refusal(awaitable: Any) -> str:
    """The reason that a call is refused with."""
    try:
        await awaitable
    except ParameshError as error:
        return error.reason
    raise AssertionError("it was not refused")


BEAT, TIMEOUT = 0.1, 0.6
"""Five times faster than the defaults, and above the 0.16 s at which a tick counts as late."""

FAST: dict[str, Any] = {"heartbeat_interval": BEAT, "failure_timeout": TIMEOUT, "client_timeout": 1.2}


class Scene:
    """A coordinator, a caller, and whatever a test starts; all stopped at its end."""

    def __init__(self, **config: Any) -> None:
        self.config = CoordinatorConfig(**{"bind": "127.0.0.1:0", **FAST, **config})
        self.medium = MemoryMedium()
        self._stops: list[Callable[[], Awaitable[None]]] = []

    async def __aenter__(self) -> Scene:
        self.coordinator = CoordinatorServer(self.config, self._store())
        await self.coordinator.start()
        self.call = Caller(self.coordinator.address)
        return self

    def _store(self) -> MemoryStore | None:
        return None if self.config.state else MemoryStore(self.medium)

    async def __aexit__(self, *_: object) -> None:
        for stop in reversed(self._stops):
            await stop()
        await self.call.close()
        await self.coordinator.stop()

    async def control(self) -> ControlServer:
        server = await ControlServer().start()
        self._stops.append(server.stop)
        return server

    def heart(self, kind: int, name: str, incarnation: int = 1, client_id: int = 0) -> Heart:
        heart = Heart(self.coordinator.address, kind, name, incarnation, BEAT, client_id)
        self._stops.append(heart.stop)
        return heart

    async def server(self, name: str, incarnation: int = 1) -> tuple[ControlServer, Heart]:
        """A registered server that beats."""
        control = await self.control()
        await self.call.server(name, incarnation, control.address)
        return control, self.heart(co.NODE_KIND_SERVER, name, incarnation)

    async def host(self, name: str, incarnation: int = 1) -> Heart:
        await self.call.host(name, incarnation)
        return self.heart(co.NODE_KIND_HOST, name, incarnation)

    async def restart(self) -> None:
        """Stop the coordinator and start it on the same store and port."""
        await self.coordinator.stop()
        config = CoordinatorConfig(**{**vars(self.config), "bind": self.coordinator.address})
        self.coordinator = CoordinatorServer(config, self._store())
        await self.coordinator.start()

    async def client_state(self, client_id: int) -> str:
        return next(c.state for c in (await self.call.status()).clients if c.client_id == client_id)


def play(body: Callable[[Scene], Awaitable[None]], **config: Any) -> None:
    """Run a test's body in a scene of its own."""

    async def run() -> None:
        async with Scene(**config) as scene:
            await body(scene)

    asyncio.run(run())


def spec(name: str = "t") -> pb.TableSpec:
    return pb.TableSpec(
        name=name,
        group="g",
        tensors=[pb.TensorSpec(name="w", shape=[4096], dtype=pb.DTYPE_FLOAT32)],
        optimizer=pb.OptimizerSpec(class_name="SGD"),
        partition_bytes=4096,
    )
