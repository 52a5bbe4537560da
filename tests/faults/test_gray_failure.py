"""Servers that beat and do nothing (fault row 11): demoted within five timeouts; busy ones are left alone."""

from __future__ import annotations

import time
from functools import partial

import pytest

from tests.cluster import inspection, replication
from tests.faults.test_failover_training import assert_as_undisturbed, training

TIMEOUT = 2.0
"""The default failure timeout."""


def demoted(cluster) -> list[str]:
    return [e.subject for e in inspection.events(cluster.coordinator_address) if e.kind == "server_stalled"]


def promoted_from(cluster, before, victim: str, *, ledger: bool = True) -> bool:
    rows = replication.rows(cluster)
    led = replication.led_by(before, victim, ledger=ledger)
    return all(rows[p].primary != victim and rows[p].epoch > before[p].epoch and rows[p].online for p in led)


@pytest.mark.soak
@pytest.mark.parametrize("place", ["work.1", "loop"])
def test_a_server_whose_apply_thread_stands_still_is_demoted(process_cluster, place):
    """One piece of work hangs, or the whole event loop: its beats go on, and its followers take over."""
    cluster = process_cluster(servers=3, replicas=2, fails=True)
    pushers = replication.start_pushers(cluster)
    before = replication.wait_until_in_sync(cluster, 2)
    victim = before[1].primary
    led = replication.led_by(before, victim)
    stopped = time.monotonic()
    hook = cluster.arm(place, "hang", victim)
    cluster.wait_until(lambda: promoted_from(cluster, before, victim), 40, "followers to lead")
    took = time.monotonic() - stopped
    cluster.wait_until(lambda: replication.recoveries(pushers, before, led), 40, "pushes to be acknowledged again")
    acked = max(e["t"] for e in replication.recoveries(pushers, before, led).values()) - stopped
    print(f"place={place} demoted_s={took:.2f} first_ack_s={acked:.2f} bound_s={5 * TIMEOUT:.0f}")
    assert demoted(cluster) == [victim]
    hook.unlink()
    replication.wait_until_in_sync(cluster, 2)
    replication.stop_pushers(cluster, pushers)
    replication.account(cluster, pushers).assert_exact()
    assert "server_dead" not in [e.kind for e in inspection.events(cluster.coordinator_address)]


@pytest.mark.soak
def test_training_goes_on_when_a_server_stands_still(process_cluster):
    """The same bits, nobody restarted."""
    cluster, workers, before = training(partial(process_cluster, fails=True), 3, 2, epochs=3, seconds=0.02)
    victim = before[1].primary
    cluster.arm("work.1", "hang", victim)
    cluster.wait_until(lambda: promoted_from(cluster, before, victim), 40, "followers to lead")
    assert_as_undisturbed(cluster, workers, epochs=3)
    assert demoted(cluster) == [victim]


@pytest.mark.soak
def test_idle_and_busy_servers_are_left_alone(process_cluster):
    """Nothing to do for longer than the limit, then one follower stopped, so that all answers wait for it."""
    cluster = process_cluster(servers=2, replicas=2)
    pushers = replication.start_pushers(cluster, pace=0.0)
    replication.wait_until_in_sync(cluster, 2)
    until = time.monotonic() + 6 * TIMEOUT
    cluster.wait_until(lambda: time.monotonic() > until, 40, "six timeouts of load to pass")
    replication.stop_pushers(cluster, pushers)
    until = time.monotonic() + 6 * TIMEOUT
    cluster.wait_until(lambda: time.monotonic() > until, 40, "six timeouts of nothing to pass")
    assert demoted(cluster) == []
    replication.account(cluster, pushers).assert_exact()
