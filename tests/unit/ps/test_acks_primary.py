"""acks=primary: what is acknowledged early is bounded, and what a lost primary took with it is counted exactly."""

from __future__ import annotations

import random

import pytest
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb
from paramesh_server.insync import EARLY_ANYWAY, EARLY_BYTES, EARLY_RECORDS, EARLY_S, InSync, Ref
from paramesh_server.partition import Partition
from paramesh_server.replica import Replica
from paramesh_server.requests import Update
from paramesh_server.writes import SlotFrame, cut_slots
from ps_building import contribution, frame, fresh, random_gradients, table, value_writes

ME, B, C = (Ref(name, 1) for name in "abc")


def row(version: int, epoch: int, *isr: Ref) -> pb.Partition:
    return pb.Partition(version=version, epoch=epoch, primary=isr[0].proto(), isr=[ref.proto() for ref in isr])


def primary(*followers: Ref) -> InSync:
    made = InSync(ME)
    made.follow(row(1, 1, ME, *followers), 0.0)
    for ref in followers:
        made.acked(ref, 0, 10.0)
    return made


def test_records_may_be_acknowledged_up_to_the_bound() -> None:
    one = primary(B)
    for lsn in range(1, EARLY_RECORDS + 2):
        one.appended(lsn, 10.0)
    assert one.commit == 0
    assert one.early(EARLY_RECORDS, 0, 10.0)
    assert not one.early(EARLY_RECORDS + 1, 0, 10.0)
    one.acked(B, 1, 10.0)
    assert one.early(EARLY_RECORDS + 1, 0, 10.0)


def test_bytes_count_too_but_for_the_first_few_records() -> None:
    one = primary(B)
    for lsn in range(1, 10):
        one.appended(lsn, 10.0)
    assert one.early(EARLY_ANYWAY, EARLY_BYTES + 1, 10.0)
    assert not one.early(EARLY_ANYWAY + 1, EARLY_BYTES + 1, 10.0)
    assert one.early(EARLY_ANYWAY + 1, EARLY_BYTES, 10.0)


def test_it_ends_a_second_after_the_last_word_of_any_follower() -> None:
    """One that is cut off from its followers must not go on for clients that cannot know."""
    one = primary(B, C)
    one.appended(1, 10.5)
    one.acked(B, 1, 10.9)
    assert one.early(1, 0, 10.9)
    assert not one.early(1, 0, 10.0 + EARLY_S), "C said nothing for so long"
    one.acked(C, 0, 11.1)
    assert one.early(1, 0, 11.2)


def test_a_follower_that_never_spoke_is_waited_for() -> None:
    made = InSync(ME)
    made.follow(row(1, 1, ME, B), 0.0)
    made.appended(1, 0.0)
    assert not made.early(1, 0, 0.0)


SPEC = table([64], "SGD", {"lr": 1.0}, dtype=pb.DTYPE_FLOAT64)
SPEC.acks = pb.ACKS_PRIMARY


def made(initialised: bool = True) -> Partition:
    one = fresh(SPEC)
    one.log.replicated = True
    if initialised:
        one.assign(99, 1, value_writes(one.layout, random_gradients(one.layout, 1)), init_attempt=1)
    return one


def copied(source: Partition) -> Partition:
    copy = made(initialised=False)
    state = rp.ReplicaState.FromString(source.capture().SerializeToString())
    slots = cut_slots(source.layout, source.flat, source.optimizer)
    copy.restore(state, [SlotFrame(frame(s.offset, bytes(s.data)), s.slot, s.segment, s.scalar) for s in slots])
    return copy


