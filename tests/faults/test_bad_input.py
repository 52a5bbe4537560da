"""Every wrong request is refused by name and changes nothing (invariant 27)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from paramesh import testing
from paramesh.errors import REASONS, ParameshError
from paramesh.v1 import parameter_server_pb2 as ps

from tests.faults.bad_input_control_rows import CONTROL_ROWS
from tests.faults.bad_input_ledger_rows import LEDGER_ROWS
from tests.faults.bad_input_rows import DATA_ROWS, Row
from tests.faults.bad_input_step_rows import STEP_ROWS
from tests.faults.bench import GRADIENT, Bench


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


def rows(table: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", table, ids=[row.id for row in table])


class TestRefusals:
    @rows(DATA_ROWS)
    def test_data_plane(self, bench, row):
        self.check(bench, row)

    @rows(STEP_ROWS)
    def test_steps_and_reads(self, bench, row):
        self.check(bench, row)

    @rows(CONTROL_ROWS)
    def test_registration_and_schemas(self, bench, row):
        self.check(bench, row)

    @rows(LEDGER_ROWS)
    def test_ledger(self, bench, row):
        self.check(bench, row)

    def check(self, bench: Bench, row: Row) -> None:
        """The reason is right, nothing changed, and the server still serves a right request."""
        bench.snapshot()
        with pytest.raises(ParameshError) as refused:
            row.send(bench)
        assert refused.value.reason == row.reason, str(refused.value)
        assert refused.value.code == REASONS[row.reason].code
        bench.check_unchanged(noop=row.noop)
        bench.new_client()
        assert bench.push(sequenced=ps.SequenceKey(seq=1)).lsn > 0


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

    def test_a_refused_payload_lets_its_successor_pass(self, bench):
        values = bench.values()
        with pytest.raises(ParameshError):
            self.push(bench, 1, GRADIENT[:64])
        assert bench.values() == values
        assert self.push(bench, 2).lsn > 0

    def test_a_fenced_client(self, bench):
        self.push(bench, 1)
        bench.fence(bench.client.client_id)
        self.refused(bench, "CLIENT_FENCED", 2)
        self.refused(bench, "CLIENT_FENCED", 1)


@pytest.mark.parametrize("setting", [("lr", -1.0), ("lr", float("nan")), ("no_such_setting", 1.0)])
def test_a_table_with_settings_that_torch_refuses_says_so(bench, setting):
    """Row 48: the coordinator has no torch; the servers' refusal reaches who writes first values."""
    name = f"bad-{setting[0]}-{setting[1]}"
    values = bench.values()
    with pytest.raises(ParameshError) as refused, bench.cluster.client() as client:
        client.create_table(name, {"w": torch.zeros(3)}, "SGD", {"lr": 0.1, setting[0]: setting[1]})
    assert refused.value.reason == "HYPER_PARAMETER", str(refused.value)
    assert bench.values() == values


def test_subnormals_and_negative_zeros_are_gradients_too(bench):
    """Row 12."""
    gradient = bytearray(GRADIENT)
    gradient[:8] = b"\x01\x00\x00\x00\x00\x00\x00\x80"
    assert bench.push(bytes(gradient)).lsn > 0


def test_the_same_table_again_is_the_same_table(bench):
    """Row 46, and 42 for servers: what is repeated is answered as the first."""
    first = bench.create_table(name="again").table_id
    assert bench.create_table(name="again").table_id == first
