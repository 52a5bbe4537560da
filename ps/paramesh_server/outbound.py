"""A primary's side of replication: one stream to each follower of each partition.

    outbound = Outbound(job, generation, me, routes, pace)
    outbound.sync(slot)             # after every change of role, map or followers
    await outbound.close()

A stream begins with a greeting; the answer says where the follower is. From there it gets
the tail of the log, or, where that does not reach, a snapshot and then the tail. Commits
travel with the next record, or alone when there is none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from paramesh.channel import aio_channel, grpc, header
from paramesh.errors import ParameshError, refuse
from paramesh.framing import DEFAULT_CHECKSUM, FRAME_BYTES, checksum, encode
from paramesh.retry import Backoff
from paramesh.routing import Routes
from paramesh.security import PLAIN, Security
from paramesh.status import from_detail, from_rpc_error
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from paramesh_server.insync import Ref
from paramesh_server.log import Log, Position, Record
from paramesh_server.pace import Pace
from paramesh_server.partition import Partition
from paramesh_server.replica import Role
from paramesh_server.shards import Slot

log = logging.getLogger(__name__)

SERVICE = "/paramesh.v1.Replication/"

GREETING_S = 3.0
"""Seconds for the answer to a greeting: the follower may still be making the replica."""

INSTALL_S = 60.0
"""Seconds for a snapshot of one partition, 100 MB at most, to arrive and be installed, beside what spacing adds."""

IDLE_S = 10.0
"""Seconds after which an idle sender looks again whether it is still wanted."""


class Outbound:
    """All senders of this process.

    Args:
        job: the cluster's name.
        generation: this job's generation now.
        me: this process.
        routes: the newest map.
        pace: of snapshots.
    """

    def __init__(
        self,
        job: str,
        generation: Callable[[], int],
        me: Ref,
        routes: Callable[[], Routes | None],
        pace: Pace,
        security: Security = PLAIN,
    ) -> None:
        self.me = me
        self.routes = routes
        self.pace = pace
        self._job = job
        self._generation = generation
        self._security = security
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._senders: dict[tuple[int, Ref], asyncio.Task[None]] = {}
        self._closed = False

    def request(self) -> pb.RequestHeader:
        """The header of our requests."""
        return header(self._job, self._generation())

    def sync(self, slot: Slot) -> None:
        """Have exactly one sender for each follower of a partition that is led here."""
        if self._closed:
            return
        leads = slot.replica.role is Role.PRIMARY and not slot.closed
        wanted = slot.replica.insync.followers if leads else frozenset[Ref]()
        for (number, ref), task in list(self._senders.items()):
            if number == slot.number and ref not in wanted:
                task.cancel()
                self._gone(slot, ref)
        for ref in wanted:
            sender = self._senders.get((slot.number, ref))
            if sender is None or sender.done():  # one ends by itself when its partition is deposed
                task = asyncio.ensure_future(self._send(slot, ref))
                self._senders[slot.number, ref] = task

    def _gone(self, slot: Slot, ref: Ref) -> None:
        self._senders.pop((slot.number, ref), None)
        slot.replica.pins.pop(ref, None)

    async def _send(self, slot: Slot, ref: Ref) -> None:
        backoff, told, snapshot = Backoff(cap=1.0), "", False
        while slot.replica.role is Role.PRIMARY and not slot.closed:
            stream = _Stream(self, slot, ref, snapshot)
            try:
                await stream.run()
                snapshot = False
            except (ParameshError, grpc.RpcError, TimeoutError) as exc:
                error = from_rpc_error(exc, ref.node) if isinstance(exc, grpc.RpcError) else exc
                if str(error) != told:
                    log.info("replication partition=%d to=%s broke: %s", slot.number, ref.node, error)
                told = str(error)
                snapshot = isinstance(error, ParameshError) and error.reason == "DIVERGED"
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("replication partition=%d to=%s failed", slot.number, ref.node)
            if not stream.installed:
                slot.replica.pins.pop(ref, None)  # else a follower that never comes would keep every record here
            slot.replica.insync.lost(ref)
            slot.stir()
            if stream.answered:
                backoff = Backoff(cap=1.0)
            await asyncio.sleep(backoff.next())

    def channel(self, ref: Ref) -> grpc.aio.Channel:
        """The channel to a follower's control port.

        Raises:
            Retryable: UNREACHABLE, if the map does not know the process.
        """
        routes = self.routes()
        address = (
            "" if routes is None else next((n.control_address for n in routes.map.nodes if Ref.of(n.ref) == ref), "")
        )
        if not address:
            raise refuse("UNREACHABLE", f"the map does not say where {ref.node} is", peer=ref.node)
        if address not in self._channels:
            self._channels[address] = aio_channel(address, self._security)
        return self._channels[address]

    async def close(self) -> None:
        """End every stream."""
        self._closed = True
        tasks = list(self._senders.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()


class _Stream:
    """One try of one stream."""

    def __init__(self, out: Outbound, slot: Slot, ref: Ref, snapshot: bool) -> None:
        self._snapshot = snapshot
        """The follower said that its state is another: nothing but a snapshot helps."""
        self._out = out
        self._slot = slot
        self._ref = ref
        self._epoch = slot.replica.machine.epoch
        self._version = slot.replica.insync.version
        self.installed = False
        """A snapshot is there; what follows it is kept for the next try."""
        self.answered = False
        """The follower was there: the next try need not wait long."""

    @property
    def _log(self) -> Log:
        return self._slot.replica.machine.log

    async def run(self) -> None:
        """Greet, catch up, follow; returns only by an error, or after a snapshot."""
        channel = self._out.channel(self._ref)
        call = channel.stream_stream(
            SERVICE + "Append", request_serializer=bytes, response_deserializer=rp.AppendResponse.FromString
        )()
        try:
            greeting = self._greeting(rp.AppendHeader)
            greeting.row_version = self._version
            await call.write(encode(greeting))
            async with asyncio.timeout(GREETING_S):
                answer = await self._read(call)
            self.answered = True
            at = self._start(answer)
            if at is None:
                await self._install(channel)
                return
            self._acked(at.lsn)
            await self._follow(call, at)
        finally:
            call.cancel()

    def _greeting(self, kind: type[Any]) -> Any:
        return kind(
            request=self._out.request(),
            primary=self._out.me.proto(),
            follower=self._ref.proto(),
            partition=self._slot.number,
            epoch=self._epoch,
        )

    async def _read(self, call: Any) -> rp.AppendResponse:
        answer = await call.read()
        if answer is grpc.aio.EOF:
            # A status that is not OK is raised by waiting for it.
            raise refuse("UNREACHABLE", f"{self._ref.node} ended the stream: {await call.code()}", peer=self._ref.node)
        if answer.HasField("error"):
            error = from_detail(answer.error)
            if error.reason == "STALE_EPOCH":
                self._slot.replica.heed(answer.epoch)  # the map will say by whom
                self._slot.stir()
            raise error
        result: rp.AppendResponse = answer
        return result

    def _start(self, answer: rp.AppendResponse) -> Position | None:
        """From where the tail is sent; None: it does not reach, a snapshot is needed."""
        if self._snapshot:
            return None
        at = Position(answer.acked_lsn, answer.acked_epoch)
        if self._log.holds(at) and self._log.after(at.lsn) is not None:
            return at
        # What it has beyond what it applied is an older primary's tail; what it applied is committed,
        # unless it was that primary: then it says DIVERGED, and the next try finds nothing in common.
        before = Position(answer.applied_lsn, answer.applied_epoch)
        if before.lsn < at.lsn and self._log.holds(before) and self._log.after(before.lsn) is not None:
            return before
        return None

    def _acked(self, lsn: int) -> None:
        replica = self._slot.replica
        if replica.role is not Role.PRIMARY:
            raise refuse("NOT_PRIMARY", f"partition {self._slot.number} was deposed")
        before = replica.insync.commit
        replica.insync.acked(self._ref, lsn, time.monotonic(), self._version)
        pin = replica.pins.get(self._ref)
        if pin is not None and lsn > pin:
            del replica.pins[self._ref]
        replica.trim()
        if replica.insync.commit != before:
            self._slot.stir()

    async def _follow(self, call: Any, at: Position) -> None:
        reader = asyncio.ensure_future(self._take_answers(call))
        try:
            sent, told = at, -1
            while not reader.done():
                self._check_row()
                commit = self._slot.replica.commit
                records = self._log.after(sent.lsn)
                if records is None:
                    return  # trimmed away: greet again
                for record in records:
                    await self._write(call, sent, record)
                    sent, told = Position(record.header.lsn, record.header.epoch), commit
                if not records and told < min(commit, sent.lsn):
                    told = commit
                    await call.write(encode(self._header(sent, commit)))
                elif not records:
                    await self._idle(reader)
            reader.result()
        finally:
            reader.cancel()

    def _check_row(self) -> None:
        """A learner is greeted anew under every row: it may have been dropped in between."""
        insync = self._slot.replica.insync
        if self._ref in insync.learners and insync.version != self._version:
            raise refuse("NOT_READY", f"the row of partition {self._slot.number} has changed")

    async def _idle(self, reader: asyncio.Future[None]) -> None:
        stirred = asyncio.ensure_future(self._slot.stirred(IDLE_S))
        await asyncio.wait({stirred, reader}, return_when=asyncio.FIRST_COMPLETED)
        stirred.cancel()
        if self._slot.replica.role is not Role.PRIMARY:
            raise refuse("NOT_PRIMARY", f"partition {self._slot.number} was deposed")

    async def _take_answers(self, call: Any) -> None:
        while True:
            answer = await self._read(call)
            self._acked(answer.acked_lsn)

    def _header(self, previous: Position, commit: int) -> rp.AppendHeader:
        return rp.AppendHeader(
            partition=self._slot.number,
            epoch=self._epoch,
            previous_lsn=previous.lsn,
            previous_epoch=previous.epoch,
            commit_lsn=commit,
        )

    async def _write(self, call: Any, previous: Position, record: Record) -> None:
        head = self._header(previous, self._slot.replica.commit)
        head.record.CopyFrom(record.body)
        head.record.partition = self._slot.number
        if not record.nbytes:
            await call.write(encode(head))
            return
        for at, piece in _pieces(record):
            last, small = at + piece.nbytes == record.nbytes, piece.nbytes < 1 << 17
            await call.write(await self._slot.compute(partial(_framed, head, piece, at, last), inline=small))
            head.ClearField("record")

    async def _install(self, channel: Any) -> None:
        """Ship one atomic cut; the stream that follows goes on from it."""
        async with self._out.pace.turn():
            await self._ship(channel)
        self.installed = True

    async def _ship(self, channel: Any) -> None:
        slot = self._slot
        slot.replica.pins[self._ref] = 0  # keep everything from here on, before the cut is made
        lsn, messages = await slot.lead(self._cut)
        slot.replica.pins[self._ref] = lsn
        nbytes = sum(map(len, messages))
        log.info("snapshot partition=%d to=%s lsn=%d bytes=%d", slot.number, self._ref.node, lsn, nbytes)
        install = channel.stream_unary(
            SERVICE + "Install", request_serializer=bytes, response_deserializer=rp.InstallResponse.FromString
        )
        pace = self._out.pace
        await install(pace.spaced(messages), timeout=INSTALL_S + pace.seconds(nbytes))

    def _cut(self) -> tuple[int, list[bytes]]:
        machine = self._slot.replica.machine
        first = self._greeting(rp.InstallHeader)
        first.state.CopyFrom(machine.capture())
        messages = [encode(first)]
        if isinstance(machine, Partition) and not machine.initialising:
            for part in machine.cut():
                whole = part.data
                for at in range(0, whole.nbytes, FRAME_BYTES):
                    piece = whole[at : at + FRAME_BYTES]
                    head = rp.InstallHeader(slot=part.slot, segment=part.segment, scalar=part.scalar)
                    head.frame.CopyFrom(_frame(piece, part.offset + at, last=False))
                    messages.append(encode(head, (piece,)))
        # The end is said: a stream that broke off looks to the other side as if it had ended.
        messages.append(encode(rp.InstallHeader(frame=_frame(memoryview(b""), 0, last=True))))
        return machine.log.lsn, messages


def _pieces(record: Record) -> Iterator[tuple[int, memoryview]]:
    """The payload in frames; a frame does not span two of its parts, so nothing is joined."""
    at = 0
    for part in record.payload:
        view = memoryview(part)
        for begin in range(0, view.nbytes, FRAME_BYTES):
            piece = view[begin : begin + FRAME_BYTES]
            yield at, piece
            at += piece.nbytes


def _framed(head: rp.AppendHeader, piece: memoryview, at: int, last: bool) -> bytes:
    """One message: its checksum and its one copy are made where large ones stall nobody."""
    head.frame.CopyFrom(_frame(piece, at, last=last))
    return encode(head, (piece,))


def _frame(piece: memoryview, at: int, *, last: bool) -> pb.Frame:
    return pb.Frame(
        offset=at,
        length=piece.nbytes,
        codec=pb.CODEC_NONE,
        checksum_kind=DEFAULT_CHECKSUM,
        checksum=checksum((piece,)),
        last=last,
    )
