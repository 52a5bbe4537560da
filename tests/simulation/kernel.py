"""Time, tasks and processes of the simulation: one thread, one heap, one seeded generator.

    kernel = Kernel(seed=7)
    process = Process("a")
    kernel.spawn(process, coroutine)
    await kernel.sleep(0.1); await future; await kernel.wait(future, 2.0)
    kernel.run(until=20.0)

A process that is paused has its events held back until it goes on; those of a dead one never
come. Nothing here reads a real clock, and nothing iterates over a set.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from paramesh.errors import ParameshError

TRACE = 60
"""Events that a failing seed shows."""


NOTICED_S = 0.8
"""Of a pause of the coordinator: `FRESH_BEATS` of its beats. Shorter ones count as time in which it ran."""


class Violation(AssertionError):
    """An invariant does not hold."""


class Cancelled(BaseException):
    """Thrown into a task that is cancelled."""


class Process:
    """Something that can be killed or stopped as a whole."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.stopped = 0.0
        """Seconds of pauses that nobody can take for a slow moment."""
        self.since = 0.0
        self.backlog: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.tasks: dict[Task, None] = {}


class Future:
    """A value to come."""

    __slots__ = ("done", "error", "value", "waiters")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.waiters: list[Callable[[], None]] = []

    def set(self, value: Any = None) -> None:
        """Resolve; later calls change nothing."""
        self._end(value, None)

    def fail(self, error: BaseException) -> None:
        """Resolve with an error; later calls change nothing."""
        self._end(None, error)

    def _end(self, value: Any, error: BaseException | None) -> None:
        if self.done:
            return
        self.done, self.value, self.error = True, value, error
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter()

    def __await__(self) -> Generator[Future, None, Any]:
        if not self.done:
            yield self
        if self.error is not None:
            raise self.error
        return self.value


class Task(Future):
    """A coroutine of a process."""

    __slots__ = ("_coro", "_kernel", "_process", "_running", "name")

    def __init__(self, kernel: Kernel, process: Process, coro: Coroutine[Any, Any, Any], name: str) -> None:
        super().__init__()
        self._kernel, self._process, self._coro, self.name = kernel, process, coro, name
        self._running = False
        process.tasks[self] = None
        self._wake()

    def __hash__(self) -> int:
        return id(self)

    def _wake(self) -> None:
        self._kernel.at(0.0, self._process, self._step, None)

    def _step(self, error: BaseException | None) -> None:
        if self.done:
            return
        if self._running:  # cancelled from within work that it runs
            self._kernel.at(0.0, self._process, self._step, error)
            return
        self._running = True
        try:
            awaited = self._coro.send(None) if error is None else self._coro.throw(error)
        except StopIteration as end:
            self._finish(end.value, None)
        except (Cancelled, ParameshError) as ended:
            self._finish(None, ended)
        else:
            awaited.waiters.append(self._wake)
        finally:
            self._running = False

    def _finish(self, value: Any, error: BaseException | None) -> None:
        self._process.tasks.pop(self, None)
        self._end(value, error)

    def cancel(self) -> None:
        """End it at its next step."""
        if not self.done:
            self._kernel.at(0.0, self._process, self._step, Cancelled())

    def kill(self) -> None:
        """End it here and now: its process died."""
        if not self._running:
            self._coro.close()
        self.done = True


class Signal:
    """Wakes everybody who waits, again and again."""

    def __init__(self) -> None:
        self._next = Future()

    def fire(self) -> None:
        """Wake whoever waits now."""
        fired, self._next = self._next, Future()
        fired.set()

    @property
    def next(self) -> Future:
        """Resolved when it fires the next time."""
        return self._next


class Lock:
    """First come, first served."""

    def __init__(self) -> None:
        self._held = False
        self._queue: deque[Future] = deque()

    async def acquire(self) -> None:
        """Wait for it."""
        if self._held:
            turn = Future()
            self._queue.append(turn)
            await turn
        self._held = True

    def release(self) -> None:
        """Give it to the next."""
        if self._queue:
            self._queue.popleft().set()
        else:
            self._held = False


class Kernel:
    """The heap of events.

    Args:
        seed: of everything that is random.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.trace: deque[str] = deque(maxlen=TRACE)
        self.steps = 0
        self.current: Process | None = None
        """Whose event this is."""
        self._heap: list[tuple[float, int, Process | None, Callable[..., Any], tuple[Any, ...]]] = []
        self._count = 0

    def note(self, text: str) -> None:
        """A line of the story."""
        self.trace.append(f"{self.now:9.4f}  {text}")

    def at(self, delay: float, process: Process | None, call: Callable[..., Any], *args: Any) -> None:
        """Call later, unless the process is dead by then."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, process, call, args))

    def spawn(self, process: Process, coro: Coroutine[Any, Any, Any], name: str = "") -> Task:
        """Start a task of a process."""
        if not process.alive:
            coro.close()
            dead = Future()
            return dead  # type: ignore[return-value]
        return Task(self, process, coro, name)

    async def sleep(self, delay: float) -> None:
        """Wait; the process is that of the awaiting task."""
        woken = Future()
        self.at(delay, None, woken.set)
        await woken

    async def wait(self, future: Future, timeout: float) -> bool:
        """Whether it was resolved in time; raises nothing of it."""
        if future.done:
            return True
        if timeout <= 0:
            return False
        woken = Future()
        future.waiters.append(woken.set)
        self.at(timeout, None, woken.set)
        await woken
        return future.done

    async def gather(self, process: Process, *coros: Coroutine[Any, Any, Any]) -> list[Any]:
        """Run side by side; results in order."""
        tasks = [self.spawn(process, coro) for coro in coros]
        return [await task for task in tasks]

    def kill(self, process: Process) -> None:
        """The process and its memory are gone."""
        process.alive = process.paused = False
        process.backlog.clear()
        for task in list(process.tasks):
            task.kill()
        process.tasks.clear()

    def pause(self, process: Process) -> None:
        """SIGSTOP: what comes is held back."""
        process.paused, process.since = True, self.now

    def resume(self, process: Process) -> None:
        """What was held back comes now, in order."""
        if process.paused and self.now - process.since >= NOTICED_S:
            process.stopped += self.now - process.since
        process.paused = False
        backlog, process.backlog = process.backlog, []
        for call, args in backlog:
            self.at(0.0, process, call, *args)

    def step(self) -> None:
        """The next event."""
        when, _, process, call, args = heapq.heappop(self._heap)
        self.now = max(self.now, when)
        self.steps += 1
        if process is not None:
            if not process.alive:
                return
            if process.paused:
                process.backlog.append((call, args))
                return
        self.current = process
        call(*args)

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Everything up to a moment, or until `done`, which is asked ten times per second."""
        look = self.now
        while self._heap and self._heap[0][0] <= until:
            self.step()
            if self.now >= look:
                if done():
                    return
                look = self.now + 0.1
        self.now = max(self.now, until)
