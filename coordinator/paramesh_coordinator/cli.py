"""`ps-coordinator`: the coordinator as a process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from paramesh.command_help import PlainCommand, version_option
from paramesh.descriptors import raise_limit
from paramesh.errors import ConfigError
from paramesh.memory import keep_imports

from paramesh_coordinator.config import CoordinatorConfig, parse_every
from paramesh_coordinator.store.etcd_target import SCHEME, EtcdTarget

if TYPE_CHECKING:
    from paramesh_coordinator.server import CoordinatorServer

__all__ = ["main"]

log = logging.getLogger(__name__)

DEFAULT = CoordinatorConfig()

EXAMPLES = """\
examples:
  ps-coordinator --state run.sqlite --start-workers 2
      on 127.0.0.1:7070; then ps-server --coordinator 127.0.0.1:7070, and twice
      ps-worker --coordinator 127.0.0.1:7070 train.py
  ps-coordinator --ephemeral --bind 127.0.0.1:0
      a short try on a free port, which is logged; a restart forgets everything
  psctl --coordinator 127.0.0.1:7070 status
      what it knows
  ps-coordinator --state etcd://etcd-a:2379,etcd-b:2379/paramesh/run-7 --bind 10.0.0.1:7070 --insecure
      on two or three machines: one leads, the others take over when it is lost; give
      servers and workers all their addresses with commas between

exit status: 0 after SIGTERM or Ctrl-C; 1 if a newer coordinator has taken over its state (on etcd it stands by again
instead); 2 for a mistake in the options."""

JOB, ADDRESS, WORKERS, TIMES = "job and its state", "address", "workers and servers", "times"
CHECKPOINTS, SECURITY, LIMITS = "checkpoints", "security", "limits"
"""The groups of --help."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _seconds(text: str) -> Any:
    return typer.Option(help=text, metavar="SECONDS", rich_help_panel=TIMES)


def _file(name: str, text: str) -> Any:
    """An option that names a file, of the security settings."""
    variable = f"PARAMESH_{name.upper()}"
    return typer.Option(help=text, envvar=variable, metavar="FILE", show_default=False, rich_help_panel=SECURITY)


def _limit(text: str, metavar: str = "COUNT") -> Any:
    return typer.Option(help=text, metavar=metavar, rich_help_panel=LIMITS)


