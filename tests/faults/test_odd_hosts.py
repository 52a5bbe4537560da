"""Hosts that behave oddly: an interpreter that stands still, clocks that jump, a coordinator that sleeps, a straggler.

Fault rows 17, 19, 38 and 39 of the matrix, and a coordinator stopped for five timeouts. Nothing of it may
cost an update, and none may be taken for a death.
"""

from __future__ import annotations

import itertools
import signal
import statistics
import time
from pathlib import Path

import paramesh
import pytest

from tests.cluster import inspection, replication
from tests.cluster.processes import ProcessCluster

TALLY = "tests.cluster.bodies:tally"
TORN = "tests.cluster.replica_bodies:torn"
DEATHS = ("dead", "promoted", "evicted", "stalled")


def taken_for_deaths(cluster) -> list[str]:
    """Audit lines that say that somebody died or was put aside."""
    kinds = [e.kind for e in inspection.events(cluster.coordinator_address)]
    return [kind for kind in kinds if any(word in kind for word in DEATHS)]


def settle(cluster, pushers) -> replication.Account:
    """Stop pushing and count: nothing is lost, doubled or unread."""
    replication.stop_pushers(cluster, pushers)
    found = replication.account(cluster, pushers)
    print(found)
    found.assert_exact()
    return found


def as_led(found) -> dict[int, tuple[str, int, frozenset[str]]]:
    """Who leads what, in which epoch, with whom."""
    return {p: (row.primary, row.epoch, frozenset(row.isr)) for p, row in found.items()}


class HoggedCluster(ProcessCluster):
    """Its servers can be made to hold their GIL."""

    def _server_command(self, index: int) -> list[str]:
        command = super()._server_command(index)
        return [word if word != "paramesh_server.cli" else "tests.cluster.hog_main" for word in command]


@pytest.mark.soak
def test_a_primary_that_holds_its_gil_for_3_seconds_is_not_taken_for_dead():
    """Row 38: longer than the failure timeout. Its beats come from another process; it leads on.

    Where it follows it is left out after 2 s, as any follower that acknowledges nothing, and rejoins.
    """
    with HoggedCluster(servers=3, replicas=2) as cluster:
        pushers = replication.start_pushers(cluster)
        before = replication.wait_until_in_sync(cluster, 2)
        victim = before[0].primary
        led = replication.led_by(before, victim)
        hogged = time.monotonic()
        cluster.processes[victim].send(signal.SIGUSR1)

        def stalls() -> list[float]:
            late = [e for w in pushers for e in w.events("stall") if e["partition"] in led]
            return [e["gap"] for e in late if e["began"] + e["gap"] > hogged + 2.5]

        cluster.wait_until(stalls, 20, "its partitions to answer again")
        print(f"longest_stall_s={max(stalls()):.3f}")
        cluster.wait_until(lambda: time.monotonic() - hogged > 6.0, 10, "two timeouts after it")
        assert not taken_for_deaths(cluster)
        after = replication.wait_until_in_sync(cluster, 2)
        assert {p: after[p].primary for p in led} == dict.fromkeys(led, victim)
        settle(cluster, pushers)


FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


class SkewedCluster(ProcessCluster):
    """Every process takes its wall clock's offset from a file of its own; the monotonic clock is the machine's."""

    @property
    def env(self) -> dict[str, str]:
        return super().env | {"LD_PRELOAD": str(FAKETIME), "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1"}

    def _launch(self, name, command, env=None):
        offset = self.directory / f"offset-{name}"
        offset.write_text("+0")
        return super()._launch(name, command, (env or self.env) | {"FAKETIME_TIMESTAMP_FILE": str(offset)})

    def skew(self, name: str, offset: str) -> None:
        """Let a process's wall clock jump."""
        written = self.directory / f"offset-{name}.new"
        written.write_text(offset)
        written.replace(self.directory / f"offset-{name}")


@pytest.mark.soak
@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime (apt-get install faketime)")
def test_wall_clocks_that_jump_by_an_hour_change_nothing():
    """Row 39: back and forth, one process after the other, then a failover with all of them wrong."""
    with SkewedCluster(servers=3, replicas=2) as cluster:
        pushers = replication.start_pushers(cluster)
        before = replication.wait_until_in_sync(cluster, 2)
        names = list(cluster.processes)
        began = time.monotonic()
        for number, (name, offset) in enumerate(itertools.product(names, ("+3600", "-3600", "+0")), 1):
            cluster.skew(name, offset)
            due = began + 0.4 * number
            cluster.wait_until(lambda due=due: time.monotonic() > due, 10, "the next jump")
        assert not taken_for_deaths(cluster)
        assert as_led(replication.rows(cluster)) == as_led(before)

        for number, name in enumerate(names):
            cluster.skew(name, "+3600" if number % 2 else "-3600")
        victim = before[1].primary
        led, killed = replication.led_by(before, victim), time.monotonic()
        cluster.kill(victim)
        back = cluster.wait_until(
            lambda: replication.recoveries(pushers, before, led, killed), 15, "its partitions to acknowledge"
        )
        print(f"recovered_s={max(e['t'] for e in back.values()) - killed:.3f}")
        settle(cluster, pushers)


