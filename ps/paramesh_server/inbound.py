"""A follower's side of replication: records and snapshots come in, acknowledgements go out.

Acknowledged means in memory, in order, matching everything before. Nothing is applied until
the primary says that it is committed; applying runs beside receiving.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

from paramesh.channel import check_header, grpc
from paramesh.errors import AccessDenied, ParameshError, refuse
from paramesh.framing import Framed, decode, verify
from paramesh.status import detail_of
from paramesh.v1 import replication_pb2 as rp

from paramesh_server.counters import Counters
from paramesh_server.insync import Ref
from paramesh_server.log import Position, record_of
from paramesh_server.partition import Partition
from paramesh_server.receiving import ASSIGN_COPIES, MAX_FRAMES
from paramesh_server.replica import Machine
from paramesh_server.shards import Slot
from paramesh_server.staging import FrameBytes
from paramesh_server.writes import SlotFrame

log = logging.getLogger(__name__)

SERVICE = "paramesh.v1.Replication"

MAX_RECORD_BYTES = 1 << 30
"""A record above this is refused before it is gathered: partitions are 32 MiB by default."""

WATCH_S = 60.0
"""Seconds of one wait for a record; nothing depends on it."""

INSTALL_S = 60.0
"""Seconds for a snapshot of one partition, 100 MB at most, to arrive: as long as its sender waits."""

T = TypeVar("T")
H = TypeVar("H", rp.AppendHeader, rp.InstallHeader, rp.HandoverHeader)

Find = Callable[[int], Any]
"""Partition -> awaitable of its slot here, or None if the map lists none."""


class Inbound:
    """The servicer of `Replication`.

    Args:
        job: this cluster's name.
        generation: this job's generation now.
        me: this process.
        find: the replica of a partition, once it is made.
        fresh: makes an empty state for a partition that a snapshot replaces.
        counters: what is counted.
    """

    def __init__(
        self,
        job: str,
        generation: Callable[[], int],
        me: Ref,
        find: Find,
        fresh: Callable[[int], Any],
        counters: Counters,
    ) -> None:
        self._counters = counters
        self._job = job
        self._generation = generation
        self._me = me
        self._find = find
        self._fresh = fresh
        self._applying: dict[int, asyncio.Task[None]] = {}

    async def _slot(self, first: rp.AppendHeader | rp.InstallHeader) -> Slot:
        """The replica that a stream is for.

        Raises:
            ParameshError: those of `check_header`; UNKNOWN_NODE, if it is meant for another
                process; NOT_READY, if there is no replica here.
        """
        check_header(first.request, self._job, self._generation())
        if Ref.of(first.follower) != self._me:
            raise refuse("UNKNOWN_NODE", f"this is {self._me.node} of another incarnation", node=self._me.node)
        slot: Slot | None = await self._find(first.partition)
        if slot is None:
            raise refuse("NOT_READY", f"the map lists no replica of partition {first.partition} here")
        slot.replica.greet(first.epoch, first.row_version if isinstance(first, rp.AppendHeader) else 0)
        return slot

    async def Append(
        self, requests: AsyncIterator[Framed[rp.AppendHeader]], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[rp.AppendResponse]:
        """Take records of one partition, and acknowledge each."""
        slot: Slot | None = None
        number = 0
        try:
            stream = aiter(requests)
            first = await first_of(stream)
            number = first.partition
            slot = await self._slot(first)
            log.info("following partition=%d primary=%s epoch=%d", number, first.primary.node, first.epoch)
            yield self._position(slot)
            async for head, payload in _until_diverged(slot, _records(stream)):
                if await self._take(slot, head, payload):
                    answer = self._position(slot)
                    answer.acked_lsn = min(answer.acked_lsn, slot.replica.matched)
                    yield answer
        except AccessDenied:
            raise  # the call's own failure: who may not ask is told nothing of the replica
        except ParameshError as error:
            yield self._refusal(slot, number, error)

    async def _take(self, slot: Slot, head: rp.AppendHeader, payload: list[memoryview]) -> bool:
        """Hold a record, or learn of a commit; whether there is something to acknowledge."""
        previous = Position(head.previous_lsn, head.previous_epoch)
        if not head.HasField("record"):
            slot.replica.learn(head.epoch, previous, head.commit_lsn)
            self._apply(slot)
            return False
        if head.record.partition != slot.number:
            raise refuse("WRONG_PARTITION", f"a record of partition {head.record.partition} came for {slot.number}")
        if sum(part.nbytes for part in payload) != head.record.payload_bytes:
            raise refuse("PAYLOAD_SIZE", f"record {head.record.lsn} did not come whole")
        slot.replica.offer(head.epoch, previous, record_of(head.record, payload))
        slot.replica.learn(head.epoch, Position(head.record.lsn, head.record.epoch), head.commit_lsn)
        self._apply(slot)
        return True

    def _apply(self, slot: Slot) -> None:
        """Have what is committed applied, one task per partition at a time."""
        task = self._applying.get(slot.number)
        if slot.replica.due and (task is None or task.done()):
            self._applying[slot.number] = asyncio.ensure_future(self._apply_due(slot))

    async def _apply_due(self, slot: Slot) -> None:
        try:
            while slot.replica.due:
                await slot.run(slot.replica.apply)
        except ParameshError as error:
            slot.stir()
            if error.reason != "NOT_PRIMARY":  # given up meanwhile
                self._counters.diverged += 1
                log.error("partition=%d diverged reason=%s: %s", slot.number, error.reason, error)

    def _position(self, slot: Slot) -> rp.AppendResponse:
        last, applied = slot.replica.last, slot.replica.machine.log.last
        return rp.AppendResponse(
            partition=slot.number,
            epoch=slot.replica.promised,
            acked_lsn=last.lsn,
            acked_epoch=last.epoch,
            applied_lsn=applied.lsn,
            applied_epoch=applied.epoch,
        )

    def _refusal(self, slot: Slot | None, number: int, error: ParameshError) -> rp.AppendResponse:
        answer = rp.AppendResponse(partition=number) if slot is None else self._position(slot)
        if error.reason == "STALE_EPOCH":
            answer.epoch = int(error.metadata.get("epoch", "0"))
        answer.error.CopyFrom(detail_of(error, f"partition {number}"))
        return answer

    async def Install(
        self, requests: AsyncIterator[Framed[rp.InstallHeader]], context: grpc.aio.ServicerContext
    ) -> rp.InstallResponse:
        """Take a whole snapshot; until its last byte is here the old state stays."""
        stream = aiter(requests)
        first = await first_of(stream)
        slot = await self._slot(first)
        machine: Machine = await self._fresh(first.partition)
        try:
            async with asyncio.timeout(INSTALL_S):
                writes = await self._snapshot(slot, machine, stream)
        except TimeoutError:
            raise refuse("DEADLINE", f"the snapshot did not end within {INSTALL_S:g} s") from None
        await slot.compute(partial(machine.restore, first.state, writes), inline=False)
        slot.replica.greet(first.epoch)  # nobody newer came meanwhile
        await slot.run(partial(slot.replica.install, machine), inline=True)
        log.info("installed partition=%d lsn=%d primary=%s", slot.number, first.state.lsn, first.primary.node)
        return rp.InstallResponse(applied_lsn=first.state.lsn)

    async def _snapshot(
        self, slot: Slot, machine: Machine, stream: AsyncIterator[Framed[rp.InstallHeader]]
    ) -> list[SlotFrame]:
        """The frames of a snapshot, verified, to the one that says that it is the last.

        gRPC may end a stream whose sender went away as if it were whole.

        Raises:
            ParameshError: CRC, PAYLOAD_SIZE; MISSING_FIELD, if there is no last frame.
        """
        bound, total = _most_bytes(machine), 0
        writes: list[SlotFrame] = []
        async for head, payload in stream:
            total += payload.nbytes
            if total > bound or len(writes) > MAX_FRAMES + bound // 8:
                raise refuse("PAYLOAD_SIZE", f"a snapshot of partition {slot.number} has at most {bound} bytes")
            await slot.compute(partial(verify, head.frame, payload), inline=payload.nbytes < 1 << 17)
            if payload.nbytes or head.frame.length:
                frame = FrameBytes(head.frame.offset, head.frame.length, payload, head.frame.checksum)
                writes.append(SlotFrame(frame, head.slot, head.segment, head.scalar))
            if head.frame.last:
                return writes
        raise refuse("MISSING_FIELD", "the snapshot ended before its last frame", field="last")

    def register(self, server: grpc.aio.Server) -> None:
        """Register the service, with payloads that protobuf never copies."""
        handlers = {
            "Append": grpc.stream_stream_rpc_method_handler(
                self.Append, lambda data: decode(data, rp.AppendHeader), rp.AppendResponse.SerializeToString
            ),
            "Install": grpc.stream_unary_rpc_method_handler(
                self.Install, lambda data: decode(data, rp.InstallHeader), rp.InstallResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


async def first_of(stream: AsyncIterator[Framed[H]]) -> H:
    """The header of a stream's first message.

    Raises:
        RequestRefused: MISSING_FIELD, if there is none.
    """
    async for framed in stream:
        return framed.header
    raise refuse("MISSING_FIELD", "the stream has no first message", field="request")


def _most_bytes(machine: Machine) -> int:
    """The most that a snapshot's frames may bring; the ledger's state is in the first message."""
    if not isinstance(machine, Partition):
        return 0
    return ASSIGN_COPIES * (machine.layout.nbytes + 64 * len(machine.layout.segments))


async def _until_diverged(slot: Slot, records: AsyncIterator[T]) -> AsyncIterator[T]:
    """What comes, until applying finds that this state is not the primary's: then nothing more helps.

    Raises:
        StateRefused: DIVERGED.
    """
    coming = asyncio.ensure_future(anext(records))
    try:
        while True:
            if slot.closed:
                raise refuse("NOT_READY", f"partition {slot.number} was given up here", partition=slot.number)
            if slot.replica.diverged:
                raise refuse("DIVERGED", f"partition {slot.number} has another state here than at its primary")
            stirred = asyncio.ensure_future(slot.stirred(WATCH_S))
            await asyncio.wait({coming, stirred}, return_when=asyncio.FIRST_COMPLETED)
            stirred.cancel()
            if coming.done() and not slot.replica.diverged and not slot.closed:
                try:
                    yield coming.result()
                except StopAsyncIteration:
                    return
                coming = asyncio.ensure_future(anext(records))
    finally:
        coming.cancel()


async def _records(
    stream: AsyncIterator[Framed[rp.AppendHeader]],
) -> AsyncIterator[tuple[rp.AppendHeader, list[memoryview]]]:
    """Whole records out of frames; verified."""
    head: rp.AppendHeader | None = None
    payload: list[memoryview] = []
    total = 0
    async for framed in stream:
        if framed.header.HasField("record") or head is None:
            head, payload, total = framed.header, [], 0
            if head.record.payload_bytes > MAX_RECORD_BYTES:
                raise refuse("PAYLOAD_SIZE", f"record {head.record.lsn} declares {head.record.payload_bytes} bytes")
        if framed.header.HasField("frame"):
            total += framed.payload.nbytes
            if total > head.record.payload_bytes:
                raise refuse("PAYLOAD_SIZE", f"record {head.record.lsn} brings more than it declares")
            verify(framed.header.frame, framed.payload)
            payload.append(framed.payload)
        if not framed.header.HasField("frame") or framed.header.frame.last:
            done, head = head, None
            yield done, payload
