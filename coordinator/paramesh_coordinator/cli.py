"""`ps-coordinator`: the coordinator as a process."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from paramesh.errors import ConfigError

from paramesh_coordinator.config import CoordinatorConfig

__all__ = ["main"]

log = logging.getLogger(__name__)

DEFAULT = CoordinatorConfig()

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


class LogLevel(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command()
def run(
    bind: Annotated[
        str, typer.Option(help="host:port to listen on; port 0 picks a free one and logs it.")
    ] = DEFAULT.bind,
    state: Annotated[
        Path | None, typer.Option(help="SQLite file to keep the cluster in. Restart with the same file.")
    ] = None,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Keep the cluster in memory instead: a restart loses it.")
    ] = False,
    job: Annotated[str, typer.Option(help="Name of the cluster; others are refused.")] = DEFAULT.job,
    start_workers: Annotated[int, typer.Option(help="Workers that step 0 waits for.")] = DEFAULT.start_workers,
    min_workers: Annotated[
        int, typer.Option(help="Active workers below which later steps pause.")
    ] = DEFAULT.min_workers,
    min_servers: Annotated[
        int, typer.Option(help="Servers that must register before anything is placed, for evenness.")
    ] = DEFAULT.min_servers,
    replicas: Annotated[
        int, typer.Option(help="Copies of each partition, on different servers; 1 loses what a lost server held.")
    ] = DEFAULT.replicas,
    heartbeat_interval: Annotated[
        float, typer.Option(help="Seconds between beats; at most a quarter of --failure-timeout.")
    ] = DEFAULT.heartbeat_interval,
    failure_timeout: Annotated[
        float, typer.Option(help="Seconds of silence after which a server or host is dead.")
    ] = DEFAULT.failure_timeout,
    client_timeout: Annotated[
        float, typer.Option(help="The same for clients that no ps-worker watches over.")
    ] = DEFAULT.client_timeout,
    gather: Annotated[
        float, typer.Option(help="Seconds that a step waits, once, for workers between two loaders.")
    ] = DEFAULT.gather,
    step_timeout: Annotated[
        float, typer.Option(help="Seconds after which a worker that never gets ready is evicted; 0: never.")
    ] = DEFAULT.step_timeout,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow a --bind that other machines can reach, unencrypted.")
    ] = False,
    log_level: Annotated[LogLevel, typer.Option(help="How much to log, on stderr.")] = LogLevel.INFO,
) -> None:
    """Keep the membership, the partition map and the schemas of one job.

    Start it first, then servers and workers that name its address:

        ps-coordinator --state run.sqlite --start-workers 2

        ps-server --coordinator 127.0.0.1:7070

        ps-worker --coordinator 127.0.0.1:7070 train.py

    Training goes on while it is down; start it again with the same --state and it carries
    on. `psctl status` shows what it knows. SIGTERM or Ctrl-C stops it cleanly. Exit status 2
    means that a flag is wrong; the message names it.
    """
    logging.basicConfig(
        level=log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    try:
        config = CoordinatorConfig(
            bind=bind, state=_state(state, ephemeral), job=job, start_workers=start_workers, min_workers=min_workers,
            min_servers=min_servers, replicas=replicas, heartbeat_interval=heartbeat_interval,
            failure_timeout=failure_timeout, client_timeout=client_timeout,
            gather=gather, step_timeout=step_timeout, insecure=insecure,
        )  # fmt: skip
        code = asyncio.run(_run(config))
    except ConfigError as error:
        typer.echo(f"ps-coordinator: {_with_flag(error)}", err=True)
        code = 2
    raise typer.Exit(code)


def _with_flag(error: ConfigError) -> str:
    """The message with the key spelled as the flag."""
    key = error.metadata["key"]
    return str(error).replace(f"{key}: ", f"--{key.replace('_', '-')}: ", 1)


def _state(state: Path | None, ephemeral: bool) -> Path | None:
    if ephemeral and state is not None:
        raise ConfigError("state: --state and --ephemeral exclude each other", metadata={"key": "state"})
    if not ephemeral and state is None:
        raise ConfigError(
            "state: a FILE is required (or --ephemeral, which forgets the cluster at a restart)",
            metadata={"key": "state"},
        )
    return state


async def _run(config: CoordinatorConfig) -> int:
    from paramesh_coordinator.server import CoordinatorServer

    if config.insecure:
        log.warning("traffic is not encrypted and not authenticated bind=%s", config.bind)
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    server = CoordinatorServer(config)
    await server.start()
    deposed = asyncio.ensure_future(server.wait_deposed())
    stopping = asyncio.ensure_future(asked_to_stop.wait())
    await asyncio.wait((deposed, stopping), return_when=asyncio.FIRST_COMPLETED)
    failed = deposed.done()
    for task in (deposed, stopping):
        task.cancel()
    await server.stop()
    log.info("stopped job=%s term=%d", config.job, server.term)
    return 1 if failed else 0


def main() -> None:
    """Entry point of `ps-coordinator`."""
    app()


if __name__ == "__main__":
    main()
