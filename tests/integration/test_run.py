"""`ps-run` as a process: whole clusters, the ways in which they end, and that nothing is left of them."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import inspection
from tests.cluster.processes import MARK, ROOT, kill_all, marked_processes
from tests.cluster.waiting import wait_until

START_S = 120.0
"""For a cluster to come up. Its servers import torch, on cores that all test workers share."""

END_S = 60.0


class RunningRun:
    """A started ps-run with its output collected."""

    def __init__(self, popen: subprocess.Popen[bytes], mark: str, out: Any = None):
        self.popen = popen
        self.mark = mark
        self.out: list[str] = []
        self.err: list[str] = []
        self.close_at: str | None = None
        """Stop reading stdout and close it when a line has this in it."""
        pairs = ((out or popen.stdout, self.out), (popen.stderr, self.err))
        self._threads = [threading.Thread(target=self._collect, args=pair, daemon=True) for pair in pairs if pair[0]]
        for thread in self._threads:
            thread.start()

    def _collect(self, pipe: Any, lines: list[str]) -> None:
        try:
            for line in pipe:
                lines.append(line.decode().rstrip("\r\n"))
                if self.close_at and self.close_at in lines[-1]:
                    return pipe.close()
        except OSError:
            pass  # A pseudo terminal ends with EIO.

    def wait(self, deadline: float = START_S) -> int:
        code = self.popen.wait(deadline)
        for thread in self._threads:
            thread.join(5)
        return code

    def saw(self, text: str) -> bool:
        return any(text in line for line in list(self.out))

    def count(self, text: str) -> int:
        """Lines that have `text`."""
        return sum(text in line for line in list(self.out))

    def hellos(self) -> list[dict[str, Any]]:
        return [json.loads(line.partition("HELLO ")[2]) for line in list(self.out) if "HELLO {" in line]

    def find(self, part: str) -> int:
        """The pid of the one process of this run whose command line has `part`."""
        found = [pid for pid in marked_processes(self.mark) if part in command_line(pid)]
        assert len(found) == 1, (part, found)
        return found[0]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


HELLO = """\
import json, os, sys, time, signal, subprocess
print("HELLO", json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "path0": sys.path[0],
    "env": {k: v for k, v in os.environ.items() if k.startswith("PARAMESH_")}}), flush=True)
