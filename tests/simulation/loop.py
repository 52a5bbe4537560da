"""What `paramesh_server.ledger_service` asks of asyncio: on the kernel's time, in the process that runs now.

ledger_service.asyncio = Loop(kernel)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.simulation.kernel import Future

if TYPE_CHECKING:
    from tests.simulation.kernel import Kernel


class LoopFuture:
    """An `asyncio.Future`; its hash is a number, so that a set of them has the same order in every run."""

    def __init__(self, number: int) -> None:
        self.future = Future()
        self._number = number

    def __hash__(self) -> int:
        return self._number

    def done(self) -> bool:
        """Whether it was resolved."""
        return self.future.done

    def set_result(self, value: Any) -> None:
        """Resolve it."""
        self.future.set(value)


class Timer:
    """An `asyncio.TimerHandle`."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def fire(self) -> None:
        """Its time has come."""
        if self._call is not None:
            self._call()

    def cancel(self) -> None:
        """It never fires."""
        self._call = None


class Loop:
    """Stands in for the module `asyncio`, and for the loop that it gives."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._made = 0

    def get_running_loop(self) -> Loop:
        """There is one."""
        return self

    def create_future(self) -> LoopFuture:
        """A new one."""
        self._made += 1
        return LoopFuture(self._made)

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        """Call in the process that asks, unless it is dead by then."""
        timer = Timer(call)
        self._kernel.at(delay, self._kernel.current, timer.fire)
        return timer

    async def wait(self, futures: tuple[LoopFuture], timeout: float) -> None:
        """Until it is resolved, or so long."""
        (future,) = futures
        await self._kernel.wait(future.future, timeout)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._kernel.sleep(seconds)
