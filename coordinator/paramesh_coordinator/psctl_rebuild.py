"""`psctl meta rebuild`: a lost state, made anew from what servers hold."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated, Any

import typer
from paramesh.command_help import PlainCommand
from paramesh.errors import ParameshError, refuse
from paramesh.security import Security

from paramesh_coordinator.rebuilding import Choices, Rebuilt, rebuild
from paramesh_coordinator.rows import PartitionRow, TableRow, encode
from paramesh_coordinator.testimony import check_nobody_leads, gather
from paramesh_coordinator.transfer import open_state, write_state

__all__ = ["add_to"]

DRY, WRITTEN = "dry-run", "written"


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="rebuild", cls=PlainCommand)(_rebuild)


def _rebuild(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Option("--to", help="What --state shall be; empty.", metavar="FILE|etcd://...", show_default=False),
    ],
    server: Annotated[
        list[str],
        typer.Option(
            help="A server of the cluster, by either of its addresses; it names the others. May be repeated.",
            metavar="HOST:PORT",
            show_default=False,
        ),
    ],
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="A server that does not answer and has certainly ended, no later than the coordinator did. "
            "May be repeated.",
            metavar="NAME",
        ),
    ] = None,
    accept_loss: Annotated[
        bool,
        typer.Option("--accept-loss", help="Go on with incomplete copies where no other is left: updates may be lost."),
    ] = False,
    job: Annotated[str | None, typer.Option(help="Name of the cluster.", metavar="JOB")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Write it. Without this it is only shown what is found.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make a lost coordinator's state anew from what the servers hold.

    For when --state is lost and servers and workers still run: they go on where they were, with
    nothing lost and nothing restarted. End every coordinator first. What is found is shown; with
    --yes it is written, and ps-coordinator is started with --state at it, at its old address.
    """
    choices = Choices(frozenset(without or ()), accept_loss)
    try:
        found = asyncio.run(_find(server, job or context.obj.job, choices, context.obj.security))
        if yes and not found.problems:
            _write(found, target)
    except ParameshError as error:
        typer.echo(f"psctl: {error}", err=True)
        raise typer.Exit(1) from None
    stage = WRITTEN if yes and not found.problems else DRY
    typer.echo(json.dumps(_document(found, stage), indent=2) if as_json else _page(found, stage, target))
    if found.problems:
        for problem in found.problems:
            typer.echo(f"psctl: {problem}", err=True)
        raise typer.Exit(1)


async def _find(addresses: list[str], job: str, choices: Choices, security: Security) -> Rebuilt:
    testimony, coordinators = await gather(addresses, job, security)
    await check_nobody_leads(coordinators, job, security)
    found = rebuild(testimony, choices, round(time.time() * 1000))
    if found.base is not None and found.base.job != job:
        raise refuse("WRONG_CLUSTER", f"the servers follow job {found.base.job!r}, not {job!r}")
    return found


def _write(found: Rebuilt, target: str) -> None:
    store = open_state(target)
    try:
        rows = sorted((key, encode(row)) for key, row in found.rows.items())
        write_state(store, rows, found.term, target)
    finally:
        store.close()


def _document(found: Rebuilt, stage: str) -> dict[str, Any]:
    base = found.base
    return {
        "stage": stage,
        "job": base.job if base else "",
        "cluster": base.cluster if base else "",
        "generation": base.generation if base else 0,
        "map_version": base.version if base else 0,
        "answered": found.answered,
        "silent": sorted({node.ref.node for node in base.nodes} - set(found.answered)) if base else [],
        "partitions": _count(found, PartitionRow),
        "tables": _count(found, TableRow),
        "clients": len(found.clients),
        "promoted": found.promoted,
        "incomplete": found.lossy,
        "offline": found.offline,
        "dropped_tables": found.dropped,
        "term": found.term,
        "problems": found.problems,
    }


def _count(found: Rebuilt, cls: type[PartitionRow] | type[TableRow]) -> int:
    return sum(isinstance(row, cls) for row in found.rows.values())


def _page(found: Rebuilt, stage: str, target: str) -> str:
    told = _document(found, stage)
    lines = []
    if found.base is not None:
        lines.append(
            f"job {told['job']}  cluster {told['cluster']}  generation {told['generation']}  map {told['map_version']}"
        )
        lines.append(f"servers that answer: {', '.join(told['answered']) or 'none of its map'}")
        if told["silent"]:
            lines.append(f"servers that do not: {', '.join(told['silent'])}")
    if found.problems:
        return "\n".join([*lines, "it cannot be made anew:"])
    lines.append(f"{told['tables']} tables, {told['partitions']} partitions, {told['clients']} clients")
    for key, text in (
        ("promoted", "get another primary"),
        ("incomplete", "go on with an incomplete copy"),
        ("offline", "stay offline"),
    ):
        if told[key]:
            lines.append(f"partitions that {text}: {', '.join(map(str, told[key]))}")
    if found.dropped:
        lines.append(f"tables that are left out: {', '.join(found.dropped)}")
    if stage == WRITTEN:
        lines.append(f"written to {target}: start ps-coordinator with --state {target}, at its old address")
    else:
        lines.append(f"nothing is written: say --yes to write it to {target}")
    return "\n".join(lines)
