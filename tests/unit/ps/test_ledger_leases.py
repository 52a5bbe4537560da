"""Data leases: protocol section 4; invariant 20."""

from __future__ import annotations

import sys
import tracemalloc
from typing import Any

import pytest
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger import Wait
from paramesh_server.ledger_deal import Deal, merge

from tests.unit.ps.ledger_world import World, ranges
from tests.unit.ps.test_ledger_members import refused


def chunks(leases: list[t.SampleRange], size: int = 2) -> list[int]:
    """Chunk numbers of leases."""
    return [lease.begin // size for lease in leases]


def finished(world: World, client: int, epoch: int = 0, **fields: Any) -> bool:
    answer = world.lease(client, epoch, **fields)
    assert isinstance(answer, lg.LeaseResponse)
    assert not (answer.finished and answer.leases)
    return answer.finished


# ---------------------------------------------------------------------- dealing


def test_the_ith_lease_of_rank_r_is_chunk_i_times_w_plus_r() -> None:
    world = World()
    world.workers(3)
    assert chunks(world.leased(2, want=2)) == [1, 4]
    assert chunks(world.leased(1)) == [0]
    assert chunks(world.leased(3, want=9)) == [2, 5, 8]
    assert chunks(world.leased(1, want=9)) == [3, 6, 9]
    assert chunks(world.leased(2, want=9)) == [7]


def test_arrival_order_does_not_matter() -> None:
    def dealt(order: list[int]) -> dict[int, list[int]]:
        world = World()
        world.workers(3)
        got: dict[int, list[int]] = {1: [], 2: [], 3: []}
        for client in order:
            got[client] += chunks(world.leased(client))
        return {client: sorted(some) for client, some in got.items()}

    assert dealt([1, 2, 3, 1, 2, 3]) == dealt([3, 3, 2, 2, 1, 1]) == dealt([2, 1, 3, 3, 1, 2])


@pytest.mark.parametrize(
    ("length", "drop_last", "expected"),
    [
        (5, False, [(0, 2), (2, 4), (4, 5)]),
        (5, True, [(0, 2), (2, 4)]),
        (4, True, [(0, 2), (2, 4)]),
        (1, False, [(0, 1)]),
        (1, True, []),
        (0, False, []),
    ],
)
def test_the_last_chunk_may_be_short_or_dropped(length: int, drop_last: bool, expected: list[tuple[int, int]]) -> None:
    world = World()
    world.workers(1)
    answer = world.lease(1, length=length, drop_last=drop_last, want=9)
    assert isinstance(answer, lg.LeaseResponse)
    assert ranges(answer) == expected
    assert answer.finished == (not expected)


def test_a_step_consumes_the_samples_it_names() -> None:
    world = World()
    world.workers(2)
    leases = {c: world.leased(c) for c in (1, 2)}
    world.waits(1, 0, samples=leases[1])
    assert world.status().epochs[0].consumed == 0
    world.decided(2, 0, samples=leases[2])
    assert world.status().epochs[0].consumed == 4
    assert [m.samples for m in world.status().members] == [2, 2]
    with refused("LEASE"):
        world.ready(1, 1, samples=leases[1])


@pytest.mark.parametrize(
    "foreign",
    [
        t.SampleRange(dataset="d", epoch=0, begin=2, end=4),  # another's
        t.SampleRange(dataset="d", epoch=0, begin=4, end=6),  # undealt
        t.SampleRange(dataset="d", epoch=0, begin=0, end=1),  # no whole chunk
        t.SampleRange(dataset="d", epoch=0, begin=1, end=2),
        t.SampleRange(dataset="d", epoch=1, begin=0, end=2),
        t.SampleRange(dataset="x", epoch=0, begin=0, end=2),
    ],
)
def test_foreign_ranges_are_refused(foreign: t.SampleRange) -> None:
    world = World()
    world.workers(2)
    world.leased(1)
    world.leased(2)
    with refused("LEASE"):
        world.ready(1, 0, samples=[foreign])


@pytest.mark.parametrize(
    ("begin", "end", "reason"),
    [
        (0, 0, "SAMPLE_RANGE"),
        (2, 0, "SAMPLE_RANGE"),
        (0, 2**62, "SAMPLE_OUT_OF_RANGE"),
        (100, 102, "SAMPLE_OUT_OF_RANGE"),
    ],
)
def test_ranges_that_are_none_are_refused(begin: int, end: int, reason: str) -> None:
    """Row 56 of the input matrix."""
    world = World()
    world.workers(2)
    world.lease(1)
    with refused(reason):
        world.ready(1, 0, samples=[t.SampleRange(dataset="d", epoch=0, begin=begin, end=end)])


def test_a_range_named_twice_is_refused() -> None:
    world = World()
    world.workers(1)
    lease = world.leased(1)
    with refused("LEASE"):
        world.ready(1, 0, samples=lease + lease)


def test_adjacent_chunks_may_be_named_as_one_range() -> None:
    world = World()
    world.workers(1)
    world.leased(1, want=2)
    world.decided(1, 0, samples=[t.SampleRange(dataset="d", begin=0, end=4)])
    assert world.status().epochs[0].consumed == 4


@pytest.mark.parametrize("changed", [{"length": 21}, {"chunk": 4}, {"seed": 1}, {"drop_last": True}])
def test_other_terms_are_refused(changed: dict[str, Any]) -> None:
    world = World()
    world.workers(2)
    world.leased(1)
    with refused("SCHEMA"):
        world.lease(2, **changed)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"chunk": 0}, "MISSING_FIELD"), ({"dataset": "a b"}, "NAME"), ({"length": 2**63, "chunk": 1}, "QUOTA")],
)
def test_bad_requests_are_refused(fields: dict[str, Any], reason: str) -> None:
    world = World()
    world.workers(1)
    with refused(reason):
        world.lease(1, **fields)


