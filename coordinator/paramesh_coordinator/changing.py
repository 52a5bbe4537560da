"""What psctl changes: moves, evening out, draining; each asked for, then looked at until it is over.

started = await start_move(coordinators, job, 3, "server-0", "server-2")
async for rows in follow_moves(coordinators, job, [started["move"]]): ...     # until none is open
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from typing import Any

from paramesh.channel import header
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1.coordinator_pb2_grpc import AdminStub

from paramesh_coordinator.inspection import Coordinators, ask_coordinator

__all__ = ["drain", "follow_drain", "follow_moves", "list_moves", "rebalance", "start_move"]

LOOK_SECONDS = 0.2
"""Between two looks at what is under way: a small partition moves in about half a second."""

OPEN = ("wanted", "copying")
_STAGE = {value: name.removeprefix("MOVE_STAGE_").lower() for name, value in co.MoveStage.items()}


def _move(row: co.Move) -> dict[str, Any]:
    return {
        "move": row.move,
        "partition": row.partition,
        "source": row.source.node,
        "target": row.target.node,
        "swap": row.swap,
        "bytes": row.nbytes,
        "stage": _STAGE[row.stage],
        "why": row.why,
        "reason": row.reason,
    }


async def start_move(coordinators: Coordinators, job: str, partition: int, source: str, target: str) -> dict[str, Any]:
    """Ask for one move; it as it stands.

    Raises:
        ParameshError: UNREACHABLE, or the coordinator's refusal.
    """
    request = co.MovePartitionRequest(request=header(job), partition=partition, source=source, target=target)
    answer, _ = await ask_coordinator(coordinators, AdminStub, "MovePartition", request)
    return _move(answer.move)


async def rebalance(coordinators: Coordinators, job: str, dry_run: bool) -> list[dict[str, Any]]:
    """Ask for even bytes; the moves that were planned.

    Raises:
        ParameshError: UNREACHABLE, or the coordinator's refusal.
    """
    request = co.RebalanceRequest(request=header(job), dry_run=dry_run)
    answer, _ = await ask_coordinator(coordinators, AdminStub, "Rebalance", request)
    return [_move(row) for row in answer.moves]


async def list_moves(coordinators: Coordinators, job: str) -> list[dict[str, Any]]:
    """Open moves and the last that were over.

    Raises:
        ParameshError: UNREACHABLE, or the coordinator's refusal.
    """
    answer, _ = await ask_coordinator(coordinators, AdminStub, "ListMoves", co.ListMovesRequest(request=header(job)))
    return [_move(row) for row in answer.moves]


async def follow_moves(
    coordinators: Coordinators, job: str, numbers: Collection[int]
) -> AsyncIterator[list[dict[str, Any]]]:
    """These moves as they stand, again and again, until none of them is open."""
    while True:
        rows = [row for row in await list_moves(coordinators, job) if row["move"] in numbers]
        yield rows
        if not any(row["stage"] in OPEN for row in rows):
            return
        await asyncio.sleep(LOOK_SECONDS)


async def drain(coordinators: Coordinators, job: str, server: str, undo: bool = False) -> dict[str, Any]:
    """Begin a drain, or end it; how far it is.

    Raises:
        ParameshError: UNREACHABLE, or the coordinator's refusal.
    """
    request = co.DrainRequest(request=header(job), server=server, undo=undo)
    answer, _ = await ask_coordinator(coordinators, AdminStub, "Drain", request)
    held, moving = list(answer.held), set(answer.moving)
    return {
        "server": server,
        "draining": not undo,
        "held": held,
        "moving": sorted(moving),
        "stuck": [] if undo else [number for number in held if number not in moving],
        "only_here": list(answer.only_here),
    }


async def follow_drain(coordinators: Coordinators, job: str, server: str) -> AsyncIterator[dict[str, Any]]:
    """How far a drain is, again and again, until nothing is held there or nothing more can go."""
    while True:
        row = await drain(coordinators, job, server)
        yield row
        if not row["moving"]:
            return
        await asyncio.sleep(LOOK_SECONDS)
