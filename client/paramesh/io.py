"""The IO thread: one asyncio loop per process, on which all of gRPC runs.

User code is synchronous; it hands coroutines to the loop and waits with a deadline:

    io = IoThread.get()
    map = io.run(client.get_map(), timeout=10, what="the partition map")

One loop, because several asyncio gRPC loops in one process share a poller and wake each
other for nothing. The thread starts with the first use: a script that runs alone has none.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from paramesh.errors import refuse

T = TypeVar("T")


class IoThread:
    """A daemon thread with an asyncio loop. Use `IoThread.get()`."""

    _lock = threading.Lock()
    _instance: IoThread | None = None
    """The process's own; replaced in a forked child, whose copy of the thread is dead."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="paramesh-io", daemon=True)
        self._thread.start()

    @classmethod
    def get(cls) -> IoThread:
        """The process's IO thread, started on first use."""
        with cls._lock:
            if cls._instance is None or cls._instance.pid != os.getpid():
                cls._instance = cls()
                atexit.register(cls._instance.close)
            return cls._instance

    @classmethod
    def running(cls) -> bool:
        """Whether this process has started its IO thread."""
        return cls._instance is not None and cls._instance.pid == os.getpid()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        pending = asyncio.all_tasks(self.loop)
        for task in pending:
            task.cancel()
        if pending:
            self.loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))

    def submit(self, coro: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop; do not wait."""
        return asyncio.run_coroutine_threadsafe(coro, self.loop)

    def run(self, coro: Coroutine[Any, Any, T], timeout: float | None, what: str) -> T:
        """Run a coroutine on the loop and wait for it.

        Args:
            coro: the coroutine.
            timeout: seconds; None only where the coroutine has a deadline of its own.
            what: what is waited for, for the error's text.

        Raises:
            Timeout: DEADLINE, after `timeout`; the coroutine is cancelled.
        """
        if threading.current_thread() is self._thread:
            coro.close()
            raise refuse("INTERNAL", "the IO thread cannot wait for itself")
        future = self.submit(coro)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise refuse("DEADLINE", f"waited {timeout:g} s for {what}", what=what) from None
        except BaseException:
            future.cancel()  # Ctrl-C: leave nothing running behind the user's back
            raise

    def close(self) -> None:
        """Stop the loop; called at exit. Harmless in a forked child."""
        if self.pid != os.getpid() or not self._thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5)
