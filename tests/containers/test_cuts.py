"""Wires that are cut under async load: rows 21-24 and 26 of the fault matrix."""

from __future__ import annotations

import time

import pytest

from tests.cluster import replication
from tests.containers.scenes import UNDER_WAY, applied, last_acknowledged, longest_stall, pass_time, pushed

pytestmark = [pytest.mark.hosts, pytest.mark.wires]

CUT = 10.0
"""Seconds: five failure timeouts."""


def test_a_primary_and_half_the_workers_cut_off_for_10_seconds(cluster_of, say):
    """Row 23: the others go on under new primaries; the minority acknowledges nothing, and nothing is lost."""
    scene = pushed(cluster_of, pushers=4)
    victim = scene.leader()
    minority, majority = scene.pushers[:2], scene.pushers[2:]
    few = [victim, "worker-0", "worker-1"]
    scene.cluster.wires.cut(few, scene.cluster.hosts(*few))
    cut = time.monotonic()
    took = scene.recovered(scene.led_by(victim), cut, majority)
    pass_time(scene.cluster, CUT - (time.monotonic() - cut))
    healed = time.monotonic()
    scene.cluster.wires.heal()

    partitions = [p for p in scene.before if p]
    pairs = [(pusher, p) for pusher in minority for p in partitions]
    scene.cluster.wait_until(
        lambda: all(last_acknowledged(pusher, p, healed) for pusher, p in pairs), 30, "the minority to go on"
    )
    behind = max(last_acknowledged(pusher, p, healed) for pusher, p in pairs) - cut
    found = scene.settle()
    say(recovered_s=round(took, 2), acked=found.acked, lost=found.lost, duplicated=found.duplicated,
        acked_by_the_minority=0 if behind < UNDER_WAY else "some")  # fmt: skip
    assert behind < UNDER_WAY, f"the minority acknowledged {behind:.2f} s after it was cut off"


def test_a_primary_that_the_coordinator_does_not_hear(cluster_of, say):
    """Row 21: workers and followers still reach it, and it is replaced all the same, without a lost update."""
    scene = pushed(cluster_of)
    victim = scene.leader()
    scene.cluster.wires.cut([victim], ["coordinator"])
    cut = time.monotonic()
    took = scene.recovered(scene.led_by(victim), cut)
    scene.cluster.wires.heal()
    found = scene.settle()
    say(recovered_s=round(took, 2), acked=found.acked)
    assert scene.deaths()


def test_a_primary_and_its_follower_that_do_not_hear_each_other(cluster_of, say):
    """Row 22: the follower leaves the in-sync set by the coordinator's word; nobody is held for dead."""
    scene = pushed(cluster_of)
    row = scene.before[1]
    (follower,) = row.followers
    cut = time.monotonic()
    scene.cluster.wires.cut([row.primary], [follower])
    scene.cluster.wait_until(
        lambda: follower not in replication.rows(scene.cluster)[1].isr, 20, "the follower to leave the set"
    )
    pass_time(scene.cluster, 2.0)
    scene.cluster.wires.heal()
    found = scene.settle()
    stall = longest_stall(scene.pushers, cut)
    say(longest_stall_s=round(stall, 2), acked=found.acked)
    assert not scene.deaths()
    assert stall < 6.0


@pytest.mark.parametrize("deaf", [True, pytest.param(False, marks=pytest.mark.long)], ids=["deaf", "mute"])
def test_a_primary_cut_off_in_one_direction(cluster_of, say, deaf):
    """Row 24: packets pass one way only."""
    scene = pushed(cluster_of)
    victim = scene.leader()
    others = scene.cluster.hosts(victim)
    some, rest = (others, [victim]) if deaf else ([victim], others)
    scene.cluster.wires.cut(some, rest, one_way=True)
    cut = time.monotonic()
    took = scene.recovered(scene.led_by(victim), cut)
    pass_time(scene.cluster, 3.0)
    scene.cluster.wires.heal()
    found = scene.settle()
    say(recovered_s=round(took, 2), acked=found.acked)


@pytest.mark.long
def test_connections_reset_every_200_ms(cluster_of, say):
    """Row 26: pushes go on, none counts twice."""
    scene = pushed(cluster_of)
    servers, workers = [f"server-{index}" for index in range(3)], ["worker-0", "worker-1"]
    began, before = time.monotonic(), applied(scene.cluster)
    for beat in range(1, 31):
        scene.cluster.wires.cut(workers, servers, one_way=True, how="reset")
        scene.cluster.wires.heal()
        pass_time(scene.cluster, max(0.0, began + 0.2 * beat - time.monotonic()))
    meanwhile = applied(scene.cluster) - before
    found = scene.settle()
    say(acked=found.acked, applied_meanwhile=meanwhile, longest_stall_s=round(longest_stall(scene.pushers, began), 2))
    assert meanwhile > 0
    assert not scene.deaths()
