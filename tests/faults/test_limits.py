"""Limits of real processes: what is beyond them is refused or closed, and who trains does not notice.

One server with small limits serves all tests; each leaves it serving.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from paramesh.channel import CHANNEL_OPTIONS, HEARTBEAT_OPTIONS
from paramesh.errors import ParameshError
from paramesh.status import from_rpc_error
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import replication_pb2_grpc

from tests.cluster.processes import ProcessCluster
from tests.cluster.waiting import wait_until
from tests.faults.bench import GRADIENT
from tests.faults.http2 import Raw, Slow
from tests.faults.process_bench import ProcessBench

MIB = 1 << 20
UPLOADS, CALLS, CONNECTIONS, DESCRIPTORS = 16, 64, 40, 360
JOIN, PUSH, PULL = "/paramesh.v1.Ledger/Join", "/paramesh.v1.ParameterServer/Push", "/paramesh.v1.ParameterServer/Pull"


@pytest.fixture(scope="module")
def shared() -> Iterator[ProcessBench]:
    flags = [f"--max-uploads={UPLOADS}", f"--max-calls={CALLS}", f"--max-connections={CONNECTIONS}"]
    with ProcessCluster(server_flags=flags, descriptors=DESCRIPTORS, client_timeout=600.0, gather=0.0) as cluster:
        bench = ProcessBench(cluster)
        yield bench
        bench.close()


@pytest.fixture
def bench(shared: ProcessBench) -> Iterator[ProcessBench]:
    """The shared server; after the test nothing has changed but by pushes, and it serves."""
    shared.new_client()
    yield shared
    shared.new_client()
    assert shared.push(sequenced=ps.SequenceKey(seq=1)).lsn > 0


def resident(bench: ProcessBench) -> int:
    """Bytes of the server's memory."""
    pid = bench.processes.processes["server-0"].pid
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("path", [PUSH, JOIN], ids=["stream", "single"])
@pytest.mark.bad_input(19, got="OVERLOADED")
def test_messages_that_never_end_hold_a_bounded_part_of_memory(bench: ProcessBench, path: str) -> None:
    """gRPC gathers a message outside of every budget of ours: 100 streams held 800 MiB."""
    before = resident(bench)
    slow = Slow(bench.server, path, 100, 7 * MIB)
    try:
        slow.press(10)
        grown = resident(bench) - before
        # Whoever brings its message is let in, although those who do not had all places.
        wait_until(lambda: bench.push(sequenced=ps.SequenceKey(seq=1)).lsn, 10, "a push beside them")
    finally:
        slow.close()
    assert slow.sent > 60 * MIB, "they did press"
    assert grown < (UPLOADS * 8 + 64) * MIB, f"{grown >> 20} MiB"


def test_calls_beyond_the_limit_are_told_to_wait_and_control_traffic_is_not_counted(bench: ProcessBench) -> None:
    """Polls at the ledger fill its places: values, health, orders and beats have others."""
    bench.ledger("Join", lg.JoinRequest(slot="x/0"))
    mine, other = bench.client, bench.connect()
    bench.ledger("Join", lg.JoinRequest(slot="x/1"))
    bench.ledger("SetActivity", lg.SetActivityRequest(activity=lg.ACTIVITY_ACTIVE))
    polls = [lg.GatherRequest(request=mine.header(), name=f"limit-{number}") for number in range(CALLS)]
    with grpc.insecure_channel(bench.server, options=CHANNEL_OPTIONS) as channel:
        gather = channel.unary_unary(
            "/paramesh.v1.Ledger/Gather", request_serializer=lg.GatherRequest.SerializeToString
        )
        waiting = [gather.future(poll, timeout=60) for poll in polls]
        refused = wait_until(lambda: _refused(bench, mine.header()), 10, "the places to be taken")
        assert refused[0].reason == "OVERLOADED"
        assert "--max-calls" in str(refused[0])
        assert float(refused[0].metadata["retry_after_ms"]) > 0
        assert refused[1] == refused[0].metadata["retry_after_ms"], "gRPC's own word for it, for foreign clients"
        assert bench.push(request=mine.header(), sequenced=ps.SequenceKey(seq=1)).lsn > 0
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        bench.fence(123456)
        assert bench.processes.live_servers() == ["server-0"]
        for call in waiting:
            call.cancel()
    wait_until(lambda: not _refused(bench, mine.header()), 10, "places to be free")
    for client in (mine, other):
        bench.ledger("Leave", lg.LeaveRequest(), client.header())


