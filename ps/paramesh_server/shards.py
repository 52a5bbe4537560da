"""The partitions that this process holds, each behind a lock, and who else holds what.

    held = await shards.find(partition, epoch)
    outcome = await held.run(lambda: held.partition.commit(records))

A partition's state is touched by one thing at a time: what is short runs on the event loop,
what computes runs in the pool (torch lets go of the GIL there). Work that has begun is
always finished, whatever becomes of the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

from paramesh.errors import ParameshError, refuse
from paramesh.routing import Routes

from paramesh_server.partition import Partition
from paramesh_server.sending import EncodedValues

log = logging.getLogger(__name__)

T = TypeVar("T")

INLINE_BYTES = 128 << 10
"""Work on fewer bytes runs on the event loop: it takes some 20 us, a hop to the pool 100."""

LEDGER = 0
"""The ledger's partition: in every map, and served by another service."""

ARRIVAL_S = 2.0
"""How long a request waits for a partition that the map already gives to this server."""


class Held:
    """One partition of this process."""

    def __init__(self, partition: Partition, pool: Executor) -> None:
        self.partition = partition
        self.encoded: dict[int, EncodedValues] = {}
        """Checksum kind -> the newest encoding of the values."""
        self.closed = False
        """It was given up: whoever found it before that is refused."""
        self._pool = pool
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._work: set[asyncio.Task[Any]] = set()

    @property
    def queue(self) -> int:
        """Pieces of work that wait or run."""
        return len(self._work)

    @property
    def small(self) -> bool:
        """Whether a pass over the partition is too short for the pool."""
        return self.partition.layout.nbytes <= INLINE_BYTES

    async def compute(self, work: Callable[[], T], *, inline: bool | None = None) -> T:
        """Run work that needs no lock: in the pool, or here when it is short."""
        if self.small if inline is None else inline:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def run(self, work: Callable[[], T], *, inline: bool | None = None) -> T:
        """Run work that owns the partition. Once begun it ends, even if the caller is cancelled.

        Raises:
            Retryable: NOT_PRIMARY, if the partition was given up meanwhile: what work would
                hold of the server's budget, nobody would ever give back.
        """
        task = asyncio.ensure_future(self._exclusive(work, inline))
        self._work.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._work.discard(task)
        if not task.cancelled():
            task.exception()  # seen: a caller that went away does not make it a warning

    async def _exclusive(self, work: Callable[[], T], inline: bool | None) -> T:
        async with self._lock:
            if self.closed:
                number = self.partition.id
                raise refuse("NOT_PRIMARY", f"partition {number} is no longer held here", partition=number)
            before = self.partition.log.lsn
            try:
                return await self.compute(work, inline=inline)
            finally:
                if self.partition.log.lsn != before:
                    changed, self._changed = self._changed, asyncio.Event()
                    changed.set()

    async def changed(self, timeout: float) -> bool:
        """Wait until a record is applied; False if none was within `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout)
            return True
        return False

    async def close(self) -> None:
        """Finish what runs, refuse what comes after, and let go of what is staged; repeatable."""
        task = asyncio.ensure_future(self._close())
        self._work.add(task)
        task.add_done_callback(self._finished)
        await asyncio.shield(task)

    async def _close(self) -> None:
        async with self._lock:
            self.closed = True
            self.partition.close()
            self.encoded.clear()


class Shards:
    """All partitions of this process, and the newest map.

    Args:
        pool: where computing goes.
        mine: whether the newest map gives a partition to this process.
        refresh: fetches a newer map and takes it; raises when it cannot.
    """

    def __init__(
        self, pool: Executor, mine: Callable[[int], bool], refresh: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        self.pool = pool
        self._mine = mine
        self.held: dict[int, Held] = {}
        self.routes: Routes | None = None
        self.fenced: set[int] = set()
        """Clients that this process was told to fence; partitions made later hear of it too."""
        self._refresh = refresh
        self._refreshing: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self.failed: dict[int, ParameshError] = {}
        """Partitions that the map gives to this process and that cannot be made, and why."""

    def add(self, partition: Partition) -> None:
        """Hold a partition from now on."""
        for client in sorted(self.fenced):
            partition.fence(client)
        self.held[partition.id] = Held(partition, self.pool)
        self.failed.pop(partition.id, None)
        self._announce()

    def fail(self, partition: int, error: ParameshError) -> None:
        """A partition cannot be made: requests for it get the reason."""
        self.failed[partition] = error
        self._announce()

    def _announce(self) -> None:
        arrived, self._arrived = self._arrived, asyncio.Event()
        arrived.set()

    async def drop(self, partition: int) -> None:
        """Hold a partition no longer."""
        held = self.held.pop(partition, None)
        if held is not None:
            await held.close()

    async def find(self, partition: int) -> Held:
        """The partition, if this process holds it or is about to.

        Raises:
            ParameshError: WRONG_PARTITION, NOT_PRIMARY (with a hint), NOT_READY.
        """
        if partition in self.held:
            return self.held[partition]
        if partition == LEDGER:
            raise refuse("WRONG_PARTITION", "partition 0 is the ledger's and holds no table", partition=partition)
        if self.routes is None or partition not in self.routes:
            await self._look_again(partition)
        if self._mine(partition):
            await self._wait_for(partition)
        if partition in self.held:
            return self.held[partition]
        if partition in self.failed:
            raise self.failed[partition]
        raise self._elsewhere(partition)

    async def _look_again(self, partition: int) -> None:
        """A client's map may be newer than ours; one look at the coordinator tells."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(self._refresh())
        try:
            await asyncio.shield(self._refreshing)
        except ParameshError as error:
            raise refuse("NOT_READY", f"partition {partition} is not in the map here, and {error}") from error

    async def _wait_for(self, partition: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ARRIVAL_S):
                while partition not in self.held and partition not in self.failed:
                    await self._arrived.wait()

    def _elsewhere(self, partition: int) -> ParameshError:
        if self.routes is None or partition not in self.routes:
            return refuse("WRONG_PARTITION", f"the job has no partition {partition}", partition=partition)
        try:
            node, epoch = self.routes.primary(partition)
        except ParameshError as error:
            return error
        if self._mine(partition):
            return refuse("NOT_READY", f"partition {partition} is being made", partition=partition)
        return refuse(
            "NOT_PRIMARY",
            f"partition {partition} is at {node.ref.node}",
            partition=partition,
            primary=node.address,
            epoch=epoch,
        )
