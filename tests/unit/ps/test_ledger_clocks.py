"""Clocks of ssp and async: protocol section 4; invariant 16."""

from __future__ import annotations

import pytest
from paramesh.v1 import ledger_pb2 as lg
from paramesh_server.ledger import Wait

from tests.unit.ps.ledger_world import World, spec
from tests.unit.ps.test_ledger_members import refused


def ssp(count: int, staleness: int) -> World:
    world = World()
    world.workers(count, lg.MODE_SSP, staleness=staleness)
    return world


def starts(world: World, client: int, finished: int) -> bool:
    return isinstance(world.clock(client, finished), lg.ClockResponse)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_invariant_16_a_clock_starts_iff_the_slowest_is_within_the_bound(staleness: int) -> None:
    world = ssp(2, staleness)
    for finished in range(1, staleness + 1):
        assert starts(world, 1, finished)
    assert not starts(world, 1, staleness + 1)
    assert not starts(world, 1, staleness + 1), "asking again is no progress"
    world.ledger.take_woken()
    assert starts(world, 2, 1)
    assert ("clock", 1) in world.ledger.take_woken()
    assert starts(world, 1, staleness + 1)
    group = world.status().groups[0]
    assert (group.min_clock, group.max_clock, group.widest_gap) == (1, staleness + 1, staleness)


def test_a_wait_names_the_slowest() -> None:
    world = ssp(3, 0)
    assert not starts(world, 1, 1)
    assert not starts(world, 3, 1)
    answer = world.clock(1, 1)
    assert isinstance(answer, Wait)
    assert answer.who() == (1,)


def test_async_never_waits_and_has_no_floors() -> None:
    world = World()
    world.workers(2, lg.MODE_ASYNC)
    for finished in range(1, 50):
        answer = world.clock(1, finished, {1: (1, finished)})
        assert isinstance(answer, lg.ClockResponse)
        assert not answer.floors
    assert world.status().groups[0].widest_gap == 49


@pytest.mark.parametrize(("finished", "stands"), [(2, 0), (7, 0)])
def test_a_clock_that_is_not_the_next_is_refused(finished: int, stands: int) -> None:
    world = ssp(1, 2)
    with refused("CLOCK") as caught:
        world.clock(1, finished)
    assert caught.value.metadata["clock"] == str(stands)


def test_a_clock_of_the_past_is_refused() -> None:
    world = ssp(1, 2)
    world.clock(1, 1)
    world.clock(1, 2)
    with refused("CLOCK"):
        world.clock(1, 1)


def test_groups_in_lockstep_have_no_clocks() -> None:
    world = World()
    world.workers(1)
    with refused("SCHEMA"):
        world.clock(1, 1)


def test_floors_are_of_the_group() -> None:
    world = ssp(1, 1)
    with refused("WRONG_PARTITION"):
        world.clock(1, 1, {9: (1, 1)})
    assert starts(world, 1, 1)


def floors(world: World, client: int, finished: int, told: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    answer = world.clock(client, finished, told)
    assert isinstance(answer, lg.ClockResponse)
    return {f.partition: (f.epoch, f.lsn) for f in answer.floors}


def test_a_pull_reflects_every_clock_up_to_the_bound() -> None:
    world = ssp(2, 1)
    assert floors(world, 1, 1, {1: (1, 5), 2: (1, 3)}) == {}, "clock 1 may miss all of clock 0"
    assert floors(world, 2, 1, {1: (1, 6), 2: (1, 2)}) == {}
    # clock 2 reflects every clock <= 0
    assert floors(world, 1, 2, {1: (1, 9), 2: (1, 9)}) == {1: (1, 6), 2: (1, 3)}
    assert floors(world, 2, 2, {1: (1, 8), 2: (2, 1)}) == {1: (1, 6), 2: (1, 3)}
    # clock 3 reflects every clock <= 1; a later epoch is above any lsn of an earlier one
    assert floors(world, 1, 3, {}) == {1: (1, 9), 2: (2, 1)}


def test_floors_of_old_clocks_are_folded() -> None:
    world = ssp(2, 2)
    for finished in range(1, 200):
        for client in (1, 2):
            world.clock(client, finished, {1: (1, finished), 2: (1, finished)})
    group = world.ledger._groups.state[1]
    assert len(group.floors) <= 4
    assert floors(world, 1, 200, {}) == {1: (1, 198), 2: (1, 198)}


def test_a_joiner_starts_at_the_minimum() -> None:
    world = ssp(2, 2)
    for finished in range(1, 6):
        world.clock(1, finished)
        world.clock(2, finished)
    world.clock(1, 6)
    world.join(3)
    opened = world.open(3, spec(mode=lg.MODE_SSP, staleness=2))
    assert opened.position.next_step == 5
    assert world.activity(3, lg.ACTIVITY_ACTIVE).groups[0].next_step == 5
    assert starts(world, 1, 7), "within the bound of the joiner, too"
    assert not starts(world, 1, 8)


@pytest.mark.parametrize("end", ["evict", "leave", "idle", "between"])
def test_who_does_not_train_holds_nobody_back(end: str) -> None:
    world = ssp(2, 0)
    assert not starts(world, 1, 1)
    world.ledger.take_woken()
    getattr(world, end)(2)
    assert ("clock", 1) in world.ledger.take_woken()
    for finished in range(1, 10):
        assert starts(world, 1, finished)


def test_who_comes_back_goes_on_from_the_minimum() -> None:
    world = ssp(2, 1)
    world.idle(2)
    for finished in range(1, 10):
        world.clock(1, finished)
    assert world.activity(2, lg.ACTIVITY_ACTIVE).groups[0].next_step == 9
    with refused("CLOCK") as caught:
        world.clock(2, 1)
    assert caught.value.metadata["clock"] == "9"
    assert starts(world, 2, 10)


def test_a_slow_member_that_opens_its_group_again_stays_where_it_is() -> None:
    world = ssp(2, 2)
    world.clock(1, 1)
    assert world.open(2, spec(mode=lg.MODE_SSP, staleness=2)).position.next_step == 0
    assert starts(world, 2, 1)


def test_after_an_epoch_all_go_on_from_the_furthest() -> None:
    world = ssp(2, 3)
    for finished in range(1, 4):
        world.clock(1, finished)
    world.clock(2, 1)
    world.between(1)
    world.between(2)
    assert world.activity(2, lg.ACTIVITY_ACTIVE).groups[0].next_step == 3
    assert world.activity(1, lg.ACTIVITY_ACTIVE).groups[0].next_step == 3


def test_a_clock_makes_a_member_active() -> None:
    world = ssp(2, 0)
    world.between(2)
    assert not starts(world, 2, 1)
    assert starts(world, 1, 1)
    assert world.status().members[1].activity == lg.ACTIVITY_ACTIVE
    assert not starts(world, 1, 2), "it holds others back again"
    assert [m.clock for m in world.status().members] == [2, 1]


def test_min_workers_pauses_clocks() -> None:
    world = World(start_workers=2, min_workers=2)
    world.workers(2, lg.MODE_SSP, staleness=5)
    assert starts(world, 1, 1)
    world.evict(2)
    assert not starts(world, 1, 2)
    world.join(3)
    assert starts(world, 1, 2)
