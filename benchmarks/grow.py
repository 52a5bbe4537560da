"""A server added to those that train: how soon it has its share, and what training notices of it.

    python -m benchmarks grow --mib 256 --copy-rates 0,64 --json

Real processes: two servers, two workers that train in step over a model of `--mib` MiB with
momentum, so twice that can move. A third server is started, and nothing else is said. Measured
from its registration: the time until the bytes that each server leads are within 20 % of their
mean; the longest step until then, and the longest time in which no worker had a frame of a push
or a pull, each beside the longest of ten seconds before. The first is what a busier machine
costs too (the third server starts on the same cores); the second is a pause of training.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.moves import count_lines
from benchmarks.pulse import longest_still
from tests.cluster import replication
from tests.cluster.processes import ProcessCluster

WORKERS = 2
SERVERS = 2
EVEN = 0.2
"""Of the mean: how far a server's share may be off."""
DEADLINE = 180.0
CALM = 10.0
"""Seconds of training to compare with."""


@dataclass(frozen=True)
class Row:
    """One number of replicas."""

    replicas: int
    copy_mib_s: int
    """Of `ps-server --copy-rate`; 0: as fast as it goes."""
    model_mib: float
    partitions: int
    even_after_s: float
    """From the third server's registration."""
    moved: int
    """Copies of partitions that it has by then."""
    calm_step_p50_ms: float
    calm_step_max_ms: float
    step_p50_ms: float
    """While it gets its share."""
    step_max_ms: float
    longer_by_ms: float
    """The longest step meanwhile beyond the longest of before: what training notices."""
    calm_still_ms: float
    """The longest time of before in which no worker sent or got a frame."""
    still_ms: float
    """The same meanwhile: the longest pause."""
    failed: int
    """Workers that ended in an error."""
    right: bool
    """Every worker's every element counts the steps."""


def run(mib: float, partitions: int, replicas: list[int], rates: list[int]) -> dict[str, Any]:
    """Measure with each number of replicas at each rate, in MiB/s."""
    rows = [asdict(_measure(mib, partitions, count, rate)) for count in replicas for rate in rates]
    return {"servers": SERVERS, "workers": WORKERS, "rows": rows}


def _measure(mib: float, partitions: int, replicas: int, rate: int) -> Row:
    elements = int(mib * (1 << 20) / partitions) // 4 // 64 * 64
    flags = ["--copy-rate", str(rate << 20)]
    with ProcessCluster(servers=SERVERS, replicas=replicas, start_workers=WORKERS, server_flags=flags) as cluster:
        stop = cluster.directory / "stop"
        plan = json.dumps({"load": "sync", "partitions": partitions, "elements": elements, "momentum": 1.0})
        outs = [cluster.directory / f"grow-{index}.jsonl" for index in range(WORKERS)]
        workers = []
        for index, out in enumerate(outs):
            command = [sys.executable, "-m", "benchmarks.moves_worker", plan, str(out), str(stop)]
            workers.append(cluster.start_command(f"worker-{index}", command, PARAMESH_RANK=str(index)))
        cluster.wait_until(lambda: all(count_lines(out) > 5 for out in outs), DEADLINE, "steps")
        replication.wait_until_in_sync(cluster, replicas)
        calm = time.monotonic()
        cluster.wait_until(lambda: time.monotonic() > calm + CALM, CALM + 5, "a time to compare with")
        started, came, even, moved = _add(cluster)
        stop.touch()
        cluster.wait_until(lambda: all(w.exit_code is not None for w in workers), DEADLINE, "workers to end")
        lines = [[json.loads(line) for line in out.read_text().splitlines()] for out in outs]
        failed = sum(worker.exit_code != 0 for worker in workers)
        if failed:
            with contextlib.redirect_stdout(sys.stderr):  # stdout may be JSON
                cluster.print_logs()
    ends = [line for mine in lines for line in mine if "pushes" in line]
    before, meanwhile = _steps(lines, calm, started), _steps(lines, came, even)
    stills = [line["stills"] for line in ends]
    calm_still, still = longest_still(stills, calm, started), longest_still(stills, came, even)
    return Row(
        replicas, rate, mib, partitions, round(even - came, 2), moved, *before, *meanwhile,
        round(meanwhile[1] - before[1], 1), round(calm_still * 1e3, 1), round(still * 1e3, 1),
        failed, not failed and all(line["right"] for line in ends),
    )  # fmt: skip


def _add(cluster: ProcessCluster) -> tuple[float, float, float, int]:
    """Start one more server: when it was started, registered, had its share; how many copies that is."""
    name = f"server-{SERVERS}"
    started = time.monotonic()
    cluster._launch(name, cluster._server_command(SERVERS))
    cluster.wait_until(lambda: name in cluster.live_servers(), 60, "the third server to register")
    came = time.monotonic()
    cluster.wait_until(lambda: _is_even(cluster), DEADLINE, "even bytes")
    even = time.monotonic()
    return started, came, even, sum(name in (r.primary, *r.isr) for r in replication.rows(cluster).values())


def _is_even(cluster: ProcessCluster) -> bool:
    """Whether what each server leads is within 20 % of the mean; all partitions are of one size."""
    led = dict.fromkeys(cluster.live_servers(), 0)
    for row in replication.rows(cluster).values():
        if row.id and row.primary in led:
            led[row.primary] += 1
    mean = sum(led.values()) / (SERVERS + 1)
    return len(led) == SERVERS + 1 and all(abs(count - mean) <= EVEN * mean for count in led.values())


def _steps(lines: list[list[dict[str, Any]]], begin: float, end: float) -> tuple[float, float]:
    """(median, longest) in milliseconds of the steps that touch the time."""
    took = []
    for mine in lines:
        times = [line["t"] for line in mine if "t" in line]
        took += [b - a for a, b in itertools.pairwise(times) if a < end and b > begin]
    return round(statistics.median(took) * 1e3, 1), round(max(took) * 1e3, 1)
