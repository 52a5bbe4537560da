"""The Ledger service over the pure ledger, on one asyncio loop.

    service = LedgerService("default", 1, config)
    ledger_pb2_grpc.add_LedgerServicer_to_server(service, server)
    await service.evict(client_id, term, "exit report")      # the coordinator's order
    await service.fence([client_id])

    follower.serve(log.append, config, time.monotonic())     # promoted
    service = LedgerService("default", 1, config, ledger=follower, committed=log.committed)

A wait costs a future, not a thread: a call that the ledger answers with `Wait` sleeps until
its key is woken, and asks again. A long poll that is not resolved in `POLL_S`, or shortly
before the caller's own deadline, ends with WAITING_FOR_WORKERS, which names who is waited
for; the client repeats it.

With replicas the ledger applies what it decides at once, and every answer that tells of its
state, refusals too, leaves only when all records that the state is made of are committed: so
nothing that anybody was told is lost with this process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from paramesh.channel import check_header, grpc
from paramesh.errors import ParameshError, refuse
from paramesh.v1 import ledger_pb2 as pb
from paramesh.v1.types_pb2 import JobConfig

from paramesh_server.ledger import Ledger, LedgerCut, Wait
from paramesh_server.ledger_log import Key

log = logging.getLogger(__name__)

POLL_S = 20.0
"""Seconds of one long poll. Shorter costs calls, longer keeps dead callers' waits around."""

MARGIN_S = 0.5
"""Seconds before the caller's deadline at which its poll ends, so that the answer, which
names who is waited for, is there before gRPC's nameless DEADLINE_EXCEEDED."""

SAY_AFTER_S = 30.0
"""Seconds of a wait after which the log names who is waited for, and again each time."""

FORGET_AFTER_S = 60.0
"""Seconds after which a wait that nobody repeats is no longer one."""

T = TypeVar("T")


class _Waits:
    """Futures of sleeping calls by key, and since when each key is waited for."""

    def __init__(self, now: Callable[[], float]):
        self._now = now
        self._sleeping: dict[Key, set[asyncio.Future[None]]] = {}
        self._since: dict[Key, list[float]] = {}
        """For each key: since when it is waited for, when the log last said so, last seen."""

    async def sleep(self, key: Key, seconds: float) -> None:
        """Sleep until `key` is woken, or for so long."""
        future = asyncio.get_running_loop().create_future()
        self._sleeping.setdefault(key, set()).add(future)
        try:
            await asyncio.wait((future,), timeout=seconds)
        finally:
            sleeping = self._sleeping.get(key)
            if sleeping is not None:
                sleeping.discard(future)
                if not sleeping:
                    del self._sleeping[key]

    def wake(self, key: Key) -> None:
        """Let every call that sleeps on `key` ask again."""
        for future in self._sleeping.pop(key, ()):
            if not future.done():
                future.set_result(None)

    def wake_all(self) -> None:
        """Let every call ask again."""
        for key in list(self._sleeping):
            self.wake(key)

    def __len__(self) -> int:
        return sum(len(sleeping) for sleeping in self._sleeping.values())

    def note(self, wait: Wait) -> None:
        """Note a wait, over repeated polls; name who is waited for when it is long."""
        now = self._now()
        since = self._since.setdefault(wait.key, [now, now, now])
        since[2] = now
        if now - since[1] >= SAY_AFTER_S:
            since[1] = now
            ranks = ",".join(map(str, wait.who())) or "nobody in particular"
            log.warning("long wait what=%r seconds=%.0f waiting_for_ranks=%s", wait.what, now - since[0], ranks)

    def over(self, key: Key) -> None:
        """Forget a wait that was resolved, and those that nobody repeats."""
        self._since.pop(key, None)
        horizon = self._now() - FORGET_AFTER_S
        for stale in [k for k, since in self._since.items() if since[2] < horizon]:
            del self._since[stale]

    def until_said(self, key: Key) -> float:
        """Seconds until a wait is long enough to be named."""
        since = self._since.get(key)
        return SAY_AFTER_S if since is None else max(0.1, since[1] + SAY_AFTER_S - self._now())


