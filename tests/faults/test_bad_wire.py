"""Bytes that no client of ours would send: rows 19-21, 27-29, 66, 68, 69, 71 and 72 of the input matrix.

Below the level of messages. Each leaves the tables as they were and the server serving.
"""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator

import pytest
from paramesh import framing, testing
from paramesh.channel import CHANNEL_OPTIONS, grpc
from paramesh.errors import ParameshError
from paramesh.status import from_rpc_error
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import parameter_server_pb2 as ps

from tests.faults.bench import GRADIENT, Bench
from tests.faults.http2 import ENHANCE_YOUR_CALM, GOAWAY, MAX_CONCURRENT_STREAMS, PING, RESET, Raw, call, frame, reset

PUSH = "/paramesh.v1.ParameterServer/Push"
PULL = "/paramesh.v1.ParameterServer/Pull"
JOIN = "/paramesh.v1.Ledger/Join"
READY = "/paramesh.v1.Ledger/Ready"

FLOOD = 10_000

REFUSED = (7, ENHANCE_YOUR_CALM)
"""Codes with which a stream beyond the limit is reset."""


@pytest.fixture(scope="module")
def shared_bench() -> Iterator[Bench]:
    with testing.Cluster(servers=1, client_timeout=600.0, gather=0.0) as cluster:
        yield Bench(cluster)


@pytest.fixture
def bench(shared_bench: Bench) -> Iterator[Bench]:
    """The shared server with a fresh client; after the test nothing has changed, and it serves."""
    shared_bench.new_client()
    shared_bench.snapshot()
    yield shared_bench
    shared_bench.check_unchanged()
    shared_bench.new_client()
    assert shared_bench.push(sequenced=ps.SequenceKey(seq=1)).lsn > 0


class TestMessages:
    @pytest.mark.bad_input(27, got="FORMAT (INVALID_ARGUMENT)")
    def test_garbage_instead_of_a_message(self, bench):
        for body in (b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f", b"\x7a\x80"):
            for path, kind in ((PUSH, "stream_unary"), (PULL, "unary_stream"), (READY, "unary_unary")):
                assert bench.call_bytes(path, body, kind) == grpc.StatusCode.INVALID_ARGUMENT

    @pytest.mark.bad_input(27, got="FORMAT (INVALID_ARGUMENT)")
    def test_garbage_at_the_coordinator(self, bench):
        for method in ("Membership/RegisterClient", "Catalog/CreateTable", "Admin/GetStatus"):
            with grpc.insecure_channel(bench.cluster.address) as channel, pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(f"/paramesh.v1.{method}")(b"\xff" * 64, timeout=10)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    @pytest.mark.bad_input(19, got="RESOURCE_EXHAUSTED")
    def test_a_message_above_the_limit(self, bench):
        body = bytes(framing.MAX_MESSAGE_BYTES + 1)
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(bench.server, options=options) as channel, pytest.raises(grpc.RpcError) as refused:
            channel.stream_unary(PUSH)(iter([body]), timeout=10)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    @pytest.mark.bad_input(68, got="RESOURCE_EXHAUSTED")
    def test_metadata_above_the_limit(self, bench):
        code = bench.call_bytes(PULL, b"", "unary_stream", metadata=(("x", "y" * 20_000),))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_an_empty_stream(self, bench):
        assert bench.call_bytes(PUSH, b"", "stream_unary") != grpc.StatusCode.UNKNOWN

    @pytest.mark.bad_input(29, got="ignored")
    def test_unknown_fields_of_a_newer_client_are_ignored(self, bench):
        surplus = b"\xf2\x3f\x03abc"
        header = ps.PullRequest(
            request=bench.client.header(), partitions=[ps.PartitionPull(partition=bench.partition, epoch=1)]
        ).SerializeToString()
        assert bench.call_bytes(PULL, header + surplus, "unary_stream") == grpc.StatusCode.OK
        status = co.GetStatusRequest(request=bench.client.header()).SerializeToString()
        with grpc.insecure_channel(bench.cluster.address) as channel:
            channel.unary_unary("/paramesh.v1.Admin/GetStatus")(status + surplus, timeout=10)

    @pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
    @pytest.mark.bad_input(20, 21, got="UNIMPLEMENTED (compression is off)")
    def test_compressed_messages_are_not_looked_at(self, bench, algorithm):
        """Rows 20 and 21: a bomb is never unpacked. Compression is off, as nothing of ours would shrink."""
        bomb = bytes(framing.MAX_MESSAGE_BYTES - 4096)
        assert len(gzip.compress(bomb, 1)) < len(bomb) // 100
        for body in (framing.encode(bench.header(), [GRADIENT]), framing.encode(bench.header(), [bomb])):
            code = bench.call_bytes(PUSH, body, "stream_unary", compression=algorithm)
            assert code == grpc.StatusCode.UNIMPLEMENTED


class TestCalls:
    @pytest.mark.bad_input(28, got="UNIMPLEMENTED")
    def test_an_unknown_method_and_service(self, bench):
        for path in ("/paramesh.v1.ParameterServer/Nope", "/nope.v1.Nope/Push", "/", "//"):
            assert bench.call_bytes(path, b"") == grpc.StatusCode.UNIMPLEMENTED

    @pytest.mark.bad_input(28, got="not UNKNOWN")
    def test_one_message_too_many_or_too_few(self, bench):
        """Row 28, wrong cardinality: gRPC's own business, but nothing may hang on it or leave as UNKNOWN."""
        message = lg.JoinRequest(request=bench.request(protocol=0), slot="x/0").SerializeToString()
        with grpc.insecure_channel(bench.server, options=CHANNEL_OPTIONS) as channel:
            for messages in ([], [message, message]):
                with pytest.raises(grpc.RpcError) as refused:
                    channel.stream_unary(JOIN)(iter(messages), timeout=1)
                assert refused.value.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)

    @pytest.mark.bad_input(69, got="DEADLINE_EXCEEDED")
    def test_an_expired_deadline(self, bench):
        request = ps.PullRequest(request=bench.client.header()).SerializeToString()
        with grpc.insecure_channel(bench.server) as channel, pytest.raises(grpc.RpcError) as refused:
            list(channel.unary_stream(PULL)(request, timeout=-1))
        assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED

    @pytest.mark.bad_input(69, got="SEQ_GAP after a second")
    def test_a_push_without_a_deadline_is_held_as_long_as_any_other(self, bench):
        """Row 69: servers have deadlines of their own, so that a call without one ends too."""
        header = bench.header(sequenced=ps.SequenceKey(seq=2))
        with grpc.insecure_channel(bench.server, options=CHANNEL_OPTIONS) as channel:
            answer = channel.stream_unary(PUSH)(iter([framing.encode(header, [GRADIENT])]))
        assert ps.PushResponse.FromString(answer).outcomes[0].error.reason == "SEQ_GAP"

    @pytest.mark.bad_input(69, got="WAITING_FOR_WORKERS")
    def test_a_wait_at_the_ledger_without_a_deadline_ends(self, bench, monkeypatch):
        """Row 69. The patience of a poll is shortened, not the test's."""
        monkeypatch.setattr("paramesh_server.ledger_service.POLL_S", 0.3)
        bench.ledger("Join", lg.JoinRequest(slot="x/0"))
        spec = lg.GroupSpec(name="alone", mode=lg.MODE_SYNC, structure_digest=b"x")
        group = bench.ledger("OpenGroup", lg.OpenGroupRequest(spec=spec)).group
        other = bench.client
        bench.client = bench.cluster.call(type(other).connect(bench.cluster.address))
        bench.ledger("Join", lg.JoinRequest(slot="x/1"))
        bench.ledger("SetActivity", lg.SetActivityRequest(activity=lg.ACTIVITY_ACTIVE))
        request = lg.ReadyRequest(request=other.header(), group=group, attempt=1, weight=1.0).SerializeToString()
        with grpc.insecure_channel(bench.server) as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(READY)(request)
        assert from_rpc_error(refused.value).reason == "WAITING_FOR_WORKERS"
        for client in (other, bench.client):
            bench.client = client
            bench.ledger("Leave", lg.LeaveRequest())
        bench.snapshot()

    @pytest.mark.bad_input(66, got="closed")
    def test_other_protocols_on_the_port(self, bench):
        host, _, port = bench.server.rpartition(":")
        for hello in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)) * 16, b"\x16\x03\x01\x02\x00\x01"):
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.settimeout(5)
                connection.sendall(hello)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass


