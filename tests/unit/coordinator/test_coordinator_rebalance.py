"""The balancer: it ends, evens out, never oscillates, and keeps every rule of placement."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh_coordinator.balance import Load
from paramesh_coordinator.rebalance import Move, Placed, empty, is_uneven, rebalance

ROUNDS = 12
"""Plans of which each moves a partition at most once: as many as it may take, with room."""


def loads_of(names: str, placed: list[Placed], capacity: int = 0, hosts: str = "") -> list[Load]:
    """What each server holds."""
    return [
        Load(
            name,
            sum(p.nbytes for p in placed if p.primary == name),
            sum(name in p.holders for p in placed),
            capacity,
            sum(p.nbytes for p in placed if name in p.followers),
            hosts[i] if hosts else name,
        )
        for i, name in enumerate(names)
    ]


def carried_out(placed: list[Placed], plan: list[Move]) -> list[Placed]:
    """The places when all of a plan is done."""
    by_partition = {move.partition: move for move in plan}
    return [p.after(by_partition[p.partition]) if p.partition in by_partition else p for p in placed]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[str, list[Placed]]:
    """Servers, and partitions wherever they may be."""
    names = "abcdef"[: draw(st.integers(1, 6))]
    placed = []
    for number in range(draw(st.integers(0, 30))):
        holders = draw(st.permutations(names))[: draw(st.integers(1, min(3, len(names))))]
        size = draw(st.sampled_from([0, 1, 10, 10, 10, 32, 32, 100]))
        fixed = draw(st.integers(0, 9)) == 0
        placed.append(Placed(number, size, holders[0], tuple(holders[1:]), fixed))
    return names, placed


def squares(placed: list[Placed], names: str) -> tuple[int, int]:
    """What every plan makes smaller: of primaries' bytes, then of all."""
    loads = loads_of(names, placed)
    return sum(load.nbytes**2 for load in loads), sum(load.total**2 for load in loads)


@given(clusters())
@settings(max_examples=300, deadline=None)
def test_plans_end_in_an_empty_one_and_each_is_better(cluster: tuple[str, list[Placed]]) -> None:
    names, placed = cluster
    for _ in range(ROUNDS):
        plan = rebalance(placed, loads_of(names, placed))
        assert plan == rebalance(list(reversed(placed)), loads_of(names, placed)[::-1]), "not deterministic"
        if not plan:
            return
        before = squares(placed, names)
        placed = carried_out(placed, plan)
        assert squares(placed, names) < before
    raise AssertionError("it goes on and on")


@given(clusters())
@settings(max_examples=300, deadline=None)
def test_every_move_keeps_the_rules(cluster: tuple[str, list[Placed]]) -> None:
    names, placed = cluster
    plan = rebalance(placed, loads_of(names, placed))
    by_number = {p.partition: p for p in placed}
    assert all(count == 1 for count in Counter(move.partition for move in plan).values()), "moved twice"
    for move in plan:
        part = by_number[move.partition]
        assert not part.fixed
        assert move.source in part.holders
        if move.swap:
            assert (part.primary, move.target in part.followers) == (move.source, True)
        else:
            assert move.target not in part.holders, "two replicas on one server"
        assert len(set(part.after(move).holders)) == len(part.holders)


@given(clusters())
@settings(max_examples=300, deadline=None)
def test_what_is_left_uneven_no_single_move_mends(cluster: tuple[str, list[Placed]]) -> None:
    names, placed = cluster
    for _ in range(ROUNDS):
        placed = carried_out(placed, rebalance(placed, loads_of(names, placed)))
    loads = {load.name: load.nbytes for load in loads_of(names, placed)}
    if not is_uneven(list(loads.values())):
        return
    mean = sum(loads.values()) / len(loads)
    for part in placed:
        for target in names:
            gap = loads[part.primary] - loads[target]
            if loads[part.primary] > 1.2 * mean or loads[target] < 0.8 * mean:
                assert part.fixed or not 0 < part.nbytes < gap, (part, target, loads)


@given(clusters(), st.sets(st.sampled_from("abcdef")))
@settings(max_examples=300, deadline=None)
def test_draining_servers_are_emptied_as_far_as_can_be(cluster: tuple[str, list[Placed]], draining: set[str]) -> None:
    names, placed = cluster
    stay = [name for name in names if name not in draining]
    for _ in range(len(names) + 1):
        plan = empty(placed, loads_of(names, placed), draining)
        assert not {move.target for move in plan} & draining
        placed = carried_out(placed, plan)
    assert empty(placed, loads_of(names, placed), draining) == []
    for part in placed:
        left = [name for name in part.holders if name in draining]
        if left and not part.fixed:
            assert set(stay) <= set(part.holders), "somebody could have taken it"
            assert part.primary in stay or not stay, "led where it drains, although others have it"


def test_capacity_is_kept() -> None:
    placed = [Placed(n, 10, "a") for n in range(6)]
    loads = [*loads_of("a", placed), Load("b", capacity=20, host="b"), Load("c", capacity=5, host="c")]
    plan = rebalance(placed, loads)
    assert [(m.source, m.target) for m in plan] == [("a", "b"), ("a", "b")]


def test_other_arithmetic_takes_nothing() -> None:
    placed = [Placed(n, 10, "a") for n in range(6)]
    assert rebalance(placed, [*loads_of("a", placed), Load("b", kind=b"other")]) == []


def test_a_new_server_gets_its_share_with_the_fewest_moves() -> None:
    placed = [Placed(n, 10, "ab"[n % 2]) for n in range(12)]
    plan = rebalance(placed, loads_of("abc", placed))
    assert Counter(move.source for move in plan) == {"a": 2, "b": 2}
    assert {move.target for move in plan} == {"c"}


def test_primaries_that_others_have_in_sync_only_change_the_lead() -> None:
    placed = [Placed(n, 10, "a", ("b",)) for n in range(4)]
    plan = rebalance(placed, loads_of("ab", placed))
    assert plan == [Move(0, "a", "b", swap=True), Move(1, "a", "b", swap=True)]


def test_two_replicas_do_not_meet_on_one_machine_for_evenness() -> None:
    placed = [Placed(n, 10, "a", ("b",)) for n in range(8)]
    loads = loads_of("abc", placed, hosts="xyy")
    plan = rebalance(placed, loads)
    assert all((move.source, move.target) != ("a", "c") for move in plan), "b and c are one machine"


def test_a_drain_prefers_a_machine_without_a_replica() -> None:
    placed = [Placed(0, 10, "a", ("b",))]
    (move,) = empty(placed, loads_of("abcd", placed, hosts="xyyz"), {"a"})
    assert (move.source, move.target, move.swap) == ("a", "d", False)


def test_a_drain_with_nowhere_to_go_hands_over_the_lead() -> None:
    placed = [Placed(0, 10, "a", ("b",)), Placed(1, 10, "b", ("a",)), Placed(2, 10, "a")]
    plan = empty(placed, loads_of("ab", placed), {"a"})
    assert sorted((m.partition, m.target, m.swap) for m in plan) == [(0, "b", True), (2, "b", False)]
