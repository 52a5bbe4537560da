"""A `step()` that an error cuts off, and that the script then calls again."""

from __future__ import annotations

import threading
from typing import Any

import paramesh
import pytest
import torch
from paramesh.client import AsyncClient
from paramesh.errors import ParameshError, ParametersChanged, refuse
from paramesh.ledger_client import LedgerClient
from paramesh.session import current
from paramesh.testing import Cluster

from tests.integration.test_equivalence_features import backward, distributed, net, same_bits, steps, values


def cut_off(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, after: bool, at: list[int]) -> None:
    """Lets the calls of one method with these numbers fail, counted from when `at` is filled."""
    whole, count = getattr(owner, name), [0]

    async def cut(self: Any, *arguments: Any, **options: Any) -> Any:
        if not at:
            return await whole(self, *arguments, **options)
        count[0] += 1
        if count[0] not in at:
            return await whole(self, *arguments, **options)
        if after:
            await whole(self, *arguments, **options)
        raise refuse("DEADLINE", "cut off")

    monkeypatch.setattr(owner, name, cut)


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(LedgerClient, "ready", True), (LedgerClient, "ready", False), (AsyncClient, "pull", False)],
    ids=["answer of Ready lost", "Ready lost", "pull cut off"],
)
@pytest.mark.parametrize("again", ["same gradient", "next gradient"])
def test_a_step_that_was_cut_off_counts_once(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: bool, again: str
) -> None:
    at: list[int] = []
    cut_off(monkeypatch, owner, name, after=after, at=at)

    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = distributed(model)
        steps(model, optimizer, range(3))
        at.append(1)
        optimizer.zero_grad()
        backward(model, 3)
        optimizer.param_groups[0]["lr"] = 0.05
        with pytest.raises(ParameshError, match="cut off"):
            optimizer.step()
        if again == "next gradient":
            optimizer.zero_grad()
            backward(model, 77)
        optimizer.step()
        assert optimizer.attachment.main[0].position == 4
        optimizer.param_groups[0]["lr"] = 0.1
        steps(model, optimizer, [4])
        return values(model)

    with Cluster(servers=2, deadline=30.0) as cluster:
        (result,) = cluster.run(work)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    steps(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.05
    # What is decided stays; a Ready that never arrived may be replaced.
    steps(model, optimizer, [77 if again == "next gradient" and name == "ready" and not after else 3])
    optimizer.param_groups[0]["lr"] = 0.1
    steps(model, optimizer, [4])
    assert same_bits(result, values(model))


@pytest.mark.parametrize(("owner", "name"), [(AsyncClient, "pull"), (LedgerClient, "ready")])
def test_samples_of_a_step_that_was_cut_off_count_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    at: list[int] = []
    cut_off(monkeypatch, owner, name, after=False, at=at)
    data = torch.utils.data.TensorDataset(torch.eye(24))

    def work(rank: int) -> list[float]:
        model = torch.nn.Linear(24, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = paramesh.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), model, loss_reduction="sum"
        )
        for number, (x,) in enumerate(paramesh.DataLoader(data, batch_size=4)):
            optimizer.zero_grad()
            (-model(x)).sum().backward()
            if number == 2:
                at.append(1)
                with pytest.raises(ParameshError, match="cut off"):
                    optimizer.step()
            if number != 2 or name == "ready":
                optimizer.step()  # a Ready that did not arrive is tried again, a decided step is over
        return model.weight.flatten().tolist()

    with Cluster(deadline=30.0) as cluster:
        assert cluster.run(work) == [[1.0] * 24]


def test_assign_after_parameters_changed_goes_on_with_the_same_step() -> None:
    """Speculation has pushed the gradient during backward; the next one must not pass for it."""
    pushed = threading.Event()

    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = distributed(model)
        steps(model, optimizer, range(4))
        optimizer.zero_grad()
        backward(model, 4)
        if optimizer.attachment.main[0].speculation._staged:
            pushed.set()
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        with pytest.raises(ParametersChanged):
            optimizer.step()
        paramesh.assign(model)
        steps(model, optimizer, range(5, 8))
        return values(model)

    with Cluster(servers=2, workers=2, deadline=30.0) as cluster:
        one, other = cluster.run(work)
    assert pushed.is_set(), "the test shows nothing without an early push"
    assert same_bits(one, other)


@pytest.mark.parametrize("name", ["pull", "push_staged"])
def test_groups_after_the_one_that_was_cut_off_do_not_fall_behind(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Buffers and added param groups are groups of their own: all workers step them in the same order."""
    at: list[int] = []
    slow: list[int] = []
    whole = getattr(AsyncClient, name)

    async def cut(self: AsyncClient, *arguments: Any, **options: Any) -> Any:
        if self.client_id in slow:
            at.append(0)
            if len(at) == (1 if name == "pull" else 2):  # the first group's pull, or the second one's push
                raise refuse("DEADLINE", "cut off")
        return await whole(self, *arguments, **options)

    monkeypatch.setattr(AsyncClient, name, cut)

    def work(rank: int) -> torch.Tensor:
        model = net()
        inner = torch.optim.SGD(model[0].parameters(), lr=0.1)
        optimizer = paramesh.DistributedOptimizer(inner, model, speculate=False)
        steps(model, optimizer, [0])
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
        steps(model, optimizer, [1])
        paramesh.barrier("both")
        if rank == 1:
            slow.append(current().client.client_id)
            with pytest.raises(ParameshError, match="cut off"):
                steps(model, optimizer, [2])
            optimizer.step()
            slow.clear()
        else:
            steps(model, optimizer, [2])
        steps(model, optimizer, range(3, 6))
        assert [e.position for e in optimizer.attachment.main] == [6, 5]
        return values(model)

    with Cluster(workers=2, deadline=30.0) as cluster:
        one, other = cluster.run(work)
    assert same_bits(one, other)
