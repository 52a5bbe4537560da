"""In-sync sets: placement, promotion, compare-and-set, planning, and the operator's last word."""

from __future__ import annotations

import dataclasses
import json

import pytest
from paramesh.errors import ParameshError
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator import membership, operators, replicas, rows
from paramesh_coordinator.planning import Recent
from paramesh_coordinator.rows import PartitionRow, PartitionState, Ref, Stage
from paramesh_coordinator.state import Dropped, FailedOver, Senses, build_map

from tests.unit.coordinator.world import World, pending, table_spec


def cluster(names: str = "abc", replicas: int = 2, **more: object) -> World:
    """Servers and a table of 4 partitions; partition 0 is the ledger."""
    world = World(min_servers=len(names), replicas=replicas)
    for name in names:
        world.server(name)
    world.table(table_spec(elements=1024))
    return world


def evidence(world: World, kind: str) -> dict[str, object]:
    """Of the newest audit line of a kind."""
    return json.loads([event for event in world.events() if event.kind == kind][-1].evidence)


def two(world: World, partition: int = 1) -> tuple[str, str]:
    """The primary and the follower of a partition with two replicas."""
    isr, _ = world.sets(partition)
    assert len(isr) == 2
    return isr[0], isr[1]


def unheard(*names: str) -> Senses:
    return Senses(fresh=lambda ref: ref.name not in names)


def refusal(call: object, *args: object) -> str:
    with pytest.raises(ParameshError) as caught:
        call(*args)  # type: ignore[operator]
    return f"{caught.value.reason}: {caught.value}"


# --- placement ---


def test_every_partition_gets_its_replicas_and_all_begin_in_sync() -> None:
    world = cluster()
    for row in world.partitions():
        assert (len(row.isr), row.isr[0], row.learners, row.replicas) == (2, row.primary, (), 2)
    shown = build_map(world.state, 1)
    assert {row.state for row in shown.partitions} == {pb.PARTITION_STATE_ONLINE}
    assert all([*row.isr] == [pb.ReplicaRef(node=r.node, incarnation=1) for r in row.isr] for row in shown.partitions)
    assert shown.config.replicas == 2


def test_a_table_may_want_another_number() -> None:
    world = cluster("abc", replicas=1)
    spec = table_spec("three", 512)
    spec.replicas = 3
    table = world.table(spec)
    assert len(world.row(table.first_partition).isr) == 3
    assert world.row(0).replicas == 1


def test_too_few_servers_is_degraded_and_said() -> None:
    world = cluster("a", replicas=3)
    assert {row.state for row in build_map(world.state, 1).partitions} == {pb.PARTITION_STATE_DEGRADED}
    told = evidence(world, "table_created")
    assert (told["replicas"], told["degraded"]) == (3, 4)
    assert evidence(world, "ledger_placed")["degraded"] == 1


def test_a_silent_follower_degrades_the_map_but_not_the_row() -> None:
    world = cluster("ab")
    _, follower = two(world)
    before = world.row(1)
    world.silent(follower)
    assert world.row(1) == before, "a primary's wish of that moment is still valid"
    assert build_map(world.state, 1).partitions[1].state == pb.PARTITION_STATE_DEGRADED


def test_rows_of_before_replication_are_taken_over() -> None:
    old = {"partition": 3, "table_id": 1, "index": 2, "nbytes": 5, "server": "a", "incarnation": 7, "epoch": 2,
           "state": "online"}  # fmt: skip
    row = rows.decode("partition/0000000003", json.dumps(old).encode())
    assert isinstance(row, PartitionRow)
    assert (row.isr, row.learners, row.replicas, row.version) == ((Ref("a", 7),), (), 1, 0)
    world = cluster("a", replicas=1)
    stale = dataclasses.replace(world.row(1), version=0)
    world.state.apply({stale.key: stale})
    world.store.transact({}, {stale.key: rows.encode(stale)})
    world.do(replicas.adopt)
    assert world.row(1).version == world.state.job.map_version
    version = world.state.job.map_version
    world.do(replicas.adopt)
    assert world.state.job.map_version == version, "once"


# --- death ---


