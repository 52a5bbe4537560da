"""`ps-worker` as a process, against a coordinator that only writes down what it hears."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
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
from tests.cluster.waiting import wait_until

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
def start(tmp_path: Path, recorder: Recorder) -> Iterator[Callable[..., Worker]]:
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


def test_a_script_runs_to_its_end_in_its_place(start, recorder: Recorder, tmp_path: Path):
    worker = start("", "--nproc", "9", "--", "-x", "a b", "", options=("--nproc", "2"), OMP_NUM_THREADS="")
    assert worker.wait() == 0
    hellos = sorted(worker.hellos(), key=lambda hello: hello["env"]["PARAMESH_LOCAL_RANK"])
    assert [hello["argv"] for hello in hellos] == [["--nproc", "9", "--", "-x", "a b", ""]] * 2
    assert [hello["path0"] for hello in hellos] == [str(tmp_path)] * 2
    registration = recorder.registrations[0]
    assert (registration.name, registration.slots) == ("host-a", 2)
    for index, hello in enumerate(hellos):
        env = hello["env"]
        env.pop(MARK)
        env.pop("OMP_NUM_THREADS")
        assert env == {
            "PARAMESH_COORDINATOR": f"127.0.0.1:{recorder.port}",
            "PARAMESH_JOB": "default",
            "PARAMESH_SLOT": f"host-a/{index}",
            "PARAMESH_HOST": "host-a",
            "PARAMESH_HOST_INCARNATION": str(registration.incarnation),
            "PARAMESH_LOCAL_RANK": str(index),
            "PARAMESH_RESTART": "0",
        }
        assert hello["sid"] == hello["pid"], "it leads its own session"
    assert {line.partition("] ")[0] for line in worker.out} == {"[worker 0", "[worker 1"}
    assert [goodbye.name for goodbye in recorder.goodbyes] == ["host-a"]
    assert len(recorder.registrations) == 1


def test_beats_echo_the_last_answer(start, recorder: Recorder):
    start(FOREVER)
    wait_until(lambda: len(recorder.beats) > 20, START_S, "20 beats")
    beats = recorder.beats[:20]
    assert beats[0].echo == 0
    assert {(beat.name, beat.kind, beat.request.generation) for beat in beats} == {("host-a", pb.NODE_KIND_HOST, 5)}
    echoes = [beat.echo for beat in beats[1:]]
    assert set(echoes[3:]) <= set(recorder.nonces), "each echo is a nonce that was given"
    assert echoes == sorted(echoes)
    assert echoes[-1] > recorder.nonces[10], "and a fresh one"


def test_a_killed_child_is_reported_at_once_and_restarted(start, recorder: Recorder):
    worker = start(FOREVER, options=("--nproc", "2"))
    wait_until(lambda: len(worker.hellos()) == 2, START_S, "both processes")
    victim = next(h for h in worker.hellos() if h["env"]["PARAMESH_LOCAL_RANK"] == "1")
    killed_at = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    wait_until(lambda: recorder.exits, 5, "the exit report")
    heard_at, report = recorder.exits[0]
    assert heard_at - killed_at < 0.5
    assert (report.kind, report.slot, report.exit_code) == (pb.NODE_KIND_CLIENT, "host-a/1", -9)
    assert (report.name, report.incarnation) == ("host-a", recorder.registrations[0].incarnation)
    wait_until(lambda: len(worker.hellos()) == 3, START_S, "the restarted process")
    again = worker.hellos()[2]
    assert again["env"]["PARAMESH_SLOT"] == "host-a/1"
    assert again["env"]["PARAMESH_RESTART"] == "1"
    assert any("killed by SIGKILL; restart 1 of 3" in line for line in worker.err)


def test_the_end_is_noticed_although_a_grandchild_holds_the_output_open(start, recorder: Recorder):
    worker = start("subprocess.Popen(['sleep', '1000']); os._exit(7)", options=("--max-restarts", "0"))
    assert worker.wait() == 7
    assert [report.exit_code for _, report in recorder.exits] == [7]
    wait_until(lambda: not worker.others(), 5, "the grandchild to end")


def test_a_script_that_always_fails_is_named_with_its_last_lines(start, recorder: Recorder):
    worker = start(
        """
        for line in range(50): print("line", line)
        raise ValueError("the script's own mistake")
        """,
        options=("--max-restarts", "1", "--nproc", "1"),
    )
    assert worker.wait() == 1
    assert len(worker.hellos()) == 2
    assert [report.exit_code for _, report in recorder.exits] == [1, 1]
    start_of_tail = next(i for i, line in enumerate(worker.err) if "worker 0 (host-a/0) failed" in line)
    assert "exited with code 1; all 1 restarts are used" in worker.err[start_of_tail]
    tail = [line for line in worker.err[start_of_tail + 1 :] if line.startswith("  | ")]
    assert len(tail) == 20
    assert "  | ValueError: the script's own mistake" in tail
    assert "  | line 49" in tail


def test_when_one_fails_for_good_the_others_are_ended_and_its_code_counts(start):
    worker = start(
        """
        if os.environ["PARAMESH_LOCAL_RANK"] == "1": sys.exit(43)
        time.sleep(1000)
        """,
        options=("--nproc", "3", "--max-restarts", "0"),
    )
    assert worker.wait() == 43
    assert not worker.others()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_passed_on_and_nothing_is_left(number, code, start):
    worker = start(
        """
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try: time.sleep(1000)
        except KeyboardInterrupt: print("cleaning up"); sys.exit(9)
        """,
        options=("--nproc", "2"),
    )
    wait_until(lambda: len(worker.hellos()) == 2, START_S, "both processes")
    worker.popen.send_signal(number)
    assert worker.wait() == code
    assert sum("cleaning up" in line for line in worker.out) == 2
    assert not worker.others()


def test_a_graceful_end_after_sigterm_is_success(start):
    worker = start(
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        print("armed")
        time.sleep(1000)
        """
    )
    wait_until(lambda: any("armed" in line for line in worker.out), START_S, "the process")
    worker.popen.terminate()
    assert worker.wait() == 0


STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen(['sleep', '1000'])
print("armed")
time.sleep(1000)
"""


def test_who_ignores_the_signal_is_killed_after_the_grace_with_its_children(start):
    worker = start(STUBBORN, options=("--grace", "0.3"))
    wait_until(lambda: any("armed" in line for line in worker.out), START_S, "the process")
    worker.popen.terminate()
    assert worker.wait(10) == 143
    assert not worker.others()


def test_a_second_signal_kills_at_once(start):
    worker = start(STUBBORN, options=("--grace", "1000"))
    wait_until(lambda: any("armed" in line for line in worker.out), START_S, "the process")
    worker.popen.terminate()
    wait_until(lambda: any("forwarded" in line for line in worker.err), 10, "the first signal")
    worker.popen.terminate()
    assert worker.wait(10) == 143
    assert not worker.others()


def test_sigkill_of_the_supervisor_leaves_nothing(start):
    worker = start(STUBBORN, options=("--nproc", "2"))
    wait_until(lambda: sum("armed" in line for line in worker.out) == 2, START_S, "both processes")
    assert len(worker.others()) >= 4, "two processes with a child each"
    worker.popen.kill()
    wait_until(lambda: not marked_processes(worker.mark), 5, "all processes to end")


def test_logs_go_to_files_and_a_restart_appends(start, tmp_path: Path):
    worker = start(
        "print('run', restart); sys.exit(1 - restart)", options=("--log-dir", str(tmp_path / "logs"), "--nproc", "2")
    )
    assert worker.wait() == 0
    assert worker.out == []
    for index in range(2):
        text = (tmp_path / "logs" / f"worker-{index}.log").read_text()
        assert [line for line in text.splitlines() if "HELLO" not in line] == ["run 0", "--- restart 1 ---", "run 1"]


def test_one_thread_each_is_said_once(start):
    worker = start("sys.exit(1 - restart)", options=("--nproc", "2"))
    assert worker.wait() == 0
    assert {hello["env"]["OMP_NUM_THREADS"] for hello in worker.hellos()} == {"1"}
    assert sum("OMP_NUM_THREADS=1" in line for line in worker.err) == 1


@pytest.mark.parametrize("folder_is_cwd", [True, False])
def test_files_named_like_ours_and_like_the_standard_library_do_no_harm(
    folder_is_cwd: bool, recorder: Recorder, tmp_path: Path
):
    """The user's folder is the user's: their names win in the script, and never reach our processes."""
    names = ["worker", "client", "ps", "coordinator", "child", "grpc", "rich", "ctypes", "asyncio", "logging"]
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"WHO = 'the user: {name}'\n")
    script = tmp_path / "train.py"
    script.write_text("import worker, client, ps, grpc\nprint(worker.WHO, client.WHO, ps.WHO, grpc.WHO)\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("ps-worker"), "--coordinator", f"127.0.0.1:{recorder.port}", str(script)],
        cwd=tmp_path if folder_is_cwd else "/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[worker 0] the user: worker the user: client the user: ps the user: grpc\n"


def test_a_module_is_run_as_python_does_it(start, tmp_path: Path, recorder: Recorder):
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text("import sys\nprint(__spec__.name, sys.argv[1:])\n")
    done = subprocess.run(
        [sys.executable, "-m", "paramesh_worker.cli", "--coordinator", f"127.0.0.1:{recorder.port}",
         "-m", "mypackage.train", "--nproc", "3"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "[worker 0] mypackage.train ['--nproc', '3']\n"


def test_unknown_to_the_coordinator_it_registers_again(start, recorder: Recorder):
    worker = start(FOREVER)
    wait_until(lambda: recorder.beats, START_S, "beats")
    recorder.forget = True
    wait_until(lambda: len(recorder.registrations) == 2, 10, "the second registration")
    assert recorder.registrations[0] == recorder.registrations[1]
    beats = len(recorder.beats)
    wait_until(lambda: len(recorder.beats) > beats + 5, 10, "beats to go on")
    assert worker.popen.poll() is None


def test_the_coordinator_goes_and_comes_back_and_training_goes_on(start, recorder: Recorder):
    worker = start(FOREVER)
    wait_until(lambda: recorder.beats and worker.hellos(), START_S, "beats")
    recorder.server.stop(None).wait()
    wait_until(lambda: any("coordinator=away" in line for line in worker.err), 10, "the loss to be noticed")
    beats = len(recorder.beats)
    recorder.server, _ = serve(recorder, recorder.port)
    wait_until(lambda: len(recorder.beats) > beats + 5, 10, "beats to go on")
    assert any("coordinator=back" in line for line in worker.err)
    assert len(worker.hellos()) == 1, "the training process was left alone"
    assert len(recorder.registrations) == 1, "it was known; no need to register again"


def test_a_coordinator_that_stops_to_answer_is_noticed(start, recorder: Recorder):
    """A one-way cut: the connection stands, beats go out, no answers come."""
    worker = start(FOREVER)
    wait_until(lambda: recorder.beats, START_S, "beats")
    silent = threading.Event()

    def swallow(requests: Any, context: Any) -> Iterator[Any]:
        silent.set()
        for _ in requests:
            pass
        yield from ()

    recorder.Heartbeat = swallow  # type: ignore[method-assign]
    recorder.server.stop(None).wait()
    recorder.server, _ = serve(recorder, recorder.port)
    assert silent.wait(10)
    wait_until(
        lambda: any("no answer to heartbeats" in line or "coordinator=away" in line for line in worker.err), 10, "it"
    )
    del recorder.Heartbeat
    recorder.server.stop(None).wait()
    recorder.server, _ = serve(recorder, recorder.port)
    beats = len(recorder.beats)
    wait_until(lambda: len(recorder.beats) > beats + 5, 10, "beats to go on")


def test_its_own_old_name_is_waited_for(start, recorder: Recorder):
    """A supervisor that was killed and started anew finds its name live until the silence is noticed."""
    recorder.refuse_name = 3
    worker = start("")
    assert worker.wait() == 0
    assert len(recorder.registrations) == 4


def test_a_name_that_stays_taken_is_an_error_with_a_remedy(start, recorder: Recorder):
    recorder.refuse_name = 1000
    worker = start("")
    assert worker.wait(30) == 1
    assert "--name" in worker.err[-1]
    assert not worker.hellos()


def test_a_signal_while_looking_for_the_coordinator_ends_it(start, tmp_path: Path):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        worker = start("", options=("--coordinator", address))
        wait_until(lambda: any("waiting for the coordinator" in line for line in worker.err), START_S, "the wait")
        worker.popen.send_signal(signal.SIGINT)
        assert worker.wait(10) == 130
    assert not worker.hellos()


def test_an_unreachable_coordinator_is_an_error_that_names_it(tmp_path: Path):
    script = tmp_path / "t.py"
    script.touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code = (
        "import paramesh_worker.supervisor as s, paramesh_worker.cli as c; s.PATIENCE_S = 0.5;"
        f"c.main(['--coordinator', '127.0.0.1:{port}', {str(script)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"no coordinator answers at 127.0.0.1:{port}" in done.stderr
    assert "ps-coordinator" in done.stderr
