"""What the coordinator can be told, checked once.

config = CoordinatorConfig(bind="127.0.0.1:0", state=None)      # in-process, no file
config = CoordinatorConfig(state=Path("run.sqlite"), start_workers=4)
"""

from __future__ import annotations

import math
import re
import typing
from dataclasses import dataclass, replace
from pathlib import Path

from paramesh.bounds import MAX_CONNECTIONS, Bounds
from paramesh.errors import ConfigError, ParameshError
from paramesh.identity import Identity, Role
from paramesh.routing import NAME
from paramesh.security import Security, is_loopback

from paramesh_coordinator.store.etcd_target import EtcdTarget

__all__ = ["MAX_REPLICAS", "CoordinatorConfig", "parse_bind", "parse_every"]

MAX_REPLICAS = 7
"""Copies of a partition. More is a mistake: every push waits for all of them, and six may be
lost with seven."""

BEATS_PER_TIMEOUT = 4
"""A failure timeout below four beats evicts on a single lost packet plus jitter."""


@dataclass(frozen=True)
class CoordinatorConfig:
    """Everything that a coordinator is started with. Times are in seconds.

    Raises:
        ConfigError: a value is impossible; `metadata["key"]` and the message name the key.
    """

    bind: str = "127.0.0.1:7070"
    """host:port to listen on. Port 0 picks a free one, which is logged when serving."""

    advertise: str = ""
    """host:port at which others reach this coordinator, for those that ask a standby. Empty: the
    address it listens on."""

    state: Path | EtcdTarget | None = None
    """The SQLite file, or a place in etcd, where several coordinators may be started: one leads,
    the others stand by. None keeps the state in memory: a restart then loses the cluster."""

    job: str = "default"
    """The cluster's name; requests that name another are refused with WRONG_CLUSTER."""

    start_workers: int = 1
    """Step 0 waits until that many workers have joined."""

    min_workers: int = 1
    """Later steps pause below that many active workers."""

    min_servers: int = 1
    """Nothing is placed before that many servers have registered, so that placement is even."""

    replicas: int = 1
    """Copies of each partition, the ledger included; a table may say otherwise. With 2 a lost
    server costs nothing that was acknowledged, and every push is sent on to one follower."""

    min_isr: int = 1
    """Writes are refused, and repeated by clients, while fewer replicas are in sync."""

    heartbeat_interval: float = 0.5
    """Between two beats. Lower finds death sooner and costs one small message per node and beat."""

    failure_timeout: float = 2.0
    """Silence after which a server or host is dead. At least four beats: one lost packet and
    a busy moment must not evict anybody."""

    client_timeout: float = 10.0
    """The same for a client without a supervisor: it beats from a process whose GIL a long
    C call may hold for seconds."""

    gather: float = 2.0
    """How long a step waits, once per idle period, for members between two loaders."""

    step_timeout: float = 0.0
    """Evicts a member that beats but never gets ready. 0: never."""

    push_timeout: float = 60.0
    """After it the outcome of a push is unknown and the client registers anew."""

    max_table_bytes: int = 1 << 40
    """A table above this is refused with QUOTA before anything is allocated."""

    max_partitions: int = 1 << 16
    """Partitions of the whole job; each costs about 200 bytes of every map that is sent."""

    max_tables: int = 4096
    """Tables of the whole job; a model has one per optimizer group and a few of embeddings."""

    max_clients: int = 8192
    """Training processes and tools that are registered at a time; each is a row, a watch of the map, and beats."""

    max_connections: int = MAX_CONNECTIONS
    """Connections; further ones are closed at once. Less if there are not enough file descriptors."""

    max_calls: int = Bounds.calls
    """Calls under way of one service (maps, tables, psctl). Above it callers are told to wait."""

    max_uploads: int = 64
    """Calls whose request is not here in full; each may hold 16 MiB. Above it callers are told to wait."""

    memory_watermark: float = 0.9
    """Share of the memory above which no table is made and no client registered. 0: never."""

    rebalance: bool = True
    """Moves partitions by itself when servers came or went and bytes are uneven by more than
    20 %. Off: only draining and `psctl move` and `rebalance` move anything."""

    checkpoint_dir: str = ""
    """Where checkpoints go: a directory that the coordinator and all servers share, or a URL."""

    checkpoint_seconds: float = 0.0
    """Between two checkpoints. 0: not by time."""

    checkpoint_steps: int = 0
    """Steps of the first group between two checkpoints. 0: not by steps."""

    checkpoint_keep: int = 3
    """Periodic checkpoints that are kept. The newest complete one is never removed."""

    restore: str = ""
    """A checkpoint to begin with: its URL. Only on a fresh state; a restart does not load it again."""

    tls_cert: str = ""
    """PEM file of this coordinator's certificate. Certificate, key and CA encrypt every connection."""

    tls_key: str = ""
    """PEM file of its key, mode 0600."""

    tls_ca: str = ""
    """PEM file of the CA that the cluster's certificates are of."""

    token_keys: str = ""
    """File with the keys of tokens: callers are known by tokens instead of certificates."""

    insecure: bool = False
    """Allows a bind that other machines can reach, although traffic is not encrypted."""

    @property
    def security(self) -> Security:
        """Of the port and every channel."""
        files = Security(self.tls_cert, self.tls_key, self.tls_ca, token_keys=self.token_keys)
        if not self.token_keys:
            return files
        try:
            return replace(files, signs_as=Identity(self.job, Role.COORDINATOR, "coordinator"))
        except ParameshError as error:
            raise _wrong("job", str(error)) from None

    def __post_init__(self) -> None:
        host, _ = parse_bind(self.bind)
        self.security.check(Role.COORDINATOR, self.job)
        self.security.check_bind("bind", self.bind, self.insecure)
        self._check_state(host)
        if not NAME.fullmatch(self.job):
            raise _wrong("job", f"{self.job[:80]!r} must match [A-Za-z0-9_.:/-]{{1,256}}")
        for key in (
            "start_workers", "min_workers", "min_servers", "max_table_bytes", "max_partitions", "max_tables",
            "max_clients", "max_connections", "max_calls", "max_uploads",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                raise _wrong(key, f"is {getattr(self, key)}, and must be at least 1")
        if self.min_workers > self.start_workers:
            raise _wrong("min_workers", f"is {self.min_workers}, above start_workers ({self.start_workers})")
        if not 0 <= self.memory_watermark <= 1:
            raise _wrong("memory_watermark", f"is {self.memory_watermark}, and must be within 0 and 1")
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise _wrong("replicas", f"is {self.replicas}, and must be within 1 and {MAX_REPLICAS}")
        if not 1 <= self.min_isr <= self.replicas:
            raise _wrong("min_isr", f"is {self.min_isr}, and must be within 1 and replicas ({self.replicas})")
        self._check_checkpoints()
        self._check_times()

    def _check_checkpoints(self) -> None:
        if (self.checkpoint_seconds or self.checkpoint_steps) and not self.checkpoint_dir:
            raise _wrong("checkpoint_every", "says when, and --checkpoint-dir must say where")
        if self.checkpoint_keep < 1:
            raise _wrong("checkpoint_keep", f"is {self.checkpoint_keep}, and must be at least 1")
        if not (math.isfinite(self.checkpoint_seconds) and 0 <= self.checkpoint_seconds <= 31 * 86400):
            raise _wrong("checkpoint_every", f"is {self.checkpoint_seconds} s, and must be within 0 and 31 days")
        if self.checkpoint_steps < 0:
            raise _wrong("checkpoint_every", f"is {self.checkpoint_steps} steps, and must not be negative")

    def _check_state(self, host: str) -> None:
        if self.advertise:
            _split("advertise", self.advertise)
        if not isinstance(self.state, EtcdTarget):
            return
        if not self.advertise and host.strip("[]") in ("0.0.0.0", "::"):
            raise _wrong("advertise", f"is needed: nobody reaches a coordinator at {host}, where it listens")
        away = [one for one in self.state.endpoints if not is_loopback(one.rpartition(":")[0])]
        if away and not self.insecure:
            raise _wrong(
                "state",
                f"etcd at {away[0]} is reached over the network and traffic to it is not encrypted; pass --insecure "
                "inside a network that you trust",
            )

    def _check_times(self) -> None:
        for key in ("heartbeat_interval", "failure_timeout", "client_timeout", "push_timeout"):
            if not (math.isfinite(getattr(self, key)) and 0.01 <= getattr(self, key) <= 3600):
                raise _wrong(key, f"is {getattr(self, key)} s, and must be within 0.01 and 3600")
        for key in ("gather", "step_timeout"):
            if not (math.isfinite(getattr(self, key)) and 0 <= getattr(self, key) <= 86400):
                raise _wrong(key, f"is {getattr(self, key)} s, and must be within 0 and 86400")
        if self.heartbeat_interval * BEATS_PER_TIMEOUT > self.failure_timeout:
            raise _wrong(
                "heartbeat_interval",
                f"is {self.heartbeat_interval} s, more than a quarter of failure_timeout ({self.failure_timeout} s)",
            )
        if self.client_timeout < self.failure_timeout:
            raise _wrong("client_timeout", f"is below failure_timeout ({self.failure_timeout} s)")


def parse_bind(bind: str) -> tuple[str, int]:
    """Split host:port.

    Raises:
        ConfigError: it is not that, or the port is outside 0..65535.
    """
    return _split("bind", bind)


def _split(key: str, address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise _wrong(key, f"{address!r} is not host:port, such as 127.0.0.1:7070")
    if int(port) > 65535:
        raise _wrong(key, f"port {port} is above 65535")
    return host, int(port)


_UNITS = {"s": 1, "m": 60, "h": 3600}


def parse_every(text: str) -> dict[str, typing.Any]:
    """The fields that `--checkpoint-every` stands for: `10m`, `90s`, `2h`, `500steps`; "" is never.

    Raises:
        ConfigError: it is none of them.
    """
    found = re.fullmatch(r"([0-9]{1,9})(steps?|[smh])", text)
    if not text:
        return {}
    if found is None or not int(found[1]):
        raise _wrong("checkpoint_every", f"{text[:40]!r} is not like 90s, 10m, 2h or 500steps")
    if found[2].startswith("step"):
        return {"checkpoint_steps": int(found[1])}
    return {"checkpoint_seconds": float(int(found[1]) * _UNITS[found[2]])}


def _wrong(key: str, problem: str) -> ConfigError:
    return ConfigError(f"{key}: {problem}", metadata={"key": key})
