"""How psctl draws: rich tables of what `inspection` read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = [
    "draw_drain", "draw_event", "draw_moves", "draw_partitions", "draw_status", "draw_tables", "draw_workers",
    "make_console",
]  # fmt: skip

WIDE = 160
"""Columns when the output is not a terminal: a pipe must not wrap or cut cells."""

SHOWN_CLOSED = 10
"""Of the clients that are over, the newest; `--json` has all."""

_COLOURS = {
    "live": "green", "online": "green", "active": "green", "between": "yellow", "idle": "yellow", "left": "dim",
    "degraded": "yellow", "dead": "bold red", "offline": "bold red", "evicted": "red", "unknown": "yellow",
    "draining": "yellow", "stalled": "red", "copying": "green", "wanted": "yellow", "done": "dim", "cancelled": "red",
}  # fmt: skip


def make_console(width: int | None = None) -> Console:
    """A console that takes names for names: a `[/]` in one is no markup."""
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    return console if width or console.is_terminal else make_console(WIDE)


def _state(word: str | None) -> Text:
    return Text(word or "-", style=_COLOURS.get(word or "", ""))


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return table


def draw_status(status: dict[str, Any]) -> RenderableType:
    """The one-page overview."""
    head = Text.assemble(
        ("job ", "dim"), status["job"], ("  coordinator ", "dim"), status["coordinator"],
        ("  term ", "dim"), str(status["term"]), ("  map ", "dim"), str(status["map_version"]),
        ("  generation ", "dim"), str(status["generation"]), ("  up ", "dim"), f"{status['uptime_s']:.0f} s",
    )  # fmt: skip
    parts: list[RenderableType] = [head, Text(), _servers(status["servers"])]
    if status["partitions"]:
        parts.append(Text.assemble(("partitions ", "bold"), _states(status["partitions"])))
    parts += [Text(), *_ledger(status["ledger"])]
    if status["tables"]:
        parts += [Text(), draw_tables(status["tables"])]
    parts += [Text(), draw_workers(status["workers"])]
    if status["pending"]:
        parts += [Text(), Text("pending", style="bold"), *(Text(f"  {line}") for line in status["pending"])]
    return Group(*parts)


def _servers(servers: Sequence[dict[str, Any]]) -> RenderableType:
    if not servers:
        return Text("no server has registered yet; start ps-server --coordinator ADDRESS", style="yellow")
    table = _table(
        "servers", "name", "state", "address", ">bytes", ">primaries", ">replicas", ">in", ">out", ">silence", "reason"
    )
    for row in servers:
        table.add_row(
            row["name"], _state(row["state"]), row["address"], _bytes(row["value_bytes"]),
            str(row["online"]), str(row["partitions"]),
            _bytes(row["bytes_in"]), _bytes(row["bytes_out"]),
            f"{row['silence_s']:.1f} s" if row["state"] in ("live", "draining", "stalled") else "-",
            row["reason"],
        )  # fmt: skip
    return table


def _ledger(ledger: dict[str, Any]) -> list[RenderableType]:
    if "error" in ledger:
        return [Text.assemble(("ledger ", "bold"), (ledger["error"], "yellow"))]
    head = Text.assemble(("ledger ", "bold"), ledger["phase"], f"  {ledger['members']} members", style="")
    if ledger["evictions"]:
        head.append(f"  {ledger['evictions']} evicted", style="red")
    for name, value in sorted(ledger["figures"].items()):
        head.append(f"  {name} {value:.6g}" if isinstance(value, float) else f"  {name} {value}")
    parts: list[RenderableType] = [head]
    if ledger["groups"]:
        table = _table("", "group", "mode", ">step", ">clocks", ">widest gap", ">skipped", "waits for ranks")
        for row in ledger["groups"]:
            table.add_row(row["name"], row["mode"], *_progress(row), ", ".join(map(str, row["waiting_for"])) or "-")
        parts.append(table)
    for row in ledger["epochs"]:
        name = f" of {row['dataset']}" if row["dataset"] else ""
        parts.append(Text(f"epoch {row['epoch']}{name}: {row['consumed']} of {row['length']} samples"))
    return parts


def _progress(row: dict[str, Any]) -> tuple[str, str, str, str]:
    if row["mode"] in ("ssp", "async"):
        bound = f" (bound {row['staleness']})" if row["mode"] == "ssp" else ""
        return "-", f"{row['min_clock']}..{row['max_clock']}", f"{row['widest_gap']}{bound}", "-"
    return str(row["step"]), "-", "-", str(row["skipped_steps"])


def _states(counts: dict[str, int]) -> Text:
    return Text(", ").join(Text(f"{n} {word}", style=_COLOURS.get(word, "")) for word, n in counts.items())


def draw_partitions(partitions: Sequence[dict[str, Any]]) -> RenderableType:
    """One line per partition."""
    if not partitions:
        return Text("no partitions yet; the ledger is placed when enough servers have registered", style="yellow")
    table = _table("partitions", ">id", "table", ">index", "state", ">epoch", "primary", "in sync", "catching up")
    for row in partitions:
        table.add_row(
            str(row["partition"]), row["table"], str(row["index"]), _state(row["state"]), str(row["epoch"]),
            row["primary"]["name"], _refs(row["in_sync"]), _refs(row["learners"]),
        )  # fmt: skip
    return table


def _refs(refs: Sequence[dict[str, str]]) -> str:
    return ", ".join(ref["name"] for ref in refs) or "-"


def draw_moves(moves: Sequence[dict[str, Any]]) -> RenderableType:
    """One line per move."""
    if not moves:
        return Text("nothing to move", style="dim")
    table = _table("moves", ">move", ">partition", "from", "to", ">bytes", "stage", "why")
    for row in moves:
        stage, size = _state(row["stage"]), "only the lead" if row["swap"] else _bytes(row["bytes"])
        if row["reason"]:
            stage.append(f": {row['reason']}")
        number = str(row["move"]) if row["move"] else "-"
        table.add_row(number, str(row["partition"]), row["source"], row["target"], size, stage, row["why"])
    return table


def draw_drain(row: dict[str, Any]) -> RenderableType:
    """How far a drain is, or that it is over."""
    held = len(row["held"])
    if not row["draining"]:
        return Text(f"{row['server']} is not draining; it holds {held} partitions")
    if not held:
        return Text(f"{row['server']} is empty; it can be stopped", style="green")
    parts = [Text(f"{row['server']} holds {held} partitions, {len(row['moving'])} of them on their way")]
    if row["stuck"]:
        why = "no other server can take them: too few, or without room"
        parts.append(Text(f"{len(row['stuck'])} stay ({_few(row['stuck'])}): {why}", style="yellow"))
    if row["only_here"]:
        parts.append(Text(f"no other server has {_few(row['only_here'])}: lost if it ends now", style="bold red"))
    return Group(*parts)


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")


def draw_tables(tables: Sequence[dict[str, Any]]) -> RenderableType:
    """One line per table; with schema columns where they were read."""
    if not tables:
        return Text("no tables yet; the first worker's first step creates them", style="yellow")
    described = "optimizer" in tables[0]
    extra = (">tensors", ">parameters", ">bytes", "dtype", "optimizer") if described else ()
    table = _table("tables", "name", ">id", "group", ">partitions", "state", "on servers", *extra)
    for row in tables:
        states = _states(row["states"])
        on = ", ".join(f"{name}: {count}" for name, count in sorted(row["servers"].items()))
        cells = [row["name"], str(row["table_id"]), row["group"], str(row["partitions"]), states, on]
        if described:
            cells += [
                str(row["tensors"]), f"{row['parameters']:,}", _bytes(row["value_bytes"]), ", ".join(row["dtypes"]),
                row["optimizer"],
            ]  # fmt: skip
        table.add_row(*cells)
    return table


def draw_workers(workers: Sequence[dict[str, Any]]) -> RenderableType:
    """Members and clients; of those that are over, the newest few."""
    if not workers:
        return Text("no worker has registered yet; start ps-worker --coordinator ADDRESS SCRIPT", style="yellow")
    closed = [row for row in workers if row["state"] in ("left", "evicted")]
    hidden = {row["client_id"] for row in sorted(closed, key=lambda row: row["client_id"])[:-SHOWN_CLOSED]}
    table = _table("workers", ">rank", "slot", ">client", "role", "state", "activity", ">clock", ">samples", "reason")
    for row in workers:
        if row["client_id"] in hidden:
            continue
        rank, clock, samples = ("-" if row[k] is None else str(row[k]) for k in ("rank", "clock", "samples"))
        table.add_row(
            rank, row["slot"], str(row["client_id"]), row["role"], _state(row["state"]), _state(row["activity"]),
            clock, samples, row["reason"],
        )  # fmt: skip
    if not hidden:
        return table
    return Group(table, Text(f"and {len(hidden)} more that are over; --json lists them", style="dim"))


def draw_event(event: dict[str, Any]) -> Text:
    """One audit line."""
    when = datetime.fromtimestamp(event["wall_time_ms"] / 1000).strftime("%Y-%m-%d %H:%M:%S")
    said = "  ".join(f"{key}={json.dumps(value)}" for key, value in event["evidence"].items())
    bad = any(word in event["kind"] for word in ("dead", "evicted", "offline"))
    return Text.assemble(
        (f"{event['id']:>6} ", "dim"), (f"{when} ", "dim"), (f"{event['kind']} ", "bold red" if bad else "bold"),
        f"{event['subject']}  ", (said, "dim"),
    )  # fmt: skip
