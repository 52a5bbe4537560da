"""Asking servers what they know, when the coordinator's state is lost.

testimony, coordinators = await gather(["10.0.0.1:7080"], "default")
await check_nobody_leads(coordinators, "default")

One address is enough: each server names all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence

from paramesh.channel import aio_channel, grpc, header
from paramesh.errors import ParameshError, refuse
from paramesh.security import PLAIN, Security
from paramesh.status import from_rpc_error
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import recovery_pb2 as rc
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.coordinator_pb2_grpc import MapServiceStub
from paramesh.v1.recovery_pb2_grpc import RecoveryStub

__all__ = ["check_nobody_leads", "gather"]

SECONDS = 6.0
"""Of one question: a server answers when what runs on its partitions has ended, within 4 s."""

LOOK_SECONDS = 2.0
"""For a coordinator to show that it is there."""

_GONE = (pb.NODE_STATE_LEFT,)


async def gather(
    addresses: Sequence[str], job: str, security: Security = PLAIN
) -> tuple[list[rc.TestifyResponse], list[str]]:
    """Ask the servers at these addresses, and whomever they know of.

    Args:
        addresses: host:port of data or control planes.
        job: the cluster's name.
        security: of the channels.

    Returns:
        One testimony of each process that answered, by name; and the addresses of coordinators
        that they were given.

    Raises:
        ParameshError: UNREACHABLE, if nobody answers at a given address; a refusal of one of those.
    """
    found: dict[tuple[str, int], rc.TestifyResponse] = {}
    asked: set[str] = set()
    waiting = list(dict.fromkeys(addresses))
    while waiting:
        asked.update(waiting)
        said = await asyncio.gather(*(_ask(address, job, security) for address in waiting))
        for address, answer in zip(waiting, said, strict=True):
            if isinstance(answer, rc.TestifyResponse):
                found[answer.server.name, answer.server.incarnation] = answer
            elif address in addresses:
                raise answer
        waiting = sorted(_known(found.values()) - asked)
    testimony = [found[key] for key in sorted(found)]
    coordinators = {one.strip() for said in testimony for one in said.coordinators.split(",") if one.strip()}
    return testimony, sorted(coordinators)


def _known(testimony: Iterable[rc.TestifyResponse]) -> set[str]:
    """Control addresses of everybody who may still be there."""
    answered = {(said.server.name, said.server.incarnation) for said in testimony}
    return {
        node.control_address
        for said in testimony
        for node in said.map.nodes
        if node.state not in _GONE and node.control_address and (node.ref.node, node.ref.incarnation) not in answered
    }


async def _ask(address: str, job: str, security: Security) -> rc.TestifyResponse | ParameshError:
    request = rc.TestifyRequest(request=header(job))
    try:
        async with aio_channel(address, security) as channel:
            answer: rc.TestifyResponse = await RecoveryStub(channel).Testify(request, timeout=SECONDS)
            return answer
    except grpc.RpcError as error:
        told = from_rpc_error(error, address)
        if told.reason == "UNREACHABLE":
            return refuse("UNREACHABLE", f"no ps-server answers at {address}; it logs 'serving ... address=HOST:PORT'")
        return told


async def check_nobody_leads(coordinators: Collection[str], job: str, security: Security = PLAIN) -> None:
    """Refuse while a coordinator runs that servers know: its state is not lost.

    Raises:
        StateRefused: STALE_TERM, naming the address.
    """
    for address in coordinators:
        if await _is_there(address, job, security):
            raise refuse(
                "STALE_TERM",
                f"a coordinator answers at {address}: with its state nothing is lost. End it first if that is not "
                "this cluster's state",
                address=address,
            )


async def _is_there(address: str, job: str, security: Security) -> bool:
    try:
        async with aio_channel(address, security) as channel:
            await MapServiceStub(channel).GetMap(
                co.GetMapRequest(request=header(job)), timeout=LOOK_SECONDS, wait_for_ready=False
            )
    except grpc.RpcError as error:
        # One that refuses is there; one that is stopped shows by its open port, and may be continued.
        return from_rpc_error(error, address).reason != "UNREACHABLE"
    return True
