"""A lost store made anew: what servers testify gives the same cluster, or a refusal that says what is missing."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import recovery_pb2 as rc
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator import membership
from paramesh_coordinator.rebuilding import LEAP, Choices, Rebuilt, rebuild
from paramesh_coordinator.rows import ClientState, NodeState, PartitionRow, PartitionState, Ref, Stage, encode
from paramesh_coordinator.state import NodeKey, build_map
from paramesh_coordinator.store import MemoryStore
from paramesh_coordinator.store.memory import MemoryMedium
from paramesh_coordinator.transfer import check_not_moved, write_state

from tests.unit.coordinator.test_coordinator_model import Replication
from tests.unit.coordinator.world import World, table_spec


def cluster(names: str = "abc", replicas: int = 2) -> World:
    """Servers and a table of 4 partitions; partition 0 is the ledger."""
    world = World(min_servers=len(names), replicas=replicas)
    for name in names:
        world.server(name)
    world.table(table_spec(elements=1024))
    return world


def word_of(world: World, ref: Ref, shown: pb.PartitionMap | None = None) -> rc.TestifyResponse:
    """What a server of this world says, that followed the map up to `shown`."""
    shown = shown or build_map(world.state, world.store.term)
    row = world.servers()[ref]
    said = rc.TestifyResponse(map=shown, term=shown.term, coordinators="h:1")
    said.server.CopyFrom(
        co.RegisterServerRequest(
            name=ref.name, incarnation=ref.incarnation, address=row.address, control_address=row.control_address,
            host_id=row.host_id, version="0", fingerprint=row.fingerprint, capacity_bytes=row.capacity_bytes,
        )
    )  # fmt: skip
    for part in shown.partitions:
        if any(Ref(r.node, r.incarnation) == ref for r in (*part.isr, *part.learners)):
            said.replicas.add(partition=part.id, promised=part.epoch, last_lsn=1, last_epoch=part.epoch)
    for entry in shown.tables:
        table = world.state.table(entry.table_id)
        assert table is not None
        said.tables.add(table_id=entry.table_id, spec=pb.TableSpec.FromString(table.spec))
    return said


def all_live(world: World, but: Collection[str] = ()) -> list[rc.TestifyResponse]:
    return [word_of(world, row.ref) for row in world.state.live_servers() if row.name not in but]


def begin_on(rebuilt: Rebuilt, world: World) -> World:
    """A coordinator of the same settings on the new store, after its first decision."""
    assert not rebuilt.problems, rebuilt.problems
    medium = MemoryMedium()
    write_state(MemoryStore(medium), sorted((k, encode(r)) for k, r in rebuilt.rows.items()), rebuilt.term, "x")
    fresh = World(world.min_servers, medium, world.config.replicas)
    check_not_moved(fresh.store)
    fresh.do(lambda draft: draft.raise_map())
    return fresh


def parts(shown: Iterable[PartitionRow]) -> list[tuple[object, ...]]:
    """Rows but for what leaps."""
    return [
        (r.partition, r.table_id, r.index, r.nbytes, r.primary, r.isr, r.learners, r.replicas, r.state) for r in shown
    ]


# --- what there is ---


def test_servers_that_all_answer_give_the_same_cluster_with_every_counter_above() -> None:
    world = cluster()
    world.exit("c")
    world.plan()
    after = begin_on(rebuild(all_live(world), Choices(), 7), world)
    assert parts(after.partitions()) == parts(world.partitions())
    assert [r.epoch for r in after.partitions()] == [r.epoch + LEAP for r in world.partitions()]
    old, new = world.state.job, after.state.job
    assert (new.cluster, new.generation, new.replicas, new.next_table, new.next_partition) == (
        old.cluster, old.generation, old.replicas, old.next_table, old.next_partition,
    )  # fmt: skip
    assert (new.map_version > old.map_version + LEAP, after.store.term > world.store.term + LEAP) == (True, True)
    assert after.state.rows(type(world.state.table(1))) == world.state.rows(type(world.state.table(1)))  # type: ignore[arg-type]
    assert [(r.ref, r.state, r.fingerprint) for r in after.state.live_servers()] == [
        (r.ref, r.state, r.fingerprint) for r in world.state.live_servers()
    ]
    assert after.events()[0].kind == "state_rebuilt"


def test_the_newest_map_holds_whoever_has_it() -> None:
    world = cluster("abc", replicas=3)
    old = build_map(world.state, 1)
    world.exit("a")
    said = [word_of(world, Ref("b", 1), old), word_of(world, Ref("c", 1))]
    after = begin_on(rebuild(said, Choices(), 0), world)
    assert parts(after.partitions()) == parts(world.partitions())


def test_nobody_and_strangers_and_two_clusters_are_refused() -> None:
    world = cluster("ab")
    assert "nothing is left of the job but its checkpoints" in rebuild([], Choices(), 0).problems[0]
    alone = word_of(world, Ref("a", 1))
    alone.ClearField("map")
    assert "no server that answers follows a map" in rebuild([alone], Choices(), 0).problems[0]
    said = all_live(world)
    said[0].map.cluster, said[1].map.cluster = "x", "y"
    assert "different clusters (a: x, b: y)" in rebuild(said, Choices(), 0).problems[0]


# --- who does not answer ---


def test_a_silent_server_must_be_accounted_for() -> None:
    world = cluster("abc", replicas=2)
    found = rebuild(all_live(world, but="a"), Choices(), 0)
    (problem,) = found.problems
    assert (found.rows, "server a does not answer at a:2" in problem) == ({}, True)
    assert "say --without a" in problem


def test_without_it_its_in_sync_followers_lead_under_a_higher_epoch() -> None:
    world = cluster("abc", replicas=2)
    led = [row.partition for row in world.partitions() if row.server == "a"]
    found = rebuild(all_live(world, but="a"), Choices(frozenset("a")), 0)
    after = begin_on(found, world)
    assert found.promoted == led
    for old, row in zip(world.partitions(), after.partitions(), strict=True):
        assert row.primary in old.isr
        assert (row.server != "a", row.state) == (True, PartitionState.ONLINE)
        assert row.epoch > old.epoch + LEAP if old.server == "a" else row.epoch == old.epoch + LEAP
    assert after.servers()[Ref("a", 1)].certain


def test_a_successor_of_its_name_proves_that_it_ended() -> None:
    world = cluster("abc", replicas=2)
    young = rc.TestifyResponse(server=co.RegisterServerRequest(name="a", incarnation=9, control_address="a:9"))
    found = rebuild([*all_live(world, but="a"), young], Choices(), 0)
    assert found.problems == []
    assert "a" not in {row.server for row in begin_on(found, world).partitions()}


def test_a_silent_server_that_holds_nothing_is_no_riddle() -> None:
    world = cluster("ab", replicas=2)
    world.server("c")
    after = begin_on(rebuild(all_live(world, but="c"), Choices(), 0), world)
    row = after.servers()[Ref("c", 1)]
    assert (row.state, row.certain) == (NodeState.DEAD, False)  # heard again, it lives


def test_without_is_refused_for_who_answers_and_for_nobody() -> None:
    world = cluster("ab", replicas=2)
    assert "it answers at a:2" in rebuild(all_live(world), Choices(frozenset("a")), 0).problems[0]
    assert "no server of that name" in rebuild(all_live(world), Choices(frozenset("z")), 0).problems[0]


# --- loss ---


def test_what_nobody_has_is_refused_and_accepted_only_by_name() -> None:
    world = cluster("ab", replicas=1)
    lost = [row.partition for row in world.partitions() if row.server == "a"]
    gone = Choices(frozenset("a"))
    found = rebuild(all_live(world, but="a"), gone, 0)
    assert len(found.problems) == len(lost)
    assert "is lost with a; nobody has a copy. --accept-loss" in found.problems[0]
    found = rebuild(all_live(world, but="a"), Choices(gone.without, accept_loss=True), 0)
    assert (found.problems, found.offline, found.lossy) == ([], lost, [])


def test_an_incomplete_copy_takes_over_only_when_loss_is_accepted() -> None:
    world = cluster("ab", replicas=1)
    row = next(r for r in world.partitions() if r.server == "a" and r.partition)
    world.move(row.partition, "a", "b")
    world.plan()
    assert world.sets(row.partition) == ("a", "b")
    said = all_live(world, but="a")
    assert any("b has an incomplete copy" in p for p in rebuild(said, Choices(frozenset("a")), 0).problems)
    found = rebuild(said, Choices(frozenset("a"), accept_loss=True), 0)
    assert found.lossy == [row.partition]
    assert begin_on(found, world).row(row.partition).server == "b"


def test_an_epoch_that_nobody_can_explain_is_refused() -> None:
    world = cluster("abc", replicas=2)
    said = all_live(world)
    said[0].replicas[0].promised += 1
    (problem,) = rebuild(said, Choices(), 0).problems
    assert "no server that answers knows who leads it" in problem
    assert rebuild(said, Choices(accept_loss=True), 0).problems == []


def test_a_schema_that_nobody_knows() -> None:
    world = cluster("ab")
    said = all_live(world)
    for one in said:
        one.ClearField("tables")
    assert "knows the schema of table 'g0/0'" in rebuild(said, Choices(), 0).problems[0]
    found = rebuild(said, Choices(accept_loss=True), 0)
    assert (found.problems, found.dropped) == ([], ["g0/0"])
    assert [row.partition for row in begin_on(found, world).partitions()] == [0]


def test_a_restore_that_was_under_way_is_refused() -> None:
    world = cluster("ab")
    said = all_live(world)
    for one in said:
        one.map.partitions[1].state = pb.PARTITION_STATE_RESTORING
    assert "was being loaded from a checkpoint" in rebuild(said, Choices(), 0).problems[0]


# --- clients ---


def test_clients_live_on_and_fences_are_repeated_and_no_id_is_given_twice() -> None:
    world = cluster("ab")
    said = all_live(world)
    said[0].clients.add(client_id=7, member=True, slot="host-0/1")
    said[0].clients.add(client_id=9)
    said[1].clients.add(client_id=7)
    said[1].clients.add(client_id=5)
    said[0].fenced.extend([5, 6])
    said[1].fenced_through = 3
    after = begin_on(rebuild(said, Choices(), 0), world)
    assert (after.client_row(7).slot, after.client_row(7).role, after.client_row(9).role) == (
        "host-0/1",
        "worker",
        "tool",
    )
    assert after.state.client(5) is None
    (operation,) = after.state.operations()
    assert (operation.stage, operation.clients) == (Stage.FENCE, (5, 6))
    assert after.client("h/1", 1) == 9 + LEAP
    assert set(after.state.beating()) >= {NodeKey.client(7), NodeKey.client(9)}


def test_a_supervisor_that_comes_back_claims_its_slots() -> None:
    """Until then a member counts as beating for itself, so one whose host is lost as well is found out."""
    world = cluster("ab")
    said = all_live(world)
    for client, slot in ((7, "host-0/1"), (8, "host-1/0"), (9, "host-0/2")):
        said[0].clients.add(client_id=client, member=True, slot=slot)
    after = begin_on(rebuild(said, Choices(), 0), world)
    after.host("host-0", 77)
    assert (after.client_row(7).host, after.client_row(7).host_incarnation) == ("host-0", 77)
    assert {key.name for key in after.state.beating() if key.kind == "client"} == {"8", "9"}
    after.do(lambda d: membership.exit_of_slot(d, Ref("host-0", 77), "host-0/1", -9))
    assert after.client_row(7).state is ClientState.EVICTED
    after.do(lambda d: membership.silent(d, NodeKey.client(8), 11.0, 10.0))
    assert after.client_row(8).state is ClientState.EVICTED


# --- anything may have happened before ---


class LosingTheStore(Replication):
    """The whole brain under random events, its store lost now and then and made anew."""

    def _live(self) -> list[Ref]:
        return [row.ref for row in self.world.state.live_servers()]

    @precondition(lambda self: self.world.partitions() and self._live())
    @rule(data=st.data(), ending=st.booleans())
    def lose_the_state(self, data: st.DataObject, ending: bool) -> None:
        """All know the newest map, or some an older one; some end with the coordinator."""
        live = self._live()
        gone = (
            set(data.draw(st.sets(st.sampled_from(live), max_size=len(live) - 1)))
            if ending and len(live) > 1
            else set()
        )
        heard = [ref for ref in live if ref not in gone]
        # Dead for silence, and yet it may be asked: it stopped following the map at some time.
        heard += [ref for ref, row in self.world.servers().items()
                  if row.state is NodeState.DEAD and not row.certain and ref not in self.ended]  # fmt: skip
        said = [word_of(self.world, ref) for ref in heard]
        held = {ref for row in self.world.partitions() for ref in (row.primary, *row.holders)}
        if gone & held:
            assert rebuild(said, Choices(), 0).problems, "a silent holder must be accounted for"
        choices = Choices(frozenset(ref.name for ref in gone))
        found = rebuild(said, choices, 0)
        lossy = bool(found.problems)
        if lossy:
            assert all("is lost with" in problem for problem in found.problems), found.problems
            found = rebuild(said, Choices(choices.without, accept_loss=True), 0)
        self._go_on(found, gone, lossy)

    def _go_on(self, found: Rebuilt, gone: set[Ref], lossy: bool) -> None:
        before = self.before
        self.world = begin_on(found, self.world)
        self.ended |= gone
        live = set(self._live())
        for row in self.world.partitions():
            old = before[row.partition]
            assert (row.epoch >= old.epoch + LEAP, row.version > old.version) == (True, True)
            assert set(row.isr) <= set(old.holders)
            if row.state is PartitionState.ONLINE:
                assert row.primary in live
                if row.partition not in found.lossy:
                    assert row.primary in old.isr, "9: nobody outside the in-sync set is promoted"
                    assert row.primary in self.complete[row.partition], "1: it has all that was acknowledged"
                else:
                    assert lossy
                    self.complete[row.partition] = {row.primary}
        self.before = {row.partition: row for row in self.world.partitions()}
        self.version = self.world.state.job.map_version
        self.failovers, self.dropped, self.seen = set(), {}, self.seen


LosingTheStore.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestLosingTheStore = LosingTheStore.TestCase


@pytest.mark.parametrize("broken", range(1, 4))
def test_a_store_that_is_half_written_is_not_started_on_and_may_be_written_again(broken: int) -> None:
    from paramesh.errors import ConfigError
    from paramesh_coordinator.store import StoreError

    class Breaking(MemoryStore):
        left = broken

        def transact(self, compare, writes) -> None:  # type: ignore[no-untyped-def]
            type(self).left -= 1
            if not type(self).left:
                raise StoreError("the medium failed")
            super().transact(compare, writes)

    world, medium = cluster("ab"), MemoryMedium()
    found = rebuild(all_live(world), Choices(), 0)
    rows = sorted((k, encode(r)) for k, r in found.rows.items())
    with pytest.raises(StoreError):
        write_state(Breaking(medium), rows, found.term, "x")
    if MemoryStore(medium).scan(""):
        with pytest.raises(ConfigError, match="repeat psctl meta rebuild"):
            check_not_moved(MemoryStore(medium))
    write_state(MemoryStore(medium), rows, found.term, "x")
    assert MemoryStore(medium).scan("") == rows
    with pytest.raises(ConfigError, match="holds a cluster already"):
        write_state(MemoryStore(medium), rows, found.term, "x")
