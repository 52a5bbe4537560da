"""Results as tables for people."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def show(benchmark: str, result: dict[str, Any]) -> None:
    """Print one benchmark's result."""
    # In a pipe or a file rich would assume 80 columns and cut the figures.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    if benchmark == "alone":
        _show_alone(console, result)
        return
    if benchmark == "failover":
        from benchmarks import failover

        failover.show(console, result)
        return
    if benchmark == "flood":
        from benchmarks import flood

        flood.show(console, result)
        return
    if benchmark == "moves":
        _show_moves(console, result)
        return
    if benchmark == "grow":
        _show_plain(console, "A third server is added", result["rows"])
        return
    _show_limits(console, result["limits"])
    if benchmark == "dense":
        _show_dense(console, result)


def _show_moves(console: Console, result: dict[str, Any]) -> None:
    title = f"Moves of {result['partitions']} partitions of {result['partition_mib']:g} MiB, longest write (ms)"
    table = Table(title=title)
    heads = "load,replicas,moves,cancelled,p50,p99,max,quiet p50,quiet p99,move p50,failed,writes,values"
    for head in heads.split(","):
        table.add_column(head, justify="right")
    for row in result["rows"]:
        keys = ["load", "replicas", "moves", "cancelled", "write_p50_ms", "write_p99_ms", "write_max_ms",
                "quiet_p50_ms", "quiet_p99_ms", "move_p50_ms", "failed", "writes"]  # fmt: skip
        table.add_row(*(str(row[key]) for key in keys), "right" if row["right"] else "[red]WRONG[/red]")
    console.print(table)


def _show_plain(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def _show_limits(console: Console, limits: dict[str, float]) -> None:
    table = Table(title="Limits of this machine, in this run (GB/s)")
    for name in limits:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(*(f"{value:.2f}" for value in limits.values()))
    console.print(table)


def _show_dense(console: Console, result: dict[str, Any]) -> None:
    if "one_replica" in result:
        _show_rows(console, {**result, "replicas": 1, "rows": result["one_replica"]})
    if "plaintext" in result:
        _show_rows(console, {**result, "tls": False, "rows": result["plaintext"]})
    _show_rows(console, result)


def _show_rows(console: Console, result: dict[str, Any]) -> None:
    title = f"Dense {result['mode']} steps, {result['workers']} workers, {result['servers']} servers"
    table = Table(title=f"{title}, replicas: {result['replicas']}{', mutual TLS' if result['tls'] else ''}")
    heads = [
        "size",
        "step ms",
        "p90",
        "push GB/s",
        "/ gRPC",
        "pull GB/s",
        "/ gRPC",
        "apply+pull ms",
        "/ 1 replica",
        "/ plaintext",
        "parameters",
    ]
    for head in heads:
        table.add_column(head, justify="right")
    for row in result["rows"]:
        verdict = "right" if row["right"] else f"[red]WRONG by {row['steps_off']:.2g} steps[/red]"
        table.add_row(
            row["size"], f"{row['step_ms']:.1f}", f"{row['step_p90_ms']:.1f}",
            f"{row['push_gbps']:.2f}", f"{row['push_of_grpc']:.0%}",
            f"{row['pull_gbps']:.2f}", f"{row['pull_of_grpc']:.0%}",
            f"{row['apply_and_pull_ms']:.1f}", f"{row['of_one_replica']:.2f}", f"{row['of_plaintext']:.2f}", verdict,
        )  # fmt: skip
    console.print(table)


def _show_alone(console: Console, result: dict[str, Any]) -> None:
    low, high = result["ratio_quartiles"]
    console.print(
        f"alone / plain torch: step-time ratio [bold]{result['ratio']:.4f}[/bold] "
        f"(quartiles {low:.4f} .. {high:.4f} of {result['pairs']} pairs; "
        f"{result['plain_step_ms']:.3f} ms plain, {result['paramesh_step_ms']:.3f} ms Paramesh)"
    )
