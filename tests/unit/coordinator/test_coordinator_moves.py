"""Moves, drains and evening out as decisions: every stage, every death, every restart."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from paramesh.errors import ParameshError
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator import moves, rows
from paramesh_coordinator.rows import MoveRow, MoveStage, PartitionState, Ref
from paramesh_coordinator.state import Senses, build_map

from tests.unit.coordinator.world import World, table_spec


def cluster(names: str = "abc", replicas: int = 1, elements: int = 1024) -> World:
    """Servers and a table of `elements` / 256 partitions; partition 0 is the ledger."""
    world = World(min_servers=len(names), replicas=replicas)
    for name in names:
        world.server(name, host=name)
    world.table(table_spec(elements=elements))
    world.plan(auto=True)
    return world


def free(world: World, partition: int = 1) -> str:
    """A server without a replica of a partition."""
    held = "".join(world.sets(partition))
    return next(row.name for row in world.state.live_servers() if row.name not in held)


def newest(world: World) -> MoveRow:
    return [row for _, row in sorted(world.state.rows(MoveRow).items())][-1]


def evidence(world: World, kind: str) -> dict[str, object]:
    """Of the newest audit line of a kind."""
    return json.loads([event for event in world.events() if event.kind == kind][-1].evidence)


def refusal(call: object, *args: object) -> str:
    with pytest.raises(ParameshError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.reason


# --- one move ---


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_target_learns_joins_and_leads_and_the_source_is_out(replicas: int) -> None:
    world = cluster(replicas=replicas)
    source, target = world.row(1).server, free(world)
    stay = world.sets(1)[0].replace(source, "")
    world.move(1, source, target)
    assert newest(world).stage is MoveStage.WANTED
    world.plan()
    assert (newest(world).stage, world.sets(1)[1]) == (MoveStage.COPYING, target)
    world.plan()
    assert world.row(1).server == source, "not before it is in sync"
    world.catch_up()
    version = world.state.job.map_version
    assert world.row(1).server == source
    world.plan()
    row = world.row(1)
    assert (row.server, row.epoch, world.sets(1)) == (target, 2, (target + stay, ""))
    assert row.version == version + 1, "one decision, one version of the map"
    assert newest(world).stage is MoveStage.DONE
    assert world.state.moves() == []
    assert world.plan() == 0


def test_a_follower_moves_without_a_new_epoch() -> None:
    world = cluster(replicas=2)
    (primary, follower), target = world.sets(1)[0], free(world)
    world.move(1, follower, target)
    world.run_moves()
    assert (world.sets(1)[0], world.row(1).epoch) == (primary + target, 1)


def test_the_lead_alone_changes_hands_at_once() -> None:
    world = cluster(replicas=2)
    primary, follower = world.sets(1)[0]
    assert world.move(1, primary, follower).swap
    world.plan()
    assert (world.sets(1), world.row(1).epoch, newest(world).stage) == ((follower + primary, ""), 2, MoveStage.DONE)


def test_asking_twice_is_asking_once() -> None:
    world = cluster()
    source, target = world.row(1).server, free(world)
    assert world.move(1, source, target) == world.move(1, source, target)
    assert len(world.state.moves()) == 1
    other = next(row.name for row in world.state.live_servers() if row.name not in (source, target))
    assert refusal(world.move, 1, source, other) == "NOT_READY"


def test_what_cannot_be_is_refused() -> None:
    world = cluster("abc", replicas=2)
    (primary, follower), spare = world.sets(1)[0], free(world)
    assert refusal(world.move, 99, primary, spare) == "WRONG_PARTITION"
    assert refusal(world.move, 1, spare, primary) == "UNKNOWN_NODE"
    assert refusal(world.move, 1, primary, "nobody") == "UNKNOWN_NODE"
    assert refusal(world.move, 1, follower, primary) == "NODE_NAME"
    assert refusal(world.move, 1, primary, primary) == "NODE_NAME"
    world.server("tiny", capacity=10)
    world.server("odd", kind=b"\x02")
    assert refusal(world.move, 1, primary, "tiny") == "QUOTA"
    assert refusal(world.move, 1, primary, "odd") == "UNKNOWN_NODE"
    world.drain(spare)
    assert refusal(world.move, 1, primary, spare) == "NOT_READY"
    assert [row for row in world.state.moves() if row.why == "psctl move"] == []


def test_at_most_two_come_and_two_go_at_a_time() -> None:
    world = World(min_servers=1)
    world.server("a")
    world.table(table_spec(elements=256 * 8))
    world.server("b")
    for partition in range(1, 9):
        world.move(partition, "a", "b")
    world.plan()
    most = 0
    while world.state.moves():
        learning = sum(len(row.learners) for row in world.partitions())
        most = max(most, learning)
        assert learning <= 2
        world.catch_up()
        world.plan()
    assert most == 2
    assert {world.row(n).server for n in range(1, 9)} == {"b"}


# --- what may happen meanwhile ---


@pytest.mark.parametrize("stage", ["wanted", "copying", "in sync"])
def test_a_coordinator_that_restarts_goes_on(stage: str) -> None:
    world = cluster()
    source, target = world.row(1).server, free(world)
    world.move(1, source, target)
    if stage != "wanted":
        world.plan()
    if stage == "in sync":
        world.catch_up()
    world.restart()
    world.run_moves()
    assert (world.sets(1), newest(world).stage) == ((target, ""), MoveStage.DONE)


@pytest.mark.parametrize("stage", ["wanted", "copying", "in sync"])
@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_death_ends_a_move_and_nothing_else(stage: str, victim: str, replicas: int) -> None:
    world = cluster("abcd", replicas=replicas)
    source, target = world.row(1).server, free(world)
    before = world.row(1)
    world.move(1, source, target)
    if stage != "wanted":
        world.plan()
    if stage == "in sync":
        world.catch_up()
    world.exit(source if victim == "source" else target)
    world.run_moves()
    row, move = world.row(1), newest(world)
    complete_elsewhere = replicas == 2 or stage == "in sync" or victim == "target"
    assert (row.state is PartitionState.ONLINE) == complete_elsewhere
    assert move.stage is MoveStage.CANCELLED
    assert move.reason
    if complete_elsewhere:
        assert len(row.isr) == replicas
        assert row.learners == ()
        assert row.primary in (*before.isr, Ref(target, 1)), "9: nobody outside the in-sync set"


def test_a_failover_for_silence_ends_the_plan_of_the_older_epoch() -> None:
    world = cluster("abcd", replicas=2)
    (source, heir), target = world.sets(1)[0], free(world)
    world.move(1, source, target)
    world.plan()
    world.silent(source)
    assert world.row(1).server == heir
    world.plan()
    assert newest(world).stage is MoveStage.CANCELLED
    assert "failed over" in newest(world).reason or "gone" in newest(world).reason


def test_nobody_leaves_a_set_while_one_who_stays_is_not_heard() -> None:
    world = cluster(replicas=2)
    (source, other), target = world.sets(1)[0], free(world)
    world.move(1, source, target)
    world.plan()
    world.catch_up()
    for unheard in (other, target):
        world.senses = Senses(fresh=lambda ref, unheard=unheard: ref.name != unheard)
        assert world.plan() == 0
        assert world.row(1).server == source
    world.senses = Senses()
    world.plan()
    assert world.row(1).server == target


def test_a_lost_follower_is_replaced_beside_a_move() -> None:
    world = cluster("abcde", replicas=2)
    (source, other), target = world.sets(1)[0], free(world)
    world.move(1, source, target)
    world.plan()
    world.exit(other)
    world.run_moves()
    in_sync, _ = world.sets(1)
    assert in_sync[0] == target
    assert len(in_sync) == 2
    assert source not in in_sync


# --- drains ---


def test_a_drain_empties_a_server_and_keeps_it_empty() -> None:
    world = cluster("abc", elements=256 * 9)
    assert world.drain("a").moving
    world.run_moves()
    assert all("a" not in "".join(world.sets(row.partition)) for row in world.partitions())
    held = world.drain("a")
    assert (held.held, held.moving, held.only, held.nowhere) == ((), (), (), False)
    spec = table_spec("more", 256 * 6)
    table = world.table(spec)
    assert all(world.row(table.first_partition + n).server != "a" for n in range(6))
    nodes = {node.ref.node: node for node in build_map(world.state, 1).nodes}
    assert nodes["a"].state == pb.NODE_STATE_DRAINING
    assert nodes["a"].reason == "a test"
    world.undrain("a")
    world.run_moves(auto=True)
    assert any(row.server == "a" for row in world.partitions()), "its share again"


def test_a_drain_outlives_a_restart_and_the_death_of_a_target() -> None:
    world = cluster("abcd", elements=256 * 8)
    world.drain("a")
    world.plan()
    world.restart()
    victim = next(row.target.name for row in world.state.moves() if row.stage is MoveStage.COPYING)
    world.exit(victim)
    world.run_moves()
    left = [row for row in world.partitions() if row.server == "a" and row.state is PartitionState.ONLINE]
    assert left == []


def test_with_two_copies_on_two_servers_a_drain_hands_over_the_lead() -> None:
    world = cluster("ab", replicas=2)
    drained = world.drain("a")
    assert not drained.nowhere
    world.run_moves()
    assert {row.server for row in world.partitions()} == {"b"}
    left = world.drain("a", leaving=True)
    assert (len(left.held), left.moving, left.only) == (5, (), ()), "it may go: nothing is only here"
    world.leave("a")
    assert {row.state for row in world.partitions()} == {PartitionState.ONLINE}


def test_a_server_that_leaves_waits_only_where_something_can_go() -> None:
    world = cluster("ab")
    assert world.drain("a", leaving=True).nowhere, "nobody trains"
    assert not world.servers()[Ref("a", 1)].draining
    world.client("w/0", 1)
    drained = world.drain("a", leaving=True)
    assert not drained.nowhere
    assert drained.moving == drained.held == drained.only
    assert world.drain("b", leaving=True).nowhere, "the last one"
    world.exit("b")
    assert world.drain("a", leaving=True).nowhere, "now it is the last one"


def test_a_drain_ends_moves_to_that_server() -> None:
    world = cluster()
    source, target = world.row(1).server, free(world)
    world.move(1, source, target)
    world.plan()
    world.drain(target)
    assert newest(world).stage is MoveStage.CANCELLED or any(m.partition != 1 for m in world.state.moves())
    world.run_moves()
    assert world.row(1).server != target
    assert world.row(1).learners == ()


def test_a_new_process_of_a_drained_server_does_not_drain() -> None:
    world = cluster()
    world.drain("a")
    world.run_moves()
    world.leave("a")
    world.server("a", 2)
    assert not world.servers()[Ref("a", 2)].draining


# --- evening out ---


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_server_that_comes_gets_its_share_by_itself(replicas: int) -> None:
    world = cluster("abc"[: replicas + 1], replicas=replicas, elements=256 * 12)
    world.server("z", host="z")
    world.run_moves(auto=True)
    leads = Counter(row.server for row in world.partitions() if row.partition)
    assert max(leads.values()) - min(leads.values()) <= 1, leads
    held = Counter(ref.name for row in world.partitions() for ref in row.isr if row.partition)
    assert len(held) == replicas + 2
    assert max(held.values()) <= 1.2 * 12 * replicas / (replicas + 2) + 1, held
    assert not world.state.job.unsettled
    assert world.plan(auto=True) == 0


def test_without_the_setting_nothing_moves_unasked() -> None:
    world = cluster("ab", elements=256 * 12)
    world.server("z")
    world.run_moves(auto=False)
    assert {row.server for row in world.partitions()} == {"a", "b"}
    planned = world.do(lambda draft: moves.dry_run(draft, "why"))
    assert planned
    assert world.state.moves() == []
    assert [(row.partition, row.target) for row in world.even_out()] == [(r.partition, r.target) for r in planned]
    world.run_moves()
    assert world.even_out() == []


def test_leads_even_out_after_a_failover() -> None:
    world = cluster("abc", replicas=2, elements=256 * 12)
    world.exit("a")
    world.run_moves(auto=True)
    leads = Counter(row.server for row in world.partitions() if row.partition)
    assert max(leads.values()) - min(leads.values()) <= 1, leads


# --- rows ---


def test_rows_of_moves_are_stored_and_old_ones_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "KEPT_MOVES", 3)
    world = cluster("ab")
    row = world.move(1, world.row(1).server, free(world))
    assert rows.decode(row.key, rows.encode(row)) == row
    for _ in range(6):
        world.run_moves()
        world.move(1, world.row(1).server, free(world))
    world.run_moves()
    assert len(world.state.rows(MoveRow)) == 3
    assert evidence(world, "replica_moved")["move"] == newest(world).move


# --- requests and links ---


def test_uneven_requests_are_mended_when_that_is_due_and_a_dry_run_says_why() -> None:
    world = cluster("ab", replicas=2, elements=1024 * 4)
    world.run_moves(auto=True)
    hot = [row.partition for row in world.partitions() if row.server == "a" and row.partition]
    world.senses = Senses(rates=dict.fromkeys(hot, 2000))
    assert world.plan(auto=True) == 0, "not due"
    told = world.do(lambda d: moves.dry_run(d, "psctl rebalance --dry-run"))
    assert told
    assert f"a serves {2000 * len(hot)} requests/s, b 0" in told[0].why
    assert world.state.moves() == []
    world.senses = Senses(rates=dict.fromkeys(hot, 2000), uneven=True)
    assert world.plan(auto=False) == 0, "not asked to"
    assert world.plan(auto=True) > 0
    assert {move.swap for move in world.state.moves()} == {True}, "each has the other's in sync"
    world.senses = Senses(rates=dict.fromkeys(hot, 2000))
    world.run_moves(auto=True)
    served = Counter(row.server for row in world.partitions() if row.partition in hot)
    assert abs(served["a"] - served["b"]) <= 2, served
    assert world.plan(auto=True) == 0


def test_two_copies_at_a_time_go_over_the_link_between_two_hosts() -> None:
    """However many servers there are at its ends; within a host no link is in the way."""
    world = World(min_servers=2)
    for name in "abc":
        world.server(name, host="x")
    world.table(table_spec(elements=1024 * 3))
    for name in "def":
        world.server(name, host="y")
    for row in world.partitions()[:6]:
        world.move(row.partition, row.server, "def"[row.partition % 3])
    world.plan()
    assert sum(len(row.learners) for row in world.partitions()) == 2
    world.run_moves()
    assert {row.server for row in world.partitions()[:6]} <= set("def")
