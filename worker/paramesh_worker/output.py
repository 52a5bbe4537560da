"""Lines out of processes: split, prefixed, kept, and written without ever blocking an event loop.

A terminal may stop taking bytes (Ctrl-S, a pager, a full pipe). Whoever prints then waits, as
in any terminal, but the supervisor's heartbeats must not: so writing happens on one thread,
and a reader of a process awaits its own write before it reads more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable

__all__ = ["LAST_LINES", "LineSplitter", "Printer", "PrinterHandler", "Tail"]

LONGEST_LINE = 64 * 1024
"""Bytes after which a line is cut: a progress bar that never sends a newline must not fill memory."""

LAST_LINES = 20
"""Lines shown of a process that failed: a Python traceback through a training loop is 10-20 lines."""


class LineSplitter:
    """Cuts a stream of bytes into lines.

    What a carriage return overwrites is dropped, as a terminal would: a progress bar becomes the one line
    that it ends as, not hundreds.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes, return the lines that are complete now, without their ends."""
        pieces = (self._rest + data).split(b"\n")
        self._rest = _visible(pieces.pop())
        lines = [_visible(piece).rstrip(b"\r") for piece in pieces]
        if len(self._rest) > LONGEST_LINE:
            lines.append(self._rest.rstrip(b"\r"))
            self._rest = b""
        return lines

    def close(self) -> list[bytes]:
        """Return what is left as a last line, if anything is."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        return [rest] if rest else []


def _visible(line: bytes) -> bytes:
    """What is left of a line after its carriage returns; one at the end overwrites nothing yet."""
    body = line.rstrip(b"\r")
    return line[body.rfind(b"\r") + 1 :]


class Tail:
    """The last lines of one process, for the moment it fails."""

    def __init__(self, limit: int = LAST_LINES) -> None:
        self._lines: deque[bytes] = deque(maxlen=limit)

    def extend(self, lines: Iterable[bytes]) -> None:
        """Keep lines; blank ones say nothing and are dropped."""
        self._lines.extend(line[:2000] for line in lines if line.strip())

    def lines(self) -> list[str]:
        """The kept lines, oldest first."""
        return [line.decode("utf-8", "replace") for line in self._lines]


class Printer:
    """Writes to file descriptors from one thread, in order.

    `await printer.write(1, data)` returns when the data is written, `printer.post` at once.
    A descriptor that fails (the reader went away) is written no more; nothing is raised,
    because training must not end for want of a terminal.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, bytes, asyncio.Future[None] | None] | None] = queue.SimpleQueue()
        self._broken: set[int] = set()
        self._thread = threading.Thread(target=self._work, name="printer", daemon=True)
        self._thread.start()

    def post(self, fd: int, data: bytes) -> None:
        """Queue data without waiting; for the few lines that we write ourselves."""
        self._queue.put((fd, data, None))

    async def write(self, fd: int, data: bytes) -> None:
        """Write data and wait until it is written or the descriptor is found broken."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put((fd, data, done))
        await done

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is queued, for at most `timeout_s`: a stopped terminal must not hold the exit."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            fd, data, done = item
            if fd not in self._broken:
                self._write_all(fd, data)
            if done is not None:
                # The loop may be closed already when a reader was cancelled at exit.
                with contextlib.suppress(RuntimeError):
                    done.get_loop().call_soon_threadsafe(_finish, done)

    def _write_all(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except OSError:
            self._broken.add(fd)


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


class PrinterHandler(logging.Handler):
    """Sends log records through a `Printer`, so that logging cannot block the event loop either."""

    def __init__(self, printer: Printer, fd: int) -> None:
        super().__init__()
        self._printer = printer
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """Queue one formatted record."""
        try:
            self._printer.post(self._fd, (self.format(record) + "\n").encode("utf-8", "replace"))
        except Exception:
            self.handleError(record)
