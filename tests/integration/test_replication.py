"""Replicas in one process: equal bits, promotion, divergence found and mended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import paramesh
import pytest
import torch
from paramesh import testing
from paramesh_server.marks import mark
from paramesh_server.replica import Role
from paramesh_server.shards import Slot

from tests.cluster.waiting import wait_until

STEPS = 40


@pytest.fixture
def cluster() -> Iterator[testing.Cluster]:
    with testing.Cluster(servers=3, workers=2, replicas=2, gather=30.0) as made:
        yield made


def slots(cluster: testing.Cluster) -> list[Slot]:
    return [slot for server in cluster._servers.values() for slot in server._slots()]


def replicas(cluster: testing.Cluster, number: int) -> dict[Role, Slot]:
    return {slot.replica.role: slot for slot in slots(cluster) if slot.number == number}


def home(cluster: testing.Cluster, number: int) -> int:
    """Index of the server that leads a partition."""
    return next(
        index
        for index, server in cluster._servers.items()
        for slot in server._slots()
        if slot.number == number and slot.replica.role is Role.PRIMARY
    )


def train(mode: str, at: Callable[[int, int], None] = lambda rank, step: None) -> Callable[[int], list[float]]:
    """A short training of two workers; `at` is called before each step."""

    def work(rank: int) -> list[float]:
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        first = torch.Generator().manual_seed(5)  # its own: torch's global one is shared by the threads
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=first) * 0.2)
        data = torch.randn(4 * STEPS, 16, generator=torch.Generator().manual_seed(0))
        loader = paramesh.DataLoader(torch.utils.data.TensorDataset(data), batch_size=2, shuffle=True, seed=1)
        optimizer = paramesh.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model, mode=mode)
        for step, (x,) in enumerate(loader):
            at(rank, step)
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()

    return work


@pytest.fixture(scope="module")
def undisturbed() -> list[float]:
    with testing.Cluster(servers=1, workers=2, gather=30.0) as alone:
        found = alone.run(train("sync"))
    assert found[0] == found[1]
    return found[0]


def test_followers_are_their_primaries_bit_for_bit(cluster: testing.Cluster, undisturbed: list[float]) -> None:
    assert cluster.run(train("sync")) == [undisturbed, undisturbed]

    def equal(number: int) -> bool:
        pair = replicas(cluster, number)
        lsns = {role: slot.replica.machine.log.lsn for role, slot in pair.items()}
        return len(pair) == 2 and lsns[Role.PRIMARY] == lsns[Role.FOLLOWER]

    wait_until(lambda: equal(1) and equal(0), 10, "followers to apply the last record")
    pair = replicas(cluster, 1)
    assert pair[Role.PRIMARY].replica.machine.state_hash() == pair[Role.FOLLOWER].replica.machine.state_hash()
    ledgers = [slot.replica.machine.ledger.state_digest() for slot in replicas(cluster, 0).values()]
    assert len(set(ledgers)) == 1


@pytest.mark.parametrize("lost", [0, 1], ids=["ledger", "partition"])
def test_a_lost_server_changes_no_bit(cluster: testing.Cluster, undisturbed: list[float], lost: int) -> None:
    """Invariants 1, 2, 14, 15, 17: its follower takes over, workers notice nothing but a longer step."""

    def kill(rank: int, step: int) -> None:
        if (rank, step) == (0, STEPS // 2):
            cluster.kill_server(home(cluster, lost))

    assert cluster.run(train("sync", kill), deadline=60) == [undisturbed, undisturbed]
    rows = {row.id: row for row in cluster.client()._client.routes.map.partitions}
    assert rows[lost].epoch == 2


def test_a_replica_that_differs_is_found_and_mended(cluster: testing.Cluster) -> None:
    """Invariant 8: a flipped bit at a follower is counted, and a snapshot puts it right."""
    cluster.run(train("sync"))
    pair = replicas(cluster, 1)
    leader, follower = pair[Role.PRIMARY], pair[Role.FOLLOWER]
    wait_until(lambda: follower.replica.machine.log.lsn == leader.replica.machine.log.lsn, 10, "the follower")
    follower.replica.machine.flat[5] ^= 1
    cluster.call(mark(leader))
    counted = lambda: sum(server.counters.diverged for server in cluster._servers.values())  # noqa: E731
    wait_until(lambda: counted() == 1, 10, "the divergence to be counted")
    same = lambda: follower.replica.machine.state_hash() == leader.replica.machine.state_hash()  # noqa: E731
    wait_until(same, 10, "a snapshot to mend it")
    assert not follower.replica.diverged
    cluster.call(mark(leader))
    wait_until(lambda: follower.replica.machine.log.lsn == leader.replica.machine.log.lsn, 10, "the second mark")
    assert counted() == 1


def test_async_counts_every_push_once_when_a_primary_dies(cluster: testing.Cluster) -> None:
    """Invariants 1, 2: SGD with lr 1 and gradients of -1: a value is the number of pushes that counted."""
    done = threading.Event()

    def work(rank: int) -> int:
        model = torch.nn.Module()
        model.cell = cell = torch.nn.Parameter(torch.zeros(4))
        optimizer = paramesh.DistributedOptimizer(torch.optim.SGD([cell], lr=1.0), model, mode="async")
        for step in range(60):
            if (rank, step) == (0, 20):
                cluster.kill_server(home(cluster, 1))
                done.set()
            cell.grad = torch.zeros(4)
            cell.grad[rank] = -1.0
            optimizer.step()
        paramesh.barrier()
        return int(cell[rank])

    assert cluster.run(work, deadline=60) == [60, 60]
    assert done.is_set()


def test_nothing_is_released_while_a_follower_is_silent(cluster: testing.Cluster) -> None:
    """Commit before release: with its follower's answers held back, a push is applied and not acknowledged."""
    cluster.run(train("async"))
    leader = replicas(cluster, 1)[Role.PRIMARY]
    held = asyncio.run_coroutine_threadsafe(_append_without_followers(leader), cluster._io.loop).result(10)
    assert held == "not released"


async def _append_without_followers(slot: Slot) -> str:
    """Appends a record whose acknowledgements are not let in, and looks whether it would be released."""
    insync = slot.replica.insync
    acked, insync.acked = insync.acked, lambda *_: None  # type: ignore[method-assign]
    try:
        lsn = await slot.lead(slot.replica.machine.mark)
        waiting = asyncio.ensure_future(slot.released(lsn, slot.replica.reign))
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        waiting.cancel()
        return "released" if done else "not released"
    finally:
        insync.acked = acked  # type: ignore[method-assign]
