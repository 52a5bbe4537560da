"""Servers that beat and make no progress: when that counts, and who leads then (fault row 11)."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from paramesh_coordinator.rows import PartitionState, Ref
from paramesh_coordinator.stalls import Stall, Stalls, demote, resume
from paramesh_coordinator.state import FailedOver, Senses

from tests.unit.coordinator.world import World, table_spec

A, B = Ref("a", 1), Ref("b", 1)


def cluster(names: str = "abc", replicas: int = 2) -> World:
    world = World(min_servers=len(names), replicas=replicas)
    for name in names:
        world.server(name)
    world.table(table_spec(elements=1024))
    return world


def told(stalls: Stalls, seconds: list[float], start: float = 0.0) -> float:
    """Beats half a second apart; the moment of the last."""
    for number, value in enumerate(seconds):
        stalls.note(A, value, "partition 3", start + number / 2)
    return start + (len(seconds) - 1) / 2


def test_two_beats_over_the_limit_are_due_and_one_is_not() -> None:
    stalls = Stalls(8.0, 0.5)
    now = told(stalls, [0.0, 7.9, 8.1])
    assert stalls.due(now) == []
    stalls.note(A, 8.6, "partition 3", now + 0.5)
    assert stalls.due(now + 0.5) == [Stall(A, 8.6, "partition 3")]


def test_a_process_that_was_stopped_as_a_whole_speaks_of_its_past_once() -> None:
    stalls = Stalls(8.0, 0.5)
    now = told(stalls, [0.0, 30.0, 0.0, 0.0])
    assert stalls.due(now) == []


def test_what_is_not_heard_any_more_is_not_due() -> None:
    """Silence is judged elsewhere."""
    stalls = Stalls(8.0, 0.5)
    now = told(stalls, [9.0, 9.5, 10.0])
    assert stalls.due(now + 0.9) != []
    assert stalls.due(now + 1.1) == []


@given(st.lists(st.floats(0.0, 8.0), max_size=60))
def test_work_that_goes_on_is_never_due(beats: list[float]) -> None:
    """However long a server is busy: each piece of its work ends within the limit."""
    stalls = Stalls(8.0, 0.5)
    for number, value in enumerate(beats):
        stalls.note(A, value, "partition 1", number / 2)
        assert stalls.due(number / 2) == []


def test_calm_after_half_a_minute_of_beats() -> None:
    stalls = Stalls(8.0, 0.5)
    told(stalls, [9.0, 9.5, 10.0])
    now = told(stalls, [0.0] * 59, 1.5)
    assert (stalls.due(now), stalls.calm(now)) == ([], [])
    now = told(stalls, [0.0] * 3, now + 0.5)
    assert stalls.calm(now) == [A]
    stalls.forget(A)
    assert stalls.calm(now) == []


def test_what_a_stalled_server_leads_goes_to_followers_and_it_gets_nothing_new() -> None:
    world = cluster()
    led = [row.partition for row in world.partitions() if row.primary == A]
    epochs = {row.partition: row.epoch for row in world.partitions()}
    assert world.do(lambda d: demote(d, Stall(A, 8.5, "partition 1")))
    for row in world.partitions():
        assert row.primary != A
        assert row.state is PartitionState.ONLINE
        assert row.epoch == epochs[row.partition] + (row.partition in led)
        assert A in row.isr or row.partition not in led, "it lives, and may be the only other good copy"
    assert {effect.partition for effect in world.effects if isinstance(effect, FailedOver)} == set(led)
    assert world.servers()[A].draining == "makes no progress: partition 1"
    (event,) = [e for e in world.events() if e.kind == "server_stalled"]
    assert sorted(p for some in json.loads(event.evidence)["promoted"].values() for p in some) == led
    assert not world.do(lambda d: demote(d, Stall(A, 9.0, "partition 1"))), "once"
    assert world.do(lambda d: resume(d, A))
    assert not world.servers()[A].draining
    assert not world.do(lambda d: resume(d, A))


def test_nobody_else_has_it_so_it_stays_and_that_is_said() -> None:
    world = cluster("ab", replicas=1)
    led = [row.partition for row in world.partitions() if row.primary == A]
    before = world.partitions()
    world.do(lambda d: demote(d, Stall(A, 8.5, "the event loop")))
    assert [(r.partition, r.primary, r.epoch) for r in world.partitions()] == [
        (r.partition, r.primary, r.epoch) for r in before
    ]
    (event,) = [e for e in world.events() if e.kind == "server_stalled"]
    assert json.loads(event.evidence)["nobody_else"] == led


def test_neither_one_that_is_silent_nor_one_that_stalls_itself_takes_over() -> None:
    world = cluster("ab")
    world.senses = Senses(fresh=lambda ref: ref.name != "b")
    world.do(lambda d: demote(d, Stall(A, 8.5, "x")))
    assert {row.server for row in world.partitions()} == {"a", "b"}
    world.senses = Senses()
    world.do(lambda d: demote(d, Stall(B, 8.5, "x")))
    assert {row.server for row in world.partitions()} == {"a", "b"}, "each the other's follower, and both stall"
    world.do(lambda d: resume(d, A))
    world.do(lambda d: demote(d, Stall(B, 8.5, "x")))
    assert {row.server for row in world.partitions()} == {"a"}


def test_a_partition_that_failed_over_lately_waits() -> None:
    world = cluster("ab")
    led = [row.partition for row in world.partitions() if row.primary == A]
    world.senses = Senses(held_back=frozenset(led[:1]))
    world.do(lambda d: demote(d, Stall(A, 8.5, "x")))
    assert [row.partition for row in world.partitions() if row.primary == A] == led[:1]
    world.senses = Senses()
    assert world.do(lambda d: demote(d, Stall(A, 9.5, "x")))
    assert not [row.partition for row in world.partitions() if row.primary == A]


def test_an_operators_drain_stays_one() -> None:
    world = cluster("abc")
    world.drain("a")
    world.do(lambda d: demote(d, Stall(A, 8.5, "x")))
    assert world.servers()[A].draining == "a test"
    assert not world.do(lambda d: resume(d, A))