class LedgerService:
    """Serves one job's ledger. Lives on one event loop; made and called there.

    Args:
        job: the cluster's name; other requests are refused WRONG_CLUSTER.
        generation: the job's restore counter; older requests are refused OLD_GENERATION.
        config: the job's settings; `update_config` replaces them.
        ledger: one that serves already (see `Ledger.serve`); None: a fresh one without replicas.
        committed: called with the ledger's lsn at which an answer was formed, before anything
            else happens; returns when every in-sync replica has the log up to there, and raises
            NOT_PRIMARY or NOT_READY when that will not come about here. None: no replicas.
        now: seconds of a clock that only rises; that of `Ledger.serve`.

    Attributes:
        ledger: the pure core, for tests and status.
    """

    def __init__(
        self,
        job: str,
        generation: int,
        config: JobConfig,
        *,
        ledger: Ledger | None = None,
        committed: Callable[[int], Awaitable[None]] | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        if ledger is not None and ledger.following:
            raise ValueError("the ledger still follows another: Ledger.serve comes first")
        self.ledger = ledger or Ledger(config)
        self._committed = committed
        self._job = job
        self._generation = generation
        self._now = now
        self._waits = _Waits(now)
        self._woken: frozenset[Key] = frozenset()
        """What the core's last event woke; whoever caused it does not sleep yet."""
        self._term = 0
        """The highest coordinator term seen; lower ones are refused."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._closed = False
        self.cut: LedgerCut | None = None
        """The newest checkpoint's cut, from the event that decided its step."""
        if ledger is not None:
            self.update_config(config)
            log.info("ledger promoted generation=%d %s", generation, ledger.summary())

    # ------------------------------------------------------------------ the server's side

    def update_config(self, config: JobConfig) -> None:
        """Adopt the job's settings as the map has them now."""
        self._act(lambda now: self.ledger.update_config(config, now))

    async def evict(self, client_id: int, term: int, why: str) -> bool:
        """Take a dead client out, for ever; by order of the coordinator. Repeatable.

        Args:
            client_id: the client.
            term: the coordinator's.
            why: for people.

        Returns:
            Whether it was a member until now.

        Raises:
            StateRefused: STALE_TERM.
            RequestRefused: MISSING_FIELD.
            Retryable: NOT_PRIMARY, NOT_READY; it may have come about or not.
        """
        if term < self._term:
            raise refuse("STALE_TERM", f"term {term} is over, term {self._term} is in charge", term=self._term)
        self._term = term
        was_member = await self._released(lambda now: self.ledger.evict(client_id, why, now))
        if was_member:
            log.info("evicted client_id=%d term=%d why=%r", client_id, term, why[:200])
        return was_member

    async def fence(self, client_ids: Sequence[int]) -> None:
        """Refuse clients for ever; a FENCE may come without an Evict before it. Repeatable.

        Raises:
            RequestRefused: MISSING_FIELD.
            Retryable: NOT_PRIMARY, NOT_READY; it may have come about or not.
        """
        await self._released(lambda now: [self.ledger.evict(client_id, "fenced", now) for client_id in client_ids])

    def pause_clocks(self, checkpoint: str) -> tuple[bool, tuple[int, ...]]:
        """As `Ledger.pause_clocks`."""
        self._check_open()
        return self._act(lambda now: self.ledger.pause_clocks(checkpoint, now))

    def resume_clocks(self, checkpoint: str) -> tuple[bool, list[int]]:
        """As `Ledger.resume_clocks`; not refused by a ledger that has moved away: nobody waits there."""
        return self._act(lambda now: self.ledger.resume_clocks(checkpoint, now))

    async def close(self) -> None:
        """Decide nothing any more; every call that waits, and every later one, is refused NOT_PRIMARY.

        Calls whose answers wait for their records to be committed are `committed`'s to end.
        """
        self._closed = True
        self._schedule()
        self._waits.wake_all()

    # ------------------------------------------------------------------ driving the core

    def _act(self, event: Callable[[float], T]) -> T:
        """Give the core one event; do what follows from it, also when it refuses."""
        try:
            return event(self._now())
        finally:
            self._woken = frozenset(self.ledger.take_woken())
            for key in sorted(self._woken, key=str):  # the same order everywhere, as strings hash in each process anew
                self._waits.wake(key)
            self.cut = self.ledger.take_cut() or self.cut
            for notice in self.ledger.take_notices():
                log.warning("ledger %s", notice)
            self._schedule()

    def _schedule(self) -> None:
        """Have `_tick` run when the core next has something to do by itself."""
        at = self.ledger.next_deadline()
        if at is None or self._closed:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            return
        if self._timer is not None:
            if self._timer_at == at:
                return
            self._timer.cancel()
        self._timer_at = at
        delay = max(0.0, at - self._now())
        self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        try:
            self._check_open()
            self._act(self.ledger.tick)
        except ParameshError as error:
            # The log takes nothing any more: this server is no primary, and is about to hear of it.
            log.warning("ledger stops reason=%s: %s", error.reason, error)
            self._closed = True
            self._schedule()
            self._waits.wake_all()

    async def _released(self, event: Callable[[float], T]) -> T:
        """Give the core one event; its answer, or its refusal, when that may be known.

        Raises:
            Retryable: NOT_PRIMARY, NOT_READY.
        """
        self._check_open()
        try:
            answer = self._act(event)
        except ParameshError:
            await self._release()
            raise
        await self._release()
        return answer

    async def _release(self) -> None:
        """Return when everything that the ledger's state now reflects is committed."""
        if self._committed is not None:
            await self._committed(self.ledger.lsn)

    def _check_open(self) -> None:
        # A successor's records may come before the map that names it: what they make of this ledger decides nothing.
        if self._closed or self.ledger.following:
            raise refuse("NOT_PRIMARY", "the ledger has moved to another server")

    async def _until(self, context: Any, ask: Callable[[float], T | Wait]) -> T:
        """Ask, and ask again whenever it may have changed, until there is an answer.

        Raises:
            Retryable: WAITING_FOR_WORKERS, metadata `ranks` and `what`; NOT_PRIMARY, NOT_READY.
        """
        remaining = context.time_remaining() if context is not None else None
        patience = POLL_S if remaining is None else min(POLL_S, remaining - MARGIN_S)
        deadline = self._now() + patience
        waited: Key | None = None
        while True:
            self._check_open()  # also after each sleep: who is no primary must not decide
            try:
                answer = self._act(ask)
            except ParameshError:
                if waited is not None:
                    self._waits.over(waited)
                await self._release()
                raise
            if waited is not None and not (isinstance(answer, Wait) and answer.key == waited):
                self._waits.over(waited)
            if not isinstance(answer, Wait):
                await self._release()
                return answer
            waited = answer.key
            self._waits.note(answer)
            left = deadline - self._now()
            if left <= 0:
                late = _not_yet(answer)
                await self._release()
                raise late
            if answer.key in self._woken:  # asking brought it about (its worker is BETWEEN now): nobody wakes us
                await asyncio.sleep(0)
                continue
            await self._waits.sleep(answer.key, min(left, self._waits.until_said(answer.key)))

    def _check(self, request: Any) -> None:
        check_header(request.request, self._job, self._generation)

    async def _wait_for(self, method: Callable[[Any, float], T | Wait], request: Any, context: Any) -> T:
        self._check(request)
        return await self._until(context, lambda now: method(request, now))

    async def _answer(self, method: Callable[[Any, float], T], request: Any) -> T:
        self._check(request)
        return await self._released(lambda now: method(request, now))

    # ------------------------------------------------------------------ the service

    async def Join(self, request: pb.JoinRequest, context: grpc.aio.ServicerContext) -> pb.JoinResponse:
        """Make a client a member. EVICTED if it was evicted."""
        response = await self._answer(self.ledger.join, request)
        log.info("joined client_id=%d rank=%d slot=%s", request.request.client_id, response.rank, request.slot)
        return response

    async def Leave(self, request: pb.LeaveRequest, context: grpc.aio.ServicerContext) -> pb.LeaveResponse:
        """Take a member out gracefully."""
        response = await self._answer(self.ledger.leave, request)
        log.info("left client_id=%d", request.request.client_id)
        return response

    async def SetActivity(
        self, request: pb.SetActivityRequest, context: grpc.aio.ServicerContext
    ) -> pb.SetActivityResponse:
        """Make a member ACTIVE, BETWEEN or IDLE."""
        return await self._answer(self.ledger.set_activity, request)

    async def OpenGroup(self, request: pb.OpenGroupRequest, context: grpc.aio.ServicerContext) -> pb.OpenGroupResponse:
        """Declare a table group."""
        return await self._answer(self.ledger.open_group, request)

    async def AwaitInit(self, request: pb.AwaitInitRequest, context: grpc.aio.ServicerContext) -> pb.AwaitInitResponse:
        """Wait until first values are committed, or the caller owns them."""
        return await self._wait_for(self.ledger.await_init, request, context)

    async def CommitInit(
        self, request: pb.CommitInitRequest, context: grpc.aio.ServicerContext
    ) -> pb.CommitInitResponse:
        """Note that first values are in every partition."""
        return await self._answer(self.ledger.commit_init, request)

    async def Ready(self, request: pb.ReadyRequest, context: grpc.aio.ServicerContext) -> pb.ReadyResponse:
        """Wait for a step's decision."""
        return await self._wait_for(self.ledger.ready, request, context)

    async def Clip(self, request: pb.ClipRequest, context: grpc.aio.ServicerContext) -> pb.ClipResponse:
        """Wait for a step's clip factor."""
        return await self._wait_for(self.ledger.clip, request, context)

    async def Clock(self, request: pb.ClockRequest, context: grpc.aio.ServicerContext) -> pb.ClockResponse:
        """Wait until the next clock may start."""
        return await self._wait_for(self.ledger.clock, request, context)

    async def GetSteps(self, request: pb.GetStepsRequest, context: grpc.aio.ServicerContext) -> pb.GetStepsResponse:
        """Decided steps."""
        return await self._answer(self.ledger.get_steps, request)

    async def ReportMissing(
        self, request: pb.ReportMissingRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReportMissingResponse:
        """Which contributions a partition may go without."""
        return await self._answer(self.ledger.report_missing, request)

    async def Lease(self, request: pb.LeaseRequest, context: grpc.aio.ServicerContext) -> pb.LeaseResponse:
        """Ranges of samples, or the end of the epoch."""
        return await self._wait_for(self.ledger.lease, request, context)

    async def ReturnLeases(
        self, request: pb.ReturnLeasesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReturnLeasesResponse:
        """Take back what was not trained on."""
        return await self._answer(self.ledger.return_leases, request)

    async def PutState(self, request: pb.PutStateRequest, context: grpc.aio.ServicerContext) -> pb.PutStateResponse:
        """Keep small state."""
        return await self._answer(self.ledger.put_state, request)

    async def GetState(self, request: pb.GetStateRequest, context: grpc.aio.ServicerContext) -> pb.GetStateResponse:
        """Small state."""
        return await self._answer(self.ledger.get_state, request)

    async def Gather(self, request: pb.GatherRequest, context: grpc.aio.ServicerContext) -> pb.GatherResponse:
        """Barrier and mean."""
        return await self._wait_for(self.ledger.gather, request, context)

    async def Report(self, request: pb.ReportRequest, context: grpc.aio.ServicerContext) -> pb.ReportResponse:
        """Note progress figures."""
        return await self._answer(self.ledger.report, request)

    async def LedgerStatus(
        self, request: pb.LedgerStatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.LedgerStatusResponse:
        """What psctl and ps-run show."""
        self._check(request)
        return await self._released(self.ledger.status)


def _not_yet(wait: Wait) -> ParameshError:
    """The refusal of a long poll that ends without an answer."""
    ranks = ",".join(map(str, wait.who()))
    whom = f"ranks {ranks}" if ranks else "other workers"
    return refuse("WAITING_FOR_WORKERS", f"{wait.what} waits for {whom}", what=wait.what, ranks=ranks)
