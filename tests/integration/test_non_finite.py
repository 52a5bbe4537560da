"""`non_finite=`: what a NaN in one worker's gradient does, in each mode, on a real in-process cluster."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import paramesh
import pytest
import torch
from paramesh.errors import RequestRefused, StateRefused
from paramesh.exchange_sync import SyncExchange
from paramesh.session import current
from paramesh.testing import Cluster
from paramesh.v1.ledger_pb2 import LedgerStatusRequest

from tests.integration.test_equivalence_features import backward, distributed, net, same_bits, steps, values

MODES = ["sync", "async", "ssp", "local"]


def counter(mode: str, **options: Any) -> tuple[torch.nn.ParameterList, Any]:
    """Two parameters over several partitions; each step that counts takes 1 off, in any mode and order."""
    model = torch.nn.ParameterList([torch.zeros(100), torch.zeros(300)])
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, paramesh.DistributedOptimizer(inner, model, mode=mode, partition_bytes=512, **options)


def count(model: torch.nn.ParameterList, optimizer: Any, times: int = 1, bad: float = 1.0) -> None:
    """Steps with a gradient of ones, but for one number."""
    for _ in range(times):
        for p in model:
            p.grad = torch.ones_like(p)
        model[1].grad[250] = bad
        optimizer.step()


def on_servers(cluster: Cluster) -> list[float]:
    """The different values that the only table has there."""
    with cluster.client() as client:
        (table,) = client.tables()
        return torch.cat([v.flatten() for v in client.pull(table).values()]).unique().tolist()


def skipped_steps() -> int:
    session = current()
    assert session is not None
    status = session.call(session.client.ledger.ledger_status(LedgerStatusRequest()), "the status")
    return int(status.groups[0].skipped_steps)


def applied(mode: str, each: int) -> float:
    """What the servers hold after so many steps of each of two workers."""
    return -2.0 * each if mode in ("async", "ssp") else -1.0 * each


class TestReject:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_caught_and_continued(self, mode: str, bad: float) -> None:
        def work(rank: int) -> None:
            model, optimizer = counter(mode)
            count(model, optimizer)
            before = values(model)
            if rank == 1:
                for _ in range(2):
                    with pytest.raises(RequestRefused, match=r"parameter '1' holds.*at step 1") as caught:
                        count(model, optimizer, bad=bad)
                    assert caught.value.reason == "NON_FINITE"
                    assert same_bits(values(model), before)
                    optimizer.zero_grad()
            count(model, optimizer, 3)

        with Cluster(servers=2, workers=2, deadline=30.0) as cluster:
            cluster.run(work)
            assert on_servers(cluster) == [applied(mode, 4)]

    @pytest.mark.parametrize("mode", MODES)
    def test_the_others_go_on_when_the_worker_sits_out(self, mode: str) -> None:
        out, done = threading.Event(), threading.Event()

        def work(rank: int) -> None:
            model, optimizer = counter(mode)
            count(model, optimizer)
            if rank == 1:
                with pytest.raises(RequestRefused):
                    count(model, optimizer, bad=math.nan)
                paramesh.pause()
                out.set()
                assert done.wait(20)
                return
            assert out.wait(20)
            count(model, optimizer, 3)
            done.set()

        with Cluster(servers=2, workers=2, deadline=30.0) as cluster:
            cluster.run(work)
            assert on_servers(cluster) == [applied(mode, 1) - 3.0]

    @pytest.mark.parametrize(
        "options", [{}, {"overlap_pull": True}, {"mode": "async"}, {"max_grad_norm": 0.5}], ids=str
    )
    def test_the_optimizers_state_and_early_pushes_know_nothing_of_it(self, options: dict[str, Any]) -> None:
        """The bits are those of a run in which the refused steps never were."""

        def train(model: Any, optimizer: Any, refused: Callable[[], None]) -> torch.Tensor:
            steps(model, optimizer, range(4))  # by now gradients leave during backward
            for seed in (4, 5):
                refused()
                steps(model, optimizer, [seed])
            optimizer.drain()  # overlapped, the last step's values are still on their way
            return values(model)

        def work(rank: int) -> tuple[torch.Tensor, int]:
            model = net()
            optimizer = distributed(model, torch.optim.Adam, **options)

            def refused() -> None:
                optimizer.zero_grad()
                (model(torch.ones(2, 4)).sum() * math.nan).backward()
                with pytest.raises(RequestRefused, match=r"0\.weight"):
                    optimizer.step()

            result = train(model, optimizer, refused)
            (exchange,) = optimizer.attachment.main
            bets = exchange.speculation if isinstance(exchange, SyncExchange) else None
            return result, bets._mistakes if bets else 0

        def undisturbed(rank: int) -> torch.Tensor:
            model = net()
            return train(model, distributed(model, torch.optim.Adam, **options), lambda: None)

        with Cluster(servers=2, deadline=30.0) as cluster:
            ((result, mistakes),) = cluster.run(work)
        with Cluster(servers=2, deadline=30.0) as cluster:
            (expected,) = cluster.run(undisturbed)
        assert same_bits(result, expected)
        assert mistakes == 0

    def test_a_group_added_later_is_judged_before_the_first_counts(self) -> None:
        def work(rank: int) -> None:
            model = net()
            inner = torch.optim.SGD(model[0].parameters(), lr=0.1)
            optimizer = paramesh.DistributedOptimizer(inner, model)
            steps(model, optimizer, [0])
            optimizer.add_param_group({"params": list(model[2].parameters())})
            steps(model, optimizer, [1])
            before = values(model)
            backward(model, 2)
            model[2].bias.grad[1] = math.nan
            with pytest.raises(RequestRefused, match=r"2\.bias"):
                optimizer.step()
            assert same_bits(values(model), before)
            assert [exchange.position for exchange in optimizer.attachment.main] == [2, 1]
            steps(model, optimizer, [2])

        with Cluster(deadline=30.0) as cluster:
            cluster.run(work)

    def test_samples_of_a_refused_step_count_with_the_next(self) -> None:
        """The parameters are the number of times each sample was in a committed step."""
        length = 24

        def work(rank: int) -> list[float]:
            counts, other = torch.nn.Parameter(torch.zeros(length)), torch.nn.Parameter(torch.zeros(1))
            model = torch.nn.ParameterList([counts, other])
            inner = torch.optim.SGD(model.parameters(), lr=1.0)
            optimizer = paramesh.DistributedOptimizer(inner, model, loss_reduction="sum")
            loader = paramesh.DataLoader(torch.utils.data.TensorDataset(torch.arange(length)), 2)
            for number, (batch,) in enumerate(loader):
                optimizer.zero_grad()
                (other.sum() - counts[batch].sum()).backward()
                if number % 3 == 1:
                    other.grad.fill_(math.nan)
                    with pytest.raises(RequestRefused):
                        optimizer.step()
                    other.grad.fill_(1.0)
                optimizer.step()
            return counts.detach().tolist()

        with Cluster(workers=2, deadline=30.0) as cluster:
            cluster.run(work)
            with cluster.client() as client:
                (table,) = client.tables()
                assert client.pull(table)["0"].tolist() == [1.0] * length


class TestSkip:
    @pytest.mark.parametrize("mode", ["sync", "local"])
    def test_nobodys_step_counts(self, mode: str) -> None:
        """In local mode a gradient is not taken in here, so that the exchange lacks one worker's one step."""

        def work(rank: int) -> tuple[list[float], int]:
            model, optimizer = counter(mode, non_finite="skip")
            count(model, optimizer)
            count(model, optimizer, bad=math.nan if rank == 1 else 1.0)
            between = values(model).unique().tolist()
            count(model, optimizer, 2)
            return between, skipped_steps()

        with Cluster(servers=2, workers=2, deadline=30.0) as cluster:
            results = cluster.run(work)
            final = on_servers(cluster)
        expected = ([-1.0], 1, [-3.0]) if mode == "sync" else ([-1.5], 0, [-3.5])
        assert results == [(expected[0], expected[1])] * 2
        assert final == expected[2]

    @pytest.mark.parametrize("mode", ["async", "ssp"])
    def test_only_this_workers_update_does_not_count(self, mode: str) -> None:
        def work(rank: int) -> None:
            model, optimizer = counter(mode, non_finite="skip")
            count(model, optimizer)
            count(model, optimizer, bad=math.nan if rank == 1 else 1.0)
            count(model, optimizer, 2)

        with Cluster(servers=2, workers=2, deadline=30.0) as cluster:
            cluster.run(work)
            assert on_servers(cluster) == [-7.0]

    def test_its_samples_count_as_used(self) -> None:
        length = 12

        def work(rank: int) -> tuple[list[float], int]:
            counts = torch.nn.Parameter(torch.zeros(length))
            model = torch.nn.ParameterList([counts])
            inner = torch.optim.SGD([counts], lr=1.0)
            optimizer = paramesh.DistributedOptimizer(inner, model, loss_reduction="sum", non_finite="skip")
            batches = 0
            for (batch,) in paramesh.DataLoader(torch.utils.data.TensorDataset(torch.arange(length)), 3):
                optimizer.zero_grad()
                (-counts[batch].sum() * (math.nan if batches == 1 else 1.0)).backward()
                optimizer.step()
                batches += 1
            return sorted(counts.detach().tolist()), batches

        with Cluster(deadline=30.0) as cluster:
            assert cluster.run(work) == [([0.0] * 3 + [1.0] * 9, 4)]

    def test_early_pushes_of_a_skipped_step_are_no_mistaken_bets(self) -> None:
        def work(rank: int) -> int:
            model = net()
            optimizer = distributed(model, non_finite="skip")
            steps(model, optimizer, range(4))
            for seed in range(3):
                before = values(model)
                optimizer.zero_grad()
                (model(torch.ones(2, 4)).sum() * math.nan).backward()
                optimizer.step()
                assert same_bits(values(model), before)
                steps(model, optimizer, [seed])
            (exchange,) = optimizer.attachment.main
            assert exchange.speculation.enabled
            assert torch.isfinite(values(model)).all()
            return skipped_steps()

        with Cluster(servers=2, deadline=30.0) as cluster:
            assert cluster.run(work) == [3]


