"""The command lines of ps-worker and ps-run: frozen flags, defaults, mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from paramesh_worker.config import RunConfig, WorkerConfig, flags, parse


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.touch()
    return str(path)


def read(config, *argv: str, environ=None):
    return parse(config, argv, prog="prog", description="d", examples="e", environ=environ or {})


def test_the_flags_of_ps_worker_are_frozen():
    """Scripts and other people's tools hold on to these: add, but do not rename or remove."""
    assert flags(WorkerConfig) == {
        "--nproc": True,
        "--max-restarts": True,
        "--coordinator": True,
        "--job": True,
        "--name": True,
        "--tls-cert": True,
        "--tls-key": True,
        "--tls-ca": True,
        "--token-file": True,
        "--log-dir": True,
        "--tee": False,
        "--grace": True,
        "--log-level": True,
        "--events-fd": True,
        "--version": False,
        "--help": False,
        "-h": False,
    }


def test_the_flags_of_ps_run_are_frozen():
    assert flags(RunConfig) == {
        "--servers": True,
        "--workers": True,
        "--mode": True,
        "--staleness": True,
        "--every": True,
        "--replicas": True,
        "--max-restarts": True,
        "--port": True,
        "--state": True,
        "--checkpoint-dir": True,
        "--checkpoint-every": True,
        "--checkpoint-keep": True,
        "--restore": True,
        "--log-dir": True,
        "--grace": True,
        "--plain": False,
        "--version": False,
        "--help": False,
        "-h": False,
    }


def test_defaults(script: str):
    worker, command = read(WorkerConfig, "--coordinator", "a:1", script, "x")
    assert (worker.nproc, worker.max_restarts, worker.job, worker.grace) == (1, 3, "default", 10.0)
    assert worker.name, "the host's name by default"
    assert command.arguments == ("x",)
    run, _ = read(RunConfig, script)
    assert (run.servers, run.workers, run.mode, run.replicas, run.port) == (1, 1, None, 1, 0)


def test_the_environment_names_the_cluster_and_flags_win(script: str):
    environ = {"PARAMESH_COORDINATOR": "env:1,env:2", "PARAMESH_JOB": "of-env"}
    worker, _ = read(WorkerConfig, script, environ=environ)
    assert (worker.coordinator, worker.job) == ("env:1,env:2", "of-env")
    worker, _ = read(WorkerConfig, "--coordinator", "flag:1", "--job", "j", script, environ=environ)
    assert (worker.coordinator, worker.job) == ("flag:1", "j")


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ("--nproc 0", "--nproc"),
        ("--nproc x", "--nproc"),
        ("--nproc", "--nproc"),
        ("--max-restarts -1", "--max-restarts"),
        ("--coordinator nowhere", "--coordinator"),
        ("--coordinator host:0", "--coordinator"),
        ("--coordinator host:70000", "--coordinator"),
        ("--coordinator a:1,,b:2", "--coordinator"),
        ("--job no/../where", "--job"),
        ("--name a/b", "--name"),
        ("--name a..b", "--name"),
        ("--grace nan", "--grace"),
        ("--grace -1", "--grace"),
        ("--tee", "--tee"),
        ("--log-level loud", "--log-level"),
        ("--nproces 2", "--nproces"),
    ],
)
def test_mistakes_of_ps_worker_exit_2_and_name_the_flag(options: str, flag: str, script: str, capsys):
    wrong = ["--coordinator", "a:1", *options.split(), *([] if options == "--nproc" else [script])]
    with pytest.raises(SystemExit) as end:
        read(WorkerConfig, *wrong)
    assert end.value.code == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ("--servers 0", "--servers"),
        ("--workers -2", "--workers"),
        ("--mode fast", "--mode"),
        ("--mode sync --staleness 3", "--staleness"),
        ("--mode ssp --staleness -3", "--staleness"),
        ("--mode ssp --every 3", "--every"),
        ("--every 0", "--every"),
        ("--replicas 2", "--replicas"),
        ("--servers 2 --replicas 3", "--replicas"),
        ("--servers 9 --replicas 8", "--replicas"),
        ("--replicas 0", "--replicas"),
        ("--port 65536", "--port"),
        ("--grace inf", "--grace"),
        ("--state /", "--state"),
    ],
)
def test_mistakes_of_ps_run_exit_2_and_name_the_flag(options: str, flag: str, script: str, capsys):
    with pytest.raises(SystemExit) as end:
        read(RunConfig, *options.split(), script)
    assert end.value.code == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("config", [WorkerConfig, RunConfig])
def test_a_missing_script_exits_2(config, tmp_path: Path, capsys):
    for argv in ([], [str(tmp_path / "none.py")]):
        with pytest.raises(SystemExit) as end:
            read(config, *argv, environ={"PARAMESH_COORDINATOR": "a:1"})
        assert end.value.code == 2
        assert "SCRIPT" in capsys.readouterr().err.splitlines()[-1]


def test_ps_worker_without_a_cluster_says_what_to_do(script: str, capsys):
    with pytest.raises(SystemExit) as end:
        read(WorkerConfig, script)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "--coordinator" in error
    assert "ps-run" in error


@pytest.mark.parametrize("module", ["paramesh_worker.cli", "paramesh_worker.launcher"])
def test_help_teaches_every_flag_with_examples(module: str):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    config = WorkerConfig if module.endswith("cli") else RunConfig
    for flag in set(flags(config)) - {"--events-fd"}:
        assert flag in done.stdout
    assert "examples:" in done.stdout
    assert "exit status" in done.stdout


def test_no_command_of_this_role_imports_torch():
    code = (
        "import sys, paramesh_worker.cli, paramesh_worker.supervisor, paramesh_worker.run;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
