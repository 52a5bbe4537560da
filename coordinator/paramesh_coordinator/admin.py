"""What people ask: the Admin service behind psctl."""

from __future__ import annotations

import asyncio
from collections import Counter

from paramesh.channel import grpc
from paramesh.errors import refuse
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.coordinator_pb2_grpc import AdminServicer

from paramesh_coordinator import moves, operators, replicas
from paramesh_coordinator.driver import Driver
from paramesh_coordinator.rows import (
    ClientRow,
    EventRow,
    HostRow,
    MoveRow,
    MoveStage,
    NodeState,
    PartitionRow,
    PartitionState,
    Ref,
    ServerRow,
    decode,
    event_key,
)
from paramesh_coordinator.servicer import check
from paramesh_coordinator.state import NODE_STATES, NodeKey, map_node

__all__ = ["AdminService"]

MOST_EVENTS = 1000
"""Of one answer: some 300 KB."""

_STAGES = {
    MoveStage.WANTED: co.MOVE_STAGE_WANTED,
    MoveStage.COPYING: co.MOVE_STAGE_COPYING,
    MoveStage.DONE: co.MOVE_STAGE_DONE,
    MoveStage.CANCELLED: co.MOVE_STAGE_CANCELLED,
}


class AdminService(AdminServicer):
    """Status, audit lines, and what only a human may decide."""

    def __init__(self, driver: Driver):
        self._driver = driver

    async def GetStatus(self, request: co.GetStatusRequest, context: grpc.aio.ServicerContext) -> co.GetStatusResponse:
        """Everything that the coordinator knows, at one version of the map."""
        check(self._driver, request.request, registering=True)
        state = self._driver.state
        return co.GetStatusResponse(
            map=self._driver.feed.current,
            servers=self._servers(),
            hosts=[self._host(row) for _, row in sorted(state.rows(HostRow).items())],
            clients=[_client(row) for _, row in sorted(state.rows(ClientRow).items())],
            uptime_ms=round((self._driver.clock() - self._driver.started) * 1000),
            pending=[
                *(operators.describe(row, state) for row in state.operations()),
                *(moves.describe(row) for row in state.moves()),
            ],
        )

    def _servers(self) -> list[co.ServerStatus]:
        parts = self._driver.state.rows(PartitionRow).values()
        online = Counter(p.primary for p in parts if p.state is PartitionState.ONLINE)
        held = Counter(ref for p in parts for ref in {p.primary, *p.holders})
        rows = sorted(self._driver.state.rows(ServerRow).items())
        return [self._server(row, online[row.ref], held[row.ref]) for _, row in rows]

    def _server(self, row: ServerRow, primaries: int, replicas: int) -> co.ServerStatus:
        node = NodeKey("server", *row.ref)
        beat = self._driver.figures.get(node, co.HeartbeatRequest())
        return co.ServerStatus(
            node=map_node(row),
            silence_ms=self._silence_ms(node),
            value_bytes=beat.value_bytes,
            bytes_in=beat.bytes_in,
            bytes_out=beat.bytes_out,
            rss_bytes=beat.rss_bytes,
            primaries=primaries,
            replicas=replicas,
            applied_lsn=beat.applied_lsn,
            queue_depth=beat.queue_depth,
        )

    def _host(self, row: HostRow) -> co.HostStatus:
        silence = self._silence_ms(NodeKey("host", *Ref(row.name, row.incarnation)))
        return co.HostStatus(
            name=row.name,
            incarnation=row.incarnation,
            state=NODE_STATES[row.state],
            silence_ms=silence if row.state is NodeState.LIVE else 0,
            slots=row.slots,
        )

    def _silence_ms(self, node: NodeKey) -> int:
        return round(self._driver.liveness.silence(node, self._driver.clock()) * 1000)

    async def ListEvents(
        self, request: co.ListEventsRequest, context: grpc.aio.ServicerContext
    ) -> co.ListEventsResponse:
        """Audit lines after an id, or the newest ones."""
        check(self._driver, request.request, registering=True)
        limit = min(request.limit or 100, MOST_EVENTS)
        first = request.after + 1 if request.after else max(1, self._driver.state.job.next_event - limit)
        pairs = await asyncio.to_thread(
            self._driver.store.scan, EventRow.PREFIX, event_key(min(first, 10**20 - 1)), limit
        )
        return co.ListEventsResponse(events=[_event(key, data) for key, data in pairs])

    async def PromoteReplica(
        self, request: co.PromoteReplicaRequest, context: grpc.aio.ServicerContext
    ) -> co.PromoteReplicaResponse:
        """Give an offline partition to an incomplete replica."""
        check(self._driver, request.request, registering=True)
        if not request.accept_loss:
            raise refuse("MISSING_FIELD", "acknowledged updates may be lost; say accept_loss if that is meant")
        await self._driver.decide(lambda draft: replicas.promote_with_loss(draft, request.partition, request.server))
        return co.PromoteReplicaResponse(map=self._driver.feed.current)

    async def MovePartition(
        self, request: co.MovePartitionRequest, context: grpc.aio.ServicerContext
    ) -> co.MovePartitionResponse:
        """Write one move down; it is carried out from there."""
        check(self._driver, request.request, registering=True)
        row = await self._driver.decide(
            lambda draft: moves.ask(draft, request.partition, request.source, request.target)
        )
        return co.MovePartitionResponse(move=self._move(row))

    async def Rebalance(self, request: co.RebalanceRequest, context: grpc.aio.ServicerContext) -> co.RebalanceResponse:
        """Plan what makes bytes even; write it down unless it is a dry run."""
        check(self._driver, request.request, registering=True)
        if not request.dry_run:
            rows = await self._driver.decide(lambda draft: moves.even_out(draft, "psctl rebalance"))
            return co.RebalanceResponse(moves=[self._move(row) for row in rows])
        planned = await self._driver.decide(lambda draft: moves.dry_run(draft, "psctl rebalance --dry-run"))
        return co.RebalanceResponse(moves=[self._move(row) for row in planned])

    async def ListMoves(self, request: co.ListMovesRequest, context: grpc.aio.ServicerContext) -> co.ListMovesResponse:
        """Open moves, and those that were over last."""
        check(self._driver, request.request, registering=True)
        rows = sorted(self._driver.state.rows(MoveRow).items())
        return co.ListMovesResponse(moves=[self._move(row) for _, row in rows])

    async def Drain(self, request: co.DrainRequest, context: grpc.aio.ServicerContext) -> co.DrainResponse:
        """Begin or end a drain; says how far it is."""
        check(self._driver, request.request, registering=True)
        if request.undo:
            drained = await self._driver.decide(lambda draft: moves.undrain(draft, request.server))
        else:
            why = "it is being stopped (SIGTERM)" if request.leaving else "psctl drain"
            drained = await self._driver.decide(
                lambda draft: moves.drain(
                    draft, request.server, why, incarnation=request.incarnation, leaving=request.leaving
                )
            )
        return co.DrainResponse(
            held=drained.held, moving=drained.moving, only_here=drained.only, nowhere=drained.nowhere
        )

    def _move(self, row: MoveRow) -> co.Move:
        part = self._driver.state.partition(row.partition)
        return co.Move(
            move=row.move,
            partition=row.partition,
            source=pb.ReplicaRef(node=row.source.name, incarnation=row.source.incarnation),
            target=pb.ReplicaRef(node=row.target.name, incarnation=row.target.incarnation),
            swap=row.swap,
            stage=_STAGES[row.stage],
            why=row.why,
            reason=row.reason,
            nbytes=part.nbytes if part else 0,
        )


def _client(row: ClientRow) -> co.ClientStatus:
    return co.ClientStatus(
        client_id=row.client_id, slot=row.slot, host=row.host, role=row.role, state=row.state, reason=row.reason
    )


def _event(key: str, data: bytes) -> co.Event:
    row = decode(key, data)
    assert isinstance(row, EventRow)
    return co.Event(
        id=row.event,
        wall_time_ms=row.wall_time_ms,
        term=row.term,
        kind=row.kind,
        subject=row.subject,
        evidence=row.evidence,
    )
