"""Decisions of steps: protocol sections 3, 4, 10; invariants 14, 17, 20."""

from __future__ import annotations

import math
from typing import Any

import pytest
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger import Wait

from tests.unit.ps.ledger_world import World, setting, spec
from tests.unit.ps.test_ledger_members import refused

# ---------------------------------------------------------------------- the decision


def test_invariant_14_a_step_has_every_active_member_in_rank_order() -> None:
    world = World()
    for client in (3, 1, 2):
        world.join(client)
    for client in (1, 2, 3):
        world.open(client)
    world.active(1, 2, 3)
    assert world.waits(2, 0) == (0, 1)
    assert world.waits(1, 0) == (0,)
    record = world.decided(3, 0).record
    assert [(c.client_id, c.rank) for c in record.contributors] == [(3, 0), (1, 1), (2, 2)]
    assert (record.group, record.step, record.loss_reduction) == (1, 0, t.LOSS_REDUCTION_MEAN)


def test_a_decision_carries_weights_attempts_and_overrides() -> None:
    world = World()
    world.workers(2)
    world.waits(1, 0, weight=64.0, attempt=3, overrides=[t.Attempt(partition=2, attempt=4)])
    record = world.decided(2, 0, weight=0.5).record
    assert [(c.weight, c.attempt) for c in record.contributors] == [(64.0, 3), (0.5, 1)]
    assert [(o.partition, o.attempt) for o in record.contributors[0].overrides] == [(2, 4)]


def test_invariant_14_a_decided_step_is_answered_the_same_for_ever_to_anybody() -> None:
    world = World()
    world.workers(2)
    first = world.step(0, 1, 2)
    lsn = world.ledger.lsn
    assert world.decided(1, 0, weight=9.0).record == first, "a repeat is idempotent, whatever it says"
    world.evict(2)
    late = world.decided(2, 0)
    assert (late.record, late.included) == (first, True), "an evicted worker is told that it was named"
    stranger = world.decided(99, 0)
    assert (stranger.record, stranger.included) == (first, False)
    assert world.ledger.lsn == lsn + 1, "nothing but the eviction was recorded"


def test_waiters_are_woken_by_the_decision() -> None:
    world = World()
    world.workers(2)
    answer = world.ready(1, 0)
    assert isinstance(answer, Wait)
    world.ledger.take_woken()
    world.decided(2, 0)
    assert answer.key in world.ledger.take_woken()


def test_one_skip_skips_for_everyone_and_still_consumes_samples() -> None:
    world = World()
    world.workers(2, max_grad_norm=1.0)
    leases = {c: world.leased(c) for c in (1, 2)}
    world.waits(1, 0, samples=leases[1], skip=True)
    record = world.decided(2, 0, samples=leases[2]).record
    assert record.skip
    assert not record.needs_clip, "nothing to clip in a step that changes nothing"
    assert world.status().groups[0].skipped_steps == 1
    assert [m.samples for m in world.status().members] == [2, 2]


def test_groups_step_by_themselves() -> None:
    world = World()
    world.workers(1)
    world.open(1, spec("gan"))
    assert world.decided(1, 0, group=2).record.group == 2
    assert world.decided(1, 0, group=1).record.group == 1
    assert world.decided(1, 1, group=2).record.step == 1


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e30, 1e-40])
def test_a_weight_must_be_finite_positive_and_sane(weight: float) -> None:
    world = World()
    world.workers(1)
    with refused("WEIGHT"):
        world.ready(1, 0, weight=weight)


def test_a_step_beyond_the_next_is_refused_and_names_the_next() -> None:
    world = World()
    world.workers(1)
    world.step(0, 1)
    with refused("STEP_OUT_OF_RANGE") as caught:
        world.ready(1, 2)
    assert caught.value.metadata["next_step"] == "1"


@pytest.mark.parametrize("mode", [lg.MODE_ASYNC, lg.MODE_SSP])
def test_groups_with_clocks_take_no_steps(mode: int) -> None:
    world = World()
    world.workers(1, mode)
    with refused("SCHEMA"):
        world.ready(1, 0)


def test_local_groups_take_steps() -> None:
    world = World()
    world.workers(1, lg.MODE_LOCAL, every=4)
    assert world.decided(1, 0).included


