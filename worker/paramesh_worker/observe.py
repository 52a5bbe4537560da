"""Looks at a running cluster over gRPC, for the progress display.

source = StatusSource("127.0.0.1:7070", job="default")
observation = await source.look()          # never raises: what does not answer is None
await source.close()
"""

from __future__ import annotations

import time
from typing import Any

from paramesh.channel import aio_channel, grpc, header
from paramesh.rotation import Rotation
from paramesh.status import from_rpc_error
from paramesh.v1 import coordinator_pb2 as pb
from paramesh.v1 import coordinator_pb2_grpc, ledger_pb2_grpc
from paramesh.v1 import ledger_pb2 as ledger
from paramesh.v1 import types_pb2 as types

from .progress import EpochView, Group, Observation, Server, Worker

__all__ = ["StatusSource"]

CALL_S = 1.0
"""Deadline of a look: a display that is a second old is better than one that waits."""

_MODES = {
    ledger.MODE_SYNC: "sync",
    ledger.MODE_SSP: "ssp",
    ledger.MODE_ASYNC: "async",
    ledger.MODE_LOCAL: "local",
}
_ACTIVITIES = {
    ledger.ACTIVITY_ACTIVE: "active",
    ledger.ACTIVITY_BETWEEN: "between",
    ledger.ACTIVITY_IDLE: "idle",
}


class StatusSource:
    """Asks the coordinator for servers, and the ledger's primary for progress."""

    def __init__(self, coordinator: str, job: str):
        self._job = job
        self._generation = 0
        """From the last map; 0 before the first."""
        self._turns = Rotation(coordinator)
        self._coordinators: dict[str, grpc.aio.Channel] = {}
        self._ledger_address = ""
        """Where the ledger was when the coordinator last answered; empty before it is placed."""
        self._ledger_channel: grpc.aio.Channel | None = None

    async def look(self) -> Observation:
        """Ask once."""
        status = await self._ask_coordinator()
        progress = await self._ask_ledger()
        seen = Observation(at=time.monotonic(), servers=None if status is None else _servers(status))
        return seen if progress is None else _with_progress(seen, progress)

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._coordinators.values():
            await channel.close()
        if self._ledger_channel is not None:
            await self._ledger_channel.close()

    async def _ask_coordinator(self) -> pb.GetStatusResponse | None:
        status: pb.GetStatusResponse
        at = self._turns.address
        if at not in self._coordinators:
            self._coordinators[at] = aio_channel(at)
        admin: Any = coordinator_pb2_grpc.AdminStub(self._coordinators[at])
        try:
            status = await admin.GetStatus(pb.GetStatusRequest(request=header(self._job)), timeout=CALL_S)
        except (TimeoutError, grpc.RpcError) as error:
            self._turns.failed(from_rpc_error(error, at) if isinstance(error, grpc.RpcError) else None)
            return None
        self._turns.succeeded()
        self._generation = status.map.generation
        address = _ledger_address(status.map)
        if address and address != self._ledger_address:
            if self._ledger_channel is not None:
                await self._ledger_channel.close()
            self._ledger_channel = aio_channel(address)
            self._ledger_address = address
        return status

    async def _ask_ledger(self) -> ledger.LedgerStatusResponse | None:
        if self._ledger_channel is None:
            return None
        stub: Any = ledger_pb2_grpc.LedgerStub(self._ledger_channel)
        request = ledger.LedgerStatusRequest(request=header(self._job, self._generation))
        try:
            progress: ledger.LedgerStatusResponse = await stub.LedgerStatus(request, timeout=CALL_S)
        except (TimeoutError, grpc.RpcError):
            return None
        return progress


def _ledger_address(routes: types.PartitionMap) -> str:
    """The data address of partition 0's primary; empty if it has none."""
    primary = next((row.primary for row in routes.partitions if row.id == 0), None)
    if primary is None:
        return ""
    return next((node.address for node in routes.nodes if node.ref == primary), "")


def _servers(status: pb.GetStatusResponse) -> tuple[Server, ...]:
    rows = (
        Server(
            name=row.node.ref.node,
            live=row.node.state == types.NODE_STATE_LIVE,
            value_bytes=row.value_bytes,
            bytes_in=row.bytes_in,
            bytes_out=row.bytes_out,
        )
        for row in status.servers
    )
    return tuple(sorted(rows, key=lambda row: row.name))


def _with_progress(seen: Observation, progress: ledger.LedgerStatusResponse) -> Observation:
    return Observation(
        at=seen.at,
        servers=seen.servers,
        phase=progress.phase,
        workers=tuple(
            Worker(
                client_id=member.client_id,
                rank=member.rank,
                slot=member.slot,
                activity=_ACTIVITIES.get(member.activity, "?"),
                clock=member.clock,
                samples=member.samples,
            )
            for member in progress.members
        ),
        groups=tuple(_group(group) for group in progress.groups),
        epochs=tuple(EpochView(row.dataset, row.epoch, row.length, row.consumed) for row in progress.epochs),
        figures=tuple((figure.name, figure.value) for figure in progress.figures),
        evictions=progress.evictions,
    )


def _group(group: ledger.GroupStatus) -> Group:
    return Group(
        name=group.name,
        mode=_MODES.get(group.mode, "?"),
        next_step=group.next_step,
        min_clock=group.min_clock,
        max_clock=group.max_clock,
        widest_gap=group.widest_gap,
        staleness=group.staleness,
        skipped=group.skipped_steps,
        waiting_for=tuple(group.waiting_for),
    )
