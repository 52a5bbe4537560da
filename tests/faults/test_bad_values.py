"""Row 73 of the input matrix: flags and variables with an impossible value or a wrong unit, of real processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.faults.test_bad_flags import AT, COORDINATOR, RUN, SERVER, WORKER

PSCTL = ["-m", "paramesh_coordinator.psctl"]

ROWS = [
    (COORDINATOR, ["--heartbeat-interval", "500ms"], "heartbeat-interval"),
    (COORDINATOR, ["--failure-timeout", "nan"], "failure-timeout"),
    (COORDINATOR, ["--push-timeout", "5"], "push-timeout"),  # no such flag
    (COORDINATOR, ["--gather", "-1"], "gather"),
    (COORDINATOR, ["--job", "a b"], "job"),
    (SERVER, [*AT, "--staged-bytes", "4GB"], "staged-bytes"),
    (SERVER, [*AT, "--advertise", "10.0.0.1:0"], "advertise"),
    (SERVER, ["--coordinator", "127.0.0.1:70000"], "coordinator"),
    (WORKER, ["--coordinator", "127.0.0.1", __file__], "coordinator"),
    (RUN, ["--servers", "0", __file__], "servers"),
    (RUN, ["--workers", "two", __file__], "workers"),
    (PSCTL, ["status", "--coordinator", "127.0.0.1:0"], "coordinator"),
    (PSCTL, ["events", *AT, "--limit", "-5"], "limit"),
]


@pytest.mark.parametrize(("program", "flags", "named"), ROWS, ids=[f"{p[1]} {' '.join(f)[-40:]}" for p, f, _ in ROWS])
@pytest.mark.bad_input(73, got="exit 2, key named")
def test_a_wrong_value_is_named_and_the_status_is_2(program, flags, named):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PARAMESH_")} | {"COLUMNS": "200"}
    command = [sys.executable, *program, *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert ended.returncode == 2, ended.stderr
    assert named in ended.stderr.replace("_", "-")
    assert "Traceback" not in ended.stderr
