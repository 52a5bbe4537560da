"""What is started with defaults listens on loopback only, whatever it listens for."""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path

import pytest

from tests.cluster.processes import ProcessCluster, marked_processes

LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""


def listeners(pid: int) -> list[str]:
    """host:port of every TCP socket on which a process listens, from the kernel's tables."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.append(f"{ipaddress.ip_address(b''.join(words))}:{int(port, 16)}")
    return found


def outside(address: str) -> bool:
    ip = ipaddress.ip_address(address.rpartition(":")[0])
    return not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def test_every_role_with_defaults_is_out_of_reach_of_other_machines() -> None:
    with ProcessCluster(servers=0, min_servers=1) as cluster:
        server = [sys.executable, "-m", "paramesh_server.cli", "--coordinator", cluster.coordinator_address]
        metrics = ["--metrics-port", str(cluster.port + 1)]
        cluster.start_command("server", [*server, *metrics])
        cluster.start_worker("tests.cluster.bodies:tally", wait_at=0)
        cluster.wait_until(lambda: cluster.workers[0].events("waiting"), 90, "a worker in its first step")
        by_process = {name: listeners(process.pid) for name, process in cluster.processes.items()}
        assert len(by_process["coordinator"]) == 1
        assert len(by_process["server"]) == 3, "data, control and metrics"
        everything = [address for pid in marked_processes(str(cluster.directory)) for address in listeners(pid)]
        assert len(everything) >= 4
        assert [address for address in everything if outside(address)] == []


def test_what_is_outside_is_recognised() -> None:
    """The test above can fail: this process listens on every interface for a moment."""
    import socket

    with socket.create_server(("0.0.0.0", 0)) as open_to_all, socket.create_server(("127.0.0.1", 0)) as closed:
        found = {address.rpartition(":")[2]: outside(address) for address in listeners(os.getpid())}
        assert found[str(open_to_all.getsockname()[1])]
        assert not found[str(closed.getsockname()[1])]
    with pytest.raises(FileNotFoundError):
        listeners(2**22 + 1)
