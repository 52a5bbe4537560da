"""The partition's state machine: steps, sequenced pushes, first values, fences, cuts."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh import hyper
from paramesh.errors import ParameshError, refuse
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb
from paramesh_server.dedup import fold
from paramesh_server.partition import Partition
from paramesh_server.requests import Outcome, StagedAt, Update
from paramesh_server.staging import Contribution
from paramesh_server.writes import SlotFrame
from ps_building import (
    GROUP,
    contribution,
    frame,
    fresh,
    random_gradients,
    raw,
    ready,
    record,
    stage,
    table,
    value_writes,
)

SPEC = table([100, 64], "Adam", {"lr": 0.1})
SGD = table([100, 64], "SGD", {"lr": 0.5})


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(ParameshError) as caught:
        call()
    return caught.value.reason


def refused_without_a_trace(partition: Partition, call: Callable[[], object]) -> str:
    """Invariant 27: a refused request changes nothing."""
    before = (partition.state_hash(), partition.staging.nbytes, partition.log.lsn)
    found = reason(call)
    assert (partition.state_hash(), partition.staging.nbytes, partition.log.lsn) == before
    return found


def gradients(partition: Partition, seed: int) -> list[torch.Tensor | None]:
    return list(random_gradients(partition.layout, seed))


def made(partition: Partition, seed: int) -> Contribution:
    return contribution(partition.layout, gradients(partition, seed))


# --- synchronous steps ---------------------------------------------------------------


def test_a_step_sums_and_applies_what_the_record_names() -> None:
    partition = ready(SGD)
    before = [view.clone() for view in partition._views]
    for client in (1, 2, 3, 4):
        stage(partition, client, gradients(partition, client))
    partition.commit([record(0, [(4, 2.0), (1, 6.0), (3, 0.3)])])  # client 2 is too late: it does not count
    of = {client: gradients(partition, client) for client in (1, 3, 4)}
    for view, start, one, three, four in zip(partition._views, before, of[1], of[3], of[4], strict=True):
        summed = (four * 2.0 + one * 6.0) + three * 0.3  # in rank order: another one rounds differently
        assert torch.equal(view, start - 0.5 * (summed / 8.3))
    assert partition.applied_step == 1
    assert partition.staging.nbytes == 0
    assert partition.log.tail()[-1].kind == rp.RECORD_KIND_STEP


@given(st.permutations([1, 2, 3]))
@settings(max_examples=6, deadline=None)
def test_the_order_of_arrival_changes_no_bit(order: list[int]) -> None:
    """Invariant 15: the ranks in the record decide."""
    partition, other = ready(SPEC), ready(SPEC)
    for client in (1, 2, 3):
        stage(partition, client, gradients(partition, client))
    for client in order:
        stage(other, client, gradients(other, client))
    for one in (partition, other):
        one.commit([record(0, [(1, 1.0), (2, 2.0), (3, 0.5)])])
    assert partition.state_hash() == other.state_hash()


def test_cuts_into_partitions_change_no_bit() -> None:
    """Invariant 15: the same training on 1, 2 and 6 partitions ends at the same bytes."""

    def run(partition_bytes: int) -> tuple[int, list[bytes]]:
        spec = table([300, 64, 500], "Adam", {"lr": 0.05}, partition_bytes=partition_bytes)
        whole = ready(table([300, 64, 500], "Adam", {"lr": 0.05})).layout
        from paramesh.routing import cut

        finals = [bytearray() for _ in range(3)]
        layouts = cut(spec)
        for index, layout in enumerate(layouts):
            partition = fresh(spec, index)

            def part(tensors: list[torch.Tensor], layout=layout) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
                return [tensors[s.tensor][s.start : s.start + s.length] for s in layout.segments]

            partition.assign(1, 1, value_writes(layout, part(random_gradients(whole, 1))), init_attempt=1)
            for step in range(4):
                for client in (1, 2):
                    stage(partition, client, list(part(random_gradients(whole, 10 * step + client))), step)
                partition.commit([record(step, [(1, 3.0), (2, 1.0)])])
            for segment, view in zip(layout.segments, partition._views, strict=True):
                finals[segment.tensor] += raw(view)
        return len(layouts), [bytes(final) for final in finals]

    (one, whole), (two, half), (many, small) = run(0), run(2048), run(512)
    assert (one, two) == (1, 2)
    assert many > 4
    assert whole == half == small


def test_a_segment_absent_everywhere_is_left_alone() -> None:
    partition = ready(SPEC)
    kept = raw(partition._views[1])
    for client in (1, 2):
        stage(partition, client, [gradients(partition, client)[0], None])
    partition.commit([record(0, [(1, 1.0), (2, 1.0)])])
    assert raw(partition._views[1]) == kept
    assert {slot.segment for slot in partition.optimizer.slots()} == {0}


def test_a_skipped_step_counts_and_changes_no_value() -> None:
    partition = ready(SPEC)
    values = raw(partition.flat)
    stage(partition, 1, gradients(partition, 1))
    lower = [pb.TableHyperParameters(table_id=1, hyper_parameters=hyper.to_protos({"lr": 0.01}))]
    partition.commit([record(0, [(1, 1.0)], skip=True, hyper_parameters=lower)])
    assert raw(partition.flat) == values
    assert partition.applied_step == 1
    assert partition.optimizer.settings["lr"] == 0.01
    assert partition.staging.nbytes == 0


def test_decisions_are_applied_in_order_and_once() -> None:
    """Invariant 2: a repeated record does nothing; a gap is NEED_STEPS."""
    partition = ready(SPEC)
    stage(partition, 1, gradients(partition, 1))
    assert refused_without_a_trace(partition, lambda: partition.commit([record(1, [(1, 1.0)])])) == "NEED_STEPS"
    partition.commit([record(0, [(1, 1.0)])])
    state = partition.state_hash()
    partition.commit([record(0, [(1, 1.0)])])
    assert partition.state_hash() == state
    at = StagedAt(GROUP, 2, 1)
    assert refused_without_a_trace(partition, lambda: partition.stage(1, at, made(partition, 1))) == "NEED_STEPS"


def test_a_push_of_the_next_step_brings_the_decision() -> None:
    partition = ready(SPEC)
    stage(partition, 1, gradients(partition, 1))
    outcome = partition.stage(1, StagedAt(GROUP, 1, 1), made(partition, 2), [record(0, [(1, 1.0)])])
    assert not outcome.duplicate
    assert partition.applied_step == 1
    assert partition.staging.nbytes > 0


def test_a_late_copy_of_an_applied_contribution_is_a_duplicate() -> None:
    partition = ready(SPEC)
    stage(partition, 1, gradients(partition, 1))
    partition.commit([record(0, [(1, 1.0)])])
    assert partition.stage(1, StagedAt(GROUP, 0, 1), made(partition, 1)).duplicate
    assert partition.staging.nbytes == 0


def test_what_is_missing_is_named_and_can_be_supplied() -> None:
    partition = ready(SPEC)
    stage(partition, 1, gradients(partition, 1))
    decision = record(0, [(1, 1.0), (2, 1.0), (3, 1.0)])
    with pytest.raises(ParameshError) as caught:
        partition.commit([decision])
    assert (caught.value.reason, caught.value.metadata["client_ids"]) == ("NOT_STAGED", "2,3")
    for client in (2, 3):
        partition.stage(client, StagedAt(GROUP, 0, 1), made(partition, client), [decision])
    assert partition.applied_step == 1  # the last one that was missing also applied it


def test_a_decision_may_name_an_attempt_that_was_tried_again_since() -> None:
    partition, twin = ready(SPEC), ready(SPEC)
    partition.stage(1, StagedAt(GROUP, 0, 1), made(partition, 1))
    partition.stage(1, StagedAt(GROUP, 0, 3), made(partition, 2))
    partition.commit([record(0, [(1, 1.0)], attempt=1)])
    stage(twin, 1, gradients(twin, 1))
    twin.commit([record(0, [(1, 1.0)])])
    assert raw(partition.flat) == raw(twin.flat)
    assert partition.staging.nbytes == 0


def test_the_attempt_that_the_record_names_counts() -> None:
    partition, twin = ready(SPEC), ready(SPEC)
    partition.stage(1, StagedAt(GROUP, 0, 1), made(partition, 1))
    partition.stage(1, StagedAt(GROUP, 0, 2), made(partition, 2))
    partition.stage(1, StagedAt(GROUP, 0, 1), made(partition, 1))  # a delayed copy does not replace
    assert reason(lambda: partition.commit([record(0, [(1, 1.0)], attempt=3)])) == "NOT_STAGED"
    decision = record(0, [(1, 1.0)], attempt=1)
    decision.contributors[0].overrides.add(partition=partition.id, attempt=2)
    partition.commit([decision])
    stage(twin, 1, gradients(twin, 2))
    twin.commit([record(0, [(1, 1.0)])])
    assert raw(partition.flat) == raw(twin.flat)


def test_clipping_waits_for_the_factor() -> None:
    partition = ready(SGD)
    stage(partition, 1, gradients(partition, 1))
    waiting = record(0, [(1, 4.0)], needs_clip=True)
    assert refused_without_a_trace(partition, lambda: partition.commit([waiting])) == "NEED_STEPS"
    whole = sum(float((g.double() ** 2).sum()) for g in gradients(partition, 1))  # type: ignore[union-attr]
    assert partition.norm([waiting]) == pytest.approx(whole, rel=1e-6)
    assert partition.norm([waiting]) == partition.norm([waiting])
    start = [view.clone() for view in partition._views]
    partition.commit([record(0, [(1, 4.0)], needs_clip=True, has_clip_factor=True, clip_factor=0.25)])
    for view, before, gradient in zip(partition._views, start, gradients(partition, 1), strict=True):
        assert torch.equal(view, before - 0.5 * (((gradient * 4.0) / 4.0) * 0.25))
    assert reason(lambda: partition.norm([waiting])) == "STEP_OUT_OF_RANGE"


def test_norms_need_a_record_and_its_contributions() -> None:
    partition = ready(SGD)
    assert reason(lambda: partition.norm([])) == "MISSING_FIELD"
    assert reason(lambda: partition.norm([record(0, [(1, 1.0)])])) == "NOT_STAGED"
    assert reason(lambda: partition.norm([record(3, [(1, 1.0)])])) == "NEED_STEPS"


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e30])
def test_absurd_weights_are_refused(weight: float) -> None:
    """Bad-input row 53."""
    partition = ready(SPEC)
    stage(partition, 1, gradients(partition, 1))
    assert refused_without_a_trace(partition, lambda: partition.commit([record(0, [(1, weight)])])) == "WEIGHT"


def test_records_that_no_ledger_decides_are_refused() -> None:
    partition = ready(SPEC)
    stage(partition, 1, gradients(partition, 1))
    unsaid = record(0, [(1, 1.0)])
    unsaid.loss_reduction = pb.LOSS_REDUCTION_UNSPECIFIED
    swapped = record(0, [(1, 1.0), (2, 1.0)])
    swapped.contributors[0].rank = 5
    bad_lr = [pb.TableHyperParameters(table_id=1, hyper_parameters=hyper.to_protos({"lr": -1.0}))]
    other = record(0, [(1, 1.0)])
    other.group = GROUP + 1
    for decision, wanted in [
        (unsaid, "MISSING_FIELD"),
        (swapped, "MISSING_FIELD"),
        (record(0, [(1, 1.0)], hyper_parameters=bad_lr), "HYPER_PARAMETER"),
        (other, "UNKNOWN_GROUP"),
    ]:
        assert refused_without_a_trace(partition, lambda d=decision: partition.commit([d])) == wanted


def test_only_settings_of_this_table_count() -> None:
    partition = ready(SPEC)
    stage(partition, 1, gradients(partition, 1))
    others = [pb.TableHyperParameters(table_id=2, hyper_parameters=hyper.to_protos({"lr": 9.0}))]
    partition.commit([record(0, [(1, 1.0)], hyper_parameters=others)])
    assert partition.optimizer.settings["lr"] == 0.1


def test_reads_of_a_step_find_exactly_that_step() -> None:
    partition = ready(SPEC)
    partition.check_step(0)
    assert reason(lambda: partition.check_step(1)) == "NEED_STEPS"
    stage(partition, 1, gradients(partition, 1))
    partition.commit([record(0, [(1, 1.0)])])
    assert reason(lambda: partition.check_step(0)) == "STEP_OUT_OF_RANGE"


# --- routing -------------------------------------------------------------------------


def test_requests_of_another_epoch_are_refused() -> None:
    partition = ready(SPEC)
    partition.check_epoch(1)
    assert reason(lambda: partition.check_epoch(2)) == "UNKNOWN_EPOCH"
    assert reason(lambda: partition.check_epoch(0)) == "MISSING_FIELD"
    partition.raise_epoch(3)
    assert reason(lambda: partition.check_epoch(1)) == "STALE_EPOCH"
    partition.raise_epoch(2)
    assert partition.epoch == 3
    assert partition.log.tail()[-1].kind == rp.RECORD_KIND_EPOCH


# --- sequenced pushes ----------------------------------------------------------------


def push(partition: Partition, client: int, seq: int, seed: int | None = None, **options: object) -> Outcome:
    gradient = made(partition, seq if seed is None else seed)
    return partition.push(client, Update(seq, {}, **options), gradient)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 4)), max_size=40))
@settings(max_examples=30, deadline=None)
def test_every_update_is_applied_exactly_once(arrivals: list[tuple[int, int]]) -> None:
    """Invariants 2 and 3, by unit-gradient accounting: lr 1, one cell per (client, seq)."""
    partition = fresh(table([64], "SGD", {"lr": 1.0}))
    partition.assign(1, 1, value_writes(partition.layout, [torch.zeros(64)]), init_attempt=1)
    first: dict[tuple[int, int], int] = {}
    for client, seq in arrivals:
        unit = torch.zeros(64)
        unit[client * 10 + seq] = -1.0
        outcome = partition.push(client, Update(seq, {}), contribution(partition.layout, [unit]))
        if not outcome.held:
            assert outcome.duplicate == ((client, seq) in first)
            assert first.setdefault((client, seq), outcome.lsn) == outcome.lsn
    expected = torch.zeros(64)
    for client, seq in first:
        expected[client * 10 + seq] = 1.0
    assert torch.equal(partition._views[0], expected)


def test_a_bad_payload_is_consumed_and_remembered() -> None:
    """Invariants 3 and 27: its NOOP is all that changes, and its duplicate hears the same."""
    partition = ready(SPEC)
    values = raw(partition.flat)
    push(partition, 1, 1)
    values = raw(partition.flat)
    bad = refuse("PAYLOAD_SIZE", "segment 0 lacks bytes")
    assert reason(lambda: partition.push(1, Update(2, {}), bad)) == "PAYLOAD_SIZE"
    assert raw(partition.flat) == values
    assert partition.log.tail()[-1].kind == rp.RECORD_KIND_NOOP
    state = partition.state_hash()
    assert reason(lambda: partition.push(1, Update(2, {}), bad)) == "PAYLOAD_SIZE"
    assert partition.state_hash() == state
    assert not push(partition, 1, 3).held
    assert reason(lambda: partition.push(1, Update(4, {"lr": -1.0}), made(partition, 1))) == "HYPER_PARAMETER"
    assert not push(partition, 1, 5).held


def test_refused_sequence_numbers_leave_no_trace() -> None:
    partition = ready(SPEC)
    for seq in range(1, 8):
        push(partition, 1, seq)
    assert refused_without_a_trace(partition, lambda: push(partition, 1, 7, seed=99)) == "SEQ_REUSED"
    assert refused_without_a_trace(partition, lambda: push(partition, 1, 1)) == "SEQ_TOO_OLD"
    assert refused_without_a_trace(partition, lambda: push(partition, 1, 20)) == "SEQ_TOO_FAR"
    assert refused_without_a_trace(partition, lambda: push(partition, 8, 6)) == "CLIENT_FENCED"
    assert push(partition, 1, 9).held


def test_options_are_part_of_the_digest_and_count() -> None:
    partition, twin = ready(SGD), ready(SGD)
    push(partition, 1, 1, seed=1, scale=0.5)
    half = [g * 0.5 for g in gradients(twin, 1)]  # type: ignore[operator]
    twin.push(1, Update(1, {}), contribution(twin.layout, half))
    assert raw(partition.flat) == raw(twin.flat)
    before = raw(partition.flat)
    outcome = partition.push(1, Update(2, {"lr": 0.25}, skip=True), Contribution((), (), fold("skip")))
    assert outcome.lsn == partition.log.lsn
    assert raw(partition.flat) == before
    assert partition.optimizer.settings["lr"] == 0.25
    assert partition.log.tail()[-1].kind == rp.RECORD_KIND_NOOP


# --- first values, writes, fences, cuts ----------------------------------------------


def test_nothing_is_served_before_first_values() -> None:
    partition = fresh(SPEC)
    stage_it = lambda: partition.stage(1, StagedAt(GROUP, 0, 1), made(partition, 1))  # noqa: E731
    for call in (stage_it, lambda: push(partition, 1, 1), lambda: partition.check_step(0), partition.cut):
        assert refused_without_a_trace(partition, call) == "INITIALISING"
    writes = value_writes(partition.layout, random_gradients(partition.layout, 1))
    assert refused_without_a_trace(partition, lambda: partition.assign(1, 1, writes)) == "INITIALISING"
    assert refused_without_a_trace(partition, lambda: partition.assign(1, 1, writes[:1], 1)) == "PAYLOAD_SIZE"


def test_a_higher_attempt_replaces_first_values_until_training_begins() -> None:
    partition = fresh(SPEC)
    one, two, three = (value_writes(partition.layout, random_gradients(partition.layout, s)) for s in (1, 2, 3))
    partition.assign(1, 1, two, init_attempt=2)
    assert refused_without_a_trace(partition, lambda: partition.assign(2, 1, one, init_attempt=1)) == "TOO_LATE"
    partition.assign(2, 2, three, init_attempt=3)
    assert raw(partition._views[0]) == raw(random_gradients(partition.layout, 3)[0])
    stage(partition, 1, gradients(partition, 1))
    assert refused_without_a_trace(partition, lambda: partition.assign(1, 2, one, init_attempt=4)) == "TOO_LATE"
    assert partition.assign(2, 2, three, init_attempt=3).duplicate


def test_replaced_first_values_bring_their_own_optimizer_state_or_none() -> None:
    """An owner that died had loaded a checkpoint; the next one starts fresh: nothing of the first stays."""
    donor, partition = ready(SPEC), fresh(SPEC)
    stage(donor, 1, gradients(donor, 1))
    donor.commit([record(0, [(1, 1.0)])])
    loaded = [
        SlotFrame(frame(part.offset, bytes(part.data)), part.slot, part.segment, part.scalar) for part in donor.cut()
    ]
    partition.assign(1, 1, loaded, init_attempt=1)
    assert partition.optimizer.nbytes > 0
    values = value_writes(partition.layout, random_gradients(partition.layout, 4))
    partition.assign(2, 1, values, init_attempt=2)
    assert partition.optimizer.nbytes == 0


def test_an_assign_is_applied_once() -> None:
    """Invariants 2 and 3 for assigns."""
    partition = ready(SPEC)
    writes = value_writes(partition.layout, random_gradients(partition.layout, 9))
    first = partition.assign(4, 1, writes)
    push(partition, 1, 1)
    state = partition.state_hash()
    again = partition.assign(4, 1, writes)
    assert (again.lsn, again.duplicate) == (first.lsn, True)
    assert partition.state_hash() == state


def test_a_cut_restores_another_partition_bit_for_bit() -> None:
    """Invariant 8: values and every state travel; training goes on alike."""
    for name, settings_ in [("Adam", {"lr": 0.1}), ("ASGD", {"lr": 0.1}), ("NAdam", {"lr": 0.1})]:
        spec = table([100, 64], name, settings_)
        partition, twin = ready(spec), fresh(spec)
        for step in range(3):
            stage(partition, 1, gradients(partition, step), step)
            partition.commit([record(step, [(1, 1.0)])])
        writes = [
            SlotFrame(frame(part.offset, bytes(part.data)), part.slot, part.segment, part.scalar)
            for part in partition.cut()
        ]
        twin.assign(1, 1, writes, init_attempt=1)
        for one in (partition, twin):
            push(one, 5, 1)
        assert raw(partition.flat) == raw(twin.flat)


def scalar(slot: str, segment: int = 0, value: float = 1.0, size: int = 8) -> SlotFrame:
    return SlotFrame(frame(0, struct.pack("<d", value)[:size]), slot, segment, True)


@pytest.mark.parametrize(
    ("write", "wanted"),
    [
        (SlotFrame(frame(0, bytes(400)), "momentum_buffer"), "TENSOR_MISMATCH"),
        (SlotFrame(frame(0, bytes(400)), "exp_avg"), "TENSOR_MISMATCH"),  # only a part of fresh state
        (SlotFrame(frame(0, bytes(400)), "step"), "TENSOR_MISMATCH"),
        (SlotFrame(frame(0, bytes(6)), ""), "PAYLOAD_SIZE"),
        (SlotFrame(frame(64 * 1000, bytes(64)), ""), "PAYLOAD_SIZE"),
        (scalar("exp_avg"), "TENSOR_MISMATCH"),
        (scalar("step", segment=2), "PAYLOAD_SIZE"),
        (scalar("step", size=4), "PAYLOAD_SIZE"),
    ],
)
def test_writes_that_do_not_fit_leave_no_trace(write: SlotFrame, wanted: str) -> None:
    partition = ready(SPEC)
    whole = value_writes(partition.layout, random_gradients(partition.layout, 3))
    for writes in ([write], [*whole[1:], write]):
        assert refused_without_a_trace(partition, lambda w=writes: partition.assign(4, 1, w)) == wanted


def test_two_writes_of_one_element_are_refused() -> None:
    partition = ready(SPEC)
    twice = [SlotFrame(frame(0, bytes(128)), ""), SlotFrame(frame(64, bytes(64)), "")]
    assert refused_without_a_trace(partition, lambda: partition.assign(4, 1, twice)) == "PAYLOAD_SIZE"


def test_a_fence_is_for_ever_but_keeps_what_is_staged() -> None:
    partition = ready(SPEC)
    stage(partition, 1, gradients(partition, 1))
    assert partition.fence(1)
    assert not partition.fence(1)
    lsn = partition.log.lsn
    assert refused_without_a_trace(partition, lambda: push(partition, 1, 1)) == "CLIENT_FENCED"
    at = StagedAt(GROUP, 0, 2)
    assert refused_without_a_trace(partition, lambda: partition.stage(1, at, made(partition, 2))) == "CLIENT_FENCED"
    assert refused_without_a_trace(partition, lambda: partition.assign(1, 9, [])) == "CLIENT_FENCED"
    partition.commit([record(0, [(1, 1.0)])])  # staged before: it counts
    assert partition.log.lsn == lsn + 1


def test_a_fenced_client_that_the_record_names_may_deliver() -> None:
    partition = ready(SPEC)
    partition.fence(1)
    decision = record(0, [(1, 1.0)])
    partition.stage(1, StagedAt(GROUP, 0, 1), made(partition, 1), [decision])
    assert partition.applied_step == 1


def test_the_hash_sees_every_part_of_the_state() -> None:
    """Values, optimizer state, settings, dedup, step and lsn are all in it."""

    def pushed(change: Callable[[Partition], object]) -> bytes:
        partition = ready(SPEC)
        push(partition, 1, 1)
        change(partition)
        return partition.state_hash()

    def nudge_state(partition: Partition) -> None:
        partition.optimizer.slot(0, "exp_avg")[0] += 1

    def nudge_value(partition: Partition) -> None:
        partition._views[1][3] += 1

    hashes = [
        pushed(lambda p: None),
        pushed(nudge_state),
        pushed(nudge_value),
        pushed(lambda p: p.fence(77)),
        pushed(lambda p: p.optimizer.configure(p.optimizer.merged({"lr": 0.2}))),
        pushed(lambda p: push(p, 1, 2)),
    ]
    assert all(a != b for a, b in itertools.combinations(hashes, 2))
    assert pushed(lambda p: None) == hashes[0]


def test_a_step_that_breaks_in_its_middle_is_never_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a step is no state of the log: better no answer than a wrong one."""
    partition = ready(SPEC)
    stage(partition, 1, gradients(partition, 1))

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(partition.optimizer, "step", out_of_memory)
    with pytest.raises(MemoryError):
        partition.commit([record(0, [(1, 1.0)])])
    monkeypatch.undo()
    assert partition.applied_step == 0
    assert reason(lambda: partition.commit([record(0, [(1, 1.0)])])) == "INTERNAL"
    assert reason(lambda: partition.check_step(0)) == "INTERNAL"
    assert reason(lambda: push(partition, 1, 1)) == "INTERNAL"
