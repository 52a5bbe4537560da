"""The data plane: framed requests in, partitions' answers out.

Every request is checked in one order: protocol, job, generation, partition, epoch, client,
payload. What one partition refuses is told in its outcome; the others of the same call go
on. Copies of a pushed byte: gRPC's into Python, none here until the sum reads it in place.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from paramesh import hyper
from paramesh.bounds import RETRY_MS
from paramesh.channel import check_header, grpc
from paramesh.errors import ParameshError, refuse
from paramesh.framing import Framed
from paramesh.retry import CONSUMED
from paramesh.status import detail_of
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

from paramesh_server.counters import Counters
from paramesh_server.decisions import for_one_thread
from paramesh_server.partition import Partition
from paramesh_server.process import rss_bytes
from paramesh_server.receiving import ASSIGN_COPIES, Gathering, Incoming, InFlight, contribution_of, writes_of
from paramesh_server.requests import Outcome, StagedAt, Update
from paramesh_server.room import Room
from paramesh_server.shards import Held, Shards
from paramesh_server.staging import Contribution

H = TypeVar("H", ps.PushHeader, ps.AssignHeader)

GAP_S = 1.0
"""How long a push that came before its predecessor is held: several round trips."""

_OF_RELEASE = frozenset({"NOT_PRIMARY", "NOT_ENOUGH_REPLICAS"})
"""Reasons of `Slot.released` itself: waiting once more would say the same, later."""


class PlaneLimits(NamedTuple):
    """How much the data plane takes on at once."""

    in_flight_bytes: int
    """Of payloads that are not staged or applied yet."""
    queue: int
    """Pieces of work that wait for one partition."""
    lag_bytes: int
    """Of one partition's records that its followers do not have."""


class Formed(NamedTuple):
    """Where an answer was formed: by this replica, in this reign of it."""

    held: Held
    reign: int
    early: bool = False
    """The answer is about an update that its table acknowledges early."""

    async def released(self, *, kept: bool = False) -> None:
        """Wait until all that the replica has appended so far is committed, or may be shown.

        Args:
            kept: the answer acknowledges a write.

        Raises:
            Retryable: NOT_PRIMARY, NOT_ENOUGH_REPLICAS.
        """
        await self.held.released(self.held.partition.log.lsn, self.reign, early=self.early, kept=kept)


