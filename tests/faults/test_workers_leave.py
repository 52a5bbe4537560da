"""Workers that are asked to go (SIGTERM), and workers that nobody supervises."""

from __future__ import annotations

import signal

from tests.cluster import inspection
from tests.faults.test_workers_lost import TALLY, assert_exact


def test_a_worker_asked_to_go_finishes_its_step_and_nobody_is_evicted(process_cluster):
    """SIGTERM to a training process: leases return at once, its step counts, exit code 0, no eviction."""
    cluster = process_cluster(servers=2, start_workers=2)
    stayer, leaver = cluster.start_workers(2, TALLY, length=160, epochs=2, seconds=0.03)
    cluster.wait_until(lambda: len(leaver.events("step")) >= 5, 60, "the worker to be in the middle")
    leaver.signal_training(signal.SIGTERM)
    cluster.wait_until(lambda: leaver.exit_code is not None, 30, "it to leave")
    assert leaver.exit_code == 0
    assert len(leaver.events("hello")) == 1, "its supervisor restarted a worker that left in good order"
    cluster.wait_until(lambda: stayer.events("final"), 60, "the other to finish")
    assert not leaver.events("final")
    last = leaver.last("step")["t"]
    assert [e for e in stayer.events("step") if e["t"] > last], "the other did not go on"
    assert_exact(cluster, epochs=2)
    assert inspection.ledger_status(cluster.coordinator_address).evictions == 0
    kinds = [event.kind for event in inspection.events(cluster.coordinator_address)]
    assert not any("evicted" in kind for kind in kinds), kinds


def test_an_unsupervised_worker_that_dies_is_missed_by_its_heartbeat(process_cluster):
    """Nobody reports its exit: its beats stop, it is evicted, its samples go to the others."""
    cluster = process_cluster(servers=1, start_workers=2)
    survivor = cluster.start_worker(TALLY, length=120, epochs=2, seconds=0.02)
    victim = cluster.start_worker(TALLY, supervised=False, length=120, epochs=2, seconds=0.02)
    cluster.wait_until(lambda: len(victim.events("step")) >= 5, 60, "the victim to be in the middle")
    victim.signal_training(signal.SIGKILL)
    cluster.wait_until(lambda: survivor.events("final"), 90, "the other to finish")
    assert_exact(cluster, epochs=2)
    assert inspection.ledger_status(cluster.coordinator_address).evictions == 1
