"""Opening groups and first values: protocol sections 3 and 4."""

from __future__ import annotations

from typing import Any

import pytest
from paramesh.v1 import ledger_pb2 as lg
from paramesh_server.ledger import Wait

from tests.unit.ps.ledger_world import World, spec
from tests.unit.ps.test_ledger_members import refused


def test_groups_are_numbered_from_one_by_name() -> None:
    world = World()
    world.join(1)
    world.join(2)
    assert [world.open(c, spec(n)).group for c, n in ((1, "a"), (2, "b"), (2, "a"))] == [1, 2, 1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["w", "c"], "c"),  # another name
        (["w"], "b"),  # one is missing here
        (["w", "b", "x"], "x"),  # one too many here
        (["b", "w"], "b"),  # other order
    ],
)
def test_another_structure_names_the_first_tensor_that_differs(names: list[str], expected: str) -> None:
    world = World()
    world.join(1)
    world.open(1, spec())
    with refused("TENSOR_MISMATCH") as caught:
        world.open(1, spec(structure_digest=b"x", tensor_names=names))
    assert caught.value.metadata["tensor"] == expected


def test_equal_names_with_another_digest_is_a_mismatch_too() -> None:
    world = World()
    world.join(1)
    world.open(1)
    with refused("TENSOR_MISMATCH"):
        world.open(1, spec(structure_digest=b"x"))


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": lg.MODE_LOCAL},
        {"staleness": 3},
        {"every": 2},
        {"backup_workers": 1},
        {"loss_reduction": 2},
        {"max_grad_norm": 1.0},
        {"partitions": [1, 2, 3]},
    ],
)
def test_other_ways_to_train_are_refused(fields: dict[str, Any]) -> None:
    world = World()
    world.join(1)
    world.open(1)
    with refused("SCHEMA"):
        world.open(1, spec(**fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mode": 0}, "MISSING_FIELD"),
        ({"name": "a/../b"}, "NAME"),
        ({"structure_digest": b""}, "MISSING_FIELD"),
        ({"max_grad_norm": float("nan")}, "HYPER_PARAMETER"),
        ({"max_grad_norm": -1.0}, "HYPER_PARAMETER"),
        ({"max_grad_norm": 1.0, "partitions": []}, "MISSING_FIELD"),
    ],
)
def test_a_bad_spec_is_refused(fields: dict[str, Any], reason: str) -> None:
    world = World()
    world.join(1)
    with refused(reason):
        world.open(1, spec(**fields))


def test_only_members_open_groups_and_unknown_ones_are_refused() -> None:
    world = World()
    with refused("NOT_MEMBER"):
        world.open(1)
    world.join(1)
    with refused("UNKNOWN_GROUP"):
        world.await_init(1, group=4)
    with refused("UNKNOWN_GROUP"):
        world.ready(1, 0, group=4)


def owner(world: World, client: int) -> tuple[bool, int]:
    answer = world.await_init(client)
    assert isinstance(answer, lg.AwaitInitResponse)
    return answer.owner, answer.init_attempt


def two_workers() -> World:
    world = World(start_workers=2)
    for client in (1, 2):
        world.join(client)
        world.open(client)
    return world


def test_the_lowest_rank_sets_first_values_whoever_asks_first() -> None:
    world = two_workers()
    waiting = world.await_init(2)
    assert isinstance(waiting, Wait)
    assert waiting.who() == (0,)
    assert owner(world, 1) == (True, 1)
    assert owner(world, 1) == (True, 1), "the owner that asks again stays the owner, same attempt"
    assert isinstance(world.await_init(2), Wait)
    world.commit_init(1, 1)
    assert owner(world, 2) == (False, 1)
    assert world.open(2).initialised


def test_a_lower_rank_that_does_not_ask_is_not_waited_for_for_ever() -> None:
    world = two_workers()
    world.await_init(2)
    world.pass_time(20)  # ten gathers: models are built and compiled before
    assert owner(world, 2) == (True, 1)


def test_an_idle_lower_rank_is_not_waited_for() -> None:
    world = two_workers()
    world.await_init(2)
    world.idle(1)
    assert owner(world, 2) == (True, 1)


def test_first_values_wait_for_start_workers() -> None:
    world = World(start_workers=2)
    world.join(1)
    world.open(1)
    answer = world.await_init(1)
    assert isinstance(answer, Wait)
    assert answer.key == ("start",)


@pytest.mark.parametrize("end", ["evict", "leave"])
def test_the_next_rank_starts_over_when_the_owner_goes(end: str) -> None:
    world = two_workers()
    world.await_init(2)
    owner(world, 1)
    world.ledger.take_woken()
    getattr(world, end)(1)
    assert ("init", 1) in world.ledger.take_woken()
    assert owner(world, 2) == (True, 2)
    with refused("EVICTED" if end == "evict" else "NOT_MEMBER"):
        world.commit_init(1, 1)
    world.commit_init(2, 2)
    world.commit_init(2, 2)


def test_only_the_owner_commits_and_only_its_attempt() -> None:
    world = two_workers()
    owner(world, 1)
    with refused("INITIALISING"):
        world.commit_init(2, 1)
    with refused("INITIALISING"):
        world.commit_init(1, 2)
    assert not world.status().groups[0].initialised
    world.commit_init(1, 1)
    assert world.status().groups[0].initialised


def test_an_owner_that_goes_after_the_commit_changes_nothing() -> None:
    world = two_workers()
    owner(world, 1)
    world.commit_init(1, 1)
    world.evict(1)
    assert owner(world, 2) == (False, 1)
