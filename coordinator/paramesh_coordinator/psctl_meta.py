"""`psctl meta`: the coordinator's own state, while no coordinator runs."""

from __future__ import annotations

from typing import Annotated

import typer
from paramesh.command_help import PlainCommand, PlainGroup
from paramesh.errors import ParameshError

from paramesh_coordinator import psctl_rebuild
from paramesh_coordinator.transfer import move_state, open_state

__all__ = ["meta"]

meta = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode=None, cls=PlainGroup,
    help="The coordinator's own state, while no coordinator runs on it.",
)  # fmt: skip


@meta.callback()
def describe() -> None:
    """The coordinator's own state, while no coordinator runs on it."""


@meta.command(cls=PlainCommand)
def move(
    source: Annotated[
        str, typer.Option("--from", help="What --state was until now.", metavar="FILE|etcd://...", show_default=False)
    ],
    target: Annotated[
        str, typer.Option("--to", help="What --state shall be; empty.", metavar="FILE|etcd://...", show_default=False)
    ],
) -> None:
    """Move the state between a SQLite file and etcd, either way, and compare it row by row.

    Stop all coordinators first; servers and workers may go on. Afterwards the old place refuses
    to be started on, and coordinators are started with --state at the new one.
    """
    try:
        opened = open_state(source)
        try:
            into = open_state(target)
            try:
                moved = move_state(opened, into, (source, target))
            finally:
                into.close()
        finally:
            opened.close()
    except ParameshError as error:
        typer.echo(f"psctl: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"moved rows={moved.rows} sha256={moved.digest} to={target}; start ps-coordinator with --state {target}")


psctl_rebuild.add_to(meta)
