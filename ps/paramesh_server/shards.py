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
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from paramesh import failpoints
from paramesh.bounds import RETRY_MS
from paramesh.errors import ParameshError, refuse
from paramesh.routing import Routes
from paramesh.v1 import types_pb2 as pb

from paramesh_server.insync import Ref
from paramesh_server.partition import Partition
from paramesh_server.replica import Replica, Role
from paramesh_server.sending import EncodedValues

log = logging.getLogger(__name__)

T = TypeVar("T")

INLINE_BYTES = 128 << 10
"""Work on fewer bytes runs on the event loop: it takes some 20 us, a hop to the pool 100."""

LEDGER = 0
"""The ledger's partition: in every map, and served by another service."""

RELEASE_S = 10.0
"""How long an answer waits for followers before its caller hears whom for; five times what
it takes until a silent follower leaves the set."""

MAP_S = 0.5
"""How long a request that names a newer epoch waits for the map that says so: it is sent to all at once."""

ARRIVAL_S = 2.0
"""How long a request waits for a partition that the map already gives to this server."""


async def _within(event: asyncio.Event, timeout: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout)


LAG_ANYWAY = 4
"""Records that followers may lack however large they are: else a partition above the limit could not be written."""

LAG_RECORDS = 1 << 16
"""Records that they may lack however small they are: each is an object of half a kilobyte here."""


