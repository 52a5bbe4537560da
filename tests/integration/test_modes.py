"""The four modes keep their word: bounds of ssp, independence of async, averages of local."""

from __future__ import annotations

import paramesh
import pytest
import torch
from paramesh import testing

from tests.cluster import inspection

TALLY = "tests.cluster.bodies:tally"


@pytest.mark.parametrize("staleness", [0, 2])
def test_ssp_bound_with_a_worker_slowed_ten_times(inprocess_cluster, staleness):
    """Clocks never drift apart by more than the bound (invariant 16), and use it (else it is sync)."""
    cluster = inprocess_cluster(servers=2, start_workers=3)
    workers = cluster.start_workers(
        3, TALLY, length=360, epochs=1, mode="ssp", staleness=staleness, seconds=[0.01, 0.1, 0.01]
    )
    cluster.wait_for_workers(90)
    gap = widest_gap(workers)
    assert gap <= staleness, "a worker began a clock too early"
    (group,) = inspection.ledger_status(cluster.coordinator_address).groups
    assert group.widest_gap <= staleness
    assert group.widest_gap == staleness, "the bound was never reached: the test shows nothing"


def widest_gap(workers) -> int:
    """The largest (finished by one) - (begun by another), over all moments while all train.

    A worker that returned from its c-th step may begin clock c, so each other worker must
    have begun its step number c - staleness at least: that is what both events witness.
    """
    events = sorted(
        (e["t"], w.index, e["kind"], e["step"]) for w in workers for e in w.events() if e["kind"] in ("begin", "step")
    )
    ends = min(w.events("step")[-1]["t"] for w in workers)
    begun = dict.fromkeys((w.index for w in workers), 0)
    widest = 0
    for t, index, kind, step in events:
        if t > ends:
            break
        if kind == "begin":
            begun[index] = step
        else:
            widest = max(widest, step - min(begun.values()))
    return widest


def test_async_waits_for_nobody(inprocess_cluster):
    """A fast worker makes many steps while another is in its first."""
    cluster = inprocess_cluster(servers=1, start_workers=2)
    fast, slow = cluster.start_workers(2, TALLY, length=200, epochs=1, mode="async", wait_at=1, waiter=1)
    cluster.wait_until(lambda: slow.events("waiting"), 30, "the slow worker to be in its second step")
    before = len(fast.events("step"))
    cluster.wait_until(lambda: len(fast.events("step")) >= before + 10, 30, "ten more steps of the fast worker")
    slow.open_gate("go")
    cluster.wait_for_workers(60)
    assert cluster.table_values()["counts"].tolist() == [1.0] * 200


def test_local_with_plain_averaging_of_10_20_30_gives_20():
    """H=1: each worker steps to its own value; all end at the mean."""

    def train(rank: int) -> list[float]:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = paramesh.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), model, mode="local", every=1
        )
        model.weight.grad = torch.full((1, 1), -10.0 * (rank + 1))  # lr 1: steps to 10, 20, 30
        optimizer.step()
        return model.weight.flatten().tolist()

    with testing.Cluster(servers=1, workers=3) as cluster:
        assert cluster.run(train) == [[20.0]] * 3


def test_local_goes_alone_between_exchanges():
    """H=3: two steps touch no server, the third averages."""

    def train(rank: int) -> list[float]:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = paramesh.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), model, mode="local", every=3
        )
        seen = []
        for _ in range(6):
            model.weight.grad = torch.full((1, 1), -1.0 * (rank + 1))
            optimizer.step()
            seen.append(float(model.weight.detach()))
        return seen

    with testing.Cluster(servers=1, workers=2) as cluster:
        assert cluster.run(train) == [[1.0, 2.0, 4.5, 5.5, 6.5, 9.0], [2.0, 4.0, 4.5, 6.5, 8.5, 9.0]]
