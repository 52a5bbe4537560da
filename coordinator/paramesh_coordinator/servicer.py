"""The coordinator's services but for people's: from messages to decisions and back.

Each method checks the header, asks the driver for a decision and builds the answer. Rules
live in `membership`, `catalog` and `replicas`; a refusal raised there leaves by `paramesh.status`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

from paramesh.channel import check_header, grpc
from paramesh.errors import ParameshError, refuse
from paramesh.gate import caller
from paramesh.listening import is_local_peer
from paramesh.routing import cut
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.coordinator_pb2_grpc import (
    CatalogServicer,
    MapServiceServicer,
    MembershipServicer,
    ReplicasServicer,
)

from paramesh_coordinator import catalog, membership, replicas
from paramesh_coordinator.autopsy import Autopsies
from paramesh_coordinator.dialling import check_address, is_gone
from paramesh_coordinator.driver import Driver
from paramesh_coordinator.rows import ClientState, HostRow, Ref, ServerRow, TableRow
from paramesh_coordinator.state import NodeKey, table_entry

__all__ = ["CatalogService", "MapService", "MembershipService", "ReplicasService", "check"]

REPEAT_SECONDS = 10.0
"""A watcher that hears nothing for longer knows that its stream is dead."""

ANSWER_SECONDS = 0.5
"""Kept of a caller's deadline for the refusal itself, so that it learns what it waited for."""

WAIT_SECONDS = 30.0
"""How long a call without a deadline waits for servers."""

Context: TypeAlias = grpc.aio.ServicerContext


def check(driver: Driver, request: pb.RequestHeader, *, registering: bool = False) -> None:
    """Refuse a request of another protocol, job or generation, or of a closed client.

    Raises:
        StateRefused: VERSION, WRONG_CLUSTER, OLD_GENERATION, CLIENT_FENCED.
        RequestRefused: MISSING_FIELD.
    """
    job = driver.state.job
    check_header(request, job.name, job.generation, allow_no_generation=registering)
    if driver.deposed.done():
        raise driver.deposed.result()
    row = driver.state.client(request.client_id) if request.client_id else None
    if row is not None and row.state is ClientState.EVICTED:
        raise refuse("CLIENT_FENCED", f"client {row.client_id} was evicted: {row.reason}", client_id=row.client_id)


