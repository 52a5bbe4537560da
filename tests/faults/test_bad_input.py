"""Every wrong request is refused by name and changes nothing (invariant 27)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paramesh import framing, testing
from paramesh.errors import REASONS, ParameshError
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

from tests.cluster.processes import ProcessCluster
from tests.cluster.waiting import wait_until
from tests.faults.bad_input_control_rows import CONTROL_ROWS, SETTINGS
from tests.faults.bad_input_ledger_rows import LEDGER_ROWS, group
from tests.faults.bad_input_rows import DATA_ROWS, Row
from tests.faults.bad_input_step_rows import STEP_ROWS
from tests.faults.bench import GRADIENT, Bench
from tests.faults.process_bench import ProcessBench


@pytest.fixture(scope="module")
def cluster_of_one() -> Iterator[testing.Cluster]:
    with testing.Cluster(servers=1, client_timeout=600.0, gather=0.0) as cluster:
        cluster.restart_coordinator()  # term 2, so that there is a lower one
        yield cluster


@pytest.fixture(scope="module")
def shared_bench(cluster_of_one) -> Bench:
    return Bench(cluster_of_one)


@pytest.fixture
def bench(shared_bench) -> Bench:
    """The shared server with a client that has sent nothing yet."""
    shared_bench.new_client()
    return shared_bench


@pytest.fixture(scope="module")
def shared_far() -> Iterator[ProcessBench]:
    # Rows register supervisors that never beat: their death would be a decision in the middle of a later row.
    with ProcessCluster(client_timeout=600.0, failure_timeout=600.0, gather=0.0) as cluster:
        cluster.kill("coordinator")
        cluster.restart("coordinator")  # term 2, so that there is a lower one
        cluster.wait_until(cluster.live_servers, 20, "the coordinator to be back")
        bench = ProcessBench(cluster)
        yield bench
        bench.close()


@pytest.fixture
def far(shared_far: ProcessBench) -> ProcessBench:
    """A coordinator and a server that are processes, with a client that has sent nothing yet."""
    shared_far.new_client()
    return shared_far


def rows(table: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", table, ids=[row.id for row in table])


class TestRefusals:
    @rows(DATA_ROWS)
    def test_data_plane(self, far, row, record_property):
        self.check(far, row, record_property)

    @rows(STEP_ROWS)
    def test_steps_and_reads(self, far, row, record_property):
        self.check(far, row, record_property)

    @rows(CONTROL_ROWS)
    def test_registration_and_schemas(self, far, row, record_property):
        self.check(far, row, record_property)

    @rows(LEDGER_ROWS)
    def test_ledger(self, far, row, record_property):
        self.check(far, row, record_property)

    def check(self, bench: Bench, row: Row, record_property: Callable[[str, object], None]) -> None:
        """The reason is right, nothing changed, and the server still serves a right request."""
        bench.snapshot()
        with pytest.raises(ParameshError) as refused:
            row.send(bench)
        record_property("got", refused.value.reason)
        assert refused.value.reason == row.reason, str(refused.value)
        assert refused.value.code == REASONS[row.reason].code
        bench.check_unchanged(noop=row.noop)
        bench.new_client()
        assert bench.push(sequenced=ps.SequenceKey(seq=1)).lsn > 0


@pytest.mark.bad_input(39, got="OK duplicate; SEQ_REUSED, SEQ_TOO_OLD, SEQ_TOO_FAR, SEQ_GAP, CLIENT_FENCED")
class TestSequences:
    """Row 39: replay, reuse, too old, too far, each after rightly applied pushes."""

    def push(self, bench: Bench, seq: int, payload: bytes = GRADIENT) -> ps.PartitionOutcome:
        return bench.push(payload, sequenced=ps.SequenceKey(seq=seq))

    def refused(self, bench: Bench, reason: str, seq: int, payload: bytes = GRADIENT) -> None:
        state = bench.state()
        with pytest.raises(ParameshError) as refused:
            self.push(bench, seq, payload)
        assert refused.value.reason == reason
        assert bench.state() == state

    def test_a_replay_is_answered_as_the_first(self, bench):
        first = self.push(bench, 1)
        state = bench.state()
        again = self.push(bench, 1)
        assert (again.lsn, again.duplicate) == (first.lsn, True)
        assert bench.state() == state

    def test_other_bytes_under_a_used_seq(self, bench):
        self.push(bench, 1)
        self.refused(bench, "SEQ_REUSED", 1, GRADIENT[:80] + b"\x00\x00\x00\x40")

    def test_older_than_the_window(self, bench):
        for seq in range(1, 8):
            self.push(bench, seq)
        self.refused(bench, "SEQ_TOO_OLD", 1)

    def test_further_ahead_than_the_window(self, bench):
        self.push(bench, 1)
        self.refused(bench, "SEQ_TOO_FAR", 7)

    def test_the_furthest_in_the_window_is_a_gap_of_a_client_known_or_not(self, bench):
        self.refused(bench, "SEQ_GAP", 5)
        self.push(bench, 1)
        self.refused(bench, "SEQ_GAP", 6)

    def test_a_gap_that_is_filled_in_time_is_none(self, bench):
        """Sent in the wrong order over two connections: each is applied once, in its order."""
        first, second = self.message(bench, 1), self.message(bench, 2)
        early = bench.soon(bench.push_messages, [second])
        held = bench.cluster._servers[0]._shards.held[bench.partition]
        wait_until(lambda: held._changed._waiters, 10, "the early one to be held")
        assert bench.push_messages([first]).lsn < early.result(10).lsn

    def message(self, bench: Bench, seq: int) -> bytes:
        return framing.encode(bench.header(sequenced=ps.SequenceKey(seq=seq)), [GRADIENT])

    def test_a_refused_seq_is_refused_again_with_its_own_reason(self, bench):
        with pytest.raises(ParameshError):
            self.push(bench, 1, GRADIENT[:64])
        self.refused(bench, "PAYLOAD_SIZE", 1, GRADIENT[:64])
        self.refused(bench, "SEQ_REUSED", 1)

    def test_a_refused_payload_lets_its_successor_pass(self, bench):
        values = bench.values()
        with pytest.raises(ParameshError):
            self.push(bench, 1, GRADIENT[:64])
        assert bench.values() == values
        assert self.push(bench, 2).lsn > 0

    def test_a_fenced_client(self, bench):
        """Rows 39 and 41."""
        self.push(bench, 1)
        bench.fence(bench.client.client_id)
        self.refused(bench, "CLIENT_FENCED", 2)
        self.refused(bench, "CLIENT_FENCED", 1)


@pytest.mark.bad_input(51, got="OK, the decision; SEQ_REUSED")
class TestSteps:
    """Row 51: what is late or repeated is no mistake."""

    def ready(self, bench: Bench, number: int, **changes: Any) -> lg.ReadyResponse:
        fields = {"group": number, "step": 0, "attempt": 1, "weight": 1.0}
        return bench.ledger("Ready", lg.ReadyRequest(**{**fields, **changes}))

    def test_ready_of_a_decided_step_is_answered_with_the_decision(self, bench):
        number = group(bench)
        first = self.ready(bench, number)
        assert first.included
        bench.snapshot()
        assert self.ready(bench, number) == first
        bench.check_unchanged()

    def test_ready_with_other_content_under_a_used_attempt(self, bench):
        """Row 52, at the ledger: another member holds the step open."""
        number = group(bench)
        mine, other = bench.client, bench.connect()
        bench.ledger("Join", lg.JoinRequest(slot="bad/other"))
        bench.ledger("SetActivity", lg.SetActivityRequest(activity=lg.ACTIVITY_ACTIVE))
        bench.client = mine
        early = bench.soon(bench.ledger, "Ready", lg.ReadyRequest(group=number, attempt=1, weight=1.0), mine.header())
        wait_until(lambda: bench.waits("step"), 10, "the first Ready to wait")
        bench.snapshot()
        with pytest.raises(ParameshError) as refused:
            self.ready(bench, number, weight=2.0)
        assert refused.value.reason == "SEQ_REUSED"
        bench.check_unchanged()
        bench.client = other
        bench.ledger("Leave", lg.LeaveRequest())
        assert early.result(10).record.contributors[0].weight == 1.0
        bench.client = mine


@pytest.mark.bad_input(42, 46, got="OK, same answer")
class TestRepeats:
    """Rows 42 and 46: what is repeated is answered as the first, and decides nothing."""

    def test_registering_again(self, bench):
        header = pb.RequestHeader(job="default", protocol=1, generation=1)
        here = {"slot": f"again/{bench.client.client_id}", "incarnation": 5}
        for method, request in [
            ("RegisterClient", co.RegisterClientRequest(request=header, role="worker", **here)),
            ("RegisterHost", co.RegisterHostRequest(request=header, name="again", incarnation=5, slots=1)),
        ]:
            first = bench.coordinator("Membership", method, request)
            bench.snapshot()
            assert bench.coordinator("Membership", method, request) == first
            bench.check_unchanged()

    def test_a_server_that_registers_again(self, bench):
        server = bench.cluster._servers[0]
        bench.snapshot()
        bench.register_server(name="server-0", incarnation=server.incarnation)
        bench.check_unchanged()

    def test_the_same_table_again_is_the_same_table(self, bench):
        first = bench.create_table(name="again").table_id
        bench.snapshot()
        assert bench.create_table(name="again").table_id == first
        bench.check_unchanged()

    def test_orders_that_are_repeated(self, bench):
        bench.fence(bench.client.client_id)
        bench.snapshot()
        bench.fence(bench.client.client_id)
        bench.check_unchanged()


@pytest.mark.parametrize(("optimizer", "settings"), SETTINGS, ids=str)
@pytest.mark.bad_input(48, got="HYPER_PARAMETER")
def test_a_table_with_settings_that_torch_refuses_says_so(bench, optimizer, settings):
    """Row 48: the coordinator has no torch; the servers' refusal reaches who writes first values."""
    name = f"bad-{bench.client.client_id}"
    values = bench.values()
    with pytest.raises(ParameshError) as refused, bench.cluster.client() as client:
        client.create_table(name, {"w": torch.zeros(3)}, optimizer, settings)
    assert refused.value.reason == "HYPER_PARAMETER", str(refused.value)
    assert bench.values() == values


