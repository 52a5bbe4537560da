"""What a server can be told, checked once.

config = ServerConfig(coordinator="127.0.0.1:7070")                       # in-process
config = ServerConfig(coordinator="10.0.0.1:7070", bind="10.0.0.2:7080", tls_cert="s0.pem", tls_key="s0.key",
                      tls_ca="ca.pem")
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field, replace

from paramesh.bounds import MAX_CONNECTIONS, MAX_STREAMS, Bounds
from paramesh.errors import ConfigError, ParameshError
from paramesh.identity import Identity, Role
from paramesh.routing import check_name
from paramesh.security import Security

from paramesh_server.process import memory_bytes, room_for_values

__all__ = ["ServerConfig", "parse_address"]

MIN_COPY_RATE = 4 << 20
"""Twice what the coordinator grants each of two copies at a time before it gives a learner's place away."""

HEARTBEATS = ("process", "loop", "none")


def _default_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _half_of_memory() -> int:
    return memory_bytes() // 2


def _room_for_values() -> int:
    return room_for_values(memory_bytes())


@dataclass(frozen=True)
class ServerConfig:
    """Everything that a server is started with. Times are in seconds, sizes in bytes.

    Raises:
        ConfigError: a value is impossible; `metadata["key"]` and the message name the key.
    """

    coordinator: str
    """Where the coordinator is: host:port, or several with commas between them."""

    job: str = "default"
    """The cluster's name; requests that name another are refused with WRONG_CLUSTER."""

    name: str = ""
    """This server's name, unique among live servers. Default: the certificate's name, else host and process id."""

    bind: str = "127.0.0.1:0"
    """host:port of the data plane. Port 0 picks a free one, which is logged when serving."""

    control_bind: str = ""
    """host:port of the control port. Empty: a free port on the host of --bind."""

    advertise: str = ""
    """Host that others dial, if it is not the one of --bind (behind NAT, or 0.0.0.0)."""

    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads that sum, step and encode. More than cores only adds switching."""

    staged_bytes: int = field(default_factory=_half_of_memory)
    """Bound on contributions that wait for their step: workers times their gradients' share
    here, of two steps. Above it pushes are refused with QUOTA. Default: half of the memory."""

    in_flight_bytes: int = 1 << 30
    """Bound on payloads of pushes and assigns that are not staged or applied yet. Above it clients are told to wait."""

    max_connections: int = MAX_CONNECTIONS
    """Connections of each of the two ports; further ones are closed at once. Less if there are not enough
    file descriptors."""

    max_streams: int = MAX_STREAMS
    """Calls under way on one connection; gRPC has clients wait for a place."""

    max_calls: int = Bounds.calls
    """Calls under way of one service (values, ledger). Above it clients are told to wait."""

    max_uploads: int = Bounds.uploads
    """Calls whose request is not here in full; each may hold 8 MiB. Above it clients are told to wait."""

    max_queue: int = 1024
    """Pieces of work that wait for one partition. Above it clients are told to wait."""

    max_lag_bytes: int = 256 << 20
    """Records of one partition that its followers do not have yet, and at least 4 of them. Above it
    clients are told to wait."""

    memory_watermark: float = 0.9
    """Share of the memory (of the container, else of the machine) above which nothing new is taken on: tables,
    workers, writes of new clients. What is under way goes on. 0: never."""

    capacity_bytes: int = field(default_factory=_room_for_values)
    """How many bytes of values the coordinator may place here, of whatever replicas. Default: a fourth of the memory
    (of the container, else of the machine) beyond the 384 MiB that a server needs itself. 0: no bound."""

    copy_rate: int = 64 << 20
    """Bytes per second at which partitions are copied from here to other servers, for moves and new replicas.
    0: as fast as it goes, which training notices."""

    drain_timeout: float = 25.0
    """Seconds that SIGTERM leaves this server to give its partitions to others before it ends. 0: it ends
    at once. Below the 30 s after which Kubernetes kills."""

    metrics_port: int = 0
    """Port of the Prometheus page. 0: none."""

    metrics_host: str = "127.0.0.1"
    """Host of the Prometheus page, which is not encrypted and asks nobody who he is: it has figures, and no names or
    values of the model."""

    heartbeat: str = "process"
    """Who beats: "process", a helper that no busy interpreter holds up; "loop", a task on
    the event loop, for tests in one process; "none"."""

    replace: bool = False
    """Take over the name of a live server, which is declared dead."""

    reflection: bool = False
    """Serve gRPC reflection, for tools such as grpcurl."""

    tls_cert: str = ""
    """PEM file of this server's certificate, which says who it is and at which hosts it is dialled. Certificate, key
    and CA encrypt every connection; a changed file is taken up by itself."""

    tls_key: str = ""
    """PEM file of its key, mode 0600."""

    tls_ca: str = ""
    """PEM file of the CA that the cluster's certificates are of. Others are refused."""

    token_keys: str = ""
    """File with the keys of tokens: callers are known by tokens instead of certificates."""

    insecure: bool = False
    """Allows a bind that other machines can reach, although traffic is not encrypted."""

    name_patience: float = 6.0
    """How long a taken name is asked for again: a server started anew finds its dead
    predecessor alive until the coordinator has noticed the silence."""

    def __post_init__(self) -> None:
        who = self._check_security()
        if not self.name:
            object.__setattr__(self, "name", who.name if who is not None else _default_name())
        if not self.coordinator:
            raise _wrong("coordinator", "is missing; say where the coordinator is, such as 127.0.0.1:7070")
        for address in self.coordinator.split(","):
            parse_address("coordinator", address.strip())
            self.security.check_dial(address.strip())
        for key, bind in (("bind", self.bind), ("control_bind", self.control_bind)):
            if bind or key == "bind":
                self._check_bind(key, bind)
        for key in ("job", "name"):
            try:
                check_name(getattr(self, key), key)
            except ParameshError as error:
                raise _wrong(key, str(error)) from None
        for key in (
            "threads", "staged_bytes", "in_flight_bytes", "max_connections", "max_streams", "max_calls", "max_uploads",
            "max_queue", "max_lag_bytes",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                raise _wrong(key, f"is {getattr(self, key)}, and must be at least 1")
        if self.capacity_bytes < 0:
            raise _wrong("capacity_bytes", f"is {self.capacity_bytes}, and must not be negative")
        if 0 != self.copy_rate < MIN_COPY_RATE:
            raise _wrong(
                "copy_rate", f"is {self.copy_rate}, and must be 0 or at least {MIN_COPY_RATE}: training would outrun it"
            )
        if not 0 <= self.metrics_port <= 65535:
            raise _wrong("metrics_port", f"is {self.metrics_port}, and must be within 0 and 65535")
        if not 0 <= self.memory_watermark <= 1:
            raise _wrong("memory_watermark", f"is {self.memory_watermark}, and must be within 0 and 1")
        if self.heartbeat not in HEARTBEATS:
            raise _wrong("heartbeat", f"{self.heartbeat!r} is none of {', '.join(HEARTBEATS)}")
        if not 0 <= self.name_patience <= 3600:
            raise _wrong("name_patience", f"is {self.name_patience}, and must be within 0 and 3600")
        if not 0 <= self.drain_timeout <= 86400:
            raise _wrong("drain_timeout", f"is {self.drain_timeout}, and must be within 0 and 86400")
        if self.advertise and ":" in self.advertise.strip("[]") and not self.advertise.startswith("["):
            raise _wrong("advertise", f"{self.advertise!r} is a host without a port")

    def _check_bind(self, key: str, bind: str) -> None:
        parse_address(key, bind)
        self.security.check_bind(key, bind, self.insecure)

    def _check_security(self) -> Identity | None:
        """Who the certificate says that this server is; None without one."""
        who = self._files.check(Role.SERVER, self.job)
        if who is not None and self.name and not who.covers(self.name):
            raise _wrong("name", f"{self.name!r} is not {who.name!r}, whose certificate this is, nor under it")
        return who

    @property
    def _files(self) -> Security:
        return Security(self.tls_cert, self.tls_key, self.tls_ca, token_keys=self.token_keys)

    @property
    def security(self) -> Security:
        """Of every port and channel."""
        if not self.token_keys:
            return self._files
        try:
            return replace(self._files, signs_as=Identity(self.job, Role.SERVER, self.name))
        except ParameshError as error:
            raise _wrong("name", str(error)) from None

    @property
    def host(self) -> str:
        """Host of the data plane's bind."""
        return parse_address("bind", self.bind)[0]

    @property
    def advertised_host(self) -> str:
        """Host that others dial."""
        if self.advertise:
            return self.advertise
        return socket.gethostname() if self.host in ("0.0.0.0", "[::]") else self.host


def parse_address(key: str, address: str) -> tuple[str, int]:
    """Split host:port.

    Raises:
        ConfigError: it is not that, or the port is outside 0..65535; names the key.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise _wrong(key, f"{address!r} is not host:port, such as 127.0.0.1:7070")
    if int(port) > 65535:
        raise _wrong(key, f"port {port} is above 65535")
    return host, int(port)


def _wrong(key: str, problem: str) -> ConfigError:
    return ConfigError(f"{key}: {problem}", metadata={"key": key})
