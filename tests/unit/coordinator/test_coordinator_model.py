"""The whole brain under random events, beside a model of who has what was acknowledged.

The model knows of each partition the servers that have everything acknowledged so far, and
of each server whether its process still runs. What the coordinator does is checked after
every rule against that, against the rows before, and against the store.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paramesh.errors import ParameshError
from paramesh_coordinator.rows import NodeState, PartitionRow, PartitionState, Ref
from paramesh_coordinator.state import ClusterState, Dropped, FailedOver, Senses, build_map

from tests.unit.coordinator.world import World, table_spec

NAMES = "abcd"
HOSTS = {"a": "x", "b": "x", "c": "y", "d": ""}

REFUSED = {
    "QUOTA",
    "NODE_NAME",
    "INCARNATION",
    "NOT_READY",
    "SCHEMA",
    "PARTITION_OFFLINE",
    "UNKNOWN_NODE",
    "WRONG_PARTITION",
}


def _came_back(old: PartitionRow, row: PartitionRow) -> bool:
    return old.state is PartitionState.OFFLINE and row.state is PartitionState.ONLINE


class Replication(RuleBasedStateMachine):
    """Four servers, up to three replicas."""

    @initialize(replicas=st.sampled_from([2, 3, 2, 1]), servers=st.sampled_from([3, 4, 2]))
    def begin(self, replicas: int, servers: int) -> None:
        self.world = World(min_servers=servers, replicas=replicas)
        self.newest = dict.fromkeys(NAMES, 0)
        self.ended: set[Ref] = set()
        """Processes that certainly ended."""
        self.complete: dict[int, set[Ref]] = {}
        """Who has every acknowledged record."""
        self.seen: list[tuple[int, PartitionRow]] = []
        """Rows as primaries saw them once."""
        self.removable: set[str] = set()
        """Why in-sync members may leave in this rule."""
        self.before: dict[int, PartitionRow] = {}
        self.version = 0
        self.failovers: set[int] = set()
        self.dropped: dict[tuple[int, Ref], float] = {}
        self.unheard: set[str] = set()
        for name in NAMES[:servers]:
            self._register(name, 1)
        self._watch()

    # --- the surroundings of each decision ---

    def _decide(self, call: object, *args: object, may: tuple[str, ...] = (), **more: object) -> object:
        """Run one event; afterwards `_watch` judges what it changed."""
        self.world.senses = Senses(
            fresh=lambda ref: ref.name not in self.unheard, held_back=frozenset(self.failovers), dropped=self.dropped
        )
        self.removable = set(may)
        try:
            result = call(*args, **more)  # type: ignore[operator]
        except ParameshError as error:
            if error.reason not in REFUSED:
                raise
            self.world.effects, result = [], None
        for effect in self.world.effects:
            if isinstance(effect, FailedOver):
                self.failovers.add(effect.partition)
            elif isinstance(effect, Dropped):
                self.dropped[effect.partition, effect.ref] = 0.0
        self._watch()
        return result

    def _state(self, ref: Ref) -> NodeState | None:
        row = self.world.servers().get(ref)
        return row.state if row else None

    def _certain(self, ref: Ref) -> bool:
        row = self.world.servers().get(ref)
        return row is None or row.certain

    def _watch(self) -> None:
        live = {row.ref for row in self.world.state.live_servers()}
        for row in self.world.partitions():
            old = self.before.get(row.partition)
            if old is None:
                self.complete[row.partition] = set(row.isr)
            elif old != row:
                self._judge(old, row, live)
        rows = {row.partition: row for row in self.world.partitions()}
        assert rows.keys() >= self.before.keys()
        assert self.world.state.job.map_version >= self.version
        self.before, self.version = rows, self.world.state.job.map_version

    def _judge(self, old: PartitionRow, row: PartitionRow, live: set[Ref]) -> None:
        assert row.epoch >= old.epoch, "4: epochs only rise"
        assert row.version > old.version, "every change of a row is a new version of it"
        assert row.version == self.world.state.job.map_version
        assert (row.epoch > old.epoch) == (row.primary != old.primary or _came_back(old, row)), "one epoch per change"
        lossy = "promote" in self.removable
        if row.primary != old.primary or _came_back(old, row):
            assert row.primary in live
            assert lossy or row.primary in old.isr, "9: nobody outside the in-sync set is promoted"
            assert lossy or row.primary in self.complete[row.partition], "9: it has all that was acknowledged"
        for ref in set(old.isr) - set(row.isr):
            assert lossy or self._certain(ref) or self.removable & {"isr", "surplus"}, (ref, old, row)
        for ref in set(row.isr) - set(old.isr):
            assert "isr" in self.removable or lossy, "only a primary says that a learner is in sync"
            assert ref in old.learners
        if lossy and row.primary not in self.complete[row.partition]:
            self.complete[row.partition] = {row.primary}

    # --- servers ---

    def _register(self, name: str, incarnation: int, replace: bool = False) -> None:
        self.newest[name] = max(self.newest[name], incarnation)
        self._decide(self.world.server, name, incarnation, replace=replace, host=HOSTS[name])
        ref = Ref(name, incarnation)
        if self._state(ref) is NodeState.LIVE:
            self.ended |= {Ref(name, n) for n in range(1, incarnation)}

    def _names(self, state: NodeState | None, certain: bool = False) -> list[str]:
        """Whose newest process is in a state."""
        newest = {name: self.world.servers().get(Ref(name, n)) for name, n in self.newest.items()}
        return [n for n, row in newest.items() if (row and row.state) is state and certain == bool(row and row.certain)]

    @rule(data=st.data(), replace=st.booleans())
    def start(self, data: st.DataObject, replace: bool) -> None:
        """The next process of a server that ended; or of a live one, which it replaces."""
        gone = [*self._names(NodeState.DEAD, certain=True), *self._names(NodeState.LEFT, True), *self._names(None)]
        if gone or replace:
            name = data.draw(st.sampled_from(gone or list(NAMES)))
            self._register(name, self.newest[name] + 1, replace=True)
            self.plan()

    @precondition(lambda self: self._names(NodeState.DEAD))
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """A silent process is heard again, unless it has ended without anybody's knowing."""
        name = data.draw(st.sampled_from(self._names(NodeState.DEAD)))
        if Ref(name, self.newest[name]) not in self.ended:
            self._register(name, self.newest[name])

    @precondition(lambda self: len(self._names(NodeState.LIVE)) > 2)
    @rule(data=st.data(), how=st.sampled_from(["exit", "leave"]))
    def end(self, data: st.DataObject, how: str) -> None:
        """A process ends, and somebody says so: perhaps of one that is dead for silence."""
        name = data.draw(st.sampled_from([*self._names(NodeState.LIVE), *self._names(NodeState.DEAD)]))
        ref = Ref(name, self.newest[name])
        self.ended.add(ref)
        self._decide(getattr(self.world, how), name, ref.incarnation)

    @precondition(lambda self: len(self._names(NodeState.LIVE)) > 1)
    @rule(data=st.data())
    def fall_silent(self, data: st.DataObject) -> None:
        names = data.draw(st.sets(st.sampled_from(self._names(NodeState.LIVE)), min_size=1, max_size=2))
        if len(self._names(NodeState.LIVE)) - len(names) < 1:
            return
        by_incarnation = {n: self.newest[n] for n in names}
        for incarnation in set(by_incarnation.values()):
            mine = sorted(n for n in names if by_incarnation[n] == incarnation)
            epochs = {row.partition: row.epoch for row in self.world.partitions()}
            held = set(self.failovers)
            self._decide(self.world.silent, *mine, incarnation=incarnation)
            for row in self.world.partitions():
                if row.partition in held:
                    assert row.epoch == epochs.get(row.partition), "a second failover for silence"

    # --- primaries ---

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        """A primary reads its row; it may act on it much later."""
        if self.world.partitions():
            self.seen.append((0, data.draw(st.sampled_from(self.world.partitions()))))

    @rule(data=st.data(), stale=st.booleans())
    def change_isr(self, data: st.DataObject, stale: bool) -> None:
        """A primary asks: joins only those that have everything, drops whom it likes."""
        pool = [row for _, row in self.seen] if stale else self.world.partitions()
        if not pool:
            return
        row = data.draw(st.sampled_from(pool))
        joining = set(row.learners) if data.draw(st.booleans()) else set()
        leaving = set() if joining else set(data.draw(st.sampled_from([row.isr[1:], row.isr[-1:], ()])))
        strangers = set(data.draw(st.sampled_from([[], [], [*self.world.servers()][-1:]]))) - {*row.holders}
        isr = tuple(ref for ref in (*row.isr, *sorted(joining | strangers)) if ref not in leaving)
        now = self.world.row(row.partition)
        fresh = (row.epoch, row.version, row.primary) == (now.epoch, now.version, now.primary)
        if fresh:
            # By the protocol it waits for them first, and asks when they have everything.
            self.complete[row.partition] |= joining
        wish = {"epoch": row.epoch, "version": row.version, "asking": row.primary}
        done = self._decide(self.world.change_isr, row.partition, isr, may=("isr",), **wish)
        if not fresh or row.primary not in isr or strangers:
            assert not done, "a wish was granted that is stale or names a stranger"
        if done and not set(row.isr) <= set(isr):
            assert row.primary.name not in self.unheard, "dropped by one that is not heard"

    @precondition(lambda self: self._catching_up())
    @rule(data=st.data())
    def catch_up(self, data: st.DataObject) -> None:
        """A learner has everything: its primary asks for it."""
        row = data.draw(st.sampled_from(self._catching_up()))
        self.complete[row.partition] |= set(row.learners)
        assert self._decide(self.world.change_isr, row.partition, row.holders, may=("isr",))

    def _catching_up(self) -> list[PartitionRow]:
        return [row for row in self.world.partitions() if row.learners and row.state is PartitionState.ONLINE]

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        """A push is acknowledged: everybody in sync has it, others may lack it from now on."""
        online = [row for row in self.world.partitions() if row.state is PartitionState.ONLINE]
        if online:
            row = data.draw(st.sampled_from(online))
            # All of the set acknowledge, or nobody: a silent or ended member holds the push up.
            if not any(ref in self.ended or self._state(ref) is not NodeState.LIVE for ref in row.isr):
                self.complete[row.partition] = set(row.isr)

    # --- the coordinator ---

    @rule(auto=st.booleans())
    def plan(self, auto: bool = False) -> None:
        offline = {row.partition for row in self.world.partitions() if row.state is PartitionState.OFFLINE}
        self._decide(self.world.plan, may=("surplus",), auto=auto)
        moving = {move.partition for move in self.world.state.moves()}
        for row in self.world.partitions():
            wanted = [ref for ref in row.holders if self._state(ref) is NodeState.LIVE]
            if row.partition not in offline and row.state is PartitionState.ONLINE:
                room = max(row.replicas, len(row.isr)) + (row.partition in moving)
                assert len(wanted) <= room, "learners nobody needs"

    @rule(data=st.data(), source=st.sampled_from(NAMES), to=st.sampled_from(NAMES))
    def move(self, data: st.DataObject, source: str, to: str) -> None:
        """An operator moves one replica; perhaps again before the first has gone."""
        if self.world.partitions():
            row = data.draw(st.sampled_from(self.world.partitions()))
            self._decide(self.world.move, row.partition, source, to)

    @rule(name=st.sampled_from(NAMES), undo=st.booleans(), leaving=st.booleans())
    def drain(self, name: str, undo: bool, leaving: bool) -> None:
        if undo:
            self._decide(self.world.undrain, name)
        else:
            self._decide(self.world.drain, name, leaving=leaving)

    @rule()
    def even_out(self) -> None:
        self._decide(self.world.even_out)

    @precondition(lambda self: self._names(NodeState.LIVE))
    @rule()
    def everything_goes_well(self) -> None:
        """With nothing in the way, every open move comes to its end."""
        self.unheard, self.dropped, self.failovers = set(), {}, set()
        for _ in range(300):
            self.plan()
            ready = self._catching_up()
            if not ready and not self.world.state.moves():
                return
            for row in ready:
                self.complete[row.partition] |= set(row.learners)
                assert self._decide(self.world.change_isr, row.partition, row.holders, may=("isr",))
        raise AssertionError(f"moves never end: {self.world.state.moves()[:3]}")

    @precondition(lambda self: len(self.world.partitions()) < 8)
    @rule(number=st.integers(0, 2), replicas=st.integers(0, 3))
    def table(self, number: int, replicas: int) -> None:
        spec = table_spec(f"t{number}", 256 * (number + 1))
        spec.replicas = replicas
        self._decide(self.world.table, spec)

    @rule(restart=st.booleans())
    def time_passes(self, restart: bool) -> None:
        """At a restart the memory of moments is gone; the rows are not."""
        if restart:
            self._decide(self.world.restart)
        self.failovers.clear()
        self.dropped = {} if restart else {key: at + 2.0 for key, at in self.dropped.items()}

    @rule(names=st.sets(st.sampled_from(NAMES)))
    def hear(self, names: set[str]) -> None:
        """Who was not heard within two beats."""
        self.unheard = names

    @precondition(lambda self: any(row.state is PartitionState.OFFLINE for row in self.world.partitions()))
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def promote(self, data: st.DataObject, name: str) -> None:
        from paramesh_coordinator import replicas

        offline = [row for row in self.world.partitions() if row.state is PartitionState.OFFLINE]
        row = data.draw(st.sampled_from(offline))
        done = self._decide(
            lambda: self.world.do(lambda d: replicas.promote_with_loss(d, row.partition, name)), may=("promote",)
        )
        if done:
            assert all(self._certain(ref) for ref in row.isr), "a complete copy might have come back"

    # --- at any time ---

    @invariant()
    def sets_are_sound(self) -> None:
        if not hasattr(self, "world"):
            return
        live = {row.ref for row in self.world.state.live_servers()}
        for row in self.world.partitions():
            online = row.state is PartitionState.ONLINE
            assert row.isr, "empty"
            assert not online or (row.primary in row.isr and row.primary in live)
            assert not online or row.primary not in self.ended, "22: one that ended is the owner"
            assert set(row.isr) <= self.complete[row.partition] or not online, "9: a member lacks something"
            names = [ref.name for ref in row.holders]
            assert len(set(names)) == len(names), "two replicas on one server"
            if any(ref in live for ref in row.isr) and not online:
                assert row.partition in self.failovers or not self._certain(row.primary), "nobody took over"

    @invariant()
    def moves_are_sound(self) -> None:
        if not hasattr(self, "world"):
            return
        partitions = [move.partition for move in self.world.state.moves()]
        assert len(partitions) == len(set(partitions)), "two open moves of one partition"

    @invariant()
    def the_store_tells_the_same(self) -> None:
        if not hasattr(self, "world"):
            return
        stored = ClusterState.load(self.world.store.scan(""), self.world.state.job)
        assert build_map(stored, 1) == build_map(self.world.state, 1)


Replication.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestReplication = Replication.TestCase