@pytest.fixture
def both_kinds(process_cluster):
    """A cluster with counted pushes and a training worker pair beside them."""
    cluster = process_cluster(servers=3, replicas=2, start_workers=2)
    pushers = replication.start_pushers(cluster)
    workers = cluster.start_workers(2, TALLY, length=8000, epochs=1, seconds=0.03, stop_at="enough")
    cluster.wait_until(lambda: all(len(w.events("step")) >= 5 for w in workers), 90, "training")
    return cluster, pushers, workers


@pytest.mark.soak
def test_a_coordinator_stopped_for_10_seconds_evicts_and_promotes_nobody(both_kinds):
    """Five timeouts in which it heard nobody: silence that it slept through is nobody's silence."""
    cluster, pushers, workers = both_kinds
    before = replication.wait_until_in_sync(cluster, 2)
    stopped = time.monotonic()
    cluster.pause("coordinator")
    cluster.wait_until(lambda: time.monotonic() - stopped > 10.0, 15, "ten seconds without it")
    cluster.resume("coordinator")
    resumed = time.monotonic()
    cluster.wait_until(lambda: time.monotonic() - resumed > 4.0, 10, "two timeouts of its new life")
    assert not taken_for_deaths(cluster)
    assert as_led(replication.rows(cluster)) == as_led(before)
    for worker in workers:
        worker.open_gate("enough")
    cluster.wait_until(lambda: all(w.exit_code == 0 for w in workers), 60, "the workers to end")
    gaps = []
    for worker in workers:
        times = [e["t"] for e in worker.events("step") if stopped - 0.5 < e["t"] < resumed + 4.0]
        gaps += [b - a for a, b in itertools.pairwise(times)]
    print(f"longest_step_gap_s={max(gaps):.3f}")
    assert max(gaps) < 2.0, "steps stalled"
    settle(cluster, pushers)


def test_a_push_torn_by_its_workers_death_is_counted_and_its_samples_go_to_others(process_cluster):
    """Row 17: async, killed between two partitions: one has the push, the other not; the samples come again at once."""
    cluster = process_cluster(servers=2, start_workers=2)
    survivor, victim = cluster.start_workers(2, TORN, length=160, seconds=0.05, tear_at=4)
    torn = cluster.wait_until(lambda: victim.events("torn"), 90, "a push to be torn")[0]
    killed = time.monotonic()
    victim.signal_training(signal.SIGKILL)

    def leased_again() -> list[float]:
        later = [e for w in (survivor, victim) for e in w.events("step") if e["t"] > killed]
        return [e["t"] - killed for e in later if set(e["samples"]) & set(torn["samples"])]

    took = cluster.wait_until(leased_again, 30, "its samples to be trained on by another")[0]
    print(f"leased_again_s={took:.3f}")
    cluster.wait_for_workers(90)
    with paramesh.connect(cluster.coordinator_address) as client:
        tables = {client._client.routes.partitions_of(name)[0]: client.pull(name) for name in client.tables()}
    counted = {p: next(iter(values.values())).tolist() for p, values in tables.items()}
    twice = set(torn["samples"])
    for partition, counts in counted.items():
        extra = twice if partition == torn["partition"] else set()
        wrong = {i: c for i, c in enumerate(counts) if c != 1 + (i in extra)}
        assert not wrong, f"partition {partition}: sample -> count {wrong}; torn were {sorted(twice)}"


@pytest.mark.soak
@pytest.mark.parametrize(
    "options", [{"mode": "sync", "backup_workers": 1}, {"mode": "ssp", "staleness": 3}, {"mode": "async"}], ids=str
)
def test_a_straggler_costs_the_others_little(process_cluster, options):
    """Row 19: one of three computes ten times as long. Printed: a step of the others, with and without it."""
    medians = {}
    for name, seconds in (("healthy", [0.02, 0.02, 0.02]), ("straggler", [0.02, 0.02, 0.2])):
        cluster = process_cluster(servers=1, start_workers=3)
        workers = cluster.start_workers(3, TALLY, length=600, epochs=1, seconds=seconds, **options)
        cluster.wait_for_workers(120)
        times = [[e["t"] for e in w.events("step")] for w in workers[:2]]
        medians[name] = statistics.median(b - a for one in times for a, b in itertools.pairwise(one))
        counts = cluster.table_values()["counts"].tolist()
        assert set(counts) == {1.0}, "samples were lost or counted twice"
    print(f"{options} {medians} ratio={medians['straggler'] / medians['healthy']:.2f}")
    if options["mode"] != "ssp":  # whose others wait for it by design, once they are `staleness` ahead
        assert medians["straggler"] < 0.1, "the others waited for the straggler"
