"""Contributions: what is complete, which attempt counts, what is let go."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from paramesh.errors import ParameshError
from paramesh.routing import cut
from paramesh_server.staging import Budget, Contribution, FrameBytes, Staging, assemble
from ps_building import contribution, frame, presence_bits, random_gradients, table

LAYOUT = cut(table([100, 7, 200]))[0]
SPANS = [(s.offset, s.offset + s.nbytes) for s in LAYOUT.segments]


def refusal(presence: bytes, frames: list[FrameBytes]) -> str:
    with pytest.raises(ParameshError) as caught:
        assemble(LAYOUT, presence, frames)
    return caught.value.reason


def data(begin: int, end: int) -> FrameBytes:
    return frame(begin, bytes(end - begin))


@st.composite
def covers(draw: st.DrawFn) -> tuple[list[bool], list[FrameBytes]]:
    """Presence, and frames that cover exactly the present segments, cut anywhere, in any order."""
    present = draw(st.lists(st.booleans(), min_size=3, max_size=3))
    frames = []
    for there, (begin, end) in zip(present, SPANS, strict=True):
        if there:
            inner = [n for n in range(begin, end, 64) if n > begin]
            cuts = sorted(draw(st.sets(st.sampled_from(inner)))) if inner else []
            edges = [begin, *cuts, end]
            frames += [data(a, b) for a, b in itertools.pairwise(edges)]
    return present, draw(st.permutations(frames))


@given(covers())
def test_any_exact_cover_is_complete(case: tuple[list[bool], list[FrameBytes]]) -> None:
    present, frames = case
    made = assemble(LAYOUT, presence_bits(present), frames)
    assert list(made.present) == present
    assert made.nbytes == sum(e - b for there, (b, e) in zip(present, SPANS, strict=True) if there)


@given(covers(), st.data())
def test_anything_less_or_more_is_refused(case: tuple[list[bool], list[FrameBytes]], draw: st.DataObject) -> None:
    present, frames = case
    if not frames:
        return
    at = draw.draw(st.integers(0, len(frames) - 1))
    without = frames[:at] + frames[at + 1 :]
    twice = [*frames, frames[at]]
    assert refusal(presence_bits(present), without) == "PAYLOAD_SIZE"
    assert refusal(presence_bits(present), twice) == "PAYLOAD_SIZE"


def test_what_does_not_fit_is_refused() -> None:
    whole = [data(0, LAYOUT.nbytes)]
    assert assemble(LAYOUT, b"", whole).present == (True, True, True)  # padding may be covered
    assert refusal(b"\x03", whole) == "PAYLOAD_SIZE"  # bytes for an absent segment
    assert refusal(b"\x0f", whole) == "TENSOR_MISMATCH"  # a fourth segment
    assert refusal(b"\x07\x00", whole) == "TENSOR_MISMATCH"
    assert refusal(b"", [data(0, LAYOUT.nbytes + 64)]) == "PAYLOAD_SIZE"
    assert refusal(b"", [frame(1, bytes(10))]) == "PAYLOAD_SIZE"
    assert refusal(b"", [FrameBytes(0, LAYOUT.nbytes, memoryview(b"short"), 0)]) == "PAYLOAD_SIZE"
    assert refusal(b"", [FrameBytes(1 << 60, 64, memoryview(bytes(64)), 0)]) == "PAYLOAD_SIZE"


def test_the_digest_tells_presence_and_bytes_apart() -> None:
    a = contribution(LAYOUT, random_gradients(LAYOUT, 1))
    b = contribution(LAYOUT, random_gradients(LAYOUT, 2))
    absent = assemble(LAYOUT, b"\x00", [])
    one = assemble(LAYOUT, b"\x02", [data(*SPANS[1])])
    assert len({a.digest, b.digest, absent.digest, one.digest}) == 4
    assert a.digest == contribution(LAYOUT, random_gradients(LAYOUT, 1)).digest


def made(seed: int) -> Contribution:
    return contribution(LAYOUT, random_gradients(LAYOUT, seed))


class StagingMachine(RuleBasedStateMachine):
    """Invariant 26 for staging: the account equals what is held; every attempt stays."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(1 << 30)
        self.staging = Staging(self.budget)
        self.model: dict[tuple[int, int, int], int] = {}

    @rule(step=st.integers(0, 3), client=st.integers(1, 3), attempt=st.integers(1, 3), seed=st.integers(0, 1))
    def put(self, step: int, client: int, attempt: int, seed: int) -> None:
        held = self.model.get((step, client, attempt))
        if held is not None and held != seed:
            with pytest.raises(ParameshError, match="other bytes") as caught:
                self.staging.put(1, step, client, attempt, made(seed))
            assert caught.value.reason == "SEQ_REUSED"
            return
        fresh = self.staging.put(1, step, client, attempt, made(seed))
        assert fresh == (held is None)
        self.model[step, client, attempt] = seed

    @rule(step=st.integers(0, 3))
    def applied(self, step: int) -> None:
        self.staging.drop_through(1, step)
        self.model = {key: value for key, value in self.model.items() if key[0] > step}

    @invariant()
    def agrees(self) -> None:
        held = self.model.items()
        assert self.budget.used == self.staging.nbytes == sum(made(seed).nbytes for _, seed in held)
        for (step, client, attempt), seed in held:
            found = self.staging.get(1, step, client, attempt)
            assert found is not None
            assert found.digest == made(seed).digest
            assert self.staging.get(1, step, client, 4) is None


StagingMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestStaging = StagingMachine.TestCase


def test_the_budget_is_one_for_all_partitions_and_refuses_with_figures() -> None:
    budget = Budget(made(1).nbytes * 2)
    first, second = Staging(budget), Staging(budget)
    first.put(1, 0, 1, 1, made(1))
    second.put(1, 0, 1, 1, made(1))
    with pytest.raises(ParameshError) as caught:
        second.put(1, 0, 2, 1, made(1))
    assert caught.value.reason == "QUOTA"
    assert caught.value.metadata["used"] == str(budget.limit)
    assert second.get(1, 0, 2, 1) is None
    with pytest.raises(ParameshError):
        second.put(1, 0, 1, 2, made(2))  # another attempt takes room of its own
    first.clear()
    assert budget.used == second.nbytes
    second.put(1, 0, 2, 1, made(1))


def test_frames_are_held_as_they_came() -> None:
    received = bytes(LAYOUT.nbytes)
    held = assemble(LAYOUT, b"", [FrameBytes(0, LAYOUT.nbytes, memoryview(received), 0)])
    assert held.frames[0].payload.obj is received
    assert torch.frombuffer(held.frames[0].payload, dtype=torch.uint8).numel() == LAYOUT.nbytes