class DataPlane:
    """The requests of `ParameterServer` that write, and the small ones.

    Args:
        job: this cluster's name.
        generation: this job's generation now; 0 while unknown.
        shards: the partitions of this process.
        counters: what is counted.
        limits: how much at once.
        room: whether there is memory for new clients.
    """

    def __init__(
        self,
        job: str,
        generation: Callable[[], int],
        shards: Shards,
        counters: Counters,
        limits: PlaneLimits,
        room: Room,
    ) -> None:
        self._job = job
        self._generation = generation
        self._shards = shards
        self._counters = counters
        self._limits = limits
        self._room = room
        self._in_flight = InFlight(counters, limits.in_flight_bytes)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.ledger_info: Callable[[], ps.PartitionInfo | None] = lambda: None
        """What `Inspect` says of partition 0, if it is asked for by number."""

    def check(self, request: pb.RequestHeader) -> None:
        """Refuse another protocol, job or generation.

        Raises:
            StateRefused: VERSION, WRONG_CLUSTER, OLD_GENERATION.
        """
        check_header(request, self._job, self._generation())

    async def find(self, partition: int, epoch: int) -> Held:
        """The partition, at the epoch that the request was routed by.

        Raises:
            ParameshError: WRONG_PARTITION, NOT_PRIMARY, NOT_READY, STALE_EPOCH, UNKNOWN_EPOCH, OVERLOADED.
        """
        held = await self._shards.find(partition, epoch)
        held.partition.check_epoch(epoch)
        if held.queue >= self._limits.queue:
            raise refuse(
                "OVERLOADED",
                f"{held.queue} requests wait for partition {partition} (--max-queue)",
                retry_after_ms=RETRY_MS,
            )
        return held

    def detail(self, error: Exception, where: str) -> pb.ErrorDetail:
        """An error inside an answer, counted."""
        detail = detail_of(error, where)
        self._counters.refused[detail.reason] += 1
        return detail

    # Push and Assign.

    async def Push(
        self, requests: AsyncIterator[Framed[ps.PushHeader]], context: grpc.aio.ServicerContext
    ) -> ps.PushResponse:
        """Stage or apply what a stream brings; one outcome per partition."""
        gathering: Gathering[ps.PushHeader] = Gathering(self._in_flight, partial(self._bound, 1))
        return ps.PushResponse(outcomes=await self._receive(requests, gathering, self._push))

    async def Assign(
        self, requests: AsyncIterator[Framed[ps.AssignHeader]], context: grpc.aio.ServicerContext
    ) -> ps.AssignResponse:
        """Write values or optimizer state; one outcome per partition."""
        gathering: Gathering[ps.AssignHeader] = Gathering(self._in_flight, partial(self._bound, ASSIGN_COPIES))
        return ps.AssignResponse(outcomes=await self._receive(requests, gathering, self._assign))

    def _bound(self, copies: int, partition: int) -> int | None:
        held = self._shards.held.get(partition)
        if held is None:
            return None
        layout = held.partition.layout
        # Scalars of an honest assign are 8 bytes each, a few per segment.
        return copies * (layout.nbytes + (64 * len(layout.segments) if copies > 1 else 0))

    async def _receive(
        self,
        requests: AsyncIterator[Framed[H]],
        gathering: Gathering[H],
        handle: Callable[[Held, int, Incoming[H]], Awaitable[Outcome]],
    ) -> Sequence[ps.PartitionOutcome]:
        """Handle each partition as soon as its last frame is here."""
        client = 0
        committed: list[pb.StepRecord] = []
        tasks: list[asyncio.Task[ps.PartitionOutcome]] = []
        try:
            async for framed in requests:
                if not client:
                    self.check(framed.header.request)
                    client = _client(framed.header.request)
                if isinstance(framed.header, ps.PushHeader) and not framed.header.HasField("frame"):
                    committed.extend(framed.header.committed)  # a preamble: for all partitions that follow
                    continue
                await self._make_way(framed.payload.nbytes, tasks)
                done = gathering.take(framed)
                if done is not None:
                    if isinstance(done.first, ps.PushHeader):
                        done.first.committed.extend(committed)
                    tasks.append(self._spawn(self._outcome(client, done, handle)))
            for rest in gathering.unfinished():
                tasks.append(self._spawn(self._outcome(client, rest, self._cut_short)))
            # Shielded: what is complete is handled even if the caller goes away.
            return await asyncio.shield(asyncio.gather(*tasks))
        finally:
            gathering.drop()

    async def _make_way(self, nbytes: int, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """Wait for what this stream itself has brought, if a frame would pass the limit of bytes in flight.

        Its sender is held up meanwhile. A stream that has nothing to wait for is refused: bytes that
        others hold may be waiting for this one's.
        """
        while self._in_flight.full(nbytes) and (running := [task for task in tasks if not task.done()]):
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    def _spawn(self, work: Coroutine[Any, Any, ps.PartitionOutcome]) -> asyncio.Task[ps.PartitionOutcome]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _outcome(
        self,
        client: int,
        incoming: Incoming[H],
        handle: Callable[[Held, int, Incoming[H]], Awaitable[Outcome]],
    ) -> ps.PartitionOutcome:
        """One partition's answer; never raises."""
        answer = ps.PartitionOutcome(partition=incoming.first.partition)
        formed: Formed | None = None
        try:
            held = await self.find(incoming.first.partition, incoming.first.epoch)
            sequenced = isinstance(incoming.first, ps.PushHeader) and incoming.first.HasField("sequenced")
            formed = Formed(held, held.replica.reign, sequenced and held.early)
            self._room.check_client(client)
            held.check_lag(self._limits.lag_bytes)
            outcome = await handle(held, client, incoming)
            partition = held.partition
            answer.lsn, answer.duplicate, answer.lost = outcome.lsn, outcome.duplicate, outcome.lost
            answer.epoch, answer.applied_step = partition.epoch, partition.applied_step
            await formed.released(kept=True)  # also what it says of steps must be in every log
            self._counters.duplicates += outcome.duplicate
            self._room.know(client)
        except Exception as error:
            answer.Clear()
            answer.partition = incoming.first.partition
            answer.error.CopyFrom(await self.refusal(error, formed, answer.partition))
            seen = self._shards.held.get(answer.partition)
            if seen is not None and seen.replica.serving:
                answer.epoch, answer.applied_step = seen.partition.epoch, seen.partition.applied_step
        finally:
            self._in_flight.give(incoming.nbytes)
        return answer

    async def refusal(self, error: Exception, formed: Formed | None, partition: int) -> pb.ErrorDetail:
        """A refusal as it travels: what leans on records that are not committed waits for them, like any answer.

        Args:
            error: the refusal.
            formed: by which replica; None: it was refused before any was asked.
            partition: for people.
        """
        if formed is not None and getattr(error, "reason", "") not in _OF_RELEASE:
            try:
                await formed.released()
            except ParameshError as newer:
                error = newer
        return self.detail(error, f"partition {partition}")

    async def _cut_short(self, held: Held, client: int, incoming: Incoming[Any]) -> Outcome:
        """Refuse what has no last frame, changing nothing: no NOOP either.

        gRPC may end the requests as if the caller had finished when it went away in the
        middle; it sends the same seq again, whole.
        """
        raise refuse("MISSING_FIELD", "the stream ended before the partition's last frame", field="last")

    async def _push(self, held: Held, client: int, incoming: Incoming[ps.PushHeader]) -> Outcome:
        held.check_writable()
        kind = incoming.first.WhichOneof("key")
        if kind == "staged":
            outcome = await self._stage(held, client, incoming)
        elif kind == "sequenced":
            outcome = await self._update(held, client, incoming)
        else:
            raise refuse("MISSING_FIELD", "a push is staged or sequenced; the first frame says neither", field="key")
        self._counters.pushes += not outcome.duplicate
        return outcome

    async def _stage(self, held: Held, client: int, incoming: Incoming[ps.PushHeader]) -> Outcome:
        partition, first = held.partition, incoming.first
        if incoming.error is not None:
            raise incoming.error
        contribution = await held.compute(partial(contribution_of, partition.layout, incoming))
        at = StagedAt(first.staged.group, first.staged.step, first.staged.attempt)
        committed = list(first.committed)
        # Holding a view is instant; only a decision to apply is worth the pool.
        inline = True if all(r.step < partition.applied_step for r in committed) else None
        return await held.write(lambda: held.partition.stage(client, at, contribution, committed), inline=inline)

    async def _update(self, held: Held, client: int, incoming: Incoming[ps.PushHeader]) -> Outcome:
        partition, key = held.partition, incoming.first.sequenced
        update = Update(key.seq, {}, key.skip, acked=key.acked_through)
        contribution: Contribution | ParameshError
        try:
            if incoming.error is not None:
                raise incoming.error
            update = Update(key.seq, _changes(partition, key), key.skip, _scale(key), key.acked_through)
            contribution = await held.compute(partial(contribution_of, partition.layout, incoming))
        except ParameshError as error:
            if error.reason not in CONSUMED:
                raise  # damaged on the way: the same seq comes again, whole
            contribution = error  # what cannot ever fit consumes its seq
        deadline = time.monotonic() + GAP_S
        while True:
            outcome = await held.write(lambda: held.partition.push(client, update, contribution))
            if not outcome.held:
                return outcome
            if not await held.changed(deadline - time.monotonic()):
                raise refuse("SEQ_GAP", f"seq {update.seq} came, an earlier one of client {client} did not")

    async def _assign(self, held: Held, client: int, incoming: Incoming[ps.AssignHeader]) -> Outcome:
        first = incoming.first
        if incoming.error is not None:
            raise incoming.error
        held.check_writable()
        writes = await held.compute(partial(writes_of, incoming))
        return await held.write(lambda: held.partition.assign(client, first.assign_id, writes, first.init_attempt))

    # Norms, Inspect, Fence.

    async def Norms(self, request: ps.NormsRequest, context: grpc.aio.ServicerContext) -> ps.NormsResponse:
        """Squared norms of a decided step, one per partition."""
        self.check(request.request)
        norms = await asyncio.gather(*(self._norm(asked, request) for asked in request.partitions))
        return ps.NormsResponse(norms=norms)

    async def _norm(self, asked: ps.PartitionPull, request: ps.NormsRequest) -> ps.PartitionNorm:
        formed: Formed | None = None
        try:
            held = await self.find(asked.partition, asked.epoch)
            formed = Formed(held, held.replica.reign)
            value = await held.lead(partial(_norm_of, held, for_one_thread(request.committed)))
            await formed.released()
            return ps.PartitionNorm(partition=asked.partition, squared_norm=value)
        except Exception as error:
            detail = await self.refusal(error, formed, asked.partition)
            return ps.PartitionNorm(partition=asked.partition, error=detail)

    async def Inspect(self, request: ps.InspectRequest, context: grpc.aio.ServicerContext) -> ps.InspectResponse:
        """What the partitions of this process are at. Those that are not here are left out."""
        self.check(request.request)
        numbers = list(request.partitions) or sorted(self._shards.held)
        here = [held for number in numbers if (held := self._shards.held.get(number)) and held.replica.serving]
        infos = [info for number in request.partitions if not number and (info := self.ledger_info()) is not None]
        for held in here:
            with _unless_gone():
                infos.append(await held.run(partial(_info, held.partition, request.state_hash)))
        return ps.InspectResponse(partitions=infos, threads=threading.active_count(), rss_bytes=rss_bytes())

    async def fence(self, clients: Sequence[int]) -> int:
        """Forbid clients in every partition of this process; how many partitions there are."""

        def forbid(partition: Partition) -> None:
            for client in clients:
                partition.fence(client)

        self._shards.fenced.update(clients)
        self._room.forget(clients)
        done = 0
        for held in list(self._shards.held.values()):
            with _unless_gone():
                formed = Formed(held, held.replica.reign)
                await held.lead(partial(_on, held, forbid), inline=True)
                await formed.released()
                done += 1
        return done


def _norm_of(held: Held, committed: list[pb.StepRecord]) -> float:
    held.commit(committed[:-1])
    return held.partition.norm(committed)


def _on(held: Held, work: Callable[[Partition], None]) -> None:
    work(held.partition)


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    """Pass over a partition that this process gave up meanwhile."""
    try:
        yield
    except ParameshError as error:
        if error.reason != "NOT_PRIMARY":
            raise


def _client(request: pb.RequestHeader) -> int:
    if not request.client_id:
        raise refuse("MISSING_FIELD", "client_id is 0: register as a client first", field="client_id")
    return request.client_id


def _changes(partition: Partition, key: ps.SequenceKey) -> dict[str, hyper.Value]:
    merged: dict[str, hyper.Value] = {}
    for change in key.hyper_parameters:
        if change.table_id == partition.table_id:
            merged.update(hyper.from_protos(change.hyper_parameters))
    return merged


def _scale(key: ps.SequenceKey) -> float:
    if not math.isfinite(key.grad_scale):
        raise refuse("WEIGHT", f"grad_scale {key.grad_scale} is not finite", weight=key.grad_scale)
    return key.grad_scale or 1.0


def _info(partition: Partition, state_hash: bool) -> ps.PartitionInfo:
    return ps.PartitionInfo(
        partition=partition.id,
        epoch=partition.epoch,
        lsn=partition.log.lsn,
        applied_step=partition.applied_step,
        state_hash=partition.state_hash() if state_hash else b"",
        value_bytes=partition.layout.nbytes,
        optimizer_bytes=partition.optimizer.nbytes,
        staged_bytes=partition.staging.nbytes,
        pushes=partition.pushes,
        duplicates=partition.duplicates,
        initialising=partition.initialising,
        lost=partition.lost,
    )
