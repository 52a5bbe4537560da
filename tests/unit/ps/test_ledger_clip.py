"""Clip factors and permissions to go without a contribution: protocol sections 3 and 4."""

from __future__ import annotations

import math

import pytest
import torch
from paramesh.v1 import ledger_pb2 as lg
from paramesh_server.ledger import Wait
from paramesh_server.ledger_clip import clip_factor

from tests.unit.ps.ledger_world import World
from tests.unit.ps.test_ledger_members import refused


def fp32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 7.5, 1e9])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e6])
def test_the_factor_is_torchs(max_norm: float, scale: float) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(100, dtype=torch.float64) * scale for _ in range(4)]
    parameters = [torch.nn.Parameter(torch.zeros_like(part)) for part in parts]
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.clone()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    factor = clip_factor([float((part**2).sum()) for part in parts], max_norm)
    assert factor is not None
    assert factor == fp32(factor), "one fp32 number, for every partition the same"
    clipped = [p.grad for p in parameters]
    for got, part in zip(clipped, parts, strict=True):
        assert got is not None
        torch.testing.assert_close(got, part * factor, rtol=1e-6, atol=0.0)


def test_norms_are_summed_in_partition_order() -> None:
    # fp64 addition is not associative: 1 + 1e16 - ... differs by order.
    world = World()
    world.workers(1, max_grad_norm=1e7, partitions=[3, 4, 5])
    world.decided(1, 0)
    answer = world.clip(1, 0, {5: 1e16, 4: 1.0, 3: 1.0})
    assert isinstance(answer, lg.ClipResponse)
    assert answer.record.clip_factor == clip_factor([1.0, 1.0, 1e16], 1e7)


def clipping() -> World:
    world = World()
    world.workers(2, max_grad_norm=1.0)
    assert world.step(0, 1, 2).needs_clip
    return world


def test_the_first_complete_set_of_norms_decides() -> None:
    world = clipping()
    first = world.clip(1, 0, {1: 9.0})
    assert isinstance(first, Wait)
    world.ledger.take_woken()
    answer = world.clip(2, 0, {1: 100.0, 2: 16.0})
    assert isinstance(answer, lg.ClipResponse)
    assert answer.record.has_clip_factor
    assert answer.record.clip_factor == fp32(1.0 / (5.0 + 1e-6))
    assert first.key in world.ledger.take_woken()
    late = world.clip(1, 0, {1: 4.0, 2: 4.0})
    assert isinstance(late, lg.ClipResponse)
    assert late.record == answer.record
    assert world.decided(1, 0).record == answer.record
    steps = world.do(lambda now: world.ledger.get_steps(lg.GetStepsRequest(group=1, first=0), now))
    assert steps.records[0] == answer.record


def test_a_small_gradient_is_left_alone() -> None:
    world = clipping()
    answer = world.clip(1, 0, {1: 0.0, 2: 0.25})
    assert isinstance(answer, lg.ClipResponse)
    assert answer.record.clip_factor == 1.0
    assert answer.record.has_clip_factor


def test_a_step_that_does_not_clip_is_answered_as_it_is() -> None:
    world = World()
    world.workers(1)
    record = world.decided(1, 0).record
    answer = world.clip(1, 0, {})
    assert isinstance(answer, lg.ClipResponse)
    assert answer.record == record


def test_an_undecided_step_has_no_norms() -> None:
    with refused("STEP_OUT_OF_RANGE"):
        clipping().clip(1, 1, {1: 1.0, 2: 1.0})


@pytest.mark.parametrize(
    ("norms", "reason"),
    [
        ({1: -1.0}, "NON_FINITE"),
        ({1: 1.0, 2: -math.inf}, "NON_FINITE"),
        ({9: 1.0}, "WRONG_PARTITION"),
    ],
)
def test_bad_norms_are_refused(norms: dict[int, float], reason: str) -> None:
    world = clipping()
    with refused(reason):
        world.clip(1, 0, norms)
    assert isinstance(world.clip(1, 0, {2: 1.0}), Wait), "none of a refused set was taken"


@pytest.mark.parametrize("norms", [{1: math.nan, 2: 1.0}, {1: 1.0, 2: math.inf}, {1: 1e308, 2: 1e308}])
def test_a_norm_that_is_not_finite_makes_the_step_a_skip(norms: dict[int, float]) -> None:
    world = clipping()
    waiting = world.clip(2, 0, {1: norms[1]})
    assert isinstance(waiting, Wait)
    world.ledger.take_woken()
    answer = world.clip(1, 0, norms)
    assert isinstance(answer, lg.ClipResponse)
    assert answer.record.skip
    assert not answer.record.has_clip_factor
    assert waiting.key in world.ledger.take_woken()
    again = world.clip(2, 0, {1: 1.0, 2: 1.0})
    assert isinstance(again, lg.ClipResponse)
    assert again.record == answer.record, "the first complete set decides"
    assert world.status().groups[0].skipped_steps == 1
    assert world.step(1, 1, 2).step == 1


# ---------------------------------------------------------------------- missing contributions


def missing(world: World, *clients: int, partition: int = 1) -> list[int]:
    request = lg.ReportMissingRequest(group=1, step=0, partition=partition, client_ids=clients)
    return list(world.do(lambda now: world.ledger.report_missing(request, now)).degraded)


def test_a_partition_may_go_without_who_is_gone_for_a_while() -> None:
    world = World()
    world.workers(2)
    world.step(0, 1, 2)
    assert missing(world, 1, 2) == [], "both live: they re-stage"
    world.evict(2)
    assert missing(world, 1, 2) == [], "it may still deliver"
    world.now += 2.0
    assert missing(world, 1, 2) == [2]
    assert missing(world, 1, partition=2) == []
    world.join(3)
    assert missing(world, 2) == [2], "a permission stays given"


def test_only_contributors_are_degraded() -> None:
    world = World()
    world.workers(1)
    world.step(0, 1)
    world.evict(7)
    world.now += 10
    assert missing(world, 7, 8) == []
