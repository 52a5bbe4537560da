"""Who is short of memory: servers, by what their beats say, and this process.

news = tight.note(ref, request.memory_tight)     # every beat; whether it is told for the first time
tight.servers                                    # these get no new tables
tight.check("table 'x' is new")                  # OVERLOADED, if this process is
"""

from __future__ import annotations

import logging

from paramesh.errors import refuse
from paramesh.headroom import Headroom

from paramesh_coordinator.catalog import TIGHT_RETRY_MS
from paramesh_coordinator.rows import Ref

__all__ = ["Tight"]

log = logging.getLogger(__name__)


class Tight:
    """Lives on the event loop.

    Args:
        headroom: of this process.
    """

    def __init__(self, headroom: Headroom) -> None:
        self._headroom = headroom
        self._servers: set[Ref] = set()
        self._told = False

    @property
    def servers(self) -> frozenset[Ref]:
        """Those above their watermark."""
        return frozenset(self._servers)

    def note(self, ref: Ref, tight: bool) -> bool:
        """A server's beat came; whether it says something new."""
        if tight == (ref in self._servers):
            return False
        (self._servers.add if tight else self._servers.discard)(ref)
        return True

    def forget(self, ref: Ref) -> None:
        """It ended."""
        self._servers.discard(ref)

    def check(self, what: str) -> None:
        """Refuse something new while this process is above its own watermark.

        Raises:
            Retryable: OVERLOADED.
        """
        tight = self._headroom.tight
        if tight != self._told:
            self._told = tight
            log.log(
                logging.WARNING if tight else logging.INFO,
                "memory %s: %s",
                "tight" if tight else "eased",
                self._headroom,
            )
        if tight:
            raise refuse(
                "OVERLOADED",
                f"the coordinator's memory is tight ({self._headroom}), and {what}",
                retry_after_ms=TIGHT_RETRY_MS,
            )
