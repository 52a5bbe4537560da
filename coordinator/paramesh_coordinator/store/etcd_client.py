"""Calls to an etcd cluster over its v3 API: one member after the other, from any thread.

    client = EtcdClient(["10.0.0.1:2379", "10.0.0.2:2379"])
    answer = client.txn(request, seconds=5.0)

A call that no member answers is repeated at the next, so only calls that may be repeated
belong here: reads, leases, and transactions that compare what they change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from paramesh.channel import grpc
from paramesh.retry import Backoff

from paramesh_coordinator.store.etcdv3 import etcd_pb2 as pb
from paramesh_coordinator.store.etcdv3.etcd_pb2_grpc import KVStub, LeaseStub

__all__ = ["EtcdClient", "EtcdRefused", "EtcdSilent", "nested", "past"]

ATTEMPT_SECONDS = 1.0
"""For one member: it answers within milliseconds, or its cluster elects a leader (1-2 s)."""

MAX_OPS = 128
"""etcd's default of --max-txn-ops: operations of one transaction, side by side."""

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # No keepalive: every call has a deadline, and etcd hangs up on pings without calls.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 300),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

# With these the call may or may not have been carried out, or another member may do better.
_PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.ABORTED,
    }
)


class EtcdSilent(Exception):
    """No member answered in time; a transaction may have been committed or may yet be."""


class EtcdRefused(Exception):
    """etcd refused; nothing was changed."""


def past(prefix: bytes) -> bytes:
    """The first key behind all that begin with `prefix`; it must not end with 0xff."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def nested(ops: Sequence[pb.RequestOp], budget: int = MAX_OPS) -> list[pb.RequestOp]:
    """Operations of one transaction, however many, so that etcd takes them.

    etcd bounds the operations that stand side by side, and those of a transaction inside
    another by what the outer one left; all are still one transaction at one revision.
    """
    levels = 1
    while (budget // levels) ** levels < len(ops):
        levels += 1
    if levels == 1:
        return list(ops)
    share = budget // levels
    size = -(-len(ops) // share)
    inner = (nested(ops[at : at + size], budget - share) for at in range(0, len(ops), size))
    return [pb.RequestOp(request_txn=pb.TxnRequest(success=some)) for some in inner]


class EtcdClient:
    """Stubs of every member, made when needed; thread-safe."""

    def __init__(self, endpoints: Sequence[str]):
        self._endpoints = tuple(endpoints)
        self._lock = threading.Lock()
        self._at = 0
        self._channels: dict[str, Any] = {}

    def range(self, request: pb.RangeRequest, seconds: float) -> pb.RangeResponse:
        """Read."""
        answer: pb.RangeResponse = self._call(lambda ch, t: KVStub(ch).Range(request, timeout=t), seconds)
        return answer

    def txn(self, request: pb.TxnRequest, seconds: float) -> pb.TxnResponse:
        """Compare and write; repeated while no member answers, so compare what is written."""
        answer: pb.TxnResponse = self._call(lambda ch, t: KVStub(ch).Txn(request, timeout=t), seconds)
        return answer

    def grant(self, ttl: int, seconds: float) -> pb.LeaseGrantResponse:
        """A new lease of `ttl` seconds; one that nobody hears of runs out."""
        request = pb.LeaseGrantRequest(TTL=ttl)
        answer: pb.LeaseGrantResponse = self._call(lambda ch, t: LeaseStub(ch).LeaseGrant(request, timeout=t), seconds)
        return answer

    def keep_alive(self, lease: int, seconds: float) -> int:
        """Renew a lease; the seconds that it lasts from now, 0 if it has run out."""

        def once(channel: Any, timeout: float) -> pb.LeaseKeepAliveResponse:
            call = LeaseStub(channel).LeaseKeepAlive(iter([pb.LeaseKeepAliveRequest(ID=lease)]), timeout=timeout)
            try:
                answer: pb.LeaseKeepAliveResponse = next(call)
            except StopIteration:
                return pb.LeaseKeepAliveResponse()
            finally:
                call.cancel()
            return answer

        return int(self._call(once, seconds).TTL)

    def revoke(self, lease: int, seconds: float) -> None:
        """End a lease and delete its keys."""
        request = pb.LeaseRevokeRequest(ID=lease)
        self._call(lambda ch, t: LeaseStub(ch).LeaseRevoke(request, timeout=t), seconds)

    def close(self) -> None:
        """Hang up. Repeatable."""
        with self._lock:
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()

    def _call(self, make: Callable[[Any, float], Any], seconds: float) -> Any:
        deadline, backoff = time.monotonic() + seconds, Backoff(cap=0.5)
        while True:
            endpoint, channel = self._channel()
            left = deadline - time.monotonic()
            try:
                return make(channel, max(0.05, min(ATTEMPT_SECONDS, left)))
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
            except ValueError as error:  # the channel was closed under the call
                raise EtcdSilent(f"etcd is not asked any more: {error}") from error
            said = f"etcd at {endpoint}: {code.name} {details}"
            if code not in _PASSING:
                raise EtcdRefused(said)
            self._turn(endpoint)
            wait = backoff.next()
            if time.monotonic() + wait >= deadline:
                raise EtcdSilent(f"no answer within {seconds:g} s from {', '.join(self._endpoints)}; last, {said}")
            time.sleep(wait)

    def _channel(self) -> tuple[str, Any]:
        with self._lock:
            endpoint = self._endpoints[self._at]
            if endpoint not in self._channels:
                self._channels[endpoint] = grpc.insecure_channel(endpoint, options=_OPTIONS)
            return endpoint, self._channels[endpoint]

    def _turn(self, endpoint: str) -> None:
        with self._lock:
            if self._endpoints[self._at] == endpoint:
                self._at = (self._at + 1) % len(self._endpoints)