class LogLevel(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command(cls=PlainCommand, epilog=EXAMPLES)
def run(
    bind: Annotated[
        str,
        typer.Option(
            help="host:port to listen on; port 0 picks a free one and logs it.",
            metavar="HOST:PORT",
            rich_help_panel=ADDRESS,
        ),
    ] = DEFAULT.bind,
    advertise: Annotated[
        str,
        typer.Option(
            help="Where others reach this coordinator, when several run on etcd; default: the address it listens on.",
            metavar="HOST:PORT",
            rich_help_panel=ADDRESS,
        ),
    ] = DEFAULT.advertise,
    state: Annotated[
        str | None,
        typer.Option(
            help="SQLite file to keep the cluster in. Restart with the same file. Required, or --ephemeral. For "
            "several coordinators: etcd://HOST:PORT[,HOST:PORT...]/PREFIX.",
            metavar="FILE|etcd://...",
            rich_help_panel=JOB,
        ),
    ] = None,
    ephemeral: Annotated[
        bool,
        typer.Option(
            "--ephemeral", help="Keep the cluster in memory instead: a restart loses it.", rich_help_panel=JOB
        ),
    ] = False,
    job: Annotated[
        str, typer.Option(help="Name of the cluster; others are refused.", metavar="JOB", rich_help_panel=JOB)
    ] = DEFAULT.job,
    start_workers: Annotated[
        int, typer.Option(help="Workers that step 0 waits for.", rich_help_panel=WORKERS)
    ] = DEFAULT.start_workers,
    min_workers: Annotated[
        int, typer.Option(help="Active workers below which later steps pause.", rich_help_panel=WORKERS)
    ] = DEFAULT.min_workers,
    min_servers: Annotated[
        int,
        typer.Option(
            help="Servers that must register before anything is placed, for evenness.", rich_help_panel=WORKERS
        ),
    ] = DEFAULT.min_servers,
    replicas: Annotated[
        int, typer.Option(help="Copies of each partition, on different servers; 1 loses what a lost server held.")
    ] = DEFAULT.replicas,
    min_isr: Annotated[
        int,
        typer.Option(
            help="Writes wait while fewer copies are in sync. 1: a last copy goes on alone, shown as degraded."
        ),
    ] = DEFAULT.min_isr,
    rebalance: Annotated[
        bool,
        typer.Option(
            "--rebalance/--no-rebalance",
            help="Move partitions by itself: when servers came or went and bytes are uneven by more than 20 %, "
            "and when requests have been for 30 s.",
            rich_help_panel=WORKERS,
        ),
    ] = DEFAULT.rebalance,
    max_table_bytes: Annotated[
        int, _limit("Bytes of one table's values; a larger one is refused.", "BYTES")
    ] = DEFAULT.max_table_bytes,
    max_tables: Annotated[int, _limit("Tables of the job.")] = DEFAULT.max_tables,
    max_partitions: Annotated[int, _limit("Partitions of the job.")] = DEFAULT.max_partitions,
    max_clients: Annotated[int, _limit("Training processes and tools at a time.")] = DEFAULT.max_clients,
    max_connections: Annotated[int, _limit("Connections; further ones are closed at once.")] = DEFAULT.max_connections,
    max_calls: Annotated[
        int, _limit("Calls under way of one service; above it callers are told to wait.")
    ] = DEFAULT.max_calls,
    max_uploads: Annotated[
        int, _limit("Calls whose request is not here in full, 16 MiB each at most; above it callers are told to wait.")
    ] = DEFAULT.max_uploads,
    memory_watermark: Annotated[
        float,
        _limit("Share of the memory above which no table is made and no client registered; 0: never.", "SHARE"),
    ] = DEFAULT.memory_watermark,
    heartbeat_interval: Annotated[
        float, _seconds("Seconds between beats; at most a quarter of --failure-timeout.")
    ] = DEFAULT.heartbeat_interval,
    failure_timeout: Annotated[
        float,
        _seconds("Seconds of silence after which a server or a supervisor is dead."),
    ] = DEFAULT.failure_timeout,
    client_timeout: Annotated[
        float, _seconds("The same for clients that no ps-worker watches over.")
    ] = DEFAULT.client_timeout,
    gather: Annotated[
        float, _seconds("Seconds that a step waits, once, for workers between two loaders.")
    ] = DEFAULT.gather,
    step_timeout: Annotated[
        float, _seconds("Seconds after which a worker that lives but never gets ready is evicted; 0: never.")
    ] = DEFAULT.step_timeout,
    checkpoint_dir: Annotated[
        str,
        typer.Option(
            help="Where checkpoints go: a directory that all machines share, or a URL such as s3://bucket/run.",
            metavar="URL",
            rich_help_panel=CHECKPOINTS,
        ),
    ] = DEFAULT.checkpoint_dir,
    checkpoint_every: Annotated[
        str,
        typer.Option(
            help="Make one every so often: 90s, 10m, 2h, or 500steps.", metavar="TIME", rich_help_panel=CHECKPOINTS
        ),
    ] = "",
    checkpoint_keep: Annotated[
        int, typer.Option(help="Periodic checkpoints to keep, at least 1.", rich_help_panel=CHECKPOINTS)
    ] = DEFAULT.checkpoint_keep,
    restore: Annotated[
        str,
        typer.Option(
            help="Begin with a checkpoint, DIR/NAME or DIR/latest. Only on a fresh --state.",
            metavar="URL",
            rich_help_panel=CHECKPOINTS,
        ),
    ] = DEFAULT.restore,
    tls_cert: Annotated[
        str,
        _file(
            "tls_cert",
            "PEM file of this coordinator's certificate. Certificate, key and CA encrypt every "
            "connection; a changed file is taken up by itself.",
        ),
    ] = "",
    tls_key: Annotated[str, _file("tls_key", "PEM file of its key, mode 0600.")] = "",
    tls_ca: Annotated[
        str, _file("tls_ca", "PEM file of the CA that the cluster's certificates are of. Others are refused.")
    ] = "",
    token_keys: Annotated[
        str,
        _file("token_keys", "File with the keys of tokens: callers are known by tokens instead of certificates."),
    ] = "",
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Allow a --bind that other machines can reach, unencrypted.", rich_help_panel=SECURITY
        ),
    ] = False,
    log_level: Annotated[LogLevel, typer.Option(help="How much to log, on stderr.")] = LogLevel.INFO,
    version: Annotated[bool, version_option("ps-coordinator")] = False,
) -> None:
    """Keep the membership, the partition map and the schemas of one job.

    Servers and workers find each other through it. Training goes on while it is down; start it
    again with the same --state and it carries on. SIGTERM or Ctrl-C stops it cleanly.
    """
    logging.basicConfig(
        level=log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    try:
        config = CoordinatorConfig(
            bind=bind, advertise=advertise, state=_state(state, ephemeral), job=job,
            start_workers=start_workers, min_workers=min_workers, min_servers=min_servers, replicas=replicas,
            min_isr=min_isr, heartbeat_interval=heartbeat_interval,
            failure_timeout=failure_timeout, client_timeout=client_timeout,
            gather=gather, step_timeout=step_timeout, rebalance=rebalance, insecure=insecure,
            tls_cert=tls_cert, tls_key=tls_key, tls_ca=tls_ca, token_keys=token_keys,
            checkpoint_dir=checkpoint_dir, **parse_every(checkpoint_every), checkpoint_keep=checkpoint_keep,
            restore=restore, max_table_bytes=max_table_bytes, max_tables=max_tables, max_partitions=max_partitions,
            max_clients=max_clients, max_connections=max_connections, max_calls=max_calls, max_uploads=max_uploads,
            memory_watermark=memory_watermark,
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


def _state(state: str | None, ephemeral: bool) -> Path | EtcdTarget | None:
    if ephemeral and state is not None:
        raise ConfigError("state: --state and --ephemeral exclude each other", metadata={"key": "state"})
    if not ephemeral and state is None:
        raise ConfigError(
            "state: a FILE is required (or --ephemeral, which forgets the cluster at a restart)",
            metadata={"key": "state"},
        )
    if state is not None and state.startswith(SCHEME):
        return EtcdTarget.parse(state)
    return None if state is None else Path(state)


async def _run(config: CoordinatorConfig) -> int:
    from paramesh_coordinator.server import CoordinatorServer

    keep_imports()
    raise_limit()
    if config.insecure and not config.security.encrypted:
        log.warning("traffic is not encrypted and not authenticated bind=%s", config.bind)
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    stopping = asyncio.ensure_future(asked_to_stop.wait())
    several = isinstance(config.state, EtcdTarget)
    try:
        while True:
            server = CoordinatorServer(config)
            deposed = await _serve(server, stopping)
            if not deposed:
                return 0
            if not several:
                return 1
            # All that knew the old term has gone with its server; the address stays ours.
            config = dataclasses.replace(config, bind=server.address)
    finally:
        stopping.cancel()


async def _serve(server: CoordinatorServer, stopping: asyncio.Future[Any]) -> bool:
    """Serve until told to stop, or deposed; whether it was the latter."""
    await server.start()
    deposed = asyncio.ensure_future(server.wait_deposed())
    try:
        await asyncio.wait((deposed, stopping), return_when=asyncio.FIRST_COMPLETED)
        if deposed.done():
            deposed.result()
        return deposed.done()
    finally:
        deposed.cancel()
        await server.stop()
        log.info("stopped job=%s term=%d", server.config.job, server.term)


def main() -> None:
    """Entry point of `ps-coordinator`."""
    app(prog_name="ps-coordinator")


if __name__ == "__main__":
    main()
