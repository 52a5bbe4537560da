"""Row 73: a wrong flag ends the process with status 2 and the key named; and the flags are frozen."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from paramesh.errors import ConfigError
from paramesh_coordinator import cli, psctl
from paramesh_coordinator.config import CoordinatorConfig, parse_bind
from paramesh_coordinator.store.etcd_target import EtcdTarget
from typer.main import get_command
from typer.testing import CliRunner

WRONG = [
    ({"bind": "127.0.0.1"}, "bind"),
    ({"bind": ":7070"}, "bind"),
    ({"bind": "127.0.0.1:70000"}, "bind"),
    ({"bind": "127.0.0.1:-1"}, "bind"),
    ({"bind": "127.0.0.1:http"}, "bind"),
    ({"bind": "0.0.0.0:7070"}, "bind"),
    ({"bind": "[::]:7070"}, "bind"),
    ({"bind": "example.org:7070"}, "bind"),
    ({"job": ""}, "job"),
    ({"job": "a b"}, "job"),
    ({"start_workers": 0}, "start_workers"),
    ({"min_workers": 0}, "min_workers"),
    ({"min_workers": 3, "start_workers": 2}, "min_workers"),
    ({"min_servers": 0}, "min_servers"),
    ({"replicas": 0}, "replicas"),
    ({"replicas": 8}, "replicas"),
    ({"heartbeat_interval": 0.6}, "heartbeat_interval"),
    ({"heartbeat_interval": 0.0}, "heartbeat_interval"),
    ({"heartbeat_interval": float("nan")}, "heartbeat_interval"),
    ({"failure_timeout": float("inf")}, "failure_timeout"),
    ({"failure_timeout": 1.9}, "heartbeat_interval"),
    ({"client_timeout": 1.0}, "client_timeout"),
    ({"gather": -1.0}, "gather"),
    ({"step_timeout": float("nan")}, "step_timeout"),
    ({"push_timeout": 0.0}, "push_timeout"),
    ({"max_table_bytes": 0}, "max_table_bytes"),
    ({"max_partitions": 0}, "max_partitions"),
]


@pytest.mark.parametrize(("fields", "key"), WRONG)
def test_a_wrong_value_is_refused_and_its_key_named(fields: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CoordinatorConfig(**fields)  # type: ignore[arg-type]
    assert caught.value.metadata["key"] == key
    assert str(caught.value).startswith(f"{key}: ")


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "localhost:7070", "[::1]:7070", "127.9.9.9:65535"])
def test_loopback_addresses_are_fine(bind: str) -> None:
    assert CoordinatorConfig(bind=bind).bind == bind


ETCD = EtcdTarget(("127.0.0.1:2379",), "p")
AWAY = EtcdTarget(("127.0.0.1:2379", "10.0.0.1:2379"), "p")


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"state": ETCD, "bind": "0.0.0.0:7070", "insecure": True}, "advertise"),
        ({"state": ETCD, "advertise": "host"}, "advertise"),
        ({"state": AWAY}, "state"),
    ],
)
def test_a_coordinator_on_etcd_says_where_it_is_and_what_is_not_encrypted(fields: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        CoordinatorConfig(**fields)  # type: ignore[arg-type]
    CoordinatorConfig(state=AWAY, bind="0.0.0.0:7070", insecure=True, advertise="host-a:7070")


def test_an_open_bind_must_be_meant() -> None:
    assert CoordinatorConfig(bind="0.0.0.0:7070", insecure=True).bind == "0.0.0.0:7070"


def test_binds_are_split() -> None:
    assert parse_bind("[::1]:80") == ("[::1]", 80)


def test_every_field_is_documented() -> None:
    import inspect

    source = inspect.getsource(CoordinatorConfig)
    for field in dataclasses.fields(CoordinatorConfig):
        assert re.search(rf'    {field.name}: .*\n    """', source), field.name


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CoordinatorConfig().job = "other"  # type: ignore[misc]


# --- the commands ---


def flags(app: object, command: str | None = None) -> set[str]:
    click = get_command(app)  # type: ignore[arg-type]
    if command is not None:
        click = click.commands[command]  # type: ignore[attr-defined]
    return {option for param in click.params for option in param.opts if option not in ("-h", "--help")}


