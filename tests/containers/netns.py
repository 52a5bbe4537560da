"""Hosts as network namespaces of this machine: the commands a user starts, each at an address of its own.

A bridge in a namespace of its own is the switch; every host has a leg there, and so has the test itself, which may look
at the cluster whatever is cut.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cluster.processes import START_DEADLINE, Process, ProcessCluster
from tests.containers.hosts import HostCluster
from tests.containers.wires import End, Wires, missing

HERE = Path(__file__).parent

PORT = 7070
"""Of the coordinator; every host has all ports for itself."""

ETCD_PORT = 2379

NETNS = Path("/run/netns")
CGROUPS = Path("/sys/fs/cgroup/memory")
"""Version 1, or version 2 (`memory.max`) in the folder above."""


def available() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if why := missing():
        return why
    probe = f"pmprobe{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return f"ip netns add: {done.stderr.strip()}" if done.returncode else ""


class Switch:
    """A bridge, and a leg for each host."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        # Two pytest processes have two pids, and one has all its switches numbered.
        self.tag = f"pm{os.getpid():x}x{next(self._numbers):x}"
        self.network = self._free_network()
        self._next = 10
        self._hosts: list[str] = []

    @staticmethod
    def _free_network() -> str:
        used = subprocess.run(["ip", "-o", "-4", "addr"], capture_output=True, text=True, check=True).stdout
        start = os.getpid() % 200
        for number in (*range(start, 250), *range(start)):
            if f" 10.79.{number}." not in used:
                return f"10.79.{number}"
        raise RuntimeError("all networks of 10.79 are in use: end what was left over (`ip netns`)")

    def open(self) -> None:
        """Make the bridge, and the test's own leg."""
        self._ip(f"netns add {self.tag}")
        self._ip(f"-n {self.tag} link add br0 type bridge forward_delay 0")
        self._ip(f"-n {self.tag} link set br0 up")
        self._ip(f"link add {self.tag}d type veth peer name desk netns {self.tag}")
        self._ip(f"-n {self.tag} link set desk master br0 up")
        self._ip(f"addr add {self.network}.1/24 dev {self.tag}d")
        self._ip(f"link set {self.tag}d up")

    def add(self, name: str) -> End:
        """A host with an address of its own."""
        netns, address, port = f"{self.tag}-{name}", f"{self.network}.{self._next}", f"p{self._next}"
        self._next += 1
        self._ip(f"netns add {netns}")
        self._hosts.append(netns)
        self._ip(f"-n {netns} link set lo up")
        self._ip(f"link add eth0 netns {netns} type veth peer name {port} netns {self.tag}")
        self._ip(f"-n {self.tag} link set {port} master br0 up")
        self._ip(f"-n {netns} addr add {address}/24 dev eth0")
        self._ip(f"-n {netns} link set eth0 up")
        return End(name, str(NETNS / netns), address)

    def close(self) -> None:
        """Take everything away. Repeatable."""
        for netns in [*self._hosts, self.tag]:
            subprocess.run(["ip", "netns", "del", netns], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.tag}d"], capture_output=True)

    @staticmethod
    def _ip(arguments: str) -> None:
        subprocess.run(["ip", *arguments.split()], check=True)


class NetnsCluster(ProcessCluster, HostCluster):
    """Each node on a host of its own."""

    kind = "network namespaces"

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
        self.coordinators = [f"coordinator-{index}" for index in range(coordinators)] or ["coordinator"]
        """More than one name: on etcd, and only the first is started with the cluster."""
        self.memory_limit = memory_limit
        self.switch = Switch()
        self.wires = Wires()
        self.ends: dict[str, End] = {}
        self._cgroups: list[Path] = []
        self._scripts: list[subprocess.Popen[str]] = []

    @property
    def coordinator_address(self) -> str:
        return ",".join(f"{self.address(name)}:{PORT}" for name in self.coordinators)

    def host_names(self) -> list[str]:
        return list(self.ends)

    def address(self, host: str) -> str:
        """A host's address; the host is made if it is new."""
        if host not in self.ends:
            self.ends[host] = self.switch.add(host)
            self.wires.plug(self.ends[host])
        return self.ends[host].address

    def start(self) -> None:
        self.switch.open()
        if len(self.coordinators) == 1:
            super().start()
            return
        self._launch("etcd", etcd_command(self.address("etcd"), str(self.directory / "etcd")))
        self.start_coordinator(0)
        for index in range(self.server_count):
            self._launch(f"server-{index}", self._server_command(index))
        self.wait_until(self._all_registered, START_DEADLINE, "the servers to register")

    def start_coordinator(self, index: int) -> None:
        name = self.coordinators[index]
        command = self._coordinator_command()
        command[command.index("--bind") + 1] = f"{self.address(name)}:{PORT}"
        command[command.index("--state") + 1] = f"etcd://{self.address('etcd')}:{ETCD_PORT}/paramesh/test"
        self._launch(name, command)

    def add_server(self) -> str:
        name = f"server-{self.server_count}"
        self._launch(name, self._server_command(self.server_count))
        self.server_count += 1
        self.wait_until(lambda: name in self.live_servers(), START_DEADLINE, f"{name} to register")
        return name

    def exit_code_of(self, node: str) -> int | None:
        return self.processes[node].exit_code

    def _coordinator_command(self) -> list[str]:
        return [*super()._coordinator_command(), "--insecure"]

    def _server_command(self, index: int) -> list[str]:
        command = super()._server_command(index)
        command[command.index("--bind") + 1] = f"{self.address(f'server-{index}')}:7080"
        return [*command, "--insecure", *self.server_flags]

    def _launch(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> Process:
        limited = self._limit(name) if self.memory_limit and name.startswith("server-") else []
        return super()._launch(name, [*self._inside(name), *limited, *command], env)

    def _inside(self, host: str) -> list[str]:
        """What starts a command on a host: its network and its name, which tells hosts apart for placement."""
        self.address(host)
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
        return ["nsenter", f"--net={self.ends[host].netns}", "--", *named]

    def _limit(self, name: str) -> list[str]:
        """What starts a command in a control group of its own with the memory limit."""
        base, file = (CGROUPS, "memory.limit_in_bytes") if CGROUPS.is_dir() else (CGROUPS.parent, "memory.max")
        group = base / f"{self.switch.tag}-{name}"
        if not group.is_dir():
            group.mkdir()
            self._cgroups.append(group)
        (group / file).write_text(str(self.memory_limit))
        return ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]

    def run_on(self, host: str, script: str, *arguments: str) -> subprocess.Popen[str]:
        command = [*self._inside(host), sys.executable, str(HERE / script), *arguments]
        popen = subprocess.Popen(
            command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._scripts.append(popen)
        return popen

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            for popen in self._scripts:
                popen.kill()
                popen.wait(10)
            self.wires.close()
            self.switch.close()
            for group in self._cgroups:
                with contextlib.suppress(OSError):
                    group.rmdir()


def etcd_command(address: str, folder: str) -> list[str]:
    """One member of etcd at an address."""
    client, peer = f"http://{address}:{ETCD_PORT}", f"http://{address}:2380"
    return [
        "etcd", "--name=one", f"--data-dir={folder}", f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=one={peer}",
    ]  # fmt: skip
