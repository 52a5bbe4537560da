"""The cluster that `ps-run` starts: one coordinator, servers, one supervisor of the training processes.

    cluster = LocalCluster(config, command, nursery=nursery, printer=printer, folder=folder, ...)
    await cluster.start()                  # all serve; the supervisor runs
    exit_code = await cluster.workers.process.exited()
    await cluster.stop()

Roles are started as commands and known by what they log ("serving address=..."): nothing of them is
imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from .command import Command
from .config import RunConfig
from .output import Printer
from .processes import Nursery, Process, Sink
from .restarts import describe_exit

__all__ = ["JOB", "ChildFailed", "LocalCluster", "Role"]

JOB = "default"
"""The job's name: the default everywhere, so that psctl needs only the address."""

HOST = "local"
"""The supervisor's name in the cluster."""

COORDINATOR_READY_S = 30.0
"""From start to serving: 0.5 s alone, many times that on a machine busy with other starts."""

SERVER_READY_S = 120.0
"""The same for a server, which imports torch: 2-3 s alone, a cold disk or a full machine takes a minute."""

COORDINATOR_RESTARTS = 3
"""How often a coordinator that dies is started again on its state: training goes on without it
meanwhile. One that dies more often has a fault that restarting does not heal."""

SERVER_RESTARTS = 3
"""The same for each server, where there are replicas: it comes back empty, and a copy is made on it."""

_SERVING = re.compile(rb"\bserving\b.*\baddress=(\S+)")


_OF_OTHER_JOBS = frozenset(
    "PARAMESH_" + name
    for name in (
        *("COORDINATOR", "JOB", "SLOT", "HOST", "HOST_INCARNATION", "LOCAL_RANK", "RANK", "RESTART"),
        *("ERROR_FILE", "TLS_CERT", "TLS_KEY", "TLS_CA", "TOKEN", "TOKEN_FILE", "TOKEN_KEYS"),
    )
)
"""Variables that an outer job may have set for its own workers; they must not reach this cluster."""


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _checkpoint_flags(config: RunConfig) -> list[str]:
    """What ps-coordinator is told of checkpoints; local paths are those of this process's folder."""
    flags = ["--checkpoint-keep", str(config.checkpoint_keep)]
    for flag, place in (("--checkpoint-dir", config.checkpoint_dir), ("--restore", config.restore)):
        if place:
            flags += [flag, place if "://" in place else os.path.abspath(place)]
    return flags + (["--checkpoint-every", config.checkpoint_every] if config.checkpoint_every else [])


class ChildFailed(Exception):
    """A process of the cluster ended or did not get ready; the run cannot go on.

    Attributes:
        name: which one: "ps-1", "worker 0".
        lines: its last lines of output.
        log: where all of them are.
        status: exit status for the whole run.
    """

    def __init__(self, message: str, *, name: str, lines: Sequence[str], log: Path, status: int = 1):
        super().__init__(message)
        self.name = name
        self.lines = list(lines)
        self.log = log
        self.status = status


