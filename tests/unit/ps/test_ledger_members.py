"""Joining, ranks, leaving, eviction, starting: protocol section 4."""

from __future__ import annotations

import pytest
from paramesh.errors import ParameshError
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger import Wait

from tests.unit.ps.ledger_world import World, header


def refused(reason: str):  # type: ignore[no-untyped-def]
    """The block raises a typed error of this reason."""
    return pytest.raises(ParameshError, check=lambda error: error.reason == reason)


def ranks(world: World) -> dict[int, int]:
    return {m.client_id: m.rank for m in world.status().members}


def test_ranks_are_the_lowest_free() -> None:
    world = World()
    assert [world.join(c).rank for c in (11, 12, 13)] == [0, 1, 2]
    world.leave(12)
    assert world.join(14).rank == 1
    assert world.join(15).rank == 3


def test_joining_again_keeps_the_rank_and_changes_nothing() -> None:
    world = World()
    world.join(11)
    lsn = world.ledger.lsn
    assert world.join(11, slot="other", rank=9).rank == 0
    assert world.ledger.lsn == lsn


@pytest.mark.parametrize(
    ("slot", "preferred", "expected"),
    [
        ("h/1", None, 1),  # the slot's last rank
        ("new", None, 0),  # no slot known: lowest free
        ("", None, 0),
        ("h/1", 0, 0),  # a wish comes before the slot
        ("h/1", 2, 1),  # taken: the slot's
        ("new", 2, 0),  # taken, no slot known
        ("new", 1_000_000, 0),  # nothing has that many workers
    ],
)
def test_a_rank_is_the_preferred_or_the_slots_last_if_free(slot: str, preferred: int | None, expected: int) -> None:
    world = World()
    for client, name in ((1, "h/0"), (2, "h/1"), (3, "h/2")):
        world.join(client, name)
    world.evict(1)
    world.evict(2)
    assert world.join(4, slot, preferred).rank == expected


def test_an_evicted_client_never_comes_back() -> None:
    world = World()
    world.join(1)
    assert world.evict(1) is True
    assert world.evict(1) is False
    with refused("EVICTED"):
        world.join(1)
    with refused("EVICTED"):
        world.active(1)
    assert world.status().evictions == 1


def test_a_late_join_of_a_client_evicted_before_it_joined_is_refused() -> None:
    world = World()
    assert world.evict(7) is False
    with refused("EVICTED"):
        world.join(7)


def test_leaving_leaves_no_tombstone_and_is_repeatable() -> None:
    world = World()
    world.join(1)
    world.leave(1)
    world.leave(1)
    with refused("NOT_MEMBER"):
        world.active(1)
    assert world.join(1).rank == 0


@pytest.mark.parametrize("activity", [0, 9])
def test_an_unknown_activity_is_refused(activity: int) -> None:
    world = World()
    world.join(1)
    with refused("MISSING_FIELD"):
        world.activity(1, activity)


@pytest.mark.parametrize(("client", "slot", "reason"), [(0, "h/0", "MISSING_FIELD"), (1, "a b\n", "NAME")])
def test_a_join_without_client_or_with_a_bad_slot_is_refused(client: int, slot: str, reason: str) -> None:
    with refused(reason):
        World().join(client, slot)


def test_becoming_active_tells_where_every_group_stands() -> None:
    world = World()
    world.workers(1)
    world.step(0, 1)
    world.step(1, 1)
    world.join(2)
    position = world.activity(2, lg.ACTIVITY_ACTIVE).groups[0]
    assert (position.name, position.next_step, position.last.step) == ("g", 2, 1)
    assert world.waits(1, 2) == (1,), "required from next_step on"


def test_the_job_starts_when_start_workers_have_joined() -> None:
    world = World(start_workers=2)
    assert world.join(1).world_size == 2, "before the start: those that are to be there"
    world.open(1)
    world.active(1)
    assert isinstance(world.lease(1), Wait)
    world.waits(1, 0)
    assert world.status().phase == "waiting for workers (1 of 2 joined)"
    world.ledger.take_woken()
    world.join(2)
    assert ("start",) in world.ledger.take_woken()
    world.idle(2)
    assert world.decided(1, 0).included
    world.leave(2)
    assert world.decided(1, 1).included, "the start is held once, not again"


def test_start_workers_lowered_by_a_new_config_starts_the_job() -> None:
    world = World(start_workers=2, gather_ms=0)
    world.workers(1)
    world.waits(1, 0)
    config = t.JobConfig(start_workers=1)
    world.do(lambda now: world.ledger.update_config(config, now))
    assert world.decided(1, 0).included


def test_min_workers_pauses_later_steps() -> None:
    world = World(start_workers=2, min_workers=2)
    world.workers(2)
    world.step(0, 1, 2)
    world.evict(2)
    world.waits(1, 1)
    assert "paused" in world.status().phase
    world.join(3)
    world.idle(3)
    assert world.decided(1, 1).included


def test_when_the_last_worker_has_left_the_phase_says_so() -> None:
    """Not "no workers", which a reader of a short run takes for a fault."""
    world = World()
    world.workers(1)
    world.leave(1)
    assert world.status().phase == "all workers have left"


def test_status_lists_members_by_rank() -> None:
    world = World()
    world.join(5, "h/0", rank=1)
    world.join(6, "h/1")
    members = world.status().members
    assert [(m.rank, m.client_id, m.slot, m.joined_order) for m in members] == [(0, 6, "h/1", 2), (1, 5, "h/0", 1)]
    assert header(5).client_id == 5
