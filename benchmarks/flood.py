"""Training beside a flood: what 1,000 idle connections and 64 hostile clients cost it.

    python -m benchmarks flood --seconds 30

Real processes: a server, two workers that train in step, and, in every second window, a process of
hostile clients (`benchmarks.hostile`) at the server's data port. Windows of calm and of flood take
turns in one run; the median of the pairs' ratios counts. The hostile process runs at the lowest
priority: what is measured is what the server lets itself be held up by, not who gets a processor.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ELEMENTS = 1 << 20
"""Parameters of the model: 4 MiB, steps of some ten milliseconds."""

GROWTH_CAP = 512 << 20
"""Bytes that the flood may add to the server's memory: 1,000 connections, 512 requests that are being read."""

TARGET = 0.7
"""Share of the calm throughput that must be left."""


@dataclass(frozen=True)
class Row:
    """One pair of windows."""

    calm_steps: float
    """Per second."""
    flood_steps: float
    """Per second, beside the flood."""
    ratio: float
    hostile_calls: float
    """Per second."""
    cut: float
    """Connections of hostile clients that ended, per second."""
    idle: int
    """Idle connections at the end."""
    server_cpu_calm: float
    """Processors that the server used."""
    server_cpu_flood: float
    right: bool


def run(seconds: float, pairs: int, clients: int, idle: int) -> dict[str, Any]:
    """Measure so many pairs of windows of so many seconds."""
    from tests.cluster import inspection
    from tests.cluster.processes import ProcessCluster

    with ProcessCluster(servers=1, start_workers=2) as cluster:
        out = cluster.directory / "steps"
        out.mkdir()
        for index in range(2):
            command = [sys.executable, "-m", "benchmarks.flood_worker", str(ELEMENTS), str(out / f"{index}")]
            cluster.start_command(f"worker-{index}", command)
        cluster.wait_until(lambda: _steps(out) > 20, 120, "training to begin")
        address = inspection.primary_address(cluster.coordinator_address, 1)
        before = _resident(cluster)
        rows, most = [], before
        for _ in range(pairs):
            row, resident = _pair(cluster, out, address, seconds, clients, idle)
            rows.append(row)
            most = max(most, resident)
            print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
        alive = all(process.exit_code is None for process in cluster.processes.values() if process.name != "hostile")
    ratio = statistics.median(row.ratio for row in rows)
    grown = most - before
    right = alive and ratio >= TARGET and grown < GROWTH_CAP
    return {
        "clients": clients, "idle": idle, "seconds": seconds, "ratio": round(ratio, 3), "target": TARGET,
        "grown_mib": grown >> 20, "cap_mib": GROWTH_CAP >> 20, "alive": alive,
        "rows": [asdict(row) | {"right": right and row.right} for row in rows],
    }  # fmt: skip


def _pair(cluster: Any, out: Path, address: str, seconds: float, clients: int, idle: int) -> tuple[Row, int]:
    calm, calm_cpu = _window(cluster, out, seconds)
    command = [sys.executable, "-m", "benchmarks.hostile", address, "--clients", str(clients), "--idle", str(idle)]
    hostile = cluster.start_command("hostile", [*command, "--seconds", str(seconds + 2)])
    at = hostile.log_path.stat().st_size if hostile.log_path.exists() else 0
    cluster.wait_until(lambda: b"ready" in hostile.log_path.read_bytes()[at:], 120, "the flood to begin")
    flood, flood_cpu = _window(cluster, out, seconds)
    resident = _resident(cluster)
    hostile.wait(120)
    done = json.loads(hostile.tail(1))
    calls = sum(
        count for kind, count in done.items() if kind not in ("idle", "idle at the end", "connections that ended")
    )
    row = Row(
        calm_steps=round(calm, 1), flood_steps=round(flood, 1), ratio=round(flood / calm, 3),
        hostile_calls=round(calls / (seconds + 2), 1), cut=round(done["connections that ended"] / (seconds + 2), 1),
        idle=done["idle at the end"], server_cpu_calm=round(calm_cpu, 2), server_cpu_flood=round(flood_cpu, 2),
        right=flood > 0 and done["idle"] == idle,
    )  # fmt: skip
    return row, resident


def _window(cluster: Any, out: Path, seconds: float) -> tuple[float, float]:
    """Steps per second and processors of the server, over so long."""
    steps, cpu, began = _steps(out), _cpu(cluster), time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    return (_steps(out) - steps) / took, (_cpu(cluster) - cpu) / took


def _steps(out: Path) -> int:
    """Steps that both workers have made."""
    counts = [int(path.read_text()) for path in out.iterdir() if not path.suffix]
    return min(counts) if len(counts) == 2 else 0


def _cpu(cluster: Any) -> float:
    """Seconds of processor time that the server has used."""
    stat = Path(f"/proc/{cluster.processes['server-0'].pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def _resident(cluster: Any) -> int:
    return int(Path(f"/proc/{cluster.processes['server-0'].pid}/statm").read_text().split()[1]) * 4096


def show(console: Any, result: dict[str, Any]) -> None:
    """Print it for people."""
    from rich.table import Table

    title = f"Training beside {result['idle']} idle connections and {result['clients']} hostile clients"
    table = Table(title=title)
    heads = ["calm steps/s", "flood steps/s", "ratio", "hostile calls/s", "cut/s", "server CPUs", "in the flood"]
    for head in heads:
        table.add_column(head, justify="right")
    for row in result["rows"]:
        keys = ("calm_steps", "flood_steps", "ratio", "hostile_calls", "cut", "server_cpu_calm", "server_cpu_flood")
        table.add_row(*(str(row[key]) for key in keys))
    console.print(table)
    console.print(
        f"median ratio {result['ratio']} (target {result['target']}); the server grew by {result['grown_mib']} MiB "
        f"(cap {result['cap_mib']}); alive: {result['alive']}"
    )