class Slot:
    """One replica of this process, behind a lock: of a dense partition, or of the ledger."""

    def __init__(self, replica: Replica, pool: Executor) -> None:
        self.replica = replica
        self.closed = False
        """It was given up: whoever found it before that is refused."""
        self.min_isr = 1
        """The job's: fewer in sync, and nothing is appended."""
        self._pool = pool
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._moved = asyncio.Event()
        self._work: set[asyncio.Task[Any]] = set()
        self._began: float | None = None
        """When the piece of work that runs now began."""
        self.requests = 0
        """What was asked of it as primary since it was made."""

    def stalled(self, now: float) -> float:
        """For how many seconds the piece of work that owns the partition has been running: it needs nobody else."""
        return 0.0 if self._began is None else max(0.0, now - self._began)

    @property
    def number(self) -> int:
        """The partition's number."""
        return self.replica.machine.id

    @property
    def queue(self) -> int:
        """Pieces of work that wait or run."""
        return len(self._work)

    @property
    def small(self) -> bool:
        """Whether a pass over the state is too short for the pool."""
        return True

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
                raise refuse("NOT_PRIMARY", f"partition {self.number} is no longer held here", partition=self.number)
            before, self._began = self.replica.machine.log.last, time.monotonic()
            try:
                if failpoints.armed():
                    place = f"work.{self.number}"
                    await asyncio.get_running_loop().run_in_executor(self._pool, failpoints.reach, place)
                return await self.compute(work, inline=inline)
            finally:
                self._began = None
                if self.replica.machine.log.last != before:
                    self.replica.appended(time.monotonic())
                    changed, self._changed = self._changed, asyncio.Event()
                    changed.set()
                    self.stir()

    async def lead(self, work: Callable[[], T], *, inline: bool | None = None) -> T:
        """Run work that only a primary may do.

        Raises:
            Retryable: NOT_PRIMARY, if it is not (or not any more) when its turn comes.
        """

        def guarded() -> T:
            self.check_primary()
            return work()

        return await self.run(guarded, inline=inline)

    async def write(self, work: Callable[[], T], *, inline: bool | None = None) -> T:
        """`lead`, for what appends a client's record: enough must be in sync when its turn comes, too.

        Raises:
            Retryable: NOT_PRIMARY; NOT_ENOUGH_REPLICAS.
        """

        def guarded() -> T:
            self.check_writable()
            return work()

        return await self.lead(guarded, inline=inline)

    def check_primary(self) -> None:
        """Refuse what only a primary may do.

        Raises:
            Retryable: NOT_PRIMARY.
        """
        if self.replica.role is not Role.PRIMARY:
            raise refuse("NOT_PRIMARY", f"partition {self.number} has another primary now", partition=self.number)

    def check_writable(self) -> None:
        """Refuse what would append a record while too few replicas are in sync.

        Raises:
            Retryable: NOT_ENOUGH_REPLICAS.
        """
        there = len(self.replica.insync.isr)
        if there < self.min_isr:
            raise refuse(
                "NOT_ENOUGH_REPLICAS",
                f"partition {self.number} has {there} of at least {self.min_isr} replicas in sync; start a ps-server",
                partition=self.number,
            )

    def check_lag(self, nbytes: int) -> None:
        """Refuse a write while followers lack too much: what they lack is held here for them.

        Args:
            nbytes: of records that are not committed; a few large ones may pass it.

        Raises:
            Retryable: OVERLOADED.
        """
        log, commit = self.replica.machine.log, self.replica.insync.commit
        behind = log.lsn - commit
        if behind > LAG_ANYWAY and (behind > LAG_RECORDS or log.bytes_after(commit) > nbytes):
            raise refuse(
                "OVERLOADED",
                f"followers of partition {self.number} are {behind} records behind (--max-lag-bytes)",
                retry_after_ms=RETRY_MS,
            )

    def stir(self) -> None:
        """Something that others wait for may have moved: log, commit or role."""
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def stirred(self, timeout: float) -> Coroutine[Any, Any, None]:
        """Wait until something moved since this call, or for `timeout` seconds."""
        # The event of now, not that of when a task gets to run: what moves in between would be missed.
        return _within(self._moved, timeout)

    async def released(self, lsn: int, reign: int, *, early: bool = False, kept: bool = False) -> None:
        """Wait until a record is in the log of every replica that may be in sync.

        Args:
            lsn: the last record that an answer reflects.
            reign: `replica.reign` from before the answer was formed.
            early: or until so little is missing there that acks=primary may do without.
            kept: the answer acknowledges a write, so that `min_isr` replicas must be in sync: followers may
                have gone since it was appended, as Kafka's NOT_ENOUGH_REPLICAS_AFTER_APPEND says.

        Raises:
            Retryable: NOT_PRIMARY, if this replica is deposed meanwhile: its answer may be
                wrong; NOT_ENOUGH_REPLICAS after `RELEASE_S`, naming who or how many are waited for.
        """
        deadline = time.monotonic() + RELEASE_S
        while True:
            self.check_primary()
            if self.replica.reign != reign:  # deposed and promoted again: that record may be another one now
                raise refuse("NOT_PRIMARY", f"partition {self.number} was deposed meanwhile", partition=self.number)
            committed = self.replica.insync.commit >= lsn
            if committed and not (kept and len(self.replica.insync.isr) < self.min_isr):
                return
            if early and self.replica.early(lsn, time.monotonic()):  # last: it counts the bytes that are missing
                return
            if time.monotonic() >= deadline:
                if committed:
                    self.check_writable()
                names = ", ".join(self.replica.insync.waiting_for())
                raise refuse("NOT_ENOUGH_REPLICAS", f"partition {self.number} waits for {names}", partition=self.number)
            await self.stirred(deadline - time.monotonic())

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
            self.replica.role = Role.FOLLOWER
            self.replica.machine.close()
            self.stir()


