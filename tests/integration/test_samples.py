"""Every sample counts in exactly one committed step, whatever workers do with their time.

All by `bodies.tally`: its parameters are the count of each sample (see there).
"""

from __future__ import annotations

import pytest

TALLY = "tests.cluster.bodies:tally"


def assert_exact(cluster, length: int, epochs: int) -> None:
    """Each sample was counted `epochs` times, by the servers' word.

    A worker's own copy may lack the epoch's very last step, when that was others' alone.
    """
    counts = cluster.table_values()["counts"].tolist()
    wrong = {i: c for i, c in enumerate(counts) if c != epochs}
    assert not wrong, f"sample -> count, where it is not {epochs}: {wrong}"
    assert len(counts) == length


def assert_lockstep(workers) -> None:
    """After the last step all hold the same bits."""
    assert len({w.last("final")["digest"] for w in workers}) == 1


@pytest.mark.parametrize("length", [3 * 4 * 4 + 5, 4, 1], ids=["3k+1 and a rest", "one batch", "one sample"])
def test_fewer_batches_than_workers_and_rests(inprocess_cluster, length):
    """W=3 and any number of batches: the last ones are one worker's alone, or there is only one."""
    cluster = inprocess_cluster(servers=2, start_workers=3, gather=0.3)
    cluster.start_workers(3, TALLY, length=length, batch=4, epochs=3)
    cluster.wait_for_workers(90)
    assert_exact(cluster, length, 3)


def test_uneven_batches_do_not_hang_and_are_exact(cluster_factory):
    """W=3 with 3k+1 batches of four."""
    cluster = cluster_factory(servers=2, start_workers=3, gather=0.3)
    cluster.start_workers(3, TALLY, length=52, batch=4, epochs=3)
    cluster.wait_for_workers(90)
    assert_exact(cluster, 52, 3)


def test_rank_0_validates_while_others_go_on(inprocess_cluster):
    """A worker that spends time between epochs holds the others up for `gather` at most."""
    cluster = inprocess_cluster(servers=1, start_workers=2, gather=0.2)
    workers = cluster.start_workers(2, TALLY, length=80, epochs=3, validate=0, validate_seconds=2.0, seconds=0.01)
    cluster.wait_for_workers(60)
    assert_exact(cluster, 80, 3)
    assert_others_went_on(workers[1], workers[0])


def assert_others_went_on(other, validator) -> None:
    """During some validation, `other` finished steps."""
    spans = zip(validator.events("validating"), validator.events("validated"), strict=True)
    times = [e["t"] for e in other.events("step")]
    inside = [t for a, b in spans for t in times if a["t"] + 0.5 < t < b["t"]]
    assert inside, "nobody finished a step while one worker validated"


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_rank_0_validates_for_20_seconds(process_cluster):
    cluster = process_cluster(servers=2, start_workers=2)
    workers = cluster.start_workers(2, TALLY, length=400, epochs=3, validate=0, validate_seconds=20.0, seconds=0.05)
    cluster.wait_for_workers(200)
    assert_exact(cluster, 400, 3)
    assert_others_went_on(workers[1], workers[0])


def test_a_slow_first_step_is_waited_for(inprocess_cluster):
    """One worker's first step takes far longer than any timeout of the job (it compiles, say)."""
    cluster = inprocess_cluster(
        servers=1, start_workers=2, gather=0.2, failure_timeout=0.8, heartbeat_interval=0.1, client_timeout=1.0
    )
    workers = cluster.start_workers(2, TALLY, length=64, epochs=1, first=3.0)
    cluster.wait_for_workers(60)
    assert_exact(cluster, 64, 1)
    assert_lockstep(workers)
    assert len(workers[0].events("step")) == len(workers[1].events("step")), "a step left a worker out"


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_first_step_of_15_seconds(process_cluster):
    cluster = process_cluster(servers=2, start_workers=2)
    workers = cluster.start_workers(2, TALLY, length=64, epochs=1, first=15.0)
    cluster.wait_for_workers(120)
    assert_exact(cluster, 64, 1)
    assert_lockstep(workers)


def test_forked_loader_workers(process_cluster):
    """DataLoader with two forked workers: samples run ahead in them, and still count once."""
    cluster = process_cluster(servers=1, start_workers=2)
    cluster.start_workers(2, TALLY, length=52, epochs=3, num_workers=2)
    cluster.wait_for_workers(120)
    assert_exact(cluster, 52, 3)


def test_a_gan_has_two_step_counters(inprocess_cluster):
    """Two optimizers, the second stepping every other batch: no hang, both equal on all workers."""
    cluster = inprocess_cluster(servers=2, start_workers=2, gather=0.3)
    workers = cluster.start_workers(2, "tests.cluster.bodies:gan", epochs=3)
    cluster.wait_for_workers(60)
    finals = [w.last("final") for w in workers]
    assert finals[0]["critic"] == finals[1]["critic"]
    assert finals[0]["generator"] == finals[1]["generator"]
    assert sum(f["batches"] for f in finals) == 3 * 16
    generators = {e["generator"] for e in workers[0].events("step")}
    assert len(generators) > 1, "the generator never stepped"


@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_samples_are_exact_without_faults_in_the_other_modes(inprocess_cluster, mode):
    """Async and ssp promise at least once; without faults that is once. The server's word counts."""
    cluster = inprocess_cluster(servers=2, start_workers=3)
    workers = cluster.start_workers(3, TALLY, length=90, epochs=2, mode=mode)
    cluster.wait_for_workers(60)
    # A worker's own copy lags behind the last pushes of others; what all pushed is exact.
    pushed = [i for w in workers for e in w.events("step") for i in e["samples"]]
    assert sorted(pushed) == sorted(list(range(90)) * 2)
    newest = cluster.table_values()
    assert newest["counts"].tolist() == [2.0] * 90
