"""Whom a step waits for, and how long: members between loaders, the step timeout."""

from __future__ import annotations

from tests.unit.ps.ledger_world import World
from tests.unit.ps.test_ledger_members import refused

# ---------------------------------------------------------------------- gather


def after_one_step(**config: int) -> World:
    """Two workers past step 0; client 2's loader has just ended."""
    world = World(**config)
    world.workers(2)
    world.step(0, 1, 2)
    world.between(2)
    return world


def test_the_first_step_of_a_restored_job_waits_for_slow_starters_like_the_first_of_all() -> None:
    """Whoever was quicker would train alone for a while, and the rest of the run would have other bits."""
    world = after_one_step(start_workers=2)
    world.restore()
    world.join(11)
    world.join(12)
    world.active(11)
    assert world.waits(11, 1) == (1,)
    world.pass_time(19.0)
    assert world.waits(11, 1) == (1,), "it loads its model: the gather of a start, not that of a pause"
    world.active(12)
    assert len(world.step(1, 11, 12).contributors) == 2
    world.between(12)
    world.waits(11, 2)
    world.pass_time(2.0)
    assert world.decided(11, 2).included


def test_a_step_gathers_members_between_two_loaders() -> None:
    world = after_one_step()
    assert world.waits(1, 1) == (1,)
    world.pass_time(1.9)
    assert world.waits(1, 1) == (1,)
    world.active(2)
    world.pass_time(60)
    assert world.waits(1, 1) == (1,), "it is back: waited for like any"
    assert len(world.decided(2, 1).record.contributors) == 2


def test_after_the_gather_a_member_is_idle_until_it_is_active_again() -> None:
    world = after_one_step()
    world.waits(1, 1)
    world.pass_time(2.0)
    assert [c.client_id for c in world.decided(1, 1).record.contributors] == [1]
    assert world.decided(1, 2).included, "gathered once per idle period, not at every step"
    world.active(2)
    assert world.waits(1, 3) == (1,)


def test_the_gather_counts_from_the_first_ready() -> None:
    world = after_one_step()
    world.pass_time(100)
    assert world.waits(1, 1) == (1,)
    world.pass_time(2.0)
    assert world.decided(1, 1).included


def test_a_member_that_falls_idle_while_others_wait_gets_its_whole_gather() -> None:
    world = World()
    world.workers(2)
    world.step(0, 1, 2)
    world.waits(1, 1)
    world.pass_time(50)
    world.between(2)
    assert world.waits(1, 1) == (1,)
    world.pass_time(2.0)
    assert world.decided(1, 1).included


def test_idle_members_are_not_gathered() -> None:
    world = after_one_step()
    world.idle(2)
    assert world.decided(1, 1).included


def test_gather_ms_zero_waits_for_nobody_between() -> None:
    assert after_one_step(gather_ms=0).decided(1, 1).included


def test_step_0_waits_longer_for_members_that_were_never_active() -> None:
    world = World(start_workers=2)
    world.join(1)
    world.join(2)
    world.open(1)
    world.active(1)
    world.waits(1, 0)
    world.pass_time(19.9)
    assert world.waits(1, 0) == (1,), "it builds its model"
    world.pass_time(0.2)
    assert world.decided(1, 0).included, "but not for ever"


def test_a_joiner_is_gathered_like_any_later() -> None:
    world = World()
    world.workers(1)
    world.step(0, 1)
    world.join(2)
    assert world.waits(1, 1) == (1,)
    world.pass_time(2.0)
    assert world.decided(1, 1).included


# ---------------------------------------------------------------------- step timeout


def test_a_member_that_never_gets_ready_is_waited_for_by_default() -> None:
    world = World()
    world.workers(2)
    world.waits(1, 0)
    world.pass_time(100_000)
    assert world.waits(1, 0) == (1,)


def test_the_step_timeout_evicts_a_member_that_never_gets_ready() -> None:
    world = World(step_timeout_ms=5000)
    world.workers(2)
    world.pass_time(100)
    world.waits(1, 0)
    world.pass_time(4.9)
    assert world.waits(1, 0) == (1,)
    world.pass_time(0.2)
    assert world.decided(1, 0).included
    assert any("step_timeout" in line for line in world.ledger.take_notices())
    with refused("EVICTED"):
        world.join(2)


def test_the_step_timeout_counts_from_when_a_member_became_active() -> None:
    world = World(step_timeout_ms=5000)
    world.workers(2)
    world.idle(2)
    world.join(3)
    world.active(3)
    world.waits(1, 0)
    world.pass_time(4)
    world.active(2)
    world.pass_time(2)
    assert world.waits(1, 0) == (1,), "rank 2 is out, rank 1 has time left"
