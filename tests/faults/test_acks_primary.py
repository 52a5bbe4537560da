"""acks=primary: a lost primary costs a bounded number of updates, and exactly that is reported (invariant 12)."""

from __future__ import annotations

import json

import pytest
from paramesh_server.insync import EARLY_RECORDS

from tests.cluster import inspection, replication

BEHIND = 10
"""Records that the follower lacks of some partition when its primary is killed: most of them are acknowledged."""


def infos(cluster):
    """What each partition's primary says of it."""
    answers = inspection.inspect(cluster.coordinator_address, state_hash=False).values()
    return {p.partition: p for answer in answers for p in answer.partitions}


def reported(cluster) -> dict[int, int]:
    """Total by partition, of `psctl events`."""
    events = [e for e in inspection.events(cluster.coordinator_address) if e.kind == "updates_lost"]
    return {int(e.subject): json.loads(e.evidence)["total"] for e in events}


@pytest.mark.soak
def test_a_killed_primary_costs_what_is_reported_and_no_more_than_the_bound(process_cluster):
    """Its follower is stopped for a moment first, so that there is something to lose."""
    cluster = process_cluster(servers=2, replicas=2)
    pushers = replication.start_pushers(cluster, acks="primary")
    before = replication.wait_until_in_sync(cluster, 2)
    victim = before[1].primary
    (follower,) = before[1].followers
    led = replication.led_by(before, victim)
    address = inspection.primary_address(cluster.coordinator_address, 1)
    cluster.pause(follower)
    at = lsns(address)
    cluster.wait_until(
        lambda: any(lsn >= at[p] + BEHIND for p, lsn in lsns(address).items()), 10,
        "the primary to go ahead of its follower",
    )  # fmt: skip
    cluster.kill(victim)
    cluster.resume(follower)
    cluster.wait_until(lambda: replication.recoveries(pushers, before, led), 60, "every pusher to go on")
    replication.stop_pushers(cluster, pushers)
    found = replication.account(cluster, pushers)
    totals = {p: info.lost for p, info in infos(cluster).items() if info.lost}
    print(f"acked={found.acked} lost={found.lost} by partition {totals}")
    assert found.duplicated == 0
    assert 0 < found.lost == sum(totals.values())
    assert max(totals.values()) <= EARLY_RECORDS
    cluster.wait_until(lambda: reported(cluster) == totals, 20, "the loss to be reported, exactly")
    assert not [event for pusher in pushers for event in pusher.events("failed")]


def lsns(address: str) -> dict[int, int]:
    """The last record of each partition that a server leads."""
    return {p.partition: p.lsn for p in inspection.inspect_at(address).partitions}


@pytest.mark.soak
def test_a_zombie_primary_acknowledges_for_a_second_at_most_and_that_is_counted_too(process_cluster):
    """Stopped, replaced, continued: what it acknowledged to clients that had not heard of it is reported."""
    cluster = process_cluster(servers=3, replicas=2)
    pushers = replication.start_pushers(cluster, acks="primary")
    before = replication.wait_until_in_sync(cluster, 2)
    victim = before[1].primary
    led = replication.led_by(before, victim, ledger=True)
    cluster.pause(victim)
    cluster.wait_until(lambda: all(replication.rows(cluster)[p].epoch > before[p].epoch for p in led), 60, "promotion")
    cluster.resume(victim)
    dense = [p for p in led if p]
    cluster.wait_until(lambda: replication.recoveries(pushers, before, dense), 60, "every pusher to go on")
    replication.stop_pushers(cluster, pushers)
    found = replication.account(cluster, pushers)
    totals = {p: info.lost for p, info in infos(cluster).items() if info.lost}
    print(f"acked={found.acked} lost={found.lost} by partition {totals}")
    assert found.duplicated == 0
    assert found.lost == sum(totals.values())
    cluster.wait_until(lambda: reported(cluster) == totals, 20, "the loss to be reported, exactly")