class World:
    """A primary, a follower, clients that push one at a time, and primaries that are lost."""

    def __init__(self, seed: int) -> None:
        self.draw, self.now, self.epoch = random.Random(seed), 0.0, 1
        first = made()
        self.leader, self.follower = Replica(first, ME), Replica(copied(first), B)
        self.acked = dict.fromkeys((1, 2, 3), 0)
        self.applied: list[tuple[int, int]] = []
        """(client, seq) that the leader's state reflects."""
        self.lead()

    def lead(self) -> None:
        self.leader.lead(row(self.epoch, self.epoch, self.leader.me, self.follower.me), self.now)
        self.deliver(10_000)
        self.leader.insync.acked(self.follower.me, self.follower.last.lsn, self.now)

    @property
    def partition(self) -> Partition:
        assert isinstance(self.leader.machine, Partition)
        return self.leader.machine

    def push(self, client: int) -> None:
        """One push; it is acknowledged if that is allowed, else its client sends the same again later."""
        seq = self.acked[client] + 1
        gradient = contribution(self.partition.layout, random_gradients(self.partition.layout, client * 1000 + seq))
        before = self.missing(client)
        outcome = self.partition.push(client, Update(seq, {}, acked=self.acked[client]), gradient)
        assert outcome.lost == before
        if not outcome.duplicate:
            self.applied.append((client, seq))
        self.leader.appended(self.now)
        if self.leader.insync.commit >= outcome.lsn or self.leader.early(self.partition.log.lsn, self.now):
            self.acked[client] = seq

    def missing(self, client: int) -> int:
        """Acknowledged to a client, and neither here nor counted."""
        return max(0, self.acked[client] - self.partition.dedup.last(client))

    def deliver(self, count: int) -> None:
        """Let the follower have so many records, and the leader hear of it."""
        log = self.leader.machine.log
        for record in (log.after(self.follower.last.lsn) or [])[:count]:
            self.follower.offer(self.epoch, log.before(record.header.lsn), record)
        self.follower.learn(self.epoch, self.follower.last, self.leader.commit)
        self.follower.apply()
        self.leader.insync.acked(self.follower.me, self.follower.last.lsn, self.now)

    def lose_the_primary(self) -> None:
        held = self.follower.last.lsn
        total = sum(self.acked.values())
        self.epoch += 1
        old, self.leader = self.leader, self.follower
        self.leader.take_over(self.epoch)
        self.applied = [(c, s) for c, s in self.applied if s <= self.partition.dedup.last(c)]
        lost = sum(self.missing(client) for client in self.acked)
        assert lost <= EARLY_RECORDS, (lost, total, held)
        self.follower = Replica(copied(self.partition), Ref(old.me.node, self.epoch))
        self.lead()


@pytest.mark.parametrize("seed", range(10))
def test_invariant_12_losses_are_bounded_and_counted_exactly(seed: int) -> None:
    world = World(seed)
    for _ in range(400):
        kind = world.draw.random()
        world.now += world.draw.choice([0.0, 0.01, 0.4])
        if kind < 0.75:
            world.push(world.draw.choice([1, 2, 3]))
        elif kind < 0.95:
            world.deliver(world.draw.choice([0, 1, 5, 50]))
        else:
            world.lose_the_primary()
    for client in world.acked:
        world.partition.take_loss(client, world.acked[client])
    reached = {client: [s for c, s in world.applied if c == client] for client in world.acked}
    assert all(len(set(seqs)) == len(seqs) for seqs in reached.values()), "applied twice"
    missing = sum(len(set(range(1, world.acked[c] + 1)) - set(reached[c])) for c in world.acked)
    assert world.partition.lost == missing, "reported exactly"
    world.leader.appended(world.now)
    world.deliver(10_000)
    world.deliver(0)
    assert isinstance(world.follower.machine, Partition)
    assert world.follower.machine.state_hash() == world.partition.state_hash()
    assert world.follower.machine.lost == world.partition.lost


def test_losses_are_found_in_these_runs() -> None:
    """Else the test above would show nothing."""
    found = 0
    for seed in range(10):
        world = World(seed)
        for _ in range(100):
            world.push(world.draw.choice([1, 2, 3]))
        world.lose_the_primary()
        for client in world.acked:
            world.partition.take_loss(client, world.acked[client])
        found += world.partition.lost
    assert found > 500


def test_other_tables_guess_nothing() -> None:
    """With acks=isr a client that claims more than is here is not believed."""
    plain = fresh(table([64], "SGD", {"lr": 1.0}, dtype=pb.DTYPE_FLOAT64))
    plain.assign(99, 1, value_writes(plain.layout, random_gradients(plain.layout, 1)), init_attempt=1)
    assert plain.take_loss(1, 7) == 0
    assert plain.push(1, Update(1, {}, acked=0), contribution(plain.layout, random_gradients(plain.layout, 2))).lsn
    outcome = plain.push(1, Update(4, {}, acked=3), contribution(plain.layout, random_gradients(plain.layout, 3)))
    assert outcome.held
