"""A real ps-coordinator, killed and started again on its file (fault rows 12, 13, 15)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paramesh.errors import ParameshError
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator.rows import decode
from paramesh_coordinator.store import SqliteStore

from tests.cluster.processes import Process, free_port
from tests.cluster.waiting import wait_until
from tests.integration.coordinator_peers import Caller, ControlServer, Heart, until

BEAT, TIMEOUT = 0.2, 1.0


class CoordinatorProcess:
    """One ps-coordinator on one file and one port."""

    def __init__(self, folder: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.state = folder / "coordinator.sqlite"
        flags = ["--bind", self.address, "--state", str(self.state)]
        flags += ["--heartbeat-interval", str(BEAT), "--failure-timeout", str(TIMEOUT)]
        self.command = [sys.executable, "-m", "paramesh_coordinator.cli", *flags]
        self.process = Process("coordinator", self.command, dict(os.environ), folder / "coordinator.log")

    def start(self) -> None:
        served = self.served()
        self.process.start()
        wait_until(lambda: self.served() > served or self._ended(), 30, "the coordinator to serve")
        assert self.process.exit_code is None, self.process.tail()

    def _ended(self) -> bool:
        return self.process.exit_code is not None

    def served(self) -> int:
        """How often it has said that it serves."""
        return self.process.tail(10_000).count(f"serving address={self.address} job=default term=")

    def kill(self) -> None:
        self.process.send(signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    started = CoordinatorProcess(tmp_path)
    try:
        started.start()
        yield started
    finally:
        if started.process.exit_code is None:
            started.kill()
        print(started.process.tail())


def psctl(coordinator: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paramesh_coordinator.psctl", *arguments, "--coordinator", coordinator]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_kill_minus_nine_evicts_nobody_and_resumes_what_was_pending(coordinator: CoordinatorProcess) -> None:
    """Invariant 19, and an eviction that was committed but not confirmed when it died."""

    async def body() -> None:
        call = Caller(coordinator.address)
        ledger = await ControlServer().start()
        await call.server("a", 1, ledger.address)
        await call.host("h", 1)
        hearts = [
            Heart(coordinator.address, co.NODE_KIND_SERVER, "a", 1, BEAT),
            Heart(coordinator.address, co.NODE_KIND_HOST, "h", 1, BEAT),
        ]
        victim, survivor = await call.client("h/0", 1, "h", 1), await call.client("h/1", 2, "h", 1)
        ledger.failing = "NOT_READY"
        await call.exit_of_slot("h", 1, "h/0", -9)
        before = await call.map()

        coordinator.kill()
        killed = time.monotonic()
        await until(lambda: time.monotonic() - killed > 2 * TIMEOUT, 10, "an outage of two failure timeouts")
        await asyncio.to_thread(coordinator.start)
        ledger.failing = ""
        await until(lambda: len(ledger.calls) == 2, 10, "the eviction to be resumed")
        assert ledger.calls == [("evict", (victim,), 2), ("fence", (victim,), 2)]

        async def settled() -> bool:
            status = await call.status()
            return status.uptime_ms > 3000 * TIMEOUT and not status.pending

        await until(settled, 20, "three failure timeouts of its new life")
        after = await call.map()
        assert (after.term, after.nodes, after.partitions) == (2, before.nodes, before.partitions)
        states = {c.client_id: c.state for c in (await call.status()).clients}
        assert states == {victim: "evicted", survivor: "live"}
        assert [heart.unknown for heart in hearts] == [0, 0]
        kinds = await call.kinds()
        assert not [kind for kind in kinds if kind in ("server_dead", "host_dead")], kinds
        assert kinds.count("client_evicted") == 1
        for heart in hearts:
            await heart.stop()
        await ledger.stop()
        await call.close()

    asyncio.run(body())


def test_what_was_acknowledged_survives_any_number_of_kills(coordinator: CoordinatorProcess) -> None:
    """Killed at random moments while clients register: no id is lost, none is given twice."""
    told: dict[int, int] = {}

    async def register(call: Caller, first: int) -> None:
        for incarnation in range(first, first + 10_000):
            told[incarnation] = await call.client(f"p/{incarnation}", incarnation)

    async def body() -> None:
        call = Caller(coordinator.address)
        for life in range(5):
            enough = len(told) + 20 + 3 * life
            work = asyncio.ensure_future(register(call, 1 + life * 10_000))
            await until(lambda n=enough: len(told) > n, 30, "some registrations")
            coordinator.kill()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, ParameshError):
                await work
            await asyncio.to_thread(coordinator.start)
        again = {i: await call.client(f"p/{i}", i) for i in list(told)[-50:]}
        assert again == {i: told[i] for i in again}
        assert (await call.map()).term == 6
        await call.close()

    asyncio.run(body())
    assert len(set(told.values())) == len(told), "an id was given twice"
    coordinator.kill()
    store = SqliteStore.open(coordinator.state)
    stored = {row.client_id: row.incarnation for k, v in store.scan("client/") if (row := decode(k, v))}  # type: ignore[union-attr]
    store.close()
    assert {client: stored.get(client) for client in told.values()} == {c: i for i, c in told.items()}


def test_a_paused_coordinator_declares_nobody_dead(coordinator: CoordinatorProcess) -> None:
    async def body() -> None:
        call = Caller(coordinator.address)
        servers = [await ControlServer().start() for _ in "ab"]
        hearts = []
        for name, server in zip("ab", servers, strict=True):
            await call.server(name, 1, server.address)
            hearts.append(Heart(coordinator.address, co.NODE_KIND_SERVER, name, 1, BEAT))
        coordinator.process.send(signal.SIGSTOP)
        stopped = time.monotonic()
        await until(lambda: time.monotonic() - stopped > 3 * TIMEOUT, 10, "a pause of three failure timeouts")
        coordinator.process.send(signal.SIGCONT)
        answers = [heart.answers for heart in hearts]
        many = round(2 * TIMEOUT / BEAT)
        await until(
            lambda: all(h.answers > n + many for h, n in zip(hearts, answers, strict=True)), 15, "two timeouts of beats"
        )
        assert {node.state for node in (await call.map()).nodes} == {pb.NODE_STATE_LIVE}
        assert "server_dead" not in await call.kinds()
        for one in [*hearts, *servers, call]:
            await (one.close() if isinstance(one, Caller) else one.stop())

    asyncio.run(body())


def test_a_second_coordinator_on_the_file_is_refused_at_once(coordinator: CoordinatorProcess) -> None:
    command = [sys.executable, "-m", "paramesh_coordinator.cli", "--bind", "127.0.0.1:0"]
    began = time.monotonic()
    second = subprocess.run(
        [*command, "--state", str(coordinator.state)], capture_output=True, text=True, timeout=30, check=False
    )
    assert time.monotonic() - began < 10
    assert second.returncode == 2
    assert f"in use by another coordinator (pid {coordinator.process.pid})" in second.stderr
    assert json.loads(psctl(coordinator.address, "status", "--json").stdout)["term"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly_when_asked(coordinator: CoordinatorProcess, number: signal.Signals) -> None:
    coordinator.process.send(number)
    assert coordinator.process.wait(10) == 0
    assert "stopped job=default term=1" in coordinator.process.tail()
    assert "Traceback" not in coordinator.process.tail()
    assert not coordinator.state.with_name("coordinator.sqlite-wal").exists(), "closed, so merged"
    assert stat.S_IMODE(coordinator.state.stat().st_mode) == 0o600
    coordinator.start()


# --- psctl ---


def test_psctl_shows_a_cluster(coordinator: CoordinatorProcess) -> None:
    async def body() -> None:
        call = Caller(coordinator.address)
        server = await ControlServer().start()
        await call.server("server-a", 1, server.address)
        await call.host("h", 1)
        await call.client("h/0", 1, "h", 1)
        await call.exit_of_slot("h", 1, "h/0", -9)
        await call.client("h/0", 2, "h", 1)
        spec = pb.TableSpec(
            name="net/0",
            group="net",
            tensors=[pb.TensorSpec(name="w", shape=[32, 32], dtype=pb.DTYPE_FLOAT32)],
            optimizer=pb.OptimizerSpec(class_name="AdamW"),
        )
        await call.table(spec)
        said = {}
        for command in ("status", "tables", "partitions", "workers", "events"):
            said[command] = await asyncio.to_thread(psctl, coordinator.address, command, "--json")
        said["page"] = await asyncio.to_thread(psctl, coordinator.address, "status")
        await server.stop()
        await call.close()
        for command, done in said.items():
            assert done.returncode == 0, f"{command}: {done.stderr}"
        _check_psctl({command: done.stdout for command, done in said.items()})

    asyncio.run(body())


def _check_psctl(said: dict[str, str]) -> None:
    status = json.loads(said["status"])
    assert [(s["name"], s["state"], s["partitions"]) for s in status["servers"]] == [("server-a", "live", 2)]
    assert [(w["slot"], w["state"]) for w in status["workers"]] == [("h/0", "evicted"), ("h/0", "live")]
    assert json.loads(said["workers"]) == status["workers"]
    assert "error" in status["ledger"], "this server serves no ledger, and that is no error of psctl"
    assert status["partitions"] == {"online": 2}
    (table,) = json.loads(said["tables"])
    assert (table["name"], table["parameters"], table["value_bytes"], table["optimizer"]) == (
        "net/0", 1024, 4096, "AdamW",
    )  # fmt: skip
    rows = json.loads(said["partitions"])
    assert [(row["partition"], row["table"], row["state"], row["epoch"]) for row in rows] == [
        (0, "ledger", "online", 1), (1, "net/0", "online", 1),
    ]  # fmt: skip
    assert rows[1]["in_sync"] == [rows[1]["primary"]] == [{"name": "server-a", "incarnation": "1"}]
    events = json.loads(said["events"])
    assert [e["id"] for e in events] == sorted(e["id"] for e in events)
    (evicted,) = [e["evidence"] for e in events if e["kind"] == "client_evicted"]
    assert (evicted["exit_code"], evicted["reason"]) == (-9, "SIGKILL (exit report from host h)")
    for word in ("server-a", "live", "evicted", "SIGKILL (exit report from host h)", "net/0"):
        assert word in said["page"], word


def test_psctl_promotes_only_what_is_lost_and_only_if_it_is_meant(coordinator: CoordinatorProcess) -> None:
    async def body() -> None:
        call = Caller(coordinator.address)
        server = await ControlServer().start()
        await call.server("server-a", 1, server.address)
        await server.stop()
        await call.close()

    asyncio.run(body())
    unmeant = psctl(coordinator.address, "promote", "0", "server-a")
    assert (unmeant.returncode, "--accept-loss" in unmeant.stderr) == (2, True)
    refused = psctl(coordinator.address, "promote", "0", "server-a", "--accept-loss")
    assert (refused.returncode, "partition 0 is online" in refused.stderr) == (1, True), refused.stderr


def test_psctl_follows_events_one_per_line(coordinator: CoordinatorProcess) -> None:
    """One document for who looks once; lines for who follows, each an object of its own."""
    once = json.loads(psctl(coordinator.address, "events", "--json").stdout)
    command = [sys.executable, "-m", "paramesh_coordinator.psctl", "events", "--json", "--watch", "--coordinator"]
    with subprocess.Popen([*command, coordinator.address], stdout=subprocess.PIPE, text=True) as following:
        try:
            assert following.stdout is not None
            lines = [following.stdout.readline() for _ in once]
        finally:
            following.kill()
    assert [json.loads(line) for line in lines] == once
    assert [event["kind"] for event in once] == ["coordinator_started"]
    assert once[0]["evidence"]["watched"] == 0


def start_seconds() -> float:
    """How long a psctl takes that asks nobody: what the machine is busy with is no wait of psctl's."""
    began = time.monotonic()
    psctl("127.0.0.1:1", "status", "--help")
    return time.monotonic() - began


