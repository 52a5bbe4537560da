"""Hosts that are none: processes on loopback. Nodes can be killed, stopped and restarted; there are no wires."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.handle import Unsupported
from tests.cluster.processes import START_DEADLINE, ProcessCluster
from tests.containers.hosts import HostCluster

HERE = Path(__file__).parent


class LocalCluster(ProcessCluster, HostCluster):
    """The processes of `ProcessCluster` behind the interface of hosts."""

    kind = "processes on loopback"

    def __init__(
        self,
        servers: int = 3,
        directory: Path | None = None,
        replicas: int = 2,
        *,
        memory_limit: int = 0,
        server_flags: Sequence[str] = (),
        **config: object,
    ) -> None:
        super().__init__(servers, directory, replicas, **config)
        self.server_flags = list(server_flags)
        if memory_limit:
            raise Unsupported("a memory limit needs a host")
        self._scripts: list[subprocess.Popen[str]] = []

    def _server_command(self, index: int) -> list[str]:
        return [*super()._server_command(index), *self.server_flags]

    def host_names(self) -> list[str]:
        return list(self.processes)

    def address(self, host: str) -> str:
        return "127.0.0.1"

    def exit_code_of(self, node: str) -> int | None:
        return self.processes[node].exit_code

    def add_server(self) -> str:
        name = f"server-{self.server_count}"
        self._launch(name, self._server_command(self.server_count))
        self.server_count += 1
        self.wait_until(lambda: name in self.live_servers(), START_DEADLINE, f"{name} to register")
        return name

    def start_coordinator(self, index: int) -> None:
        raise Unsupported("several coordinators on loopback are tests/cluster/several.py")

    def run_on(self, host: str, script: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / script), *arguments]
        popen = subprocess.Popen(
            command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._scripts.append(popen)
        return popen

    def lose(self, host: str) -> None:
        """As near as processes come to it: their kernel still says goodbye."""
        self.kill(host)

    def stop(self) -> None:
        super().stop()
        for popen in self._scripts:
            popen.kill()
            popen.wait(10)