def test_the_flags_of_ps_coordinator_are_frozen() -> None:
    assert flags(cli.app) == {
        "--bind", "--advertise", "--state", "--ephemeral", "--job",
        "--start-workers", "--min-workers", "--min-servers", "--replicas",
        "--min-isr", "--rebalance",
        "--heartbeat-interval", "--failure-timeout", "--client-timeout", "--gather", "--step-timeout", "--insecure",
        "--tls-cert", "--tls-key", "--tls-ca", "--token-keys",
        "--checkpoint-dir", "--checkpoint-every", "--checkpoint-keep", "--restore",
        "--max-table-bytes", "--max-tables", "--max-partitions", "--max-clients", "--max-connections", "--max-calls",
        "--max-uploads", "--memory-watermark",
        "--log-level", "--version",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["status", "tables", "partitions", "workers", "events"])
def test_the_flags_of_psctl_are_frozen(command: str) -> None:
    expected = {"--coordinator", "--job", "--json", "--watch"} | ({"--limit"} if command == "events" else set())
    assert flags(psctl.app, command) == expected
    assert flags(psctl.app) == {
        "--coordinator",
        "--job",
        "--tls-cert",
        "--tls-key",
        "--tls-ca",
        "--token-file",
        "--version",
    }
    promote = {"partition", "server", "--accept-loss", "--coordinator", "--job", "--json"}
    assert flags(psctl.app, "promote") == promote


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--state: a FILE is required"),
        (["--ephemeral", "--state", "x"], "--state: .* exclude each other"),
        (["--ephemeral", "--heartbeat-interval", "1"], "--heartbeat-interval: is 1.0 s, more than a quarter"),
        (["--ephemeral", "--bind", "127.0.0.1:70000"], "--bind: port 70000"),
        (["--ephemeral", "--bind", "0.0.0.0:7070"], "--bind: .* pass --insecure"),
        (["--ephemeral", "--start-workers", "0"], "--start-workers: is 0"),
        (["--ephemeral", "--replicas", "8"], "--replicas: is 8, and must be within 1 and 7"),
        (["--ephemeral", "--start-workers", "two"], "Invalid value for '--start-workers'"),
        (["--ephemeral", "--no-such-flag"], "No such option"),
        (["--state", "/proc/nowhere/coordinator.sqlite", "--bind", "127.0.0.1:0"], "--state: /proc/nowhere"),
    ],
)
def test_a_wrong_flag_ends_with_status_two(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert re.search(text, " ".join(result.output.split())), result.output


def test_a_file_of_another_job_is_refused(tmp_path: Path) -> None:
    import asyncio

    from paramesh_coordinator.server import CoordinatorServer

    async def start(job: str) -> None:
        server = CoordinatorServer(CoordinatorConfig(bind="127.0.0.1:0", state=tmp_path / "a.sqlite", job=job))
        await server.start()
        await server.stop()

    asyncio.run(start("one"))
    with pytest.raises(ConfigError, match="belongs to job 'one'"):
        asyncio.run(start("two"))
    asyncio.run(start("one"))


def test_help_teaches() -> None:
    text = " ".join(CliRunner().invoke(cli.app, ["--help"]).output.split())
    for phrase in ("ps-server --coordinator", "again with the same --state", "2 for a mistake"):
        assert phrase in text


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:0", "127.0.0.1:70000", ",", "127.0.0.1:1,nowhere"])
@pytest.mark.parametrize("command", ["status", "events"])
def test_psctl_refuses_a_bad_address(address: str, command: str) -> None:
    for arguments in ([command, "--coordinator", address], ["--coordinator", address, command]):
        result = CliRunner().invoke(psctl.app, arguments)
        assert result.exit_code == 2
        assert "psctl: --coordinator: " in result.output


def test_psctl_is_told_of_the_cluster_by_the_environment() -> None:
    result = CliRunner().invoke(psctl.app, ["status"], env={"PARAMESH_COORDINATOR": "nowhere"})
    assert (result.exit_code, "'nowhere'" in result.output) == (2, True)
