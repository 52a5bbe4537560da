"""SIGTERM in a training process: finish the step, give back what is leased, leave, exit 0.

    departure.install()                 # in the main thread of a process that joined
    with departure.undisturbed():       # a step; SIGTERM ends the process right after it
        ...

Outside of a step it ends the process at once, as an uncaught SystemExit does: `finally`
blocks run, loaders give their leases back, and the session says goodbye. A second SIGTERM
kills. A script that handles SIGTERM itself is left alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import types
from collections.abc import Iterator

__all__ = ["Departure"]

log = logging.getLogger(__name__)


class Departure:
    """Whether this process was asked to go, and whether it may go now."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._steps = 0
        """Depth of `undisturbed` blocks; main thread only."""
        self._asked = False
        """Whether SIGTERM came; set by the handler."""

    def install(self) -> bool:
        """Take SIGTERM over if nobody else has; whether that was done."""
        if threading.current_thread() is not threading.main_thread():
            return False
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return False
        signal.signal(signal.SIGTERM, self._handle)
        return True

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._asked or os.getpid() != self._pid:  # impatience, or a forked DataLoader worker
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._asked = True
        log.info("SIGTERM: leaving the cluster %s", "after this step" if self._steps else "now")
        if not self._steps:
            raise SystemExit(0)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A piece of work that SIGTERM does not cut short; it ends the process after it."""
        self._steps += 1
        try:
            yield
        finally:
            self._steps -= 1
        if self._asked and not self._steps:
            raise SystemExit(0)
