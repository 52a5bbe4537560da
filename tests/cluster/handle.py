"""What a test may do with a cluster, whatever it is made of."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tests.cluster.desk import DeskReader
from tests.cluster.waiting import wait_until

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Unsupported(Exception):
    """This kind of cluster cannot do that; guard with `can_pause` and the like."""


class WorkersFailed(Exception):
    """Workers ended with another exit code than 0; the message has their logs."""

    def __init__(self, failed: Sequence[WorkerHandle]) -> None:
        self.failed = failed
        super().__init__("\n".join(f"worker {w.index} ended with {w.exit_code}:\n{w.log()}" for w in failed))


class WorkerHandle(abc.ABC):
    """One worker that runs a body (`package.module:function`, called with a Desk)."""

    def __init__(self, index: int, reader: DeskReader) -> None:
        self.index = index
        self.reader = reader

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What the body has emitted so far."""
        return self.reader.events(kind)

    def last(self, kind: str) -> dict[str, Any]:
        """The newest event of `kind`; there must be one."""
        events = self.events(kind)
        assert events, f"worker {self.index} emitted no {kind!r}:\n{self.log()}"
        return events[-1]

    def open_gate(self, name: str) -> None:
        """Let the body pass `desk.gate(name)`."""
        self.reader.open_gate(name)

    @property
    @abc.abstractmethod
    def exit_code(self) -> int | None:
        """None while it runs; 0 when the body returned."""

    @abc.abstractmethod
    def log(self) -> str:
        """What it wrote to stdout and stderr, or the traceback of its thread."""


class ClusterHandle(abc.ABC):
    """A coordinator, servers and workers. Use it as a context manager.

    Nodes are named "coordinator", "server-0", "server-1", ...; workers are handles.
    """

    can_pause = False
    """Whether `pause` and `resume` work (threads cannot be stopped)."""

    def __init__(self, servers: int = 1, directory: Path | None = None, replicas: int = 1, **job_config: Any) -> None:
        self.server_count = servers
        self.job_config = {"replicas": replicas, **job_config}
        self.workers: list[WorkerHandle] = []
        self._directory = directory

    def __enter__(self) -> ClusterHandle:
        try:
            self.start()
        except BaseException:
            self.print_logs()
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.print_logs()
        self.stop()

    @property
    @abc.abstractmethod
    def coordinator_address(self) -> str:
        """host:port of the coordinator."""

    @abc.abstractmethod
    def start(self) -> None:
        """Start coordinator and servers, and wait until all are registered."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Stop everything that was started. Repeatable, and works after failures."""

    @abc.abstractmethod
    def kill(self, node: str) -> None:
        """End a node with no goodbye (SIGKILL)."""

    @abc.abstractmethod
    def restart(self, node: str) -> None:
        """Start a node again: the coordinator on its store and address, a server as a new incarnation."""

    def pause(self, node: str) -> None:
        """Stop a node in its tracks (SIGSTOP)."""
        raise Unsupported(f"{type(self).__name__} cannot pause {node}")

    def resume(self, node: str) -> None:
        """Let a paused node go on (SIGCONT)."""
        raise Unsupported(f"{type(self).__name__} cannot resume {node}")

    @abc.abstractmethod
    def start_worker(self, body: str, *, supervised: bool = True, **args: Any) -> WorkerHandle:
        """Start a worker that runs `body`, with `args` on its desk."""

    def start_workers(self, count: int, body: str, **args: Any) -> Sequence[WorkerHandle]:
        """Start `count` workers of one body."""
        return [self.start_worker(body, **args) for _ in range(count)]

    @abc.abstractmethod
    def print_logs(self) -> None:
        """Print what the nodes and workers wrote, for a failed test's report."""

    def table_values(self) -> dict[str, torch.Tensor]:
        """The newest values of the cluster's only table, by tensor name, from the servers."""
        import paramesh

        with paramesh.connect(self.coordinator_address) as client:
            (table,) = client.tables()
            return client.pull(table)

    def wait_until(self, condition: Callable[[], T], deadline: float, what: str) -> T:
        """Poll a condition; see `tests.cluster.waiting.wait_until`."""
        return wait_until(condition, deadline, what)

    def wait_for_workers(self, deadline: float = 60.0) -> None:
        """Wait until every worker has ended with exit code 0."""
        ended = lambda: all(w.exit_code is not None for w in self.workers) or self._failed()  # noqa: E731
        wait_until(ended, deadline, "all workers to end")
        if failed := self._failed():
            raise WorkersFailed(failed)

    def _failed(self) -> list[WorkerHandle]:
        return [w for w in self.workers if w.exit_code not in (None, 0)]
