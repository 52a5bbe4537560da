"""`ps-server` as a process: its heartbeat helper, signals, a coordinator that is away or refuses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paramesh.channel import aio_channel, header
from paramesh.io import IoThread
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.coordinator_pb2_grpc import MapServiceStub
from paramesh_server.beat import process_state

from tests.cluster import inspection
from tests.faults.proxy import Proxy


class Nodes:
    """Processes of one test, killed by their ids at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.coordinator = ""

    def start(self, name: str, module: str, *flags: str, **env: str) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as out:
            command = [sys.executable, "-m", module, *flags]
            process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **env})
        self.processes[name] = process
        return process

    def start_coordinator(self, bind: str = "127.0.0.1:0", *flags: str) -> str:
        self.log("coordinator").unlink(missing_ok=True)  # an earlier one's words are not this one's
        # On a file: a coordinator that comes back empty beside a living cluster refuses to lead.
        state = str(self.folder / "coordinator.sqlite")
        self.start("coordinator", "paramesh_coordinator.cli", "--state", state, "--bind", bind, *flags)
        self.coordinator = self.said("coordinator", r"serving address=(\S+)")
        return self.coordinator

    def start_server(self, name: str, *flags: str, **env: str) -> subprocess.Popen[bytes]:
        flags = ("--coordinator", self.coordinator, "--name", name, *flags)
        return self.start(name, "paramesh_server.cli", *flags, **env)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def said(self, name: str, pattern: str) -> str:
        """Wait until a log line matches; its first group."""

        def look() -> str | None:
            found = re.search(pattern, self.log(name).read_text() if self.log(name).exists() else "")
            return found.group(1) if found else None

        found = eventually(look, f"{name} to say {pattern!r}")
        assert found is not None
        return found

    def map(self) -> pb.PartitionMap:
        async def ask() -> pb.PartitionMap:
            async with aio_channel(self.coordinator) as channel:
                answer = await MapServiceStub(channel).GetMap(co.GetMapRequest(request=header("default")), timeout=5)
                return answer.map  # type: ignore[no-any-return]

        return IoThread.get().run(ask(), 10, "the map")

    def state(self, name: str) -> int:
        return next((n.state for n in self.map().nodes if n.ref.node == name), 0)

    def helper_of(self, name: str) -> int:
        """Process id of a server's heartbeat helper; 0 if it has none."""
        parent = self.processes[name].pid
        children = Path(f"/proc/{parent}/task/{parent}/children")
        for child in children.read_text().split():
            if b"paramesh_server.beat" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        return 0


def eventually(look: Callable[[], object], what: str, seconds: float = 40.0):  # type: ignore[no-untyped-def]
    """Poll until something is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return found


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    for process in made.processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(10)


def test_a_server_says_where_it_serves_and_leaves_with_status_0(nodes: Nodes) -> None:
    nodes.start_coordinator()
    server = nodes.start_server("s0", "--metrics-port", "0", "--reflection")
    address = nodes.said("s0", r"serving name=s0 address=(\S+) control=\S+ job=default")
    assert nodes.state("s0") == pb.NODE_STATE_LIVE
    assert [n.address for n in nodes.map().nodes] == [address]
    helper = eventually(lambda: nodes.helper_of("s0"), "the helper")
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    assert "Traceback" not in nodes.log("s0").read_text()
    assert nodes.state("s0") in (0, pb.NODE_STATE_LEFT)
    eventually(lambda: process_state(helper)[0] == "X", "the helper to end")


def test_a_killed_server_is_dead_at_once_by_its_helper(nodes: Nodes) -> None:
    """Positive death, with the signal's number; silence alone would take the failure timeout."""
    nodes.start_coordinator("127.0.0.1:0", "--failure-timeout", "60", "--client-timeout", "60")
    server = nodes.start_server("s0")
    nodes.said("s0", r"(serving)")
    eventually(lambda: nodes.helper_of("s0"), "the helper")
    # The helper has looked at its parent once it beats; a registration alone is no beat.
    eventually(lambda: process_state(nodes.helper_of("s0"))[0] == "S", "the helper to run")
    server.kill()
    eventually(lambda: nodes.state("s0") == pb.NODE_STATE_DEAD, "the death to be known", 20)
    reason = next(n.reason for n in nodes.map().nodes if n.ref.node == "s0")
    assert "9" in reason or "KILL" in reason
    server.wait(10)


