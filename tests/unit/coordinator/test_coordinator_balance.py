"""Placement: even by bytes, stable, within capacities."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paramesh.errors import ParameshError
from paramesh_coordinator.balance import Load, follower, place, place_replicas

MIB = 1 << 20


def spread(sizes: list[int], placed: list[str], loads: list[Load]) -> dict[str, int]:
    held = Counter({load.name: load.nbytes for load in loads})
    for size, name in zip(sizes, placed, strict=True):
        held[name] += size
    return dict(held)


@pytest.mark.parametrize(
    ("sizes", "servers", "expected"),
    [
        ([10], 1, [10]),
        ([10, 10], 2, [10, 10]),
        ([32] * 7, 3, [96, 64, 64]),
        ([100, 60, 50, 10], 2, [110, 110]),
        ([], 2, [0, 0]),
    ],
)
def test_bytes_end_up_even(sizes: list[int], servers: int, expected: list[int]) -> None:
    loads = [Load(f"s{n}") for n in range(servers)]
    held = spread(sizes, place(sizes, loads), loads)
    assert sorted(held.values(), reverse=True) == expected


def test_what_is_there_already_counts() -> None:
    assert place([10, 10, 10], [Load("a", nbytes=20, partitions=2), Load("b")]) == ["b", "b", "a"]


def test_a_lone_table_goes_beside_the_ledger_not_onto_it() -> None:
    assert place([10], [Load("a", partitions=1), Load("b")]) == ["b"]


def test_capacity_is_respected_and_its_end_is_a_clear_error() -> None:
    loads = [Load("a", capacity=10), Load("b", capacity=25)]
    assert place([10, 10, 10], loads) == ["a", "b", "b"]
    with pytest.raises(ParameshError, match="no server has room") as caught:
        place([10, 10, 10, 10], loads)
    assert caught.value.reason == "QUOTA"


def test_nobody_to_place_on_is_a_bug() -> None:
    with pytest.raises(ValueError, match="no servers"):
        place([1], [])


LOADS = st.lists(st.tuples(st.integers(0, 64 * MIB), st.integers(0, 9)), min_size=1, max_size=9).map(
    lambda rows: [Load(f"s{n}", nbytes, count) for n, (nbytes, count) in enumerate(rows)]
)


@given(st.lists(st.integers(0, 32 * MIB), max_size=60), LOADS)
def test_nobody_gets_more_while_another_has_room_for_it(sizes: list[int], loads: list[Load]) -> None:
    """Even: whoever got something has at most the largest partition more than the emptiest."""
    placed = place(sizes, loads)
    held = spread(sizes, placed, loads)
    got = {held[name] for name in placed}
    if got:
        assert max(got) - min(held.values()) <= max(sizes)


@given(st.lists(st.integers(0, 32 * MIB), max_size=40), LOADS, st.randoms(use_true_random=False))
def test_the_answer_does_not_depend_on_the_order_of_servers(sizes: list[int], loads: list[Load], rng: object) -> None:
    shuffled = list(loads)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert place(sizes, shuffled) == place(sizes, loads)


@given(st.integers(1, 200), st.integers(1, 16))
def test_equal_partitions_are_dealt_out_equally(count: int, servers: int) -> None:
    placed = Counter(place([4 * MIB] * count, [Load(f"s{n}") for n in range(servers)]))
    assert max(placed.values()) - min(placed.get(f"s{n}", 0) for n in range(servers)) <= 1


# --- replicas ---


@given(st.lists(st.integers(0, 32 * MIB), max_size=40), st.integers(1, 4), LOADS)
def test_replicas_are_on_different_servers_and_primaries_as_without_them(
    sizes: list[int], replicas: int, loads: list[Load]
) -> None:
    placed = place_replicas(sizes, replicas, loads)
    assert [names[0] for names in placed] == place(sizes, loads)
    for names in placed:
        assert len(set(names)) == len(names) == min(replicas, len(loads))


@given(st.integers(1, 120), st.integers(2, 9), st.integers(2, 4))
def test_equal_replicas_are_dealt_out_evenly(count: int, servers: int, replicas: int) -> None:
    placed = place_replicas([4 * MIB] * count, replicas, [Load(f"s{n}") for n in range(servers)])
    held = Counter(name for names in placed for name in names)
    assert max(held.values()) - min(held.get(f"s{n}", 0) for n in range(servers)) <= 2


def test_followers_go_to_another_host_where_there_is_a_choice() -> None:
    loads = [Load("a", host="x"), Load("b", host="x"), Load("c", host="y", nbytes=1000)]
    assert place_replicas([10, 10], 2, loads[:2]) == [("a", "b"), ("b", "a")]
    assert place_replicas([10, 10], 2, loads) == [("a", "c"), ("b", "c")]
    assert [names[2] for names in place_replicas([10, 10], 3, loads)] == ["b", "a"]


def test_full_servers_take_no_follower_and_no_room_of_a_primary_is_used() -> None:
    loads = [Load("a", capacity=10), Load("b", capacity=25)]
    assert place_replicas([10, 10, 10], 2, loads) == [("a",), ("b",), ("b",)]


def test_arithmetic_must_be_the_same() -> None:
    loads = [Load("a", kind=b"x"), Load("b", kind=b"y"), Load("c", kind=b"x", nbytes=99)]
    assert place_replicas([10], 2, loads) == [("a", "c")]
    assert follower(10, loads[1:2], loads) is None


def test_who_is_to_be_avoided_is_the_last_choice() -> None:
    loads = [Load("a"), Load("b"), Load("c", nbytes=99)]
    assert follower(1, loads[:1], loads, avoid={"b"}) == loads[2]
    assert follower(1, loads[:1], loads[:2], avoid={"b"}) == loads[1]
