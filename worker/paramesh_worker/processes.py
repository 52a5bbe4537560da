"""Child processes under an asyncio loop: started through `child.py`, watched without polling, ended whole.

    nursery = Nursery()
    process = await nursery.spawn("ps-0", [sys.executable, "-V"], env=os.environ, sink=show)
    code = await process.exited()          # at once when it ends, whatever its children hold open
    await process.drained()                # its last lines have reached `show`
    nursery.close()

Every process leads its own session, so that a Ctrl-C of the terminal reaches only us, and so that
all its descendants can be found and ended with it. Call `spawn` on the main thread only: the kernel
sends the parent-death signal when the *thread* that started the child ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from .child import PARENT, kill_session, processes
from .output import LineSplitter, Tail

__all__ = ["Nursery", "Process", "Sink"]

Sink = Callable[[int, list[bytes]], Awaitable[None]]
"""Takes lines of a stream (1 stdout, 2 stderr); reading goes on when it returns."""

DRAIN_S = 2.0
"""How long the output of an ended process is read on. Its session is dead by then, so the pipes end at
once; only a descendant that left the session and kept the pipe makes us wait."""

PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h."""

_CHILD = str(Path(__file__).with_name("child.py"))
_PYTHON = (sys.executable, "-I", "-S", _CHILD)


class Process:
    """One child: made by `Nursery.spawn`."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], on_end: Callable[[Process], None]) -> None:
        self.name = name
        self.pid = popen.pid
        self.started = time.monotonic()
        """When it was started, monotonic seconds."""
        self.tail = Tail()
        """Its last lines of both streams, in order of arrival."""
        self._popen = popen
        self._on_end = on_end
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._readers: list[asyncio.Task[None]] = []

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._exit.result() if self._exit.done() else None

    async def exited(self) -> int:
        """Wait for its end, and return its exit code."""
        return await asyncio.shield(self._exit)

    async def drained(self) -> None:
        """Wait until its last lines were handed to the sink, for at most `DRAIN_S` after its end."""
        await self.exited()
        if self._readers:
            _, late = await asyncio.wait(self._readers, timeout=DRAIN_S)
            for task in late:
                task.cancel()

    def send(self, number: int) -> None:
        """Send a signal to the process itself; nothing if it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL it and everything in its session."""
        if self.returncode is None:
            kill_session(self.pid)

    def end(self) -> None:
        """Kill it and wait until it is gone, without a loop."""
        self.kill()
        self._popen.wait()

    async def stop(self, number: int = signal.SIGTERM, grace_s: float = 10.0) -> int:
        """Ask it to end, kill it when `grace_s` have passed; return its exit code."""
        self.send(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                return await self.exited()
        self.kill()
        return await self.exited()

    def watch(self) -> None:
        """Arrange to hear of the end at once: by pidfd, or by a waiting thread where it is forbidden."""
        loop = asyncio.get_running_loop()
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:  # Old container runtimes forbid the call.
            threading.Thread(target=self._wait_in_thread, args=(loop,), daemon=True).start()
            return

        def readable() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._ended()

        loop.add_reader(descriptor, readable)

    def _wait_in_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        # WNOWAIT: leave it a zombie, so that `_ended` may still name its session safely.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        # Before it is reaped its pid cannot be given to anybody else: only now may its session be named.
        if self._popen.returncode is None:
            kill_session(self.pid)
        self._on_end(self)
        self._exit.set_result(self._popen.wait())

    async def read(self, sink: Sink) -> None:
        """Start reading its output into the tail and the sink."""
        for number, pipe in ((1, self._popen.stdout), (2, self._popen.stderr)):
            assert pipe is not None
            reader = asyncio.StreamReader()
            protocol = asyncio.StreamReaderProtocol(reader)
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(functools.partial(_same, protocol), pipe)
            self._readers.append(asyncio.create_task(self._read(number, reader, transport, sink)))

    async def _read(
        self, number: int, reader: asyncio.StreamReader, transport: asyncio.ReadTransport, sink: Sink
    ) -> None:
        splitter = LineSplitter()
        try:
            while data := await reader.read(64 * 1024):
                if lines := splitter.feed(data):
                    self.tail.extend(lines)
                    await sink(number, lines)
        finally:
            transport.close()
            if lines := splitter.close():
                self.tail.extend(lines)
                await sink(number, lines)


def _same(protocol: asyncio.StreamReaderProtocol) -> asyncio.StreamReaderProtocol:
    return protocol


class Nursery:
    """Starts processes and guarantees their end, also if this process is ended by SIGKILL.

    Args:
        adopt: whether descendants whose parent has ended become our children, to be killed by `close`: also
            those that left their session. For a launcher, whose whole world ends with it.
    """

    def __init__(self, *, adopt: bool = False) -> None:
        self._alive: dict[int, Process] = {}
        self._adopt = adopt
        if adopt:
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._janitor = subprocess.Popen(
            [*_PYTHON, "janitor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # It must outlive us and every group that it is to kill.
        )

    async def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        sink: Sink,
        pass_fds: Sequence[int] = (),
    ) -> Process:
        """Start a process whose life is tied to ours.

        Args:
            name: what it is called in messages.
            argv: program and arguments; a missing program ends with code 127 and a line on stderr.
            env: its whole environment.
            sink: gets its lines.
            pass_fds: descriptors that it inherits, beside stdout and stderr.
        """
        # Blocking for a millisecond, and not asyncio's own: its wait() also waits for the pipes to close,
        # so that a grandchild which keeps one open would hide the end of the child.
        popen = subprocess.Popen(  # noqa: ASYNC220
            [*_PYTHON, "exec", str(os.getpid()), *argv],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
        self._tell(f"+{popen.pid}\n")
        process = Process(name, popen, self._forget)
        self._alive[process.pid] = process
        process.watch()
        await process.read(sink)
        return process

    @property
    def alive(self) -> tuple[Process, ...]:
        """The processes that have not ended, in order of their start."""
        return tuple(self._alive.values())

    def kill(self) -> None:
        """SIGKILL everything that is left."""
        for process in self.alive:
            process.kill()

    def close(self) -> None:
        """Kill what is left, wait until it is gone, and dismiss the janitor."""
        for process in self.alive:
            process.end()
        if self._adopt:
            self._kill_orphans()
        assert self._janitor.stdin is not None
        with contextlib.suppress(OSError):
            self._janitor.stdin.close()
        self._janitor.wait()

    def _kill_orphans(self) -> None:
        """Kill adopted processes, and those that they leave to us in turn, until there are none."""
        known = {self._janitor.pid, *self._alive}
        while orphans := [pid for pid in processes(PARENT, os.getpid()) if pid not in known]:
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def _forget(self, process: Process) -> None:
        self._alive.pop(process.pid, None)
        self._tell(f"-{process.pid}\n")

    def _tell(self, line: str) -> None:
        assert self._janitor.stdin is not None
        # Somebody killed the janitor, or dismissed it: the kernel's promise remains.
        with contextlib.suppress(OSError, ValueError):
            self._janitor.stdin.write(line.encode())
            self._janitor.stdin.flush()
