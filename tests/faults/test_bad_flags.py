"""Row 73: a process told something impossible exits with status 2 and names the key, at once.

Real processes, because what matters is the exit status and that nothing was started.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

COORDINATOR = ["-m", "paramesh_coordinator.cli", "--ephemeral"]
SERVER = ["-m", "paramesh_server.cli"]
WORKER = ["-m", "paramesh_worker.cli"]
RUN = ["-m", "paramesh_worker.launcher"]
AT = ["--coordinator", "127.0.0.1:7070"]

ROWS = [
    (COORDINATOR, ["--heartbeat-interval", "1", "--failure-timeout", "2"], "heartbeat_interval"),
    (COORDINATOR, ["--bind", "127.0.0.1:70000"], "bind"),
    (COORDINATOR, ["--bind", "0.0.0.0:7070"], "insecure"),
    (COORDINATOR, ["--min-workers", "3", "--start-workers", "2"], "min_workers"),
    (COORDINATOR, ["--no-such-flag"], "--no-such-flag"),
    (SERVER, [], "coordinator"),
    (SERVER, [*AT, "--bind", "127.0.0.1:70000"], "bind"),
    (SERVER, [*AT, "--name", "../x"], "name"),
    (SERVER, ["--coordinator", "nowhere"], "coordinator"),
    (WORKER, [__file__], "coordinator"),
    (WORKER, [*AT, "--nproc", "0", __file__], "nproc"),
    (WORKER, [*AT, "no_such_script.py"], "no_such_script.py"),
    (RUN, ["--replicas", "2", __file__], "replicas"),
    (WORKER, [*AT, "-m", "no_such_module"], "no_such_module"),
    (RUN, ["--mode", "magic", __file__], "mode"),
    (RUN, ["-m", "no_such_module"], "no_such_module"),
]


def run(program: list[str], flags: list[str]) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PARAMESH_")} | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *program, *flags], capture_output=True, text=True, timeout=60, env=env, check=False
    )


@pytest.mark.parametrize(("program", "flags", "named"), ROWS, ids=[f"{p[1]} {' '.join(f)[-40:]}" for p, f, _ in ROWS])
@pytest.mark.bad_input(73, got="exit 2, key named")
def test_a_wrong_flag_is_named_and_the_status_is_2(program, flags, named):
    ended = run(program, flags)
    assert ended.returncode == 2, ended.stderr
    assert named in ended.stderr or named.replace("_", "-") in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("program", "flag"),
    [(COORDINATOR, "--bind"), ([*SERVER, *AT], "--bind"), ([*SERVER, *AT], "--control-bind")],
    ids=["coordinator", "server", "server-control"],
)
def test_a_taken_port_is_one_line_that_says_why(program, flag):
    """gRPC's own words for it, three lines of C, are for nobody."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = run(program, [flag, address])
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if " INFO " not in line]
    assert f"{flag}: {address} cannot be listened on: Address already in use; is another process there?" in line


@pytest.mark.parametrize("program", [[*WORKER, *AT], RUN], ids=["worker", "run"])
def test_a_script_with_a_syntax_error_starts_nothing(program, tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text("import torch\n\ndef step(:\n    pass\n")
    ended = run(program, [str(script)])
    assert ended.returncode == 2
    assert f"argument SCRIPT: {script}:3: SyntaxError: " in ended.stderr.splitlines()[-1]
