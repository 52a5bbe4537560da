"""Channels, servers and stubs: every gRPC setting of Paramesh, each with its reason.

Import gRPC through this module: it switches off gRPC's fork support first (on, forked
DataLoader workers hung in 4 of 4 tries).

    channel = aio_channel("127.0.0.1:7071")
    data = DataPlaneStub(channel)
    async for framed in data.pull(request, timeout=30): ...
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc as grpc
import grpc.aio  # registers grpc.aio

from paramesh.bounds import MAX_CONNECTIONS, MAX_STREAMS
from paramesh.errors import refuse
from paramesh.framing import MAX_MESSAGE_BYTES, Framed, decode
from paramesh.security import PLAIN, Security
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

PROTOCOL = 1
"""Wire protocol version; raised when an old peer would misread a message."""

_COMMON: list[tuple[str, int]] = [
    # Larger than any frame we send, small enough that a hostile one cannot fill memory.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A stopped peer is noticed after keepalive + ping timeout; keepalive alone took 60 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Fewer HTTP/2 frames per message: 16 KiB ones cost a header and a write each.
    ("grpc.http2.max_frame_size", 4 << 20),
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_COMMON,
    # 1 lets a second server silently share the port and take half of the calls.
    ("grpc.so_reuseport", 0),
    # Our own clients ping every 10 s; the default minimum (5 min) would cut them off.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Whoever connects and says nothing holds a descriptor; the default is two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Identity only: frames do not shrink, and what is never unpacked cannot be a bomb.
    ("grpc.compression_enabled_algorithms_bitset", 1),
]

MAX_REQUEST_BYTES = 8 << 20
"""Of one message to a server's data port: a frame is 2 MiB, small state 4 MiB. gRPC puts as much together
for every call that is read before anybody here sees it."""


def server_options(
    connections: int = MAX_CONNECTIONS, streams: int = MAX_STREAMS, request_bytes: int = MAX_MESSAGE_BYTES
) -> list[tuple[str, int]]:
    """The settings of one listening port."""
    return [
        *(option for option in SERVER_OPTIONS if option[0] != "grpc.max_receive_message_length"),
        ("grpc.max_receive_message_length", request_bytes),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", streams),
    ]


CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *_COMMON,
    # gRPC's own retries would hide what the sequence numbers must see.
    ("grpc.enable_retries", 0),
    # An http_proxy in the environment is for the web: a cluster's calls through it fail.
    ("grpc.enable_http_proxy", 0),
    # The default back-off was measured 4.9 s late after a server came back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

HEARTBEAT_OPTIONS: list[tuple[str, int]] = [
    *CHANNEL_OPTIONS,
    # Beats must not queue behind a 2 MiB frame on a shared connection.
    ("grpc.use_local_subchannel_pool", 1),
]


def aio_channel(address: str, security: Security = PLAIN, *, heartbeat: bool = False) -> grpc.aio.Channel:
    """An asyncio channel to `host:port`; create it on the loop that uses it.

    Args:
        address: of the peer.
        security: how to encrypt, and who to say that we are.
        heartbeat: with a connection of its own.

    Raises:
        ConfigError: the security settings cannot be used, or not for this address.
    """
    options = HEARTBEAT_OPTIONS if heartbeat else CHANNEL_OPTIONS
    if not security.encrypted and not security.bears_token:
        return grpc.aio.insecure_channel(address, options=options)
    from paramesh.secure_channel import SecureChannel

    return SecureChannel(address, options, security)


def add_port(
    server: grpc.aio.Server, bind: str, security: Security = PLAIN, on_handshake: Callable[[], None] = lambda: None
) -> int:
    """Open a server's port, encrypted if the settings say so; returns its number.

    Args:
        server: before its start.
        bind: host:port.
        security: certificate, key and CA.
        on_handshake: called at each TLS handshake, from a thread of gRPC's.

    Raises:
        RuntimeError: the port cannot be had.
        ConfigError: a certificate cannot be used.
    """
    if not security.encrypted:
        return int(server.add_insecure_port(bind))
    from paramesh.credentials import server_credentials

    return int(server.add_secure_port(bind, server_credentials(security, on_handshake)))


def header(job: str, generation: int = 0, client_id: int = 0) -> pb.RequestHeader:
    """A request header of this protocol version."""
    return pb.RequestHeader(job=job, generation=generation, client_id=client_id, protocol=PROTOCOL)


def check_header(request: pb.RequestHeader, job: str, generation: int, *, allow_no_generation: bool = False) -> None:
    """Refuse a request of another protocol, cluster or generation, in that order.

    Args:
        request: the request's header.
        job: this process's job.
        generation: this process's generation; 0 while it does not know it.
        allow_no_generation: registration and GetMap come before the caller knows it.

    Raises:
        StateRefused: VERSION, WRONG_CLUSTER or OLD_GENERATION.
    """
    if request.protocol != PROTOCOL:
        raise refuse(
            "VERSION",
            f"protocol {request.protocol} is not spoken here; this side speaks {PROTOCOL}: upgrade the older side",
            min=PROTOCOL,
            max=PROTOCOL,
            got=request.protocol,
        )
    if request.job != job:
        raise refuse("WRONG_CLUSTER", f"this is job {job!r}, the request is for {request.job[:80]!r}", job=job)
    if allow_no_generation and not request.generation:
        return
    if generation and request.generation < generation:
        raise refuse(
            "OLD_GENERATION",
            f"generation {request.generation} is over; the job was restored as generation {generation}",
            generation=generation,
        )


_SERVICE = "/paramesh.v1.ParameterServer/"


def _identity(data: bytes) -> bytes:
    return data


def _decoder(header_type: type[Any]) -> Callable[[bytes], Framed[Any]]:
    def read(data: bytes) -> Framed[Any]:
        return decode(data, header_type)

    return read


class DataPlaneStub:
    """Client side of `ParameterServer`, with framed messages that protobuf never copies.

    `push` and `assign` take (async) iterators of encoded messages (`framing.encode`);
    `pull` and `snapshot` yield `Framed`.
    """

    def __init__(self, channel: grpc.aio.Channel):
        self.push = channel.stream_unary(
            _SERVICE + "Push", request_serializer=_identity, response_deserializer=ps.PushResponse.FromString
        )
        self.pull = channel.unary_stream(
            _SERVICE + "Pull",
            request_serializer=ps.PullRequest.SerializeToString,
            response_deserializer=_decoder(ps.PullHeader),
        )
        self.assign = channel.stream_unary(
            _SERVICE + "Assign",
            request_serializer=_identity,
            response_deserializer=ps.AssignResponse.FromString,
        )
        self.snapshot = channel.unary_stream(
            _SERVICE + "Snapshot",
            request_serializer=ps.SnapshotRequest.SerializeToString,
            response_deserializer=_decoder(ps.SnapshotHeader),
        )
        self.norms = channel.unary_unary(
            _SERVICE + "Norms",
            request_serializer=ps.NormsRequest.SerializeToString,
            response_deserializer=ps.NormsResponse.FromString,
        )
        self.inspect = channel.unary_unary(
            _SERVICE + "Inspect",
            request_serializer=ps.InspectRequest.SerializeToString,
            response_deserializer=ps.InspectResponse.FromString,
        )


class ParameterServerServicer(Protocol):
    """What `add_parameter_server` registers; framed requests in, encoded frames out."""

    async def Push(
        self, requests: AsyncIterator[Framed[ps.PushHeader]], context: grpc.aio.ServicerContext
    ) -> ps.PushResponse:
        """Stage or apply frames."""

    def Pull(self, request: ps.PullRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Yield encoded `PullResponse` messages."""

    async def Assign(
        self, requests: AsyncIterator[Framed[ps.AssignHeader]], context: grpc.aio.ServicerContext
    ) -> ps.AssignResponse:
        """Write values or optimizer state."""

    def Snapshot(self, request: ps.SnapshotRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Yield encoded `SnapshotResponse` messages."""

    async def Norms(self, request: ps.NormsRequest, context: grpc.aio.ServicerContext) -> ps.NormsResponse:
        """Partial squared norms."""

    async def Inspect(self, request: ps.InspectRequest, context: grpc.aio.ServicerContext) -> ps.InspectResponse:
        """State of partitions."""


def add_parameter_server(servicer: ParameterServerServicer, server: grpc.aio.Server) -> None:
    """Register a data-plane servicer whose payloads protobuf never copies."""
    handlers = {
        "Push": grpc.stream_unary_rpc_method_handler(
            servicer.Push, _decoder(ps.PushHeader), ps.PushResponse.SerializeToString
        ),
        "Pull": grpc.unary_stream_rpc_method_handler(servicer.Pull, ps.PullRequest.FromString, _identity),
        "Assign": grpc.stream_unary_rpc_method_handler(
            servicer.Assign, _decoder(ps.AssignHeader), ps.AssignResponse.SerializeToString
        ),
        "Snapshot": grpc.unary_stream_rpc_method_handler(servicer.Snapshot, ps.SnapshotRequest.FromString, _identity),
        "Norms": grpc.unary_unary_rpc_method_handler(
            servicer.Norms, ps.NormsRequest.FromString, ps.NormsResponse.SerializeToString
        ),
        "Inspect": grpc.unary_unary_rpc_method_handler(
            servicer.Inspect, ps.InspectRequest.FromString, ps.InspectResponse.SerializeToString
        ),
    }
    generic = grpc.method_handlers_generic_handler("paramesh.v1.ParameterServer", handlers)
    server.add_generic_rpc_handlers((generic,))
