"""Replicas: replaying a primary's records, or taking its snapshot, gives the same state bit for bit."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh.errors import ParameshError, refuse
from paramesh.v1 import replication_pb2 as rp
from paramesh_server.log import Record, record_of
from paramesh_server.partition import Partition
from paramesh_server.requests import Update
from paramesh_server.writes import SlotFrame, cut_slots
from ps_building import contribution, frame, fresh, random_gradients, record, stage, table, value_writes

SPECS = [
    table([100, 64, 3], "Adam", {"lr": 0.1}),
    table([100, 64, 3], "SGD", {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}),
    table([100, 64, 3], "NAdam", {"lr": 0.1}),
]


def over_the_wire(sent: Record) -> Record:
    """What a follower receives: other memory, in pieces of other sizes."""
    data = b"".join(sent.payload)
    pieces = [memoryview(data[i : i + 100]) for i in range(0, len(data), 100)]
    return record_of(rp.LogRecord.FromString(sent.body.SerializeToString()), pieces)


def catch_up(follower: Partition, primary: Partition) -> None:
    records = primary.log.after(follower.log.lsn)
    assert records is not None
    for one in records:
        follower.replay(over_the_wire(one))


def snapshot(primary: Partition, spec: object) -> Partition:
    copy = fresh(spec)  # type: ignore[arg-type]
    copy.log.replicated = True
    state = rp.ReplicaState.FromString(primary.capture().SerializeToString())
    writes = [
        SlotFrame(frame(s.offset, bytes(s.data)), s.slot, s.segment, s.scalar)
        for s in cut_slots(primary.layout, primary.flat, primary.optimizer)
    ]
    copy.restore(state, writes)
    return copy


class World:
    """One primary, and what is done to it."""

    def __init__(self, which: int) -> None:
        self.spec = SPECS[which]
        self.primary = fresh(self.spec)
        self.primary.log.replicated = True
        self.follower = fresh(self.spec)
        self.follower.log.replicated = True
        self.seqs: dict[int, int] = {}
        self.assigns = 0

    def values(self, seed: int) -> list[SlotFrame]:
        layout = self.primary.layout
        return value_writes(layout, random_gradients(layout, seed))

    def act(self, kind: str, seed: int) -> None:
        primary, client = self.primary, seed % 3 + 1
        layout = primary.layout
        gradients = [g if (seed >> i) % 4 else None for i, g in enumerate(random_gradients(layout, seed))]
        with contextlib.suppress(ParameshError):  # refusals are part of it
            if kind == "first":
                self.assigns += 1
                primary.assign(9, self.assigns, self.values(seed), init_attempt=1)
            elif kind == "step":
                stage(primary, client, gradients, step=primary.applied_step)
                primary.commit([record(primary.applied_step, [(client, 2.0)])])
            elif kind == "push":
                seq = self.seqs.get(client, 0) + 1
                changed = {"lr": 0.1 + seed % 5} if seed % 7 == 0 else {}
                primary.push(
                    client, Update(seq, changed, skip=seed % 11 == 0, scale=0.5), contribution(layout, gradients)
                )
                self.seqs[client] = seq
            elif kind == "bad":
                self.seqs[client] = self.seqs.get(client, 0) + 1
                primary.push(client, Update(self.seqs[client], {}), refuse("PAYLOAD_SIZE", "too short"))
            elif kind == "assign":
                self.assigns += 1
                primary.assign(9, self.assigns, self.values(seed))
            elif kind == "fence":
                primary.fence(client + 10)
            elif kind == "mark":
                primary.mark()
            elif kind == "epoch":
                primary.raise_epoch(primary.epoch + 1)


ACTIONS = st.sampled_from(["step", "push", "push", "bad", "assign", "fence", "epoch", "mark"])


@given(st.integers(0, len(SPECS) - 1), st.lists(st.tuples(ACTIONS, st.integers(0, 10_000)), max_size=25), st.data())
@settings(max_examples=60, deadline=None)
def test_a_follower_is_its_primary_bit_for_bit(which: int, actions: list[tuple[str, int]], data: st.DataObject) -> None:
    world = World(which)
    world.act("first", 1)
    at = data.draw(st.integers(0, len(actions)))
    later: Partition | None = None
    for number, (kind, seed) in enumerate(actions):
        if number == at:
            later = snapshot(world.primary, world.spec)
            assert later.state_hash() == world.primary.state_hash()
        world.act(kind, seed)
        if seed % 3 == 0:
            catch_up(world.follower, world.primary)
            assert world.follower.state_hash() == world.primary.state_hash()
    catch_up(world.follower, world.primary)
    assert world.follower.state_hash() == world.primary.state_hash()
    assert world.follower.log.last == world.primary.log.last
    if later is not None:
        catch_up(later, world.primary)
        assert later.state_hash() == world.primary.state_hash()


def test_a_duplicate_at_a_new_primary_is_answered_as_at_the_old_one() -> None:
    world = World(1)
    world.act("first", 1)
    layout = world.primary.layout
    gradients = list(random_gradients(layout, 5))
    first = world.primary.push(1, Update(1, {}), contribution(layout, gradients))
    with pytest.raises(ParameshError) as refused:
        world.primary.push(1, Update(2, {}), refuse("PAYLOAD_SIZE", "too short"))
    catch_up(world.follower, world.primary)
    again = world.follower.push(1, Update(1, {}), contribution(layout, gradients))
    assert (again.lsn, again.duplicate) == (first.lsn, True)
    with pytest.raises(ParameshError) as repeated:
        world.follower.push(1, Update(2, {}), refuse("PAYLOAD_SIZE", "too short"))
    assert (repeated.value.reason, str(repeated.value)) == (refused.value.reason, str(refused.value))
    with pytest.raises(ParameshError) as other:
        world.follower.push(1, Update(1, {}), contribution(layout, list(random_gradients(layout, 6))))
    assert other.value.reason == "SEQ_REUSED"


def test_a_record_of_another_layout_is_refused() -> None:
    world = World(1)
    world.act("first", 1)
    catch_up(world.follower, world.primary)
    world.act("step", 3)
    (step,) = world.primary.log.after(world.follower.log.lsn) or []
    cut = record_of(rp.LogRecord.FromString(step.body.SerializeToString()), [b"".join(step.payload)[:-4]])
    cut.body.payload_bytes -= 4
    before = world.follower.state_hash()
    with pytest.raises(ParameshError) as caught:
        world.follower.replay(cut)
    assert caught.value.reason == "PAYLOAD_SIZE"
    assert world.follower.state_hash() == before


def test_without_followers_nothing_is_kept() -> None:
    world = World(1)
    world.primary.log.replicated = False
    world.act("first", 1)
    world.act("step", 1)
    assert world.primary.log.lsn == 2
    assert world.primary.log.after(0) is None


def test_kept_payloads_are_bounded_by_what_everybody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramesh_server.log.KEPT_RECORDS", 2)
    world = World(1)
    for seed in range(1, 9):
        world.act("first" if seed == 1 else "step", seed)
    log = world.primary.log
    log.trim(3)
    assert log.after(2) is None
    assert log.after(3) is not None  # above what everybody has, nothing goes, however much it is
    log.trim(log.lsn)
    assert [r.header.lsn for r in log.after(log.lsn - 2) or []] == [log.lsn - 1, log.lsn]


def test_a_mark_finds_one_flipped_bit() -> None:
    world = World(0)
    world.act("first", 1)
    world.act("step", 3)
    catch_up(world.follower, world.primary)
    world.follower.flat[17] ^= 1
    world.primary.mark()
    with pytest.raises(ParameshError) as caught:
        catch_up(world.follower, world.primary)
    assert caught.value.reason == "DIVERGED"


def test_a_mark_does_not_look_at_what_is_staged() -> None:
    """Staging is the primary's alone: no record tells followers of it."""
    world = World(0)
    world.act("first", 1)
    stage(world.primary, 5, random_gradients(world.primary.layout, 9))
    world.primary.mark()
    catch_up(world.follower, world.primary)


@pytest.mark.parametrize("slot", ["exp_avg", "step"])
def test_a_mark_looks_at_the_optimizer_too(slot: str) -> None:
    world = World(0)
    world.act("first", 1)
    world.act("step", 3)
    catch_up(world.follower, world.primary)
    world.follower.optimizer.slot(0, slot).add_(1)
    world.primary.mark()
    with pytest.raises(ParameshError) as caught:
        catch_up(world.follower, world.primary)
    assert caught.value.reason == "DIVERGED"


def test_a_record_that_changes_nothing_is_replayed() -> None:
    world = World(0)
    world.act("first", 1)
    world.primary.touch()
    catch_up(world.follower, world.primary)
    assert world.follower.log.last == world.primary.log.last
    assert world.follower.state_hash() == world.primary.state_hash()