class MembershipService(MembershipServicer):
    """Who comes, beats and goes."""

    def __init__(self, driver: Driver):
        self._driver = driver
        self._autopsies = Autopsies(driver)

    def _terms(self) -> dict[str, Any]:
        """What every registration is told."""
        config = self._driver.config
        return {
            "term": self._driver.term,
            "generation": self._driver.state.job.generation,
            "heartbeat_interval_ms": round(config.heartbeat_interval * 1000),
            "failure_timeout_ms": round(config.failure_timeout * 1000),
        }

    async def RegisterServer(self, request: co.RegisterServerRequest, context: Context) -> co.RegisterServerResponse:
        """Dial back, then decide."""
        check(self._driver, request.request, registering=True)
        membership.check_incarnation(request.incarnation, f"server {request.name[:80]!r}")
        if request.cluster not in ("", self._driver.state.job.cluster):
            raise self._driver.meet_stranger(request.name[:80], request.cluster[:80], request.address[:80])
        hello = ServerRow(
            request.name, request.incarnation, request.address, request.control_address, request.host_id,
            request.version, request.fingerprint, request.capacity_bytes,
        )  # fmt: skip
        rivals = [row for row in self._driver.state.live_servers() if row.name == hello.name]
        old_is_gone = False
        if not any(row.ref == hello.ref for row in rivals):
            await check_address(hello.address, "address", context.peer())
            await check_address(hello.control_address, "control_address", context.peer())
            # A port has one owner, so whoever advertises the old one's address replaced it.
            old_is_gone = bool(rivals) and (rivals[0].address == hello.address or await is_gone(rivals[0].address))
        await self._driver.decide(
            lambda draft: membership.register_server(
                draft,
                hello,
                replace=request.replace,
                old_is_gone=old_is_gone,
                min_servers=self._driver.config.min_servers,
            )
        )
        return co.RegisterServerResponse(**self._terms())

    async def RegisterHost(self, request: co.RegisterHostRequest, context: Context) -> co.RegisterHostResponse:
        """Decide."""
        request.request.generation = 0  # a supervisor lives on through a restore
        check(self._driver, request.request, registering=True)
        hello = HostRow(request.name, request.incarnation, request.host_id, request.slots)
        await self._driver.decide(lambda draft: membership.register_host(draft, hello, replace=request.replace))
        return co.RegisterHostResponse(**self._terms())

    async def RegisterClient(self, request: co.RegisterClientRequest, context: Context) -> co.RegisterClientResponse:
        """Decide; the answer brings the map along."""
        check(self._driver, request.request, registering=True)
        hello = membership.ClientHello(
            request.incarnation, request.slot, request.host, request.host_incarnation, request.host_id,
            request.role or "worker",
        )  # fmt: skip
        owner, most = caller(), self._driver.config.max_clients
        self._driver.tight.check("no client is registered")
        client_id = await self._driver.decide(lambda draft: membership.register_client(draft, hello, owner, most))
        return co.RegisterClientResponse(client_id=client_id, map=self._driver.feed.current, **self._terms())

    async def Heartbeat(
        self, requests: AsyncIterator[co.HeartbeatRequest], context: Context
    ) -> AsyncIterator[co.HeartbeatResponse]:
        """Answer every beat with a new nonce; tell who is not registered."""
        remote = not is_local_peer(context.peer())
        last: NodeKey | None = None
        try:
            async for beat in requests:
                job = self._driver.state.job
                check_header(beat.request, job.name, 0)  # servers and supervisors live on through a restore
                last = self._who(beat)
                nonce = self._driver.beat(last, beat, remote=remote)
                yield co.HeartbeatResponse(
                    nonce=nonce or 0,
                    term=self._driver.term,
                    map_version=self._driver.feed.current.version,
                    unknown=nonce is None and not self._is_supervised(beat),
                )
        finally:
            if last is not None and last.kind == "server":
                self._autopsies.start(Ref(last.name, last.incarnation))

    def _who(self, beat: co.HeartbeatRequest) -> NodeKey:
        if beat.kind == co.NODE_KIND_SERVER:
            return NodeKey("server", beat.name, beat.incarnation)
        if beat.kind == co.NODE_KIND_HOST:
            return NodeKey("host", beat.name, beat.incarnation)
        if beat.kind == co.NODE_KIND_CLIENT:
            return NodeKey.client(beat.request.client_id)
        raise _no_kind(beat.kind)

    def _is_supervised(self, beat: co.HeartbeatRequest) -> bool:
        """A live client whose host beats for it needs no beats, and is not unknown either."""
        row = self._driver.state.client(beat.request.client_id)
        return beat.kind == co.NODE_KIND_CLIENT and row is not None and row.state is ClientState.LIVE

    async def ReportExit(self, request: co.ReportExitRequest, context: Context) -> co.ReportExitResponse:
        """Positive death, at once."""
        check_header(request.request, self._driver.state.job.name, 0)  # whatever was restored since
        ref, code = Ref(request.name, request.incarnation), request.exit_code
        if request.kind == co.NODE_KIND_SERVER:
            await self._driver.decide(lambda draft: membership.exit_of_server(draft, ref, code))
        elif request.kind == co.NODE_KIND_HOST:
            await self._driver.decide(lambda draft: membership.exit_of_host(draft, ref, code))
        elif request.kind == co.NODE_KIND_CLIENT:
            await self._driver.decide(lambda draft: membership.exit_of_slot(draft, ref, request.slot, code))
        else:
            raise _no_kind(request.kind)
        return co.ReportExitResponse()

    async def Deregister(self, request: co.DeregisterRequest, context: Context) -> co.DeregisterResponse:
        """A goodbye."""
        job = self._driver.state.job
        check_header(request.request, job.name, 0)
        ref, client_id = Ref(request.name, request.incarnation), request.request.client_id
        if request.kind == co.NODE_KIND_SERVER:
            await self._driver.decide(lambda draft: membership.server_left(draft, ref))
        elif request.kind == co.NODE_KIND_HOST:
            await self._driver.decide(lambda draft: membership.host_left(draft, ref))
        elif request.kind == co.NODE_KIND_CLIENT:
            await self._driver.decide(lambda draft: membership.client_left(draft, client_id))
        else:
            raise _no_kind(request.kind)
        return co.DeregisterResponse()