def test_a_lost_answer_is_repeated_by_its_call_number() -> None:
    world = World()
    world.workers(2)
    first = world.lease(1, want=2, call=1)
    assert world.lease(1, want=2, call=1) == first
    assert world.lease(1, want=2, call=2) != first
    other = world.lease(2, call=1)
    assert isinstance(other, lg.LeaseResponse)
    assert ranges(other) == [(2, 4)], "calls are counted by each member"


def test_leases_carry_which_membership_they_are_of() -> None:
    world = World()
    world.workers(2)
    answer = world.lease(2)
    assert isinstance(answer, lg.LeaseResponse)
    assert answer.lease_epoch == 2
    world.leave(2)
    world.join(2)
    answer = world.lease(2)
    assert isinstance(answer, lg.LeaseResponse)
    assert answer.lease_epoch == 3
    assert answer.between


# ---------------------------------------------------------------------- membership


@pytest.mark.parametrize("end", ["evict", "leave"])
def test_what_a_dead_worker_held_is_dealt_anew_with_what_is_left(end: str) -> None:
    world = World()
    world.workers(3)
    world.leased(1)  # 0
    held = world.leased(2, want=2)  # 1, 4
    world.leased(3)  # 2
    getattr(world, end)(2)
    # left: 1, 3..9 in order, to two members
    assert chunks(world.leased(3, want=9)) == [3, 5, 7, 9]
    assert chunks(world.leased(1, want=9)) == [1, 4, 6, 8]
    assert chunks(held) == [1, 4]


def test_samples_of_an_undecided_contribution_return_with_its_worker() -> None:
    world = World()
    world.workers(2)
    lease = world.leased(2)
    world.waits(2, 0, samples=lease)
    world.evict(2)
    assert lease[0] in world.leased(1, want=99)


def test_samples_of_a_decided_step_do_not_return() -> None:
    world = World()
    world.workers(2)
    lease = world.leased(2)
    world.waits(2, 0, samples=lease)
    world.decided(1, 0)
    world.evict(2)
    assert lease[0] not in world.leased(1, want=99)


def test_a_joiner_gets_its_share_of_what_is_left() -> None:
    world = World()
    world.workers(1)
    assert chunks(world.leased(1, want=2)) == [0, 1]
    world.join(2)
    assert chunks(world.leased(2, want=9)) == [3, 5, 7, 9]
    assert chunks(world.leased(1, want=9)) == [2, 4, 6, 8]


