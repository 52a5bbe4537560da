"""Waiting for the loop from synchronous code: with a deadline, Ctrl-C, and a name for it.

record = wait(io.submit(coro), "step 7", timeout=None, who=lambda: "rank 1 (host/1)")
"""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from paramesh.errors import refuse
from paramesh.v1.ledger_pb2 import LedgerStatusResponse

__all__ = ["PATIENCE", "describe", "wait"]

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds of waiting after which the log names who is waited for, and again after each
further such time. Shorter would report every slow first step."""


def wait(
    future: concurrent.futures.Future[T],
    what: str,
    timeout: float | None,
    who: Callable[[], str],
    patience: float = PATIENCE,
) -> T:
    """Wait for a future; whatever ends the waiting early cancels it.

    Args:
        future: of a coroutine on the IO loop.
        what: what is waited for, for the log and the error.
        timeout: seconds; None: as long as it takes.
        who: asked, after each `patience`, who holds everybody up; must not raise.
        patience: seconds of silence between two lines in the log.

    Raises:
        Timeout: DEADLINE, after `timeout`.
    """
    began = time.monotonic()
    try:
        while True:
            spent = time.monotonic() - began
            left = patience if timeout is None else max(0.0, min(patience, timeout - spent))
            done, _ = concurrent.futures.wait([future], left)
            if done:
                return future.result()
            spent = time.monotonic() - began
            if timeout is not None and spent >= timeout:
                raise refuse("DEADLINE", f"waited {timeout:g} s for {what}", what=what)
            log.warning("waiting what=%r seconds=%.0f for=%r", what, spent, who())
    except BaseException:
        future.cancel()
        raise


def describe(status: LedgerStatusResponse) -> str:
    """Who holds everybody up, in words: the ranks and slots that undecided steps lack."""
    slots = {member.rank: member.slot for member in status.members}
    missing = [
        f"group {group.name}: " + ", ".join(f"rank {rank} ({slots.get(rank, '?')})" for rank in group.waiting_for)
        for group in status.groups
        if group.waiting_for
    ]
    return "; ".join(missing) or status.phase or "nobody that the ledger knows of"
