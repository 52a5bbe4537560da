"""What is staged follows a partition that moves: a planned move loses no contribution.

    handover.deposed(slot, row)          # the map names another primary: ship what is staged here
    handover.register(server)            # and take what others ship

A server that the map deposes, and that lives, sends the frames that clients have staged, as they
came, to the new primary. Clients that are asked for a missing contribution bring it as well:
both may come, in any order, and are told apart by attempt and digest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from paramesh.channel import check_header, grpc, header
from paramesh.errors import ParameshError, refuse
from paramesh.framing import DEFAULT_CHECKSUM, Framed, checksum, decode, encode, verify
from paramesh.retry import Backoff
from paramesh.routing import Routes
from paramesh.status import from_rpc_error
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from paramesh_server.inbound import first_of
from paramesh_server.insync import Ref
from paramesh_server.partition import Partition
from paramesh_server.records import pack_presence
from paramesh_server.replica import Role
from paramesh_server.shards import Held, Slot
from paramesh_server.staging import Contribution, FrameBytes, StagedKey, assemble

log = logging.getLogger(__name__)

SERVICE = "paramesh.v1.Replication"

SHIP_S = 10.0
"""Seconds in which what is staged must arrive: then clients have brought it again themselves."""

TAKE_S = 3.0
"""Seconds that a new primary may need until it serves: it heard of the same map."""

MAX_STAGED_BYTES = 1 << 30
"""A contribution above this is refused before it is gathered: partitions are 32 MiB by default."""

Staged = list[tuple[StagedKey, Contribution]]


class Handover:
    """Both sides of `Replication.Handover`.

    Args:
        job: the cluster's name.
        generation: this job's generation now.
        me: this process.
        routes: the newest map.
        channel: to the control port of a process; raises UNREACHABLE if the map does not know it.
        find: the replica of a partition, once it is made.
    """

    def __init__(
        self,
        job: str,
        generation: Callable[[], int],
        me: Ref,
        routes: Callable[[], Routes | None],
        channel: Callable[[Ref], grpc.aio.Channel],
        find: Callable[[int], Awaitable[Slot | None]],
    ) -> None:
        self._job = job
        self._generation = generation
        self._me = me
        self._routes = routes
        self._channel = channel
        self._find = find
        self._tasks: set[asyncio.Task[None]] = set()

    # The old primary.

    async def deposed(self, slot: Held, row: pb.Partition) -> None:
        """Lead no longer, and ship what is staged; returns when nothing more can be staged here.

        Args:
            slot: the replica, still held.
            row: of the newest map; names another primary.
        """
        slot.replica.heed(row.epoch)
        slot.stir()  # who waits for an answer here is told at once to go on there
        staged = await slot.run(lambda: slot.partition.staging.all(), inline=True)
        if staged:
            task = asyncio.ensure_future(self._ship(slot.number, staged))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ship(self, number: int, staged: Staged) -> None:
        deadline, backoff = time.monotonic() + SHIP_S, Backoff()
        while True:
            try:
                answer = await self._send(number, staged)
            except (ParameshError, grpc.RpcError, TimeoutError) as exc:
                error = from_rpc_error(exc, f"partition {number}") if isinstance(exc, grpc.RpcError) else exc
                if time.monotonic() >= deadline:
                    log.warning("handover partition=%d given up contributions=%d: %s", number, len(staged), error)
                    return
                await asyncio.sleep(backoff.next())
            else:
                log.info("handover partition=%d shipped=%d known=%d", number, answer.taken, answer.known)
                return

    async def _send(self, number: int, staged: Staged) -> rp.HandoverResponse:
        routes = self._routes()
        assert routes is not None
        row = routes.partition(number)
        target = Ref.of(row.primary)
        if target == self._me:
            return rp.HandoverResponse(known=len(staged))  # it came back; nobody else needs it from here
        first = rp.HandoverHeader(
            request=header(self._job, self._generation()),
            source=self._me.proto(),
            target=row.primary,
            partition=number,
            epoch=row.epoch,
        )
        call = self._channel(target).stream_unary(
            f"/{SERVICE}/Handover", request_serializer=bytes, response_deserializer=rp.HandoverResponse.FromString
        )
        answer: rp.HandoverResponse = await call(_messages(first, staged), timeout=SHIP_S)
        return answer

    async def close(self) -> None:
        """Stop shipping, after a moment for what is under way."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # The new primary.

    async def Handover(
        self, requests: AsyncIterator[Framed[rp.HandoverHeader]], context: grpc.aio.ServicerContext
    ) -> rp.HandoverResponse:
        """Stage what an old primary had staged."""
        stream = aiter(requests)
        first = await first_of(stream)
        check_header(first.request, self._job, self._generation())
        if Ref.of(first.target) != self._me:
            raise refuse("UNKNOWN_NODE", f"this is {self._me.node} of another incarnation", node=self._me.node)
        slot = await self._led(first.partition, first.epoch)
        answer = rp.HandoverResponse()
        async for staged, frames in _contributions(stream):
            taken = await self._take(slot, staged, frames)
            answer.taken += taken
            answer.known += not taken
        log.info(
            "taken over partition=%d from=%s staged=%d known=%d",
            first.partition, first.source.node, answer.taken, answer.known,
        )  # fmt: skip
        return answer

    async def _led(self, number: int, epoch: int) -> Held:
        """The replica, once it leads under that epoch.

        Raises:
            Retryable: NOT_READY; NOT_PRIMARY, if it went on to another one.
        """
        slot = await self._find(number)
        if not isinstance(slot, Held):
            raise refuse("NOT_READY", f"the map lists no replica of partition {number} here")
        deadline = time.monotonic() + TAKE_S
        while not (slot.replica.role is Role.PRIMARY and slot.partition.epoch >= epoch):
            if slot.replica.promised > epoch:
                raise refuse("NOT_PRIMARY", f"partition {number} has another primary now", partition=number)
            if time.monotonic() >= deadline or slot.closed:
                raise refuse("NOT_READY", f"partition {number} is not led here yet")
            await slot.stirred(deadline - time.monotonic())
        return slot

    async def _take(self, slot: Held, staged: rp.StagedBytes, frames: list[FrameBytes]) -> bool:
        whole = await slot.compute(partial(assemble, slot.partition.layout, staged.present, frames))
        contribution = dataclasses.replace(whole, digest=staged.digest)
        key = (staged.group, staged.step, staged.client_id, staged.attempt)
        return await slot.lead(lambda: slot.partition.take_staged(key, contribution), inline=True)

    def register(self, server: grpc.aio.Server) -> None:
        """Register the method beside those of `Inbound`."""
        handlers = {
            "Handover": grpc.stream_unary_rpc_method_handler(
                self.Handover, lambda data: decode(data, rp.HandoverHeader), rp.HandoverResponse.SerializeToString
            )
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _messages(first: rp.HandoverHeader, staged: Staged) -> Iterator[bytes]:
    yield encode(first)
    for (group, step, client, attempt), contribution in staged:
        head = rp.HandoverHeader()
        head.staged.CopyFrom(
            rp.StagedBytes(
                group=group, step=step, client_id=client, attempt=attempt, present=pack_presence(contribution.present),
                digest=contribution.digest, nbytes=contribution.nbytes,
            )
        )  # fmt: skip
        if not contribution.frames:
            yield encode(head)
        for frame in contribution.frames:
            head.frame.CopyFrom(
                pb.Frame(
                    offset=frame.offset, length=frame.length, codec=pb.CODEC_NONE, checksum_kind=DEFAULT_CHECKSUM,
                    checksum=checksum((frame.payload,)), last=frame is contribution.frames[-1],
                )
            )  # fmt: skip
            yield encode(head, (frame.payload,))
            head.ClearField("staged")


async def _contributions(
    stream: AsyncIterator[Framed[rp.HandoverHeader]],
) -> AsyncIterator[tuple[rp.StagedBytes, list[FrameBytes]]]:
    """Whole contributions out of frames; verified."""
    staged, frames, total = rp.StagedBytes(), list[FrameBytes](), 0
    async for head, payload in stream:
        if head.HasField("staged"):
            staged, frames, total = head.staged, [], 0
            if staged.nbytes > MAX_STAGED_BYTES:
                raise refuse("PAYLOAD_SIZE", f"a contribution declares {staged.nbytes} bytes")
        if head.HasField("frame"):
            total += payload.nbytes
            if total > staged.nbytes:
                raise refuse("PAYLOAD_SIZE", "a contribution brings more than it declares")
            verify(head.frame, payload)
            frames.append(FrameBytes(head.frame.offset, head.frame.length, payload, head.frame.checksum))
        if not head.HasField("frame") or head.frame.last:
            yield staged, frames


def leads_elsewhere(slot: Slot, row: pb.Partition | None, me: pb.ReplicaRef) -> bool:
    """Whether a replica that leads here is told by the map that another one does."""
    return (
        row is not None
        and slot.replica.role is Role.PRIMARY
        and isinstance(slot.replica.machine, Partition)
        and row.primary != me
        and row.state != pb.PARTITION_STATE_OFFLINE
        and row.epoch > slot.replica.machine.epoch
    )


HandOver = Callable[[Held, pb.Partition], Any]
