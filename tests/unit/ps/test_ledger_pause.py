"""The pause of a checkpoint of level `aligned`: who is held, when it is quiet, how it ends."""

from __future__ import annotations

import pytest
from paramesh.errors import ParameshError
from paramesh.v1 import ledger_pb2 as lg
from paramesh_server.ledger import Wait
from paramesh_server.ledger_pause import PAUSE_S

from tests.unit.ps.ledger_world import World


def training(mode: int = lg.MODE_ASYNC, count: int = 2) -> World:
    world = World(start_workers=count)
    world.workers(count, mode=mode, **({"staleness": 1} if mode == lg.MODE_SSP else {}))
    return world


def pause(world: World, checkpoint: str = "c") -> tuple[bool, tuple[int, ...]]:
    return world.do(lambda now: world.ledger.pause_clocks(checkpoint, now))


def resume(world: World, checkpoint: str = "c") -> tuple[bool, list[int]]:
    return world.do(lambda now: world.ledger.resume_clocks(checkpoint, now))


def test_it_is_quiet_when_every_active_member_has_finished_a_clock() -> None:
    world = training()
    assert pause(world) == (False, (0, 1))
    assert isinstance(world.clock(1, 1), Wait)
    assert pause(world) == (False, (1,))
    assert isinstance(world.clock(2, 1), Wait)
    assert pause(world) == (True, ())
    assert resume(world) == (True, [])
    answers = [world.clock(client, 1) for client in (1, 2)]
    assert [(a.checkpoint, a.chief) for a in answers] == [("c", True), ("c", False)]
    assert world.clock(1, 2).checkpoint == "", "the next clock is none of it"


def test_who_waits_for_the_slowest_is_between_clocks_too() -> None:
    world = training(lg.MODE_SSP)
    world.clock(1, 1)
    assert isinstance(world.clock(1, 2), Wait), "staleness 1"
    pause(world)
    assert ("clock", 1) in world.ledger.take_woken(), "it asks again, and is held"
    assert isinstance(world.clock(1, 2), Wait)
    assert pause(world) == (False, (1,))


def test_nobody_begins_in_a_pause() -> None:
    world = training(count=1)
    world.join(7)
    pause(world)
    world.clock(1, 1)
    with pytest.raises(ParameshError) as caught:
        world.active(7)
    assert caught.value.reason == "NOT_READY"
    assert isinstance(world.lease(7), Wait)
    assert resume(world) == (True, [])
    world.active(7)


def test_who_is_evicted_in_the_middle_of_a_clock_is_named() -> None:
    world = training(count=3)
    pause(world)
    world.clock(1, 1)
    world.clock(2, 1)
    world.evict(2)
    world.evict(3)
    assert pause(world) == (True, ())
    assert resume(world) == (True, [3]), "2 was between two clocks"


def test_a_pause_ends_by_itself_and_is_not_whole() -> None:
    world = training()
    pause(world)
    world.clock(1, 1)
    world.pass_time(PAUSE_S + 1)
    assert not isinstance(world.clock(1, 1), Wait)
    assert resume(world) == (False, [])
    assert any("given up" in line for line in world.ledger.take_notices())


def test_a_new_primary_of_the_ledger_knows_of_no_pause() -> None:
    world = training(count=1)
    pause(world)
    world.clock(1, 1)
    world.promote()
    assert world.clock(1, 1).checkpoint == ""
    assert resume(world) == (False, [])


def test_a_restored_group_goes_on_from_the_furthest_clock() -> None:
    world = training()
    for clock in (1, 2, 3):
        world.clock(1, clock)
    world.clock(2, 1)
    world.restore()
    world.join(11)
    world.join(12)
    world.active(11)
    assert world.ledger.join(lg.JoinRequest(request={"client_id": 11}), world.now).groups[0].next_step == 3
    assert not isinstance(world.clock(11, 4), Wait)
