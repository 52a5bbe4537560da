"""The current map and those who wait for the next."""

from __future__ import annotations

import asyncio

from paramesh.v1 import types_pb2 as pb

__all__ = ["MapFeed"]


class MapFeed:
    """Hands every watcher each newest map; a slow one skips versions, never goes back."""

    def __init__(self, current: pb.PartitionMap):
        self.current = current
        self._changed = asyncio.Event()

    def publish(self, new: pb.PartitionMap) -> None:
        """Make `new` current and wake everybody who waits."""
        self.current = new
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()

    async def newer(self, version: int, timeout: float) -> pb.PartitionMap | None:
        """The current map once its version is above `version`; None after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self.current.version <= version:
                    await self._changed.wait()
        except TimeoutError:
            return None
        return self.current