def _refused(bench: ProcessBench, header: object) -> tuple[ParameshError, str] | None:
    """Why the ledger takes no further call, and after how long gRPC is told to come again."""
    with grpc.insecure_channel(bench.server, options=CHANNEL_OPTIONS) as channel:
        status = channel.unary_unary("/paramesh.v1.Ledger/LedgerStatus")
        request = lg.LedgerStatusRequest(request=header).SerializeToString()
        try:
            status(request, timeout=5)
        except grpc.RpcError as error:
            told = dict(error.trailing_metadata())
            return from_rpc_error(error), told.get("grpc-retry-pushback-ms", "")
    return None


def test_connections_beyond_the_limit_are_closed_at_once(bench: ProcessBench) -> None:
    mine = bench.push(sequenced=ps.SequenceKey(seq=1)).lsn
    idle, closed = [], 0
    for _ in range(2 * CONNECTIONS):
        try:
            raw = Raw(bench.server)
            raw.settings()
            idle.append(raw)
        except (OSError, AssertionError):
            closed += 1
    assert len(idle) <= CONNECTIONS < len(idle) + closed
    with ThreadPoolExecutor(1) as pool:  # one that was there before goes on
        assert pool.submit(bench.values).result(10)
    for raw in idle:
        raw.__exit__(None, None, None)
    assert mine


def test_a_flood_of_connections_leaves_descriptors(bench: ProcessBench) -> None:
    """Also of those that say nothing: they are closed after the handshake's patience, or counted."""
    pid = bench.processes.processes["server-0"].pid
    limit = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "open files" in line)
    assert limit.split()[3:5] == [str(DESCRIPTORS)] * 2
    host, _, port = bench.server.rpartition(":")
    mute = []
    for _ in range(DESCRIPTORS):
        try:
            mute.append(socket.create_connection((host, int(port)), timeout=2))
        except OSError:
            break
    held = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    assert held < DESCRIPTORS - 100, "room for files and for its own connections"
    for one in mute:
        one.close()


def test_a_connection_that_sends_no_requests_is_cut_and_its_neighbour_is_not(bench: ProcessBench) -> None:
    options = [*HEARTBEAT_OPTIONS, ("grpc.enable_retries", 0)]  # a connection of its own
    with grpc.insecure_channel(bench.server, options=options) as channel:
        call = channel.unary_unary(JOIN)
        answers = [call.future(b"\xff" * 64, timeout=10) for _ in range(8)]
        codes = {answer.code() for answer in answers}
        assert grpc.StatusCode.INVALID_ARGUMENT in codes
        more = [call.future(b"\xff" * 64, timeout=10) for _ in range(8)]
        assert grpc.StatusCode.UNAVAILABLE in {answer.code() for answer in more}, "cut"
    assert bench.push(sequenced=ps.SequenceKey(seq=1)).lsn > 0, "on a connection that was there before"
    assert "connection cut" in bench.processes.processes["server-0"].tail()


def test_a_well_formed_request_clears_a_record(bench: ProcessBench) -> None:
    """A client by hand that is wrong now and then is neither slowed down for ever nor cut."""
    good = lg.LedgerStatusRequest(request=bench.client.header()).SerializeToString()
    with grpc.insecure_channel(bench.server, options=HEARTBEAT_OPTIONS) as channel:
        for _ in range(10):
            for _ in range(2):
                assert channel.unary_unary(JOIN).future(b"\xff", timeout=10).code() == grpc.StatusCode.INVALID_ARGUMENT
            channel.unary_unary("/paramesh.v1.Ledger/LedgerStatus")(good, timeout=10)


def test_a_push_of_many_times_the_bytes_in_flight_goes_through_in_one(tmp_path: Path) -> None:
    """Its sender is held up, not refused: otherwise a large model could be pushed by nobody."""
    with ProcessCluster(server_flags=["--in-flight-bytes", str(5 * MIB)], client_timeout=600.0) as cluster:
        bench = ProcessBench(cluster)
        import torch

        bench.tool.create_table("big", {"w": torch.zeros(8, MIB)}, "SGD", {"lr": 1.0}, partition_bytes=4 * MIB)
        bench.tool.push("big", {"w": torch.ones(8, MIB)})
        assert bench.tool.pull("big")["w"].sum() == -8 * MIB
        bench.close()


def test_a_snapshot_of_another_process_is_refused_before_it_is_gathered(bench: ProcessBench) -> None:
    """Control traffic is not counted, so it is checked first."""
    first = rp.InstallRequest(header=rp.InstallHeader(request=bench.request(client_id=0), partition=1, epoch=1))

    def endless() -> Iterator[rp.InstallRequest]:
        yield first
        for _ in range(10_000):
            yield rp.InstallRequest(payload=GRADIENT)

    with grpc.insecure_channel(bench.control) as channel, pytest.raises(grpc.RpcError) as refused:
        replication_pb2_grpc.ReplicationStub(channel).Install(endless(), timeout=10)
    assert from_rpc_error(refused.value).reason == "UNKNOWN_NODE"
