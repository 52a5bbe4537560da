"""Proof that the tests notice: each rule taken out is found, by seeds of a scenario or by a directed test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.simulation import directed
from tests.simulation.broken import BROKEN
from tests.simulation.scenarios import DRAWN, SCENARIOS
from tests.simulation.world import Failure, simulate

FOLLOWERS = "followers fall silent"
PRIMARIES = "primaries die"
BESIDE = "primaries die beside stopped followers"
BACK = "deposed and back"
DEATHS = "contributors die"
STOPPED = "the coordinator is stopped"
LEDGER = "the ledger moves"


@dataclass(frozen=True)
class Found:
    """Where a rule's lack shows."""

    invariant: str
    scenario: str
    seeds: int
    """Within so many, from 0."""


QUICK = {
    "answers leave before the in-sync set has their records": Found("9:", PRIMARIES, 5),
    "a learner joins at lag": Found("9:", FOLLOWERS, 30),
    "who is asked to leave is not waited for any more": Found("9:", FOLLOWERS, 10),
    "whoever is alive is promoted": Found("9:", PRIMARIES, 5),
    "a promotion for silence trims the in-sync set": Found("9:", BACK, 5),
    "a learner is promoted like a member of the in-sync set": Found("9:", PRIMARIES, 5),
    "silence counts while the coordinator was stopped": Found("19:", STOPPED, 5),
    "a follower truncates on hearing of an epoch": Found("9:", PRIMARIES, 20),
    "a new primary serves before its EPOCH is everywhere": Found("9:", PRIMARIES, 5),
    "a follower replays without writing dedup entries": Found("8:", DRAWN, 5),
    "a snapshot brings no dedup entries": Found("8:", DRAWN, 10),
    "a pull shows what is not committed": Found("9:", PRIMARIES, 5),
    "a lower attempt wins": Found("15:", DRAWN, 5),
    "contributions are summed as they came": Found("15:", DRAWN, 5),
    "a step goes on without what is missing": Found("14:", PRIMARIES, 5),
    "FENCE drops what is staged": Found("14:", DEATHS, 5),
    "an answer of the ledger leaves before its records are everywhere": Found("9:", LEDGER, 5),
    "a follower of the ledger replays without writing tombstones": Found("14:", LEDGER, 5),
}
"""In the suite."""

SLOW = {
    "a learner that is asked for is not waited for": Found("9:", FOLLOWERS, 100),
    "a refused wish counts as an outcome": Found("9:", FOLLOWERS, 300),
    "a new primary knows only of its own commits": Found("9:", BESIDE, 100),
    "a follower takes records of an older epoch": Found("9:", BACK, 60),
    "a deposed primary's senders never start again": Found("17:", BACK, 60),
    "FENCE leaves no tombstone": Found("3:", "", 300),
    "a worker forgets its contribution at STEP": Found("17:", PRIMARIES, 60),
}
"""By `make soak`."""

DIRECTED: dict[str, Callable[[], None]] = {
    "the commit is taken without matching the log": directed.unruly_messages,
    "records are held without looking at the one before": directed.unruly_messages,
    "an older primary's records are acknowledged to the next": directed.older_tail_is_not_acknowledged,
    "no floor is sent with a pull": directed.pulls_name_a_floor,
    "a fenced contribution comes without the decision that names it": directed.decisions_come_along,
    "a learner's word from before the newest row counts": directed.learner_of_another_row,
    "a deposed ledger goes on until a map says so": directed.deposed_ledger_refuses,
    "a folder is not synced after a rename": directed.folders_are_synced,
}
"""What something else stands before, in a whole cluster: see docs/simulation.md."""


def found(name: str, where: Found) -> str:
    """What the first seed says that fails by the invariant."""
    with BROKEN[name]():
        for seed in range(where.seeds):
            try:
                simulate(seed, scenario=where.scenario)
            except Failure as failure:
                if where.invariant in str(failure):
                    return str(failure)
    pytest.fail(f"{name}: not found within {where.seeds} seeds")


@pytest.mark.parametrize("name", QUICK)
def test_it_is_found_at_once(name: str) -> None:
    assert "replay: make sim SEED=" in found(name, QUICK[name])


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SLOW)
def test_it_is_found(name: str) -> None:
    found(name, SLOW[name])


@pytest.mark.parametrize("name", DIRECTED)
def test_it_is_found_by_itself(name: str) -> None:
    DIRECTED[name]()
    with BROKEN[name](), pytest.raises(AssertionError):
        DIRECTED[name]()


def test_every_rule_is_found_by_somebody() -> None:
    assert QUICK.keys() | SLOW.keys() | DIRECTED.keys() == BROKEN.keys()
    assert all(where.scenario in (DRAWN, "", *SCENARIOS) for where in (*QUICK.values(), *SLOW.values()))
