"""Pending operations: committed with the decision, repeated until confirmed, never lost."""

from __future__ import annotations

import pytest
from paramesh_coordinator import membership, operators
from paramesh_coordinator.rows import ClientState, OperationRow, Ref, Stage
from paramesh_coordinator.state import NodeKey

from tests.unit.coordinator.world import World, pending


@pytest.fixture
def world() -> World:
    """Servers a (with the ledger) and b, host h."""
    world = World()
    world.server("a")
    world.server("b")
    world.host("h")
    return world


def kill(world: World, slot: str, incarnation: int = 1) -> int:
    client = world.client(slot, incarnation, "h")
    world.do(lambda d: membership.exit_of_slot(d, Ref("h", 1), slot, -9))
    return client


def calls(world: World) -> list[operators.Call]:
    return [call for op in pending(world) for call in operators.next_calls(op, world.state)]


def test_evict_at_the_ledger_comes_before_fence_everywhere(world: World) -> None:
    victim = kill(world, "h/0")
    (evict,) = calls(world)
    assert (evict.stage, evict.server, evict.control_address, evict.clients) == (
        Stage.EVICT, Ref("a", 1), "a:2", (victim,),
    )  # fmt: skip
    assert "SIGKILL" in evict.why
    world.do(lambda d: operators.confirm(d, evict))
    assert sorted((c.stage, c.server.name) for c in calls(world)) == [(Stage.FENCE, "a"), (Stage.FENCE, "b")]


def test_the_row_and_the_operation_are_one_transaction(world: World) -> None:
    """Invariant 6: with the row closed and no operation, the ledger would wait for the dead for ever."""
    victim = kill(world, "h/0")
    world.restart()
    assert world.client_row(victim).state is ClientState.EVICTED
    assert [op.clients for op in pending(world)] == [(victim,)]


@pytest.mark.parametrize("confirmed", [0, 1, 2, 3])
def test_a_restart_resumes_where_it_was(world: World, confirmed: int) -> None:
    kill(world, "h/0")
    for _ in range(confirmed):
        call = calls(world)[0]
        world.do(lambda d, c=call: operators.confirm(d, c))
    left = calls(world)
    world.restart()
    assert calls(world) == left
    assert len(world.confirm_everything()) == 3 - confirmed
    assert pending(world) == []


def test_a_confirmation_that_comes_twice_or_late_changes_nothing(world: World) -> None:
    kill(world, "h/0")
    (evict,) = calls(world)
    world.do(lambda d: operators.confirm(d, evict))
    world.do(lambda d: operators.confirm(d, evict))
    assert [op.stage for op in pending(world)] == [Stage.FENCE]
    made = world.confirm_everything()
    world.do(lambda d: operators.confirm(d, made[0]))
    world.do(lambda d: operators.confirm(d, evict))
    assert pending(world) == []


def test_eviction_waits_for_a_ledger_that_is_offline(world: World) -> None:
    world.do(lambda d: membership.silent(d, NodeKey("server", "a", 1), 2.1, 2.0))
    kill(world, "h/0")
    assert calls(world) == []
    assert not operators.finished(pending(world)[0], world.state)
    world.server("a")  # heard again
    assert {(c.stage, c.server.name) for c in world.confirm_everything()} >= {(Stage.EVICT, "a"), (Stage.FENCE, "b")}


def test_eviction_waits_for_the_first_ledger() -> None:
    world = World(min_servers=2)
    world.host("h")
    kill(world, "h/0")
    assert calls(world) == []
    world.server("a")
    world.server("b")
    assert calls(world)[0].stage is Stage.EVICT


def test_a_dead_server_does_not_hold_up_a_fence(world: World) -> None:
    kill(world, "h/0")
    world.do(lambda d: membership.exit_of_server(d, Ref("b", 1), -9))
    assert [c.server.name for c in world.confirm_everything()] == ["a", "a"]
    assert pending(world) == []


def test_a_server_that_missed_a_fence_gets_it_when_it_is_heard_again(world: World) -> None:
    world.do(lambda d: membership.silent(d, NodeKey("server", "b", 1), 2.1, 2.0))
    victims = [kill(world, f"h/{n}", n + 1) for n in range(2)]
    assert {c.server.name for c in world.confirm_everything()} == {"a"}
    world.server("b")
    (call,) = calls(world)
    assert (call.stage, call.server, call.clients) == (Stage.FENCE, Ref("b", 1), tuple(victims))


def test_a_new_server_learns_of_all_who_were_evicted_before_it(world: World) -> None:
    victim = kill(world, "h/0")
    leaver = world.client("h/1", 9, "h")
    world.do(lambda d: membership.client_left(d, leaver))
    world.confirm_everything()
    world.server("c")
    (call,) = calls(world)
    assert (call.server.name, call.clients) == ("c", (victim,))
    world.confirm_everything()
    assert pending(world) == []


def test_a_calm_cluster_has_nothing_pending(world: World) -> None:
    world.client("h/0", 1, "h")
    assert pending(world) == []


def test_operations_are_described_for_people(world: World) -> None:
    victim = kill(world, "h/0")
    (op,) = pending(world)
    said = operators.describe(op, world.state)
    assert said.startswith(f"evict client {victim} at the ledger: SIGKILL (exit report from host h); waits for ")
    many = OperationRow(1, Stage.FENCE, tuple(range(20)), "why", only="b")
    said = operators.describe(many, world.state)
    assert said == "fence client 0, 1, 2, 3, 4, 5, 6, 7 ... at b: why; waits for b to confirm"


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (None, "; waits for a, the ledger's server, to confirm"),
        ("silence", "; waits for a, the ledger's server, to be heard again (silent for 2.1 s)"),
        ("exit", "; waits for the ledger, which was lost with a (process ended: SIGKILL): start the job anew"),
        ("goodbye", "; waits for the ledger, which was lost with a (shut down): start the job anew"),
        ("successor", "; waits for the ledger, which was lost with a (replaced by incarnation 2): start the job anew"),
    ],
)
def test_what_waits_says_what_for(world: World, end: str | None, text: str) -> None:
    """Pending evictions of a ledger that is lost for good stay: an operator is to understand why."""
    kill(world, "h/0")
    if end == "silence":
        world.do(lambda d: membership.silent(d, NodeKey("server", "a", 1), 2.1, 2.0))
    elif end == "exit":
        world.do(lambda d: membership.exit_of_server(d, Ref("a", 1), -9))
    elif end == "goodbye":
        world.do(lambda d: membership.server_left(d, Ref("a", 1)))
    elif end == "successor":
        world.server("a", 2, gone=True)
    evict = next(op for op in pending(world) if op.stage is Stage.EVICT)
    assert operators.describe(evict, world.state).endswith(text)


def test_what_waits_for_the_first_ledger_says_so() -> None:
    world = World(min_servers=2)
    world.host("h")
    kill(world, "h/0")
    assert operators.describe(pending(world)[0], world.state).endswith(
        "; waits for servers: the ledger has no place yet"
    )


def test_a_fence_names_the_servers_that_it_waits_for(world: World) -> None:
    kill(world, "h/0")
    (evict,) = calls(world)
    world.do(lambda d: operators.confirm(d, evict))
    assert operators.describe(pending(world)[0], world.state).endswith("; waits for a, b to confirm")
