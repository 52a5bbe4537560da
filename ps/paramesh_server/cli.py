"""`ps-server`: a parameter server as a process. Its flags are the fields of `ServerConfig`."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import itertools
import logging
import os
import signal
import sys
from enum import StrEnum
from typing import Annotated, Any, NoReturn

import typer
from paramesh.command_help import PlainCommand, version_option
from paramesh.descriptors import raise_limit
from paramesh.errors import ConfigError, ParameshError
from paramesh.memory import keep_big_buffers, keep_imports

from paramesh_server import config as config_module
from paramesh_server.config import ServerConfig

__all__ = ["main"]

log = logging.getLogger(__name__)

HIDDEN = frozenset({"name_patience", "heartbeat"})
"""Fields that are for tests, or for nobody without a reason."""

GROUPS = {
    "cluster": ("coordinator", "job", "name", "replace"),
    "addresses": ("bind", "control_bind", "advertise"),
    "security": ("tls_cert", "tls_key", "tls_ca", "token_keys", "insecure"),
    "resources": ("threads", "staged_bytes", "capacity_bytes", "copy_rate", "memory_watermark"),
    "limits": (
        "in_flight_bytes",
        "max_connections",
        "max_streams",
        "max_calls",
        "max_uploads",
        "max_queue",
        "max_lag_bytes",
    ),
    "ending": ("drain_timeout",),
    "observation": ("metrics_port", "metrics_host", "reflection"),
}
"""The flags of --help, together with what they are about."""

METAVARS = {
    "coordinator": "HOST:PORT", "job": "JOB", "name": "NAME", "bind": "HOST:PORT", "control_bind": "HOST:PORT",
    "advertise": "HOST", "drain_timeout": "SECONDS", "staged_bytes": "BYTES",
    "in_flight_bytes": "BYTES", "capacity_bytes": "BYTES", "max_lag_bytes": "BYTES", "memory_watermark": "SHARE",
    "copy_rate": "BYTES/S",
    "metrics_port": "PORT", "metrics_host": "HOST", "tls_cert": "FILE", "tls_key": "FILE", "tls_ca": "FILE",
    "token_keys": "FILE",
}  # fmt: skip

FROM_ENVIRONMENT = {name: f"PARAMESH_{name.upper()}" for name in ("tls_cert", "tls_key", "tls_ca", "token_keys")}
"""Variables that stand for flags."""

EXAMPLES = """\
examples:
  ps-server --coordinator 127.0.0.1:7070
      one server on this machine, on a free port; start as many as there is bandwidth to share
  ps-server --coordinator host-a:7070 --bind 0.0.0.0:7080 --tls-cert s0.pem --tls-key s0.key --tls-ca ca.pem
      reachable from other machines, encrypted and authenticated; psctl certs makes the files
  ps-server --coordinator host-a:7070 --bind 0.0.0.0:7080 --insecure
      the same in the clear, inside a network that you trust
  ps-coordinator --state run.sqlite
      no coordinator yet? it comes first, and workers last: ps-worker --coordinator 127.0.0.1:7070 train.py

exit status: 0 after SIGTERM or Ctrl-C; 1 if the coordinator refused this server, or if it ended with partitions
that only it had and that could not go elsewhere in time; 2 for a mistake in the options."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class LogLevel(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def field_docs() -> dict[str, str]:
    """The docstring under each field of `ServerConfig`, which is its help text."""
    body = ast.parse(inspect.getsource(config_module)).body
    fields = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == "ServerConfig").body
    docs = {}
    for field, text in itertools.pairwise(fields):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def _parameters() -> list[inspect.Parameter]:
    """One keyword per field, with its default and help, as typer wants them."""
    docs = field_docs()
    group = {name: group for group, names in GROUPS.items() for name in names}
    types = {"str": str, "int": int, "float": float, "bool": bool}
    parameters = []
    for field in dataclasses.fields(ServerConfig):
        flag = "--" + field.name.replace("_", "-")
        option = typer.Option(
            flag, help=docs[field.name], hidden=field.name in HIDDEN, show_default=_shown(field),
            metavar=METAVARS.get(field.name), envvar=FROM_ENVIRONMENT.get(field.name),
            rich_help_panel=group.get(field.name),
        )  # fmt: skip
        default: Any = field.default
        if default is dataclasses.MISSING:
            # The one field without a default is required; the config says so in its words.
            factory: Any = field.default_factory
            default = "" if factory is dataclasses.MISSING else factory()
        annotation: Any = Annotated[types[str(field.type)], option]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    level = Annotated[LogLevel, typer.Option(help="How much to log, on stderr.", rich_help_panel="observation")]
    parameters.append(
        inspect.Parameter("log_level", inspect.Parameter.KEYWORD_ONLY, default=LogLevel.INFO, annotation=level)
    )
    version = Annotated[bool, version_option("ps-server")]
    parameters.append(inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=version))
    return parameters


