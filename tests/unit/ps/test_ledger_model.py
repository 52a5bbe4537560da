"""The ledger against simple models, by random histories (Hypothesis).

`SyncModel`: members come, go, are evicted, fall idle; lease, step, return. After every event:
no step lacks an ACTIVE member, contributors are in rank order, a decision never changes
(invariant 14); a decision exists whenever every ACTIVE member is ready (17); each chunk of an
epoch is in at most one committed step and none is lost (20).

`SspModel`: clocks run; a clock starts iff the bound allows it (16), and its floors cover all
it must reflect.

`World` checks after every event that replaying the records gives an equal state, and that a
refused request changed nothing (27). At any event the primary may die, its answer and some of
its records lost; the follower takes over without anything volatile, and who waits asks again:
all of the above still holds (1, 9, 14, 17, 20).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from paramesh.errors import ParameshError
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger import Wait

from tests.unit.ps.ledger_world import World, spec

ACTIVE, BETWEEN, IDLE = lg.ACTIVITY_ACTIVE, lg.ACTIVITY_BETWEEN, lg.ACTIVITY_IDLE
PARKED = -1
"""The model's own: waits in a Lease with nothing left to train on."""

LENGTH, CHUNK = 26, 3
CHUNKS = set(range(9))

Range = tuple[int, int]
"""(epoch, chunk)."""

which = st.integers(0, 5)
"""Picks a member, by position modulo their number."""


class Client:
    """What one worker knows of itself."""

    def __init__(self, client_id: int):
        self.id = client_id
        self.activity = BETWEEN
        self.held: set[Range] = set()
        self.pending: tuple[int, frozenset[Range], bool] | None = None
        """(step, ranges, skip) of a Ready that has no answer yet."""
        self.epoch = 0
        self.clock = 0
        self.calls = 0
        """Lease calls so far."""


def as_range(chunk: Range) -> t.SampleRange:
    begin = chunk[1] * CHUNK
    return t.SampleRange(dataset="d", epoch=chunk[0], begin=begin, end=min(LENGTH, begin + CHUNK))


class Model(RuleBasedStateMachine):
    """Members that come and go."""

    mode = lg.MODE_SYNC
    events: ClassVar[dict[str, Callable[[Any, int], None]]] = {
        "join": lambda self, _: self.join() if len(self.clients) < 5 else None,
        "leave": lambda self, number: self.end(number, "leave"),
        "evict": lambda self, number: self.end(number, "evict"),
        "active": lambda self, number: self.set_activity(number, ACTIVE),
        "between": lambda self, number: self.set_activity(number, BETWEEN),
        "idle": lambda self, number: self.set_activity(number, IDLE),
    }
    """Events in which the primary may die; the number picks a member."""
    group_fields: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.clients: dict[int, Client] = {}
        self.ids = 0
        self.started = False
        self.start_workers = 1
        self.group_fields = {}

    def make(self, start_workers: int, **group_fields: Any) -> None:
        self.world = World(start_workers=start_workers)
        self.start_workers = start_workers
        self.group_fields = group_fields

    def pick(self, number: int) -> Client:
        return list(self.clients.values())[number % len(self.clients)]

    @precondition(lambda self: len(self.clients) < 5)
    @rule()
    def join(self) -> None:
        self.ids += 1
        self.world.join(self.ids)
        self.clients[self.ids] = Client(self.ids)
        self.started = self.started or len(self.clients) >= self.start_workers
        position = self.world.open(self.ids, spec(mode=self.mode, **self.group_fields)).position
        self.clients[self.ids].clock = position.next_step
        self.learn()

    def gone(self, client: Client) -> None:
        del self.clients[client.id]

    @precondition(lambda self: self.clients)
    @rule(number=which, how=st.sampled_from(["leave", "evict"]))
    def end(self, number: int, how: str) -> None:
        client = self.pick(number)
        getattr(self.world, how)(client.id)
        self.gone(client)
        with pytest.raises(ParameshError):
            self.world.active(client.id)

    @precondition(lambda self: self.clients)
    @rule(number=which, activity=st.sampled_from([ACTIVE, ACTIVE, BETWEEN, IDLE]))
    def set_activity(self, number: int, activity: int) -> None:
        client = self.pick(number)
        if client.pending is None:  # a worker that waits for its step says nothing else
            before = self.live()
            response = self.world.activity(client.id, activity)
            if activity == ACTIVE and client.activity != ACTIVE:
                self.entered(client, before, response.groups[0].next_step)
            client.activity = activity
            self.learn()

    @rule()
    def snapshot(self) -> None:
        self.world.snapshot()

    def fail(self, event: str, number: int, keep: int) -> None:
        """The primary dies in an event (or after it, if it came to nothing); who waits asks again."""
        if self.clients or event == "join":
            self.world.fail_during(keep)
            self.events[event](self, number)
        if self.world.fails:
            self.world.promote()
        self.recover(number)

    def recover(self, first: int) -> None:
        """Whoever had no answer asks again, in an order that begins with `first`."""

    def learn(self) -> None:
        """Take note of what followed from an event."""

    def live(self) -> dict[int, int]:
        return {c.id: c.clock for c in self.clients.values() if c.activity == ACTIVE}

    def entered(self, client: Client, before: dict[int, int], next_step: int) -> None:
        """A member became ACTIVE."""


