"""A cluster of real processes: the commands a user starts, on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paramesh import failpoints

from tests.cluster.desk import DeskReader
from tests.cluster.handle import ClusterHandle, Unsupported, WorkerHandle
from tests.cluster.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
WORKER_MAIN = Path(__file__).with_name("worker_main.py")
TIED = [sys.executable, "-I", "-S", str(ROOT / "worker" / "paramesh_worker" / "child.py"), "exec"]
"""Runs a command so that the kernel ends it with its parent: a killed pytest leaves nothing."""
START_DEADLINE = 60.0
"""Seconds for a node to come up. Importing torch takes 2-3 s alone, and several times that
when all test workers start clusters on two busy cores."""


def free_port() -> int:
    """A port nobody listens on, below the ephemeral range.

    Below, because a coordinator must come back on its own port, and the kernel hands
    ephemeral ones to any connection in between.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@dataclass
class Process:
    """One started command, its log, and how to start it again."""

    name: str
    command: list[str]
    env: dict[str, str]
    log_path: Path
    popen: subprocess.Popen[bytes] | None = None
    paused: bool = field(default=False)

    def start(self) -> None:
        """Start it in a session of its own, so that its children can be found and ended with it."""
        with open(self.log_path, "ab") as log:
            self.popen = subprocess.Popen(
                [*TIED, str(os.getpid()), *self.command], env=self.env, cwd=ROOT, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process id; it must have been started."""
        assert self.popen is not None, f"{self.name} was not started"
        return self.popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self.popen is None else self.popen.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process only."""
        os.kill(self.pid, number)
        self.paused = number == signal.SIGSTOP or (self.paused and number != signal.SIGCONT)

    def wait(self, deadline: float) -> int:
        """Its exit code, within `deadline` seconds."""
        assert self.popen is not None
        return self.popen.wait(deadline)

    def tail(self, lines: int = 60) -> str:
        """The last lines of its output."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])


MARK = "PARAMESH_TEST_CLUSTER_DIR"
"""Environment variable that every process of a cluster inherits, to find them all at the end."""


def marked_processes(mark: str) -> list[int]:
    """Pids of all live processes whose environment carries this cluster's mark.

    Sessions and parents do not do: supervisors give their children sessions of their own,
    and orphans lose their parent. The mark cannot be lost, and cannot hit a reused pid.
    """
    needle, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def kill_all(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to each of these processes; those that are gone do not matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class ProcessWorker(WorkerHandle):
    """A worker process, or a supervisor with one below it."""

    def __init__(self, index: int, reader: DeskReader, process: Process) -> None:
        super().__init__(index, reader)
        self.process = process

    @property
    def exit_code(self) -> int | None:
        return self.process.exit_code

    @property
    def training_pid(self) -> int:
        """The pid of the newest training process, as its body said."""
        return int(self.last("hello")["pid"])

    def signal_training(self, number: signal.Signals) -> None:
        """Send a signal to the training process, not to its supervisor."""
        os.kill(self.training_pid, number)

    def signal_everything(self, number: signal.Signals) -> None:
        """Send a signal to supervisor and training process at once, as if the host went."""
        kill_all([self.process.pid, self.training_pid], number)

    def log(self) -> str:
        return self.process.tail()


class ProcessCluster(ClusterHandle):
    """Coordinator, servers and workers as processes of this machine."""

    can_pause = True

    def __init__(
        self,
        servers: int = 1,
        directory: Path | None = None,
        replicas: int = 1,
        *,
        fails: bool = False,
        server_flags: Sequence[str] = (),
        descriptors: int = 0,
        **job_config: Any,
    ) -> None:
        self.descriptors = descriptors
        """Servers may have as many file descriptors; 0: as many as we."""
        super().__init__(servers, directory, replicas, **job_config)
        self.server_flags = tuple(server_flags)
        """More flags of every ps-server."""
        self.fails = fails
        """Whether processes look at `paramesh.failpoints`; that costs each write a thread's turn."""
        self._own_directory = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="paramesh-test-"))
        self.port = free_port()
        self.processes: dict[str, Process] = {}

    @property
    def coordinator_address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of every process: ours, one thread each, nothing of a cluster around us."""
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PARAMESH_")}
        return clean | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                        "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1",
                        MARK: str(self.directory)}  # fmt: skip

    def arm(self, place: str, act: str, node: str) -> Path:
        """Have one process act at a place of `paramesh.failpoints`; the cluster must be started with `fails=True`.

        Args:
            place: its name.
            act: what it does there.
            node: the process.

        Returns:
            The file that says so: it is there until then, or until it is removed.
        """
        if not self.fails:
            raise Unsupported("start the cluster with fails=True")
        file = failpoints.file_of(self._places(node), place)
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_name(f".{file.name}")
        written.write_text(act)
        return written.rename(file)

    def fail_at(self, place: str, act: str) -> None:
        """Have every process act at a place, however often it comes there."""
        for node in self.processes:
            self.arm(place, act, node)

    def disarm(self) -> None:
        """No place does anything any more."""
        shutil.rmtree(self.directory / "failpoints", ignore_errors=True)

    def _places(self, node: str) -> Path:
        return self.directory / "failpoints" / node

    def start(self) -> None:
        self._launch("coordinator", self._coordinator_command())
        for index in range(self.server_count):
            self._launch(f"server-{index}", self._server_command(index))
        self.wait_until(self._all_registered, START_DEADLINE, f"{self.server_count} servers to register")

    def _coordinator_command(self) -> list[str]:
        settings = {"min_servers": self.server_count, **self.job_config}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        return [sys.executable, "-m", "paramesh_coordinator.cli", "--bind", self.coordinator_address,
                "--state", str(self.directory / "coordinator.sqlite"), *flags]  # fmt: skip

    def _server_command(self, index: int) -> list[str]:
        command = [sys.executable, "-m", "paramesh_server.cli", "--coordinator", self.coordinator_address,
                   "--name", f"server-{index}", "--bind", "127.0.0.1:0", *self.server_flags]  # fmt: skip
        if self.descriptors:
            return ["/bin/sh", "-c", f'ulimit -n {self.descriptors}; exec "$0" "$@"', *command]
        return command

    def _launch(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> Process:
        own = {failpoints.VARIABLE: f"@{self._places(name)}"} if self.fails else {}
        process = Process(name, list(command), (env or self.env) | own, self.directory / f"{name}.log")
        self.processes[name] = process
        process.start()
        return process

    def _all_registered(self) -> bool:
        for name, process in self.processes.items():
            if process.exit_code is not None:
                raise RuntimeError(f"{name} ended with {process.exit_code} while starting:\n{process.tail()}")
        return len(self.live_servers()) == self.server_count

    def live_servers(self) -> list[str]:
        """Names of the servers that the coordinator holds for live."""
        from tests.cluster.inspection import live_servers

        return live_servers(self.coordinator_address)

    def kill(self, node: str) -> None:
        process = self.processes[node]
        process.send(signal.SIGKILL)
        process.wait(10)

    def terminate(self, node: str) -> None:
        """Ask a node to end (SIGTERM)."""
        self.processes[node].send(signal.SIGTERM)

    def restart(self, node: str) -> None:
        process = self.processes[node]
        if process.exit_code is None:
            raise Unsupported(f"{node} still runs; kill it first")
        process.start()

    def pause(self, node: str) -> None:
        self.processes[node].send(signal.SIGSTOP)

    def resume(self, node: str) -> None:
        self.processes[node].send(signal.SIGCONT)

    def start_worker(self, body: str, *, supervised: bool = True, **args: Any) -> ProcessWorker:
        index = len(self.workers)
        reader = DeskReader(self.directory / f"desk-{index}")
        script = [str(WORKER_MAIN), body, str(reader.folder), str(index), json.dumps(args)]
        env = self.env | {"PARAMESH_COORDINATOR": self.coordinator_address}
        if supervised:
            command = [sys.executable, "-m", "paramesh_worker.cli", "--coordinator", self.coordinator_address,
                       "--name", f"host-{index}", *script]  # fmt: skip
        else:
            command = [sys.executable, *script]
        worker = ProcessWorker(index, reader, self._launch(f"worker-{index}", command, env))
        self.workers.append(worker)
        return worker

    def start_command(self, name: str, command: Sequence[str], **env: str) -> Process:
        """Start any other command as a node of this cluster, told where the coordinator is."""
        return self._launch(name, command, self.env | {"PARAMESH_COORDINATOR": self.coordinator_address, **env})

    def wait_for_commands(self, deadline: float) -> None:
        """Wait until all that `start_command` started have ended with exit code 0."""
        own = [p for n, p in self.processes.items() if n != "coordinator" and not n.startswith("server-")]

        def ended() -> bool:
            return all(p.exit_code is not None for p in own) or any(p.exit_code for p in own)

        wait_until(ended, deadline, "commands to end")
        for process in own:
            if process.exit_code:
                raise RuntimeError(f"{process.name} ended with {process.exit_code}:\n{process.tail()}")

    def stop(self) -> None:
        """SIGKILL to all: a test that cares for a graceful end asks for it itself."""
        mark = str(self.directory)
        kill_all(marked_processes(mark))
        for process in self.processes.values():
            if process.popen is not None:
                process.popen.wait(10)
        # Once more: a supervisor may have restarted its child between the look and the signal.
        wait_until(lambda: not kill_all(left := marked_processes(mark)) and not left, 10, "all processes to end")
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def print_logs(self) -> None:
        for name, process in self.processes.items():
            print(f"\n===== {name} (exit code {process.exit_code}) =====\n{process.tail()}")
        for worker in self.workers:
            tail = worker.events()[-20:]
            print(f"\n===== events of worker {worker.index} =====", *tail, sep="\n")
