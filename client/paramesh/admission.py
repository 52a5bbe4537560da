"""What a process takes on at once: calls, and requests that are still on their way in.

    admission = Admission(Bounds())
    call = admission.enter("/paramesh.v1.ParameterServer/Push")      # OVERLOADED, before a byte is read
    message = await admission.read(call, requests)                   # one message, or why there is none
    admission.leave(call)

gRPC puts a message together before it hands it over, in memory that Python does not see: a
hundred streams of one connection were measured to hold 800 MiB that no budget knew of. So a call
that wants to be read takes a place first, and there are few places; whoever keeps one without
bringing a whole message loses it. Control traffic is never refused: who could not beat, fence or
replicate for somebody's flood would fail over for it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from paramesh.bounds import RETRY_MS, Bounds
from paramesh.errors import ParameshError, refuse
from paramesh.offenders import Offenders

__all__ = ["CONTROL", "LIMITED", "Admission", "Call", "key_of"]

CONTROL = frozenset({
    "Membership.RegisterServer", "Membership.RegisterHost", "Membership.Heartbeat", "Membership.ReportExit",
    "Membership.Deregister", "Replicas.ChangeIsr", "Replicas.ReportLoss", "ServerControl.Fence",
    "ServerControl.Evict", "ServerControl.BecomePrimary", "Replication.Append", "Replication.Install",
    "Replication.Handover", "CheckpointControl", "Recovery.Testify",
})  # fmt: skip
"""Calls, or whole services, that are never refused for being too many: heartbeats, orders, replication.
Health and whatever else is not of Paramesh is not counted either."""

LIMITED = frozenset({
    "ParameterServer", "Ledger", "Catalog", "MapService", "Admin", "Checkpoints", "Membership.RegisterClient",
})  # fmt: skip
"""Calls, or whole services, that are counted, each service for itself: a flood of pulls leaves
the ledger alone."""

PATIENCE_S = 30.0
"""Seconds in which a message that was begun must be here: 16 MiB at 0.6 MB/s. What is slower is no
training, or holds a place for its own sake."""

SLOW_S = 1.0
"""Seconds after which a message that is still on its way is slow: those go first when memory is short."""

_PREFIX = "/paramesh.v1."


@dataclass(slots=True)
class Call:
    """One call that was let in."""

    service: str
    """Empty: it is not counted."""
    reading: bool = False
    """It holds a place among those that are read."""
    since: float = 0.0
    """Since when it is read for its next message, by the loop's clock."""
    wait: asyncio.Timeout | None = None
    """The patience for that message."""


def key_of(method: str) -> str:
    """The service that a call is counted under, by its path; empty for control traffic and foreign services."""
    if not method.startswith(_PREFIX):
        return ""
    service, _, name = method.removeprefix(_PREFIX).partition("/")
    if service in LIMITED or f"{service}.{name}" in LIMITED:
        return service
    return ""


class Admission:
    """Counts what is under way. Lives on one event loop.

    Args:
        bounds: how much at once.
        patience: seconds for one message.
        offenders: the records of connections.

    Attributes:
        offenders: the records of connections.
        calls: under way, by service.
        refused: how many were turned away.
    """

    def __init__(self, bounds: Bounds, patience: float = PATIENCE_S, offenders: Offenders | None = None) -> None:
        self.bounds = bounds
        self.offenders = offenders or Offenders()
        self.calls: Counter[str] = Counter()
        self._reading: dict[int, Call] = {}
        self.refused = 0
        self._patience = patience

    @property
    def uploads(self) -> int:
        """Calls whose request is not here in full."""
        return len(self._reading)

    def enter(self, method: str) -> Call:
        """Let a call in, and give it a place to be read.

        Raises:
            Retryable: OVERLOADED.
        """
        service = key_of(method)
        if not service:
            return Call("")
        if self.calls[service] >= self.bounds.calls:
            raise self._crowded(f"{self.bounds.calls} calls of {service} are under way (--max-calls)")
        if self.uploads >= self.bounds.uploads:
            raise self._crowded(f"{self.bounds.uploads} requests are being read (--max-uploads)")
        self.calls[service] += 1
        call = Call(service, reading=True)
        self._reading[id(call)] = call
        return call

    def _crowded(self, what: str) -> ParameshError:
        self.end_slow()  # else a few who never finish would keep everybody out
        return self._full(what)

    def _full(self, what: str) -> ParameshError:
        self.refused += 1
        return refuse("OVERLOADED", f"{what}; wait and repeat", retry_after_ms=RETRY_MS)

    async def read(self, call: Call, requests: AsyncIterator[Any]) -> Any:
        """The next message of a call.

        Raises:
            StopAsyncIteration: there is none.
            Timeout: DEADLINE, it did not come within the patience.
            Retryable: OVERLOADED, it was slow to come and others were kept out.
        """
        if not call.service:
            return await anext(requests)
        call.since = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._patience) as call.wait:
                return await anext(requests)
        except TimeoutError:
            raise self._too_slow(call) from None
        finally:
            call.wait = None

    def _too_slow(self, call: Call) -> ParameshError:
        waited = asyncio.get_running_loop().time() - call.since
        if waited < self._patience:  # ended for others' sake
            return self._full(f"no whole message came within {waited:.1f} s, and places to be read are short")
        return refuse("DEADLINE", f"no whole message came within {self._patience:g} s")

    def end_slow(self) -> int:
        """End the calls whose message has been on its way for long; how many there were."""
        now = asyncio.get_running_loop().time()
        slow = [call for call in self._reading.values() if call.wait is not None and now - call.since > SLOW_S]
        for call in slow:
            assert call.wait is not None
            call.wait.reschedule(now)
        return len(slow)

    def was_read(self, call: Call) -> None:
        """The whole request is here: its place is free."""
        if call.reading:
            call.reading = False
            self._reading.pop(id(call), None)

    def leave(self, call: Call) -> None:
        """The call has ended, however."""
        self.was_read(call)
        if call.service:
            self.calls[call.service] -= 1
            call.service = ""
