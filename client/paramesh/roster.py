"""Who is in the cluster now, as the ledger knows it; asked seldom.

roster.world_size()     # members now, or those that the job will start with
roster.is_lowest()      # whether nobody alive has a lower rank
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from paramesh.v1 import ledger_pb2 as lg

if TYPE_CHECKING:
    from paramesh.membership import Session

__all__ = ["Roster"]

FRESH = 0.5
"""Seconds that an answer serves: membership changes at the pace of heartbeats, and
`world_size()` may stand in an inner loop."""


class Roster:
    """The members of the cluster. Training thread only."""

    def __init__(self, session: Session):
        self._session = session
        self._status = lg.LedgerStatusResponse()
        self._asked_at = -math.inf

    def _now(self) -> lg.LedgerStatusResponse:
        if time.monotonic() - self._asked_at > FRESH:
            session = self._session
            self._status = session.request(
                lambda: session.client.ledger.ledger_status(lg.LedgerStatusRequest()), "the list of workers"
            )
            self._asked_at = time.monotonic()
        return self._status

    def world_size(self) -> int:
        """Members now; before the first step, at least as many as the job starts with."""
        status = self._now()
        begun = any(group.next_step > 0 or group.max_clock > 0 for group in status.groups)
        return max(1, len(status.members), 0 if begun else self._session.job.start_workers)

    def is_lowest(self) -> bool:
        """Whether no member has a lower rank than this worker, now or when those are here that the job starts with."""
        status = self._now()
        if not status.started and len(status.members) < self._session.job.start_workers:
            return self._session.rank == 0  # the others are on their way: there must not be two
        return all(member.rank >= self._session.rank for member in status.members)
