"""`psctl`: look at a running cluster, and move its partitions.

psctl status | tables | partitions | workers | events | moves, each with --json and --watch;
move | rebalance | drain | undrain, which wait until it is done; and promote.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer
from paramesh.command_help import PlainCommand, PlainGroup, version_option
from paramesh.errors import ParameshError
from paramesh.security import VARIABLES, Security
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from paramesh_coordinator import changing, psctl_checkpoints
from paramesh_coordinator.display import (
    draw_drain,
    draw_event,
    draw_moves,
    draw_partitions,
    draw_status,
    draw_tables,
    draw_workers,
    make_console,
)
from paramesh_coordinator.inspection import (
    promote,
    read_events,
    read_partitions,
    read_status,
    read_tables,
)
from paramesh_coordinator.psctl_meta import meta
from paramesh_coordinator.psctl_security import certs, tokens
from paramesh_coordinator.psctl_target import Target, file_option, target_of

__all__ = ["main"]

REFRESH_SECONDS = 1.0
"""Two beats: silence and figures do not change faster."""

EXAMPLES = """\
examples:
  psctl status
      the cluster of PARAMESH_COORDINATOR, else of 127.0.0.1:7070, on one page
  psctl --coordinator host-a:7070 workers --watch
      who trains, looked at every second until Ctrl-C
  psctl events --json --limit 1000
      the coordinator's last decisions, as a list of JSON objects
  psctl drain server-1
      server-1 gives its partitions to others while training goes on; then it can be stopped

