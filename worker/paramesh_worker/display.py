"""What a person sees of a run: a live display on a terminal, plain lines elsewhere.

Both take the same three things: lines of the training processes, notes of the launcher, and views of the
progress (`progress.View`). A `note` is one sentence; `output` is lines as they came, "[worker 0] ..." first.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console, RenderableType
from rich.console import Group as RichGroup
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .progress import EpochView, Group, Summary, View

__all__ = [
    "STOPPING",
    "Display",
    "LiveDisplay",
    "PlainDisplay",
    "duration",
    "outliving_the_reader",
    "print_failure",
    "print_summary",
]

PLAIN_EVERY_S = 5.0
"""Between two plain progress lines: often enough to see life, rare enough for a log file."""

STOPPING = "stopping"
"""The phase in which progress has ended."""

SHOWN_WORKERS = 12
"""Rows of the worker table at most; more would push everything else off a terminal of 40 lines."""

_STATES = {"active": ("●", "green"), "between": ("◐", "yellow"), "idle": ("○", "bright_black")}


class Display(Protocol):
    """Shows a run while it goes on."""

    def output(self, stream: int, lines: list[bytes]) -> None:
        """Show lines of training processes."""

    def note(self, text: str, style: str = "") -> None:
        """Show a sentence of the launcher's."""

    def update(self, view: View) -> None:
        """Show progress."""

    def close(self) -> None:
        """Leave the terminal as it was."""


@contextlib.contextmanager
def outliving_the_reader() -> Iterator[None]:
    """Let the run go on when nobody reads its output any more (`| head`, a terminal that was closed): what is
    written from then on goes nowhere.
    """
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                if not _is_writable(descriptor):
                    os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _is_writable(descriptor: int) -> bool:
    """Whether somebody still reads: poll reports an error on the write end of a pipe without reader."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return not any(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0))


class PlainDisplay:
    """Lines, for pipes, files and CI."""

    def __init__(self, out: Console, err: Console):
        self._consoles = {1: out, 2: err}
        self._shown_at = time.monotonic()
        self._shown = ""
        """The last progress line, without its time: repeated ones say nothing."""
        self._phase = ""
        """The last phase that was said."""

    def output(self, stream: int, lines: list[bytes]) -> None:
        """Show lines of training processes, each stream on its own."""
        self._write(stream, "".join(line.decode("utf-8", "replace") + "\n" for line in lines))

    def note(self, text: str, style: str = "") -> None:
        """Show a sentence of the launcher's."""
        self._line(text)

    def update(self, view: View) -> None:
        """Show a new phase at once, progress every few seconds, neither twice."""
        if view.phase != self._phase:
            self._phase = view.phase
            self._line(f"{duration(view.elapsed_s)} {view.phase}")
        if not view.steps or view.phase == STOPPING:
            return
        now = time.monotonic()
        line = progress_line(view)
        if now - self._shown_at < PLAIN_EVERY_S or line == self._shown:
            return
        self._shown_at, self._shown = now, line
        self._line(f"{duration(view.elapsed_s)} {line}")

    def close(self) -> None:
        """Nothing to restore."""

    def _line(self, text: str) -> None:
        self._write(1, f"[ps-run] {text}\n")

    def _write(self, stream: int, text: str) -> None:
        with outliving_the_reader():
            self._consoles[stream].file.write(text)
            self._consoles[stream].file.flush()


class LiveDisplay:
    """A panel that stays at the bottom of the terminal; output scrolls above it."""

    def __init__(self, console: Console, title: str):
        self._console = console
        self._title = title
        # No refresh thread: all drawing happens on the event loop's thread, at each update.
        self._live = Live(
            render(View(), title), console=console, auto_refresh=False, transient=True, redirect_stdout=False,
            redirect_stderr=False, vertical_overflow="ellipsis",
        )  # fmt: skip
        self._live.start(refresh=True)

    def output(self, stream: int, lines: list[bytes]) -> None:
        """Show lines of training processes, in their own colours."""
        text = Text("\n").join(Text.from_ansi(line.decode("utf-8", "replace")) for line in lines)
        with outliving_the_reader():
            self._console.print(text, soft_wrap=True)

    def note(self, text: str, style: str = "dim") -> None:
        """Show a sentence of the launcher's."""
        with outliving_the_reader():
            self._console.print(Text(text, style=style), soft_wrap=True)

    def update(self, view: View) -> None:
        """Draw the panel anew."""
        with outliving_the_reader():
            self._live.update(render(view, self._title), refresh=True)

    def close(self) -> None:
        """Take the panel away."""
        with outliving_the_reader():
            self._live.stop()


