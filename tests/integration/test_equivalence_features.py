"""What a PyTorch user may rely on, on a real in-process cluster: each test is a promise of the design."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import paramesh
import pytest
import torch
from paramesh.errors import ConfigError, ParameshError, ParametersChanged, PartitionOffline, TensorMismatch
from paramesh.session import current
from paramesh.testing import Cluster
from paramesh.v1.ledger_pb2 import LedgerStatusRequest

from tests.integration.equivalence import Case, same_bits, train

SMALL = 512
"""Bytes of a partition: several partitions even for the smallest model."""


def net(seed: int = 0, hidden: int = 20) -> torch.nn.Sequential:
    """A model whose values depend on the seed alone; worker threads share torch's generator."""
    model = torch.nn.Sequential(torch.nn.Linear(4, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def backward(model: torch.nn.Module, seed: int) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    model(x).pow(2).mean().backward()


def steps(model: Any, optimizer: torch.optim.Optimizer, seeds: Any) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def values(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def distributed(model: torch.nn.Module, kind: Any = torch.optim.SGD, **options: Any) -> Any:
    settings = options.pop("settings", {"lr": 0.1})
    options.setdefault("partition_bytes", SMALL)
    return paramesh.DistributedOptimizer(kind(model.parameters(), **settings), model, **options)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


# ---------------------------------------------------------------------- first values, structure


def test_first_values_are_the_lowest_ranks_and_broadcast_gives_them_early() -> None:
    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        model = net(seed=rank)
        optimizer = distributed(model)
        paramesh.broadcast(model)
        early = values(model)
        steps(model, optimizer, range(3))
        return early, values(model)

    with Cluster(servers=2, workers=3) as cluster:
        results = cluster.run(work)
    assert all(same_bits(early, values(net(seed=0))) for early, _ in results)
    assert all(same_bits(late, results[0][1]) for _, late in results)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: (net(hidden=21), torch.optim.SGD), "0.weight"),
        (lambda: (torch.nn.Sequential(*net(), torch.nn.Linear(2, 2)), torch.optim.SGD), "3.weight"),
        (lambda: (net(), torch.optim.Adam), "SGD"),
        (lambda: (net().double(), torch.optim.SGD), "0.weight"),
    ],
    ids=["shape", "extra layer", "optimizer class", "dtype"],
)
def test_another_structure_on_one_worker_is_refused_naming_the_difference(make: Any, named: str) -> None:
    first_there = threading.Event()

    def work(rank: int) -> None:
        model, kind = (net(), torch.optim.SGD) if rank == 0 else make()
        optimizer = distributed(model, kind)  # noqa: F841 - broadcast finds it
        if rank == 0:
            paramesh.broadcast(model)
            first_there.set()
            return
        first_there.wait(20)
        with pytest.raises(TensorMismatch, match=named) as caught:
            paramesh.broadcast(model)
        assert caught.value.reason == "TENSOR_MISMATCH"

    with Cluster(servers=1, workers=2) as cluster:
        cluster.run(work)


# ---------------------------------------------------------------------- edits


def test_an_edit_outside_the_optimizer_is_noticed_and_assign_makes_it_everybodys() -> None:
    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = distributed(model)
        steps(model, optimizer, range(2))
        with torch.no_grad():
            model[0].weight.fill_(float(rank + 1))
        backward(model, 9)
        with pytest.raises(ParametersChanged, match=r"0\.weight.*paramesh\.assign\(model\)"):
            optimizer.step()
        paramesh.assign(model)
        assert float(model[0].weight.detach().min()) == 1.0 == float(model[0].weight.detach().max())
        steps(model, optimizer, range(2))
        return values(model)

    with Cluster(servers=2, workers=2) as cluster:
        one, other = cluster.run(work)
    assert same_bits(one, other)


