"""The ledger's part of a checkpoint: which decisions carry it, what is captured, how a job goes on from it."""

import pytest
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger import Ledger
from paramesh_server.ledger_codec import decode_state
from paramesh_server.ledger_restore import renewed

from tests.unit.ps.ledger_world import World, spec


def stepped(world, group, step, *clients):
    """Decide a step of one of several groups."""
    for client in clients:
        request = lg.ReadyRequest(
            request=t.RequestHeader(client_id=client), group=group, step=step, attempt=1, weight=1.0
        )
        answer = world.ledger.ready(request, 0.0)
    return answer.record


def two_groups():
    world = World()
    world.join(1)
    for name in ("g", "d"):
        world.ledger.open_group(lg.OpenGroupRequest(request=t.RequestHeader(client_id=1), spec=spec(name)), 0.0)
    world.active(1)
    return world


def test_the_next_decision_carries_the_checkpoint_and_only_that() -> None:
    world = World()
    world.workers(2)
    assert world.step(0, 1, 2).checkpoint == ""
    world.ledger.want_cut("c")
    assert world.ledger.take_cut() is None
    assert world.step(1, 1, 2).checkpoint == "c"
    cut = world.ledger.take_cut()
    assert cut is not None
    assert (cut.checkpoint, cut.lsn, cut.torn()) == ("c", world.ledger.lsn, "")
    assert cut.groups == {1: ("g", True, 2)}
    assert cut.ranks == (0, 1)
    assert world.ledger.take_cut() is None
    assert world.step(2, 1, 2).checkpoint == ""


def test_a_wish_can_be_withdrawn() -> None:
    world = World()
    world.workers(1)
    world.ledger.want_cut("c")
    world.ledger.want_cut("")
    assert world.step(0, 1).checkpoint == ""


@pytest.mark.parametrize("asked_after", [0, 1])
def test_groups_in_turns_are_cut_between_two_rounds(asked_after) -> None:
    """Asked in the middle of a round, the round is finished first."""
    world = two_groups()
    for step in range(2):
        stepped(world, 1, step, 1)
        stepped(world, 2, step, 1)
    if asked_after:
        stepped(world, 1, 2, 1)
    world.ledger.want_cut("c")
    seen = [] if asked_after else [stepped(world, 1, 2, 1).checkpoint]
    seen += [stepped(world, 2, 2, 1).checkpoint]
    if asked_after:
        assert seen == [""]
        seen = [stepped(world, 1, 3, 1).checkpoint, stepped(world, 2, 3, 1).checkpoint]
    assert seen == ["c", "c"]
    cut = world.ledger.take_cut()
    assert cut is not None
    assert cut.torn() == ""


def test_groups_that_do_not_take_turns_are_said_to_be_torn() -> None:
    """One group takes three steps to the other's one: no moment is between two steps of both."""
    world = two_groups()
    for step in range(6):
        stepped(world, 1, step, 1)
    stepped(world, 2, 0, 1)
    world.ledger.want_cut("c")
    assert stepped(world, 1, 6, 1).checkpoint == "c"
    assert stepped(world, 1, 7, 1).checkpoint == ""
    assert stepped(world, 2, 1, 1).checkpoint == "c"
    cut = world.ledger.take_cut()
    assert cut is not None
    assert "group g had gone on to step 8" in cut.torn()


def test_a_group_that_never_stepped_is_not_waited_for() -> None:
    world = two_groups()
    stepped(world, 1, 0, 1)
    world.ledger.want_cut("c")
    stepped(world, 1, 1, 1)
    cut = world.ledger.take_cut()
    assert cut is not None
    assert cut.groups[2] == ("d", True, 0)


def test_a_restored_ledger_has_steps_and_no_members() -> None:
    world = World(start_workers=2)
    world.workers(2)
    world.step(0, 1, 2)
    world.evict(9)
    data = renewed(world.ledger.capture(), {"paramesh:state": (1, b"theirs")})
    state = decode_state(data)
    assert not state.members.members
    assert not state.members.tombstones
    assert not state.members.started, "start_workers must join again, so that samples are dealt as before"
    assert state.small == {"paramesh:state": (1, b"theirs")}
    again = Ledger(t.JobConfig())
    again.install(data)
    again.serve(lambda _: None, t.JobConfig(start_workers=1), 0.0)
    joined = again.join(lg.JoinRequest(request=t.RequestHeader(client_id=20)), 0.0)
    assert [(p.group, p.next_step) for p in joined.groups] == [(1, 1)]
    assert renewed(data, {}) == renewed(renewed(data, {}), {}), "a second time changes nothing"


def test_slots_keep_their_ranks_over_a_restore() -> None:
    world = World()
    for client, slot in ((1, "h/0"), (2, "h/1")):
        world.ledger.join(lg.JoinRequest(request=t.RequestHeader(client_id=client), slot=slot), 0.0)
    again = Ledger(t.JobConfig())
    again.install(renewed(world.ledger.capture(), {}))
    again.serve(lambda _: None, t.JobConfig(start_workers=1), 0.0)
    joined = again.join(lg.JoinRequest(request=t.RequestHeader(client_id=7), slot="h/1"), 0.0)
    assert joined.rank == 1