@pytest.mark.parametrize("end", ["exit", "silence", "goodbye", "replaced"])
def test_an_in_sync_server_takes_over_in_the_same_decision(end: str) -> None:
    world = cluster()
    primary, follower = two(world)
    version = world.state.job.map_version
    {"exit": world.exit, "silence": world.silent, "goodbye": world.leave}.get(
        end, lambda name: world.server(name, 2, replace=True)
    )(primary)
    row = world.row(1)
    assert (row.server, row.epoch, row.state) == (follower, 2, PartitionState.ONLINE)
    assert row.isr == ((Ref(follower, 1), Ref(primary, 1)) if end == "silence" else (Ref(follower, 1),))
    assert row.version == world.state.job.map_version == version + 1
    assert all(part.state is PartitionState.ONLINE for part in world.partitions())
    told = evidence(world, "server_left" if end == "goodbye" else "server_dead")
    assert 1 in told["promoted"][follower]  # type: ignore[index]
    assert told["offline"] == []


def test_the_one_with_fewest_primary_bytes_is_promoted() -> None:
    world = cluster("abcd", replicas=4)
    primary = world.row(1).server
    world.exit(primary)
    mine = [row.server for row in world.partitions() if row.table_id]
    assert max(map(mine.count, "abcd")) <= 2, mine


def test_the_last_member_stays_in_the_set_so_that_people_see_it() -> None:
    world = cluster("ab")
    primary, follower = two(world)
    world.exit(follower)
    assert world.row(1).isr == (Ref(primary, 1),)
    world.exit(primary)
    assert (world.row(1).isr, world.row(1).state) == ((Ref(primary, 1),), PartitionState.OFFLINE)
    told = evidence(world, "partition_offline")
    assert told["waits_for"] == f"{primary}#1"
    assert "last checkpoint" in str(told["remedy"])


def test_a_false_suspicion_and_a_dead_follower_lose_nothing() -> None:
    """Silence leaves the set as it is: else the only good copy would be thrown away."""
    world = cluster("ab")
    primary, follower = two(world)
    world.silent(primary)
    assert world.row(1).server == follower
    world.exit(follower)
    assert (world.row(1).state, world.row(1).isr) == (PartitionState.OFFLINE, (Ref(primary, 1),))
    assert "heard again" in str(evidence(world, "partition_offline")["remedy"])
    world.server(primary)
    row = world.row(1)
    assert (row.server, row.epoch, row.state, row.isr) == (primary, 3, PartitionState.ONLINE, (Ref(primary, 1),))


def test_partitions_never_go_from_one_silent_server_to_the_next() -> None:
    world = cluster("abc", replicas=3)
    first = world.row(1).isr
    world.silent(first[0].name, first[1].name)
    assert (world.row(1).server, world.row(1).epoch) == (first[2].name, 2)
    assert set(world.row(1).isr) == set(first)


def test_one_that_was_heard_just_now_is_preferred() -> None:
    world = cluster("abc", replicas=3)
    first = world.row(1).isr
    world.senses = unheard(first[1].name)
    world.exit(first[0].name)
    assert world.row(1).server == first[2].name


def test_a_second_failover_for_silence_needs_positive_death() -> None:
    world = cluster("abc", replicas=3)
    one = world.row(1).isr[0].name
    world.silent(one)
    assert FailedOver(1) in world.effects
    world.senses = Senses(held_back=frozenset(row.partition for row in world.partitions()))
    two = world.row(1).server
    world.silent(two)
    assert (world.row(1).state, world.row(1).server) == (PartitionState.OFFLINE, two)
    assert "known to have ended" in str(evidence(world, "partition_offline")["remedy"])
    world.plan()
    assert world.row(1).state is PartitionState.OFFLINE
    world.exit(two)
    (three,) = set("abc") - {one, two}
    assert (world.row(1).server, world.row(1).state, world.row(1).epoch) == (three, PartitionState.ONLINE, 3)
    assert FailedOver(1) not in world.effects, "that was positive death"
    assert {ref.name for ref in world.row(1).isr} == {three, one}


def test_who_was_held_back_goes_when_its_time_is_over() -> None:
    world = cluster("abc", replicas=3)
    world.senses = Senses(held_back=frozenset(range(9)))
    one = world.row(1).server
    world.silent(one)
    assert world.row(1).state is PartitionState.OFFLINE
    world.senses = Senses()
    world.plan()
    assert (world.row(1).state, world.row(1).epoch) == (PartitionState.ONLINE, 2)
    assert evidence(world, "partition_promoted")["was"] == f"{one}#1"


