"""The heart of a client that no supervisor beats for.

A task on the IO loop: a process that holds the GIL for long stops it, which is why such
clients are given 10 s, and why supervised ones are not asked to beat at all.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import AsyncIterator

from paramesh.channel import aio_channel, grpc
from paramesh.client import AsyncClient
from paramesh.config import ClientConfig
from paramesh.errors import ParameshError
from paramesh.rotation import NEXT_S, Rotation
from paramesh.status import from_rpc_error
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1.coordinator_pb2_grpc import MembershipStub

__all__ = ["beat"]

log = logging.getLogger(__name__)

SILENCE = 5.0
"""Seconds without an answer after which the stream is opened anew, half the timeout."""


class _End(enum.Enum):
    """How a stream of beats ended."""

    SILENT = "nobody answered"
    BROKEN = "it broke after answers"
    UNKNOWN = "the coordinator does not know this client"


async def beat(client: AsyncClient, config: ClientConfig) -> None:
    """Beat until cancelled, or until the coordinator no longer knows this client.

    Tries the coordinators in turn; the process goes on whatever happens here.
    """
    turns = Rotation(config.coordinators)
    while True:
        address = turns.address
        end, error = await _beat_to(address, client)
        log.debug("heartbeat ended address=%s why=%r", address, end.value)
        if end is _End.UNKNOWN:
            log.warning("heartbeat refused client_id=%d: it was evicted", client.client_id)
            return
        if end is _End.BROKEN:
            turns.succeeded()
        await asyncio.sleep(max(turns.failed(error), NEXT_S))


async def _beat_to(address: str, client: AsyncClient) -> tuple[_End, ParameshError | None]:
    """One stream of beats; how it ended, and with what refusal if with one."""
    nonces = asyncio.Queue[int]()
    nonces.put_nowait(0)

    async def beats() -> AsyncIterator[co.HeartbeatRequest]:
        while True:
            echo = await nonces.get()
            yield co.HeartbeatRequest(request=client.header(), kind=co.NODE_KIND_CLIENT, echo=echo)

    end = _End.SILENT
    async with aio_channel(address, client.link.security, heartbeat=True) as channel:
        call = MembershipStub(channel).Heartbeat(beats())
        try:
            while True:
                async with asyncio.timeout(SILENCE):
                    answer = await call.read()
                if answer is grpc.aio.EOF:
                    return end, None
                if answer.unknown:
                    return _End.UNKNOWN, None
                end = _End.BROKEN
                await asyncio.sleep(client.heartbeat_interval)
                nonces.put_nowait(answer.nonce)
        except grpc.RpcError as error:
            return end, from_rpc_error(error, address)
        except TimeoutError:
            return end, None
        finally:
            call.cancel()