class TestFloods:
    """Rows 71 and 72. One connection misbehaves; the fixture's client is served after it."""

    @pytest.mark.bad_input(71, got="a limit is announced")
    def test_a_server_says_how_many_streams_a_connection_may_have(self, bench):
        for address in (bench.server, bench.control, bench.cluster.address):
            with Raw(address) as raw:
                assert 0 < raw.settings()[MAX_CONCURRENT_STREAMS] <= 4096

    @pytest.mark.bad_input(71, got="REFUSED_STREAM")
    def test_ten_thousand_streams_on_a_connection(self, bench):
        with Raw(bench.server) as raw:
            raw.settings()
            raw.send_all(b"".join(call(2 * number + 1) for number in range(FLOOD)))
            bench.new_client()  # somebody else is served meanwhile
            bench.snapshot()
            refusal = raw.until(RESET)
            while refusal is not None and int.from_bytes(refusal.payload, "big") not in REFUSED:
                refusal = raw.until(RESET)
            assert refusal is not None

    @pytest.mark.bad_input(71, got="served or closed")
    def test_streams_that_are_opened_and_reset_as_fast_as_can_be(self, bench):
        with Raw(bench.server) as raw:
            raw.settings()
            for begin in range(0, FLOOD, 100):
                pairs = (call(2 * number + 1) + reset(2 * number + 1) for number in range(begin, begin + 100))
                if not raw.send_all(b"".join(pairs)):
                    break

    @pytest.mark.bad_input(72, got="GOAWAY too_many_pings")
    def test_a_flood_of_pings_ends_the_connection(self, bench):
        with Raw(bench.server) as raw:
            raw.settings()
            raw.send_all(frame(PING, bytes(8)) * 200)
            goodbye = raw.until(GOAWAY)
        assert goodbye is not None
        assert int.from_bytes(goodbye.payload[4:8], "big") == ENHANCE_YOUR_CALM
        assert goodbye.payload[8:] == b"too_many_pings"


def test_frames_after_the_last_are_refused_and_a_retry_tells_that_the_push_stands(shared_bench: Bench) -> None:
    """Row 7: what was complete when the surplus came was applied; the same seq says so."""
    shared_bench.new_client()
    message = framing.encode(shared_bench.header(), [GRADIENT])
    with pytest.raises(ParameshError) as refused:
        shared_bench.push_messages([message, message])
    assert refused.value.reason == "PAYLOAD_SIZE"
    assert shared_bench.push_messages([message]).duplicate