def test_assign_and_broadcast_name_a_model_that_nobody_trains() -> None:
    def work(rank: int) -> None:
        for call in (paramesh.assign, paramesh.broadcast):
            with pytest.raises(ConfigError, match="DistributedOptimizer"):
                call(net())

    with Cluster() as cluster:
        cluster.run(work)
    paramesh.assign(net())  # alone: nothing to do


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.ASGD, torch.optim.Adagrad])
def test_state_goes_to_the_plain_optimizer_and_comes_back(kind: Any) -> None:
    how = {"fused": True} if kind in (torch.optim.Adam, torch.optim.Adagrad) else {"foreach": False}

    def work(rank: int) -> None:
        model = net()
        optimizer = distributed(model, kind, settings={"lr": 0.05})
        steps(model, optimizer, range(3))
        saved = copy.deepcopy(optimizer.state_dict())

        plain = net()
        plain.load_state_dict(model.state_dict())
        plain_optimizer = kind(plain.parameters(), lr=0.05, **how)
        plain_optimizer.load_state_dict({**saved, "param_groups": plain_optimizer.state_dict()["param_groups"]})
        steps(model, optimizer, range(3, 6))
        steps(plain, plain_optimizer, range(3, 6))
        assert same_bits(values(model), values(plain))

        # And from the plain one into a cluster: at the start of another optimizer.
        fresh = net()
        fresh.load_state_dict(plain.state_dict())
        second = distributed(fresh, kind, settings={"lr": 0.05})
        second.load_state_dict(copy.deepcopy(plain_optimizer.state_dict()))
        steps(fresh, second, range(6, 9))
        steps(plain, plain_optimizer, range(6, 9))
        assert same_bits(values(fresh), values(plain))

        # And in the middle of training: back to what was saved.
        with torch.no_grad():
            model.load_state_dict(fresh.state_dict())
        paramesh.assign(model)
        optimizer.load_state_dict(copy.deepcopy(plain_optimizer.state_dict()))
        steps(model, optimizer, range(9, 12))
        steps(plain, plain_optimizer, range(9, 12))
        assert same_bits(values(model), values(plain))

    with Cluster(servers=2) as cluster:
        cluster.run(work)


def test_loaded_state_outlives_a_param_group_that_is_added_before_the_first_step() -> None:
    def build(model: torch.nn.Sequential) -> torch.optim.Optimizer:
        return torch.optim.Adam(model[0].parameters(), lr=0.05, fused=True)

    def work(rank: int) -> torch.Tensor:
        model, plain = net(), net()
        reference = build(plain)
        steps(plain, reference, range(3))
        model.load_state_dict(plain.state_dict())
        optimizer = paramesh.DistributedOptimizer(build(model), model, partition_bytes=SMALL)
        optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
        for one, each in ((model, optimizer), (plain, reference)):
            each.add_param_group({"params": [one[2].weight], "lr": 0.01})
            for p in one.parameters():
                p.grad = None
            steps(one, each, range(3, 6))
        assert same_bits(values(model), values(plain))
        return values(model)

    with Cluster(servers=2, workers=2) as cluster:
        cluster.run(work)


def test_state_dict_before_the_first_step_and_the_local_one_ask_nobody() -> None:
    def work(rank: int) -> None:
        optimizer = distributed(net(), torch.optim.Adam)
        assert optimizer.state_dict()["state"] == {}
        assert optimizer.state_dict(local=True)["state"] == {}
        assert optimizer.attachment.main[0].position is None

    with Cluster() as cluster:
        cluster.run(work)


# ---------------------------------------------------------------------- groups


def test_param_groups_have_tables_and_settings_of_their_own_also_when_added_later() -> None:
    def build(model: torch.nn.Sequential) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [{"params": model[0].parameters()}, {"params": [model[2].weight], "lr": 0.01}],
            lr=0.1,
            momentum=0.9,
            fused=True,
        )

    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = paramesh.DistributedOptimizer(build(model), model, partition_bytes=SMALL)
        steps(model, optimizer, range(3))
        optimizer.add_param_group({"params": [model[2].bias], "lr": 0.5})
        steps(model, optimizer, range(3, 6))
        return values(model)

    with Cluster(servers=2, workers=2) as cluster:
        results = cluster.run(work)
    plain = net()
    optimizer = build(plain)
    steps(plain, optimizer, range(3))
    optimizer.add_param_group({"params": [plain[2].bias], "lr": 0.5})
    steps(plain, optimizer, range(3, 6))
    for result in results:
        torch.testing.assert_close(result, values(plain), rtol=1e-6, atol=1e-7)
    assert same_bits(*results)


