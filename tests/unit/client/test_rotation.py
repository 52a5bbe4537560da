"""Whom to ask next: quickly through a round, at once where a standby points, never in a hot loop."""

from __future__ import annotations

from paramesh.errors import ParameshError, refuse
from paramesh.rotation import CAP_S, NEXT_S, Rotation, elsewhere

AWAY = refuse("UNREACHABLE", "nobody there")


def standby(leader: str) -> ParameshError:
    return refuse("NOT_READY", "stands by", leader=leader)


def test_a_round_is_quick_and_rounds_back_off() -> None:
    turns = Rotation("a:1, b:2,c:3,")
    waits = [turns.failed(AWAY) for _ in range(30)]
    assert turns.address == "a:1"
    assert all(wait == NEXT_S for at, wait in enumerate(waits) if at % 3 != 2)
    assert waits[2] <= 0.05
    assert CAP_S / 2 <= waits[-1] <= CAP_S


def test_a_standby_points_to_the_leader() -> None:
    turns = Rotation("a:1,b:2,c:3")
    assert turns.failed(standby("c:3")) == 0.0
    assert turns.address == "c:3"


def test_a_dead_leader_that_is_still_named_is_asked_once_a_round() -> None:
    turns = Rotation("a:1,b:2,c:3")
    asked, waited = [], 0.0
    for _ in range(12):
        asked.append(turns.address)
        waited += turns.failed(AWAY if turns.address == "c:3" else standby("c:3"))
    assert set(asked) == {"a:1", "b:2", "c:3"}
    assert waited >= 4 * 0.025, "a hot loop"


def test_a_leader_that_was_not_given_is_found_and_the_given_are_kept() -> None:
    turns = Rotation("a:1")
    turns.failed(standby("x:9"))
    assert turns.address == "x:9"
    turns.succeeded()
    turns.failed(standby("y:9"))
    assert (turns.address, turns.addresses) == ("y:9", ["a:1", "y:9"])


def test_one_address_backs_off_like_before() -> None:
    turns = Rotation("a:1")
    waits = [turns.failed(AWAY) for _ in range(8)]
    assert 0.025 <= waits[0] <= 0.05
    assert CAP_S / 2 <= waits[-1] <= CAP_S


def test_which_refusals_another_coordinator_may_lift() -> None:
    assert all(elsewhere(refuse(reason, "")) for reason in ("UNREACHABLE", "DEADLINE", "STALE_TERM", "NOT_READY"))
    assert not any(elsewhere(refuse(reason, "")) for reason in ("WRONG_CLUSTER", "SCHEMA", "NODE_NAME"))
