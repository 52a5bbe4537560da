"""How psctl shows what it has begun, until it is over."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import RenderableType
from rich.live import Live

from paramesh_coordinator import changing
from paramesh_coordinator.display import draw_drain, draw_moves, make_console
from paramesh_coordinator.inspection import Coordinators

__all__ = ["Moves"]


@dataclass(frozen=True)
class Moves:
    """Moves and drains of one cluster.

    Attributes:
        coordinators: whom to ask.
        job: the cluster's name.
        wait: show them until they are over; or only as they begin.
        as_json: print one JSON document at the end, and nothing before.
    """

    coordinators: Coordinators
    job: str
    wait: bool
    as_json: bool

    async def follow(self, start: Callable[[], Awaitable[Any]]) -> None:
        """Ask for moves and show them until they are over; exit status 1 if one was cancelled.

        Raises:
            ParameshError: UNREACHABLE, or the coordinator's refusal.
        """
        started = await start()
        rows: list[dict[str, Any]] = started if isinstance(started, list) else [started]
        numbers = [row["move"] for row in rows]
        if self.wait and rows:
            with _progress(self.as_json) as show:
                async for rows in changing.follow_moves(self.coordinators, self.job, numbers):
                    show(draw_moves(rows))
        if self.as_json:
            typer.echo(json.dumps(rows, indent=2))
        elif not self.wait or not rows:
            make_console().print(draw_moves(rows))
        if any(row["stage"] == "cancelled" for row in rows):
            raise typer.Exit(1)

    async def drain(self, server: str) -> None:
        """Begin a drain and show it until nothing more goes; exit status 1 if something stays.

        Raises:
            ParameshError: UNREACHABLE, or the coordinator's refusal.
        """
        row: dict[str, Any] = await changing.drain(self.coordinators, self.job, server)
        if self.wait:
            with _progress(self.as_json) as show:
                async for row in changing.follow_drain(self.coordinators, self.job, server):
                    show(draw_drain(row))
        if self.as_json:
            typer.echo(json.dumps(row, indent=2))
        elif not self.wait:
            make_console().print(draw_drain(row))
        if row["stuck"]:
            raise typer.Exit(1)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[RenderableType], None]]:
    """Something that shows the newest state: redrawn on a terminal, only the last one in a pipe."""
    console, last = make_console(), list[RenderableType]()
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not quiet else None

    def show(page: RenderableType) -> None:
        last[:] = [page]
        if live is not None:
            live.update(page, refresh=True)

    with live or contextlib.nullcontext():
        yield show
    if live is None and not quiet and last:
        console.print(last[0])