@pytest.mark.parametrize("command", ["status", "events"])
def test_psctl_says_what_to_check_when_nobody_answers(command: str) -> None:
    start = start_seconds()
    began = time.monotonic()
    done = psctl(f"127.0.0.1:{free_port()}", command)
    assert time.monotonic() - began < 5 + start
    assert done.returncode == 1
    for words in ("no coordinator answers at 127.0.0.1:", "ps-coordinator runs there", "PARAMESH_COORDINATOR"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_psctl_does_not_wait_for_a_stopped_coordinator(coordinator: CoordinatorProcess) -> None:
    start = start_seconds()
    coordinator.process.send(signal.SIGSTOP)
    began = time.monotonic()
    done = psctl(coordinator.address, "status")
    coordinator.process.send(signal.SIGCONT)
    assert time.monotonic() - began < 5 + start
    assert done.returncode == 1
    assert "no coordinator answers" in done.stderr


def test_psctl_of_another_job_is_refused(coordinator: CoordinatorProcess) -> None:
    done = psctl(coordinator.address, "status", "--job", "other")
    assert done.returncode == 1
    assert "this is job 'default'" in done.stderr


def test_the_control_plane_never_imports_torch() -> None:
    code = (
        "import sys, paramesh_coordinator.cli, paramesh_coordinator.server, paramesh_coordinator.psctl\n"
        "assert not [m for m in sys.modules if m == 'torch' or m.startswith('torch.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
