"""Which gradients are not finite, and what the policy makes of them; bad-input rows 10 and 11."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh.errors import RequestRefused, TensorMismatch
from paramesh.exchange import Contribution, Table
from paramesh.gradients import Judge, contribution_of, first_not_finite
from paramesh.tensors import TablePlan
from paramesh.v1 import types_pb2

NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1e-40, 3e38, -3e38, math.inf, -math.inf, math.nan])


def by_definition(tensors: list[torch.Tensor | None]) -> int | None:
    return next((i for i, t in enumerate(tensors) if t is not None and not torch.isfinite(t).all()), None)


@given(st.lists(st.none() | st.lists(NUMBERS, min_size=1, max_size=40), max_size=6))
@settings(deadline=None)
def test_the_first_is_found_and_sums_that_overflow_are_none(rows: list[list[float] | None]) -> None:
    tensors = [None if row is None else torch.tensor(row) for row in rows]
    assert first_not_finite(tensors) == by_definition(tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_number_among_a_million(dtype: torch.dtype, number: float) -> None:
    """Also where the sum of the others overflows, as fp16's soon does."""
    good = torch.full((1000, 1000), 2.0, dtype=dtype)
    bad = good.clone()
    bad[998, 7] = number
    assert first_not_finite([good, None, good.t()]) is None
    assert first_not_finite([good, None, bad.t(), bad]) == 2


def test_dtypes_are_mixed_and_order_holds() -> None:
    bad = torch.tensor([1.0, math.nan])
    assert first_not_finite([bad.double(), bad]) == 0
    assert first_not_finite([torch.ones(2), bad.half(), bad]) == 1
    assert first_not_finite([]) is None


def test_infinities_that_cancel_are_seen() -> None:
    assert first_not_finite([torch.tensor([math.inf, -math.inf])]) == 0


def test_a_sparse_gradient_is_looked_at_by_its_values() -> None:
    index = torch.tensor([[0, 2]])
    assert first_not_finite([torch.sparse_coo_tensor(index, torch.ones(2), (4,))]) is None
    assert first_not_finite([torch.sparse_coo_tensor(index, torch.tensor([1.0, math.inf]), (4,))]) == 0
    assert first_not_finite([torch.eye(3).to_sparse_csr()]) is None


def test_a_graph_over_gradients_does_not_matter() -> None:
    assert first_not_finite([torch.ones(3, requires_grad=True) * 2]) is None


class Group:
    """What a judge needs of an exchange: names, parameters, where it stands."""

    def __init__(self, **parameters: torch.Tensor):
        spec = types_pb2.OptimizerSpec(class_name="SGD")
        plan = TablePlan("g/0", "g", list(parameters.items()), spec)
        self.tables = [Table(plan, dict)]
        self.position = 5
        self.settings = SimpleNamespace(name="g")
        self.refusals = 0

    def refused(self) -> None:
        self.refusals += 1


def given_by(*gradients: torch.Tensor | None) -> Contribution:
    return Contribution([list(gradients)])


NAN = torch.tensor([1.0, math.nan])


def test_reject_names_parameter_step_and_remedy() -> None:
    groups: Any = [Group(a=torch.zeros(2), b=torch.zeros(2)), Group(c=torch.zeros(2))]
    contributions = [given_by(torch.ones(2), NAN), given_by(NAN)]
    with pytest.raises(RequestRefused) as caught:
        Judge("reject").skips(groups, contributions)
    assert caught.value.reason == "NON_FINITE"
    assert caught.value.metadata["tensor"] == "b"
    assert caught.value.metadata["step"] == "5"
    for word in ("'b'", "step 5", "learning rate", "GradScaler", 'non_finite="skip"'):
        assert word in str(caught.value)
    assert [g.refusals for g in groups] == [1, 1]


def test_a_later_group_is_judged_before_the_first_one_counts() -> None:
    groups: Any = [Group(a=torch.zeros(2)), Group(b=torch.zeros(2), c=torch.zeros(2))]
    with pytest.raises(RequestRefused, match="'c'"):
        Judge("reject").skips(groups, [given_by(torch.ones(2)), given_by(None, NAN)])


def test_skip_is_counted_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    judge, groups = Judge("skip"), [Group(a=torch.zeros(2))]
    with caplog.at_level(logging.INFO, "paramesh.gradients"):
        for gradient, skips in ((torch.ones(2), False), (NAN, True), (NAN, True)):
            assert judge.skips(groups, [given_by(gradient)]) == skips  # type: ignore[arg-type]
    assert judge.skipped == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert "non_finite=skip" in line
    assert "parameter=a" in line
    assert "step=5" in line


def test_allow_looks_at_nothing_and_amp_makes_a_skip_of_a_refusal() -> None:
    groups: Any = [Group(a=torch.zeros(2))]
    assert not Judge("allow").skips(groups, [given_by(NAN)])
    assert not Judge("allow").skips(groups, [given_by(NAN)], amp=True)
    assert Judge("reject").skips(groups, [given_by(NAN)], amp=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_overflows_when_it_is_stored_is_not_finite(dtype: torch.dtype) -> None:
    """Row 11."""
    groups: Any = [Group(a=torch.zeros(2, dtype=dtype))]
    large = torch.tensor([1.0, torch.finfo(torch.float32).max])
    with pytest.raises(RequestRefused, match="'a'"):
        Judge("reject").skips(groups, [given_by(large)])
    assert not Judge("reject").skips(groups, [given_by(large)], stored=False)


def test_the_cast_is_made_once_and_no_other_gradient_is_copied() -> None:
    groups: Any = [Group(a=torch.zeros(2, dtype=torch.float16), b=torch.zeros(2))]
    same = torch.ones(2)
    contribution = given_by(torch.ones(2), same)
    assert not Judge("reject").skips(groups, [contribution])
    cast, kept = contribution.gradients[0]
    assert cast is not None
    assert cast.dtype == torch.float16
    assert kept is same


def test_a_sparse_gradient_of_a_dense_table_is_refused() -> None:
    group: Any = Group(a=torch.zeros(4))
    group.tables[0].plan.parameters[0].grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1), (4,))
    with pytest.raises(TensorMismatch, match="Embedding"):
        contribution_of(group, skip=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_on_a_gpu_are_looked_at_there(dtype: torch.dtype) -> None:
    good = torch.full((1000, 1000), 2.0, dtype=dtype, device="cuda")
    bad = good.clone()
    bad[998, 7] = math.nan
    host = torch.ones(3)
    assert first_not_finite([good, host, good.t()]) is None
    assert first_not_finite([good, host, bad, host * math.inf]) == 2
