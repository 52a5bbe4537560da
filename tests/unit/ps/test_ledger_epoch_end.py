"""How epochs end, and leases without lockstep: protocol section 4; invariant 20."""

from __future__ import annotations

from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger import Wait

from tests.unit.ps.ledger_world import World, spec
from tests.unit.ps.test_ledger_leases import chunks, finished
from tests.unit.ps.test_ledger_members import refused

# ---------------------------------------------------------------------- the end of an epoch


def drained() -> tuple[World, dict[int, list[t.SampleRange]]]:
    """Two workers that hold five chunks each; nothing is undealt."""
    world = World()
    world.workers(2)
    return world, {c: world.leased(c, want=99) for c in (1, 2)}


def test_an_epoch_ends_when_every_sample_is_consumed() -> None:
    world, held = drained()
    world.waits(1, 0, samples=held[1])
    assert not finished(world, 1)
    world.decided(2, 0, samples=held[2])
    assert finished(world, 1)
    assert finished(world, 2)
    assert isinstance(world.lease(2, wait=True), Wait), "the other may still step"
    assert finished(world, 1, wait=True), "a finished epoch yields nothing, for ever"
    assert finished(world, 2, wait=True)
    world.join(3)
    assert finished(world, 3)
    assert world.status().epochs[0].consumed == 20


def test_a_waiting_member_is_between_and_no_step_gathers_it() -> None:
    world, held = drained()
    world.waits(1, 0, samples=held[1])
    world.decided(2, 0, samples=held[2][:1])
    waiting = world.lease(1, wait=True)
    assert isinstance(waiting, Wait)
    assert waiting.who() == (1,)
    assert world.status().members[0].activity == lg.ACTIVITY_BETWEEN
    record = world.decided(2, 1, samples=held[2][1:]).record
    assert [c.client_id for c in record.contributors] == [2]
    assert isinstance(world.lease(1, wait=True), Wait), "the other is still in its loop"
    assert finished(world, 2, wait=True)
    assert waiting.key in world.ledger.take_woken()
    answer = world.lease(1, wait=True)
    assert isinstance(answer, lg.LeaseResponse)
    assert answer.finished
    assert answer.between
    assert world.waits(2, 2) == (0,), "the epoch is over: it is gathered like any between two loaders"


def test_an_epoch_goes_on_while_somebody_is_in_its_loop() -> None:
    """Else, with two groups, each of two workers would wait for the other in another group."""
    world, held = drained()
    world.waits(1, 0, samples=held[1])
    world.decided(2, 0, samples=held[2])
    assert isinstance(world.lease(1, wait=True), Wait), "the other steps its second group now"
    assert finished(world, 2, wait=True)
    assert finished(world, 1, wait=True)


def test_a_member_with_batches_left_is_not_between() -> None:
    world, held = drained()
    assert isinstance(world.lease(1, wait=True, delivered=held[1][:4]), Wait)
    assert world.status().members[0].activity == lg.ACTIVITY_ACTIVE
    assert isinstance(world.lease(1, wait=True, delivered=held[1]), Wait)
    assert world.status().members[0].activity == lg.ACTIVITY_BETWEEN


def test_delivered_ranges_do_not_hold_the_epoch_open_but_are_stepped_later() -> None:
    world, held = drained()
    world.waits(1, 0, samples=held[1][:3])
    world.decided(2, 0, samples=held[2])
    assert isinstance(world.lease(2, wait=True), Wait), "rank 0 has two batches left"
    assert finished(world, 1, wait=True, delivered=held[1][3:])
    assert finished(world, 2, wait=True)
    world.active(1, 2)
    lease = world.leased(1, epoch=1)
    world.waits(1, 1, samples=held[1][3:] + lease)
    world.decided(2, 1)
    assert {(e.epoch, e.consumed) for e in world.status().epochs} == {(1, 2)}, "epoch 0 is through and forgotten"
    assert world.status().members[0].samples == 12