def _shown(field: dataclasses.Field[Any]) -> bool:
    """Computed defaults are explained in the help; a number of one machine teaches nothing."""
    return field.default is not dataclasses.MISSING and field.default not in ("", 0, False)


def run(*, log_level: LogLevel, version: bool, **settings: Any) -> None:
    """Hold partitions of the model: sum the workers' gradients, run the optimizer, serve values.

    Start as many as there is memory or bandwidth to share: one process moves about 3 GB/s. A server
    waits for its coordinator and outlives it. It holds its partitions in memory only. SIGTERM has it give
    them to other servers first, for --drain-timeout at most; Ctrl-C, or a second SIGTERM, stops it at once.
    """
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    try:
        config = ServerConfig(**settings)
        code = asyncio.run(_run(config))
    except ConfigError as error:
        key = error.metadata["key"]
        flag = f"--{key.replace('_', '-')}"
        typer.echo(f"ps-server: {str(error).replace(f'{key}:', f'{flag}:', 1)}", err=True)
        code = 2
    except ParameshError as error:
        typer.echo(f"ps-server: {error.reason}: {error}", err=True)
        code = 1
    raise typer.Exit(code)


run.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
app.command(cls=PlainCommand, epilog=EXAMPLES)(run)


async def _run(config: ServerConfig) -> int:
    import torch

    from paramesh_server.server import ParameterServer

    # Partitions are computed side by side by our own threads; torch's would only contend.
    torch.set_num_threads(1)
    keep_big_buffers()
    keep_imports()
    raise_limit()
    if config.insecure and not config.security.encrypted:
        log.warning("traffic is not encrypted and not authenticated bind=%s", config.bind)
    asked, stop = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGTERM, lambda: (stop if asked.is_set() else asked).set())
    server = ParameterServer(config)
    stopping = asyncio.ensure_future(stop.wait())
    working = asyncio.ensure_future(_work(server, asked))
    await asyncio.wait((stopping, working), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    lost = working.result() if working.done() else []  # raises why
    working.cancel()
    await asyncio.wait((working,))
    if lost:
        log.error("stopped name=%s lost partitions=%s: only this process had them", config.name, lost)
    else:
        log.info("stopped name=%s", config.name)
    return 1 if lost else 0


async def _work(server: Any, asked: asyncio.Event) -> list[int]:
    """Serve until cancelled, or until the coordinator does not want this process, or SIGTERM.

    Returns:
        Partitions that end with this process although they could have gone elsewhere.
    """
    starting = asyncio.ensure_future(server.start())
    wanted = asyncio.ensure_future(asked.wait())
    try:
        await asyncio.wait((starting, wanted), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait((starting,))
            return []
        starting.result()
        try:
            return await _serve(server, wanted)
        finally:
            await server.stop()
    finally:
        wanted.cancel()
        starting.cancel()


async def _serve(server: Any, wanted: asyncio.Future[Any]) -> list[int]:
    ended = asyncio.ensure_future(server.wait())
    try:
        await asyncio.wait((ended, wanted), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()  # raises why
        lost: list[int] = await server.drain(server.config.drain_timeout)
        return lost
    finally:
        ended.cancel()


def main() -> NoReturn:
    """Entry point of `ps-server`."""
    try:
        app(prog_name="ps-server")
    except SystemExit as end:
        # A server that loaded torch has stopped in order by now; taking the interpreter apart
        # would cost another 1-2 s, in which whoever stops a cluster waits for nothing.
        if "torch" in sys.modules and isinstance(end.code, int):
            _leave(end.code)
        raise
    raise AssertionError("app() ends by SystemExit")


def _leave(status: int) -> NoReturn:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass  # nobody reads it any more
    os._exit(status)


if __name__ == "__main__":
    main()
