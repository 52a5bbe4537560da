"""How long a failover takes, as workers see it, and whether it costs an update.

    python -m benchmarks failover --runs 20 --json

Real processes: three servers, two replicas, six tables, two workers that push to every
partition (async, counted to the unit) or train in step (sync). A primary is killed
(SIGKILL), or stopped (SIGSTOP), again and again; it comes back, and the next one goes when
every partition is in sync. Measured is the time from the signal until each partition that
it led has acknowledged a push under its new primary, to every worker; the worst partition
of a run counts. The failure timeout is the default, 2 s.

Beside it, if `redis-server` and `etcd` are installed, the same kill on them: a Redis Cluster
of three primaries and three replicas with a node timeout of 2 s, and three etcd members with
their default election timeout of 1 s.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

SERVERS = 3
REPLICAS = 2
RECOVERY_S = 60.0
"""Above it a run is a failure, not a figure."""


@dataclass(frozen=True)
class Row:
    """One kind of fault under one load. Seconds."""

    fault: str
    load: str
    runs: int
    p50: float
    p99: float
    worst: float
    lost: int
    """Acknowledged pushes that are not in the tables; sync: 0 if every bit is that of a calm run."""
    duplicated: int
    right: bool


def run(runs: int, faults: list[str], loads: list[str], peers: bool) -> dict[str, Any]:
    """Measure each fault under each load, then the peers."""
    from benchmarks import failover_peers

    rows = [asdict(_measure(fault, load, runs)) for load in loads for fault in faults]
    result: dict[str, Any] = {"servers": SERVERS, "replicas": REPLICAS, "failure_timeout_s": 2.0, "rows": rows}
    if peers:
        result["peers"] = failover_peers.measure(max(3, runs // 4))
    return result


def _measure(fault: str, load: str, runs: int) -> Row:
    """One cluster for all kills; one for each stop, since a second failover of a partition for silence
    within 30 s waits for proof of death, which is not what is measured.
    """
    each = runs if fault == "SIGKILL" else 1
    seconds, lost, duplicated = [], 0, 0
    for _ in range(0, runs, each):
        took, gone, doubled = (_async if load == "async" else _sync)(fault, each)
        seconds += took
        lost, duplicated = lost + gone, duplicated + doubled
        print(f"{fault} {load}: {[round(s, 3) for s in took]}", file=sys.stderr, flush=True)
    return _row(fault, load, seconds, lost, duplicated)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def _row(fault: str, load: str, seconds: list[float], lost: int, duplicated: int) -> Row:
    return Row(
        fault, load, len(seconds), round(statistics.median(seconds), 3), round(percentile(seconds, 0.99), 3),
        round(max(seconds), 3), lost, duplicated, right=not lost and not duplicated,
    )  # fmt: skip


def _inflict(cluster: Any, fault: str, victim: str) -> None:
    (cluster.kill if fault == "SIGKILL" else cluster.pause)(victim)


def _mend(cluster: Any, fault: str, victim: str) -> None:
    """Let the victim come back, and wait until everything is in sync."""
    from tests.cluster import replication

    (cluster.restart if fault == "SIGKILL" else cluster.resume)(victim)
    replication.wait_until_in_sync(cluster, REPLICAS, RECOVERY_S)


def _async(fault: str, runs: int) -> tuple[list[float], int, int]:
    """Seconds of each run, pushes lost (or read too old), and pushes doubled."""
    from tests.cluster import replication
    from tests.cluster.processes import ProcessCluster

    seconds = []
    with ProcessCluster(servers=SERVERS, replicas=REPLICAS) as cluster:
        pushers = replication.start_pushers(cluster)
        for number in range(runs):
            before = replication.wait_until_in_sync(cluster, REPLICAS, RECOVERY_S)
            victim = _victim(before, number)
            led = replication.led_by(before, victim)
            began = time.monotonic()
            _inflict(cluster, fault, victim)
            back = cluster.wait_until(
                lambda before=before, led=led, began=began: replication.recoveries(pushers, before, led, began),
                RECOVERY_S,
                f"partitions of {victim}",
            )
            seconds.append(max(event["t"] for event in back.values()) - began)
            _mend(cluster, fault, victim)
        replication.stop_pushers(cluster, pushers)
        found = replication.account(cluster, pushers)
    return seconds, found.lost + found.below, found.duplicated


def _victim(before: Any, number: int) -> str:
    """A server that leads tables: each in turn."""
    leaders = sorted({row.primary for p, row in before.items() if p})
    return leaders[number % len(leaders)]


def _sync(fault: str, runs: int) -> tuple[list[float], int, int]:
    """Steps of two workers; a fault's figure is the end of the first step that began after it.

    Returns:
        Seconds of each run, workers that ended in other bits than a calm run or were restarted, 0.
    """
    from tests.cluster import inspection, replication
    from tests.cluster.processes import ProcessCluster

    seconds = []
    with ProcessCluster(servers=SERVERS, replicas=REPLICAS, start_workers=2) as cluster:
        workers = cluster.start_workers(2, replication.TRAIN, epochs=100_000, seconds=0.01, stop_at="stop")
        cluster.wait_until(lambda: all(len(w.events("step")) > 5 for w in workers), RECOVERY_S, "training")
        for number in range(runs):
            before = replication.wait_until_in_sync(cluster, REPLICAS, RECOVERY_S)
            victim = _victim(before, number)
            began = time.monotonic()
            _inflict(cluster, fault, victim)
            after = cluster.wait_until(lambda began=began: _first_steps(workers, began), RECOVERY_S, "a step")
            seconds.append(max(after) - began)
            _mend(cluster, fault, victim)
        for worker in workers:
            worker.open_gate("stop")
        cluster.wait_until(lambda: all(w.events("final") for w in workers), RECOVERY_S, "the workers to end")
        ends = [w.last("final") for w in workers]
        restarts = sum(len(w.events("hello")) - 1 for w in workers)
        kinds = [e.kind for e in inspection.events(cluster.coordinator_address)]
        evicted = sum("evicted" in kind for kind in kinds)
        if evicted or restarts:  # then steps were made without a worker, and bits differ for that
            print(f"workers evicted={evicted} restarted={restarts}", file=sys.stderr, flush=True)
    return seconds, _differs_from_a_calm_run(ends) + restarts, 0


def _first_steps(workers: Any, since: float) -> list[float]:
    """When each worker finished the first step that it began after `since`; empty until all have."""
    ends = []
    for worker in workers:
        begun = next((e["step"] for e in worker.events("begin") if e["t"] > since), None)
        ended = next((e["t"] for e in worker.events("step") if e["step"] == begun), None)
        if ended is None:
            return []
        ends.append(ended)
    return ends


def _differs_from_a_calm_run(ends: list[dict[str, Any]]) -> int:
    """How many workers ended in other bits than a run of as many steps without faults."""
    from tests.cluster import replication
    from tests.cluster.processes import ProcessCluster

    steps = max(end["steps"] for end in ends)
    # Processes too: torch sums a product in another order when it has other threads.
    with ProcessCluster(servers=1, start_workers=2) as cluster:
        workers = cluster.start_workers(2, replication.TRAIN, epochs=100_000, stop_after=steps)
        cluster.wait_until(lambda: all(w.events("final") for w in workers), 900, "the calm run")
        calm = workers[0].last("final")["digest"]
    return sum(end["digest"] != calm for end in ends)


def show(console: Any, result: dict[str, Any]) -> None:
    """Print it for people."""
    from rich.table import Table

    table = Table(title=f"Failover, {result['servers']} servers, {result['replicas']} replicas (seconds)")
    heads = ["fault", "load", "runs", "p50", "p99", "max", "lost", "duplicated"]
    for head in heads:
        table.add_column(head, justify="right")
    for row in result["rows"]:
        figures = (row["p50"], row["p99"], row["worst"])
        table.add_row(
            row["fault"], row["load"], str(row["runs"]), *(f"{v:.3f}" for v in figures), str(row["lost"]),
            str(row["duplicated"]),
        )  # fmt: skip
    for peer in result.get("peers", []):
        if "missing" in peer:
            table.add_row(peer["name"], peer["missing"], *[""] * 6)
            continue
        figures = (peer["p50"], peer["p99"], peer["worst"])
        table.add_row("SIGKILL", peer["name"], str(peer["runs"]), *(f"{v:.3f}" for v in figures), str(peer["lost"]), "")
    console.print(table)
