"""The supervisor's tie to the coordinator: registration, heartbeats, exit reports.

    link = CoordinatorLink(addresses=["127.0.0.1:7070"], job="default", name="host-a", ...)
    await link.start(patience_s=30)           # registered; from now on it beats
    await link.report_exit("host-a/0", -9)    # positive death: survivors need not wait for silence
    await link.close()                        # says goodbye

A coordinator that goes away is waited for without end: training goes on without it. When it is back
and does not know us, we register again, under the same incarnation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from paramesh.channel import aio_channel, grpc, header
from paramesh.errors import Action, ParameshError, refuse
from paramesh.retry import Backoff
from paramesh.rotation import CAP_S, NEXT_S, Rotation, elsewhere
from paramesh.security import PLAIN, Security
from paramesh.status import from_rpc_error
from paramesh.v1 import coordinator_pb2 as pb
from paramesh.v1 import coordinator_pb2_grpc as stubs

__all__ = ["CoordinatorLink"]

log = logging.getLogger(__name__)

CALL_S = 2.0
"""Deadline of one unary call: the coordinator answers within milliseconds or is not there."""

SAY_EVERY_S = 5.0
"""How often a wait for the coordinator is mentioned."""

NAME_PATIENCE_S = 6.0
"""How long a name that is taken is asked for again. A supervisor that was killed and started anew finds
its own name alive until the coordinator has noticed the silence: 2 s, more after a restart of its own."""

REPORT_PATIENCE_S = 5.0
"""How long an exit report is repeated while its slot waits. Later it must not arrive at all: the slot's next
process would be taken for the dead one."""

_UNREACHABLE = frozenset({"UNREACHABLE", "DEADLINE", "STALE_TERM"})

Answer = TypeVar("Answer")


class CoordinatorLink:
    """Registers a host, beats for its processes, reports their ends."""

    def __init__(
        self,
        *,
        addresses: Sequence[str],
        job: str,
        name: str,
        incarnation: int,
        slots: int,
        host_id: str,
        security: Security = PLAIN,
    ):
        self._security = security
        self._turns = Rotation(",".join(addresses))
        self._job = job
        self._name = name
        self._incarnation = incarnation
        self._slots = slots
        self._host_id = host_id
        self._generation = 0
        """The job's, from the last registration; 0 before the first."""
        self._interval_s = 0.5
        self._timeout_s = 2.0
        self._channels: dict[str, tuple[grpc.aio.Channel, stubs.MembershipStub]] = {}
        """One per address, with their own connections: beats never queue behind other traffic."""
        self._beating: asyncio.Task[None] | None = None
        self.registered = 0
        """How many registrations succeeded; more than 1 means that the coordinator had forgotten us."""

    async def start(self, patience_s: float) -> None:
        """Register, and start to beat.

        Args:
            patience_s: how long to look for a coordinator that does not answer.

        Raises:
            ParameshError: it did not answer in time (UNREACHABLE), or refused us.
        """
        await self._register_patiently(patience_s)
        self._beating = asyncio.create_task(self._beat_forever(), name="heartbeats")

    @property
    def failure_timeout_s(self) -> float:
        """Seconds of silence after which the coordinator holds a node for dead."""
        return self._timeout_s

    async def report_exit(
        self, slot: str, exit_code: int, patience_s: float = REPORT_PATIENCE_S, *, quietly: bool = False
    ) -> bool:
        """Say that a slot's process has ended; repeat until it is confirmed.

        Args:
            slot: the process's place.
            exit_code: as Python's returncode; `stops.STOPPED_EXIT_CODE` for one that is stopped.
            patience_s: how long to repeat it; the slot waits meanwhile.
            quietly: say nothing of a coordinator that does not answer; the caller tries again.

        Returns:
            Whether the coordinator has confirmed it.
        """
        request = pb.ReportExitRequest(
            kind=pb.NODE_KIND_CLIENT,
            name=self._name,
            incarnation=self._incarnation,
            slot=slot,
            exit_code=exit_code,
        )
        deadline = time.monotonic() + patience_s
        backoff = Backoff(cap=0.5)
        while True:
            # A registration in between may have told us a newer generation.
            request.request.CopyFrom(header(self._job, self._generation))
            try:
                await self._call(lambda stub: stub.ReportExit(request, timeout=CALL_S))
                return True
            except ParameshError as error:
                if error.action is not Action.BACK_OFF and error.reason not in _UNREACHABLE:
                    log.warning("exit_report=refused slot=%s reason=%s: %s", slot, error.reason, error)
                    return False
            if time.monotonic() >= deadline:
                level = logging.DEBUG if quietly else logging.WARNING
                log.log(level, "exit_report=undelivered slot=%s: the coordinator does not answer", slot)
                return False
            await asyncio.sleep(backoff.next())

    async def close(self) -> None:
        """Stop to beat and say goodbye; a coordinator that is away is not waited for."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait({self._beating}, timeout=1.0)
            request = pb.DeregisterRequest(
                request=header(self._job, self._generation),
                kind=pb.NODE_KIND_HOST,
                name=self._name,
                incarnation=self._incarnation,
            )
            with contextlib.suppress(ParameshError):
                await self._call(lambda stub: stub.Deregister(request, timeout=CALL_S))
        for channel, _ in self._channels.values():
            await channel.close()
        self._channels.clear()

    # Registration.

    async def _register_patiently(self, patience_s: float) -> None:
        started = time.monotonic()
        said = started
        backoff = Backoff(cap=1.0)
        while True:
            try:
                return await self._register()
            except ParameshError as error:
                now = time.monotonic()
                waited_s = now - started
                if not self._worth_waiting(error, waited_s, patience_s):
                    raise self._explained(error, waited_s) from error
                if now - said >= SAY_EVERY_S:
                    said = now
                    log.warning(
                        "waiting for the coordinator at %s: %s (%.0f s of %.0f s)",
                        ",".join(self._turns.addresses), error, waited_s, patience_s,
                    )  # fmt: skip
            await asyncio.sleep(backoff.next())

    @staticmethod
    def _worth_waiting(error: ParameshError, waited_s: float, patience_s: float) -> bool:
        if error.reason == "NODE_NAME":
            return waited_s < min(NAME_PATIENCE_S, patience_s)
        passing = error.reason in _UNREACHABLE or error.action is Action.BACK_OFF
        return passing and waited_s < patience_s

    def _explained(self, error: ParameshError, waited_s: float) -> ParameshError:
        """The error with what to do about it."""
        where = ",".join(self._turns.addresses)
        if error.reason in _UNREACHABLE:
            return refuse(
                "UNREACHABLE",
                f"no coordinator answers at {where} after {waited_s:.0f} s: is `ps-coordinator` running there,"
                f" and is --coordinator right? Last answer: {error}",
            )
        if error.reason == "NODE_NAME":
            return refuse("NODE_NAME", f"{error}; give this supervisor another name with --name")
        return error

    async def _register(self) -> None:
        request = pb.RegisterHostRequest(
            request=header(self._job),
            name=self._name,
            incarnation=self._incarnation,
            host_id=self._host_id,
            slots=self._slots,
        )
        answer = await self._call(lambda stub: stub.RegisterHost(request, timeout=CALL_S))
        self._generation = answer.generation
        self._interval_s = (answer.heartbeat_interval_ms or 500) / 1000
        self._timeout_s = (answer.failure_timeout_ms or 2000) / 1000
        self.registered += 1
        log.info(
            "registered host=%s coordinator=%s term=%d generation=%d",
            self._name, self._turns.address, answer.term, answer.generation,
        )  # fmt: skip

    # Heartbeats.

    async def _beat_forever(self) -> None:
        backoff = Backoff(first=0.1, cap=CAP_S)
        away = False
        while True:
            wait: float | None = None
            try:
                # Closed at once when registering fails, so that no second stream beats beside the next.
                async with contextlib.aclosing(self._beats()) as answers:
                    async for unknown in answers:
                        if away:
                            log.info("coordinator=back")
                        away, backoff = False, Backoff(first=0.1, cap=CAP_S)
                        self._turns.succeeded()
                        if unknown:
                            log.warning("the coordinator does not know host=%s; registering again", self._name)
                            await self._register()
            except ParameshError as error:
                if not away:
                    log.warning("coordinator=away; training goes on, heartbeats are retried: %s", error)
                away = True
                wait = self._turns.failed(error)
            await asyncio.sleep(backoff.next() if wait is None else max(wait, NEXT_S))

    async def _beats(self) -> AsyncGenerator[bool, None]:
        """Beat on one stream until it breaks; yields, for each answer, whether we are unknown.

        Raises:
            ParameshError: the stream broke or fell silent.
        """
        call = self._stub().Heartbeat()
        writing = asyncio.create_task(self._write_beats(call, beat := _Echo()))
        try:
            while True:
                try:
                    # Not wait_for: before Python 3.12 it may swallow a cancellation, and `close` would hang.
                    async with asyncio.timeout(self._timeout_s):
                        answer = await call.read()
                except TimeoutError:
                    raise refuse("DEADLINE", f"no answer to heartbeats for {self._timeout_s:g} s") from None
                if answer is grpc.aio.EOF:
                    raise refuse("UNREACHABLE", "the coordinator ended the heartbeat stream")
                beat.nonce = answer.nonce
                yield answer.unknown
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._turns.address) from None
        finally:
            writing.cancel()
            call.cancel()

    async def _write_beats(self, call: Any, echo: _Echo) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                await call.write(
                    pb.HeartbeatRequest(
                        request=header(self._job, self._generation),
                        kind=pb.NODE_KIND_HOST,
                        name=self._name,
                        incarnation=self._incarnation,
                        echo=echo.nonce,
                    )
                )
                await asyncio.sleep(self._interval_s)

    # Calls.

    def _stub(self) -> Any:
        address = self._turns.address
        if address not in self._channels:
            channel = aio_channel(address, self._security, heartbeat=True)
            self._channels[address] = (channel, stubs.MembershipStub(channel))
        return self._channels[address][1]

    async def _call(self, ask: Callable[[Any], Coroutine[Any, Any, Answer]]) -> Answer:
        """Make a call at the address that answered last, then at the others, then where a standby pointed to."""
        tries = len(self._turns.addresses) + 1
        while True:
            tries -= 1
            try:
                answer = await ask(self._stub())
            except grpc.RpcError as error:
                typed = from_rpc_error(error, peer=self._turns.address)
                if not elsewhere(typed):
                    raise typed from None
                self._turns.failed(typed)
                if not tries or len(self._turns.addresses) == 1:
                    raise typed from None
                await asyncio.sleep(NEXT_S)
            else:
                self._turns.succeeded()
                return answer


class _Echo:
    """The nonce of the last answer on a stream; written by the reader, read by the writer."""

    nonce = 0
