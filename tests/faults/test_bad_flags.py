"""Row 73: a process told something impossible exits with status 2 and names the key, at once.

Real processes, because what matters is the exit status and that nothing was started.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paramesh.identity import Identity, Role
from paramesh.tokens import TokenKeys

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
    (COORDINATOR, ["--tls-cert", "c.pem"], "--tls-key"),
    (COORDINATOR, ["--tls-cert", "c.pem", "--tls-key", "c.key", "--tls-ca", "no_such_ca"], "--tls-cert"),
    (COORDINATOR, ["--token-keys", "@open"], "mode 0644"),
    (SERVER, [*AT, "--tls-cert", "s.pem", "--tls-ca", "ca.pem"], "--tls-key"),
    (WORKER, [*AT, "--tls-ca", "ca.pem", __file__], "--tls-cert"),
    (WORKER, [*AT, "--token-file", "@keys", __file__], "--token-file"),
    (WORKER, [*AT, "--name", "other", "--token-file", "@token", __file__], "--name"),
]
"""Files that begin with @ are made for the test, with that name."""

OPEN = [
    (COORDINATOR, ["--bind", "0.0.0.0:7070", "--insecure", "--token-keys", "@keys"], "--token-keys"),
    (SERVER, ["--coordinator", "10.0.0.1:7070", "--token-keys", "@keys"], "unencrypted"),
    (WORKER, ["--coordinator", "10.0.0.1:7070", "--token-file", "@token", __file__], "unencrypted"),
]
"""Tokens that would travel where others can read them."""


def run(program: list[str], flags: list[str]) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PARAMESH_")} | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *program, *flags], capture_output=True, text=True, timeout=60, env=env, check=False
    )


def secret(folder: Path, name: str) -> Path:
    """A file of keys or a token; "open" is one of keys that everybody may read."""
    keys = TokenKeys.fresh()
    path = folder / name[1:]
    token = keys.sign(Identity("default", Role.WORKER, "host"), time.time() + 60)
    path.write_text(token if name == "@token" else keys.text())
    path.chmod(0o644 if name == "@open" else 0o600)
    return path


@pytest.mark.parametrize(("program", "flags", "named"), ROWS, ids=[f"{p[1]} {' '.join(f)[-40:]}" for p, f, _ in ROWS])
@pytest.mark.bad_input(73, got="exit 2, key named")
def test_a_wrong_flag_is_named_and_the_status_is_2(program, flags, named, tmp_path):
    ended = run(program, [str(secret(tmp_path, flag)) if flag[0] == "@" else flag for flag in flags])
    assert ended.returncode == 2, ended.stderr
    assert named in ended.stderr or named.replace("_", "-") in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("program", "flags", "named"), OPEN, ids=[p[1] for p, _, _ in OPEN])
@pytest.mark.bad_input(67, got="exit 2, key named")
def test_a_token_over_an_open_network_is_refused_at_the_start(program, flags, named, tmp_path):
    test_a_wrong_flag_is_named_and_the_status_is_2(program, flags, named, tmp_path)


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
