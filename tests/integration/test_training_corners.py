"""Corners of training that a reader of the code found, each on a real in-process cluster."""

from __future__ import annotations

import threading

import paramesh
import pytest
import torch
from paramesh.leases import LeasedEpoch
from paramesh.session import current
from paramesh.testing import Cluster

from tests.integration.test_equivalence_features import evictions, net, steps, values, wait_until


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


def constant_steps(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
    """Each step takes 1 off."""
    for _ in range(count):
        p.grad = torch.ones_like(p)
        optimizer.step()


def test_local_steps_outlive_an_exchange_of_the_others() -> None:
    paused, exchanged = threading.Event(), threading.Event()

    def work(rank: int) -> list[float]:
        p = torch.nn.Parameter(torch.zeros(100))
        model = torch.nn.ParameterList([p])
        optimizer = paramesh.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), model, mode="local", every=4)
        paramesh.broadcast(model)
        if rank == 1:
            assert paused.wait(30)
            constant_steps(p, optimizer, 4)  # alone: -4
            paramesh.pause()
            exchanged.set()
            return p.detach().unique().tolist()
        constant_steps(p, optimizer, 2)
        paramesh.pause()
        paused.set()
        assert exchanged.wait(30)
        constant_steps(p, optimizer, 2)
        return p.detach().unique().tolist()

    with Cluster(workers=2) as cluster:
        assert cluster.run(work) == [[-8.0], [-4.0]]


def test_an_assignment_replaces_local_steps() -> None:
    def work(rank: int) -> list[float]:
        p = torch.nn.Parameter(torch.zeros(100))
        model = torch.nn.ParameterList([p])
        optimizer = paramesh.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), model, mode="local", every=4)
        constant_steps(p, optimizer, 1 + rank)
        paramesh.assign(model)
        return p.detach().unique().tolist()

    with Cluster(workers=2) as cluster:
        assert cluster.run(work) == [[-1.0], [-1.0]]


class Indices(torch.utils.data.Dataset):
    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def test_accumulation_over_an_eviction_counts_no_sample_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters are the number of times each sample was in a committed step."""
    length, micro = 36, 6
    monkeypatch.setattr(LeasedEpoch, "_want", lambda self: 1)  # asks often, so that it notices between micro-batches

    def work(rank: int) -> tuple[list[float], int]:
        counts = torch.nn.Parameter(torch.zeros(length))
        model = torch.nn.ParameterList([counts])
        inner = torch.optim.SGD([counts], lr=1.0)
        optimizer = paramesh.DistributedOptimizer(inner, model, loss_reduction="sum")
        session = current()
        assert session is not None
        since = 0
        for number, batch in enumerate(paramesh.DataLoader(Indices(length), 1)):
            (-counts[batch].sum()).backward()
            since += 1
            if number == micro + 1:  # the second micro-batch of the second step
                session._stop_background()  # its heart stops: as a stopped process's does
                wait_until(lambda: evictions(session) == 1)
            if since == micro:
                optimizer.step()
                optimizer.zero_grad()
                since = 0
        optimizer.step()
        return counts.detach().tolist(), session.membership

    with Cluster(heartbeat_interval=0.2, failure_timeout=0.9, client_timeout=1.0) as cluster:
        ((counts, membership),) = cluster.run(work)
    assert membership == 2
    assert counts == [1.0] * length