exit status: 0 when it was answered, and done; 1 if the coordinator did not answer or refused, or a move was
cancelled; 2 for a mistake in the options."""

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode=None, cls=PlainGroup,
    epilog=EXAMPLES,
)  # fmt: skip

COORDINATOR_HELP = "Where the coordinator is; several with commas between."
JOB_HELP = "Name of the cluster."
CLUSTER, OUTPUT = "cluster", "output"
"""The groups of --help."""

Coordinator = Annotated[str | None, typer.Option(help=COORDINATOR_HELP, metavar="HOST:PORT", rich_help_panel=CLUSTER)]
Job = Annotated[str | None, typer.Option(help=JOB_HELP, metavar="JOB", rich_help_panel=CLUSTER)]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document; with --watch one line per look.", rich_help_panel=OUTPUT),
]
EventsAsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON list of events; with --watch one line per event.", rich_help_panel=OUTPUT
    ),
]
Watch = Annotated[bool, typer.Option("--watch", help="Look again every second until Ctrl-C.", rich_help_panel=OUTPUT)]

Wait = Annotated[
    bool,
    typer.Option("--wait/--no-wait", help="Wait until it is done and show how far it is; or only ask for it."),
]

Read = Callable[[], Awaitable[Any]]


@app.callback()
def describe(
    context: typer.Context,
    coordinator: Annotated[
        str,
        typer.Option(
            envvar="PARAMESH_COORDINATOR", help=COORDINATOR_HELP, metavar="HOST:PORT", rich_help_panel=CLUSTER
        ),
    ] = "127.0.0.1:7070",
    job: Annotated[
        str, typer.Option(envvar="PARAMESH_JOB", help=JOB_HELP, metavar="JOB", rich_help_panel=CLUSTER)
    ] = "default",
    tls_cert: Annotated[str, file_option("PARAMESH_TLS_CERT", "PEM file of the certificate that says who asks.")] = "",
    tls_key: Annotated[str, file_option("PARAMESH_TLS_KEY", "PEM file of its key, mode 0600.")] = "",
    tls_ca: Annotated[
        str, file_option("PARAMESH_TLS_CA", "PEM file of the CA that the cluster's certificates are of.")
    ] = "",
    token_file: Annotated[
        str, file_option("PARAMESH_TOKEN_FILE", "File with a token, mode 0600, where the cluster takes tokens.")
    ] = "",
    version: Annotated[bool, version_option("psctl")] = False,
) -> None:
    """Look at a running Paramesh cluster, and move its partitions.

    Only move, rebalance, drain, undrain and promote change anything. --coordinator and --job may stand before or
    after the command.
    """
    token = os.environ.get(VARIABLES["token"], "").strip()
    security = Security(tls_cert, tls_key, tls_ca, token, token_file)
    context.obj = Target(coordinator, job, security)


@app.command(cls=PlainCommand)
def status(
    context: typer.Context,
    coordinator: Coordinator = None,
    job: Job = None,
    as_json: AsJson = False,
    watch: Watch = False,
) -> None:
    """Everything on one page: servers, steps, tables, workers, pending operations."""
    target = target_of(context, coordinator, job)
    _show(lambda: target.read(read_status), draw_status, as_json, watch)


@app.command(cls=PlainCommand)
def tables(
    context: typer.Context,
    coordinator: Coordinator = None,
    job: Job = None,
    as_json: AsJson = False,
    watch: Watch = False,
) -> None:
    """Tables: schema, size, optimizer, partitions, and on which servers they are."""
    target = target_of(context, coordinator, job)
    _show(lambda: target.read(read_tables), draw_tables, as_json, watch)


@app.command(cls=PlainCommand)
def partitions(
    context: typer.Context,
    coordinator: Coordinator = None,
    job: Job = None,
    as_json: AsJson = False,
    watch: Watch = False,
) -> None:
    """Partitions: state, primary, who is in sync and who catches up; 0 is the ledger."""
    target = target_of(context, coordinator, job)
    _show(lambda: target.read(read_partitions), draw_partitions, as_json, watch)


@app.command("promote", cls=PlainCommand)
def promote_replica(
    context: typer.Context,
    partition: Annotated[int, typer.Argument(min=0, max=2**32 - 1, help="Number of an offline partition.")],
    server: Annotated[str, typer.Argument(help="Name of a live server that is catching up with it.")],
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Required: updates that only lost servers had are gone for good.")
    ] = False,
    coordinator: Coordinator = None,
    job: Job = None,
    as_json: AsJson = False,
) -> None:
    """Give an offline partition to an incomplete copy, when every complete one has ended.

    Refused while a complete copy may still come back: the message names it. `psctl partitions`
    lists who is catching up. Rather load a checkpoint, if there is one.
    """
    if not accept_loss:
        typer.echo(
            "psctl: promote: an incomplete copy lacks updates that were acknowledged; they are lost if it is "
            "promoted. Say --accept-loss if that is meant",
            err=True,
        )
        raise typer.Exit(2)
    target = target_of(context, coordinator, job)
    body = _once(lambda: target.read(promote, partition, server), lambda row: draw_partitions([row]), as_json)
    _run(body)


@app.command("moves", cls=PlainCommand)
def show_moves(
    context: typer.Context,
    coordinator: Coordinator = None,
    job: Job = None,
    as_json: AsJson = False,
    watch: Watch = False,
) -> None:
    """Moves: under way, and the last that were over."""
    target = target_of(context, coordinator, job)
    _show(lambda: target.read(changing.list_moves), draw_moves, as_json, watch)


@app.command("move", cls=PlainCommand)
def move_partition(
    context: typer.Context,
    partition: Annotated[int, typer.Argument(min=0, max=2**32 - 1, help="Its number; 0 is the ledger.")],
    source: Annotated[str, typer.Argument(metavar="FROM", help="Name of the server that gives a copy away.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="Name of the server that gets it.")],
    coordinator: Coordinator = None,
    job: Job = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Move one copy of a partition to another server, while training goes on.

    If FROM leads the partition, TO leads it afterwards. If TO has a complete copy already, only
    the lead changes hands. `psctl partitions` shows who holds what.
    """
    where = target_of(context, coordinator, job)
    moves = where.moves(wait, as_json)
    _run(moves.follow(lambda: where.read(changing.start_move, partition, source, target)))


