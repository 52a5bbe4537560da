"""Servers lost with replicas left (fault rows 1-6, 8-10; invariants 1, 2, 4, 5, 9, 13): async pushes, counted."""

from __future__ import annotations

import time

import pytest

from tests.cluster import replication

BOUND = 10.0
"""Seconds in which a failover must be over on a busy machine. What it takes is measured by `benchmarks failover`."""


@pytest.mark.parametrize(("servers", "replicas"), [(3, 2), (3, 3)])
def test_a_killed_primary_loses_and_doubles_nothing(process_cluster, servers, replicas):
    """Row 1: every partition acknowledges again under a new primary; every push counts once."""
    cluster = process_cluster(servers=servers, replicas=replicas)
    pushers = replication.start_pushers(cluster)
    before = replication.wait_until_in_sync(cluster, replicas)
    victim = before[0].primary
    led = replication.led_by(before, victim)
    assert led, "the victim leads nothing"

    killed = time.monotonic()
    cluster.kill(victim)
    back = cluster.wait_until(
        lambda: replication.recoveries(pushers, before, led), BOUND, "the partitions to acknowledge"
    )
    print(f"replicas={replicas} recovered_s={ {p: round(e['t'] - killed, 3) for p, e in back.items()} }")
    replication.stop_pushers(cluster, pushers)
    found = replication.account(cluster, pushers)
    print(found)
    found.assert_exact()
    after = replication.rows(cluster)
    assert all(after[p].primary in before[p].followers for p in led), "promoted from outside the in-sync set"
