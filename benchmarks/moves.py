"""How long a move holds up writes, as workers see it, and whether it costs an update.

    python -m benchmarks moves --moves 100 --json

Real processes: three servers, two workers that push to every partition without a pause to
speak of (async), or train in step (sync). Partitions move at random from server to server,
one after the other, as with `psctl move`. A move's figure is the longest that a write to its
partition took until it was acknowledged (sync: the longest step), of those that touch the time
from asking for it until it was done. Beside it: the same over 0.3 s just before, without a
move; on a busy machine that is most of it.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.failover import percentile

SERVERS = 3
WORKERS = 2
DEADLINE = 120.0
"""Seconds for workers to start, or to end."""


@dataclass(frozen=True)
class Row:
    """One load with one number of replicas. Times in milliseconds."""

    load: str
    replicas: int
    moves: int
    cancelled: int
    write_p50_ms: float
    """Of each move's longest write."""
    write_p99_ms: float
    write_max_ms: float
    quiet_p50_ms: float
    """The same without a move, just before each."""
    quiet_p99_ms: float
    move_p50_ms: float
    """From asking until done: copying, joining, changing hands."""
    failed: int
    """Steps or pushes that raised: a worker that ended in an error."""
    writes: int
    right: bool
    """Every acknowledged write is in the values exactly once."""


def run(moves: int, loads: Sequence[str], replicas: Sequence[int], partitions: int, mib: float) -> dict[str, Any]:
    """Measure each load with each number of replicas."""
    elements = max(64, int(mib * (1 << 20)) // 4 // 64 * 64)
    rows = [_measure(load, count, moves, partitions, elements) for load in loads for count in replicas]
    return {"servers": SERVERS, "workers": WORKERS, "partitions": partitions, "partition_mib": elements * 4 / (1 << 20),
            "rows": [asdict(row) for row in rows]}  # fmt: skip


def _measure(load: str, replicas: int, moves: int, partitions: int, elements: int) -> Row:
    from tests.cluster.processes import ProcessCluster

    with ProcessCluster(servers=SERVERS, replicas=replicas, start_workers=WORKERS) as cluster:
        folder, stop = cluster.directory, cluster.directory / "stop"
        if load == "async":
            _make_table(cluster.coordinator_address, partitions, elements)
        plan = json.dumps({"load": load, "partitions": partitions, "elements": elements})
        outs = [folder / f"moves-{index}.jsonl" for index in range(WORKERS)]
        workers = []
        for index, out in enumerate(outs):
            command = [sys.executable, "-m", "benchmarks.moves_worker", plan, str(out), str(stop)]
            workers.append(cluster.start_command(f"worker-{index}", command, PARAMESH_RANK=str(index)))
        cluster.wait_until(lambda: all(count_lines(out) > 50 for out in outs), DEADLINE, "workers to push")
        done = asyncio.run(_move_about(cluster.coordinator_address, moves))
        stop.touch()
        cluster.wait_until(lambda: all(w.exit_code is not None for w in workers), DEADLINE, "workers to end")
        failed = sum(worker.exit_code != 0 for worker in workers)
        lines = [[json.loads(line) for line in out.read_text().splitlines()] for out in outs]
        right = not failed and _is_right(load, lines, cluster.coordinator_address)
    return _row(load, replicas, done, lines, failed, right)


def _make_table(address: str, partitions: int, elements: int) -> None:
    import paramesh
    import torch

    from benchmarks.moves_worker import TABLE

    with paramesh.connect(address) as tool:
        first = {f"t{i}": torch.zeros(elements) for i in range(partitions)}
        tool.create_table(TABLE, first, "SGD", {"lr": 1.0}, partition_bytes=elements * 4)


def count_lines(path: Path) -> int:
    """Of what a worker has written so far."""
    return path.read_text().count("\n") if path.exists() else 0


@dataclass(frozen=True)
class _Move:
    partition: int
    begin: float
    end: float
    done: bool


async def _move_about(address: str, moves: int) -> list[_Move]:
    """Random moves, one after the other; with two copies also of followers."""
    from paramesh_coordinator import changing, inspection

    dice, made = random.Random(20261120), []
    for _ in range(moves):
        await asyncio.sleep(0.3)  # a quiet time to compare with
        rows = await inspection.read_partitions(inspection.Coordinators((address,)), "default")
        names = {
            row["name"]
            for row in (await inspection.read_status(inspection.Coordinators((address,)), "default"))["servers"]
        }
        row = dice.choice(rows)
        held = [ref["name"] for ref in row["in_sync"]]
        target = dice.choice(sorted(names - set(held)))
        begin = time.monotonic()
        move = await changing.start_move(
            inspection.Coordinators((address,)), "default", row["partition"], dice.choice(held), target
        )
        async for found in changing.follow_moves(inspection.Coordinators((address,)), "default", [move["move"]]):
            stage = found[0]["stage"]
        made.append(_Move(row["partition"], begin, time.monotonic(), stage == "done"))
    return made


def _is_right(load: str, lines: list[list[dict[str, Any]]], address: str) -> bool:
    """Values against what was acknowledged, exactly."""
    ends = [line for mine in lines for line in mine if "pushes" in line]
    if load == "sync":
        return all(line["right"] for line in ends) and len({line["pushes"] for line in ends}) == 1
    import paramesh

    from benchmarks.moves_worker import TABLE

    with paramesh.connect(address) as tool:
        values = tool.pull(TABLE)
        partitions = sorted({line["p"] for line in ends})
        wanted = [sum(line["pushes"] for line in ends if line["p"] == p) for p in partitions]
        return all(bool((values[f"t{i}"] == float(count)).all()) for i, count in enumerate(wanted))


def _writes(load: str, lines: list[list[dict[str, Any]]], partition: int) -> list[tuple[float, float]]:
    """(begin, acknowledged) of every worker's writes to a partition. The ledger is in every step."""
    everywhere = load == "sync" or partition == 0
    return [
        (line["began"], line["t"])
        for mine in lines
        for line in mine
        if "t" in line and (everywhere or line["p"] == partition)
    ]


def _longest(writes: list[tuple[float, float]], begin: float, end: float) -> float:
    return max((b - a for a, b in writes if a < end and b > begin), default=0.0)


def _row(
    load: str, replicas: int, moves: list[_Move], lines: list[list[dict[str, Any]]], failed: int, right: bool
) -> Row:
    writes = {p: _writes(load, lines, p) for p in {move.partition for move in moves}}
    during = [_longest(writes[m.partition], m.begin, m.end) * 1e3 for m in moves]
    before = [_longest(writes[m.partition], m.begin - 0.3, m.begin) * 1e3 for m in moves]
    took = [(m.end - m.begin) * 1e3 for m in moves]
    return Row(
        load, replicas, len(moves), sum(not m.done for m in moves),
        round(statistics.median(during), 1), round(percentile(during, 0.99), 1), round(max(during), 1),
        round(statistics.median(before), 1), round(percentile(before, 0.99), 1), round(statistics.median(took), 1),
        failed, sum("t" in line for mine in lines for line in mine), right,
    )  # fmt: skip