"""
FOREVER = "time.sleep(1000)"
STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen(['sleep', '1000'])
print("armed", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., RunningRun]]:
    """Start `ps-run` with a script; everything is gone after the test."""
    mark = f"run-{uuid.uuid4().hex}"
    started: list[RunningRun] = []

    def start(body: str | Path, *arguments: str, options: tuple[str, ...] = (), terminal: bool = False) -> RunningRun:
        script = body if isinstance(body, Path) else tmp_path / "script.py"
        if isinstance(body, str):
            script.write_text(HELLO + textwrap.dedent(body))
        env = {k: v for k, v in os.environ.items() if not k.startswith("PARAMESH_")}
        master, slave = pty.openpty() if terminal else (-1, subprocess.PIPE)
        popen = subprocess.Popen(
            [Path(sys.executable).with_name("ps-run"), "--log-dir", tmp_path / "logs", *options, script, *arguments],
            env=env | {MARK: mark, "TMPDIR": str(tmp_path), "COLUMNS": "100", "LINES": "40", "TERM": "xterm"},
            stdout=slave, stderr=subprocess.PIPE, cwd=tmp_path, start_new_session=True,
        )  # fmt: skip
        if terminal:
            os.close(slave)
        started.append(RunningRun(popen, mark, os.fdopen(master, "rb", buffering=0) if terminal else None))
        return started[-1]

    yield start
    kill_all(marked_processes(mark))
    for each in started:
        each.wait()
        print(*each.out, *each.err, sep="\n")


def nothing_is_left(run: RunningRun) -> None:
    assert [command_line(pid) for pid in marked_processes(run.mark)] == []


def test_a_run_from_start_to_summary(run, tmp_path: Path):
    """Arguments and settings reach the script, whose folder is full of traps; the end says what matters."""
    for name in ("worker", "client", "ps", "coordinator", "grpc", "rich", "logging", "child"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('a file of the user was taken for another')\n")
    options = ("--servers", "2", "--workers", "2", "--mode", "ssp", "--staleness", "3")
    started = run("print('to stderr', file=sys.stderr)", "--workers", "9", "--", "a b", options=options)
    assert started.wait() == 0
    hellos = sorted(started.hellos(), key=lambda hello: hello["env"]["PARAMESH_LOCAL_RANK"])
    assert len(hellos) == 2
    for index, hello in enumerate(hellos):
        assert hello["argv"] == ["--workers", "9", "--", "a b"]
        assert hello["path0"] == str(tmp_path)
        assert hello["env"]["PARAMESH_MODE"] == "ssp"
        assert hello["env"]["PARAMESH_STALENESS"] == "3"
        assert "PARAMESH_EVERY" not in hello["env"]
        assert hello["env"]["PARAMESH_RANK"] == str(index)
        assert hello["env"]["PARAMESH_SLOT"] == f"local/{index}"
    assert sorted(started.err) == ["[worker 0] to stderr", "[worker 1] to stderr"]
    assert started.saw("script.py is done")
    assert any(re.fullmatch(r"wall time +\d+\.\d s *", line) for line in started.out)
    assert any(line.split() == ["logs", str(tmp_path / "logs")] for line in started.out)
    logs = {path.name for path in (tmp_path / "logs").iterdir()}
    assert logs == {
        "coordinator.log", "ps-0.log", "ps-1.log", "supervisor.log", "worker-0.log", "worker-1.log",
    }  # fmt: skip
    assert not list(tmp_path.glob("paramesh-*")), "no state is left behind"
    nothing_is_left(started)


def test_a_failed_script_is_named_with_its_last_lines(run, tmp_path: Path):
    body = """
    if os.environ["PARAMESH_LOCAL_RANK"] == "0": time.sleep(1000)
    for line in range(50): print("line", line, file=sys.stderr)
    print("the last words", file=sys.stderr)
    sys.exit(7)
    """
    started = run(body, options=("--workers", "2", "--max-restarts", "1"))
    assert started.wait() == 7
    assert started.saw("worker 1 exited with code 7; restart 1 of 1")
    assert started.saw("worker 1 failed: exited with code 7; all 1 restarts are used")
    assert started.saw(f"its last 20 lines (all of them: {tmp_path / 'logs' / 'worker-1.log'})")
    tail = [line for line in started.out if line.startswith("  | ")]
    assert len(tail) == 20
    assert "  | the last words" in tail
    assert started.saw("script.py failed: worker 1")
    nothing_is_left(started)


def test_what_a_restart_cannot_mend_ends_the_run_at_once(run):
    started = run("import paramesh.errors as e; raise e.refuse('WRONG_CLUSTER', 'this is job x')")
    assert started.wait() == 1
    assert any(line.split() == ["restarts", "0"] for line in started.out)
    why = "exited with code 1; a restart cannot mend that (WRONG_CLUSTER: this is job x)"
    assert started.saw(f"worker 0 failed: {why}")
    nothing_is_left(started)


def test_a_short_run_says_what_it_does_and_nothing_that_sounds_like_a_fault(run):
    """Two that say nothing is wrong: phases in order, each once; one server is no "servers"."""
    started = run(ROOT / "examples" / "linear_regression.py", options=("--plain",))
    assert started.wait() == 0
    phases = [line.split(" ", 2)[2] for line in started.out if re.match(r"\[ps-run\] \d+:\d\d [a-z0-9 ]+$", line)]
    assert phases[:3] == ["starting the coordinator", "starting 1 server", "starting 1 worker"]
    assert "no workers" not in phases
    assert phases[-1] == "stopping"


def test_ctrl_c_is_one_line_per_worker(run):
    started = run("import paramesh\nprint('armed', flush=True)\ntime.sleep(1000)", options=("--workers", "2"))
    wait_until(lambda: sum("armed" in line for line in started.out) == 2, START_S, "both workers")
    os.killpg(started.popen.pid, signal.SIGINT)
    assert started.wait(END_S) == 130
    assert sorted(line.rpartition(":")[0] for line in started.err) == [
        "[worker 0] interrupted at script.py", "[worker 1] interrupted at script.py",
    ]  # fmt: skip


def test_ctrl_c_leaves_nothing(run):
    body = """
    try: time.sleep(1000)
    except KeyboardInterrupt: print("cleaning up", flush=True)
    """
    started = run(body, options=("--workers", "2"))
    wait_until(lambda: len(started.hellos()) == 2, START_S, "both workers")
    os.killpg(started.popen.pid, signal.SIGINT)  # As a terminal does: to the whole foreground group.
    assert started.wait(END_S) == 130
    assert sum("cleaning up" in line for line in started.out) == 2
    assert started.saw("script.py was stopped by SIGINT")
    nothing_is_left(started)


def test_a_second_ctrl_c_kills_at_once(run):
    started = run(STUBBORN, options=("--grace", "1000"))
    wait_until(lambda: started.saw("armed"), START_S, "the worker")
    started.popen.send_signal(signal.SIGINT)
    wait_until(lambda: started.saw("Ctrl-C again to kill at once"), END_S, "the first Ctrl-C to be taken")
    started.popen.send_signal(signal.SIGINT)
    assert started.wait(END_S) == 130
    nothing_is_left(started)


def test_sigterm_during_the_start_leaves_nothing(run):
    started = run(FOREVER)
    wait_until(lambda: started.saw("starting 1 server"), START_S, "the servers' start")
    started.popen.terminate()
    assert started.wait(END_S) == 143
    nothing_is_left(started)


def test_two_signals_at_once_leave_nothing_and_no_traceback(run):
    """As `timeout` in the foreground makes of one Ctrl-C: its own, and the terminal's."""
    started = run(FOREVER)
    wait_until(lambda: started.saw("starting 1 server"), START_S, "the servers' start")
    started.popen.send_signal(signal.SIGINT)
    started.popen.send_signal(signal.SIGTERM)
    assert started.wait(END_S) in (130, 143)
    assert started.err == []
    nothing_is_left(started)


