"""The environment of a training process: read, checked, and named when wrong."""

import dataclasses
import os

import pytest
from paramesh.config import ClientConfig
from paramesh.errors import ConfigError
from paramesh.security import VARIABLES

FULL = {
    "PARAMESH_COORDINATOR": "a:7070, [::1]:7071",
    "PARAMESH_JOB": "digits",
    "PARAMESH_SLOT": "host-a/1",
    "PARAMESH_HOST": "host-a",
    "PARAMESH_HOST_INCARNATION": "17",
    "PARAMESH_LOCAL_RANK": "1",
    "PARAMESH_RESTART": "2",
    "PARAMESH_RANK": "3",
    "PARAMESH_MODE": "ssp",
    "PARAMESH_STALENESS": "4",
    "PARAMESH_EVERY": "8",
    "PARAMESH_JOIN_TIMEOUT": "12.5",
}
SECURITY = {
    "PARAMESH_TLS_CERT": "c.pem",
    "PARAMESH_TLS_KEY": "c.key",
    "PARAMESH_TLS_CA": "ca.pem",
    "PARAMESH_TOKEN": "",
    "PARAMESH_TOKEN_FILE": "",
}
"""All of them are the one field `security`; `test_security.py` has the rest."""


def test_nothing_set_is_alone():
    config = ClientConfig.from_environment({})
    assert config.alone
    assert config == ClientConfig()
    assert not config.supervised
    assert config.mode is None


def test_everything_is_read():
    config = ClientConfig.from_environment(FULL)
    assert config == ClientConfig(
        coordinators="a:7070,[::1]:7071",
        job="digits",
        slot="host-a/1",
        host="host-a",
        host_incarnation=17,
        local_rank=1,
        restart=2,
        rank=3,
        mode="ssp",
        staleness=4,
        every=8,
        join_timeout=12.5,
    )
    assert config.supervised
    assert config.place == "host-a/1"


def test_every_field_has_its_variable():
    assert len(FULL) == len(dataclasses.fields(ClientConfig)) - 1
    assert set(SECURITY) == set(VARIABLES.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PARAMESH_COORDINATOR", "nowhere"),
        ("PARAMESH_COORDINATOR", "host:0"),
        ("PARAMESH_COORDINATOR", "host:65536"),
        ("PARAMESH_COORDINATOR", "a:1,b"),
        ("PARAMESH_JOB", "x" * 257),
        ("PARAMESH_JOB", "a\nb"),
        ("PARAMESH_HOST_INCARNATION", "0"),
        ("PARAMESH_HOST_INCARNATION", str(2**64)),
        ("PARAMESH_LOCAL_RANK", "-1"),
        ("PARAMESH_LOCAL_RANK", "٣"),
        ("PARAMESH_RANK", "one"),
        ("PARAMESH_MODE", "fast"),
        ("PARAMESH_STALENESS", "1.5"),
        ("PARAMESH_EVERY", "0"),
        ("PARAMESH_JOIN_TIMEOUT", "nan"),
        ("PARAMESH_JOIN_TIMEOUT", "soon"),
        ("PARAMESH_JOIN_TIMEOUT", "0"),
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        ClientConfig.from_environment({**FULL, name: value})
    assert caught.value.metadata == {"variable": name, "value": value.strip()} or value in str(caught.value.metadata)


def test_a_host_needs_its_incarnation():
    environ = {k: v for k, v in FULL.items() if k != "PARAMESH_HOST_INCARNATION"}
    with pytest.raises(ConfigError, match="PARAMESH_HOST_INCARNATION"):
        ClientConfig.from_environment(environ)


def test_without_a_supervisor_the_place_is_this_process():
    place = ClientConfig.from_environment({"PARAMESH_COORDINATOR": "a:1"}).place
    assert place.endswith(f"/{os.getpid()}")
