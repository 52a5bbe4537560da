"""Corners of training that a reader of the code found, each on a real in-process cluster."""

from __future__ import annotations

import paramesh
import torch
from paramesh.testing import Cluster

from tests.integration.test_equivalence_features import net, steps, values


def scaled_steps(model: torch.nn.Sequential, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    for seed in range(3):
        optimizer.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        scaler.scale(model(x).pow(2).mean()).backward()
        scaler.step(optimizer)
        scaler.update()


def test_a_group_added_later_is_unscaled_too() -> None:
    def train(model: torch.nn.Sequential, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        steps(model, optimizer, [7])
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
        scaled_steps(model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))
        return values(model)

    def work(rank: int) -> torch.Tensor:
        model = net()
        inner = torch.optim.SGD(model[0].parameters(), lr=0.1, fused=True)
        return train(model, paramesh.DistributedOptimizer(inner, model))

    with Cluster(workers=1) as cluster:
        (result,) = cluster.run(work)
    plain = net()
    expected = train(plain, torch.optim.SGD(plain[0].parameters(), lr=0.1, fused=True))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)
