"""A coordinator that only writes down what it hears, and `ps-worker` as a process against it.

Test modules take the fixtures as names of their own: `recorder = recording.recorder`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from paramesh.channel import SERVER_OPTIONS, grpc
from paramesh.v1 import coordinator_pb2 as pb
from paramesh.v1 import coordinator_pb2_grpc

from tests.cluster.processes import MARK, kill_all, marked_processes

START_S = 30.0
"""For a Python process to come up on a busy machine."""


class Recorder(coordinator_pb2_grpc.MembershipServicer):
    """A coordinator that accepts everything and remembers it."""

    def __init__(self) -> None:
        self.registrations: list[pb.RegisterHostRequest] = []
        self.beats: list[pb.HeartbeatRequest] = []
        self.exits: list[tuple[float, pb.ReportExitRequest]] = []
        self.goodbyes: list[pb.DeregisterRequest] = []
        self.forget = False
        """Answer beats with `unknown` until the next registration."""
        self.refuse_name = 0
        """How many registrations are refused for their name."""
        self.nonces: list[int] = []

    def RegisterHost(self, request: Any, context: Any) -> Any:
        self.registrations.append(request)
        self.forget = False
        if self.refuse_name:
            self.refuse_name -= 1
            status = status_pb2.Status(code=grpc.StatusCode.ALREADY_EXISTS.value[0], message="that name is live")
            status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NODE_NAME", domain="paramesh"))
            context.abort_with_status(rpc_status.to_status(status))
        return pb.RegisterHostResponse(term=1, generation=5, heartbeat_interval_ms=50, failure_timeout_ms=500)

    def Heartbeat(self, requests: Any, context: Any) -> Iterator[Any]:
        for request in requests:
            self.beats.append(request)
            self.nonces.append(1000 + len(self.beats))
            yield pb.HeartbeatResponse(nonce=self.nonces[-1], unknown=self.forget)

    def ReportExit(self, request: Any, context: Any) -> Any:
        self.exits.append((time.monotonic(), request))
        return pb.ReportExitResponse()

    def Deregister(self, request: Any, context: Any) -> Any:
        self.goodbyes.append(request)
        return pb.DeregisterResponse()


def serve(recorder: Recorder, port: int = 0) -> tuple[Any, int]:
    server = grpc.server(futures.ThreadPoolExecutor(8), options=SERVER_OPTIONS)
    coordinator_pb2_grpc.add_MembershipServicer_to_server(recorder, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, port


class Worker:
    """A running ps-worker with its output collected."""

    def __init__(self, popen: subprocess.Popen[bytes], mark: str):
        self.popen = popen
        self.mark = mark
        self.out: list[str] = []
        self.err: list[str] = []
        self._threads = [
            threading.Thread(target=self._collect, args=pair, daemon=True)
            for pair in ((popen.stdout, self.out), (popen.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    def _collect(self, pipe: Any, lines: list[str]) -> None:
        for line in pipe:
            lines.append(line.decode().rstrip("\n"))

    def wait(self, deadline: float = 30.0) -> int:
        code = self.popen.wait(deadline)
        for thread in self._threads:
            thread.join(5)
        return code

    def hellos(self) -> list[dict[str, Any]]:
        """What the training processes said about themselves: lines of JSON."""
        return [json.loads(line.partition("HELLO ")[2]) for line in list(self.out) if "HELLO " in line]

    def others(self) -> list[int]:
        """All processes of this supervisor but itself."""
        return [pid for pid in marked_processes(self.mark) if pid != self.popen.pid]


HELLO = """\
import json, os, sys, time, signal, subprocess
print("HELLO", json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "path0": sys.path[0], "sid": os.getsid(0),
    "env": {k: v for k, v in os.environ.items() if k.startswith("PARAMESH_") or k == "OMP_NUM_THREADS"}}))
restart = int(os.environ["PARAMESH_RESTART"])
"""


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    server, recorder.port = serve(recorder)
    recorder.server = server
    yield recorder
    recorder.server.stop(None).wait()


@pytest.fixture
def start_ps_worker(tmp_path: Path, recorder: Recorder) -> Iterator[Callable[..., Worker]]:
    """Start `ps-worker` with a script; everything is gone after the test."""
    mark = f"worker-{uuid.uuid4().hex}"
    started: list[Worker] = []

    def run(body: str, *arguments: str, options: tuple[str, ...] = (), name: str = "script.py", **env: str) -> Worker:
        (tmp_path / name).write_text(HELLO + textwrap.dedent(body))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PARAMESH_", "OMP_"))}
        popen = subprocess.Popen(
            [
                sys.executable, "-m", "paramesh_worker.cli", "--coordinator", f"127.0.0.1:{recorder.port}",
                "--name", "host-a", *options, str(tmp_path / name), *arguments,
            ],
            env=clean | {MARK: mark} | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
        )  # fmt: skip
        started.append(Worker(popen, mark))
        return started[-1]

    yield run
    kill_all(marked_processes(mark))
    for worker in started:
        worker.wait()
        print(*worker.out, *worker.err, sep="\n")


FOREVER = "time.sleep(1000)"
