"""Hyper-parameters of steps, and which decisions are kept."""

from __future__ import annotations

import math

import pytest
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger_steps import KEEP_STEPS, MAX_STEPS

from tests.unit.ps.ledger_world import World, setting
from tests.unit.ps.test_ledger_members import refused

# ---------------------------------------------------------------------- hyper-parameters


def test_a_step_carries_what_changed_of_the_longest_joined_contributor() -> None:
    world = World()
    world.workers(2)
    both = [setting("lr", 0.1), setting("momentum", 0.9, table=2)]
    assert world.step(0, 1, 2, hyper_parameters=both).hyper_parameters == both
    assert not world.step(1, 2, 1).hyper_parameters
    world.waits(2, 2, hyper_parameters=[setting("lr", 0.7)])
    record = world.decided(1, 2, hyper_parameters=[setting("lr", 0.5)]).record
    assert record.hyper_parameters == [setting("lr", 0.5)]


def test_disagreement_is_counted_and_reported_once() -> None:
    world = World()
    world.workers(2)
    world.waits(1, 0, hyper_parameters=[setting("lr", 0.1)])
    world.decided(2, 0, hyper_parameters=[setting("lr", 0.2)])
    notices = world.ledger.take_notices()
    assert len(notices) == 1
    assert "name=lr rank=1" in notices[0]
    world.step(1, 1, 2)
    world.waits(1, 2, hyper_parameters=[setting("lr", 0.3)])
    world.decided(2, 2)
    assert not world.ledger.take_notices()


def test_when_the_longest_joined_goes_the_next_ones_settings_hold() -> None:
    world = World()
    world.workers(2)
    world.waits(1, 0, hyper_parameters=[setting("lr", 0.1)])
    world.decided(2, 0, hyper_parameters=[setting("lr", 0.2)])
    world.evict(1)
    assert world.decided(2, 1).record.hyper_parameters == [setting("lr", 0.2)]
    assert not world.decided(2, 2).record.hyper_parameters


def test_a_joiner_does_not_change_what_holds() -> None:
    world = World()
    world.workers(1)
    world.decided(1, 0, hyper_parameters=[setting("lr", 0.1)])
    world.join(2)
    world.active(2)
    world.waits(2, 1, hyper_parameters=[setting("lr", 0.9)])
    assert not world.decided(1, 1).record.hyper_parameters


def test_a_number_and_a_flag_of_equal_value_differ() -> None:
    world = World()
    world.workers(1)
    world.decided(1, 0, hyper_parameters=[setting("x", 1.0)])
    flag = t.TableHyperParameters(table_id=1, hyper_parameters=[t.HyperParameter(name="x", flag=True)])
    assert world.decided(1, 1, hyper_parameters=[flag]).record.hyper_parameters == [flag]


@pytest.mark.parametrize(
    "bad",
    [
        t.HyperParameter(name="lr", number=math.nan),
        t.HyperParameter(name="betas", numbers=t.NumberList(numbers=[0.9, math.inf])),
        t.HyperParameter(name="lr"),
        t.HyperParameter(number=1.0),
    ],
)
def test_a_bad_hyper_parameter_is_refused(bad: t.HyperParameter) -> None:
    world = World()
    world.workers(1)
    with refused("HYPER_PARAMETER"):
        world.ready(1, 0, hyper_parameters=[t.TableHyperParameters(table_id=1, hyper_parameters=[bad])])


# ---------------------------------------------------------------------- kept decisions


def steps_of(world: World, first: int, limit: int = 0) -> tuple[list[int], int]:
    request = lg.GetStepsRequest(group=1, first=first, limit=limit)
    answer = world.do(lambda now: world.ledger.get_steps(request, now))
    return [record.step for record in answer.records], answer.next_step


def test_decided_steps_can_be_fetched() -> None:
    world = World()
    world.workers(1)
    for step in range(5):
        world.step(step, 1)
    assert steps_of(world, 2) == ([2, 3, 4], 5)
    assert steps_of(world, 1, limit=2) == ([1, 2], 5)
    assert steps_of(world, 5) == ([], 5)
    assert steps_of(world, 50) == ([], 5)


def test_decisions_are_kept_until_everybody_has_applied_them_and_some_longer() -> None:
    world = World()
    world.check = False
    world.workers(2)
    for step in range(KEEP_STEPS + 40):
        world.waits(1, step, applied_through=step)
        world.decided(2, step, applied_through=min(step, 10))
    assert steps_of(world, 10)[0][0] == 10, "client 2 may still ask for it"
    with refused("STEP_OUT_OF_RANGE") as caught:
        steps_of(world, 9)
    assert caught.value.metadata["first_kept"] == "10"
    with refused("STEP_OUT_OF_RANGE"):
        world.ready(2, 9)
    step = KEEP_STEPS + 40
    world.waits(1, step, applied_through=step)
    world.decided(2, step, applied_through=step)
    world.step(step + 1, 1, 2)
    kept = steps_of(world, step + 2 - KEEP_STEPS)[0]
    assert len(kept) == KEEP_STEPS
    world.do(lambda now: world.ledger.tick(now))


def test_a_straggler_does_not_keep_decisions_without_bound() -> None:
    world = World()
    world.check = False
    world.workers(2, backup_workers=1)
    for step in range(MAX_STEPS + 10):
        world.decided(1, step)
    with refused("STEP_OUT_OF_RANGE"):
        steps_of(world, 9)
    assert steps_of(world, 10)[0][0] == 10


def test_an_idle_member_does_not_keep_decisions() -> None:
    world = World()
    world.check = False
    world.workers(2)
    world.step(0, 1, 2)
    world.idle(2)
    for step in range(1, KEEP_STEPS + 10):
        world.decided(1, step, applied_through=step)
    with refused("STEP_OUT_OF_RANGE"):
        steps_of(world, 5)