def test_leases_that_come_back_go_to_who_waits() -> None:
    world, held = drained()
    world.waits(1, 0, samples=held[1])
    world.decided(2, 0, samples=held[2][:1])
    waiting = world.lease(1, wait=True)
    assert isinstance(waiting, Wait)
    world.ledger.take_woken()
    world.evict(2)
    assert waiting.key in world.ledger.take_woken()
    answer = world.lease(1, wait=True, want=99)
    assert isinstance(answer, lg.LeaseResponse)
    assert list(answer.leases) == held[2][1:]
    assert answer.between, "it must say that it is active, and pull, before it trains"
    world.active(1)
    world.decided(1, 1, samples=answer.leases)
    assert finished(world, 1)


def test_returned_leases_go_to_the_others_once() -> None:
    world, held = drained()
    world.give_back(2, *held[2][3:])
    world.give_back(2, *held[2][3:])
    world.give_back(1, *held[2][:1])  # not its own: ignored
    assert world.leased(1, want=99) == held[2][3:]
    assert isinstance(world.lease(1, wait=True), Wait)


def test_who_leaves_a_loop_early_leaves_its_share_to_the_others() -> None:
    world = World()
    world.workers(2)
    world.leased(2)
    mine = world.leased(1, want=99)
    world.give_back(2)
    assert chunks(world.leased(1, want=99)) == [3, 5, 7, 9]
    assert len(mine) == 5


def test_who_moves_on_to_a_later_epoch_holds_nobody_back() -> None:
    world, held = drained()
    world.waits(1, 0, samples=held[1])
    world.decided(2, 0, samples=held[2][:1])
    assert isinstance(world.lease(1, wait=True), Wait)
    world.leased(2, epoch=1)
    assert finished(world, 1, wait=True)


def test_an_epoch_that_everybody_left_early_is_over() -> None:
    world = World()
    world.workers(2)
    for client in (1, 2):
        world.leased(client)
        world.leased(client, epoch=1)
    world.join(3)
    assert finished(world, 3)
    assert not finished(world, 3, epoch=1)


def test_a_closed_epoch_loses_what_its_last_holder_takes_along() -> None:
    world, held = drained()
    assert isinstance(world.lease(1, wait=True, delivered=held[1]), Wait)
    assert finished(world, 2, wait=True, delivered=held[2])
    world.evict(1)
    assert finished(world, 2)
    with refused("LEASE"):
        world.ready(2, 0, samples=held[1])


def test_evaluations_do_not_add_up() -> None:
    world = World()
    world.check = False
    world.workers(1)
    for epoch in range(200):
        got = world.leased(1, epoch, want=99)
        assert finished(world, 1, epoch, delivered=got)
    assert len(world.status().epochs) < 70
    old = t.SampleRange(dataset="d", epoch=3, begin=0, end=2)
    assert world.decided(1, 0, samples=[old]).included, "too old to tell, and of no consequence"


# ---------------------------------------------------------------------- async and ssp


def test_without_lockstep_chunks_go_to_whoever_asks() -> None:
    world = World()
    world.workers(2, lg.MODE_ASYNC)
    assert chunks(world.leased(2, want=9)) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert chunks(world.leased(1, want=9)) == [9]


def test_without_lockstep_clocks_consume_and_evictions_return() -> None:
    world = World()
    world.workers(2, lg.MODE_SSP, staleness=3)
    mine, theirs = world.leased(1, want=5), world.leased(2, want=5)
    world.clock(1, 1, samples=mine)
    assert world.status().epochs[0].consumed == 10
    assert isinstance(world.lease(1, wait=True), Wait)
    world.evict(2)
    assert world.leased(1, want=99, wait=True) == theirs
    world.clock(1, 2, samples=theirs)
    assert finished(world, 1)


def test_a_clock_with_foreign_samples_is_refused() -> None:
    world = World()
    world.workers(2, lg.MODE_ASYNC)
    theirs = world.leased(2)
    with refused("LEASE"):
        world.clock(1, 1, samples=theirs)
    assert world.status().groups[0].max_clock == 0


def test_a_group_in_lockstep_makes_shares_of_what_is_left() -> None:
    world = World()
    world.workers(2, lg.MODE_ASYNC)
    assert chunks(world.leased(1, want=2)) == [0, 1]
    world.open(1, spec("lockstep"))
    assert chunks(world.leased(2, want=2)) == [3, 5]
