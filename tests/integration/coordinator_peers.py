"""Peers of a coordinator under test: servers that confirm, nodes that beat. All on one loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

from paramesh.channel import SERVER_OPTIONS, aio_channel, grpc, header
from paramesh.errors import ParameshError, refuse
from paramesh.status import from_rpc_error, typed_errors
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.coordinator_pb2_grpc import AdminStub, CatalogStub, MapServiceStub, MembershipStub
from paramesh.v1.replication_pb2_grpc import ServerControlServicer, add_ServerControlServicer_to_server

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

    async def table(self, spec: pb.TableSpec, timeout: float = 5.0) -> co.CreateTableResponse:
        return await self.call(self.catalog.CreateTable, co.CreateTableRequest(spec=spec), timeout)

    async def map(self) -> pb.PartitionMap:
        return (await self.call(self.maps.GetMap, co.GetMapRequest())).map

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
