"""What a scenario may do with a cluster on several hosts, whichever backend it is.

A node is a host of its own, by the same name: "coordinator", "server-0", ..., "worker-0", ...; with several
coordinators "coordinator-0", ... and "etcd". The test itself stands beside the wires: it reaches every host always.
"""

from __future__ import annotations

import abc
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.cluster.handle import ClusterHandle
from tests.containers.wires import Wires


class HostCluster(ClusterHandle):
    """A cluster whose nodes have addresses of their own."""

    kind = ""
    """What it is made of, for the report."""
    wires: Wires

    @abc.abstractmethod
    def address(self, host: str) -> str:
        """A host's address."""

    @abc.abstractmethod
    def terminate(self, node: str) -> None:
        """Ask a node to end (SIGTERM)."""

    @abc.abstractmethod
    def exit_code_of(self, node: str) -> int | None:
        """Of a node's process; None while it runs."""

    @abc.abstractmethod
    def add_server(self) -> str:
        """Start one more server on a host of its own; its name."""

    @abc.abstractmethod
    def start_coordinator(self, index: int) -> None:
        """Start another coordinator of a cluster on etcd."""

    @abc.abstractmethod
    def run_on(self, host: str, script: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a Python script of tests/containers on a host; it is ended with the cluster."""

    def hosts(self, *but: str) -> list[str]:
        """All hosts except some."""
        return [name for name in self.host_names() if name not in but]

    @abc.abstractmethod
    def host_names(self) -> list[str]:
        """Every host that there is."""

    def psctl(self, *words: str) -> Any:
        """What psctl answers, as JSON; raises if it fails."""
        command = [sys.executable, "-m", "paramesh_coordinator.psctl", "--coordinator", self.coordinator_address]
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, f"psctl {' '.join(words)}: {done.stderr or done.stdout}"
        return json.loads(done.stdout) if "--json" in words else done.stdout

    def lose(self, host: str) -> None:
        """A host loses its power: nobody hears a goodbye, not even of its kernel."""
        self.wires.cut([host], self.hosts(host))
        self.kill(host)


def python_environment(env: dict[str, str]) -> dict[str, str]:
    """The part of an environment that a process in a container needs from the test's."""
    return {key: value for key, value in env.items() if key.startswith(("OMP_", "MKL_", "PYTHON"))}


def joined(addresses: Sequence[str]) -> str:
    """Addresses as flags take them."""
    return ",".join(addresses)
