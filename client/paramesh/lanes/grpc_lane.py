"""The gRPC lane: one channel to one server, frames as streamed messages.

A lane knows one peer and nothing of maps or retries; `paramesh.client` decides where and
how often. When the map declares the peer dead, `lose()` ends every call in flight at
once: a frozen peer would hold them until their deadline.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from paramesh.channel import DataPlaneStub, aio_channel, grpc
from paramesh.encoded import Snapshot
from paramesh.errors import refuse
from paramesh.framing import verify
from paramesh.security import PLAIN, Security
from paramesh.status import from_rpc_error
from paramesh.v1 import ledger_pb2_grpc
from paramesh.v1 import parameter_server_pb2 as ps

T = TypeVar("T")

Sink = Callable[[int, ps.PullHeader, memoryview], None]
"""Takes (partition, header, payload view) of one frame; runs on the IO thread."""


class GrpcLane:
    """A connection to one server. Create and use it on the IO loop."""

    def __init__(self, address: str, security: Security = PLAIN):
        self.address = address
        self._channel = aio_channel(address, security)
        self.data = DataPlaneStub(self._channel)
        self.ledger = ledger_pb2_grpc.LedgerStub(self._channel)
        self._calls: set[asyncio.Task[Any]] = set()
        self._lost = ""

    async def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Run one call; its gRPC errors come out typed, and `lose` ends it.

        Raises:
            ParameshError: what the peer answered; UNREACHABLE if it is gone.
        """
        if self._lost:
            call.close()
            raise refuse("UNREACHABLE", f"{self.address} is lost: {self._lost}", peer=self.address)
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        try:
            return await task
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, self.address) from None
        except asyncio.CancelledError:
            if self._lost:
                raise refuse("UNREACHABLE", f"{self.address} is lost: {self._lost}", peer=self.address) from None
            task.cancel()
            if not _asked_to_end():  # gRPC itself cancels a call whose connection breaks while it writes
                raise refuse("UNREACHABLE", f"the call to {self.address} broke off", peer=self.address) from None
            raise
        finally:
            self._calls.discard(task)

    def lose(self, why: str) -> None:
        """The peer is dead: end every call in flight."""
        self._lost = why or "declared dead"
        for task in list(self._calls):
            task.cancel()

    async def push(self, messages: Iterable[bytes], timeout: float) -> list[ps.PartitionOutcome]:
        """Stream encoded push frames; one outcome per partition."""
        call = self.data.push(_stream(messages), timeout=timeout)
        response = await self.run(_await(call))
        return list(response.outcomes)

    async def assign(self, messages: Iterable[bytes], timeout: float) -> list[ps.PartitionOutcome]:
        """Stream encoded assign frames; one outcome per partition."""
        call = self.data.assign(_stream(messages), timeout=timeout)
        response = await self.run(_await(call))
        return list(response.outcomes)

    async def pull(self, request: ps.PullRequest, sink: Sink, timeout: float) -> dict[int, ps.PullHeader]:
        """Stream partitions into the sink; the last header of each, errors included."""
        return await self.run(self._pull(request, sink, timeout))

    async def _pull(self, request: ps.PullRequest, sink: Sink, timeout: float) -> dict[int, ps.PullHeader]:
        done: dict[int, ps.PullHeader] = {}
        async for header, payload in self.data.pull(request, timeout=timeout):
            if header.HasField("error"):
                done[header.partition] = header
                continue
            verify(header.frame, payload)
            sink(header.partition, header, payload)
            if header.frame.last:
                done[header.partition] = header
        return done

    async def snapshot(
        self, request: ps.SnapshotRequest, timeout: float
    ) -> tuple[dict[int, Snapshot], dict[int, ps.SnapshotHeader]]:
        """Collect cuts of partitions; and the headers of those that refused."""
        return await self.run(self._snapshot(request, timeout))

    async def _snapshot(
        self, request: ps.SnapshotRequest, timeout: float
    ) -> tuple[dict[int, Snapshot], dict[int, ps.SnapshotHeader]]:
        cuts: dict[int, Snapshot] = {}
        done: dict[int, Snapshot] = {}
        refused: dict[int, ps.SnapshotHeader] = {}
        async for header, payload in self.data.snapshot(request, timeout=timeout):
            if header.HasField("error"):
                refused[header.partition] = header
                continue
            cut = cuts.setdefault(header.partition, Snapshot(header.partition))
            cut.lsn, cut.applied_step = header.lsn, header.applied_step
            if payload.nbytes:
                verify(header.frame, payload)
                if header.scalar:
                    cut.scalars[header.slot, header.segment] = struct.unpack("<d", payload)[0]
                else:
                    cut.elements.setdefault(header.slot, []).append((header.frame.offset, payload))
            if header.partition_done:
                done[header.partition] = cut
        return done, refused

    async def close(self) -> None:
        """Close the channel; calls in flight end."""
        await self._channel.close()


def _asked_to_end() -> bool:
    """Whether somebody cancels the task that runs; else a cancellation comes from what it awaits."""
    current = asyncio.current_task()
    return current is None or current.cancelling() > 0


async def _await(call: Any) -> Any:
    return await call


async def _stream(messages: Iterable[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