def test_a_death_whose_code_is_not_known_is_said_so(nodes: Nodes, tmp_path: Path) -> None:
    """A parent that reaps at once, as `timeout` does, leaves the helper nothing to look at: 255 would be a lie."""
    nodes.start_coordinator("127.0.0.1:0", "--failure-timeout", "60", "--client-timeout", "60")
    nodes.start_server("s0", "--heartbeat", "none")
    nodes.said("s0", r"(serving)")
    incarnation = next(n.ref.incarnation for n in nodes.map().nodes if n.ref.node == "s0")
    reaped = subprocess.Popen([sys.executable, "-c", ""])
    reaped.wait(20)
    helper = nodes.start(
        "helper", "paramesh_server.beat", "--coordinators", nodes.coordinator, "--job", "default", "--name", "s0",
        "--generation", str(nodes.map().generation), "--incarnation", str(incarnation), "--parent", str(reaped.pid),
        "--figures-fd", "0", "--interval", "0.5", "--timeout", "2",
    )  # fmt: skip
    assert helper.wait(20) == 0
    (reason,) = [n.reason for n in nodes.map().nodes if n.ref.node == "s0"]
    assert reason == "process ended: its exit code is not known"


def test_a_stopped_server_falls_silent_and_comes_back(nodes: Nodes) -> None:
    """The helper beats for exactly as long as the server could answer."""
    nodes.start_coordinator()
    nodes.start_server("s1")  # with every node silent the coordinator doubts itself
    server = nodes.start_server("s0")
    for name in ("s0", "s1"):
        nodes.said(name, r"(serving)")
    eventually(lambda: nodes.helper_of("s0"), "the helper")
    server.send_signal(signal.SIGSTOP)
    eventually(lambda: nodes.state("s0") == pb.NODE_STATE_DEAD, "silence to be judged")
    server.send_signal(signal.SIGCONT)
    eventually(lambda: nodes.state("s0") == pb.NODE_STATE_LIVE, "the server to be back")
    assert server.poll() is None


def test_a_server_whose_connections_hang_is_heard_on_new_ones(nodes: Nodes) -> None:
    """A flow that a switch has forgotten: only who connects anew gets through, and nothing is said to break."""
    nodes.start_coordinator()
    nodes.start_server("s1")  # with every node silent the coordinator doubts itself
    with Proxy(nodes.coordinator) as proxy:
        nodes.start("s0", "paramesh_server.cli", "--coordinator", proxy.address, "--name", "s0")
        for name in ("s0", "s1"):
            nodes.said(name, r"(serving)")
        helper = eventually(lambda: nodes.helper_of("s0"), "the helper")
        for _ in range(3):
            eventually(lambda: len(connections_of(helper)) == 1, "one connection of beats")
            (old,) = connections_of(helper)
            proxy.freeze()
            eventually(lambda old=old: connections_of(helper) - {old}, "another connection")
            eventually(lambda old=old: old not in connections_of(helper), "the old one to be given up")
    kinds = [event.kind for event in inspection.events(nodes.coordinator)]
    assert "server_dead" not in kinds, kinds


