"""Above the memory watermark nothing new is taken on, and who trains goes on; the alarm is an event."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from paramesh import testing
from paramesh.errors import ParameshError
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import parameter_server_pb2 as ps

from tests.cluster import inspection
from tests.cluster.waiting import wait_until
from tests.faults.bench import Bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    with testing.Cluster(client_timeout=600.0, gather=0.0, heartbeat_interval=0.1) as cluster:
        yield Bench(cluster)


def events(bench: Bench) -> list[str]:
    """What the coordinator wrote down of memory."""
    return [event.kind for event in inspection.events(bench.cluster.address) if "memory" in event.kind]


def test_nothing_new_is_taken_on_and_what_is_under_way_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    member = bench.new_client()
    bench.ledger("Join", lg.JoinRequest(slot="x/0"))
    assert bench.push(sequenced=ps.SequenceKey(seq=1)).lsn > 0
    headroom = bench.cluster._servers[0]._room.headroom
    monkeypatch.setattr(headroom, "_use", lambda: headroom.limit)
    wait_until(lambda: events(bench) == ["server_memory_tight"], 10, "the alarm")

    assert bench.push(sequenced=ps.SequenceKey(seq=2)).lsn > 0, "a client that is known goes on"
    assert bench.ledger("Join", lg.JoinRequest(slot="x/0")), "and so does a member"
    bench.connect()
    for new in (
        lambda: bench.push(sequenced=ps.SequenceKey(seq=1)),
        lambda: bench.ledger("Join", lg.JoinRequest(slot="x/1")),
        lambda: bench.create_table(name="one-more"),
    ):
        with pytest.raises(ParameshError) as refused:
            new()
        assert refused.value.reason == "OVERLOADED", str(refused.value)
        assert float(refused.value.metadata["retry_after_ms"]) > 0
    assert bench.values()

    monkeypatch.undo()
    wait_until(lambda: events(bench) == ["server_memory_tight", "server_memory_eased"], 10, "the end of the alarm")
    assert bench.push(sequenced=ps.SequenceKey(seq=1)).lsn > 0
    assert bench.create_table(name="one-more").table_id
    bench.client = member
    bench.ledger("Leave", lg.LeaveRequest())


def test_a_coordinator_above_its_own_watermark_registers_nobody(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    headroom = bench.cluster._coordinator._driver.tight._headroom
    monkeypatch.setattr(headroom, "_use", lambda: headroom.limit)
    wait_until(lambda: headroom.tight, 5, "the look")
    with pytest.raises(ParameshError) as refused:
        bench.create_table(name="one-more")
    assert refused.value.reason == "OVERLOADED"
    assert "coordinator" in str(refused.value)
    assert bench.push(request=bench.tool._client.header(), sequenced=ps.SequenceKey(seq=1)).lsn > 0


def test_a_job_has_as_many_tables_and_clients_as_it_may() -> None:
    with testing.Cluster(max_tables=1, max_clients=2) as cluster:
        first = cluster.client()
        first.create_table("a", {"w": torch.ones(3)}, "SGD", {"lr": 0.1})
        with pytest.raises(ParameshError) as refused:
            first.create_table("b", {"w": torch.ones(3)}, "SGD", {"lr": 0.1})
        assert (refused.value.reason, "--max-tables" in str(refused.value)) == ("QUOTA", True)
        cluster.client()
        with pytest.raises(ParameshError) as refused:
            cluster.client()
        assert (refused.value.reason, "--max-clients" in str(refused.value)) == ("QUOTA", True)
