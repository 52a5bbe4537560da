"""The heart of a client that no supervisor beats for.

A task on the IO loop: a process that holds the GIL for long stops it, which is why such
clients are given 10 s, and why supervised ones are not asked to beat at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from paramesh.channel import aio_channel, grpc
from paramesh.client import AsyncClient
from paramesh.config import ClientConfig
from paramesh.retry import Backoff
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1.coordinator_pb2_grpc import MembershipStub

__all__ = ["beat"]

log = logging.getLogger(__name__)

SILENCE = 5.0
"""Seconds without an answer after which the stream is opened anew, half the timeout."""


async def beat(client: AsyncClient, config: ClientConfig) -> None:
    """Beat until cancelled, or until the coordinator no longer knows this client.

    Tries the coordinators in turn; the process goes on whatever happens here.
    """
    backoff = Backoff()
    addresses = config.coordinators.split(",")
    turn = 0
    while True:
        try:
            if await _beat_to(addresses[turn % len(addresses)], client):
                log.warning("heartbeat refused client_id=%d: evicted", client.client_id)
                return
        except (grpc.RpcError, TimeoutError) as error:
            log.debug("heartbeat broken address=%s: %r", addresses[turn % len(addresses)], error)
        turn += 1
        await asyncio.sleep(backoff.next())


async def _beat_to(address: str, client: AsyncClient) -> bool:
    """One stream of beats; True: the coordinator does not know this client."""
    nonce = asyncio.Queue[int]()
    nonce.put_nowait(0)

    async def beats() -> AsyncIterator[co.HeartbeatRequest]:
        while True:
            echo = await nonce.get()
            yield co.HeartbeatRequest(request=client.header(), kind=co.NODE_KIND_CLIENT, echo=echo)

    async with aio_channel(address, heartbeat=True) as channel:
        call = MembershipStub(channel).Heartbeat(beats())
        while True:
            answer = await asyncio.wait_for(call.read(), SILENCE)
            if answer is grpc.aio.EOF:
                return False
            if answer.unknown:
                return True
            await asyncio.sleep(client.heartbeat_interval)
            nonce.put_nowait(answer.nonce)
