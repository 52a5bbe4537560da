"""A replica behind a lock, as `paramesh_server.shards.Slot` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from paramesh.errors import refuse
from paramesh_server.partition import Partition
from paramesh_server.replica import Replica, Role
from paramesh_server.shards import RELEASE_S

from tests.simulation.kernel import Future, Lock, Signal

if TYPE_CHECKING:
    from tests.simulation.server import Server


class Slot:
    """One replica of one server process."""

    def __init__(self, server: Server, replica: Replica) -> None:
        self.server = server
        self.replica = replica
        self.closed = False
        self.applying = False
        self.min_isr = 1
        self._lock = Lock()
        self._changed = Signal()
        self._moved = Signal()

    @property
    def number(self) -> int:
        return self.replica.machine.id

    @property
    def partition(self) -> Partition:
        machine = self.replica.machine
        assert isinstance(machine, Partition)
        return machine

    async def run(self, work: Callable[[], Any], *, inline: bool | None = None) -> Any:
        """Work that owns the partition; it ends even if its caller is cancelled."""
        return await self.server.spawn(self._exclusive(work), "work")

    async def _exclusive(self, work: Callable[[], Any]) -> Any:
        await self._lock.acquire()
        try:
            if self.closed:
                raise refuse("NOT_PRIMARY", f"partition {self.number} is no longer held here")
            before = self.replica.machine.log.last
            await self._pool()
            try:
                result = work()
                self.server.world.checks.appended(self, before)
                await self._pool()
                return result
            finally:
                if self.server.process.alive and self.replica.machine.log.last != before:
                    self.replica.appended(self.server.kernel.now)
                    self._changed.fire()
                    self.stir()
        finally:
            self._lock.release()

    async def _pool(self) -> None:
        if self.number:  # the ledger lives on the event loop
            await self.server.pool()

    async def lead(self, work: Callable[[], Any]) -> Any:
        """Work that only a primary may do."""

        def guarded() -> Any:
            self.check_primary()
            return work()

        return await self.run(guarded)

    async def write(self, work: Callable[[], Any]) -> Any:
        """`lead`, for what appends a client's record."""

        def guarded() -> Any:
            self.check_writable()
            return work()

        return await self.lead(guarded)

    def check_primary(self) -> None:
        if self.replica.role is not Role.PRIMARY:
            raise refuse("NOT_PRIMARY", f"partition {self.number} has another primary now")

    def check_writable(self) -> None:
        there = len(self.replica.insync.isr)
        if there < self.min_isr:
            raise refuse("NOT_ENOUGH_REPLICAS", f"partition {self.number} has {there} of at least {self.min_isr}")

    @property
    def moved(self) -> Future:
        """Resolved when something moves: log, commit or role."""
        return self._moved.next

    def stir(self) -> None:
        self._moved.fire()

    async def stirred(self, timeout: float) -> None:
        await self.server.kernel.wait(self._moved.next, timeout)

    async def released(self, lsn: int, reign: int, *, kept: bool = False) -> None:
        """The output commit: no answer leaves before its records are everywhere."""
        kernel = self.server.kernel
        deadline = kernel.now + RELEASE_S
        while True:
            self.check_primary()
            if self.replica.reign != reign:
                raise refuse("NOT_PRIMARY", f"partition {self.number} was deposed meanwhile")
            committed = self.replica.insync.commit >= lsn
            if committed and not (kept and len(self.replica.insync.isr) < self.min_isr):
                self.server.world.checks.released(self, lsn)
                return
            if kernel.now >= deadline:
                if committed:
                    self.check_writable()
                names = ", ".join(self.replica.insync.waiting_for())
                raise refuse("NOT_ENOUGH_REPLICAS", f"partition {self.number} waits for {names}")
            await self.stirred(deadline - kernel.now)

    async def changed(self, timeout: float) -> bool:
        return await self.server.kernel.wait(self._changed.next, timeout)

    async def close(self) -> None:
        await self.server.spawn(self._close(), "close")

    async def _close(self) -> None:
        await self._lock.acquire()
        self.closed = True
        self.replica.role = Role.FOLLOWER
        self.replica.machine.close()
        self.stir()
        self._lock.release()