def test_an_evicted_worker_is_refused_for_an_undecided_step() -> None:
    world = World()
    world.workers(2)
    answer = world.ready(1, 0)
    assert isinstance(answer, Wait)
    world.ledger.take_woken()
    world.evict(1)
    assert answer.key in world.ledger.take_woken(), "it must hear of it"
    with refused("EVICTED"):
        world.ready(1, 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"weight": 2.0},
        {"skip": True},
        {"hyper_parameters": [setting("lr", 0.5)]},
        {"overrides": [t.Attempt(partition=1, attempt=1)]},
        {"attempt": 0},
    ],
)
def test_other_content_needs_a_higher_attempt(changed: dict[str, Any]) -> None:
    world = World()
    world.workers(2)
    world.waits(1, 0)
    with refused("SEQ_REUSED"):
        world.ready(1, 0, **changed)
    world.waits(1, 0)
    world.waits(1, 0, **(changed | {"attempt": 2}))
    record = world.decided(2, 0).record
    assert record.contributors[0].attempt == 2
    assert record.skip == changed.get("skip", False)


def test_an_override_counts_as_a_higher_attempt() -> None:
    world = World()
    world.workers(2)
    world.waits(1, 0)
    world.waits(1, 0, overrides=[t.Attempt(partition=2, attempt=2)])
    with refused("SEQ_REUSED"):
        world.ready(1, 0)
    assert len(world.decided(2, 0).record.contributors[0].overrides) == 1


# ---------------------------------------------------------------------- membership


def test_invariant_17_a_dead_worker_shrinks_the_decision_and_nothing_else() -> None:
    world = World()
    world.workers(3)
    world.waits(1, 0)
    world.waits(2, 0)
    world.evict(3)
    record = world.decided(1, 0).record
    assert [c.client_id for c in record.contributors] == [1, 2]


@pytest.mark.parametrize("end", ["evict", "leave", "idle"])
def test_a_contribution_of_who_is_gone_does_not_count(end: str) -> None:
    world = World()
    world.workers(2)
    world.waits(1, 0)
    getattr(world, end)(1)
    record = world.decided(2, 0).record
    named = [c.client_id for c in record.contributors]
    assert named == ([1, 2] if end == "idle" else [2]), "an idle member's staged contribution is good"


def test_a_worker_that_becomes_active_is_required_from_the_next_step() -> None:
    world = World()
    world.workers(1)
    world.step(0, 1)
    world.join(2)
    world.active(2)
    assert world.waits(1, 1) == (1,)
    assert [c.client_id for c in world.decided(2, 1).record.contributors] == [1, 2]


def test_a_ready_makes_a_member_active() -> None:
    world = World(start_workers=2)
    world.join(1)
    world.join(2)
    world.open(1)
    assert world.waits(1, 0) == (1,)
    world.decided(2, 0)
    assert world.waits(1, 1) == (1,)


# ---------------------------------------------------------------------- backup workers


def test_backup_workers_take_the_first_and_return_the_samples_of_the_rest() -> None:
    world = World()
    world.workers(3, backup_workers=1)
    leases = {c: world.leased(c) for c in (1, 2, 3)}
    world.waits(3, 0, samples=leases[3])
    record = world.decided(1, 0, samples=leases[1]).record
    assert [c.client_id for c in record.contributors] == [1, 3], "the first two, in rank order"
    late = world.decided(2, 0, samples=leases[2])
    assert not late.included, "TOO_LATE"
    with refused("LEASE"):
        world.ready(2, 1, samples=leases[2])
    world.evict(1)
    world.evict(3)
    dealt = world.leased(2, want=99)
    assert leases[2][0] in dealt, "its samples are dealt again"
    assert leases[1][0] not in dealt


def test_a_late_contribution_that_came_before_the_decision_returns_its_samples_too() -> None:
    world = World()
    world.workers(4, backup_workers=1)
    lease = world.leased(4)
    for client in (1, 2):
        world.waits(client, 0)
    world.evict(3)  # of three, two suffice: decided by the eviction
    assert not world.decided(4, 0, samples=lease).included
    assert world.decided(1, 0).included


def test_backup_workers_never_mean_nobody() -> None:
    world = World()
    world.workers(2, backup_workers=5)
    assert [c.client_id for c in world.decided(2, 0).record.contributors] == [2]


def test_settings_of_a_late_contribution_still_hold() -> None:
    world = World()
    world.workers(3, backup_workers=1)
    for client in (2, 3, 1):
        world.ready(client, 0, hyper_parameters=[setting("lr", 0.1)])
    for client in (2, 3):
        world.ready(client, 1)
    world.decided(1, 1, hyper_parameters=[setting("lr", 0.2)])
    world.waits(1, 2)
    record = world.decided(2, 2).record
    assert record.hyper_parameters == [setting("lr", 0.2)], "client 1 will not send it again"


def test_another_try_of_a_decided_step_is_not_in_it() -> None:
    world = World()
    world.workers(1)
    assert world.decided(1, 0, attempt=1).included
    assert world.decided(1, 0, attempt=1).included
    assert not world.decided(1, 0, attempt=2).included
    other = [t.Attempt(partition=1, attempt=2)]
    assert not world.decided(1, 0, attempt=1, overrides=other).included
