"""Looks after a server whose beats broke off: a refused dial is death, at once.

A process that is killed together with its helper leaves nobody to report its exit, but its
machine lives: the kernel closes its connections and refuses new ones. So when the stream of
beats ends, both of its ports are dialled, twice. A stopped process and a lost machine do not
refuse; for those silence decides.
"""

from __future__ import annotations

import asyncio
import logging

from paramesh.errors import ParameshError

from paramesh_coordinator import membership
from paramesh_coordinator.dialling import is_gone
from paramesh_coordinator.driver import Driver
from paramesh_coordinator.rows import NodeState, Ref, ServerRow

__all__ = ["Autopsies"]

log = logging.getLogger(__name__)

LOOKS_SECONDS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Waits before each look. Two refusals in a row count; who is killed beside its helper may end
a little after it, and after these 1.5 s silence is about to decide anyway."""


class Autopsies:
    """The looks that are under way.

    Args:
        driver: takes the decision.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._looking: dict[Ref, asyncio.Task[None]] = {}

    def start(self, ref: Ref) -> None:
        """Look after a server, unless somebody does already."""
        if ref not in self._looking and not self._driver.deposed.done():
            task = self._looking[ref] = asyncio.ensure_future(self._look(ref))
            task.add_done_callback(lambda _: self._looking.pop(ref, None))

    async def _look(self, ref: Ref) -> None:
        refused = 0
        for wait in LOOKS_SECONDS:
            await asyncio.sleep(wait)
            row = next((row for row in self._driver.state.rows(ServerRow).values() if row.ref == ref), None)
            if row is None or row.state in (NodeState.DEAD, NodeState.LEFT):
                return  # it said goodbye, or its end is known
            gone = all(await asyncio.gather(is_gone(row.address), is_gone(row.control_address)))
            refused = refused + 1 if gone else 0
            if refused == 2:
                await self._declare(ref)
                return

    async def _declare(self, ref: Ref) -> None:
        try:
            await self._driver.decide(lambda draft: membership.server_refuses(draft, ref))
        except ParameshError as error:
            log.warning("death of %s not decided reason=%s: %s", ref, error.reason, error)
