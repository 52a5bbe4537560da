"""Whether this server may take on something new, as its memory stands.

Above the watermark it takes no new member, no writes of clients that it does not know, and it
asks the coordinator for no new tables. Whoever trains here already goes on: a step that were
refused half way would cost more memory, in all who wait for it, than it frees.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from paramesh.errors import ParameshError, refuse
from paramesh.headroom import Headroom

log = logging.getLogger(__name__)

RETRY_MS = 1000
"""How long whoever is refused is told to wait: memory is given back by steps and by people, not in milliseconds."""


class Room:
    """The watermark, and who is known. Lives on the event loop.

    Args:
        headroom: what is left.

    Attributes:
        headroom: what is left.
    """

    def __init__(self, headroom: Headroom) -> None:
        self.headroom = headroom
        self._known: set[int] = set()
        self._told = False

    @property
    def tight(self) -> bool:
        """Whether nothing new is taken on; the change is logged. Asked at every beat."""
        tight = self.headroom.tight
        if tight != self._told:
            self._told = tight
            if tight:
                log.warning("memory tight, nothing new is taken on: %s", self.headroom)
            else:
                log.info("memory eased: %s", self.headroom)
        return tight

    def know(self, client: int) -> None:
        """A client's write was accepted: more of its are, whatever comes."""
        self._known.add(client)

    def forget(self, clients: Iterable[int]) -> None:
        """They are gone for good."""
        self._known.difference_update(clients)

    def check_client(self, client: int) -> None:
        """Refuse the first write of a client while memory is tight.

        Raises:
            Retryable: OVERLOADED.
        """
        if client not in self._known and self.tight:
            raise self.full(f"client {client} is new here")

    def full(self, why: str) -> ParameshError:
        """The refusal of something new."""
        return refuse("OVERLOADED", f"memory is tight ({self.headroom}), and {why}", retry_after_ms=RETRY_MS)
