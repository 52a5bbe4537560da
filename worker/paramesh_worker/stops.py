"""Training processes that are stopped (SIGSTOP) while their supervisor beats on.

The supervisor's beats vouch for its processes, so the coordinator cannot see that one of them stands still:
the others' step would wait for it without end. The supervisor sees it in /proc, and says so as it would of a
process that ended. The coordinator evicts it; continued, it finds itself evicted and joins as a new client.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

__all__ = ["STOPPED_EXIT_CODE", "StopWatch", "process_state", "watch_for_stops"]

STOPPED_EXIT_CODE = -int(signal.SIGSTOP)
"""What is reported of a stopped process: no process can end by SIGSTOP, so it means nothing else."""

LOOKS_PER_TIMEOUT = 8
"""Looks within the failure timeout: a stop is reported late by at most an eighth of it, and a look costs 20 us."""

REPORT_TRY_S = 0.5
"""How long one report is repeated before the process is looked at again: continued, it must not be evicted."""


def process_state(pid: int) -> str:
    """The state letter of a process in /proc; empty where there is no /proc or no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    # The command in parentheses may hold spaces and parentheses: fields count from the last one.
    return text.rpartition(b")")[2].split()[0].decode()


class StopWatch:
    """For how long a process was seen stopped, without a break; pure.

    Args:
        timeout_s: after that long it counts as gone.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._longest_gap_s = 4 * timeout_s / LOOKS_PER_TIMEOUT
        self._stopped_s = 0.0
        self._seen_at: float | None = None
        """When it was last seen stopped, monotonic; None: it was seen running since."""

    def look(self, state: str, at: float) -> bool:
        """Take one look; whether the process has been stopped for longer than the timeout.

        Args:
            state: its letter in /proc; empty if it is not known.
            at: monotonic seconds.
        """
        # 'T' only, not the tracing stop 't': who stopped it there holds it in a debugger, and wants to find the
        # job as it is. The others' wait is said in their logs after 30 s, and --step-timeout bounds it.
        if state != "T":
            self._stopped_s, self._seen_at = 0.0, None
            return False
        # A long gap is our own: stopped together with the process, we do not know what it did meanwhile.
        if self._seen_at is not None and at - self._seen_at <= self._longest_gap_s:
            self._stopped_s += at - self._seen_at
        else:
            self._stopped_s = 0.0
        self._seen_at = at
        return self._stopped_s > self._timeout_s


async def watch_for_stops(pid: int, timeout_s: float, report: Callable[[float], Awaitable[bool]]) -> None:
    """Watch one process until cancelled, and report each stop that outlasts the timeout, once.

    Args:
        pid: the process; cancel this before its number can be given away.
        timeout_s: the cluster's failure timeout.
        report: says that it is gone, for at most as many seconds as it is told; whether that was confirmed.
    """
    watch, reported = StopWatch(timeout_s), False
    while True:
        stopped = watch.look(process_state(pid), time.monotonic())
        if not stopped:
            reported = False
        elif not reported:
            reported = await report(REPORT_TRY_S)
        await asyncio.sleep(timeout_s / LOOKS_PER_TIMEOUT)
