"""Steps that go on while one worker is slow, late or gone: nobody is stuck, nothing counts twice.

The order of events is forced: calls of one worker's client wait for what another one has done.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import paramesh
import pytest
import torch
from paramesh.client import AsyncClient
from paramesh.errors import ParameshError, refuse
from paramesh.session import current
from paramesh.testing import Cluster

from tests.integration.test_equivalence_features import (
    backward,
    distributed,
    evictions,
    net,
    same_bits,
    steps,
    values,
    wait_until,
)

QUICK = {"heartbeat_interval": 0.2, "failure_timeout": 0.9, "client_timeout": 1.0}
"""Cluster settings under which a client whose heart stopped is evicted within two seconds."""


async def event(it: threading.Event) -> None:
    end = time.monotonic() + 30
    while not it.is_set():
        assert time.monotonic() < end, "the event did not come"
        await asyncio.sleep(0.005)


def before(monkeypatch: pytest.MonkeyPatch, name: str, hook: Callable[[AsyncClient], Awaitable[None]]) -> None:
    """Awaits `hook(client)` before each call of one method of any client."""
    whole = getattr(AsyncClient, name)

    async def hooked(self: AsyncClient, *arguments: Any, **options: Any) -> Any:
        await hook(self)
        return await whole(self, *arguments, **options)

    monkeypatch.setattr(AsyncClient, name, hooked)


def clipped(model: torch.nn.Module, count: int) -> torch.Tensor:
    """What `count` steps with every worker's gradient alike and max_grad_norm=0.01 make of a model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    for seed in range(count):
        optimizer.zero_grad()
        backward(model, seed)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    return values(model)


def test_norms_asked_for_after_the_step_was_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    slow: list[int] = []
    stepped = threading.Event()

    async def hold(client: AsyncClient) -> None:
        if client.client_id in slow:
            await event(stepped)

    before(monkeypatch, "norms", hold)

    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = distributed(model, max_grad_norm=0.01)
        if rank == 1:
            slow.append(current().client.client_id)
        steps(model, optimizer, [0])
        stepped.set()
        steps(model, optimizer, [1])
        return values(model)

    with Cluster(servers=2, workers=2) as cluster:
        one, other = cluster.run(work)
    assert same_bits(one, other)
    torch.testing.assert_close(one, clipped(net(), 2), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_straggler_that_backup_workers_overtook_goes_on(overlap: bool) -> None:
    ready, overtaken = threading.Barrier(2, timeout=30), threading.Event()

    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = distributed(model, backup_workers=1, overlap_pull=overlap)
        paramesh.broadcast(model)
        current().ensure_active()
        ready.wait()
        if rank == 1:
            backward(model, 99)
            assert overtaken.wait(30)
            optimizer.step()  # too late for step 0: the group is at 3
            assert optimizer.attachment.main[0].position == 3
            return values(model)
        steps(model, optimizer, range(3))
        overtaken.set()
        return values(model)

    with Cluster(servers=2, workers=2) as cluster:
        one, other = cluster.run(work)
    assert same_bits(one, other)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_worker_evicted_after_its_ready_rejoins(monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    slow: list[int] = []
    further = threading.Event()

    async def hold(client: AsyncClient) -> None:
        if client.client_id in slow:
            await event(further)

    before(monkeypatch, "pull", hold)

    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = distributed(model, overlap_pull=overlap)
        session = current()
        steps(model, optimizer, range(3))
        paramesh.barrier("three")
        if rank == 1:
            session._stop_background()
            mine = session.client.client_id
            slow.append(mine)
            steps(model, optimizer, range(3, 6))
            assert session.client.client_id != mine
            return values(model)
        steps(model, optimizer, [3])
        wait_until(lambda: evictions(session) == 1)
        steps(model, optimizer, range(4, 6))
        further.set()
        return values(model)

    with Cluster(workers=2, **QUICK) as cluster:
        cluster.run(work)


def test_a_step_whose_contributors_died_before_its_clip_factor_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    dead: list[int] = []

    async def die(client: AsyncClient) -> None:
        if client.client_id in dead:
            raise refuse("INTERNAL", "killed")

    before(monkeypatch, "norms", die)

    def work(rank: int) -> torch.Tensor:
        model = net()
        optimizer = distributed(model, max_grad_norm=0.01)
        session = current()
        dead.append(session.client.client_id)
        with pytest.raises(ParameshError, match="killed"):
            steps(model, optimizer, [0])
        session.rejoin()  # stands for another worker: nothing but the servers knows of step 0
        session.ensure_active()
        assert optimizer.attachment.main[0].position == 1
        steps(model, optimizer, [1])
        return values(model)

    with Cluster(servers=2, deadline=30.0, **QUICK) as cluster:
        (result,) = cluster.run(work)
    torch.testing.assert_close(result, clipped(net(), 2), rtol=1e-5, atol=1e-7)
