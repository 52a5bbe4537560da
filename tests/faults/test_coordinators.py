"""Several coordinators on etcd, the leader killed or stopped (fault rows 12, 13, 15; invariants 4, 6, 18, 19, 22)."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.cluster import inspection, replication
from tests.cluster.several import SeveralCluster
from tests.faults.test_failover_training import assert_as_undisturbed, longest_step

pytestmark = pytest.mark.etcd

TAKEOVER = 5.0
"""Seconds from the end of a leader to the next; the lease is 2 s."""


@pytest.fixture
def several(request) -> Iterator[SeveralCluster]:
    with SeveralCluster(**getattr(request, "param", {})) as cluster:
        yield cluster
        report = getattr(request.node, "report_of_call", None)
        if report is not None and report.failed:
            cluster.print_logs()


THREE = {"servers": 3, "replicas": 2, "start_workers": 2}


def training(cluster: SeveralCluster, **args):
    """Workers that train, every partition in sync."""
    workers = cluster.start_workers(2, replication.TRAIN, **args)
    cluster.wait_until(lambda: all(len(w.events("step")) >= 3 for w in workers), 90, "training")
    return workers, replication.wait_until_in_sync(cluster, 2)


def kinds(cluster) -> list[str]:
    return [e.kind for e in inspection.events(cluster.coordinator_address)]


def heard(cluster) -> bool:
    status = inspection.status(cluster.coordinator_address)
    return status.uptime_ms > 3000 and all(row.silence_ms < 1000 for row in status.servers)


@pytest.mark.parametrize("several", [THREE], indirect=True)
def test_leaders_killed_one_after_the_other_stall_no_step_and_evict_nobody(several):
    """Row 12: a new one leads within 5 s, twice; the last leads alone."""
    workers, _ = training(several, epochs=6, seconds=0.12)
    began, took = time.monotonic(), []
    for _ in range(2):
        name, term = several.wait_for_leader()
        killed = time.monotonic()
        several.kill(name)
        several.wait_for_leader(above=term)
        took.append(round(time.monotonic() - killed, 2))
        # Whoever is evicted is so after the grace of 2 s: silence of less means beats to the new one.
        several.wait_until(lambda: heard(several), 10, "servers to beat to the new leader after its grace")
    ended = time.monotonic()
    stall = longest_step(workers, began)
    print(f"takeovers_s={took} longest_step_s={stall:.3f} watched_s={ended - began:.1f}")
    assert max(took) < TAKEOVER
    assert_as_undisturbed(several, workers, epochs=6)
    assert stall < 1.0
    assert not [k for k in kinds(several) if "evicted" in k or "dead" in k], kinds(several)


@pytest.mark.soak
@pytest.mark.parametrize("several", [THREE], indirect=True)
@pytest.mark.parametrize("when", ["before it is decided", "once it is committed"])
def test_a_leader_killed_during_a_promotion(several, when):
    """Row 13: whichever coordinator it falls to, the promotion is made, and training ends in the same bits."""
    workers, before = training(several, epochs=3, seconds=0.02)
    name, term = several.wait_for_leader()
    victim = before[1].primary
    killed = time.monotonic()
    several.kill(victim)
    if when == "once it is committed":
        log = several.processes[name].log_path
        several.wait_until(lambda: "kind=server_dead" in log.read_text(), 10, "the promotion to be decided")
    several.kill(name)
    several.wait_for_leader(above=term)
    took = time.monotonic() - killed
    led = replication.led_by(before, victim, ledger=True)

    def promoted() -> bool:
        rows = replication.rows(several)
        return all(rows[p].primary != victim and rows[p].epoch > before[p].epoch and rows[p].online for p in led)

    several.wait_until(promoted, 20, "its partitions to have another primary")
    print(f"when={when!r} leader_s={took:.2f} promoted_s={time.monotonic() - killed:.2f}")
    assert took < TAKEOVER
    assert_as_undisturbed(several, workers, epochs=3)
    print(f"longest_step_s={longest_step(workers, killed):.2f}")
    assert kinds(several).count("server_dead") == 1
    assert not [k for k in kinds(several) if "evicted" in k]


@pytest.mark.soak
@pytest.mark.parametrize("several", [THREE], indirect=True)
def test_a_leader_that_was_stopped_comes_back_to_stand_by(several):
    """Row 15: it decides nothing more; what happens meanwhile is the new leader's to decide."""
    workers, before = training(several, epochs=4, seconds=0.05)
    name, term = several.wait_for_leader()
    address = several.coordinators[name]
    several.pause(name)
    others = [one for one in several.coordinators.values() if one != address]
    several.wait_until(lambda: inspection.partition_map(",".join(others)).term > term, 10, "another leader")
    several.resume(name)
    several.wait_until(lambda: "standing by" in several.processes[name].tail(3), 10, "the old one to stand by")
    victim = before[1].primary
    several.kill(victim)
    several.wait_until(lambda: kinds(several).count("server_dead") == 1, 10, "its death to be decided")
    assert_as_undisturbed(several, workers, epochs=4)
    terms = [e.term for e in inspection.events(several.coordinator_address)]
    assert all(a <= b for a, b in itertools.pairwise(terms)), "a decision of the old term after one of the new"


@pytest.mark.parametrize("several", [{"servers": 1, "coordinators": 2}], indirect=True)
def test_psctl_is_pointed_to_the_leader_by_a_standby(several):
    name, _ = several.wait_for_leader()
    standby = next(one for other, one in several.coordinators.items() if other != name)
    done = subprocess.run(
        [sys.executable, "-m", "paramesh_coordinator.psctl", "--coordinator", standby, "status", "--json"],
        capture_output=True, text=True, env=several.env, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["coordinator"] == several.coordinators[name]
