"""Dense steps of real processes, beside the limits of the same run.

    python -m benchmarks dense --sizes 1M,16M,64M --workers 2 --servers 2 --mode sync
    python -m benchmarks dense --replicas 2      # beside one replica: what the second copy costs
    python -m benchmarks dense --tls             # beside plaintext: what encryption costs

A step of a synchronous pair is as long as the slower worker's; push and pull are bytes of
all workers over the slower one's time. Ratios are to bare gRPC streaming, measured just
before and just after each run, because figures of different minutes do not compare.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.limits import Limits, measure

STEPS_BYTES = 2 << 30
"""Each size moves about that much per worker and direction, within 7 to 60 timed steps."""

DEADLINE = 600.0
"""Seconds for the workers of one run."""


@dataclass(frozen=True)
class Plan:
    """What to run."""

    sizes: dict[str, int]
    workers: int
    servers: int
    mode: str
    replicas: int = 1
    """Copies of each partition; above 1 the same is run with one copy too, and steps are compared."""
    tls: bool = False
    """Mutual TLS between all; the same is run in the clear too, and steps are compared."""

    def steps(self, elements: int) -> int:
        """Timed steps of a size."""
        return max(7, min(60, STEPS_BYTES // (elements * 4)))


@dataclass(frozen=True)
class Row:
    """One size of one run. Rates in GB/s over all workers, times in milliseconds."""

    size: str
    step_ms: float
    """Median step, of the slower worker in each step."""
    step_p90_ms: float
    push_gbps: float
    """Bytes of all workers over the push phase inside `step()`."""
    pull_gbps: float
    """The same for pulling what is applied already."""
    apply_and_pull_ms: float
    """The pull inside `step()`: the servers sum, apply and encode first."""
    steps_off: float
    """Largest deviation of any parameter from the computed answer, in steps; 0: bit-exact."""
    right: bool
    push_of_grpc: float
    """push_gbps over bare gRPC streaming up."""
    pull_of_grpc: float
    """pull_gbps over bare gRPC streaming down."""
    of_one_replica: float = 1.0
    """step_ms over that of one replica in the same run."""
    of_plaintext: float = 1.0
    """step_ms over that in the clear in the same run."""


def run(plan: Plan, runs: int = 1) -> dict[str, Any]:
    """Measure limits and rows, `runs` times; the median run of each size counts."""
    limits = [measure()]
    plans = {"plan": plan}
    if plan.replicas > 1:
        plans["one_replica"] = replace(plan, replicas=1)
    if plan.tls:
        plans["plaintext"] = replace(plan, tls=False)
    passes: dict[str, list[list[Row]]] = {name: [] for name in plans}
    for _ in range(runs):
        for key, one in reversed(plans.items()):
            results = _run_cluster(one)
            limits.append(measure())
            between = limits[-2].median_with([limits[-1]])
            passes[key].append([_row(name, one, results, between) for name in plan.sizes])
    rows = {key: [_median_row([p[i] for p in done]) for i in range(len(plan.sizes))] for key, done in passes.items()}
    compared = [
        replace(
            row,
            of_one_replica=row.step_ms / rows.get("one_replica", rows["plan"])[i].step_ms,
            of_plaintext=row.step_ms / rows.get("plaintext", rows["plan"])[i].step_ms,
        )
        for i, row in enumerate(rows["plan"])
    ]
    result = {
        "workers": plan.workers,
        "servers": plan.servers,
        "mode": plan.mode,
        "replicas": plan.replicas,
        "tls": plan.tls,
        "runs": runs,
        "limits": limits[0].median_with(limits[1:]).as_dict(),
        "rows": [asdict(row) for row in compared],
    }
    return result | {key: [asdict(row) for row in rows[key]] for key in rows if key != "plan"}


def _median_row(rows: list[Row]) -> Row:
    """The run with the median step; wrong parameters in any run make it wrong."""
    middle = sorted(rows, key=lambda row: row.step_ms)[len(rows) // 2]
    worst = max(row.steps_off for row in rows)
    return Row(**{**asdict(middle), "steps_off": worst, "right": all(row.right for row in rows)})


def _run_cluster(plan: Plan) -> list[dict[str, Any]]:
    """Start a cluster of processes, run the workers in it, and read their results."""
    from tests.cluster.processes import ProcessCluster
    from tests.cluster.secure import SecureCluster

    kind = SecureCluster if plan.tls else ProcessCluster
    text = json.dumps({**asdict(plan), "steps": {name: plan.steps(n) for name, n in plan.sizes.items()}})
    with kind(servers=plan.servers, replicas=plan.replicas, start_workers=plan.workers) as cluster:
        out = cluster.directory / "dense.jsonl"
        for index in range(plan.workers):
            command = [sys.executable, "-m", "benchmarks.dense_worker", text, str(out)]
            cluster.start_command(f"worker-{index}", command, PARAMESH_RANK=str(index))
        cluster.wait_for_commands(DEADLINE)
        return _read(out)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _row(name: str, plan: Plan, results: list[dict[str, Any]], limits: Limits) -> Row:
    mine = [r for r in results if r["size"] == name]
    nbytes = plan.sizes[name] * 4 * plan.workers

    def slower(key: str) -> list[float]:
        """The slower worker's time of each repeat; the workers start each together."""
        return [max(times) for times in zip(*(r[key] for r in mine), strict=False)]

    steps = slower("step_s")
    push = nbytes / statistics.median(slower("push_s")) / 1e9
    pull = nbytes / statistics.median(slower("pull_s")) / 1e9
    off = max(r["steps_off"] for r in mine)
    return Row(
        size=name,
        step_ms=statistics.median(steps) * 1e3,
        step_p90_ms=sorted(steps)[int(len(steps) * 0.9)] * 1e3,
        push_gbps=push,
        pull_gbps=pull,
        apply_and_pull_ms=statistics.median(slower("apply_and_pull_s")) * 1e3,
        steps_off=off,
        right=_is_right(off, plan.mode),
        push_of_grpc=push / limits.grpc_up,
        pull_of_grpc=pull / limits.grpc_down,
    )


def _is_right(off: float, mode: str) -> bool:
    """Sync must be exact to the bit; in async the order of unequal pushes rounds differently."""
    return off == 0.0 if mode == "sync" else off < 0.01
