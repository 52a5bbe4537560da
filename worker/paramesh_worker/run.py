"""One run of `ps-run`: start, watch, stop, sum up.

The run ends in one of four ways: the workers are done; a worker failed for good; a server or the coordinator
was lost; a signal came. Whatever it is, everything is stopped before the summary is printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from paramesh.errors import ConfigError
from rich.console import Console

from .command import Command
from .config import RunConfig
from .display import (
    STOPPING,
    Display,
    LiveDisplay,
    PlainDisplay,
    outliving_the_reader,
    print_failure,
    print_summary,
)
from .observe import StatusSource
from .output import Printer
from .processes import Nursery
from .progress import ProgressTracker
from .restarts import Decision, describe_exit
from .roles import JOB, ChildFailed, LocalCluster, Role
from .supervisor import shell_code

__all__ = ["Run"]

POLL_S = 0.5
"""Between two looks at the cluster; the display's numbers and its clock change that often."""

EVENTS_S = 2.0
"""How long the supervisor's last events are waited for after its end; its pipe is closed by then."""

Result = TypeVar("Result")


class _Interrupted(Exception):
    """A signal asked us to end."""


class Run:
    """Runs one command on a cluster of its own. Use once: `status = await Run(config, command).run()`."""

    def __init__(self, config: RunConfig, command: Command):
        self._config = config
        self._command = command
        self._console = Console(highlight=False)
        self._tracker = ProgressTracker(started=time.monotonic())
        self._display: Display = PlainDisplay(self._console, Console(stderr=True, highlight=False))
        self._signals: list[int] = []
        """The signals that asked us to end, in order of arrival."""
        self._interrupted = asyncio.Event()
        """Set with the first of them."""
        self._source: StatusSource | None = None
        """Where progress is asked for; None until the cluster is up."""
        self._looking = False
        """Whether it is asked: not before the workers are started, not while all is being stopped."""
        self._first_failure: dict[str, Any] | None = None
        """The supervisor's event of the first worker that failed for good."""

    async def run(self) -> int:
        """Run everything; return the exit status."""
        try:
            folder = self._make_folder()
        except ConfigError as error:
            self._display.note(f"error: {error}")
            return 2
        if self._console.is_terminal and not (self._config.plain or self._console.is_dumb_terminal):
            self._display = LiveDisplay(self._console, self._command.title)
        status, failure = await self._run_in(folder)
        with outliving_the_reader():
            self._say_the_end(status, failure, str(folder))
        return status

    async def _run_in(self, folder: Path) -> tuple[int, ChildFailed | None]:
        """Run with logs in `folder`; return the exit status and what failed, with nothing left running."""
        scratch = Path(tempfile.mkdtemp(prefix="paramesh-state-"))
        printer = Printer()
        showing = asyncio.create_task(self._show_progress())
        with contextlib.closing(Nursery(adopt=True)) as nursery:
            self._install_signals(nursery)
            cluster = LocalCluster(
                self._config,
                self._command,
                environ=os.environ,
                folder=folder,
                state=Path(self._config.state) if self._config.state else scratch / "coordinator.sqlite",
                nursery=nursery,
                printer=printer,
                show=self._show,
                say=self._say_phase,
            )
            try:
                await self._unless_interrupted(cluster.start())
                return await self._unless_interrupted(self._train(cluster)), None
            except _Interrupted:
                return 128 + self._signals[0], None
            except ChildFailed as error:
                return error.status, error
            finally:
                self._looking = False
                self._say_phase(STOPPING)
                await cluster.stop(self._signals[0] if self._signals else signal.SIGTERM)
                showing.cancel()
                await asyncio.wait({showing})
                if self._source is not None:
                    await self._source.close()
                self._display.close()
                printer.close()
                cluster.close()
                shutil.rmtree(scratch, ignore_errors=True)

    async def _train(self, cluster: LocalCluster) -> int:
        """Watch a started cluster until its workers are done.

        Raises:
            ChildFailed: something failed for good.
        """
        address = cluster.coordinator.address.result()
        self._display.note(f"cluster is up; in another terminal: psctl --coordinator {address} status")
        source = self._source = StatusSource(address, JOB)
        self._looking = True
        events = asyncio.create_task(self._follow_events(cluster.events))
        guards = [asyncio.create_task(self._keep_server(cluster, server)) for server in cluster.servers]
        guards.append(asyncio.create_task(self._keep_coordinator(cluster)))
        workers = asyncio.create_task(cluster.workers.running.exited())
        try:
            done, _ = await asyncio.wait({workers, *guards}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {workers}:
                task.result()  # A guard ends only by raising.
            await asyncio.wait({events}, timeout=EVENTS_S)
            if workers.result() == 0:
                self._tracker.observe(await source.look())
                return 0
            await cluster.workers.running.drained()
            raise self._failure_of_workers(cluster, workers.result())
        finally:
            for task in (*guards, events, workers):
                task.cancel()

    # Watching.

    async def _show_progress(self) -> None:
        while True:
            if self._looking and self._source is not None:
                self._display.update(self._tracker.observe(await self._source.look()))
            else:
                self._display.update(self._tracker.wait(time.monotonic()))
            await asyncio.sleep(POLL_S)

    async def _keep_server(self, cluster: LocalCluster, server: Role) -> None:
        while True:
            exit_code = await server.running.exited()
            await server.running.drained()
            if self._interrupted.is_set():  # Its end was asked for.
                await asyncio.Event().wait()
            self._display.note(await cluster.server_ended(server, exit_code), "yellow")

    async def _keep_coordinator(self, cluster: LocalCluster) -> None:
        while True:
            exit_code = await cluster.coordinator.running.exited()
            if self._interrupted.is_set():  # Its end was asked for: nothing is to be started any more.
                await asyncio.Event().wait()
            self._display.note(await cluster.coordinator_ended(exit_code), "yellow")

    async def _follow_events(self, descriptor: int) -> None:
        """Take what the supervisor tells of its processes, until it ends."""
        reader = asyncio.StreamReader(limit=1 << 20)
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(descriptor, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            while line := await reader.readline():
                self._on_event(json.loads(line))
        finally:
            transport.close()

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["event"] != "ended":
            return
        if event["decision"] == Decision.RESTART.value:
            self._tracker.restarts += 1
            self._display.note(f"worker {event['worker']} {event['reason']}", "yellow")
        elif event["decision"] == Decision.GIVE_UP.value and self._first_failure is None:
            self._first_failure = event

    def _failure_of_workers(self, cluster: LocalCluster, exit_code: int) -> ChildFailed:
        status = shell_code(exit_code)
        event = self._first_failure
        if event is None:
            return cluster.workers.failed(f"ps-worker {describe_exit(exit_code)}", status)
        name = f"worker {event['worker']}"
        return ChildFailed(
            f"{name} failed: {event['reason']}",
            name=name,
            lines=event["lines"],
            log=cluster.workers.log.with_name(f"worker-{event['worker']}.log"),
            status=status,
        )

    # Signals.

    def _install_signals(self, nursery: Nursery) -> None:
        def on_signal(number: int) -> None:
            self._signals.append(number)
            if len(self._signals) > 1:
                nursery.kill()
                return
            self._interrupted.set()
            self._display.note(
                f"stopping, for at most {self._config.grace:g} s; Ctrl-C again to kill at once", "yellow"
            )

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, on_signal, number)

    async def _unless_interrupted(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await `work`, but stop waiting when a signal comes.

        Raises:
            _Interrupted: a signal came first.
        """
        task = asyncio.create_task(work)
        interrupted = asyncio.create_task(self._interrupted.wait())
        try:
            await asyncio.wait({task, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            if interrupted.done():
                raise _Interrupted
            return task.result()
        finally:
            for each in (task, interrupted):
                each.cancel()
            await asyncio.wait({task, interrupted})

    # What people see.

    async def _show(self, stream: int, lines: list[bytes]) -> None:
        self._display.output(stream, lines)

    def _say_phase(self, phase: str) -> None:
        self._display.update(self._tracker.wait(time.monotonic(), phase))

    def _make_folder(self) -> Path:
        """Make the folder of logs.

        Raises:
            ConfigError: it cannot be made.
        """
        if not self._config.log_dir:
            return Path(tempfile.mkdtemp(prefix="paramesh-logs-"))
        folder = Path(self._config.log_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"argument --log-dir: {folder}: {error.strerror}") from error
        return folder

    def _say_the_end(self, status: int, failure: ChildFailed | None, logs: str) -> None:
        if failure is not None:
            print_failure(self._console, str(failure), failure.lines, str(failure.log))
        summary = self._tracker.summary(time.monotonic())
        if status == 0:
            ending = f"{self._command.title} is done"
        elif failure is not None:
            ending = f"{self._command.title} failed: {failure.name}"
        else:
            ending = f"{self._command.title} was stopped by {signal.Signals(self._signals[0]).name}"
        print_summary(self._console, summary, ending=ending, good=status == 0, logs=logs)