def test_an_idle_member_gets_no_share_until_it_asks() -> None:
    world = World()
    world.workers(2)
    world.leased(1)
    world.idle(2)
    assert chunks(world.leased(1, want=3)) == [1, 2, 3]
    world.active(2)
    assert chunks(world.leased(2, want=2)) == [5, 7]
    assert chunks(world.leased(1, want=1)) == [4]


def test_an_idle_member_may_evaluate_alone() -> None:
    world = World()
    world.workers(2)
    world.idle(2)
    got = world.leased(2, dataset="val", want=3)
    assert len(got) == 3
    answer = world.lease(2, dataset="val", want=99, wait=True)
    assert isinstance(answer, lg.LeaseResponse)
    assert world.status().members[1].activity == lg.ACTIVITY_IDLE, "steps must not start to wait for it"


def test_a_share_that_nobody_comes_for_is_dealt_to_who_waits() -> None:
    world = World()
    world.workers(2)  # client 2 trains, but never evaluates
    mine = world.leased(1, dataset="val", want=99)
    assert chunks(mine) == [0, 2, 4, 6, 8]
    waiting = world.lease(1, dataset="val", wait=True, delivered=mine)
    assert isinstance(waiting, Wait)
    assert waiting.who() == (1,)
    world.ledger.take_woken()
    world.pass_time(2.0)
    assert waiting.key in world.ledger.take_woken()
    rest = world.leased(1, dataset="val", want=99, wait=True)
    assert chunks(rest) == [1, 3, 5, 7, 9]
    assert finished(world, 1, dataset="val", wait=True, delivered=mine + rest)


def test_a_slow_member_that_does_lease_keeps_its_share() -> None:
    world = World()
    world.workers(2)
    theirs = world.leased(2)
    mine = world.leased(1, want=99)
    world.lease(1, wait=True, delivered=mine)
    world.pass_time(1000)
    assert isinstance(world.lease(1, wait=True, delivered=mine), Wait)
    assert chunks(theirs + world.leased(2, want=99)) == [1, 3, 5, 7, 9]


# ---------------------------------------------------------------------- arithmetic and speed


def test_what_is_left_of_a_deal_is_exact() -> None:
    deal = Deal([(0, 4), (10, 17)], 3)
    taken = deal.take(0, 1) + deal.take(2, 3)
    assert taken == [0, 2, 11, 14]
    assert deal.left == 7
    assert deal.remaining() == [(1, 2), (3, 4), (10, 11), (12, 14), (15, 17)]
    assert [deal.available(position) for position in range(3)] == [3, 4, 0]
    assert deal.take(2, 1) == []


@pytest.mark.parametrize(
    ("runs", "singles", "expected"),
    [
        ([], [], []),
        ([(0, 2), (5, 6)], [3, 2, 9], [(0, 4), (5, 6), (9, 10)]),
        ([(3, 5)], [2, 5], [(2, 6)]),
    ],
)
def test_runs_merge(runs: list[tuple[int, int]], singles: list[int], expected: list[tuple[int, int]]) -> None:
    assert merge(runs, singles) == expected


def work_of_leases(length: int) -> tuple[int, int]:
    """How many functions 2000 leases of an epoch call, and the most bytes they hold meanwhile."""
    world = World()
    world.check = False
    world.workers(4)
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        for number in range(2000):
            assert world.leased(1 + number % 4, length=length, chunk=1)
            if number % 500 == 499:
                world.evict(90 + number)  # deals anew
                world.join(100 + number)
    finally:
        sys.setprofile(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return calls, peak


def test_a_million_chunks_cost_no_more_each_than_ten_thousand() -> None:
    """Operations, not seconds: one pass over a million chunks is a million calls or megabytes."""
    calls, peak = work_of_leases(10_000)
    more_calls, higher_peak = work_of_leases(1_000_000)
    assert more_calls < 1.2 * calls
    assert higher_peak < peak + (1 << 18)