def test_sigkill_of_the_launcher_leaves_nothing(run):
    started = run(STUBBORN)
    wait_until(lambda: started.saw("armed"), START_S, "the worker")
    started.popen.kill()
    wait_until(lambda: not marked_processes(started.mark), 10, "all processes to end")


def test_a_lost_server_is_named(run):
    started = run(FOREVER, options=("--servers", "2"))
    wait_until(started.hellos, START_S, "the worker")
    os.kill(server_pid(started, "ps-1"), signal.SIGKILL)
    assert started.wait(END_S) == 1
    assert started.saw("server ps-1 was lost: killed by SIGKILL")
    assert started.saw("script.py failed: ps-1")
    assert any("serving name=ps-1" in line for line in started.out if line.startswith("  | "))
    nothing_is_left(started)


def test_a_lost_server_is_started_again_where_others_have_what_it_had(run, tmp_path: Path):
    done = tmp_path / "done"
    body = f"""
        import paramesh, torch
        model = torch.nn.Linear(4, 1)
        optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        while not paramesh.mean(float(os.path.exists({str(done)!r}))):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            time.sleep(0.02)
        print("trained to the end", flush=True)
    """
    started = run(textwrap.dedent(body), options=("--servers", "2", "--replicas", "2"))
    wait_until(started.hellos, START_S, "the worker")
    for number, server in enumerate(("ps-0", "ps-1"), 1):
        address = coordinator_address(started)
        wait_until(lambda address=address: in_sync(address), START_S, "two copies of everything")
        os.kill(server_pid(started, server), signal.SIGKILL)
        wait_until(lambda number=number: started.count("started again, others have") == number, END_S, "the notice")
    done.touch()
    assert started.wait(END_S) == 0
    assert started.saw("trained to the end")
    assert any(line.split() == ["restarts", "0"] for line in started.out)
    nothing_is_left(started)


def in_sync(address: str) -> bool:
    """Whether there are tables, and every partition has two replicas in sync."""
    found = inspection.partition_map(address).partitions
    return len(found) > 1 and all(len(row.isr) == 2 for row in found)


def server_pid(run: RunningRun, name: str) -> int:
    return run.find(f"-m paramesh_server.cli --coordinator {coordinator_address(run)} --job default --name {name}")


def coordinator_address(run: RunningRun) -> str:
    line = next(line for line in run.out if "psctl --coordinator" in line)
    return line.split("--coordinator ")[1].split()[0]


def test_a_lost_coordinator_is_started_again_and_the_run_goes_on(run, tmp_path: Path):
    done = tmp_path / "done"
    started = run(f"while not os.path.exists({str(done)!r}): time.sleep(0.05)")
    wait_until(started.hellos, START_S, "the worker")
    first = started.find("-m paramesh_coordinator.cli")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: started.saw("started again on its state"), END_S, "the notice")
    log = tmp_path / "logs" / "coordinator.log"
    wait_until(lambda: log.read_text().count("serving address=") == 2, END_S, "the second coordinator")
    assert started.find("-m paramesh_coordinator.cli") != first
    done.touch()
    assert started.wait(END_S) == 0
    nothing_is_left(started)


def test_a_killed_worker_is_restarted_and_counted(run):
    started = run("if os.environ['PARAMESH_RESTART'] == '0': time.sleep(1000)")
    wait_until(started.hellos, START_S, "the worker")
    os.kill(started.hellos()[0]["pid"], signal.SIGKILL)
    assert started.wait(END_S) == 0
    assert started.saw("worker 0 killed by SIGKILL; restart 1 of 3")
    assert any(line.split() == ["restarts", "1"] for line in started.out)


def test_a_reader_that_goes_away_does_not_end_the_run(run):
    started = run("for _ in range(200): print('x' * 1000, flush=True)\nprint('done', flush=True)")
    started.close_at = "psctl"
    assert started.wait() == 0
    assert not started.saw("is done"), "nobody has read the end"


def test_the_live_display_on_a_terminal(run):
    started = run("print('\\033[31mred\\033[0m'); time.sleep(2)", terminal=True)
    assert started.wait() == 0
    text = "\n".join(started.out)
    assert "╭─ \x1b[0m" in text or "╭─" in text
    assert "[worker 0] \x1b[31mred\x1b[0m" in text
    assert "script.py is done" in text
    assert text.count("\x1b[?25h") >= 1, "the cursor is shown again"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    nothing_is_left(started)


def test_real_training_is_summed_up(run):
    """400 steps of 2 workers, as 20 epochs of 2,000 samples in batches of 50 make."""
    started = run(ROOT / "examples" / "linear_regression.py", options=("--servers", "2", "--workers", "2"))
    assert started.wait() == 0
    summary = {line.split()[0]: line.split()[1:] for line in started.out if line and not line.startswith("[")}
    assert int(summary["steps"][0].replace(",", "")) >= 400
    assert summary["samples"] == ["40,000"]
    assert summary["epochs"] == ["20", "complete"]
    assert sum("trained" in line for line in started.out) == 2
    nothing_is_left(started)
