"""Has followers compare their state with the primary's, now and then.

Each partition that is led here and followed gets a MARK record in turn, which carries the
state's checksum; a follower that computes another one says so loudly and takes a snapshot.
Equal records on equal state give equal bits, so a difference is a bug, another machine's
arithmetic, or memory that rots.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from paramesh.errors import ParameshError

from paramesh_server.replica import Role
from paramesh_server.shards import Slot

log = logging.getLogger(__name__)

MARK_S = 60.0
"""Seconds in which every partition gets one MARK. A checksum runs at some GB/s under the
partition's lock: 10-30 ms for 32 MiB of values with Adam's state."""


class Marks:
    """The task that marks.

    Args:
        slots: every replica of this process.
        every: seconds between two MARKs of a partition.
    """

    def __init__(self, slots: Callable[[], Sequence[Slot]], every: float = MARK_S) -> None:
        self._slots = slots
        self._every = every
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            slots = [s for s in self._slots() if s.replica.role is Role.PRIMARY and s.replica.insync.followers]
            if not slots:
                await asyncio.sleep(self._every)
            for slot in slots:  # one at a time, spread: no two checksums stall a step together
                await asyncio.sleep(self._every / len(slots))
                await mark(slot)


async def mark(slot: Slot) -> None:
    """Have the followers of one partition compare their state, if it still leads."""
    try:
        await slot.lead(slot.replica.machine.mark)
    except ParameshError as error:
        log.debug("no mark partition=%d reason=%s", slot.number, error.reason)
