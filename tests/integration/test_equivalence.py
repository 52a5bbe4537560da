"""Invariant 15: a synchronous run equals the protocol's reference bit for bit, on any servers.

By default each optimizer variant runs with 1, 2 and 3 workers, servers and dtypes dealt so that every pair
of values meets; `make soak` runs the full product. A table optimizer x deviation from one process is printed
(pytest -s, or in the report of a failure).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from paramesh.testing import Cluster

from tests.integration.equivalence import (
    Case,
    Trace,
    deviation,
    first_difference,
    same_bits,
    tolerance,
    train,
    variants,
    with_dtype,
)

DTYPES = (torch.float32, torch.float64)

SCENARIOS = [
    Case("Adam", {"lr": 0.002}, accumulate=3, steps=20),
    Case("SGD", {"lr": 0.01, "momentum": 0.9}, max_grad_norm=0.5),
    Case("Adam", {"lr": 0.002, "amsgrad": True}, torch.float64, max_grad_norm=0.5),
    Case("AdamW", {"lr": 0.002}, amp_inf_at=20),
    Case("SGD", {"lr": 0.0002, "momentum": 0.9}, loss_reduction="sum"),
    Case("RMSprop", {"lr": 0.001}, speculate=False, steps=20),
]


def dealt(servers: int, workers: int) -> list[Case]:
    """A Latin square: variant i runs with W workers on server count and dtype number i + W."""
    cases = [
        with_dtype(case, DTYPES[(index + workers) % 2])
        for index, case in enumerate(variants())
        if (index + workers) % 3 + 1 == servers
    ]
    return cases + (SCENARIOS if (servers, workers) in ((2, 2), (1, 3)) else [])


def run(servers: int, workers: int, cases: list[Case], deadline: float = 170.0) -> list[list[Trace]]:
    """Returns per case the workers' traces."""
    with Cluster(servers=servers, workers=workers, deadline=deadline) as cluster:
        by_rank = cluster.run(lambda rank: [train(case, rank) for case in cases])
    return [list(traces) for traces in zip(*by_rank, strict=True)]


def report(cases: list[Case], runs: list[list[Trace]], servers: int, workers: int) -> Iterator[str]:
    """Prints the table; yields what is wrong."""
    print(f"\n{'optimizer':<70} {'W':>2} {'S':>2} {'bits':>6} {'deviation':>10} {'allowed':>8}")
    for case, traces in zip(cases, runs, strict=True):
        different = first_difference(case, traces)
        off, allowed = deviation(case, traces), tolerance(case)
        bits = "equal" if different is None else "DIFFER"
        print(f"{case.name:<70} {workers:>2} {servers:>2} {bits:>6} {off:>10.1e} {allowed:>8.0e}")
        if different is not None:
            yield different
        if off > allowed:
            yield f"{case.name}: {off:.2e} from one process, {allowed:.0e} is allowed"


@pytest.mark.parametrize(("servers", "workers"), list(itertools.product((1, 2, 3), (1, 2, 3))))
def test_every_optimizer_equals_the_reference(servers: int, workers: int) -> None:
    cases = dealt(servers, workers)
    assert list(report(cases, run(servers, workers, cases), servers, workers)) == []


@pytest.mark.soak
@pytest.mark.parametrize(("servers", "workers"), list(itertools.product((1, 2, 3), (1, 2, 3))))
def test_the_full_product_equals_the_reference(servers: int, workers: int) -> None:
    cases = [with_dtype(case, dtype) for case in variants() for dtype in DTYPES] + SCENARIOS
    assert list(report(cases, run(servers, workers, cases, 1800.0), servers, workers)) == []


def test_bits_do_not_depend_on_the_number_of_servers() -> None:
    cases = [
        Case("Adam", {"lr": 0.002, "amsgrad": True, "weight_decay": 0.01}, steps=15),
        Case("SGD", {"lr": 0.01, "momentum": 0.9}, torch.float64, max_grad_norm=0.5, steps=15),
    ]
    few, many = run(1, 2, cases), run(3, 2, cases)
    for case, one, other in zip(cases, few, many, strict=True):
        for step in range(case.steps):
            assert all(map(same_bits, one[0].values[step], other[0].values[step])), f"{case.name} step {step}"


def test_a_coordinator_that_restarts_changes_no_bit() -> None:
    case = Case("Adam", {"lr": 0.002, "amsgrad": True}, steps=30)
    with Cluster(servers=2, workers=2) as cluster:

        def restart(step: int) -> None:
            if step == 10:
                cluster.restart_coordinator()

        traces = cluster.run(lambda rank: train(case, rank, restart if rank == 0 else lambda step: None))
    assert first_difference(case, traces) is None


def test_an_inf_on_one_worker_is_a_skip_for_all_and_every_scaler_learns_it() -> None:
    case = Case("Adam", {"lr": 0.002}, amp_inf_at=5, steps=12, one_cycle=False)
    (traces,) = run(2, 3, [case])
    for trace in traces:
        assert [trace.scales[4], trace.scales[5]] == [2.0**10, 2.0**9]
        assert trace.scales == traces[0].scales
        assert all(map(same_bits, trace.values[4], trace.values[5]))
    assert [trace.infs[5] for trace in traces] == [True, False, False]
    assert first_difference(case, traces) is None