@app.command(cls=PlainCommand)
def rebalance(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be moved.")] = False,
    coordinator: Coordinator = None,
    job: Job = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Even out bytes over servers: those of leading copies first, then all.

    It happens by itself when servers come or go (unless ps-coordinator --no-rebalance). Nothing is moved if no
    server is more than 20 % above or below the mean.
    """
    where = target_of(context, coordinator, job)
    _run(where.moves(wait and not dry_run, as_json).follow(lambda: where.read(changing.rebalance, dry_run)))


@app.command(cls=PlainCommand)
def drain(
    context: typer.Context,
    server: Annotated[str, typer.Argument(help="Name of a live server.")],
    coordinator: Coordinator = None,
    job: Job = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Have a server give its partitions to others and get no new ones, while training goes on.

    It stays alive; stop it with SIGTERM when it is empty, or take it back with undrain. Exit status 1 if
    something stays there because no other server can take it.
    """
    where = target_of(context, coordinator, job)
    _run(where.moves(wait, as_json).drain(server))


@app.command(cls=PlainCommand)
def undrain(
    context: typer.Context,
    server: Annotated[str, typer.Argument(help="Name of a draining server.")],
    coordinator: Coordinator = None,
    job: Job = None,
    as_json: AsJson = False,
) -> None:
    """End the draining of a server: it keeps what it has and gets its share again."""
    where = target_of(context, coordinator, job)
    _run(_once(lambda: where.read(changing.drain, server, True), draw_drain, as_json))


@app.command(cls=PlainCommand)
def workers(
    context: typer.Context,
    coordinator: Coordinator = None,
    job: Job = None,
    as_json: AsJson = False,
    watch: Watch = False,
) -> None:
    """Workers: rank, slot, activity, and why those that are gone went."""
    target = target_of(context, coordinator, job)

    async def read() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await target.read(read_status))["workers"]
        return found

    _show(read, draw_workers, as_json, watch)


@app.command(cls=PlainCommand)
def events(
    context: typer.Context,
    coordinator: Coordinator = None,
    job: Job = None,
    as_json: EventsAsJson = False,
    watch: Watch = False,
    limit: Annotated[
        int,
        typer.Option(min=1, max=1000, help="How many of the newest to begin with, 1..1000.", rich_help_panel=OUTPUT),
    ] = 50,
) -> None:
    """What the coordinator decided and on what evidence, newest last; --watch follows."""
    _run(_follow(target_of(context, coordinator, job), as_json, watch, limit))


def _run(body: Any) -> None:
    """Run to the end; a refusal is a message and status 1, Ctrl-C and a closed pipe are no errors."""
    try:
        asyncio.run(body)
    except ParameshError as error:
        typer.echo(f"psctl: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    except BrokenPipeError:
        # Python would complain once more when it flushes stdout at exit.
        sys.stderr.close()
        raise typer.Exit(0) from None


def _show(read: Read, draw: Callable[[Any], RenderableType], as_json: bool, watch: bool) -> None:
    _run(_watch(read, draw, as_json) if watch else _once(read, draw, as_json))


async def _once(read: Read, draw: Callable[[Any], RenderableType], as_json: bool) -> None:
    found = await read()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        make_console().print(draw(found))


async def _watch(read: Read, draw: Callable[[Any], RenderableType], as_json: bool) -> None:
    """Look again and again; the first look must succeed, later failures are shown and outlived."""
    console = make_console()
    found = await read()
    # Redraws in place on a terminal; a pipe gets one report after the other.
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    with live or contextlib.nullcontext():
        while True:
            if as_json:
                typer.echo(json.dumps(found))
            else:
                page = found if isinstance(found, Text) else draw(found)
                live.update(page, refresh=True) if live else console.print(page)
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                found = await read()
            except ParameshError as error:
                found = {"error": str(error)} if as_json else Text(str(error), style="red")


async def _follow(target: Target, as_json: bool, watch: bool, limit: int) -> None:
    console = make_console()
    found = await target.read(read_events, 0, limit)
    last = 0
    if as_json and not watch:
        return typer.echo(json.dumps(found, indent=2))
    while True:
        for event in found:
            last = event["id"]
            if as_json:
                typer.echo(json.dumps(event))
            else:
                console.print(draw_event(event), soft_wrap=True)
        if not watch:
            return
        await asyncio.sleep(REFRESH_SECONDS)
        try:
            found = await target.read(read_events, last, 1000)
        except ParameshError as error:
            typer.echo(f"psctl: {error}", err=True)
            found = []


psctl_checkpoints.register(app, target_of, _run)


app.add_typer(meta, name="meta")
app.add_typer(certs, name="certs")
app.add_typer(tokens, name="tokens")


def main() -> None:
    """Entry point of `psctl`."""
    app(prog_name="psctl")


if __name__ == "__main__":
    main()