def _no_kind(kind: int) -> ParameshError:
    return refuse("MISSING_FIELD", f"kind {kind} is neither SERVER, HOST nor CLIENT")


class MapService(MapServiceServicer):
    """Where partitions are."""

    def __init__(self, driver: Driver):
        self._driver = driver

    async def GetMap(self, request: co.GetMapRequest, context: Context) -> co.GetMapResponse:
        """The current map."""
        check(self._driver, request.request, registering=True)
        return co.GetMapResponse(map=self._driver.feed.current)

    async def WatchMap(self, request: co.WatchMapRequest, context: Context) -> AsyncIterator[co.WatchMapResponse]:
        """Each newest map whole, and a repeat when it is quiet."""
        check(self._driver, request.request, registering=True)
        sent = request.version
        while True:
            newer = await self._driver.feed.newer(sent, REPEAT_SECONDS)
            current = newer or self._driver.feed.current
            yield co.WatchMapResponse(map=current)
            sent = current.version


class CatalogService(CatalogServicer):
    """Schemas."""

    def __init__(self, driver: Driver):
        self._driver = driver
        config = driver.config
        self._limits = catalog.Limits(config.max_table_bytes, config.max_partitions, config.max_tables)

    async def CreateTable(self, request: co.CreateTableRequest, context: Context) -> co.CreateTableResponse:
        """Admit, cut, place; waits for servers up to the caller's deadline."""
        check(self._driver, request.request)
        spec = request.spec
        # Off the loop: a schema may have a million tensors, and beats must be answered.
        await asyncio.to_thread(catalog.admit, spec, self._limits)
        row = catalog.find_table(list(self._driver.state.rows(TableRow).values()), spec)
        if row is None:
            self._driver.tight.check(f"table {spec.name!r} is new")
            layouts = await asyncio.to_thread(cut, spec)
            row = await self._create(spec, [layout.nbytes for layout in layouts], context)
        return co.CreateTableResponse(table_id=row.table_id, map=self._driver.feed.current)

    async def _create(self, spec: pb.TableSpec, sizes: list[int], context: Context) -> TableRow:
        clock = asyncio.get_running_loop().time
        left = context.time_remaining()
        deadline = clock() + (WAIT_SECONDS if left is None else left - ANSWER_SECONDS)
        while True:
            version = self._driver.feed.current.version
            try:
                return await self._driver.decide(
                    lambda draft: catalog.create_table(draft, spec, sizes, self._limits, self._driver.tight.servers)
                )
            except ParameshError as error:
                remaining = deadline - clock()
                if error.reason != "NOT_READY" or remaining <= 0:
                    raise
                await self._driver.feed.newer(version, remaining)

    async def DescribeTable(self, request: co.DescribeTableRequest, context: Context) -> co.DescribeTableResponse:
        """One schema."""
        check(self._driver, request.request)
        row, spec = catalog.table_spec(self._driver.state, request.table_id)
        return co.DescribeTableResponse(entry=table_entry(row), spec=spec)


class ReplicasService(ReplicasServicer):
    """In-sync sets."""

    def __init__(self, driver: Driver):
        self._driver = driver

    async def ChangeIsr(self, request: co.ChangeIsrRequest, context: Context) -> co.ChangeIsrResponse:
        """Decide all wishes in one transaction; the map says what came of each."""
        check(self._driver, request.request)
        asking = _ref(request.primary)
        wishes = [
            replicas.Wish(c.partition, c.epoch, c.version, tuple(map(_ref, c.isr)), c.why) for c in request.changes
        ]
        done = await self._driver.decide(lambda draft: replicas.change_isr(draft, asking, wishes))
        return co.ChangeIsrResponse(done=done, map=self._driver.feed.current)

    async def ReportLoss(self, request: co.ReportLossRequest, context: Context) -> co.ReportLossResponse:
        """Write down what was lost; it is told once."""
        check(self._driver, request.request)
        losses = {loss.partition: loss.total for loss in request.losses}
        asking = _ref(request.primary)
        await self._driver.decide(lambda draft: replicas.note_losses(draft, asking, losses))
        return co.ReportLossResponse()


def _ref(ref: pb.ReplicaRef) -> Ref:
    return Ref(ref.node, ref.incarnation)
