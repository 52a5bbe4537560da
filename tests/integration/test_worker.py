"""`ps-worker` supervises: places, restarts, reports, signals, logs; nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paramesh.v1 import coordinator_pb2 as pb
from paramesh_worker.stops import process_state

from tests.cluster.processes import MARK, marked_processes
from tests.cluster.waiting import wait_until
from tests.integration import recording
from tests.integration.recording import FOREVER, START_S, Recorder

recorder, start_ps_worker = recording.recorder, recording.start_ps_worker


def test_a_script_runs_to_its_end_in_its_place(start_ps_worker, recorder: Recorder, tmp_path: Path):
    worker = start_ps_worker("", "--nproc", "9", "--", "-x", "a b", "", options=("--nproc", "2"), OMP_NUM_THREADS="")
    assert worker.wait() == 0
    hellos = sorted(worker.hellos(), key=lambda hello: hello["env"]["PARAMESH_LOCAL_RANK"])
    assert [hello["argv"] for hello in hellos] == [["--nproc", "9", "--", "-x", "a b", ""]] * 2
    assert [hello["path0"] for hello in hellos] == [str(tmp_path)] * 2
    registration = recorder.registrations[0]
    assert (registration.name, registration.slots) == ("host-a", 2)
    errors = [hello["env"]["PARAMESH_ERROR_FILE"] for hello in hellos]
    assert len({path for path in errors if path.startswith(f"/proc/{worker.popen.pid}/fd/")}) == 2
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
            "PARAMESH_ERROR_FILE": errors[index],
        }
        assert hello["sid"] == hello["pid"], "it leads its own session"
    assert {line.partition("] ")[0] for line in worker.out} == {"[worker 0", "[worker 1"}
    assert [goodbye.name for goodbye in recorder.goodbyes] == ["host-a"]
    assert len(recorder.registrations) == 1


def test_a_killed_child_is_reported_at_once_and_restarted(start_ps_worker, recorder: Recorder):
    worker = start_ps_worker(FOREVER, options=("--nproc", "2"))
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


def test_a_stopped_child_is_reported_once_per_stop_and_left_alone(start_ps_worker, recorder: Recorder):
    """Its supervisor beats on, and so would vouch for it without end."""
    worker = start_ps_worker(FOREVER, options=("--nproc", "2"))
    wait_until(lambda: len(worker.hellos()) == 2, START_S, "both processes")
    victim = next(h for h in worker.hellos() if h["env"]["PARAMESH_LOCAL_RANK"] == "1")["pid"]
    for stop in (1, 2):
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda stop=stop: len(recorder.exits) == stop, 10, "the report")
        # Long enough for a second report of the same stop: the recorder's failure timeout is 10 beats.
        beats = len(recorder.beats)
        wait_until(lambda beats=beats: len(recorder.beats) > beats + 25, 20, "beats to go on")
        os.kill(victim, signal.SIGCONT)
        wait_until(lambda: process_state(victim) == "S", 10, "the process to go on")
        beats = len(recorder.beats)
        wait_until(lambda beats=beats: len(recorder.beats) > beats + 5, 20, "the supervisor to see it go on")
    assert [(report.slot, report.exit_code) for _, report in recorder.exits] == [("host-a/1", -signal.SIGSTOP)] * 2
    assert sum("worker 1 (host-a/1) is stopped" in line for line in worker.err) == 2
    assert len(worker.hellos()) == 2, "nothing was restarted"


@pytest.mark.parametrize(
    ("body", "code", "why"),
    [
        ("import argparse; argparse.ArgumentParser().parse_args(['--no-such'])", 2, "a wrong command line"),
        ("import paramesh.errors as e; raise e.refuse('PARTITION_OFFLINE', 'ps-0 is lost')", 1,
         "PARTITION_OFFLINE: ps-0 is lost"),
        ("import paramesh\nos.environ['PARAMESH_COORDINATOR'] = 'nowhere'\nparamesh.init()", 1, "CONFIG: "),
        ("import paramesh, no_such_module", 1, "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
    ids=["usage", "offline", "config", "import"],
)  # fmt: skip
def test_what_a_restart_cannot_mend_is_not_restarted(start_ps_worker, body: str, code: int, why: str):
    worker = start_ps_worker(body)
    assert worker.wait() == code
    assert len(worker.hellos()) == 1
    (said,) = [line for line in worker.err if "worker 0 (host-a/0) failed" in line]
    assert f"exited with code {code}; a restart cannot mend that (" in said
    assert why in said


def test_a_scripts_own_error_is_restarted(start_ps_worker):
    worker = start_ps_worker(
        """
        import paramesh
        if restart == 0: raise RuntimeError("in a training step")
        """
    )
    assert worker.wait() == 0
    assert len(worker.hellos()) == 2


def test_the_end_is_noticed_although_a_grandchild_holds_the_output_open(start_ps_worker, recorder: Recorder):
    worker = start_ps_worker("subprocess.Popen(['sleep', '1000']); os._exit(7)", options=("--max-restarts", "0"))
    assert worker.wait() == 7
    assert [report.exit_code for _, report in recorder.exits] == [7]
    wait_until(lambda: not worker.others(), 5, "the grandchild to end")


def test_a_script_that_always_fails_is_named_with_its_last_lines(start_ps_worker, recorder: Recorder):
    worker = start_ps_worker(
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


def test_when_one_fails_for_good_the_others_are_ended_and_its_code_counts(start_ps_worker):
    worker = start_ps_worker(
        """
        if os.environ["PARAMESH_LOCAL_RANK"] == "1": sys.exit(43)
        time.sleep(1000)
        """,
        options=("--nproc", "3", "--max-restarts", "0"),
    )
    assert worker.wait() == 43
    assert not worker.others()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_passed_on_and_nothing_is_left(number, code, start_ps_worker):
    worker = start_ps_worker(
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


def test_an_interrupted_script_says_so_in_one_line(start_ps_worker):
    """No traceback per process for a Ctrl-C, which nobody needs explained."""
    worker = start_ps_worker(
        """
        import paramesh
        print("armed")
        time.sleep(1000)
        """,
        options=("--nproc", "2"),
    )
    wait_until(lambda: sum("armed" in line for line in worker.out) == 2, START_S, "both processes")
    worker.popen.send_signal(signal.SIGINT)
    assert worker.wait() == 130
    said = sorted(line for line in worker.err if line.startswith("[worker "))
    assert [line.rpartition(":")[0] for line in said] == [
        "[worker 0] interrupted at script.py", "[worker 1] interrupted at script.py",
    ]  # fmt: skip
    assert not any("Traceback" in line for line in worker.err)


def test_a_graceful_end_after_sigterm_is_success(start_ps_worker):
    worker = start_ps_worker(
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


def test_who_ignores_the_signal_is_killed_after_the_grace_with_its_children(start_ps_worker):
    worker = start_ps_worker(STUBBORN, options=("--grace", "0.3"))
    wait_until(lambda: any("armed" in line for line in worker.out), START_S, "the process")
    worker.popen.terminate()
    assert worker.wait(10) == 143
    assert not worker.others()


def test_a_second_signal_kills_at_once(start_ps_worker):
    worker = start_ps_worker(STUBBORN, options=("--grace", "1000"))
    wait_until(lambda: any("armed" in line for line in worker.out), START_S, "the process")
    worker.popen.terminate()
    wait_until(lambda: any("forwarded" in line for line in worker.err), 10, "the first signal")
    worker.popen.terminate()
    assert worker.wait(10) == 143
    assert not worker.others()


def test_sigkill_of_the_supervisor_leaves_nothing(start_ps_worker):
    worker = start_ps_worker(STUBBORN, options=("--nproc", "2"))
    wait_until(lambda: sum("armed" in line for line in worker.out) == 2, START_S, "both processes")
    assert len(worker.others()) >= 4, "two processes with a child each"
    worker.popen.kill()
    wait_until(lambda: not marked_processes(worker.mark), 5, "all processes to end")


def test_logs_go_to_files_and_a_restart_appends(start_ps_worker, tmp_path: Path):
    worker = start_ps_worker(
        "print('run', restart); sys.exit(1 - restart)", options=("--log-dir", str(tmp_path / "logs"), "--nproc", "2")
    )
    assert worker.wait() == 0
    assert worker.out == []
    for index in range(2):
        text = (tmp_path / "logs" / f"worker-{index}.log").read_text()
        assert [line for line in text.splitlines() if "HELLO" not in line] == ["run 0", "--- restart 1 ---", "run 1"]


def test_one_thread_each_is_said_once(start_ps_worker):
    worker = start_ps_worker("sys.exit(1 - restart)", options=("--nproc", "2"))
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


def test_a_module_is_run_as_python_does_it(start_ps_worker, tmp_path: Path, recorder: Recorder):
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