class TestAllow:
    @pytest.mark.parametrize("mode", MODES)
    def test_it_is_applied_as_torch_does(self, mode: str) -> None:
        def work(rank: int) -> bool:
            model, optimizer = counter(mode, non_finite="allow")
            count(model, optimizer)
            count(model, optimizer, bad=math.nan if rank == 1 else 1.0)
            count(model, optimizer)
            return bool(model[1][250].isnan())

        with Cluster(servers=2, workers=2, deadline=30.0) as cluster:
            seen = cluster.run(work)
            with cluster.client() as client:
                (table,) = client.tables()
                found = torch.cat([v.flatten() for v in client.pull(table).values()])
        assert seen[1]
        assert seen[0] or mode in ("async", "ssp")
        assert found.isnan().nonzero().flatten().tolist() == [350]


class TestLocalSteps:
    """Finite gradients may still take parameters out of range: the change is judged where it would be exchanged."""

    def burst(self, model: torch.nn.ParameterList, optimizer: Any) -> None:
        for p in model:
            p.grad = torch.full_like(p, 3e38)
        optimizer.param_groups[0]["lr"] = 3e38
        try:
            optimizer.step()
        finally:
            optimizer.param_groups[0]["lr"] = 1.0

    def test_a_refused_change_is_undone_here_and_the_next_counts(self) -> None:
        def work(rank: int) -> None:
            model, optimizer = counter("local", every=2)
            count(model, optimizer, 3)
            if rank == 1:
                with pytest.raises(RequestRefused, match="change by local steps of parameter '0'"):
                    self.burst(model, optimizer)
                assert values(model).unique().tolist() == [-2.0]
                count(model, optimizer)
            count(model, optimizer)

        with Cluster(servers=2, workers=2, deadline=30.0) as cluster:
            cluster.run(work)
            assert on_servers(cluster) == [-4.0]

    def test_a_skipped_change_ends_the_exchange_for_all_where_it_began(self) -> None:
        def work(rank: int) -> tuple[list[float], int]:
            model, optimizer = counter("local", every=2, non_finite="skip")
            count(model, optimizer, 3)
            if rank == 1:
                self.burst(model, optimizer)
            else:
                count(model, optimizer)
            between = values(model).unique().tolist()
            count(model, optimizer, 2)
            return between, skipped_steps()

        with Cluster(servers=2, workers=2, deadline=30.0) as cluster:
            assert cluster.run(work) == [([-2.0], 1)] * 2
            assert on_servers(cluster) == [-4.0]


