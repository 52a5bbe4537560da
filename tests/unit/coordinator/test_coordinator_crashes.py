"""Row 13: the coordinator dies at each commit, just before or just after it.

Whoever asked repeats the request, as clients do; the end must be as if nothing had
happened (invariants 4, 6, 22; `World.do` checks 4 and 22 on the way).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from paramesh_coordinator import membership
from paramesh_coordinator.rows import ClientRow, HostRow, OperationRow, PartitionRow, Ref, ServerRow, TableRow
from paramesh_coordinator.state import Draft, NodeKey

from tests.unit.coordinator.world import World, table_spec

T = TypeVar("T")


class MortalWorld(World):
    """Dies once, before or after its `at`-th commit, and is asked again after its restart."""

    def __init__(self, at: int = 0, after: bool = False) -> None:
        self.at, self.after = at, after
        self.commits = 0
        super().__init__(min_servers=2)

    def do(self, decision: Callable[[Draft], T]) -> T:
        draft = Draft(self.state, self.store.term, 0)
        decision(draft)
        if draft.writes:
            self.commits += 1
            if self.commits == self.at:
                if self.after:
                    super().do(decision)  # committed, but nobody heard the answer
                self.restart()
        return super().do(decision)


def story(world: World) -> list[Any]:
    """A job's life; returns what its clients were told."""
    world.server("a")
    world.server("b")
    world.host("h")
    told: list[Any] = [world.client("h/0", 11, "h"), world.client("h/1", 12, "h"), world.client("lone", 13)]
    told.append(world.table(table_spec("one", 2048)).first_partition)
    world.do(lambda d: membership.exit_of_slot(d, Ref("h", 1), "h/0", -9))
    told.append(world.client("h/0", 14, "h"))
    told.append(world.table(table_spec("two", 512)).first_partition)
    world.confirm_everything()
    world.do(lambda d: membership.silent(d, NodeKey("server", "b", 1), 2.1, 2.0))
    world.server("b")
    world.confirm_everything()
    world.do(lambda d: membership.client_left(d, told[1]))
    world.do(lambda d: membership.silent(d, NodeKey.client(told[2]), 10.1, 10.0))
    world.confirm_everything()
    world.do(lambda d: membership.exit_of_server(d, Ref("a", 1), -11))
    world.server("a", 2)
    world.do(lambda d: membership.host_left(d, Ref("h", 1)))
    world.confirm_everything()
    return told


def picture(world: World) -> dict[str, Any]:
    """Everything but counters and audit lines."""
    classes = (ServerRow, HostRow, ClientRow, TableRow, PartitionRow, OperationRow)
    return {cls.__name__: dict(world.state.rows(cls)) for cls in classes}


CALM = MortalWorld()
TOLD = story(CALM)
COMMITS = CALM.commits


def test_the_story_is_long_enough_to_mean_something() -> None:
    assert COMMITS >= 25
    assert len(set(TOLD[:3])) == 3


@pytest.mark.parametrize("after", [False, True], ids=["before_commit", "after_commit"])
@pytest.mark.parametrize("at", range(1, COMMITS + 1))
def test_dying_at_any_commit_changes_nothing_in_the_end(at: int, after: bool) -> None:
    world = MortalWorld(at, after)
    told = story(world)
    assert world.store.term == 2, "it died"
    assert told == TOLD
    assert picture(world) == picture(CALM)