@pytest.mark.bad_input(12, got="accepted")
def test_subnormals_and_negative_zeros_are_gradients_too(bench):
    """Row 12."""
    gradient = bytearray(GRADIENT)
    gradient[:8] = b"\x01\x00\x00\x00\x00\x00\x00\x80"
    assert bench.push(bytes(gradient)).lsn > 0


@pytest.mark.parametrize(
    "gradients",
    [
        {"w": torch.ones(3, 4, dtype=torch.float64)},
        {"w": torch.ones(3, 4, dtype=torch.int64)},
        {"w": torch.ones(4, 3)},
        {"w": torch.ones(12)},
        {"no_such": torch.ones(1)},
    ],
    ids=["dtype", "integers", "shape", "rank", "name"],
)
@pytest.mark.bad_input(3, 5, got="TENSOR_MISMATCH, DTYPE (client; a push has neither on the wire)")
def test_tensors_that_are_not_the_tables_are_refused_where_they_are(bench, gradients):
    """Rows 3 and 5: a push has no dtype and no shape on the wire, so the client compares them with the schema."""
    bench.snapshot()
    with pytest.raises(ParameshError) as refused:
        bench.tool.push("t", gradients)
    assert refused.value.reason in ("TENSOR_MISMATCH", "DTYPE")
    bench.check_unchanged()


