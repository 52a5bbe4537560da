"""The server's side of its heartbeats: a task, or a helper process that is kept alive.

heartbeat = start_heartbeat("process", identity, figures, on_unknown)
...
await heartbeat.stop()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Protocol

from paramesh.retry import Backoff

from paramesh_server.beat import SECURITY_FLAGS, Figures, Identity, Page, beat

log = logging.getLogger(__name__)


class Heartbeat(Protocol):
    """Something that beats."""

    async def stop(self) -> None:
        """Stop beating."""


class LoopHeartbeat:
    """Beats as a task on the running loop."""

    def __init__(self, identity: Identity, figures: Callable[[], Figures], on_unknown: Callable[[], None]) -> None:
        self._task = asyncio.ensure_future(beat(identity, figures, on_unknown))

    async def stop(self) -> None:
        """Stop beating."""
        self._task.cancel()
        await asyncio.wait((self._task,))  # awaited itself, it would swallow the cancelling of whoever waits here


class ProcessHeartbeat:
    """Keeps a helper process that beats, and a page that it reads figures from.

    A process takes a moment to start, on a busy machine longer than the failure timeout. Until the
    helper has been heard this process beats itself; for a moment both do, which is no harm.
    """

    def __init__(self, identity: Identity, figures: Callable[[], Figures], on_unknown: Callable[[], None]) -> None:
        self._identity = identity
        self._figures = figures
        self._on_unknown = on_unknown
        self._page = os.memfd_create("paramesh-figures")
        self._shared = Page(self._page, identity.interval)
        self._shared.write(figures())
        self._helper: asyncio.subprocess.Process | None = None
        self._meanwhile: LoopHeartbeat | None = None
        """Beats until the helper has been heard."""
        self._tasks = [asyncio.ensure_future(self._keep()), asyncio.ensure_future(self._write())]

    @property
    def pid(self) -> int:
        """The helper's process id; 0 while there is none."""
        return self._helper.pid if self._helper else 0

    async def _write(self) -> None:
        while True:
            self._shared.write(self._figures())
            await asyncio.sleep(self._identity.interval)

    async def _keep(self) -> None:
        """Start the helper, hear what it says, start it again if it ends."""
        backoff = Backoff()
        while True:
            if self._meanwhile is None:
                self._meanwhile = LoopHeartbeat(self._identity, self._figures, self._on_unknown)
            self._helper = helper = await self._start()
            assert helper.stdout is not None
            while line := await helper.stdout.readline():
                if line == b"unknown\n":
                    self._on_unknown()
                elif line == b"heard\n":
                    await self._end_meanwhile()
            log.warning("heartbeat helper=ended code=%s; starting another", await helper.wait())
            await asyncio.sleep(backoff.next())

    async def _start(self) -> asyncio.subprocess.Process:
        who = self._identity
        flags = {
            "coordinators": who.coordinators,
            "job": who.job,
            "name": who.name,
            "generation": who.generation,
            "incarnation": who.incarnation,
            "interval": who.interval,
            "timeout": who.timeout,
            "parent": os.getpid(),
            "figures-fd": self._page,
            **{flag.replace("_", "-"): getattr(who.security, flag) for flag in SECURITY_FLAGS},
        }
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "paramesh_server.beat",
            *(f"--{flag}={value}" for flag, value in flags.items()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(self._page,),
            # Its own session: a Ctrl-C for the server must not silence it before its end.
            start_new_session=True,
        )

    async def _end_meanwhile(self) -> None:
        beating, self._meanwhile = self._meanwhile, None
        if beating is not None:
            await beating.stop()

    async def stop(self) -> None:
        """Send the helper home and wait for its end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end_meanwhile()
        helper = self._helper
        if helper is not None and helper.returncode is None:
            with contextlib.suppress(OSError):
                assert helper.stdin is not None
                helper.stdin.write(b"bye")
                await helper.stdin.drain()
            try:
                await asyncio.wait_for(helper.wait(), 2.0)
            except TimeoutError:
                helper.kill()
                await helper.wait()
        os.close(self._page)


class _Silent:
    async def stop(self) -> None:
        """There is nothing to stop."""


def start_heartbeat(
    kind: str, identity: Identity, figures: Callable[[], Figures], on_unknown: Callable[[], None]
) -> Heartbeat:
    """Start to beat.

    Args:
        kind: "process", "loop" or "none".
        identity: who beats, to whom, how often.
        figures: what a beat carries.
        on_unknown: called when the coordinator does not know this server.
    """
    if kind == "none":
        return _Silent()
    return (ProcessHeartbeat if kind == "process" else LoopHeartbeat)(identity, figures, on_unknown)
