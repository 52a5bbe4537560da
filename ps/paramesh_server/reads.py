"""Pulls and snapshots: partitions stream as soon as each is ready.

While one partition's frames are on the wire the next is being summed and applied. Frames
are encoded once per state and shared by everybody who asks for that state.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from paramesh.channel import grpc
from paramesh.errors import refuse
from paramesh.framing import encode
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

from paramesh_server.counters import Counters
from paramesh_server.decisions import for_one_thread
from paramesh_server.sending import EncodedValues, encode_cut, encode_values
from paramesh_server.servicer import DataPlane, Formed
from paramesh_server.shards import Held

FLOOR_S = 60.0
"""How long a pull waits for its floor when the caller set no deadline."""

FLOOR_REACH = 1 << 32
"""A floor further ahead than this is a mistake, not an update under way."""


class Reads:
    """The requests of `ParameterServer` that stream values out."""

    def __init__(self, plane: DataPlane, counters: Counters) -> None:
        self._plane = plane
        self._counters = counters

    async def Pull(self, request: ps.PullRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Stream values, each partition at one point of its log."""
        self._plane.check(request.request)
        if request.codec not in (pb.CODEC_UNSPECIFIED, pb.CODEC_NONE):
            raise refuse("CODEC", f"codec {request.codec} is not known here; ask for CODEC_NONE", codec=request.codec)
        deadline = time.monotonic() + (context.time_remaining() or FLOOR_S)
        tasks = [asyncio.ensure_future(self._pull(asked, request, deadline)) for asked in request.partitions]
        try:
            for ready in asyncio.as_completed(tasks):
                for message in await ready:
                    self._counters.bytes_out += len(message)
                    yield message
        finally:
            for task in tasks:
                task.cancel()

    async def _pull(self, asked: ps.PartitionPull, request: ps.PullRequest, deadline: float) -> Sequence[bytes]:
        """One partition's messages, or the one that says why not; never raises."""
        formed: Formed | None = None
        try:
            held = await self._plane.find(asked.partition, asked.epoch)
            formed = Formed(held, held.replica.reign)
            kind = request.checksum_kind or pb.CHECKSUM_KIND_CRC32
            if request.at_step:
                encoded = await self._at_step(held, request, kind)
            else:
                encoded = await self._above_floor(held, asked, request, kind, deadline)
            await held.released(encoded.at.lsn, formed.reign, early=held.early, kept=bool(request.committed))
            return encoded.messages
        except Exception as error:
            detail = await self._plane.refusal(error, formed, asked.partition)
            return (encode(ps.PullHeader(partition=asked.partition, error=detail)),)

    async def _at_step(self, held: Held, request: ps.PullRequest, kind: int) -> EncodedValues:
        encoded = self._fresh(held, kind)
        if encoded is not None and encoded.applied_step == request.step:
            return encoded

        decided, step = for_one_thread(request.committed), request.step

        def work() -> EncodedValues:
            held.commit(decided)
            held.partition.check_step(step)
            return self._encode(held, kind)

        return await held.lead(work)

    async def _above_floor(
        self, held: Held, asked: ps.PartitionPull, request: ps.PullRequest, kind: int, deadline: float
    ) -> EncodedValues:
        partition = held.partition
        if decided := for_one_thread(request.committed):
            await held.lead(lambda: held.commit(decided))
        client = request.request.client_id
        if held.early and asked.acked_through > partition.dedup.last(client):
            acked = asked.acked_through
            await held.lead(lambda: held.partition.take_loss(client, acked))
        if asked.floor_epoch > partition.epoch:
            # Seen at a newer primary: what is here may lack it, however high its numbers are.
            raise refuse(
                "UNKNOWN_EPOCH",
                f"partition {partition.id} is at epoch {partition.epoch} here, the floor is of {asked.floor_epoch}",
            )
        # A floor seen under an older epoch was cut to that epoch's end when this one began.
        floor = asked.floor_lsn if asked.floor_epoch == partition.epoch else 0
        if floor > partition.log.lsn + FLOOR_REACH:
            raise refuse("FLOOR", f"floor {floor} is far beyond lsn {partition.log.lsn}", lsn=partition.log.lsn)
        if not floor and held.replica.insync.unheard(time.monotonic()):
            # Nobody's past, perhaps, but the job's: a primary that was replaced would be the last to know.
            reign = held.replica.reign
            await held.released(await held.lead(lambda: held.partition.touch(), inline=True), reign)
        while partition.log.lsn < floor:
            if not await held.changed(deadline - time.monotonic()):
                raise refuse("DEADLINE", f"partition {partition.id} is at lsn {partition.log.lsn}, floor {floor}")
        encoded = self._fresh(held, kind)
        if encoded is not None:
            return encoded

        def work() -> EncodedValues:
            held.partition.check_ready()  # by now it may be another object: a snapshot was installed
            return self._encode(held, kind)

        return await held.lead(work)

    def _fresh(self, held: Held, kind: int) -> EncodedValues | None:
        """The shared encoding, if nothing was applied since."""
        encoded = held.encoded.get(kind)
        return encoded if encoded is not None and encoded.at == held.partition.log.last else None

    def _encode(self, held: Held, kind: int) -> EncodedValues:
        """Under the partition's lock: another caller may have been first."""
        encoded = self._fresh(held, kind)
        if encoded is None:
            # The old messages go first, so that the new ones take their memory.
            held.encoded.pop(kind, None)
            encoded = held.encoded[kind] = encode_values(held.partition, kind)
            self._counters.encodings += 1
        return encoded

    async def Snapshot(self, request: ps.SnapshotRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Stream atomic cuts, one partition after the other: each is a copy of its state."""
        self._plane.check(request.request)
        for asked in request.partitions:
            for message in await self._cut(asked, request):
                self._counters.bytes_out += len(message)
                yield message

    async def _cut(self, asked: ps.PartitionPull, request: ps.SnapshotRequest) -> Sequence[bytes]:
        formed: Formed | None = None
        try:
            held = await self._plane.find(asked.partition, asked.epoch)
            formed = Formed(held, held.replica.reign)
            kind = request.checksum_kind or pb.CHECKSUM_KIND_CRC32
            decided, step = for_one_thread(request.committed), request.step if request.at_step else None

            def work() -> Sequence[bytes]:
                held.commit(decided)
                if step is not None:
                    held.partition.check_step(step)
                return encode_cut(held.partition, kind)

            messages = await held.lead(work)
            await formed.released()
            return messages
        except Exception as error:
            detail = await self._plane.refusal(error, formed, asked.partition)
            return (encode(ps.SnapshotHeader(partition=asked.partition, error=detail, partition_done=True)),)
