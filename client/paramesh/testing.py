"""A whole cluster inside one process, for tests of code that uses Paramesh.

    with paramesh.testing.Cluster(servers=2, workers=3) as cluster:
        losses = cluster.run(train)          # train(rank) in three threads

    def train(rank):
        model = Net()
        optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        ...                                  # as in a script; the cluster is found by itself

It starts in a fraction of a second: the coordinator and the servers live on the process's
IO thread, workers are threads. Sockets, messages, ledger and storage are the real ones; a
crash of a process, its memory and its GIL are not: use `ps-run` to see those.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from paramesh.config import ClientConfig
from paramesh.errors import ConfigError, refuse

if TYPE_CHECKING:
    from paramesh_coordinator.config import CoordinatorConfig
    from paramesh_coordinator.server import CoordinatorServer
    from paramesh_server.server import ParameterServer

    from paramesh.client import Client
    from paramesh.io import IoThread
    from paramesh.membership import Session

__all__ = ["Cluster"]

T = TypeVar("T")

START_SECONDS = 30.0
"""For the whole cluster to come up; it takes well under one on an idle machine."""

STOP_SECONDS = 10.0
"""For one node to stop; after it the node is left to the process's end."""


class Cluster:
    """A coordinator, servers and worker threads in this process. A context manager.

    Args:
        servers: how many parameter servers.
        workers: how many threads `run` starts; also the default of `start_workers`.
        deadline: seconds that `run` may take, unless it is told otherwise.
        directory: where the coordinator keeps its state; default: a temporary folder.
        job_config: fields of `paramesh_coordinator.config.CoordinatorConfig`, such as
            `min_workers=2`, `gather=0.2` or `failure_timeout=0.5` (seconds).

    Raises:
        ConfigError: a count is below 1, or a field does not exist or is wrong.
    """

    def __init__(
        self,
        servers: int = 1,
        workers: int = 1,
        *,
        deadline: float = 60.0,
        directory: Path | None = None,
        **job_config: Any,
    ) -> None:
        if servers < 1 or workers < 1:
            raise ConfigError(f"servers={servers} and workers={workers} must be at least 1")
        self.workers = workers
        self.deadline = deadline
        self._server_count = servers
        self._job_config = {"start_workers": workers, **job_config}
        self._own_directory = directory is None
        self._directory = directory
        self._coordinator: CoordinatorServer | None = None
        self._servers: dict[int, ParameterServer] = {}
        """By index; killed ones are taken out."""
        self._clients: list[Client] = []
        self._address = ""

    # ------------------------------------------------------------------ start and stop

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start coordinator and servers; returns when all servers are registered.

        Raises:
            Timeout: they did not come up within 30 s.
        """
        if self._own_directory:
            self._directory = Path(tempfile.mkdtemp(prefix="paramesh-testing-"))
        # Here, and not on the loop: importing torch for seconds there would stop every beat.
        import paramesh_server.server  # noqa: F401

        try:
            self._io.run(self._start(), START_SECONDS, "the in-process cluster to start")
        except BaseException:
            self.stop()
            raise

    async def _start(self) -> None:
        await self._start_coordinator("127.0.0.1:0")
        await asyncio.gather(*(self._start_server(i) for i in range(self._server_count)))

    def stop(self) -> None:
        """Stop everything; repeatable."""
        clients, self._clients = self._clients, []
        nodes: list[Any] = [*self._servers.values(), *([self._coordinator] if self._coordinator else [])]
        self._servers, self._coordinator = {}, None
        for client in clients:
            with contextlib.suppress(Exception):
                client.close()
        for node in nodes:
            with contextlib.suppress(Exception):
                self._io.run(node.stop(), STOP_SECONDS, "a node of the in-process cluster to stop")
        if self._own_directory and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _io(self) -> IoThread:
        from paramesh.io import IoThread

        return IoThread.get()

    # ------------------------------------------------------------------ nodes

    @property
    def address(self) -> str:
        """host:port of the coordinator, as PARAMESH_COORDINATOR takes it."""
        return self._address

    def _coordinator_config(self, bind: str) -> CoordinatorConfig:
        from paramesh_coordinator.config import CoordinatorConfig

        assert self._directory is not None
        fields: dict[str, Any] = {"min_servers": self._server_count, **self._job_config}
        try:
            return CoordinatorConfig(bind=bind, state=self._directory / "coordinator.sqlite", **fields)
        except TypeError as error:
            raise ConfigError(f"Cluster: {error}") from None

    async def _start_coordinator(self, bind: str) -> None:
        from paramesh_coordinator.server import CoordinatorServer

        coordinator = CoordinatorServer(self._coordinator_config(bind))
        await coordinator.start()
        self._coordinator, self._address = coordinator, coordinator.address

    async def _start_server(self, index: int) -> None:
        from paramesh_server.config import ServerConfig
        from paramesh_server.server import ParameterServer

        config = ServerConfig(
            coordinator=self._address,
            job=str(self._job_config.get("job", "default")),
            name=f"server-{index}",
            heartbeat="loop",
        )
        server = ParameterServer(config)
        await server.start()
        self._servers[index] = server

    def kill_server(self, index: int) -> None:
        """End server `index` without goodbye; its partitions are lost with it.

        Raises:
            KeyError: there is no such server, or it was killed before.
        """
        server = self._servers.pop(index)
        self._io.run(server.kill(), STOP_SECONDS, f"server {index} to end")

    def add_server(self) -> int:
        """Start one more server; returns its index when it is registered."""
        self._server_count += 1
        index = self._server_count - 1
        self._io.run(self._start_server(index), START_SECONDS, f"server {index} to start")
        return index

    def stop_server(self, index: int, drain: float = 25.0) -> list[int]:
        """Stop server `index` as SIGTERM does: it gives its partitions away first.

        Args:
            index: which.
            drain: seconds that this may take.

        Returns:
            Partitions that were lost with it.

        Raises:
            KeyError: there is no such server, or it was stopped or killed before.
        """
        server = self._servers[index]
        lost = self._io.run(server.drain(drain), drain + STOP_SECONDS, f"server {index} to drain")
        del self._servers[index]
        self._io.run(server.stop(), STOP_SECONDS, f"server {index} to stop")
        return lost

    def restart_coordinator(self, downtime: Callable[[], object] | None = None) -> None:
        """Stop the coordinator and start it again on its file and address.

        Args:
            downtime: called while there is no coordinator.
        """
        assert self._coordinator is not None
        self._io.run(self._coordinator.stop(), STOP_SECONDS, "the coordinator to stop")
        self._coordinator = None
        if downtime is not None:
            downtime()
        self._io.run(self._start_coordinator(self._address), START_SECONDS, "the coordinator to start")

    # ------------------------------------------------------------------ clients and workers

    def client(self) -> Client:
        """A low-level client (see `paramesh.connect`); closed with the cluster."""
        from paramesh.client import connect

        client = connect(self._address, str(self._job_config.get("job", "default")))
        self._clients.append(client)
        return client

    def call(self, coro: Coroutine[Any, Any, T], deadline: float | None = None) -> T:
        """Run a coroutine, such as `client.pull(...)`, where the clients live, and wait for it."""
        return self._io.run(coro, deadline or self.deadline, "a call to the in-process cluster")

    def run(self, fn: Callable[[int], T], *, workers: int | None = None, deadline: float | None = None) -> list[T]:
        """Run `fn(rank)` in one thread per worker, each a member of the cluster.

        Args:
            fn: what a training script does; `paramesh` inside it is this cluster's.
            workers: how many threads; default: the cluster's.
            deadline: seconds for all of them; default: the cluster's.

        Returns:
            What each returned, in rank order.

        Raises:
            Exception: the first that a worker raised, with a note that names the worker;
                the other workers are disconnected, so that they end too.
            Timeout: DEADLINE; the message says where each unfinished worker stands.
        """
        count = workers or self.workers
        run = _Run(fn, [self._worker_config(rank) for rank in range(count)])
        return run.results(deadline or self.deadline)

    def _worker_config(self, rank: int) -> ClientConfig:
        job = str(self._job_config.get("job", "default"))
        return ClientConfig(coordinators=self._address, job=job, slot=f"testing/{rank}", rank=rank)


class _Run(Generic[T]):
    """The threads of one `Cluster.run`."""

    def __init__(self, fn: Callable[[int], T], configs: list[ClientConfig]) -> None:
        self._fn = fn
        self._ended = threading.Condition()
        self._results: dict[int, T] = {}
        """By rank; written by the worker's own thread."""
        self._failures: list[tuple[int, BaseException]] = []
        """In the order in which they happened; the others are often its consequences."""
        self._sessions: list[Session] = []
        self._abandoned = False
        """Whether the run is over for those who have not ended; set once, with the lock held."""
        self._threads = [
            threading.Thread(target=self._work, args=(c,), name=f"paramesh-testing-{c.rank}", daemon=True)
            for c in configs
        ]

    def _work(self, config: ClientConfig) -> None:
        from paramesh.membership import Session
        from paramesh.session import using

        rank = config.rank or 0
        try:
            session = Session.join(config)
            with self._ended:
                self._sessions.append(session)
                late = self._abandoned
            if late:  # the run ended while this worker was joining: nobody else would end it
                session.leave(gracefully=False)
                return
            with using(session):
                result = self._fn(session.rank)
            session.leave()
            with self._ended:
                self._results[session.rank] = result
                self._ended.notify_all()
        except BaseException as error:
            error.add_note(f"in worker {rank} of paramesh.testing.Cluster")
            with self._ended:
                self._failures.append((rank, error))
                self._ended.notify_all()

    def results(self, deadline: float) -> list[T]:
        """Start the threads and wait for all, or for the first failure."""
        for thread in self._threads:
            thread.start()
        with self._ended:
            over = self._ended.wait_for(self._is_over, deadline)
        if not over:
            where = self._where()
            self._abandon()
            raise refuse("DEADLINE", f"waited {deadline:g} s for workers of the in-process cluster\n{where}")
        if self._failures:
            self._abandon()
            raise self._failures[0][1]
        return [self._results[rank] for rank in sorted(self._results)]

    def _is_over(self) -> bool:
        return bool(self._failures) or len(self._results) == len(self._threads)

    def _abandon(self) -> None:
        """Disconnect the workers, and give their threads a moment to notice."""
        with self._ended:
            self._abandoned = True
            joined = list(self._sessions)
        for session in joined:
            session.leave(gracefully=False)
        end = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _where(self) -> str:
        """The innermost frames of each unfinished worker."""
        frames = sys._current_frames()
        parts = []
        for thread in self._threads:
            frame = frames.get(thread.ident or 0)
            if thread.is_alive() and frame is not None:
                stack = "".join(traceback.format_stack(frame, limit=8)[-4:])
                parts.append(f"{thread.name} is at:\n{stack}")
        return "\n".join(parts)
