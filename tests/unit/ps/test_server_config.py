"""What `ps-server` can be told: every mistake names its key; flags are the config's fields."""

from __future__ import annotations

import dataclasses

import pytest
from paramesh.errors import ConfigError
from paramesh_server.cli import app, field_docs
from paramesh_server.config import ServerConfig
from typer.testing import CliRunner

AT = "127.0.0.1:7070"


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("coordinator", {"coordinator": ""}),
        ("coordinator", {"coordinator": "nowhere"}),
        ("coordinator", {"coordinator": f"{AT},other"}),
        ("bind", {"bind": "127.0.0.1:70000"}),
        ("bind", {"bind": "127.0.0.1"}),
        ("bind", {"bind": "0.0.0.0:0"}),
        ("bind", {"bind": "10.0.0.1:7080"}),
        ("control_bind", {"control_bind": "[::]:0"}),
        ("job", {"job": "a b"}),
        ("name", {"name": "../x"}),
        ("threads", {"threads": 0}),
        ("staged_bytes", {"staged_bytes": 0}),
        ("in_flight_bytes", {"in_flight_bytes": -1}),
        ("capacity_bytes", {"capacity_bytes": -1}),
        ("copy_rate", {"copy_rate": 1}),
        ("copy_rate", {"copy_rate": -1}),
        ("metrics_port", {"metrics_port": 70000}),
        ("heartbeat", {"heartbeat": "thread"}),
        ("name_patience", {"name_patience": -1.0}),
        ("advertise", {"advertise": "host:80"}),
    ],
)
def test_a_mistake_names_its_key(key: str, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**{"coordinator": AT, **settings})  # type: ignore[arg-type]
    assert caught.value.metadata["key"] == key
    assert str(caught.value).startswith(f"{key}: ")


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "localhost:1", "[::1]:0"])
def test_loopback_needs_no_flag(bind: str) -> None:
    assert ServerConfig(AT, bind=bind).host == bind.rpartition(":")[0]


def test_other_addresses_need_insecure() -> None:
    assert ServerConfig(AT, bind="0.0.0.0:0", insecure=True, advertise="h").advertised_host == "h"
    assert ServerConfig(AT, bind="0.0.0.0:0", insecure=True).advertised_host not in ("0.0.0.0", "")


def test_every_field_is_a_flag_with_help() -> None:
    docs = field_docs()
    assert list(docs) == [field.name for field in dataclasses.fields(ServerConfig)]
    assert all(text.endswith(".") for text in docs.values())


def test_the_flags_are_frozen() -> None:
    """A flag that vanishes or is renamed breaks people's scripts: change this list knowingly."""
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    flags = {word for word in shown.replace("│", " ").split() if word.startswith("--")}
    assert flags >= {
        "--coordinator", "--job", "--name", "--bind", "--control-bind", "--advertise", "--threads", "--staged-bytes",
        "--in-flight-bytes", "--capacity-bytes", "--copy-rate", "--metrics-port", "--replace", "--reflection",
        "--insecure", "--log-level", "--version",
    }  # fmt: skip
    assert "--heartbeat" not in flags
    assert "ps-server --coordinator 127.0.0.1:7070" in shown


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--coordinator"),
        (["--coordinator", AT, "--bind", "0.0.0.0:1"], "--insecure"),
        (["--coordinator", AT, "--name", "a b"], "--name"),
        (["--coordinator", AT, "--staged-bytes", "0"], "--staged-bytes"),
        (["--coordinator", AT, "--threads", "many"], "--threads"),
    ],
)
def test_a_wrong_flag_ends_with_status_2(flags: list[str], named: str) -> None:
    ended = CliRunner().invoke(app, flags)
    assert ended.exit_code == 2
    assert named in ended.output