def test_a_gan_has_two_groups_with_steps_of_their_own() -> None:
    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator, critic = net(1), net(2)
        g, c = distributed(generator, torch.optim.Adam), distributed(critic)
        for step in range(6):
            steps(critic, c, [step * 10 + rank])
            if step % 2:
                steps(generator, g, [step * 10 + rank])
        return values(generator), values(critic)

    with Cluster(servers=2, workers=2) as cluster:
        one, other = cluster.run(work)
    assert same_bits(one[0], other[0])
    assert same_bits(one[1], other[1])


def test_buffers_are_averaged_only_when_asked() -> None:
    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for sync in ("mean", None):
            model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
            optimizer = distributed(model, sync_buffers=sync)
            paramesh.broadcast(model)
            for step in range(2):
                optimizer.zero_grad()
                generator = torch.Generator().manual_seed(step * 10 + rank)
                model(torch.randn(6, 4, generator=generator) + rank).sum().backward()
                optimizer.step()
            found.append(model[1].running_mean.clone())
        return found[0], found[1]

    with Cluster(workers=2) as cluster:
        one, other = cluster.run(work)
    assert same_bits(one[0], other[0])
    assert not same_bits(one[1], other[1])


# ---------------------------------------------------------------------- steps


def test_overlapped_pulls_and_early_pushes_change_no_bit() -> None:
    def work(rank: int) -> list[torch.Tensor]:
        ends = []
        for options in ({"speculate": False}, {"speculate": True}, {"overlap_pull": True}):
            model = net()
            optimizer = distributed(model, torch.optim.Adam, **options)
            steps(model, optimizer, [10 * step + rank for step in range(9)])
            optimizer.drain()
            ends.append(values(model))
        return ends

    with Cluster(servers=2, workers=2) as cluster:
        results = cluster.run(work)
    flat = [end for result in results for end in result]
    assert all(same_bits(end, flat[0]) for end in flat)


def test_overlap_waits_for_parameters_that_are_used_without_their_modules_forward() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = net(), torch.nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(self.body(x), self.head.weight)

    def work(rank: int) -> None:
        model = Tied()
        optimizer = distributed(model, overlap_pull=True)
        steps(model, optimizer, range(6))
        overlap = optimizer.attachment._overlap
        assert {id(p) for p in overlap._up_front} == {id(p) for p in model.head.parameters()}
        model.eval()
        model(torch.zeros(1, 4))
        assert optimizer.attachment.main[0]._arriving is None  # evaluation waits for all

    with Cluster() as cluster:
        cluster.run(work)


def test_weights_of_steps_and_of_the_loss_reduction() -> None:
    def work(rank: int) -> tuple[float, float]:
        found = []
        for reduction in ("mean", "sum"):
            p = torch.nn.Parameter(torch.zeros(3))
            model = torch.nn.ParameterList([p])
            optimizer = distributed(model, settings={"lr": 1.0}, loss_reduction=reduction)
            p.grad = torch.full((3,), float(rank))
            optimizer.step(weight=[1.0, 3.0][rank])
            found.append(-float(p.detach()[0]))
        return found[0], found[1]

    with Cluster(workers=2) as cluster:
        assert cluster.run(work) == [(0.75, 1.0), (0.75, 1.0)]


