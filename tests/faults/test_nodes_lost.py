"""Coordinator and servers lost (fault rows 7, 12; invariants 18, 19)."""

from __future__ import annotations

import itertools
import time

import pytest

from tests.cluster import inspection
from tests.faults.faults import ServerFault

TALLY = "tests.cluster.bodies:tally"


@pytest.mark.parametrize("mode", ["sync", "ssp", "async"])
def test_steps_go_on_without_the_coordinator_and_it_evicts_nobody_when_back(process_cluster, mode):
    """Killed for longer than the failure timeout; steps never stall, and its return is not noticed."""
    cluster = process_cluster(servers=1, start_workers=2)
    workers = cluster.start_workers(2, TALLY, length=4000, epochs=1, mode=mode, seconds=0.03, stop_at="enough")
    cluster.wait_until(lambda: all(len(w.events("step")) >= 5 for w in workers), 90, "training")

    killed = time.monotonic()
    cluster.kill("coordinator")
    cluster.wait_until(lambda: time.monotonic() - killed > 3.0, 10, "more than a failure timeout without it")
    cluster.restart("coordinator")
    status = cluster.wait_until(
        lambda: inspection.status(cluster.coordinator_address), 20, "the coordinator to answer again"
    )
    timeout_ms = 2000
    status = cluster.wait_until(
        lambda: (s := inspection.status(cluster.coordinator_address)).uptime_ms > 2 * timeout_ms and s,
        20,
        "two failure timeouts of its new life",
    )
    back = time.monotonic()
    for worker in workers:
        worker.open_gate("enough")
    cluster.wait_for_workers(60)

    for worker in workers:
        times = [e["t"] for e in worker.events("step") if killed - 0.5 < e["t"] < back]
        stall = max(b - a for a, b in itertools.pairwise(times))
        print(f"mode={mode} worker={worker.index} steps={len(times)} longest_gap_s={stall:.3f}")
        assert stall < 1.0, f"steps stalled for {stall:.2f} s"
        assert len(worker.events("hello")) == 1, "a worker was restarted"
    assert {c.state for c in status.clients if c.role == "worker"} == {"live"}
    assert inspection.live_servers(cluster.coordinator_address) == ["server-0"]
    assert inspection.ledger_status(cluster.coordinator_address).evictions == 0
    kinds = [e.kind for e in inspection.events(cluster.coordinator_address)]
    assert "coordinator_restarted" in kinds
    assert not [k for k in kinds if "evicted" in k or "dead" in k or "lost" in k], kinds


@pytest.mark.parametrize(
    ("fault", "victim"), [(ServerFault.KILLED, "other"), (ServerFault.STOPPED, "ledger")], ids=["killed", "stopped"]
)
def test_a_lost_server_is_named_within_5_seconds(process_cluster, fault, victim):
    """With one replica nothing can go on: every worker says who is lost and what to do, and ends."""
    cluster = process_cluster(servers=2, start_workers=2)
    # A tally of 8 MiB partitions over both servers.
    workers = cluster.start_workers(2, "tests.cluster.bodies:until_it_fails", supervised=False)
    cluster.wait_until(lambda: all(len(w.events("step")) >= 3 for w in workers), 90, "training")
    found = inspection.partition_map(cluster.coordinator_address)
    ledger = next(p.primary.node for p in found.partitions if p.id == 0)
    lost = ledger if victim == "ledger" else next(s for s in ("server-0", "server-1") if s != ledger)
    assert any(p.primary.node == lost and p.id for p in found.partitions), "the victim holds nothing"

    began = time.monotonic()
    fault(cluster, lost)
    cluster.wait_until(lambda: all(w.events("failed") for w in workers), 10, "every worker to hear of it")
    for worker in workers:
        failed = worker.last("failed")
        print(f"fault={fault.name} victim={victim} worker={worker.index} after_s={failed['t'] - began:.2f} {failed}")
        assert failed["t"] - began < 5.0
        assert failed["reason"] == "PARTITION_OFFLINE"
        assert failed["metadata"]["server"] == lost
        assert lost in failed["message"]
        assert "checkpoint" in failed["message"], "the message must say what to do"
    cluster.wait_until(lambda: all(w.exit_code == 0 for w in workers), 10, "the workers to end by themselves")


@pytest.mark.parametrize("what", ["barrier", "first_step", "loader"])
def test_every_kind_of_waiting_hears_of_a_lost_server(inprocess_cluster, what):
    """Not only steps: who waits in a barrier, for the first values or for samples is told as well."""
    cluster = inprocess_cluster(servers=1, start_workers=2)
    worker = cluster.start_worker("tests.cluster.bodies:wait_alone", what=what)
    cluster.wait_until(lambda: worker.events("waiting"), 30, "the worker to wait")
    began = time.monotonic()
    cluster.kill("server-0")
    cluster.wait_until(lambda: worker.events("failed"), 10, "the worker to hear of it")
    failed = worker.last("failed")
    assert failed["t"] - began < 5.0
    assert (failed["reason"], failed["metadata"].get("server")) == ("PARTITION_OFFLINE", "server-0")