def test_the_very_primary_that_was_held_back_comes_back_at_once() -> None:
    world = cluster("abc", replicas=3)
    world.senses = Senses(held_back=frozenset(range(9)))
    one = world.row(1).server
    world.silent(one)
    world.server(one)
    assert (world.row(1).server, world.row(1).epoch, world.row(1).state) == (one, 2, PartitionState.ONLINE)


def test_a_later_certain_death_takes_the_silent_out_of_the_sets() -> None:
    world = cluster("ab")
    primary, follower = two(world)
    world.silent(primary)
    world.exit(primary)
    assert world.row(1).isr == (Ref(follower, 1),)
    assert world.events()[-1].kind == "server_death_certain"


def test_a_learner_that_falls_silent_is_none_any_more() -> None:
    world = cluster("ab")
    world.server("c")
    _, follower = two(world)
    world.exit(follower)
    world.plan()
    learning = [row.partition for row in world.partitions() if row.learners]
    assert learning
    world.silent("c")
    assert not any(row.learners for row in world.partitions())


# --- compare and set ---


@pytest.fixture
def learning() -> World:
    """Partition 1 is at a alone, with b learning; two replicas are wanted."""
    world = World(replicas=2)
    world.server("a")
    world.table(table_spec(elements=256))
    world.server("b")
    world.plan()
    assert world.sets(1) == ("a", "b")
    return world


def test_a_learner_joins(learning: World) -> None:
    before = learning.row(1)
    assert learning.change_isr(1, "ab")
    row = learning.row(1)
    assert (learning.sets(1), row.epoch) == (("ab", ""), before.epoch)
    assert row.version > before.version
    assert evidence(learning, "isr_grown")["added"] == ["b#1"]


def test_a_silent_follower_is_dropped(learning: World) -> None:
    learning.change_isr(1, "ab")
    learning.silent("b")
    assert learning.change_isr(1, "a", why="no acknowledgement for 2.0 s")
    assert learning.sets(1) == ("a", "")
    assert learning.effects == [Dropped(1, Ref("b", 1))]
    assert evidence(learning, "isr_shrunk")["why"] == "no acknowledgement for 2.0 s"


def test_the_set_as_it_is_ends_the_doubt_about_an_earlier_wish(learning: World) -> None:
    before = learning.row(1)
    assert learning.change_isr(1, "a")
    assert learning.row(1).version > before.version
    assert not learning.change_isr(1, "ab", version=before.version)
    assert learning.sets(1) == ("a", "b")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"epoch": 2},
        {"asking": Ref("b", 1)},
        {"asking": Ref("a", 2)},
        {"isr": ()},
        {"isr": (Ref("b", 1),)},
        {"isr": (Ref("a", 1), Ref("b", 2))},
        {"isr": (Ref("a", 1), Ref("nobody", 1))},
        {"isr": (Ref("a", 1), Ref("b", 1), Ref("b", 1))},
    ],
)
def test_what_cannot_be_is_left_alone(learning: World, change: dict[str, object]) -> None:
    before = learning.state.job
    isr = change.pop("isr", (Ref("a", 1), Ref("b", 1)))
    assert not learning.change_isr(1, isr, **change)  # type: ignore[arg-type]
    assert learning.state.job == before


def test_nobody_joins_who_was_not_catching_up(learning: World) -> None:
    learning.server("c")
    assert not learning.change_isr(1, "abc")
    assert learning.sets(1) == ("a", "b")


def test_wishes_about_no_partition_are_left_alone(learning: World) -> None:
    wish = replicas.Wish(77, 1, 1, (Ref("a", 1),), "x")
    assert learning.do(lambda d: replicas.change_isr(d, Ref("a", 1), [wish])) == []


def test_only_who_was_heard_just_now_may_drop_others(learning: World) -> None:
    """Else a primary that is cut off throws out the healthy ones."""
    learning.senses = unheard("a")
    assert learning.change_isr(1, "ab"), "growing is always safe"
    assert not learning.change_isr(1, "a")
    learning.senses = Senses()
    assert learning.change_isr(1, "a")