class TestScaler:
    @pytest.mark.parametrize("policy", ["reject", "skip"])
    def test_an_inf_that_the_scaler_found_is_its_skip_for_all(self, policy: str) -> None:
        def work(rank: int) -> tuple[float, int, list[float]]:
            model, optimizer = counter("sync", non_finite=policy)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            for number in range(3):
                bad = math.inf if (rank, number) == (1, 1) else 1.0
                optimizer.zero_grad()
                loss = sum((p * torch.ones_like(p)).sum() for p in model) + model[1][7] * (bad - 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            return scaler.get_scale(), skipped_steps(), values(model).unique().tolist()

        with Cluster(servers=2, workers=2, deadline=30.0) as cluster:
            assert cluster.run(work) == [(2.0, 1, [-2.0])] * 2

    def test_what_overflows_when_unscaled_is_a_skip_too(self) -> None:
        def work(rank: int) -> tuple[float, int]:
            model, optimizer = counter("sync")
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-10)
            scaler.scale(torch.ones(()))  # it makes its tensors at the first use
            for p in model:
                p.grad = torch.full_like(p, 3e38)
            scaler.step(optimizer)
            scaler.update()
            return scaler.get_scale(), skipped_steps()

        with Cluster(deadline=30.0) as cluster:
            assert cluster.run(work) == [(2.0**-11, 1)]


def test_a_norm_beyond_fp32_of_finite_gradients_clips_in_async() -> None:
    """A factor of 0 would mean 1 on the wire: the update was applied unclipped."""

    def work(rank: int) -> list[float]:
        model, optimizer = counter("async", max_grad_norm=1.0)
        for p in model:
            p.grad = torch.full_like(p, 3e38)
        optimizer.step()
        return [float(values(model).min()), float(values(model).max())]

    with Cluster(deadline=30.0) as cluster:
        ((low, high),) = cluster.run(work)
    assert low == high == pytest.approx(-(400**-0.5), rel=1e-4)


def test_workers_must_agree() -> None:
    there = threading.Event()

    def work(rank: int) -> None:
        model, _ = counter("sync", non_finite="skip" if rank == 1 else "reject")
        if rank == 0:
            paramesh.broadcast(model)
            there.set()
            return
        assert there.wait(20)
        with pytest.raises(StateRefused, match="non_finite reject there, skip here") as caught:
            paramesh.broadcast(model)
        assert caught.value.reason == "SCHEMA"

    with Cluster(workers=2, deadline=30.0) as cluster:
        cluster.run(work)
