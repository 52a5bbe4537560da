"""Beats to one coordinator: over a connection, and over another too while the first is silent.

    line = Line(identity, fill, may_beat, on_heard)
    unknown = await line.run(address)

A connection may be all that is broken: a packet that is lost again and again is repeated later and
later, and a flow that a switch or a NAT has forgotten is never heard again, although whoever connects
anew is. A server was then taken for dead that everybody else could reach. So after half the timeout
a second connection is tried, and the first is kept until one of them is heard: it may be the
coordinator that is slow, and its answer on its way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from paramesh.channel import aio_channel, grpc, header
from paramesh.security import PLAIN, Security
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1.coordinator_pb2_grpc import MembershipStub

__all__ = ["Identity", "Line"]

ECHO_S = 0.1
"""Seconds from a connection's first beat to its second, which brings the first echo of what was answered on it."""


@dataclass(frozen=True)
class Identity:
    """Who beats, and to whom."""

    coordinators: str
    job: str
    generation: int
    name: str
    incarnation: int
    interval: float
    """Seconds between beats."""
    timeout: float
    """Seconds without an answer after which another coordinator is tried; after half of it, another connection."""
    security: Security = PLAIN
    """Of the channels to the coordinators."""


class Line:
    """One coordinator, as long as it is heard: each beat echoes the nonce of its last answer, whichever way it came.

    Args:
        identity: who beats.
        fill: puts what is to be told into a beat.
        may_beat: asked before each beat; while false there is silence, and the other end's does not count.
        on_heard: called at the first answer.
    """

    def __init__(
        self,
        identity: Identity,
        fill: Callable[[co.HeartbeatRequest], co.HeartbeatRequest],
        may_beat: Callable[[], bool],
        on_heard: Callable[[], None],
    ) -> None:
        self._identity = identity
        self._fill = fill
        self._may_beat = may_beat
        self._on_heard = on_heard
        self._nonce = 0
        self._heard = time.monotonic()
        self._next = 0.0
        """Before that no other connection is tried."""
        self._streams: set[asyncio.Task[bool]] = set()
        self.answered = False

    async def run(self, address: str) -> bool:
        """Beat until the last connection breaks; true if the coordinator does not know us.

        Raises:
            grpc.RpcError: it broke.
            TimeoutError: no answer came within the timeout, on any.
        """
        self._heard = time.monotonic()
        self._streams = {asyncio.ensure_future(self._stream(address))}
        try:
            while True:
                done, _ = await asyncio.wait(
                    self._streams, timeout=self._until_silent(), return_when=asyncio.FIRST_COMPLETED
                )
                self._streams -= done
                if (said := self._said_by(done)) is not None:
                    return said
                self._look(address)
        finally:
            await _end(self._streams)

    def _said_by(self, ended: set[asyncio.Task[bool]]) -> bool | None:
        """What streams that ended say; None while another stands, and of one that was given up for it."""
        broken: BaseException | None = None
        for stream in ended:
            if stream.cancelled():  # by us, or by gRPC, whose own cancelling is none of this task
                continue
            if (error := stream.exception()) is None:
                return stream.result()
            broken = error
        if self._streams:
            return None
        if broken is not None:
            raise broken
        return False if ended else None

    def _until_silent(self) -> float:
        """Seconds until there is something to do about silence."""
        timeout = self._identity.timeout
        due = self._heard + timeout
        if len(self._streams) < 2:
            due = min(due, max(self._heard + timeout / 2, self._next))
        return max(0.0, due - time.monotonic())

    def _look(self, address: str) -> None:
        if not self._may_beat():  # silence of our own is none of the coordinator's
            self._heard = time.monotonic()
        now = time.monotonic()
        silent = now - self._heard
        if silent >= self._identity.timeout:
            raise TimeoutError(f"{address} has not answered a beat for {silent:.1f} s")
        if silent >= self._identity.timeout / 2 and len(self._streams) < 2 and now >= self._next:
            self._next = now + self._identity.interval
            self._streams.add(asyncio.ensure_future(self._stream(address)))

    async def _stream(self, address: str) -> bool:
        """Beat over one connection."""
        async with aio_channel(address, self._identity.security, heartbeat=True) as channel:
            call = MembershipStub(channel).Heartbeat(self._beats())
            try:
                while True:
                    answer = await call.read()
                    if answer is grpc.aio.EOF:
                        return False
                    self._take(answer)
                    if answer.unknown:
                        return True
            finally:
                call.cancel()

    def _take(self, answer: co.HeartbeatResponse) -> None:
        if not self.answered:
            self._on_heard()
        self.answered, self._nonce, self._heard = True, answer.nonce, time.monotonic()
        for other in self._streams - {asyncio.current_task()}:
            other.cancel()

    async def _beats(self) -> AsyncIterator[co.HeartbeatRequest]:
        who, wait = self._identity, min(ECHO_S, self._identity.interval)
        while True:
            if self._may_beat():
                beat = co.HeartbeatRequest(
                    request=header(who.job, who.generation),
                    kind=co.NODE_KIND_SERVER,
                    name=who.name,
                    incarnation=who.incarnation,
                    echo=self._nonce,
                )
                yield self._fill(beat)
            await asyncio.sleep(wait)
            wait = who.interval


async def _end(streams: set[asyncio.Task[bool]]) -> None:
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