def test_a_sparse_gradient_is_refused_naming_embedding_and_changes_nothing() -> None:
    def work(rank: int) -> None:
        model = torch.nn.Embedding(10, 4, sparse=True)
        optimizer = distributed(model)
        model(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(TensorMismatch, match=r"weight.*paramesh\.Embedding"):
            optimizer.step()
        optimizer.zero_grad()
        before = values(model)
        model.weight.grad = torch.ones(10, 4)
        optimizer.step()
        torch.testing.assert_close(values(model), before - 0.1)

    with Cluster() as cluster:
        cluster.run(work)


def test_a_closure_no_sync_and_schedulers_work_in_a_cluster() -> None:
    def work(rank: int) -> None:
        model, plain = net(), net()
        optimizer, reference = distributed(model), torch.optim.SGD(plain.parameters(), lr=0.1, fused=True)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        other = torch.optim.lr_scheduler.StepLR(reference, 2)
        for step in range(6):
            optimizer.zero_grad()
            reference.zero_grad()
            with optimizer.no_sync():
                backward(model, step)
            backward(plain, step)

            def closure() -> float:
                backward(model, 100 + step)  # noqa: B023 - run at once
                return 1.5

            backward(plain, 100 + step)
            assert optimizer.step(closure) == 1.5
            reference.step()
            schedule.step()
            other.step()
        assert same_bits(values(model), values(plain))

    with Cluster() as cluster:
        cluster.run(work)


# ---------------------------------------------------------------------- coming, going, losing


def test_a_joiner_takes_part_from_the_step_where_the_others_are() -> None:
    go = threading.Event()

    def work(rank: int) -> dict[int, torch.Tensor]:
        if rank == 1:
            go.wait(30)
        model = net(seed=rank)
        optimizer = distributed(model, torch.optim.Adam)
        seen: dict[int, torch.Tensor] = {}
        for step in range(12 if rank == 0 else 5):
            steps(model, optimizer, [step])
            seen[optimizer.attachment.main[0].position] = values(model)
            if rank == 0 and step == 3:
                go.set()
                wait_until(lambda: paramesh.world_size() == 2)
        return seen

    with Cluster(servers=2, workers=2, start_workers=1) as cluster:
        old, new = cluster.run(work)
    common = old.keys() & new.keys()
    assert len(common) >= 3
    assert min(new) >= 4
    assert all(same_bits(old[step], new[step]) for step in common)


def evictions(session: Any) -> int:
    status = session.call(session.client.ledger.ledger_status(LedgerStatusRequest()), "the ledger's status")
    return int(status.evictions)


def test_an_evicted_worker_rejoins_at_a_step_boundary_and_changes_nothing_before() -> None:
    def work(rank: int) -> tuple[list[int], torch.Tensor]:
        model = net()
        optimizer = distributed(model)
        session = current()
        assert session is not None
        ids = [session.client.client_id]
        for step in range(8):
            if rank == 1 and step == 4:
                session._stop_background()  # its heart stops: as a stopped process's does
                wait_until(lambda: evictions(session) == 1)
            steps(model, optimizer, [step])
        ids.append(session.client.client_id)
        return ids, values(model)

    with Cluster(workers=2, heartbeat_interval=0.2, failure_timeout=0.9, client_timeout=1.0) as cluster:
        (first, _), (second, _) = cluster.run(work)
    assert first[0] == first[1]
    assert second[0] != second[1]


def test_a_lost_server_is_named_within_five_seconds() -> None:
    lost = threading.Event()

    def work(rank: int) -> float:
        model = net()
        optimizer = distributed(model)
        steps(model, optimizer, range(2))
        if rank == 0:
            cluster.kill_server(1)
            lost.set()
        lost.wait(20)
        began = time.monotonic()
        with pytest.raises(PartitionOffline, match="server-1"):
            steps(model, optimizer, range(1000))
        return time.monotonic() - began

    with Cluster(servers=2, workers=2) as cluster:
        assert max(cluster.run(work)) < 5.0


# ---------------------------------------------------------------------- the other modes


def test_async_applies_every_update_exactly_once() -> None:
    def work(rank: int) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros(300))
        model = torch.nn.ParameterList([p])
        optimizer = distributed(model, settings={"lr": 1.0}, mode="async")
        for _ in range(25):
            p.grad = torch.ones(300)
            optimizer.step()
        paramesh.barrier("done")
        p.grad = torch.zeros(300)
        optimizer.step()
        return values(model)

    with Cluster(servers=2, workers=3) as cluster:
        results = cluster.run(work)
    assert all(same_bits(result, torch.full((300,), -75.0)) for result in results)


def test_ssp_bounds_the_gap_of_clocks() -> None:
    clocks = [0, 0]
    gaps = []

    def work(rank: int) -> None:
        model = net()
        optimizer = distributed(model, mode="ssp", staleness=2)
        session = current()
        assert session is not None
        session.ensure_active()
        paramesh.barrier("active")
        for step in range(12):
            optimizer.zero_grad()
            backward(model, step)
            if rank == 1:  # the slow one: lets the other run ahead as far as it may
                wait_until(lambda: clocks[0] >= min(12, clocks[1] + 2))
                gaps.append(clocks[0] - clocks[1])
            optimizer.step()
            clocks[rank] += 1

    with Cluster(workers=2) as cluster:
        cluster.run(work)
    assert max(gaps) == 2
    assert clocks == [12, 12]


