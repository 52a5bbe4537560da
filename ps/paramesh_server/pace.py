"""How fast this server copies whole partitions to others, so that training hardly notices.

    pace = Pace(rate=64 << 20)
    async with pace.turn():
        await install(pace.spaced(messages), timeout=pace.seconds(nbytes) + 60)

A copy competes with pushes and pulls for the same cores and the same link. What is written meanwhile
(a log's tail) is not held back: a follower that it reached too slowly would never catch up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager

COPIES = 2
"""Copies that leave at a time. One alone would wait for a target that has stopped; each more makes all of
them take longer, and what is written meanwhile is kept in memory and sent after the copy."""


class Pace:
    """Spaces the messages of all copies that leave this process.

    Args:
        rate: bytes per second of all copies together; 0: as fast as it goes.
        clock: seconds, for tests.
        sleep: for tests.
    """

    def __init__(
        self,
        rate: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._turns = asyncio.Semaphore(COPIES)
        self._free = 0.0
        """When what was let through so far has used up its time."""

    def turn(self) -> AbstractAsyncContextManager[None]:
        """One of the places of copies under way; take it before the copy is made, which takes memory."""
        return self._turns

    def seconds(self, nbytes: int) -> float:
        """The longest that so many bytes are spaced over, beside as many copies as may leave with them."""
        return COPIES * nbytes / self._rate if self._rate else 0.0

    async def spaced(self, messages: Sequence[bytes]) -> AsyncIterator[bytes]:
        """The messages, each when it is due."""
        for message in messages:
            if self._rate:
                now = self._clock()
                due = max(now, self._free)
                self._free = due + len(message) / self._rate
                if due > now:
                    await self._sleep(due - now)
            yield message
