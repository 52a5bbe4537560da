"""Who is chief: one worker, also while the others are still on their way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from paramesh.roster import Roster
from paramesh.v1 import ledger_pb2 as lg


def roster(rank: int, members: list[int], *, start_workers: int, started: bool = False, next_step: int = 0) -> Roster:
    status = lg.LedgerStatusResponse(
        members=[lg.Member(rank=other) for other in members],
        started=started,
        groups=[lg.GroupStatus(next_step=next_step)],
    )
    session: Any = SimpleNamespace(
        rank=rank, job=SimpleNamespace(start_workers=start_workers), request=lambda _ask, _what: status
    )
    return Roster(session)


@pytest.mark.parametrize(("rank", "chief"), [(0, True), (1, False), (2, False)])
def test_who_joins_first_is_not_chief_for_that(rank: int, chief: bool) -> None:
    assert roster(rank, [rank], start_workers=3).is_lowest() is chief


def test_when_all_are_there_the_lowest_rank_is_chief() -> None:
    assert roster(1, [1, 2, 3], start_workers=3).is_lowest()
    assert not roster(2, [1, 2, 3], start_workers=3).is_lowest()


def test_one_who_died_before_the_first_step_is_not_waited_for() -> None:
    assert roster(1, [1], start_workers=2, started=True).is_lowest()


def test_in_training_the_lowest_of_those_that_live_is_chief() -> None:
    assert roster(2, [2], start_workers=3, started=True).is_lowest()
    assert roster(2, [2], start_workers=3, started=True, next_step=5).world_size() == 1


def test_who_was_quicker_and_left_counts_until_the_first_step() -> None:
    assert roster(0, [0], start_workers=3, started=True).world_size() == 3