# Text.


def duration(seconds: float) -> str:
    """Seconds as people read them: 0:42, 1:02:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def number(value: float) -> str:
    """A count or a rate in four or five digits: 12, 1,234, 56.7."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def size(count: float) -> str:
    """Bytes in the unit that fits: 3.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def figure(value: float) -> str:
    """A reported figure."""
    return f"{value:.4g}"


def current_epoch(view: View) -> EpochView | None:
    """The epoch that is being trained: the latest of the first loader."""
    first = [each for each in view.epochs if each.dataset == min(e.dataset for e in view.epochs)]
    return max(first, key=lambda each: each.epoch, default=None)


def _fraction(epoch: EpochView) -> float:
    return epoch.consumed / epoch.length if epoch.length else 0.0


def clock_text(group: Group) -> str:
    """How far the workers of an ssp or async group have drifted apart."""
    bound = f" of {group.staleness} allowed" if group.mode == "ssp" else ""
    return f"clock gap {group.gap}{bound} (widest {group.widest_gap})"


def progress_line(view: View) -> str:
    """A view as one line of key=value."""
    parts = [f"step={view.steps}", f"steps/s={view.steps_per_s:.1f}"]
    if epoch := current_epoch(view):
        parts.append(f"epoch={epoch.epoch} ({_fraction(epoch):.0%})")
    parts += [f"{name}={figure(value)}" for name, value in view.figures]
    active = sum(worker.activity == "active" for worker in view.workers)
    parts.append(f"workers={active}/{len(view.workers)} active")
    parts.append(f"servers={sum(s.live for s in view.servers)} ({size(sum(s.value_bytes for s in view.servers))})")
    parts += [clock_text(group).replace(" ", "=", 1) for group in view.groups if group.clocked]
    if view.restarts:
        parts.append(f"restarts={view.restarts}")
    if view.coordinator_away:
        parts.append("coordinator=away")
    return " ".join(parts)


# Rich.


def render(view: View, title: str) -> RenderableType:
    """Draw a view as a panel."""
    rows: list[RenderableType] = [_headline(view)]
    if epoch := current_epoch(view):
        rows.append(_epoch_bar(epoch))
    if view.figures:
        rows.append(_figures(view.figures))
    rows += [Text(f"{g.name}: {clock_text(g)}", style="cyan") for g in view.groups if g.clocked]
    if view.workers or view.servers:
        rows += [Text(), _nodes(view)]
    if view.coordinator_away and view.steps:
        rows.append(Text("the coordinator is away; training goes on without it", style="yellow"))
    mode = view.groups[0].mode if view.groups else ""
    return Panel(
        RichGroup(*rows),
        title=f"[bold]paramesh[/] · {title}",
        title_align="left",
        subtitle=" · ".join(part for part in (mode, duration(view.elapsed_s)) if part),
        subtitle_align="right",
        border_style="blue",
        padding=(0, 1),
    )


def _headline(view: View) -> Text:
    if not view.steps:
        return Text(view.phase or "starting", style="yellow")
    text = Text()
    for value, unit in (
        (number(view.steps), "steps"),
        (number(view.steps_per_s), "steps/s"),
        (number(view.samples_per_s), "samples/s"),
    ):
        text.append(value, style="bold").append(f" {unit}   ", style="dim")
    for count, what in (
        (view.restarts, "restart"),
        (view.evictions, "eviction"),
        (sum(group.skipped for group in view.groups), "skipped step"),
    ):
        if count:
            text.append(f"{count} {what}{'s' if count > 1 else ''}   ", style="yellow")
    if view.phase and view.phase != "training":
        text.append(view.phase, style="yellow")
    return text


def _epoch_bar(epoch: EpochView) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    grid.add_row(
        Text(f"epoch {epoch.epoch}"),
        ProgressBar(total=max(1, epoch.length), completed=epoch.consumed, style="bright_black"),
        Text(f"{_fraction(epoch):4.0%}  {epoch.consumed:,} of {epoch.length:,}", style="dim"),
    )
    return grid


def _figures(figures: tuple[tuple[str, float], ...]) -> Text:
    text = Text()
    for name, value in figures:
        text.append(f"{name} ", style="dim").append(f"{figure(value)}   ", style="bold green")
    return text


def _nodes(view: View) -> Table:
    grid = Table.grid(padding=(0, 4))
    grid.add_row(_workers(view), _servers(view))
    return grid


def _columns(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    # Widths for the usual values, so that columns stand still while the numbers change.
    table.add_column(first, min_width=11, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", min_width=10, no_wrap=True)
    return table


def _workers(view: View) -> Table:
    clocked = any(group.clocked for group in view.groups)
    table = _columns("worker", "samples", *(["clock"] if clocked else []))
    waited_for = {rank for group in view.groups for rank in group.waiting_for}
    for worker in view.workers[:SHOWN_WORKERS]:
        mark, style = _STATES.get(worker.activity, ("?", "red"))
        name = Text(f"{mark} ", style=style).append(f"{worker.rank} {worker.activity}", style="default")
        if worker.rank in waited_for and worker.activity == "active":
            name.append(" …", style="dim")
        table.add_row(name, f"{worker.samples:,}", *([f"{worker.clock:,}"] if clocked else []))
    if len(view.workers) > SHOWN_WORKERS:
        table.add_row(Text(f"and {len(view.workers) - SHOWN_WORKERS} more", style="dim"))
    return table


def _servers(view: View) -> Table:
    table = _columns("server", "values", "in", "out")
    for server in view.servers:
        mark, style = ("●", "green") if server.live else ("✗", "red")
        table.add_row(
            Text(f"{mark} ", style=style).append(server.name, style="default"),
            size(server.value_bytes),
            f"{size(server.in_per_s)}/s",
            f"{size(server.out_per_s)}/s",
        )
    return table


# The end.


def print_summary(console: Console, summary: Summary, *, ending: str, good: bool, logs: str) -> None:
    """Print what a run came to.

    Args:
        console: where.
        summary: the numbers.
        ending: one sentence: how it ended.
        good: whether that is success.
        logs: the folder of all logs.
    """
    rows = [("wall time", f"{summary.wall_s:.1f} s")]
    if summary.steps:
        rate = f" ({number(summary.steps_per_s)} per second)" if summary.steps_per_s else ""
        skipped = f", {summary.skipped} of them skipped" if summary.skipped else ""
        whose = " by the fastest worker" if summary.clocked else ""
        rows.append(("steps", f"{number(summary.steps)}{whose}{rate}{skipped}"))
    if summary.clocked:
        rows.append(("widest clock gap", number(summary.widest_gap)))
    if summary.samples:
        rows.append(("samples", number(summary.samples)))
    if summary.epochs:
        done = sum(1 for each in summary.epochs if each.length and each.consumed >= each.length)
        rows.append(("epochs", f"{done} complete"))
    rows += [(name, figure(value)) for name, value in summary.figures]
    rows.append(("servers hold", size(summary.server_bytes)))
    rows.append(("restarts", str(summary.restarts)))
    if summary.evictions:
        rows.append(("evictions", str(summary.evictions)))
    rows.append(("logs", logs))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(Text(ending, style="bold green" if good else "bold red"))
    console.print(table)


def print_failure(console: Console, message: str, lines: list[str], log: str) -> None:
    """Print which process failed, with its last lines.

    Args:
        console: where.
        message: one sentence that names the process.
        lines: its last lines.
        log: the file of all its lines.
    """
    console.print(Text(message, style="bold red"), soft_wrap=True)
    if lines:
        console.print(Text(f"its last {len(lines)} lines (all of them: {log}):", style="dim"), soft_wrap=True)
    for line in lines:
        console.print(Text("  | ", style="red").append_text(Text.from_ansi(line)), soft_wrap=True)