class TestRoutes:
    """Rows 32 and 34, on clusters of their own: requests that went by an older map."""

    @pytest.mark.bad_input(34, got="NOT_PRIMARY + hint")
    def test_a_push_to_a_server_that_is_not_the_primary(self):
        with testing.Cluster(servers=2, client_timeout=600.0) as cluster:
            bench = Bench(cluster)
            bench.new_client()
            right = bench.server
            (wrong,) = (s.address for s in cluster._servers.values() if s.address != right)
            bench.snapshot()
            bench.server = wrong
            for send in (bench.push, bench.pull):
                with pytest.raises(ParameshError) as refused:
                    send()
                assert refused.value.reason == "NOT_PRIMARY"
                assert refused.value.metadata["primary"] == right
                assert refused.value.metadata["epoch"] == "1"
            bench.server = right
            bench.check_unchanged()
            assert bench.push().lsn > 0

    @pytest.mark.bad_input(32, got="STALE_EPOCH")
    def test_a_request_under_an_epoch_that_is_over(self):
        """The server fell silent, was declared dead and came back: its partitions are in epoch 2."""
        with testing.Cluster(heartbeat_interval=0.1, failure_timeout=0.5, client_timeout=600.0) as cluster:
            bench = Bench(cluster)  # its tool beats, so the coordinator does not doubt itself
            server = cluster._servers[0]
            cluster.call(server._registration._heartbeat.stop())
            wait_until(lambda: not cluster._coordinator._driver.state.live_servers(), 20, "its death to be declared")
            bench.register_server(
                name="server-0", incarnation=server.incarnation, address=bench.server, control_address=bench.control
            )
            held = server._shards.held[bench.partition]
            wait_until(lambda: held.partition.epoch == 2, 20, "the new epoch")
            before = held.partition.state_hash()
            for send in (bench.push, bench.pull):
                with pytest.raises(ParameshError) as refused:
                    send()
                assert (refused.value.reason, refused.value.metadata["epoch"]) == ("STALE_EPOCH", "2")
            assert held.partition.state_hash() == before
            assert bench.push(epoch=2).lsn > 0
