"""The client's side of the ledger: one method per call, repeated until answered.

Calls that wait (Ready, Lease, Gather, Clock, AwaitInit, Clip) are long polls: the ledger
ends one that is not resolved with WAITING_FOR_WORKERS, and it is repeated until the
caller's deadline. A wait over 30 s is logged with who is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from paramesh.errors import Action, ParameshError, refuse
from paramesh.retry import Backoff, told_to_wait
from paramesh.v1 import ledger_pb2 as pb

if TYPE_CHECKING:
    from paramesh.async_client import AsyncClient

log = logging.getLogger(__name__)

WAIT_S = 1800.0
"""Seconds. Default bound of a wait for other workers: a first step may compile for minutes;
half an hour without anybody is a fault that somebody must hear of."""

_CALL_S = 25.0
"""Seconds of one long poll: the ledger ends it at 20."""

_SAY_AFTER_S = 30.0

T = TypeVar("T")


class LedgerClient:
    """Calls to the ledger's primary. Lives on the IO loop; made by `AsyncClient`.

    Every method takes the request without its header, and raises the typed error that
    the ledger answered, PARTITION_OFFLINE if the ledger is lost, DEADLINE after `timeout`.
    """

    def __init__(self, client: AsyncClient):
        self._client = client

    async def _call(self, method: str, request: Any, answer: type[T], timeout: float) -> T:
        deadline = time.monotonic() + timeout
        started, said = time.monotonic(), False
        backoff = Backoff(first=0.02, cap=0.5)
        while True:
            version = self._client.routes.version
            try:
                response: T = await self._once(method, request, deadline)
                return response
            except ParameshError as error:
                if error.action not in (Action.BACK_OFF, Action.REFRESH) and error.reason not in (
                    "UNREACHABLE",
                    "DEADLINE",
                ):
                    raise
                last = error
            now = time.monotonic()
            if now >= deadline:
                raise refuse("DEADLINE", f"waited {timeout:g} s for {method}: {last}", what=method, last=last.reason)
            if not said and now - started > _SAY_AFTER_S:
                said = True
                log.warning("waiting call=%s seconds=%d why=%s", method, now - started, last)
            if last.reason == "WAITING_FOR_WORKERS":
                continue  # a long poll that ended is repeated at once
            wait = min(max(backoff.next(), told_to_wait(last)), max(0.0, deadline - now))
            if last.action is not Action.REFRESH and last.reason != "UNREACHABLE":
                await asyncio.sleep(wait)
            elif await self._client.link.wait_for_map(version, wait):
                backoff.reset()  # the ledger moved

    async def _once(self, method: str, request: Any, deadline: float) -> Any:
        client = self._client
        node, _ = await client.primary(0, deadline)
        request.request.CopyFrom(client.header())
        lane = client.lane(node.address)
        timeout = max(0.05, min(_CALL_S, deadline - time.monotonic()))
        call: Callable[..., Awaitable[Any]] = getattr(lane.ledger, method)
        return await lane.run(_await(call(request, timeout=timeout)))

    async def join(self, request: pb.JoinRequest, timeout: float = 60.0) -> pb.JoinResponse:
        """Become a member."""
        return await self._call("Join", request, pb.JoinResponse, timeout)

    async def leave(self, request: pb.LeaveRequest, timeout: float = 5.0) -> pb.LeaveResponse:
        """Leave gracefully."""
        return await self._call("Leave", request, pb.LeaveResponse, timeout)

    async def set_activity(self, request: pb.SetActivityRequest, timeout: float = 60.0) -> pb.SetActivityResponse:
        """Become active, between or idle."""
        return await self._call("SetActivity", request, pb.SetActivityResponse, timeout)

    async def open_group(self, request: pb.OpenGroupRequest, timeout: float = 60.0) -> pb.OpenGroupResponse:
        """Declare a table group."""
        return await self._call("OpenGroup", request, pb.OpenGroupResponse, timeout)

    async def await_init(self, request: pb.AwaitInitRequest, timeout: float = WAIT_S) -> pb.AwaitInitResponse:
        """Wait for first values, or become their owner."""
        return await self._call("AwaitInit", request, pb.AwaitInitResponse, timeout)

    async def commit_init(self, request: pb.CommitInitRequest, timeout: float = 60.0) -> pb.CommitInitResponse:
        """Say that first values are everywhere."""
        return await self._call("CommitInit", request, pb.CommitInitResponse, timeout)

    async def ready(self, request: pb.ReadyRequest, timeout: float = WAIT_S) -> pb.ReadyResponse:
        """Wait for a step's decision."""
        return await self._call("Ready", request, pb.ReadyResponse, timeout)

    async def clip(self, request: pb.ClipRequest, timeout: float = WAIT_S) -> pb.ClipResponse:
        """Report norms, wait for the factor."""
        return await self._call("Clip", request, pb.ClipResponse, timeout)

    async def clock(self, request: pb.ClockRequest, timeout: float = WAIT_S) -> pb.ClockResponse:
        """Report a finished clock, wait until the next may start."""
        return await self._call("Clock", request, pb.ClockResponse, timeout)

    async def get_steps(self, request: pb.GetStepsRequest, timeout: float = 60.0) -> pb.GetStepsResponse:
        """Decided steps."""
        return await self._call("GetSteps", request, pb.GetStepsResponse, timeout)

    async def report_missing(self, request: pb.ReportMissingRequest, timeout: float = 60.0) -> pb.ReportMissingResponse:
        """A partition lacks a contribution."""
        return await self._call("ReportMissing", request, pb.ReportMissingResponse, timeout)

    async def lease(self, request: pb.LeaseRequest, timeout: float = WAIT_S) -> pb.LeaseResponse:
        """Ask for ranges of samples."""
        return await self._call("Lease", request, pb.LeaseResponse, timeout)

    async def return_leases(self, request: pb.ReturnLeasesRequest, timeout: float = 10.0) -> pb.ReturnLeasesResponse:
        """Give ranges back."""
        return await self._call("ReturnLeases", request, pb.ReturnLeasesResponse, timeout)

    async def put_state(self, request: pb.PutStateRequest, timeout: float = 60.0) -> pb.PutStateResponse:
        """Keep small state."""
        return await self._call("PutState", request, pb.PutStateResponse, timeout)

    async def get_state(self, request: pb.GetStateRequest, timeout: float = 60.0) -> pb.GetStateResponse:
        """Read small state."""
        return await self._call("GetState", request, pb.GetStateResponse, timeout)

    async def gather(self, request: pb.GatherRequest, timeout: float = WAIT_S) -> pb.GatherResponse:
        """Barrier and mean."""
        return await self._call("Gather", request, pb.GatherResponse, timeout)

    async def report(self, request: pb.ReportRequest, timeout: float = 5.0) -> pb.ReportResponse:
        """Progress figures."""
        return await self._call("Report", request, pb.ReportResponse, timeout)

    async def ledger_status(self, request: pb.LedgerStatusRequest, timeout: float = 10.0) -> pb.LedgerStatusResponse:
        """What people see."""
        return await self._call("LedgerStatus", request, pb.LedgerStatusResponse, timeout)


async def _await(call: Awaitable[T]) -> T:
    return await call
