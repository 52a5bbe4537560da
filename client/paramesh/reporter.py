"""Progress figures on their way to the ledger: the latest of each name, seldom, unwaited.

reporter.report({"loss": 0.3})       # sends at most every half second, never blocks
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paramesh.errors import ConfigError, ParameshError
from paramesh.v1 import ledger_pb2 as lg

if TYPE_CHECKING:
    import concurrent.futures

    from paramesh.membership import Session

__all__ = ["Reporter"]

log = logging.getLogger(__name__)

EVERY = 0.5
"""Seconds between reports: as often as a person can read a changing number."""

MOST = 64
"""Names in one report: more is a log, not a status line."""


class Reporter:
    """Sends figures of one worker. Training thread only."""

    def __init__(self, session: Session):
        self._session = session
        self._sent_at = -math.inf
        self._under_way: concurrent.futures.Future[lg.ReportResponse] | None = None
        self._waiting: dict[str, Any] = {}
        """Latest figures not sent yet, by name."""
        self.latest: dict[str, float] = {}
        """Figures as they were sent last, for people on this machine."""

    def report(self, figures: Mapping[str, Any]) -> None:
        """Take figures; send what has gathered if the last report is old enough.

        Raises:
            ConfigError: a figure is no number.
        """
        for name, value in figures.items():
            if not (isinstance(value, int | float) or hasattr(value, "item")):
                raise ConfigError(f"report: {name}={value!r} is not a number")
        self._waiting.update(figures)
        if len(self._waiting) > MOST:
            raise ConfigError(f"report: {len(self._waiting)} figures are more than {MOST}")
        now = time.monotonic()
        if now - self._sent_at < EVERY or (self._under_way and not self._under_way.done()):
            return
        self._sent_at = now
        self._send()

    def _send(self) -> None:
        session = self._session
        numbers = {name: float(getattr(value, "item", lambda v=value: v)()) for name, value in self._waiting.items()}
        self._waiting = {}
        self.latest.update(numbers)
        request = lg.ReportRequest(
            figures=[lg.Figure(name=name, value=value) for name, value in numbers.items()], step=session.steps
        )
        try:
            self._under_way = session.submit(session.client.ledger.report(request))
        except ParameshError as error:
            log.debug("report not sent reason=%s", error.reason)
            return
        self._under_way.add_done_callback(_note)


def _note(done: concurrent.futures.Future[lg.ReportResponse]) -> None:
    """A lost report is no error of the training loop; read the outcome so that none is shown."""
    if not done.cancelled() and (error := done.exception()) is not None:
        log.debug("report lost: %s", error)