def connections_of(pid: int) -> set[str]:
    """The TCP sockets that a process has open, by the kernel's number."""
    found, tcp = set(), set()
    for table in ("tcp", "tcp6"):  # gRPC's sockets are of both families
        tcp |= {line.split()[9] for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            name = fd.readlink().name
            if name.startswith("socket:[") and name[8:-1] in tcp:
                found.add(name)
    return found


def test_a_server_is_heard_while_its_helper_starts(nodes: Nodes, tmp_path: Path) -> None:
    """A busy machine needs longer for a process than the failure timeout: a fresh server was taken for dead."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import sys, time\nif 'paramesh_server.beat' in sys.orig_argv:\n    time.sleep(7)\n"
    )
    nodes.start_coordinator()
    nodes.start_server("s1")  # with every node silent the coordinator doubts itself
    nodes.said("s1", r"(serving)")
    nodes.start_server("s0", PYTHONPATH=os.pathsep.join([str(slow), os.environ.get("PYTHONPATH", "")]))
    nodes.said("s0", r"(serving)")
    began = time.monotonic()
    eventually(lambda: time.monotonic() > began + 5, "the failure timeout to be over, twice")
    assert "server_dead" not in nodes.log("coordinator").read_text()
    assert nodes.state("s0") == pb.NODE_STATE_LIVE


def test_the_helper_is_started_again(nodes: Nodes) -> None:
    nodes.start_coordinator()
    nodes.start_server("s0")
    first = eventually(lambda: nodes.helper_of("s0"), "the helper")
    os.kill(first, signal.SIGKILL)
    eventually(lambda: nodes.helper_of("s0") not in (0, first), "another helper")


def test_a_server_waits_for_its_coordinator(nodes: Nodes) -> None:
    """Nobody exits for want of a coordinator, at the start or later."""
    address = nodes.start_coordinator()
    nodes.processes["coordinator"].kill()
    nodes.processes["coordinator"].wait(10)
    server = nodes.start_server("s0")
    nodes.said("s0", r"(registration=waiting)")
    assert server.poll() is None
    nodes.start_coordinator(address)
    nodes.said("s0", r"(serving name=s0)")
    nodes.processes["coordinator"].kill()
    nodes.processes["coordinator"].wait(10)
    nodes.start_coordinator(address)
    eventually(lambda: nodes.state("s0") == pb.NODE_STATE_LIVE, "the server to be known again")
    assert server.poll() is None


def test_a_name_that_is_taken_ends_with_status_1_and_says_so(nodes: Nodes) -> None:
    nodes.start_coordinator()
    nodes.start_server("s0")
    nodes.said("s0", r"(serving)")
    rival = nodes.start("rival", "paramesh_server.cli", "--coordinator", nodes.coordinator, "--name", "s0",
                        "--name-patience", "0")  # fmt: skip
    assert rival.wait(40) == 1
    assert "NODE_NAME" in nodes.log("rival").read_text()
    assert nodes.processes["s0"].poll() is None


def test_a_replaced_server_ends_by_itself(nodes: Nodes) -> None:
    nodes.start_coordinator()
    old = nodes.start_server("s0")
    nodes.said("s0", r"(serving)")
    nodes.start("new", "paramesh_server.cli", "--coordinator", nodes.coordinator, "--name", "s0", "--replace")
    nodes.said("new", r"(serving)")
    assert old.wait(40) == 1
    assert "INCARNATION" in nodes.log("s0").read_text()


def test_a_port_that_is_taken_is_a_mistake_in_the_flags(nodes: Nodes) -> None:
    nodes.start_coordinator()
    nodes.start_server("s0")
    address = nodes.said("s0", r"serving name=s0 address=(\S+)")
    rival = nodes.start_server("s1", "--bind", address)
    assert rival.wait(40) == 2
    assert "--bind" in nodes.log("s1").read_text()


def test_the_metrics_page(nodes: Nodes) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes.start_coordinator()
    nodes.start_server("s0", "--metrics-port", str(port))
    nodes.said("s0", r"(serving)")
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    for name in ("received_bytes", "sent_bytes", "pushes", "duplicates", "steps_applied", "refused", "staged_bytes"):
        assert f"paramesh_server_{name}" in page


def test_the_helper_imports_no_torch() -> None:
    code = "import paramesh_server.beat, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
