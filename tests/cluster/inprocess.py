"""A cluster inside the test's process: `paramesh.testing.Cluster` behind the same interface."""

from __future__ import annotations

import importlib
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

from paramesh import testing
from paramesh.config import ClientConfig

from tests.cluster.desk import Desk, DeskReader
from tests.cluster.handle import ClusterHandle, Unsupported, WorkerHandle


class ThreadWorker(WorkerHandle):
    """A worker body in a thread, with a session of its own."""

    def __init__(self, index: int, reader: DeskReader, body: str, args: dict[str, Any], address: str) -> None:
        super().__init__(index, reader)
        self._body = body
        self._args = args
        self._config = ClientConfig(coordinators=address, slot=f"thread/{index}")
        self._exit_code: int | None = None
        """Written once, by the thread, at its end."""
        self._traceback = ""
        threading.Thread(target=self._work, name=f"worker-{index}", daemon=True).start()

    def _work(self) -> None:
        from paramesh.membership import Session
        from paramesh.session import using

        module, _, function = self._body.partition(":")
        desk = Desk(self.reader.folder, self.index, self._args)
        try:
            desk.emit("hello", incarnation=0)
            session = Session.join(self._config)
            with using(session):
                getattr(importlib.import_module(module), function)(desk)
            session.leave()
            desk.emit("bye")
            self._exit_code = 0
        except BaseException:
            self._traceback = traceback.format_exc()
            self._exit_code = 1

    @property
    def exit_code(self) -> int | None:
        return self._exit_code

    def log(self) -> str:
        return self._traceback


class InProcessCluster(ClusterHandle):
    """Coordinator and servers on the IO thread, workers in threads."""

    def __init__(self, servers: int = 1, directory: Path | None = None, replicas: int = 1, **job_config: Any) -> None:
        super().__init__(servers, directory, replicas, **job_config)
        self._temporary = tempfile.TemporaryDirectory(prefix="paramesh-test-")
        self.directory = directory or Path(self._temporary.name)
        self._cluster = testing.Cluster(
            servers=servers,
            directory=self.directory,
            **{"start_workers": 1, **self.job_config},
        )

    @property
    def coordinator_address(self) -> str:
        return self._cluster.address

    def start(self) -> None:
        self._cluster.start()

    def stop(self) -> None:
        self._cluster.stop()
        self._temporary.cleanup()

    def kill(self, node: str) -> None:
        role, _, index = node.partition("-")
        if role != "server":
            raise Unsupported("in one process only servers can be killed; `restart` the coordinator")
        self._cluster.kill_server(int(index))

    def restart(self, node: str) -> None:
        if node != "coordinator":
            raise Unsupported("in one process only the coordinator can be restarted")
        self._cluster.restart_coordinator()

    def start_worker(self, body: str, *, supervised: bool = True, **args: Any) -> ThreadWorker:
        index = len(self.workers)
        reader = DeskReader(self.directory / f"desk-{index}")
        worker = ThreadWorker(index, reader, body, args, self.coordinator_address)
        self.workers.append(worker)
        return worker

    def print_logs(self) -> None:
        for worker in self.workers:
            print(f"\n===== worker {worker.index} (exit code {worker.exit_code}) =====\n{worker.log()}")
            print(*worker.events()[-20:], sep="\n")
