"""The policy for NaN and infinity where a sequenced update is applied; bad-input rows 10 and 11."""

from __future__ import annotations

import math

import pytest
import torch
from paramesh.errors import ParameshError
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb
from paramesh_server.finite import passes
from paramesh_server.partition import Partition
from paramesh_server.requests import Outcome, Update

from tests.unit.ps.ps_building import contribution, raw, ready, record, stage, table

BAD = [math.nan, math.inf, -math.inf]


def partition_with(policy: pb.NonFinite.ValueType, dtype: int = pb.DTYPE_FLOAT32) -> Partition:
    spec = table([70, 5], "Adam", {"lr": 0.1}, dtype=dtype)
    spec.non_finite = policy
    return ready(spec)


def push(partition: Partition, seq: int, number: float, **options: object) -> Outcome:
    first, second = torch.ones(70), torch.ones(5)
    second[3] = number
    given = contribution(partition.layout, [first, second])
    return partition.push(1, Update(seq, {"lr": 0.2}, **options), given)  # type: ignore[arg-type]


def refused(partition: Partition, seq: int, number: float, **options: object) -> ParameshError:
    with pytest.raises(ParameshError) as caught:
        push(partition, seq, number, **options)
    return caught.value


@pytest.mark.parametrize("number", BAD)
def test_reject_is_the_default_and_uses_up_the_number(number: float) -> None:
    partition = partition_with(pb.NON_FINITE_UNSPECIFIED)
    push(partition, 1, 1.0)
    values, cut = raw(partition.flat), [bytes(part.data) for part in partition.cut()]
    error = refused(partition, 2, number)
    assert error.reason == "NON_FINITE"
    assert error.metadata["segment"] == "1"
    assert partition.log.tail()[-1].kind == rp.RECORD_KIND_NOOP
    assert (raw(partition.flat), [bytes(part.data) for part in partition.cut()]) == (values, cut)
    assert str(refused(partition, 2, number)) == str(error)
    assert push(partition, 3, 1.0).lsn > 0
    assert partition.non_finite == 0


def test_settings_of_a_refused_update_do_not_hold() -> None:
    partition = partition_with(pb.NON_FINITE_UNSPECIFIED)
    refused(partition, 1, math.nan)
    assert partition.optimizer.settings["lr"] == 0.1


@pytest.mark.parametrize("number", BAD)
def test_skip_counts_it_and_changes_settings_only(number: float) -> None:
    partition = partition_with(pb.NON_FINITE_SKIP)
    push(partition, 1, 1.0)
    values = raw(partition.flat)
    outcome = push(partition, 2, number)
    assert outcome.lsn > 0
    assert not outcome.duplicate
    assert raw(partition.flat) == values
    assert partition.non_finite == 1
    assert partition.log.tail()[-1].kind == rp.RECORD_KIND_NOOP
    assert partition.optimizer.settings["lr"] == 0.2
    assert push(partition, 2, number).duplicate
    assert partition.non_finite == 1
    push(partition, 3, 1.0)
    assert raw(partition.flat) != values
    assert torch.isfinite(partition._views[1]).all()


def test_allow_applies_it() -> None:
    partition = partition_with(pb.NON_FINITE_ALLOW)
    push(partition, 1, math.nan)
    assert partition._views[1].isnan().tolist() == [False, False, False, True, False]
    assert partition.log.tail()[-1].kind == rp.RECORD_KIND_PUSH


@pytest.mark.parametrize(
    ("dtype", "number", "scale"),
    [(pb.DTYPE_FLOAT16, 65504.0, 2.0), (pb.DTYPE_BFLOAT16, 3.3e38, 2.0), (pb.DTYPE_FLOAT32, 3e38, 2.0)],
)
def test_what_overflows_its_dtype_under_the_scale_is_not_finite(dtype: int, number: float, scale: float) -> None:
    """Row 11: looked at as it would be given to the optimizer."""
    assert refused(partition_with(pb.NON_FINITE_UNSPECIFIED, dtype), 1, number, scale=scale).reason == "NON_FINITE"
    assert push(partition_with(pb.NON_FINITE_UNSPECIFIED, dtype), 1, number).lsn > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_sum_that_overflows_is_no_infinity(dtype: torch.dtype) -> None:
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert passes(pb.NON_FINITE_UNSPECIFIED, [large], [True])


def test_segments_without_a_gradient_are_not_looked_at() -> None:
    """They hold what the memory last held."""
    assert passes(pb.NON_FINITE_UNSPECIFIED, [torch.tensor([math.nan]), torch.ones(3)], [False, True])


def test_an_update_that_is_a_skip_already_holds_nothing_to_look_at() -> None:
    partition = partition_with(pb.NON_FINITE_UNSPECIFIED)
    assert push(partition, 1, math.nan, skip=True).lsn > 0
    assert partition.non_finite == 0


def test_a_decided_step_is_applied_as_decided() -> None:
    """A contribution counts in all partitions or in none, so no partition judges for itself: its worker has."""
    partition = partition_with(pb.NON_FINITE_UNSPECIFIED)
    stage(partition, 1, [torch.full((70,), math.nan), torch.ones(5)])
    partition.commit([record(0, [(1, 1.0)])])
    assert partition.applied_step == 1
    assert partition._views[0].isnan().all()