class Held(Slot):
    """One replica of a dense partition."""

    def __init__(self, replica: Replica, pool: Executor) -> None:
        super().__init__(replica, pool)
        self.encoded: dict[int, EncodedValues] = {}
        """Checksum kind -> the newest encoding of the values."""

    @property
    def partition(self) -> Partition:
        """The state; another object after a snapshot was installed."""
        machine = self.replica.machine
        assert isinstance(machine, Partition)
        return machine

    @property
    def early(self) -> bool:
        """Whether updates are acknowledged, and values shown, before followers have them."""
        return self.partition.acks_primary

    @property
    def small(self) -> bool:
        """Whether a pass over the partition is too short for the pool."""
        return self.partition.layout.nbytes <= INLINE_BYTES

    def commit(self, decided: Sequence[pb.StepRecord]) -> None:
        """Apply decisions that are not applied yet, if that may be; under the partition's lock.

        Raises:
            ParameshError: NOT_ENOUGH_REPLICAS, and what `Partition.commit` says.
        """
        if any(record.step >= self.partition.applied_step for record in decided):
            self.check_writable()
        self.partition.commit(decided)

    async def close(self) -> None:
        """As `Slot.close`, and the encodings go too."""
        await super().close()
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

    def add(self, partition: Partition, me: Ref) -> Held:
        """Hold a replica from now on, as a follower until it is told to lead."""
        held = self.held[partition.id] = Held(Replica(partition, me, threading.RLock()), self.pool)
        self.failed.pop(partition.id, None)
        self._announce()
        return held

    def fence_remembered(self, partition: Partition) -> None:
        """A new primary forbids whom this process was told to fence while another led."""
        for client in sorted(self.fenced):
            partition.fence(client)

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

    async def find(self, partition: int, epoch: int = 0) -> Held:
        """The partition, if this process is its primary or is about to be.

        Args:
            partition: its number.
            epoch: that of the caller's map; if ours is older, ours is on its way.

        Raises:
            ParameshError: WRONG_PARTITION, NOT_PRIMARY (with a hint), NOT_READY.
        """
        held = self.held.get(partition)
        if held is not None and held.replica.serving:
            held.requests += 1
            return held
        if held is not None and epoch:
            await self._wait_for_map(held, epoch)
        if partition == LEDGER:
            raise refuse("WRONG_PARTITION", "partition 0 is the ledger's and holds no table", partition=partition)
        if self.routes is None or partition not in self.routes:
            await self._look_again(partition)
        if self._mine(partition):
            held = await self._wait_for(partition)
            if held is not None:
                held.requests += 1
                return held
        if partition in self.failed:
            raise self.failed[partition]
        raise self._elsewhere(partition)

    async def _wait_for_map(self, held: Held, epoch: int) -> None:
        """A client that heard of a move before this process did need not go round again."""
        deadline = time.monotonic() + MAP_S
        while self.routes is not None and held.number in self.routes and not held.closed:
            left = deadline - time.monotonic()
            if self.routes.partition(held.number).epoch >= epoch or left <= 0:
                return
            await held.stirred(left)

    async def _look_again(self, partition: int) -> None:
        """A client's map may be newer than ours; one look at the coordinator tells."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(self._refresh())
        try:
            await asyncio.shield(self._refreshing)
        except ParameshError as error:
            raise refuse("NOT_READY", f"partition {partition} is not in the map here, and {error}") from error

    async def _wait_for(self, partition: int) -> Held | None:
        """The partition, once it is made and serves; None if that takes long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ARRIVAL_S):
                while partition not in self.failed:
                    held = self.held.get(partition)
                    if held is None:
                        await self._arrived.wait()
                    elif held.replica.serving:
                        return held
                    else:
                        await held.stirred(ARRIVAL_S)
        return None

    async def replica(self, partition: int, listed: Callable[[], bool]) -> Held | None:
        """The replica, whatever its role, once it is made; None if the map does not list one here."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ARRIVAL_S):
                while partition not in self.held and listed():
                    await self._arrived.wait()
        return self.held.get(partition)

    def _elsewhere(self, partition: int) -> ParameshError:
        if self.routes is not None and self.routes.generation > 1 and not self.routes.map.partitions:
            # A restore has begun: asked again, the caller hears that its generation is over.
            return refuse("NOT_READY", "the job is being restored", partition=partition)
        if self.routes is None or partition not in self.routes:
            return refuse("WRONG_PARTITION", f"the job has no partition {partition}", partition=partition)
        try:
            node, epoch = self.routes.primary(partition)
        except ParameshError as error:
            return error
        if self._mine(partition):
            return refuse("NOT_READY", f"partition {partition} is being made or taken over", partition=partition)
        return refuse(
            "NOT_PRIMARY",
            f"partition {partition} is at {node.ref.node}",
            partition=partition,
            primary=node.address,
            epoch=epoch,
        )
