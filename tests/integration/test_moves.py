"""Partitions that move while training runs: no bit changes, no update is lost or applied twice.

Faults matrix rows 29 to 32; invariants 14, 17, 21, 22, 29.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import paramesh
import pytest
import torch
from paramesh import testing
from paramesh_coordinator import changing, inspection

from tests.cluster.waiting import wait_until

STEPS = 60
PARTITION_BYTES = 1024
"""Four partitions of a small model, beside the ledger."""

At = Callable[[int, int], None]


def nothing(rank: int, step: int) -> None:
    """No disturbance."""


def train(at: At = nothing, steps: int = STEPS) -> Callable[[int], list[float]]:
    """Synchronous steps of two workers; `at` is called before each."""

    def work(rank: int) -> list[float]:
        model = torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.Tanh(), torch.nn.Linear(48, 1))
        first = torch.Generator().manual_seed(5)  # its own: torch's global one is shared by the threads
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=first) * 0.2)
        data = torch.randn(4 * steps, 16, generator=torch.Generator().manual_seed(0))
        loader = paramesh.DataLoader(torch.utils.data.TensorDataset(data), batch_size=2, shuffle=True, seed=1)
        optimizer = paramesh.DistributedOptimizer(
            torch.optim.Adam(model.parameters(), lr=1e-2), model, partition_bytes=PARTITION_BYTES
        )
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
        found = alone.run(train())
    assert found[0] == found[1]
    return found[0]


@pytest.fixture(params=[1, 2], ids=["one copy", "two copies"])
def cluster(request: pytest.FixtureRequest) -> Iterator[testing.Cluster]:
    with testing.Cluster(servers=3, workers=2, replicas=request.param, gather=30.0) as made:
        yield made


class Mover:
    """Asks the coordinator of a cluster, as psctl does."""

    def __init__(self, cluster: testing.Cluster) -> None:
        self.cluster = cluster

    def ask(self, function: Callable[..., Any], *more: Any) -> Any:
        return self.cluster.call(function(inspection.Coordinators((self.cluster.address,)), "default", *more), 10)

    def rows(self) -> dict[int, dict[str, Any]]:
        """As `psctl partitions --json` has them."""
        return {row["partition"]: row for row in self.ask(inspection.read_partitions)}

    def names(self) -> list[str]:
        return [f"server-{index}" for index in self.cluster._servers]

    def start(self, partition: int, source: str = "", target: str = "") -> dict[str, Any]:
        row = self.rows()[partition]
        held = [ref["name"] for ref in (*row["in_sync"], *row["learners"])]
        source = source or row["primary"]["name"]
        target = target or next(name for name in self.names() if name not in held)
        found: dict[str, Any] = self.ask(changing.start_move, partition, source, target)
        return found

    def stage(self, move: dict[str, Any]) -> str:
        rows = self.ask(changing.list_moves)
        return next(row["stage"] for row in rows if row["move"] == move["move"])

    def wait(self, move: dict[str, Any]) -> str:
        """How it ended."""
        wait_until(lambda: self.stage(move) in ("done", "cancelled"), 15, f"move {move}")
        return self.stage(move)

    def holds(self, name: str) -> bool:
        """Whether the map lists a server anywhere."""
        return any(name == ref["name"] for row in self.rows().values() for ref in (*row["in_sync"], *row["learners"]))


def index_of(name: str) -> int:
    return int(name.rpartition("-")[2])


def test_every_partition_and_the_ledger_move_and_no_bit_changes(
    cluster: testing.Cluster, undisturbed: list[float]
) -> None:
    """Invariants 14, 15, 21: rows 29 and 30."""
    mover, ended = Mover(cluster), list[str]()

    def move(rank: int, step: int) -> None:
        if rank == 0 and step % 5 == 2:
            partition = step // 5 % 5
            ended.append(mover.wait(mover.start(partition)))

    assert cluster.run(train(move)) == [undisturbed, undisturbed]
    assert set(ended) == {"done"}
    assert all(row["epoch"] > 1 and row["state"] == "online" for row in mover.rows().values())


def test_moves_under_steps_that_do_not_wait(cluster: testing.Cluster, undisturbed: list[float]) -> None:
    """As before, with every move committed at whatever moment of a step."""
    mover, over, moves = Mover(cluster), threading.Event(), list[str]()

    def keep_moving() -> None:
        dice = random.Random(3)
        while not over.is_set():
            moves.append(mover.wait(mover.start(dice.randrange(5))))

    thread = threading.Thread(target=keep_moving, daemon=True)

    def begin(rank: int, step: int) -> None:
        if (rank, step) == (0, 3):
            thread.start()

    try:
        steps = 300
        with testing.Cluster(servers=1, workers=2, gather=30.0) as alone:
            expected = alone.run(train(steps=steps))
        assert cluster.run(train(begin, steps), deadline=120) == expected
    finally:
        over.set()
        thread.join(20)
    assert moves
    assert set(moves) == {"done"}


def test_a_drained_server_is_empty_and_can_go(cluster: testing.Cluster, undisturbed: list[float]) -> None:
    """Invariant 29, row 31."""
    mover, lost = Mover(cluster), list[list[int]]()

    def stop_one(rank: int, step: int) -> None:
        if (rank, step) == (0, STEPS // 2):
            lost.append(cluster.stop_server(0))

    assert cluster.run(train(stop_one)) == [undisturbed, undisturbed]
    assert lost == [[]]
    assert not mover.holds("server-0")


def test_a_server_that_comes_gets_its_share(cluster: testing.Cluster, undisturbed: list[float]) -> None:
    """Row 30: nobody asks for it."""
    mover = Mover(cluster)
    home = {row["primary"]["name"] for row in mover.rows().values()}

    def add(rank: int, step: int) -> None:
        if rank == 0 and step == STEPS // 3:
            cluster.add_server()
        if rank == 0 and step == STEPS - 5:
            wait_until(lambda: mover.holds("server-3"), 20, "the new server to hold something")

    assert cluster.run(train(add)) == [undisturbed, undisturbed]
    assert "server-3" not in home
    assert all(row["state"] == "online" for row in mover.rows().values())


def test_a_rolling_restart(cluster: testing.Cluster, undisturbed: list[float]) -> None:
    """Row 32: every server is replaced, one after the other."""
    mover = Mover(cluster)

    def roll(rank: int, step: int) -> None:
        if rank == 0 and step in (10, 25, 40):
            first = min(cluster._servers)
            cluster.add_server()
            assert cluster.stop_server(first) == []

    assert cluster.run(train(roll)) == [undisturbed, undisturbed]
    assert set(mover.names()) == {"server-3", "server-4", "server-5"}


@pytest.mark.parametrize("victim", ["source", "target", "coordinator"])
@pytest.mark.parametrize("partition", [0, 2], ids=["ledger", "partition"])
def test_a_death_in_a_move_costs_no_bit(undisturbed: list[float], victim: str, partition: int) -> None:
    """Invariants 17 and 22: training goes on, whatever becomes of the move."""

    def strike(rank: int, step: int) -> None:
        if (rank, step) != (0, STEPS // 2):
            return
        move = mover.start(partition)
        if victim == "coordinator":
            cluster.restart_coordinator()
            assert mover.wait(move) == "done"
        else:
            cluster.kill_server(index_of(move[victim]))
            assert mover.wait(move) in ("done", "cancelled")

    with testing.Cluster(servers=4, workers=2, replicas=2, gather=30.0) as cluster:
        mover = Mover(cluster)
        assert cluster.run(train(strike), deadline=90) == [undisturbed, undisturbed]

        def whole() -> bool:
            return all(row["state"] == "online" and not row["learners"] for row in mover.rows().values())

        wait_until(whole, 20, "every partition to have two copies again")


def test_pushes_on_arrival_count_once_each(cluster: testing.Cluster) -> None:
    """Invariants 1 and 2 in async mode: with unit gradients the values are the count."""
    mover, over, moves = Mover(cluster), threading.Event(), list[str]()
    pushes, length = 150, 700

    def work(rank: int) -> list[float]:
        model = torch.nn.Module()
        model.counts = torch.nn.Parameter(torch.zeros(length, dtype=torch.float64))
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = paramesh.DistributedOptimizer(sgd, model, mode="async", partition_bytes=PARTITION_BYTES)
        for push in range(pushes):
            if (rank, push) == (0, 5):
                thread.start()
            model.counts.grad = torch.full((length,), -1.0, dtype=torch.float64)
            optimizer.step()
        paramesh.barrier()
        if rank == 0:
            over.set()
            thread.join(30)
        paramesh.barrier()
        optimizer.zero_grad()
        model.counts.grad = torch.zeros(length, dtype=torch.float64)
        optimizer.step()
        values: list[float] = model.counts.detach().tolist()
        return values

    def keep_moving() -> None:
        dice = random.Random(7)
        while not over.is_set():
            moves.append(mover.wait(mover.start(dice.randrange(6))))

    thread = threading.Thread(target=keep_moving, daemon=True)
    try:
        found = cluster.run(work, deadline=120)
    finally:
        over.set()
    assert moves
    assert set(moves) == {"done"}
    assert [set(values) for values in found] == [{2.0 * pushes}] * 2
