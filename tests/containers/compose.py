"""Hosts as containers: the images of docker/ and the compose file that users type, with compose.faults.yaml on top.

Nodes are services of the compose file, so what is killed, stopped and started is what users run. Workers and scripts
are containers of the worker's image on the same network, with the repository's tests mounted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cluster.desk import DeskReader
from tests.cluster.handle import WorkerHandle
from tests.cluster.processes import ROOT
from tests.containers import engine
from tests.containers.hosts import HostCluster
from tests.containers.wires import End, Wires

PORT = 7070
FILES = ("docker/compose.yaml", "docker/compose.faults.yaml")
COMES_UP = 120.0
"""Seconds for containers to be there: their first reads of torch are from disk, three at a time."""

MOUNTED = "/paramesh-tests"
"""Where containers find the repository's tests."""


class ContainerWorker(WorkerHandle):
    """A container that runs a body."""

    def __init__(self, index: int, reader: DeskReader, cluster: ComposeCluster) -> None:
        super().__init__(index, reader)
        self._cluster = cluster

    @property
    def exit_code(self) -> int | None:
        return self._cluster.exit_code_of(f"worker-{self.index}")

    def log(self) -> str:
        return self._cluster.log_of(f"worker-{self.index}")


class ComposeCluster(HostCluster):
    """A compose project of its own."""

    kind = "docker compose"
    can_pause = True
    _numbers = itertools.count()

    def __init__(
        self,
        servers: int = 3,
        directory: Path | None = None,
        replicas: int = 2,
        *,
        coordinators: int = 0,
        memory_limit: int = 0,
        server_flags: Sequence[str] = (),
        **config: Any,
    ) -> None:
        super().__init__(servers, directory, replicas, **config)
        self.server_flags = list(server_flags)
        self.directory = directory or Path(tempfile.mkdtemp(prefix="paramesh-containers-"))
        self.directory.chmod(0o777)  # containers write their events as a user of their own
        self.number = next(self._numbers)
        self.project = f"pm{os.getpid():x}x{self.number}"
        self.network = f"10.78.{(os.getpid() + self.number) % 250}"
        self.coordinators = [f"coordinator-{index}" for index in range(coordinators)] or ["coordinator"]
        self.memory_limit = memory_limit
        self.wires = Wires()
        self._scripts: list[subprocess.Popen[str]] = []
        self._containers: dict[str, str] = {}
        """The container of each node that was started."""

    @property
    def coordinator_address(self) -> str:
        return ",".join(f"{self.address(name)}:{PORT}" for name in self.coordinators)

    def address(self, host: str) -> str:
        kind, _, index = host.partition("-")
        base = {"coordinator": 10, "etcd": 15, "server": 20, "worker": 30}.get(kind, 60)
        return f"{self.network}.{base + int(index or 0)}"

    def host_names(self) -> list[str]:
        return list(self._containers)

    @property
    def _env(self) -> dict[str, str]:
        settings = {"min_servers": self.server_count, **self.job_config}
        return os.environ | {
            "COMPOSE_PROJECT_NAME": self.project,
            "PARAMESH_NETWORK": self.network,
            "PARAMESH_PORT": "0",  # any free one: the test dials the container's own address
            "PARAMESH_COORDINATORS": self.coordinator_address,
            "PARAMESH_JOB_FLAGS": " ".join(f"--{key.replace('_', '-')}={value}" for key, value in settings.items()),
            "PARAMESH_STATE": f"etcd://{self.address('etcd')}:2379/paramesh/test"
            if len(self.coordinators) > 1
            else "/var/lib/paramesh/coordinator.sqlite",
            "SERVER_MEMORY": str(self.memory_limit or 0),
            "SERVER_FLAGS": " ".join(self.server_flags),
        }

    def _compose(self, *words: str) -> str:
        files = [word for file in FILES for word in ("-f", str(ROOT / file))]
        return self._docker("compose", "--profile", "*", *files, *words)

    def _docker(self, *words: str) -> str:
        done = subprocess.run(["docker", *words], env=self._env, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"docker {' '.join(words)}: {done.stderr[-3000:]}")
        return done.stdout

    def start(self) -> None:
        first = self.coordinators[:1]
        if len(self.coordinators) > 1:
            os.environ["ETCD_IMAGE"] = engine.etcd_image()
            first = ["etcd", *first]
        names = [*first, *(f"server-{index}" for index in range(self.server_count))]
        self._up(*names)
        self.wait_until(lambda: len(self.live_servers()) == self.server_count, COMES_UP, "servers to register")

    def _up(self, *names: str) -> None:
        self._compose("up", "-d", "--no-deps", "--no-build", *names)
        for name in names:
            self._know(name, self._compose("ps", "-q", "-a", name).strip())

    def _know(self, name: str, container: str) -> None:
        """A container runs as a node: plug its wires in."""
        self._containers[name] = container
        (state,) = json.loads(self._docker("inspect", container))
        if state["State"]["Running"]:
            self.wires.plug(End(name, state["NetworkSettings"]["SandboxKey"], self.address(name)))

    def live_servers(self) -> list[str]:
        """Names of the servers that the coordinator holds for live."""
        from tests.cluster.inspection import live_servers

        return live_servers(self.coordinator_address)

    def start_coordinator(self, index: int) -> None:
        self._up(self.coordinators[index])

    def add_server(self) -> str:
        name = f"server-{self.server_count}"
        self.server_count += 1
        self._up(name)
        self.wait_until(lambda: name in self.live_servers(), COMES_UP, f"{name} to register")
        return name

    def kill(self, node: str) -> None:
        self._docker("kill", "-s", "KILL", self._containers[node])
        self.wires.unplug(node)

    def terminate(self, node: str) -> None:
        self._docker("kill", "-s", "TERM", self._containers[node])

    def restart(self, node: str) -> None:
        self._docker("start", self._containers[node])
        self._know(node, self._containers[node])

    def pause(self, node: str) -> None:
        self._docker("pause", self._containers[node])

    def resume(self, node: str) -> None:
        self._docker("unpause", self._containers[node])

    def exit_code_of(self, node: str) -> int | None:
        running, code = self._docker(
            "inspect", "-f", "{{.State.Running}} {{.State.ExitCode}}", self._containers[node]
        ).split()
        return None if running == "true" else int(code)

    def log_of(self, node: str) -> str:
        """The last lines of what a node wrote."""
        done = subprocess.run(
            ["docker", "logs", "--tail", "60", self._containers[node]], capture_output=True, text=True
        )
        return done.stdout + done.stderr

    def start_worker(self, body: str, *, supervised: bool = True, **args: Any) -> ContainerWorker:
        index = len(self.workers)
        reader = DeskReader(self.directory / f"desk-{index}")
        reader.folder.chmod(0o777)
        script = [f"{MOUNTED}/tests/cluster/worker_main.py", body, str(reader.folder), str(index), json.dumps(args)]
        command = script if supervised else ["python", *script]
        self._run(f"worker-{index}", ["tini", "--", *(["ps-worker"] if supervised else [])], command)
        worker = ContainerWorker(index, reader, self)
        self.workers.append(worker)
        return worker

    def _run(self, name: str, entry: Sequence[str], command: Sequence[str]) -> None:
        """A container of the worker's image on the network of the cluster."""
        flags = [
            "--name", f"{self.project}-{name}", "--hostname", name, "--network", f"{self.project}_default",
            "--ip", self.address(name), "--entrypoint", entry[0],
            "-v", f"{ROOT / 'tests'}:{MOUNTED}/tests:ro", "-v", f"{self.directory}:{self.directory}",
            "-e", f"PYTHONPATH={MOUNTED}", "-e", f"PARAMESH_COORDINATOR={self.coordinator_address}",
            "-e", "OMP_NUM_THREADS=1", "-e", "MKL_NUM_THREADS=1",
        ]  # fmt: skip
        self._know(name, self._docker("run", "-d", *flags, "paramesh-worker", *entry[1:], *command).strip())

    def run_on(self, host: str, script: str, *arguments: str) -> subprocess.Popen[str]:
        if host not in self._containers:
            self._run(host, ["tini", "--"], ["sleep", "3600"])
        command = ["docker", "exec", "-i", self._containers[host], "python", f"{MOUNTED}/tests/containers/{script}"]
        popen = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._scripts.append(popen)
        return popen

    def stop(self) -> None:
        self.wires.close()
        for popen in self._scripts:
            popen.kill()
            popen.wait(10)
        own = [c for name, c in self._containers.items() if name.startswith(("worker", "crowd"))]
        with contextlib.suppress(RuntimeError):
            self._docker("rm", "-f", "-v", *own) if own else None
        self._compose("down", "-v", "-t", "0", "--remove-orphans")
        if self._directory is None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def print_logs(self) -> None:
        for name in self._containers:
            print(f"\n===== {name} (exit code {self.exit_code_of(name)}) =====\n{self.log_of(name)}")
        for worker in self.workers:
            print(f"\n===== events of worker {worker.index} =====", *worker.events()[-20:], sep="\n", file=sys.stdout)