def test_one_request_is_one_version(learning: World) -> None:
    version = learning.state.job.map_version
    wishes = [replicas.Wish(p, 1, learning.row(p).version, (Ref("a", 1), Ref("b", 1)), "caught up") for p in (0, 1, 0)]
    assert learning.do(lambda d: replicas.change_isr(d, Ref("a", 1), wishes)) == [0, 1], "the third is stale"
    assert learning.state.job.map_version == version + 1


def test_an_old_primary_changes_nothing(learning: World) -> None:
    learning.change_isr(1, "ab")
    row = learning.row(1)
    learning.silent("a")
    assert not learning.change_isr(1, "a", asking=Ref("a", 1), epoch=row.epoch, version=row.version)
    assert learning.sets(1) == ("ba", "")


# --- planning ---


def test_learners_come_two_at_a_time_the_barest_first() -> None:
    world = World(replicas=2)
    world.server("a")
    world.table(table_spec(elements=2048))
    world.server("b")
    assert world.plan() == 2
    assert [world.sets(p)[1] for p in range(4)] == ["b", "b", "", ""], "two per target and per primary"
    assert world.plan() == 0
    for partition in range(9):
        assert world.change_isr(partition, "ab"), partition
        world.plan()
    assert {world.sets(p) for p in range(9)} == {("ab", "")}
    assert world.plan() == 0


def test_a_learner_is_on_another_host_where_there_is_a_choice() -> None:
    world = World(replicas=2)
    world.server("a", host="x")
    world.table(table_spec(elements=256))
    for name, host in (("b", "x"), ("c", "y")):
        world.server(name, host=host)
    world.plan()
    assert (world.sets(0), world.sets(1)) == (("a", "c"), ("a", "c"))


@pytest.mark.parametrize("more", [{"capacity": 100}, {"kind": b"other"}])
def test_nobody_learns_without_room_or_with_other_arithmetic(more: dict[str, object]) -> None:
    world = World(replicas=2)
    world.server("a")
    world.table(table_spec(elements=256))
    world.server("b", **more)  # type: ignore[arg-type]
    world.plan()
    assert world.sets(1) == ("a", "")


def test_who_was_dropped_rests_and_is_then_the_last_choice() -> None:
    world = cluster("ab")
    primary, follower = two(world)
    world.change_isr(1, primary)
    key = (1, Ref(follower, 1))
    world.senses = Senses(dropped={key: 1.9})
    world.plan()
    assert world.sets(1) == (primary, "")
    world.server("c")
    world.senses = Senses(dropped={key: 2.1})
    world.plan()
    assert world.sets(1) == (primary, "c")


def test_surplus_goes_learners_first_then_who_holds_most() -> None:
    world = cluster("ab")
    primary, follower = two(world)
    world.silent(follower)
    world.server("c")
    world.plan()
    assert world.sets(1) == (primary + follower, "c")
    world.server(follower)
    world.plan()
    assert world.sets(1) == (primary + follower, ""), "nobody needs the learner any more"


def test_a_surplus_follower_stays_while_anybody_else_is_silent() -> None:
    world = cluster("ab")
    primary, follower = two(world)
    world.silent(follower)
    world.server("c")
    world.plan()
    assert world.change_isr(1, primary + follower + "c")
    world.server(follower)
    world.senses = unheard(primary)
    world.plan()
    assert len(world.row(1).isr) == 3
    world.senses = Senses()
    world.plan()
    assert len(world.row(1).isr) == 2
    assert world.row(1).isr[0].name == primary


def test_offline_partitions_are_not_planned_for() -> None:
    world = cluster("a", replicas=2)
    world.exit("a")
    world.server("b")
    world.plan()
    assert not any(row.learners for row in world.partitions())


# --- errands ---


def test_evict_follows_the_ledger() -> None:
    world = cluster("ab")
    primary, follower = two(world, 0)
    client = world.client("p/0", 1)
    world.do(lambda d: membership.all_silent(d, []))
    world.do(lambda d: operators.close_client(d, client, "gone", evict=True))
    (call,) = operators.next_calls(pending(world)[0], world.state)
    assert call.server.name == primary
    world.silent(primary)
    (call,) = operators.next_calls(pending(world)[0], world.state)
    assert (call.stage, call.server.name) == (Stage.EVICT, follower)


