"""Hosts that are lost, come, leave and are restarted: rows 1, 16, 31 and 32 of the fault matrix, across hosts."""

from __future__ import annotations

import itertools
import json
import time

import pytest

from tests.cluster import inspection, replication
from tests.containers.scenes import pass_time, pushed

pytestmark = pytest.mark.hosts

TALLY = "tests.cluster.bodies:tally"
LEAVES = 60.0
"""Seconds for a server to drain and end: its own limit is 25, and machines are busy."""


def test_a_host_that_is_lost_is_replaced_by_another(cluster_of, say):
    """Row 1 across hosts: not even a kernel says goodbye; every partition goes on elsewhere."""
    scene = pushed(cluster_of)
    victim = scene.leader()
    lost = time.monotonic()
    scene.cluster.lose(victim)
    took = scene.recovered(scene.led_by(victim), lost)
    # By the decision itself: the balancer may have moved a partition on since.
    for server, partitions in promoted(scene, victim).items():
        assert all(server in scene.before[p].followers for p in partitions)
    found = scene.settle()
    say(recovered_s=round(took, 2), acked=found.acked, lost=found.lost, duplicated=found.duplicated)


def promoted(scene, victim: str) -> dict[str, list[int]]:
    """Which partitions went to which server when one was held for dead."""
    events = inspection.events(scene.cluster.coordinator_address)
    (death,) = [e for e in events if e.kind == "server_dead" and e.subject == victim]
    return json.loads(death.evidence)["promoted"]


@pytest.mark.long
def test_a_primary_that_is_frozen_and_thawed(cluster_of, say):
    """Row 9 across hosts: TCP still connects; what it had promised before counts for nothing after."""
    scene = pushed(cluster_of)
    victim = scene.leader()
    stopped = time.monotonic()
    scene.cluster.pause(victim)
    took = scene.recovered(scene.led_by(victim), stopped)
    pass_time(scene.cluster, 3.0)
    scene.cluster.resume(victim)
    found = scene.settle()
    say(recovered_s=round(took, 2), acked=found.acked)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_rolling_restart_of_every_node_under_load(cluster_of, say):
    """Row 32: each server drains, ends with 0 and comes back, then the coordinator; no push fails."""
    scene = pushed(cluster_of)
    for name in ("server-0", "server-1", "server-2"):
        replication.wait_until_in_sync(scene.cluster, 2)
        scene.cluster.terminate(name)
        ended = lambda name=name: scene.cluster.exit_code_of(name) is not None  # noqa: E731
        scene.cluster.wait_until(ended, LEAVES, f"{name} to drain and end")
        assert scene.cluster.exit_code_of(name) == 0, f"{name} ended with {scene.cluster.exit_code_of(name)}"
        scene.cluster.restart(name)
        scene.cluster.wait_until(lambda name=name: name in scene.cluster.live_servers(), 60, f"{name} to be back")
    scene.cluster.terminate("coordinator")
    scene.cluster.wait_until(lambda: scene.cluster.exit_code_of("coordinator") is not None, 30, "it to end")
    assert scene.cluster.exit_code_of("coordinator") == 0
    scene.cluster.restart("coordinator")
    scene.cluster.wait_until(lambda: len(scene.cluster.live_servers()) == 3, 60, "the coordinator to be back")
    found = scene.settle()
    say(acked=found.acked, failed=0)


@pytest.mark.long
def test_a_rolling_restart_of_the_workers(cluster_of, say):
    """Row 32, its other half: each is asked to go and replaced; no sample is lost or counted twice."""
    cluster = cluster_of(start_workers=2)
    tally = {"length": 240, "epochs": 4, "seconds": 0.05}
    before = cluster.start_workers(2, TALLY, **tally)
    cluster.wait_until(lambda: all(len(w.events("step")) > 5 for w in before), 60, "both to train")
    for leaver in before:
        cluster.terminate(f"worker-{leaver.index}")
        cluster.wait_until(lambda leaver=leaver: leaver.exit_code is not None, 30, "it to leave")
        assert leaver.exit_code == 0
        successor = cluster.start_worker(TALLY, **tally)
        cluster.wait_until(lambda worker=successor: worker.events("step"), 60, "another to train in its place")
    successors = cluster.workers[2:]
    cluster.wait_until(lambda: all(w.events("final") for w in successors), 120, "the training to end")
    counts = cluster.table_values()["counts"].tolist()
    kinds = [event.kind for event in inspection.events(cluster.coordinator_address)]
    say(samples=len(counts), evicted=sum("evicted" in kind for kind in kinds))
    assert set(counts) == {4.0}, {i: c for i, c in enumerate(counts) if c != 4.0}
    assert not any("evicted" in kind for kind in kinds), kinds


@pytest.mark.long
def test_a_server_comes_and_another_leaves_under_load(cluster_of, say):
    """Row 31: on a fourth host; nothing is restarted."""
    scene = pushed(cluster_of)
    added = scene.cluster.add_server()
    holds = lambda name: [p for p, row in replication.rows(scene.cluster).items() if name in row.isr]  # noqa: E731
    scene.cluster.wait_until(lambda: holds(added), 60, "the new server to get its share")
    replication.wait_until_in_sync(scene.cluster, 2)
    scene.cluster.psctl("drain", "server-0")
    scene.cluster.wait_until(lambda: not holds("server-0"), 60, "server-0 to be empty")
    scene.cluster.terminate("server-0")
    scene.cluster.wait_until(lambda: scene.cluster.exit_code_of("server-0") == 0, LEAVES, "server-0 to end")
    found = scene.settle()
    say(acked=found.acked, failed=0)


def test_the_host_of_a_worker_is_lost(cluster_of, say):
    """Row 16 across hosts: the others go on without it, and every sample is counted exactly once per epoch."""
    cluster = cluster_of(start_workers=2)
    survivor = cluster.start_worker(TALLY, length=160, epochs=3, seconds=0.05)
    victim = cluster.start_worker(TALLY, length=160, epochs=3, seconds=0.05)
    cluster.wait_until(lambda: len(victim.events("step")) > 5, 60, "both to train")
    lost = time.monotonic()
    cluster.lose(f"worker-{victim.index}")
    cluster.wait_until(
        lambda: [e for e in survivor.events("begin") if e["t"] > lost + 0.5], 30, "the survivor to go on"
    )
    cluster.wait_until(lambda: survivor.events("final"), 120, "the survivor to finish")
    steps = [e["t"] for e in survivor.events("step")]
    pause = max(b - a for a, b in itertools.pairwise(steps) if b > lost)
    counts = cluster.table_values()["counts"].tolist()
    say(longest_step_s=round(pause, 2), samples=len(counts))
    assert set(counts) == {3.0}, {i: c for i, c in enumerate(counts) if c != 3.0}
    assert pause < 8.0
