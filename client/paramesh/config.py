"""What a training process reads from its environment.

    config = ClientConfig.from_environment()
    if config.alone: ...          # no PARAMESH_COORDINATOR: no cluster, no thread, no port

`ps-run` and `ps-worker` set these variables for the processes that they start; by hand,
`PARAMESH_COORDINATOR=host:port python train.py` is enough to join.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from paramesh.errors import ConfigError
from paramesh.security import PLAIN, Security

__all__ = ["MODES", "ClientConfig", "security_of"]

MODES = ("sync", "async", "ssp", "local")
"""The training modes that `DistributedOptimizer(mode=)` and PARAMESH_MODE take."""


@dataclass(frozen=True)
class ClientConfig:
    """The settings of one training process, checked; each field names its variable."""

    coordinators: str = ""
    """PARAMESH_COORDINATOR: `host:port[,host:port]`; empty: alone."""
    job: str = "default"
    """PARAMESH_JOB: the cluster's name; another cluster's answers are refused."""
    slot: str = ""
    """PARAMESH_SLOT: `host/index`, the supervisor's name of this place, kept over restarts.
    Empty (no supervisor): `host/pid`."""
    host: str = ""
    """PARAMESH_HOST: the supervisor that beats for this process; empty: it beats for itself."""
    host_incarnation: int = 0
    """PARAMESH_HOST_INCARNATION: that supervisor's; required with PARAMESH_HOST."""
    local_rank: int = 0
    """PARAMESH_LOCAL_RANK: index among the processes of this machine; picks the GPU."""
    restart: int = 0
    """PARAMESH_RESTART: how often the supervisor has restarted this slot."""
    rank: int | None = None
    """PARAMESH_RANK: the rank asked for; a taken one is not given."""
    mode: str | None = None
    """PARAMESH_MODE: mode of a `DistributedOptimizer` whose script names none."""
    staleness: int | None = None
    """PARAMESH_STALENESS: its bound on the drift of clocks in ssp."""
    every: int | None = None
    """PARAMESH_EVERY: its number of local steps between exchanges in local mode."""
    join_timeout: float = 300.0
    """PARAMESH_JOIN_TIMEOUT, seconds: how long to look for coordinator and ledger. Five
    minutes cover servers that are still being scheduled when the first worker starts."""
    security: Security = PLAIN
    """PARAMESH_TLS_CERT, PARAMESH_TLS_KEY, PARAMESH_TLS_CA, PARAMESH_TOKEN or PARAMESH_TOKEN_FILE: who this
    process is, and whom it believes."""

    @property
    def alone(self) -> bool:
        """Whether no cluster is named."""
        return not self.coordinators

    @property
    def supervised(self) -> bool:
        """Whether a supervisor beats for this process and reports its exit."""
        return bool(self.host)

    @property
    def place(self) -> str:
        """The slot to register under: the supervisor's name of it, else `host/pid`."""
        return self.slot or f"{socket.gethostname()}/{os.getpid()}"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> ClientConfig:
        """Read and check the PARAMESH_ variables.

        Args:
            environ: the variables; default: the process's.

        Raises:
            ConfigError: names the variable, its value and what it may be.
        """
        read = _Reader(os.environ if environ is None else environ)
        return cls(
            coordinators=read.addresses("PARAMESH_COORDINATOR"),
            job=read.text("PARAMESH_JOB", "default"),
            slot=read.text("PARAMESH_SLOT", ""),
            host=read.text("PARAMESH_HOST", ""),
            host_incarnation=read.incarnation("PARAMESH_HOST_INCARNATION", required_by="PARAMESH_HOST"),
            local_rank=read.count("PARAMESH_LOCAL_RANK", 0) or 0,
            restart=read.count("PARAMESH_RESTART", 0) or 0,
            rank=read.count("PARAMESH_RANK", None),
            mode=read.choice("PARAMESH_MODE", MODES),
            staleness=read.count("PARAMESH_STALENESS", None),
            every=read.count("PARAMESH_EVERY", None, least=1),
            join_timeout=read.seconds("PARAMESH_JOIN_TIMEOUT", 300.0),
            security=security_of(read.environ),
        )


def security_of(environ: Mapping[str, str]) -> Security:
    """The security settings of a client, checked.

    Args:
        environ: variables.

    Raises:
        ConfigError: names the variable that is missing or wrong.
    """
    security = Security.from_environment(environ)
    for address in environ.get("PARAMESH_COORDINATOR", "").split(","):
        if address.strip():
            security.check_dial(address.strip())
    security.check(job=environ.get("PARAMESH_JOB", "").strip() or "default")
    return security


class _Reader:
    """Reads one variable of each type; every complaint names it and its value."""

    def __init__(self, environ: Mapping[str, str]):
        self.environ = environ

    def _wrong(self, name: str, expected: str) -> ConfigError:
        value = self.environ.get(name, "")
        return ConfigError(f"{name}={value!r} is not {expected}", metadata={"variable": name, "value": value})

    def text(self, name: str, default: str) -> str:
        value = self.environ.get(name, default).strip() or default
        if len(value) > 256 or any(not c.isprintable() for c in value):
            raise self._wrong(name, "a name of at most 256 printable characters")
        return value

    def addresses(self, name: str) -> str:
        parts = [part.strip() for part in self.environ.get(name, "").split(",") if part.strip()]
        for part in parts:
            host, colon, port = part.rpartition(":")
            if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
                raise self._wrong(name, "host:port[,host:port...]")
        return ",".join(parts)

    def count(self, name: str, default: int | None, least: int = 0) -> int | None:
        value = self.environ.get(name, "").strip()
        if not value:
            return default
        if not (value.isascii() and value.isdigit() and least <= int(value) < 2**31):
            raise self._wrong(name, f"a whole number of at least {least}")
        return int(value)

    def incarnation(self, name: str, required_by: str) -> int:
        value = self.environ.get(name, "").strip()
        if not value and not self.environ.get(required_by, "").strip():
            return 0
        if not (value.isascii() and value.isdigit() and 0 < int(value) < 2**64):
            raise self._wrong(name, f"a whole number from 1 to 2**64 - 1 (needed with {required_by})")
        return int(value)

    def seconds(self, name: str, default: float) -> float:
        value = self.environ.get(name, "").strip()
        if not value:
            return default
        try:
            number = float(value)
        except ValueError:
            raise self._wrong(name, "a number of seconds above 0") from None
        if not 0 < number < 1e9:
            raise self._wrong(name, "a number of seconds above 0")
        return number

    def choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        value = self.environ.get(name, "").strip()
        if value and value not in choices:
            raise self._wrong(name, "one of " + ", ".join(choices))
        return value or None
