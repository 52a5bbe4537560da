"""Views and summaries from series of observations."""

from __future__ import annotations

from dataclasses import replace

import pytest
from paramesh_worker.progress import EpochView, Group, Observation, ProgressTracker, Server, Worker

SYNC = Group("g", "sync", 0, 0, 0, 0, 0, 0, ())
SSP = replace(SYNC, mode="ssp", staleness=4)


def worker(client_id: int, rank: int, clock: int = 0, samples: int = 0) -> Worker:
    return Worker(client_id, rank, f"local/{rank}", "active", clock, samples)


def server(value: int = 0, got: int = 0, sent: int = 0) -> Server:
    return Server("ps-0", True, value, got, sent)


def tracker_after(*looks: Observation) -> ProgressTracker:
    tracker = ProgressTracker(started=0.0)
    for look in looks:
        tracker.observe(look)
    return tracker


def steps(at: float, step: int, **more) -> Observation:
    return Observation(at, groups=(replace(SYNC, next_step=step),), servers=(server(),), **more)


def test_steps_per_second_is_over_the_window():
    tracker = tracker_after(*(steps(at, at * 10) for at in range(20)))
    assert tracker.view.steps == 190
    assert tracker.view.steps_per_s == pytest.approx(10.0)
    # A stall shows as zero once the window has passed.
    for at in range(20, 30):
        tracker.observe(steps(at, 190))
    assert tracker.view.steps_per_s == 0.0


def test_the_summarys_rate_leaves_start_and_end_out():
    looks = [steps(float(at), 0) for at in range(10)]
    looks += [steps(10.0 + at, 5 * at) for at in range(1, 11)]
    looks += [steps(30.0, 50)]
    summary = tracker_after(*looks).summary(at=31.0)
    assert (summary.wall_s, summary.steps) == (31.0, 50)
    assert summary.steps_per_s == pytest.approx(50 / 11)


def test_in_ssp_steps_are_those_of_the_fastest_worker_also_after_it_left():
    tracker = tracker_after(
        Observation(1.0, groups=(SSP,), workers=(worker(1, 0, clock=10), worker(2, 1, clock=8))),
        Observation(2.0, groups=(SSP,), workers=(worker(1, 0, clock=12), worker(3, 1, clock=8))),
        Observation(3.0, groups=(SSP,), workers=()),
    )
    assert tracker.view.steps == 12
    assert tracker.summary(4.0).clocked
    assert tracker.view.workers == ()


def test_the_gap_is_of_started_clocks():
    """Having finished 5 more than the slowest, with 4 allowed, the fastest is held and has not started the 6th."""
    assert replace(SSP, min_clock=10, max_clock=15).gap == 4
    assert replace(SSP, min_clock=10, max_clock=12).gap == 2
    assert replace(SSP, mode="async", min_clock=10, max_clock=50).gap == 40


def test_the_group_ahead_counts():
    groups = (replace(SYNC, name="d", next_step=7), replace(SYNC, name="g", next_step=5))
    assert tracker_after(Observation(1.0, groups=groups)).view.steps == 7


def test_what_does_not_answer_stays_as_it_was():
    full = steps(
        1.0,
        3,
        phase="training",
        workers=(worker(1, 0, samples=64),),
        epochs=(EpochView("", 0, 100, 64),),
        figures=(("loss", 0.5),),
        evictions=1,
    )
    before = tracker_after(full).view
    after = tracker_after(full, Observation(2.0)).view
    assert after.coordinator_away
    assert not before.coordinator_away
    for name in ("phase", "steps", "samples", "workers", "groups", "epochs", "figures", "servers", "evictions"):
        assert getattr(after, name) == getattr(before, name), name


def test_samples_are_those_of_the_epochs():
    epochs = (EpochView("", 0, 100, 100), EpochView("", 1, 100, 30))
    assert tracker_after(Observation(1.0, epochs=epochs)).view.samples == 130


def test_epochs_that_the_ledger_forgot_or_that_passed_between_two_looks_are_complete():
    tracker = tracker_after(
        Observation(1.0, epochs=(EpochView("", 0, 100, 60), EpochView("val", 0, 10, 10))),
        Observation(2.0, epochs=(EpochView("", 3, 100, 30),)),
    )
    assert [(e.dataset, e.epoch, e.consumed) for e in tracker.view.epochs] == [
        ("", 0, 100), ("", 1, 100), ("", 2, 100), ("", 3, 30), ("val", 0, 10),
    ]  # fmt: skip
    assert tracker.view.samples == 340


def test_traffic_is_a_rate_of_the_counters():
    def look(at: float, got: int, sent: int) -> Observation:
        return Observation(at, servers=(server(5, got, sent),))

    view = tracker_after(look(0.0, 0, 0), look(1.0, 100, 300), look(2.0, 200, 600)).view
    assert (view.servers[0].in_per_s, view.servers[0].out_per_s) == (100.0, 300.0)
    # A restarted server counts from zero: no negative rates.
    view = tracker_after(look(0.0, 1000, 1000), look(1.0, 0, 0)).view
    assert (view.servers[0].in_per_s, view.servers[0].out_per_s) == (0.0, 0.0)


def test_workers_are_shown_by_rank():
    view = tracker_after(Observation(1.0, workers=(worker(9, 1), worker(3, 0)))).view
    assert [each.rank for each in view.workers] == [0, 1]


def test_restarts_reach_view_and_summary():
    tracker = ProgressTracker(started=0.0)
    tracker.restarts = 2
    assert tracker.observe(Observation(1.0)).restarts == 2
    assert tracker.summary(2.0).restarts == 2