def test_a_fence_is_asked_for_again_after_a_promotion() -> None:
    world = cluster("ab")
    primary, follower = two(world)
    world.do(lambda d: operators.close_client(d, 5, "gone", evict=False))
    (operation,) = pending(world)
    call = next(c for c in operators.next_calls(operation, world.state) if c.server.name == follower)
    world.do(lambda d: operators.confirm(d, call))
    world.exit(primary)
    (operation,) = pending(world)
    assert [c.server.name for c in operators.next_calls(operation, world.state)] == [follower]
    world.do(lambda d: operators.finish(d, operation))
    assert pending(world), "it has something left to do again"
    world.confirm_everything()
    assert not pending(world)


# --- the operator ---


def lost_with_a_learner() -> World:
    """Partition 1 is offline; its only in-sync copy has ended, c was catching up."""
    world = cluster("ab")
    world.server("c")
    primary, follower = two(world)
    world.exit(follower)
    world.plan()
    assert world.sets(1) == (primary, "c")
    world.exit(primary)
    return world


def promote(world: World, partition: int, name: str) -> PartitionRow:
    return world.do(lambda d: replicas.promote_with_loss(d, partition, name))


def test_an_operator_takes_an_incomplete_copy() -> None:
    world = lost_with_a_learner()
    told = [json.loads(event.evidence) for event in world.events() if event.kind == "partition_offline"]
    assert any("psctl promote" in line["remedy"] and 1 in line["partitions"] for line in told)
    epoch = world.row(1).epoch
    row = promote(world, 1, "c")
    assert world.row(1).isr == (Ref("c", 1),)
    assert (row.epoch, row.state, row.learners) == (epoch + 1, PartitionState.ONLINE, ())
    assert evidence(world, "replica_promoted")["accept_loss"] is True


def test_an_operator_is_refused_while_a_complete_copy_may_come_back() -> None:
    world = cluster("ab")
    world.server("c")
    primary, follower = two(world)
    world.exit(follower)
    world.plan()
    world.silent(primary)
    assert f"may come back: {primary}#1" in refusal(promote, world, 1, "c")
    world.exit(primary)
    promote(world, 1, "c")


def test_an_operator_is_told_what_is_wrong() -> None:
    world = lost_with_a_learner()
    world.server("d")
    assert "no partition 99" in refusal(promote, world, 99, "c")
    assert "no live server" in refusal(promote, world, 1, "nobody")
    assert "holds no copy of partition 1; c does" in refusal(promote, world, 1, "d")
    promote(world, 1, "c")
    assert "online at c" in refusal(promote, world, 1, "c")


# --- learners that do not catch up ---


def test_a_learner_that_is_stuck_gives_its_place_to_another() -> None:
    world = cluster("abcd", replicas=2)
    gone = two(world)[1]
    world.exit(gone)
    world.plan()
    row = world.row(1)
    (stuck,) = row.learners
    world.senses = Senses(stuck=frozenset({(1, stuck)}))
    world.plan()
    assert Dropped(1, stuck) in world.effects
    (other,) = world.row(1).learners
    assert other != stuck
    assert evidence(world, "learner_given_up")["partition"] == 1


def test_a_move_whose_target_is_stuck_is_cancelled() -> None:
    world = cluster("abc", replicas=2)
    isr, _ = world.sets(1)
    target = next(name for name in "abc" if name not in isr)
    world.move(1, isr[0], target)
    world.plan()
    assert world.sets(1) == (isr, target)
    world.senses = Senses(stuck=frozenset({(1, Ref(target, 1))}))
    world.plan()
    assert (world.state.moves(), world.sets(1)) == ([], (isr, ""))
    assert evidence(world, "move_cancelled")["reason"] == f"{target} did not catch up in time"


def test_how_long_a_learner_may_take_follows_from_its_bytes() -> None:
    recent = Recent()
    part = PartitionRow(1, 1, 0, 30 << 20, "a", 1, learners=(Ref("b", 1),))
    for now, stuck in ((0.0, 0), (149.0, 0), (151.0, 1)):
        recent.watch([part], now)
        assert len(recent.stuck) == stuck
    recent.watch([dataclasses.replace(part, learners=())], 152.0)
    recent.watch([part], 153.0)
    assert recent.stuck == frozenset(), "it began anew"
    recent.watch([dataclasses.replace(part, state=PartitionState.OFFLINE)], 400.0)
    assert recent.stuck == frozenset(), "nobody could have sent it anything"
