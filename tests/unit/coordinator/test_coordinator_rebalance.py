"""The balancer: it ends, evens out, never oscillates, and keeps every rule of placement."""

from __future__ import annotations

import dataclasses
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh_coordinator.balance import Load
from paramesh_coordinator.rates import Rates
from paramesh_coordinator.rebalance import Move, Placed, empty, is_uneven, rebalance
from paramesh_coordinator.rows import Ref

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
            rate=sum(p.rate for p in placed if p.primary == name),
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
        placed.append(Placed(number, size, holders[0], tuple(holders[1:]), fixed=fixed))
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


# --- requests ---


@st.composite
def busy_clusters(draw: st.DrawFn) -> tuple[str, list[Placed]]:
    """As `clusters`, each partition with requests a second of its own."""
    names, placed = draw(clusters())
    rates = st.sampled_from([0, 1, 100, 400, 400, 2500])
    return names, [dataclasses.replace(p, rate=draw(rates)) for p in placed]


def rates_of(placed: list[Placed], names: str) -> list[int]:
    return [sum(p.rate for p in placed if p.primary == name) for name in names]


@given(busy_clusters())
@settings(max_examples=300, deadline=None)
def test_plans_for_requests_end_and_leave_bytes_as_they_have_to_be(cluster: tuple[str, list[Placed]]) -> None:
    """It converges, never oscillates, and what bytes need is never undone for requests."""
    names, placed = cluster
    for _ in range(3 * ROUNDS):
        loads = loads_of(names, placed)
        lead, hold = [load.nbytes for load in loads], [load.total for load in loads]
        plan = rebalance(placed, loads)
        if not plan:
            break
        after = carried_out(placed, plan)
        squared = sum(rate**2 for rate in rates_of(after, names))
        if not is_uneven(lead) and not is_uneven(hold):
            assert squared < sum(rate**2 for rate in rates_of(placed, names)), "requests are worse, bytes had no need"
        now = loads_of(names, after)
        assert not is_uneven([load.nbytes for load in now]) or is_uneven(lead), "even bytes became uneven"
        placed = after
    assert rebalance(placed, loads_of(names, placed)) == []


def test_a_hot_partition_leaves_the_server_that_has_two() -> None:
    placed = [Placed(1, 10, "a", ("b",), 3000), Placed(2, 10, "a", ("b",), 3000), Placed(3, 10, "b", ("a",), 10),
              Placed(4, 10, "b", ("a",), 10)]  # fmt: skip
    plan = rebalance(placed, loads_of("ab", placed))
    assert [(m.source, m.swap) for m in plan] == [("a", True), ("b", True)], "in exchange for a cool one of its size"
    assert plan[0].why == "a serves 6000 requests/s, b 20"
    assert rates_of(carried_out(placed, plan), "ab") == [3010, 3010]
    many = [Placed(n, 10, "ab"[n > 9], ("ba"[n > 9],), 300 * (n < 10)) for n in range(20)]
    assert rebalance(many, loads_of("ab", many))[0].swap


def test_few_requests_move_nothing() -> None:
    placed = [Placed(n, 10, "a" if n < 2 else "b", (), 400 if n < 2 else 0) for n in range(4)]
    assert rebalance(placed, loads_of("ab", placed)) == []


def test_bytes_come_before_requests() -> None:
    """One partition is most of the requests and most of the bytes: there is nothing to gain."""
    placed = [Placed(1, 100, "a", ("b",), 5000), Placed(2, 100, "b", ("a",), 10)]
    assert rebalance(placed, loads_of("ab", placed)) == []


def test_a_reason_says_what_is_uneven() -> None:
    placed = [Placed(n, 10, "a") for n in range(4)]
    assert {m.why for m in rebalance(placed, loads_of("ab", placed))} == {"a leads 40 B, b 0", "a leads 30 B, b 10"}


# --- rates ---


A, B = Ref("a", 1), Ref("b", 1)


def feed(
    rates: Rates, ref: Ref, per_second: int, seconds: int, start: float = 0.0, count: int = 0
) -> tuple[float, int]:
    """Beats of half a second; the moment and the count of the last."""
    for beat in range(2 * seconds + 1):
        rates.note(ref, [(1, count + per_second * beat // 2)], start + beat / 2)
    return start + seconds, count + per_second * seconds


def test_rates_are_known_after_ten_seconds_and_survive_a_change_of_primary() -> None:
    rates = Rates()
    feed(rates, A, 300, 9)
    assert rates.by_partition() == {}
    now, _ = feed(rates, A, 300, 12)
    assert rates.by_partition() == {1: 300}
    feed(rates, B, 500, 9, now)
    assert rates.by_partition() == {1: 300}, "the new primary's counts begin anew"
    feed(rates, B, 500, 12, now)
    assert rates.by_partition() == {1: 500}
    feed(rates, B, 500, 12, now + 20, 5)
    assert rates.by_partition() == {1: 500}, "a count that falls is another process's"


def test_what_stops_being_asked_for_is_forgotten() -> None:
    rates = Rates()
    now, count = feed(rates, A, 300, 20)
    feed(rates, A, 0, 21, now, count)
    assert rates.by_partition() == {}


def test_uneven_for_half_a_minute_is_due_once_a_minute() -> None:
    rates, due = Rates(), []
    count = 0
    for second in range(200):
        count += 4000
        rates.note(A, [(1, count)], float(second))
        if rates.due({1: A}, [A, B], float(second)):
            due.append(second)
            rates.planned(float(second))
    # Known after 10 s, uneven for 30; then a minute of rest.
    assert due == [40, 100, 160]


def test_a_burst_is_not_due_nor_what_is_even_nor_a_single_server() -> None:
    rates = Rates()
    count = 0
    for second in range(200):
        count += 4000 if second % 50 < 15 else 0
        rates.note(A, [(1, count)], float(second))
        assert not rates.due({1: A}, [A, B], float(second))
    for second in range(200, 300):
        count += 4000
        rates.note(A, [(1, count), (2, count)], float(second))
        assert not rates.due({1: A, 2: B}, [A, B], float(second))
        assert not rates.due({1: A, 2: A}, [A], float(second))