class Role:
    """One process of the cluster with its log file and, when it serves, its address."""

    def __init__(self, name: str, log: Path, printer: Printer):
        self.name = name
        self.log = log
        self.process: Process | None = None
        """Set once it is started; replaced when a coordinator is restarted."""
        self.address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """host:port, from its own log."""
        self._printer = printer
        self._file: BinaryIO = log.open("ab", buffering=0)

    @property
    def running(self) -> Process:
        """Its process.

        Raises:
            RuntimeError: it was not started.
        """
        if self.process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self.process

    async def sink(self, stream: int, lines: list[bytes]) -> None:
        """Keep its lines, and find out where it serves."""
        await self._printer.write(self._file.fileno(), b"".join(line + b"\n" for line in lines))
        for line in lines:
            found = _SERVING.search(line)
            if found and not self.address.done():
                self.address.set_result(found[1].decode())

    async def ready(self, deadline_s: float) -> str:
        """Wait until it serves, and return its address.

        Raises:
            ChildFailed: it ended first, or did not serve in time.
        """
        ended = asyncio.create_task(self.running.exited())
        await asyncio.wait((self.address, ended), timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            await self.running.drained()
        ended.cancel()
        if self.address.done():
            return self.address.result()
        if ended.done() and not ended.cancelled():
            raise self.failed(f"{self.name} {describe_exit(ended.result())} while starting")
        raise self.failed(f"{self.name} did not get ready within {deadline_s:.0f} s")

    def failed(self, message: str, status: int = 1) -> ChildFailed:
        """The error that names this process."""
        lines = self.process.tail.lines() if self.process else []
        return ChildFailed(message, name=self.name, lines=lines, log=self.log, status=status)

    def close(self) -> None:
        """Close the log file; after the process has ended."""
        self._file.close()


class LocalCluster:
    """Starts, restarts and stops the processes."""

    def __init__(
        self,
        config: RunConfig,
        command: Command,
        *,
        environ: Mapping[str, str],
        folder: Path,
        state: Path,
        nursery: Nursery,
        printer: Printer,
        show: Sink,
        say: Callable[[str], None],
    ):
        self._config = config
        self._command = command
        self._environ = {name: value for name, value in environ.items() if name not in _OF_OTHER_JOBS}
        self._folder = folder
        self._state = state
        self._nursery = nursery
        self._printer = printer
        self._show = show
        self._say = say
        self.events = -1
        """Read end of the supervisor's events, once it is started; the caller closes it."""
        self.coordinator = Role("ps-coordinator", folder / "coordinator.log", printer)
        self.servers = [Role(f"ps-{index}", folder / f"ps-{index}.log", printer) for index in range(config.servers)]
        self.workers = Role("ps-worker", folder / "supervisor.log", printer)
        self._coordinator_starts = 0
        self._server_starts: Counter[str] = Counter()
        """Restarts by server."""

    @property
    def roles(self) -> list[Role]:
        """All of them, in the order of stopping: workers, servers, coordinator."""
        return [self.workers, *self.servers, self.coordinator]

    async def start(self) -> None:
        """Start everything and wait until it serves.

        The phases are told to `say`.

        Raises:
            ChildFailed: a process ended or took too long.
        """
        self._say("starting the coordinator")
        await self.start_coordinator()
        address = await self.coordinator.ready(COORDINATOR_READY_S)
        self._say(f"starting {_count(len(self.servers), 'server')}")
        for server in self.servers:
            await self._start_server(server, address)
        await asyncio.gather(*(server.ready(SERVER_READY_S) for server in self.servers))
        self._say(f"starting {_count(self._config.workers, 'worker')}")
        self.events, events_fd = os.pipe()
        try:
            await self._start_workers(address, events_fd)
        finally:
            os.close(events_fd)

    async def _start_server(self, server: Role, coordinator: str) -> None:
        flags = ["--coordinator", coordinator, "--job", JOB, "--name", server.name, "--bind", "127.0.0.1:0"]
        await self._spawn(server, ["-m", "paramesh_server.cli", *flags], server.sink)

    async def server_ended(self, server: Role, exit_code: int) -> str:
        """Restart a server that ended, if others have what it had; return a sentence about it.

        Raises:
            ChildFailed: there is one replica, or it ended too often.
        """
        how = describe_exit(exit_code)
        if self._config.replicas == 1:
            raise server.failed(
                f"server {server.name} was lost: {how}. With one replica its part of the model is"
                " gone, so the run cannot go on. Start it again, with --replicas 2 if servers may die; if the kernel"
                " killed it for memory, use more --servers or a smaller model"
            )
        self._server_starts[server.name] += 1
        if self._server_starts[server.name] > SERVER_RESTARTS:
            raise server.failed(f"server {server.name} {how}, {self._server_starts[server.name]} times in all")
        await self._start_server(server, self.coordinator.address.result())
        return f"server {server.name} {how}; started again, others have what it had. Training goes on"

    async def start_coordinator(self) -> None:
        """Start the coordinator, also again, on the address and the state of the first time."""
        again = self.coordinator.address.done()
        bind = self.coordinator.address.result() if again else f"127.0.0.1:{self._config.port}"
        flags = ["--bind", bind, "--state", str(self._state), "--job", JOB, "--log-level", "info"]
        flags += ["--start-workers", str(self._config.workers), "--min-servers", str(self._config.servers)]
        flags += ["--replicas", str(self._config.replicas)]
        flags += _checkpoint_flags(self._config)
        self._coordinator_starts += 1
        await self._spawn(self.coordinator, ["-m", "paramesh_coordinator.cli", *flags], self.coordinator.sink)

    async def coordinator_ended(self, exit_code: int) -> str:
        """Restart a coordinator that ended; return a sentence about it.

        Raises:
            ChildFailed: it ended too often.
        """
        how = describe_exit(exit_code)
        if self._coordinator_starts > COORDINATOR_RESTARTS:
            raise self.coordinator.failed(f"ps-coordinator {how}, {self._coordinator_starts} times in all")
        await self.start_coordinator()
        return f"ps-coordinator {how}; started again on its state. Training goes on"

    async def _start_workers(self, coordinator: str, events_fd: int) -> None:
        config = self._config
        flags = ["--coordinator", coordinator, "--job", JOB, "--name", HOST, "--nproc", str(config.workers)]
        flags += ["--max-restarts", str(config.max_restarts), "--grace", str(config.grace)]
        flags += ["--log-dir", str(self._folder), "--tee", "--events-fd", str(events_fd)]
        command = ["-m", self._command.target] if self._command.is_module else ["--", self._command.target]
        settings = {
            "PARAMESH_RANK": "0",
            "PARAMESH_MODE": config.mode,
            "PARAMESH_STALENESS": None if config.staleness is None else str(config.staleness),
            "PARAMESH_EVERY": None if config.every is None else str(config.every),
        }
        await self._spawn(
            self.workers,
            ["-m", "paramesh_worker.cli", *flags, *command, *self._command.arguments],
            self._sink_of_workers,
            env={name: value for name, value in settings.items() if value is not None},
            pass_fds=[events_fd],
        )

    async def _sink_of_workers(self, stream: int, lines: list[bytes]) -> None:
        """Show what the training processes wrote; what the supervisor itself says goes to its log."""
        own = [line for line in lines if not line.startswith(b"[worker ")]
        if own:
            await self.workers.sink(stream, own)
        if len(own) < len(lines):
            await self._show(stream, [line for line in lines if line.startswith(b"[worker ")])

    async def _spawn(
        self,
        role: Role,
        arguments: list[str],
        sink: Sink,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        # -P: a user's grpc.py or logging.py in the working folder must not be taken for the real one.
        role.process = await self._nursery.spawn(
            role.name,
            [sys.executable, "-P", *arguments],
            env={**self._environ, **(env or {})},
            sink=sink,
            pass_fds=pass_fds,
        )

    async def stop(self, number: int = signal.SIGTERM) -> None:
        """End everything, workers first; kill what has not ended after the grace."""
        grace_s = self._config.grace
        # The supervisor needs its own grace for its children, and a moment to say goodbye.
        await self._stop([self.workers], number, grace_s + 3.0)
        await self._stop(self.servers, signal.SIGTERM, grace_s)
        await self._stop([self.coordinator], signal.SIGTERM, grace_s)

    @staticmethod
    async def _stop(roles: Sequence[Role], number: int, grace_s: float) -> None:
        alive = [role.process for role in roles if role.process is not None]
        await asyncio.gather(*(process.stop(number, grace_s) for process in alive))
        await asyncio.gather(*(process.drained() for process in alive))

    def close(self) -> None:
        """Close the log files."""
        for role in self.roles:
            with contextlib.suppress(OSError):
                role.close()