class SyncModel(Model):
    """Steps and leases in lockstep."""

    events = Model.events | {
        "lease": lambda self, number: self.lease(number, want=2, wait=False, move_on=False),
        "wait": lambda self, number: self.lease(number, want=1, wait=True, move_on=False),
        "ready": lambda self, number: self.ready(number, count=2, skip=False),
        "give back": lambda self, number: self.give_back(number, count=2),
        "train": lambda self, number: self.train(want=1, lazy=number, then=""),
    }

    def __init__(self) -> None:
        super().__init__()
        self.records: list[t.StepRecord] = []
        self.consumed: set[Range] = set()

    @initialize(start_workers=st.integers(1, 3), backup=st.sampled_from([0, 0, 0, 1]))
    def begin(self, start_workers: int, backup: int) -> None:
        self.make(start_workers, backup_workers=backup)

    # ------------------------------------------------------------------ events

    @rule(event=st.sampled_from(sorted(events)), number=which, keep=st.integers(0, 6))
    def failover(self, event: str, number: int, keep: int) -> None:
        self.fail(event, number, keep)

    def recover(self, first: int) -> None:
        count = len(self.clients)
        for client in [self.pick(first + i) for i in range(count)]:
            number = list(self.clients).index(client.id)
            if client.pending is not None:
                self.ready(number, count=0, skip=False)
            elif client.activity == PARKED:
                self.lease(number, want=1, wait=True, move_on=False)

    def gone(self, client: Client) -> None:
        super().gone(client)
        self.learn()

    @precondition(lambda self: self.clients)
    @rule(number=which, want=st.integers(1, 4), wait=st.booleans(), move_on=st.sampled_from([False] * 9 + [True]))
    def lease(self, number: int, want: int, wait: bool, move_on: bool) -> None:
        client = self.pick(number)
        if client.pending is not None:
            return
        client.epoch += move_on
        client.calls += 1
        answer = self.world.lease(
            client.id, client.epoch, length=LENGTH, chunk=CHUNK, want=want, wait=wait, call=client.calls
        )
        if isinstance(answer, Wait):
            assert wait or not self.started
            if self.started and not self.holds(client) and client.activity != IDLE:
                client.activity = PARKED
                self.learn()
            return
        got = {(client.epoch, lease.begin // CHUNK) for lease in answer.leases}
        assert len(got) == len(answer.leases) <= want
        assert not got & self.consumed, "invariant 20: dealt after it was consumed"
        for other in self.clients.values():
            assert not got & other.held, "invariant 20: dealt to two members"
        client.held |= got
        assert answer.between == (client.activity != ACTIVE)
        if client.activity == PARKED:
            client.activity = BETWEEN
        if answer.finished:
            client.epoch += 1

    def holds(self, client: Client) -> set[Range]:
        return {chunk for chunk in client.held if chunk[0] == client.epoch}

    @precondition(lambda self: self.clients)
    @rule(number=which, count=st.integers(0, 3))
    def give_back(self, number: int, count: int) -> None:
        client = self.pick(number)
        chosen = sorted(self.holds(client))[:count]
        if client.pending is None and chosen:
            self.world.give_back(client.id, *map(as_range, chosen), epoch=client.epoch)
            client.held -= set(chosen)

    @precondition(lambda self: self.clients)
    @rule(number=which, count=st.integers(0, 3), skip=st.sampled_from([False, False, True]))
    def ready(self, number: int, count: int, skip: bool) -> None:
        client = self.pick(number)
        if client.pending is not None:
            step, ranges, skip = client.pending
        else:
            step, ranges = len(self.records), frozenset(sorted(client.held)[:count])
        client.pending = (step, ranges, skip)
        samples = [as_range(chunk) for chunk in sorted(ranges)]
        answer = self.world.ready(client.id, step, weight=1 + len(ranges), samples=samples, skip=skip)
        client.activity = ACTIVE
        self.learn()
        if not isinstance(answer, Wait):
            assert answer.record == self.records[step]

    @precondition(lambda self: self.clients)
    @rule(want=st.integers(1, 2), lazy=which, then=st.sampled_from(["", "", "leave", "evict", "idle"]))
    def train(self, want: int, lazy: int, then: str) -> None:
        """Everybody but one leases and is ready; then that one stays, goes or falls idle."""
        for number in range(len(self.clients)):
            if number != lazy:
                self.lease(number, want, wait=False, move_on=False)
                self.ready(number, count=want, skip=False)
        if then == "idle" and lazy < len(self.clients):
            self.set_activity(lazy, IDLE)
        elif then and lazy < len(self.clients):
            self.end(lazy, then)

    @precondition(lambda self: len(self.clients) > 1)
    @rule(one=which, other=which)
    def foreign_ready(self, one: int, other: int) -> None:
        client, victim = self.pick(one), self.pick(other)
        if client is not victim and victim.held and client.pending is None:
            foreign = [as_range(min(victim.held))]
            with pytest.raises(ParameshError) as caught:
                self.world.ready(client.id, len(self.records), samples=foreign)
            assert caught.value.reason == "LEASE"

    @rule(seconds=st.sampled_from([0.5, 1.0, 25.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)
        self.learn()
        pending = [c for c in self.clients.values() if c.pending]
        if seconds > 20 and pending and self.started:
            late = [c for c in self.clients.values() if c.activity == ACTIVE and c.pending is None]
            assert late, "invariant 17: every ACTIVE member is ready, gathers are over, and nothing is decided"

    # ------------------------------------------------------------------ what must hold

    def learn(self) -> None:
        """Read the decisions made since, check them, and let their contributors know."""
        request = lg.GetStepsRequest(group=1, first=len(self.records))
        if not self.world.ledger._groups.state:
            return
        for record in self.world.do(lambda now: self.world.ledger.get_steps(request, now)).records:
            assert record.step == len(self.records)
            self.decided(record)
            self.records.append(record)

    def decided(self, record: t.StepRecord) -> None:
        named = [c.client_id for c in record.contributors]
        ranks = [c.rank for c in record.contributors]
        assert named
        assert ranks == sorted(set(ranks)), "invariant 14: rank order"
        active = {c.id for c in self.clients.values() if c.activity == ACTIVE}
        missing = active - set(named)
        assert len(missing) <= self.group_fields["backup_workers"], "invariant 14: every ACTIVE member"
        for contributor in record.contributors:
            client = self.clients[contributor.client_id]
            assert client.pending is not None
            assert client.pending[0] == record.step
            chunks = client.pending[1]
            assert contributor.weight == 1 + len(chunks)
            assert not chunks & self.consumed, "invariant 20: consumed twice"
            self.consumed |= chunks
            client.held -= chunks
            client.pending = None
        for client in self.clients.values():
            if client.pending is not None and client.pending[0] == record.step:
                self.too_late(client, record)

    def too_late(self, client: Client, record: t.StepRecord) -> None:
        """Who was not named is told so, and its samples go back."""
        assert client.pending is not None
        step, chunks, _ = client.pending
        answer = self.world.decided(client.id, step, samples=[as_range(chunk) for chunk in sorted(chunks)])
        assert not answer.included
        assert answer.record == record
        client.held -= chunks
        client.pending = None

    @invariant()
    def decisions_never_change(self) -> None:
        if self.records and len(self.records) <= 64:
            request = lg.GetStepsRequest(group=1, first=0)
            kept = self.world.do(lambda now: self.world.ledger.get_steps(request, now)).records
            assert list(kept) == self.records, "invariant 14"

    @invariant()
    def a_decision_exists_when_it_can(self) -> None:
        members = self.clients.values()
        if not self.started or not any(c.pending for c in members):
            return
        waits = [c for c in members if c.pending is None and c.activity in (ACTIVE, BETWEEN)]
        # The model does not follow who ran out of gather: BETWEEN stands for maybe.
        assert waits or any(c.activity == PARKED for c in members), "invariant 17: nobody is waited for"
        if not waits:
            assert not any(c.activity == PARKED and c.pending for c in members)
            raise AssertionError("invariant 17: only waiting members are left, and no step was decided")

    @invariant()
    def samples_are_counted_once(self) -> None:
        for epoch in self.world.status().epochs if self.clients else ():
            chunks = [c for e, c in self.consumed if e == epoch.epoch]
            assert epoch.consumed == sum(min(CHUNK, LENGTH - c * CHUNK) for c in chunks)

    def teardown(self) -> None:
        """Invariant 20, to the end: what is not consumed is there for whoever comes."""
        if not hasattr(self, "world"):
            return
        for client in list(self.clients.values()):
            self.world.evict(client.id)
            self.gone(client)  # which may decide a step for those that are left
        for joined in range(1001, 1001 + self.start_workers):
            self.world.join(joined)
        closed = self.world.ledger._epochs.state.closed.get("d", set())
        for epoch in range(4):
            if epoch in closed:
                continue
            for joined in range(1001, 1001 + self.start_workers):
                self.world.lease(joined, epoch, length=LENGTH, chunk=CHUNK, want=99)
            held = self.world.ledger._epochs.state.epochs[("d", epoch)].held
            rest = set().union(*held.values())
            gone = {chunk for e, chunk in self.consumed if e == epoch}
            assert rest | gone == CHUNKS, "invariant 20: a sample is skipped"
            assert not rest & gone, "invariant 20: a sample is dealt again after it was consumed"


class SspModel(Model):
    """Clocks within a bound."""

    mode = lg.MODE_SSP
    events = Model.events | {
        "clock": lambda self, number: self.clock(number, partition=1, again=False) if self.live() else None,
    }

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[int, dict[int, int]] = {}
        """For each clock, the highest lsn told of each partition."""
        self.lsn = 0
        self.staleness = 0

    @rule(event=st.sampled_from(sorted(events)), number=which, keep=st.integers(0, 3))
    def failover(self, event: str, number: int, keep: int) -> None:
        self.fail(event, number, keep)

    @initialize(staleness=st.integers(0, 3))
    def begin(self, staleness: int) -> None:
        self.staleness = staleness
        self.make(1, staleness=staleness)

    def entered(self, client: Client, before: dict[int, int], next_step: int) -> None:
        others = [clock for other, clock in before.items() if other != client.id]
        everybody = [c.clock for c in self.clients.values()]
        expected = max(client.clock, min(others) if others else max(everybody))
        assert next_step == expected, "a joiner starts at the minimum"
        client.clock = next_step

    @precondition(lambda self: any(c.activity == ACTIVE for c in self.clients.values()))
    @rule(number=which, partition=st.sampled_from([1, 2]), again=st.booleans())
    def clock(self, number: int, partition: int, again: bool) -> None:
        active = [c for c in self.clients.values() if c.activity == ACTIVE]
        client = active[number % len(active)]
        finished = client.clock + (not again)
        if not again and not self.allowed(client.clock):
            return  # it is still waiting to start the clock that it would finish
        told: dict[int, tuple[int, int]] = {}
        if not again:
            self.lsn += 1
            told[partition] = (1, self.lsn)
            self.told.setdefault(client.clock, {})[partition] = self.lsn
            client.clock = finished
        answer = self.world.clock(client.id, finished, told)
        assert isinstance(answer, lg.ClockResponse) == self.allowed(finished), "invariant 16"
        if isinstance(answer, lg.ClockResponse):
            self.check_floors(finished, {f.partition: f.lsn for f in answer.floors})

    def allowed(self, clock: int) -> bool:
        return min(self.live().values()) >= clock - self.staleness

    def check_floors(self, clock: int, floors: dict[int, int]) -> None:
        for earlier, told in self.told.items():
            for partition, lsn in told.items():
                if earlier <= clock - self.staleness - 1:
                    assert floors.get(partition, 0) >= lsn, "invariant 16: a pull must reflect it"
        for partition, lsn in floors.items():
            assert lsn <= max(told.get(partition, 0) for told in self.told.values())

    @invariant()
    def clocks_agree(self) -> None:
        if self.clients:
            clocks = {m.client_id: m.clock for m in self.world.status().members}
            assert clocks == {c.id: c.clock for c in self.clients.values()}
            assert self.world.status().groups[0].widest_gap <= self.staleness, "invariant 16"


QUICK = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,  # the same histories in every run; the soak draws new ones
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes; the soak does it
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=3000, stateful_step_count=80, derandomize=False, phases=list(Phase))


@pytest.mark.parametrize("machine", [SyncModel, SspModel])
def test_invariants_14_16_17_20_hold_in_random_histories(machine: type[Model]) -> None:
    run_state_machine_as_test(machine, settings=QUICK)


@pytest.mark.soak
@pytest.mark.parametrize("machine", [SyncModel, SspModel])
def test_invariants_14_16_17_20_hold_in_many_random_histories(machine: type[Model]) -> None:
    run_state_machine_as_test(machine, settings=LONG)
