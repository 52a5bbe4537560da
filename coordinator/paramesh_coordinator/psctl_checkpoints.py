"""`psctl checkpoint | checkpoints | restore | export`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Protocol

import typer
from paramesh.channel import header
from paramesh.command_help import PlainCommand
from paramesh.errors import ParameshError, refuse
from paramesh.v1 import checkpoint_pb2 as cp
from paramesh.v1.checkpoint_pb2_grpc import CheckpointsStub
from rich.table import Table

from paramesh_coordinator.display import make_console
from paramesh_coordinator.inspection import REACH_SECONDS, Coordinators, ask_coordinator

__all__ = ["register"]

LOOK_S = 0.2
"""Between two looks at how far it is."""

AWAY_S = 60.0
"""How long a coordinator that does not answer is waited for while something is under way."""

CLUSTER, OUTPUT = "cluster", "output"

Coordinator = Annotated[
    str | None,
    typer.Option(
        help="Where the coordinator is; several with commas between.", metavar="HOST:PORT", rich_help_panel=CLUSTER
    ),
]
Job = Annotated[str | None, typer.Option(help="Name of the cluster.", metavar="JOB", rich_help_panel=CLUSTER)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=OUTPUT)]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done, and say how far it is.")]


class Level(StrEnum):
    """What kind of cut."""

    AUTO = "auto"
    STEP = "step"
    PARTITION = "partition"
    ALIGNED = "aligned"


_LEVELS = {
    Level.AUTO: cp.CHECKPOINT_LEVEL_UNSPECIFIED,
    Level.STEP: cp.CHECKPOINT_LEVEL_STEP,
    Level.PARTITION: cp.CHECKPOINT_LEVEL_PARTITION,
    Level.ALIGNED: cp.CHECKPOINT_LEVEL_ALIGNED,
}
_LEVEL_NAMES = {number: level.value for level, number in _LEVELS.items() if level is not Level.AUTO}


class Asking(Protocol):
    """Whom to ask."""

    def read(self, read: Callable[..., Awaitable[Any]], *more: Any) -> Awaitable[Any]:
        """Ask with a function of (coordinators, job, ...)."""


# ---------------------------------------------------------------------- asking


async def _create(coordinators: Coordinators, job: str, level: Level, name: str) -> str:
    request = cp.CreateCheckpointRequest(request=header(job), level=_LEVELS[level], name=name)
    answer, _ = await ask_coordinator(coordinators, CheckpointsStub, "CreateCheckpoint", request)
    return str(answer.name)


async def _listed(coordinators: Coordinators, job: str, verify: bool = False) -> cp.ListCheckpointsResponse:
    request = cp.ListCheckpointsRequest(request=header(job), verify=verify)
    seconds = 3600.0 if verify else REACH_SECONDS
    answer, _ = await ask_coordinator(coordinators, CheckpointsStub, "ListCheckpoints", request, seconds)
    assert isinstance(answer, cp.ListCheckpointsResponse)
    return answer


async def _restore(coordinators: Coordinators, job: str, name: str) -> str:
    request = cp.RestoreCheckpointRequest(request=header(job), name=name)
    answer, _ = await ask_coordinator(coordinators, CheckpointsStub, "RestoreCheckpoint", request, 3600.0)
    return str(answer.name)


async def _follow(target: Asking, kind: str, name: str) -> dict[str, Any]:
    """Look until it has ended; tell each change on stderr.

    Raises:
        ParameshError: why it failed; NOT_FOUND, if the coordinator was restarted meanwhile.
    """
    told, deadline = "", asyncio.get_running_loop().time() + AWAY_S
    while True:
        try:
            task = (await target.read(_listed)).task
        except ParameshError as error:
            if error.reason not in ("UNREACHABLE", "DEADLINE") or asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(1.0)
            continue
        deadline = asyncio.get_running_loop().time() + AWAY_S
        if (task.kind, task.name) != (kind, name):
            raise refuse("NOT_FOUND", f"{kind} {name} is not under way any more: was the coordinator restarted?")
        line = f"{kind} {name}: {task.phase}" + (f" ({task.done} of {task.total} partitions)" if task.total else "")
        if line != told and not task.ended:
            typer.echo(line, err=True)
            told = line
        if task.ended:
            if task.HasField("error"):
                raise refuse(task.error.reason, f"{kind} {name}: {task.error.message}")
            return {"kind": kind, "name": name, "phase": task.phase, "partitions": task.total}
        await asyncio.sleep(LOOK_S)


def _row(entry: cp.CheckpointEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "complete": not entry.problem,
        "problem": entry.problem,
        "level": _LEVEL_NAMES.get(entry.level, ""),
        "number": entry.number,
        "created_at": datetime.fromtimestamp(entry.created_at_ms / 1000, UTC).isoformat() if entry.number else "",
        "bytes": entry.bytes,
        "generation": entry.generation,
        "partitions": entry.partitions,
        "steps": dict(entry.steps),
        "warnings": list(entry.warnings),
    }


def _draw(root: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"checkpoints under {root}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("name", "level", "steps", "partitions", "bytes", "created", "state"):
        table.add_column(column, justify="right" if column in ("partitions", "bytes") else "left")
    for row in rows:
        steps = ", ".join(f"{name}@{step}" for name, step in sorted(row["steps"].items()))
        state = row["problem"] or "; ".join(["complete", *row["warnings"]])
        created = row["created_at"][:19]
        table.add_row(row["name"], row["level"], steps, str(row["partitions"]), str(row["bytes"]), created, state)
    return table


# ---------------------------------------------------------------------- commands


def register(
    app: typer.Typer,
    target: Callable[[typer.Context, str | None, str | None], Asking],
    run: Callable[[Any], None],
) -> None:
    """Add the commands to psctl.

    Args:
        app: psctl's.
        target: whom flags before and after the command name.
        run: runs a coroutine; a refusal is a message and status 1.
    """

    @app.command(cls=PlainCommand)
    def checkpoint(
        context: typer.Context,
        level: Annotated[
            Level,
            typer.Option(
                help="step: exactly one step, for sync training. partition: each part by itself, without a pause. "
                "auto: step where there are steps. aligned: of async and ssp, paused for a moment."
            ),
        ] = Level.AUTO,
        name: Annotated[str, typer.Option(help="Its name; default: the next number.", metavar="NAME")] = "",
        wait: Wait = True,
        coordinator: Coordinator = None,
        job: Job = None,
        as_json: AsJson = False,
    ) -> None:
        """Write a checkpoint of the whole job under the coordinator's --checkpoint-dir, while it trains."""
        asked = target(context, coordinator, job)

        async def work() -> None:
            made = await asked.read(_create, level, name)
            done = await _follow(asked, "checkpoint", made) if wait else {"kind": "checkpoint", "name": made}
            typer.echo(json.dumps(done) if as_json else f"checkpoint {made}" + ("" if wait else " begun"))

        run(work())

    @app.command(cls=PlainCommand)
    def checkpoints(
        context: typer.Context,
        verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its digest.")] = False,
        coordinator: Coordinator = None,
        job: Job = None,
        as_json: AsJson = False,
    ) -> None:
        """Checkpoints: level, step, size, and what is wrong with those that cannot be loaded.

        Exit status 1 if --verify finds one that is damaged.
        """
        asked = target(context, coordinator, job)

        async def work() -> bool:
            answer = await asked.read(_listed, verify)
            rows = [_row(entry) for entry in answer.checkpoints]
            if as_json:
                typer.echo(json.dumps({"root": answer.root, "checkpoints": rows}, indent=2))
            else:
                make_console().print(_draw(answer.root, rows))
            return verify and any(row["problem"] for row in rows)

        damaged: list[bool] = []

        async def noted() -> None:
            damaged.append(await work())

        run(noted())
        if any(damaged):
            raise typer.Exit(1)

    @app.command(cls=PlainCommand)
    def restore(
        context: typer.Context,
        name: Annotated[
            str, typer.Argument(help="As `psctl checkpoints` lists it; `latest`: the newest that is whole.")
        ],
        wait: Wait = True,
        coordinator: Coordinator = None,
        job: Job = None,
        as_json: AsJson = False,
    ) -> None:
        """Take the running job back to a checkpoint: what was trained since is given up.

        Every file is verified first. Then workers of before are refused (OLD_GENERATION): under ps-worker and
        ps-run they are started anew and go on at the checkpoint's step; start others yourself.
        """
        asked = target(context, coordinator, job)

        async def work() -> None:
            found = await asked.read(_restore, name)
            done = await _follow(asked, "restore", found) if wait else {"kind": "restore", "name": found}
            typer.echo(json.dumps(done) if as_json else f"restored {found}" if wait else f"restore {found} begun")

        run(work())

    @app.command("export", cls=PlainCommand)
    def export_file(
        source: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or URL of a checkpoint, DIR/NAME.")],
        path: Annotated[str, typer.Argument(metavar="FILE", help="The safetensors file to write.")],
        group: Annotated[str, typer.Option(help="Only this group, if two models share names.", metavar="GROUP")] = "",
        as_json: AsJson = False,
    ) -> None:
        """Write a checkpoint's parameters and buffers as one plain safetensors file.

        It loads with safetensors.torch.load_file into the plain model. Needs no cluster.
        """
        from paramesh.exporting import export_checkpoint

        try:
            made = export_checkpoint(source, path, group=group)
        except ParameshError as error:
            typer.echo(f"psctl: {error}", err=True)
            raise typer.Exit(1) from None
        if as_json:
            typer.echo(json.dumps({name: {"dtype": d, "shape": s} for name, (d, s) in made.items()}, indent=2))
        else:
            typer.echo(f"{path}: {len(made)} tensors")
        sys.stdout.flush()