def test_local_with_every_1_averages() -> None:
    def work(rank: int) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros(100))
        model = torch.nn.ParameterList([p])
        optimizer = distributed(model, settings={"lr": 0.0}, mode="local", every=1)
        paramesh.broadcast(model)
        with torch.no_grad():
            p.fill_(10.0 * (rank + 1))
        p.grad = torch.ones(100)
        optimizer.step()
        return values(model)

    with Cluster(servers=2, workers=3) as cluster:
        for result in cluster.run(work):
            assert same_bits(result, torch.full((100,), 20.0))


def test_local_steps_and_a_nesterov_exchange_equal_their_reference() -> None:
    every, rounds = 4, 3

    def local(model: torch.nn.Module, optimizer: Any, number: int, rank: int) -> None:
        steps(model, optimizer, [number * 100 + step * 10 + rank for step in range(every)])

    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = distributed(
            model, torch.optim.Adam, settings={"lr": 0.01}, mode="local", every=every, outer=("nesterov", 0.7, 0.9)
        )
        for number in range(rounds):
            local(model, optimizer, number, rank)
        return values(model)

    with Cluster(servers=2, workers=2) as cluster:
        results = cluster.run(work)
    models = [net(), net()]
    inner = [torch.optim.Adam(m.parameters(), lr=0.01) for m in models]
    start = [p.detach().clone() for p in models[0].parameters()]
    outer = torch.optim.SGD(start, lr=0.7, momentum=0.9, nesterov=True, fused=True)
    for number in range(rounds):
        for rank in range(2):
            local(models[rank], inner[rank], number, rank)
        for i, p in enumerate(start):
            deltas = [p.detach() - list(m.parameters())[i].detach() for m in models]
            p.grad = (deltas[0] * 1.0 + deltas[1] * 1.0) / 2.0
        outer.step()
        with torch.no_grad():
            for m in models:
                for p, value in zip(m.parameters(), start, strict=True):
                    p.copy_(value)
    expected = torch.cat([p.detach().reshape(-1) for p in start])
    assert same_bits(results[0], expected)
    assert same_bits(results[1], expected)


def test_a_failed_step_can_be_tried_again() -> None:
    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = distributed(model)
        steps(model, optimizer, range(3))
        exchange = optimizer.attachment.main[0]
        whole = exchange._ready_on_loop

        async def broken(request: Any) -> Any:
            exchange._ready_on_loop = whole
            raise ParameshError("the network hiccuped", reason="DEADLINE")

        optimizer.zero_grad()
        backward(model, 3)
        exchange._ready_on_loop = broken
        with pytest.raises(ParameshError, match="hiccuped"):
            optimizer.step()
        optimizer.zero_grad()
        backward(model, 4)  # another gradient for the same step: a higher attempt
        optimizer.step()
        return values(model)

    with Cluster(servers=2) as cluster:
        (result,) = cluster.run(work)
    plain = net()
    steps(plain, torch.optim.SGD(plain.parameters(), lr=0.1, fused=True), [0, 1, 2, 4])
    assert same_bits(result, values(plain))


def test_the_recorded_runs_use_every_path() -> None:
    """The equivalence runs would prove less if speculation were off in them."""

    def work(rank: int) -> int:
        case = Case("Adam", {"lr": 0.002}, steps=8)
        pushed = []
        from paramesh.exchange_sync import SyncExchange

        whole = SyncExchange.push_early

        def counted(self: Any, *arguments: Any) -> Any:
            pushed.append(arguments[0])
            return whole(self, *arguments)

        SyncExchange.push_early = counted  # type: ignore[method-assign]
        try:
            train(case, rank)
        finally:
            SyncExchange.push_early = whole  # type: ignore[method-assign]
        return len(pushed)

    with Cluster() as cluster:
        assert cluster.run(work)[0] > 0
