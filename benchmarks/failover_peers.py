"""The same kill on Redis Cluster and etcd, if Debian's packages are installed: from SIGKILL to the next accepted write.

Clients speak the peers' own protocols over one socket per try: RESP, and etcd's JSON gateway.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.cluster.processes import TIED, free_port

NODE_TIMEOUT_MS = 2000
"""Redis Cluster's, equal to our failure timeout."""

START_S = 60.0
TRY_S = 0.2
"""Deadline of one try; a try that hangs must not hide a recovery."""


def measure(runs: int) -> list[dict[str, Any]]:
    """One row per peer; `missing` says why there are no figures."""
    rows = []
    for name, program, one in (("redis", "redis-server", _redis_once), ("etcd", "etcd", _etcd_once)):
        if shutil.which(program) is None:
            rows.append({"name": name, "missing": f"{program} is not installed"})
            continue
        seconds, lost = zip(*(one() for _ in range(runs)), strict=True)
        rows.append(
            {
                "name": name,
                "runs": runs,
                "p50": round(statistics.median(seconds), 3),
                "p99": round(max(seconds), 3),
                "worst": round(max(seconds), 3),
                "lost": sum(lost),
            }
        )
    return rows


@contextlib.contextmanager
def _started(commands: list[list[str]], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that end with the block, or with us."""
    import os

    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            with open(folder / f"{number}.log", "wb") as log:
                started.append(
                    subprocess.Popen(
                        [*TIED, str(os.getpid()), *command],
                        cwd=folder,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait(10)


def _wait(condition: Callable[[], bool], what: str, deadline: float = START_S, pause: float = 0.02) -> float:
    """When a condition was seen to hold. An OSError is "not yet"."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            if condition():
                return time.monotonic()
        time.sleep(pause)
    raise TimeoutError(f"waited {deadline} s in vain for {what}")


# Redis.


def _resp(port: int, *words: str) -> str:
    """Send one command on a connection of its own; the first line of the answer, or a bulk string."""
    with socket.create_connection(("127.0.0.1", port), TRY_S) as connection:
        connection.settimeout(TRY_S)
        parts = "".join(f"${len(w.encode())}\r\n{w}\r\n" for w in words)
        connection.sendall(f"*{len(words)}\r\n{parts}".encode())
        file = connection.makefile("rb")
        line = file.readline().decode().rstrip()
        if line.startswith("$") and line != "$-1":
            return file.read(int(line[1:])).decode()
        return line


def _redis_once() -> tuple[float, int]:
    """Kill the primary of the key's slot while one client writes; seconds, and acknowledged writes that are gone."""
    with tempfile.TemporaryDirectory(prefix="paramesh-redis-") as name:
        ports = [_redis_port() for _ in range(6)]
        folder = Path(name)
        commands = []
        for port in ports:
            home = folder / str(port)
            home.mkdir()
            flags = {"port": port, "bind": "127.0.0.1", "cluster-enabled": "yes", "save": "", "appendonly": "no"}
            flags |= {"cluster-node-timeout": NODE_TIMEOUT_MS, "dir": home}
            commands.append(["redis-server", *(text for k, v in flags.items() for text in (f"--{k}", str(v)))])
        with _started(commands, folder) as processes:
            for port in ports:
                _wait(lambda port=port: _resp(port, "PING") == "+PONG", "redis to start")
            _form(ports)
            return _kill_redis(ports, processes)


def _redis_port() -> int:
    """A port whose bus port, 10,000 above, is free too."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 10_000)):
            return port


def _form(ports: list[int]) -> None:
    addresses = [f"127.0.0.1:{port}" for port in ports]
    subprocess.run(
        ["redis-cli", "--cluster", "create", *addresses, "--cluster-replicas", "1", "--cluster-yes"],
        check=True, stdout=subprocess.DEVNULL, timeout=START_S,
    )  # fmt: skip
    for port in ports:
        _wait(lambda port=port: "cluster_state:ok" in _resp(port, "CLUSTER", "INFO"), "the cluster to form")
    replicas = [port for port in ports if "role:slave" in _resp(port, "INFO", "replication")]
    for port in replicas:
        _wait(lambda port=port: "master_link_status:up" in _resp(port, "INFO", "replication"), "replicas to attach")


def _kill_redis(ports: list[int], processes: list[subprocess.Popen[bytes]]) -> tuple[float, int]:
    at = next(p for p in ports if _resp(p, "INCR", "counter").startswith(":"))
    acked = 1
    streamed = time.monotonic() + 2.0  # so that the replica streams, which Redis needs to lose nothing
    while time.monotonic() < streamed:
        acked = int(_resp(at, "INCR", "counter")[1:])
    processes[ports.index(at)].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    others = [p for p in ports if p != at]
    value: list[int] = []

    def writes() -> bool:
        for port in others:
            with contextlib.suppress(OSError, ValueError):
                answer = _resp(port, "INCR", "counter")
                if answer.startswith(":"):
                    value.append(int(answer[1:]))
                    return True
        return False

    took = _wait(writes, "a replica of redis to take over") - killed
    return took, max(0, acked + 1 - value[0])


# etcd.


def _etcd_put(port: int, key: str, value: str) -> bool:
    body = json.dumps({"key": _b64(key), "value": _b64(value)}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v3/kv/put", body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=TRY_S) as answer:
        return "header" in json.loads(answer.read())


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _is_leader(port: int) -> bool:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v3/maintenance/status", b"{}", {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=TRY_S) as answer:
        status = json.loads(answer.read())
    return bool(status.get("leader")) and status["leader"] == status["header"]["member_id"]


def _etcd_once() -> tuple[float, int]:
    """Kill the leader; seconds until another member accepts a write. etcd loses none: raft."""
    with tempfile.TemporaryDirectory(prefix="paramesh-etcd-") as name:
        folder = Path(name)
        clients, peers = [free_port() for _ in range(3)], [free_port() for _ in range(3)]
        everybody = ",".join(f"m{i}=http://127.0.0.1:{peer}" for i, peer in enumerate(peers))
        commands = [
            [
                "etcd", "--name", f"m{i}", "--data-dir", str(folder / f"m{i}"), "--initial-cluster", everybody,
                "--initial-advertise-peer-urls", f"http://127.0.0.1:{peers[i]}",
                "--listen-peer-urls", f"http://127.0.0.1:{peers[i]}",
                "--listen-client-urls", f"http://127.0.0.1:{clients[i]}",
                "--advertise-client-urls", f"http://127.0.0.1:{clients[i]}",
            ]
            for i in range(3)
        ]  # fmt: skip
        with _started(commands, folder) as processes:
            _wait(lambda: all(_etcd_put(port, "k", "0") for port in clients), "etcd to start")
            leader = next(i for i, port in enumerate(clients) if _is_leader(port))
            processes[leader].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            others = [port for i, port in enumerate(clients) if i != leader]
            return _wait(lambda: any(_tries(port) for port in others), "etcd's next leader") - killed, 0


def _tries(port: int) -> bool:
    try:
        return _etcd_put(port, "k", "1")
    except OSError:
        return False
