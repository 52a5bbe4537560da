"""What no server could apply never becomes a decided step, or ends as a skipped one."""

from __future__ import annotations

from typing import Any

import paramesh
import pytest
import torch
from paramesh.errors import ParameshError
from paramesh.session import current
from paramesh.testing import Cluster
from paramesh.v1.ledger_pb2 import LedgerStatusRequest

from tests.integration.test_equivalence_features import backward, distributed, net, same_bits, steps, values

BAD: list[dict[str, Any]] = [{"lr": -1e-9}, {"nesterov": True}, {"momentum": True}, {"maximize": 1}]
"""For SGD with momentum 0; the first two are refused by torch's constructor, the others by their kind."""


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_settings_that_torch_refuses_are_the_workers_error_before_anything_is_sent(mode: str) -> None:
    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = distributed(model, mode=mode)
        steps(model, optimizer, [0])
        before = values(model)
        group = optimizer.param_groups[0]
        for bad in BAD:
            good = {name: group[name] for name in bad}
            group.update(bad)
            backward(model, 1)
            with pytest.raises(ParameshError) as caught:
                optimizer.step()
            assert caught.value.reason == "HYPER_PARAMETER"
            group.update(good)
        assert same_bits(values(model), before)
        steps(model, optimizer, [1])
        return values(model)

    with Cluster(deadline=30.0) as cluster:
        (result,) = cluster.run(work)
    plain = net()
    steps(plain, torch.optim.SGD(plain.parameters(), lr=0.1, fused=True), [0, 1])
    assert same_bits(result, values(plain))


def test_a_param_groups_own_settings_are_looked_at_when_it_is_wrapped() -> None:
    def work(rank: int) -> None:
        model = net()
        inner = torch.optim.SGD([{"params": list(model.parameters()), "lr": -1.0}], lr=0.1)
        with pytest.raises(ParameshError, match="learning rate") as caught:
            paramesh.DistributedOptimizer(inner, model)
        assert caught.value.reason == "HYPER_PARAMETER"

    with Cluster(deadline=30.0) as cluster:
        cluster.run(work)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_under_max_grad_norm_is_a_skipped_step(number: float) -> None:
    def work(rank: int) -> tuple[torch.Tensor, int]:
        model = net()
        optimizer = distributed(model, max_grad_norm=0.01, non_finite="allow")
        steps(model, optimizer, [0])
        before = values(model)
        optimizer.zero_grad()
        backward(model, 1)
        if rank == 1:
            model[0].weight.grad[0, 0] = number
        optimizer.step()
        assert same_bits(values(model), before)
        steps(model, optimizer, [2])
        session = current()
        status = session.call(session.client.ledger.ledger_status(LedgerStatusRequest()), "the status")
        return values(model), status.groups[0].skipped_steps

    with Cluster(servers=2, workers=2, deadline=30.0) as cluster:
        (one, skipped), (other, _) = cluster.run(work)
    assert same_bits(one, other)
    assert torch.isfinite(one).all()
    assert skipped == 1
