"""Settings of `ps-worker` and `ps-run`: frozen dataclasses, checked once; the command lines are derived
from them.

    config, command = parse(WorkerConfig, argv, prog="ps-worker", description=..., examples=...)

A field made by `option` is one flag; its `help` is both the manual and the field's documentation.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from paramesh.errors import ConfigError
from paramesh.identity import Identity, Role
from paramesh.security import VARIABLES, Security

from .checks import check_address, check_at_least, check_name, check_only_with, check_seconds
from .command import Command, split
from .layout import Layout, version

__all__ = ["RunConfig", "WorkerConfig", "flags", "parse"]

MAX_REPLICAS = 7
"""As the coordinator's: every push waits for all of them."""


def option(
    default: Any,
    help: str,
    *,
    metavar: str = "N",
    kind: Callable[[str], Any] = int,
    choices: Sequence[str] | None = None,
    env: str = "",
    group: str = "options",
) -> Any:
    """A dataclass field that is a command line flag.

    Args:
        default: the value when neither flag nor variable is given.
        help: one or two sentences for people; None hides the flag.
        metavar: what stands for the value; empty: a switch without one.
        kind: turns the text into the value.
        choices: the only values allowed.
        env: an environment variable that gives the default.
        group: under which heading --help shows it.
    """
    settings = {"help": help, "metavar": metavar, "kind": kind, "choices": choices, "env": env, "group": group}
    return field(default=default, metadata=settings)


@dataclass(frozen=True)
class WorkerConfig:
    """What `ps-worker` is told."""

    usage: ClassVar[str] = "ps-worker [options] SCRIPT [ARGS...]   (or: -m MODULE [ARGS...])"

    nproc: int = option(1, "training processes to run on this machine, one per GPU as a rule", group="processes")
    max_restarts: int = option(
        3,
        "restarts that each process may use up before the job fails; the count starts anew after 5 minutes"
        " of health. 0 switches restarting off. An error that a restart cannot mend uses up none and fails it",
        metavar="K",
        group="processes",
    )
    coordinator: str = option(
        "",
        "address of the cluster's coordinator; several with commas. Required, here or in PARAMESH_COORDINATOR",
        metavar="HOST:PORT",
        kind=str,
        env="PARAMESH_COORDINATOR",
        group="cluster",
    )
    job: str = option(
        "default", "name of the job, as the coordinator's", metavar="JOB", kind=str, env="PARAMESH_JOB", group="cluster"
    )
    name: str = option(
        "",
        "name of this machine in the cluster, kept over restarts so that its processes get their ranks back."
        " Default: the host name; two supervisors on one machine need two names",
        metavar="HOST",
        kind=str,
        group="cluster",
    )
    tls_cert: str = option(
        "",
        "PEM file of this machine's certificate, for a cluster that encrypts; its processes use it too",
        metavar="FILE",
        kind=str,
        env="PARAMESH_TLS_CERT",
        group="security",
    )
    tls_key: str = option(
        "", "PEM file of its key, mode 0600", metavar="FILE", kind=str, env="PARAMESH_TLS_KEY", group="security"
    )
    tls_ca: str = option(
        "",
        "PEM file of the CA that the cluster's certificates are of",
        metavar="FILE",
        kind=str,
        env="PARAMESH_TLS_CA",
        group="security",
    )
    token_file: str = option(
        "",
        "file with a token, mode 0600, for a cluster that takes tokens; or the token itself in PARAMESH_TOKEN",
        metavar="FILE",
        kind=str,
        env="PARAMESH_TOKEN_FILE",
        group="security",
    )
    token: str = ""
    """The token of PARAMESH_TOKEN; no flag, which every user of the machine could read."""
    log_dir: str = option(
        "",
        "write the output of process i to DIR/worker-i.log instead of the console, where its lines start with"
        " [worker i]",
        metavar="DIR",
        kind=str,
        group="output",
    )
    tee: bool = option(False, "with --log-dir: also write it to the console", metavar="", kind=bool, group="output")
    grace: float = option(
        10.0,
        "seconds that processes have to end after SIGTERM or Ctrl-C, which are passed on",
        metavar="SECONDS",
        kind=float,
        group="processes",
    )
    log_level: str = option(
        "info",
        "how much the supervisor itself says",
        choices=("debug", "info", "warning", "error"),
        kind=str,
        group="output",
    )
    events_fd: int = option(-1, argparse.SUPPRESS, metavar="FD")
    """Descriptor that gets a line of JSON for each start and end of a process, for ps-run; -1: none."""

    def checked(self) -> WorkerConfig:
        """Fill in what depends on the machine.

        Raises:
            ConfigError: names the flag that is wrong, and what it may be.
        """
        check_at_least("--nproc", self.nproc, 1)
        check_at_least("--max-restarts", self.max_restarts, 0)
        check_seconds("--grace", self.grace)
        if not self.coordinator:
            raise ConfigError(
                "argument --coordinator: say where the cluster is, HOST:PORT (or set PARAMESH_COORDINATOR);"
                " to train on this machine alone use `python SCRIPT`, for a cluster on this machine `ps-run`"
            )
        for address in self.coordinator.split(","):
            check_address("--coordinator", address)
        check_name("--job", self.job)
        if self.tee and not self.log_dir:
            raise ConfigError("argument --tee: needs --log-dir")
        who = self._checked_security()
        if self.name:
            check_name("--name", self.name)
            if who is not None and not who.covers(self.name):
                raise ConfigError(
                    f"argument --name: {self.name!r} is not {who.name!r}, whose certificate or token this is, nor"
                    " under it"
                )
            return self
        name = re.sub(r"[^A-Za-z0-9_.:-]", "-", socket.gethostname())[:200] or "host"
        return dataclasses.replace(self, name=name if who is None or who.covers(name) else who.name)

    @property
    def security(self) -> Security:
        """Of the channels to the cluster, here and in the training processes."""
        return Security(self.tls_cert, self.tls_key, self.tls_ca, self.token, self.token_file)

    def _checked_security(self) -> Identity | None:
        try:
            who = self.security.check(Role.WORKER, self.job)
            for address in self.coordinator.split(","):
                self.security.check_dial(address)
        except ConfigError as error:
            key = error.metadata["key"]
            flag = "--" + key.replace("_", "-")
            raise ConfigError(f"argument {str(error).replace(f'{key}:', f'{flag}:', 1)}") from None
        return who


@dataclass(frozen=True)
class RunConfig:
    """What `ps-run` is told."""

    usage: ClassVar[str] = "ps-run [options] SCRIPT [ARGS...]   (or: -m MODULE [ARGS...])"

    servers: int = option(1, "parameter servers; one moves about 3 GB/s", metavar="S", group="cluster")
    workers: int = option(1, "training processes", metavar="W", group="cluster")
    mode: str | None = option(
        None,
        "how steps work, for a DistributedOptimizer that is not told in the script: sync (default; one global"
        " batch per step), ssp (clocks drift by --staleness at most), async (nobody waits), local (workers"
        " exchange every --every steps)",
        choices=("sync", "ssp", "async", "local"),
        kind=str,
        group="training",
    )
    staleness: int | None = option(
        None, "with ssp: how many steps the fastest worker may be ahead of the slowest (default: 4)", group="training"
    )
    every: int | None = option(
        None, "with local: steps between two exchanges (default: 1)", metavar="H", group="training"
    )
    replicas: int = option(
        1,
        "copies of each partition, on as many servers; with 2 a server may die at any moment and nothing is lost",
        metavar="R",
        group="cluster",
    )
    max_restarts: int = option(
        3,
        "restarts that each worker may use up before the run fails; an error that a restart cannot mend uses up none",
        metavar="K",
        group="processes",
    )
    port: int = option(
        0, "port of the coordinator on 127.0.0.1, for psctl; 0: any free one", metavar="P", group="cluster"
    )
    state: str = option(
        "",
        "new file for the state of the coordinator; default: a temporary one",
        metavar="FILE",
        kind=str,
        group="cluster",
    )
    checkpoint_dir: str = option(
        "",
        "where checkpoints go: a folder, or a URL such as s3://bucket/run",
        metavar="URL",
        kind=str,
        group="checkpoints",
    )
    checkpoint_every: str = option(
        "",
        "make one every so often: 90s, 10m, 2h or 500steps; needs --checkpoint-dir",
        metavar="TIME",
        kind=str,
        group="checkpoints",
    )
    checkpoint_keep: int = option(3, "periodic checkpoints to keep", metavar="K", group="checkpoints")
    restore: str = option("", "checkpoint to begin with, DIR/NAME", metavar="URL", kind=str, group="checkpoints")
    log_dir: str = option(
        "",
        "folder of all logs; default: a new one under the temporary folder",
        metavar="DIR",
        kind=str,
        group="output",
    )
    grace: float = option(
        10.0,
        "seconds that processes have to end after Ctrl-C; a second Ctrl-C kills at once",
        metavar="SECONDS",
        kind=float,
        group="processes",
    )
    plain: bool = option(
        False,
        "plain lines instead of the live display, as when stdout is no terminal",
        metavar="",
        kind=bool,
        group="output",
    )

    def checked(self) -> RunConfig:
        """Check the settings.

        Raises:
            ConfigError: names the flag that is wrong, and what it may be.
        """
        check_at_least("--servers", self.servers, 1)
        check_at_least("--workers", self.workers, 1)
        check_at_least("--max-restarts", self.max_restarts, 0)
        check_at_least("--replicas", self.replicas, 1)
        check_seconds("--grace", self.grace)
        check_at_least("--checkpoint-keep", self.checkpoint_keep, 1)
        if self.checkpoint_every and not re.fullmatch(r"0*[1-9][0-9]{0,8}(s|m|h|steps?)", self.checkpoint_every):
            raise ConfigError(
                f"argument --checkpoint-every: {self.checkpoint_every!r} is not like 90s, 10m, 2h or 500steps"
            )
        if self.checkpoint_every and not self.checkpoint_dir:
            raise ConfigError("argument --checkpoint-every: says when; --checkpoint-dir must say where")
        if self.replicas > min(self.servers, MAX_REPLICAS):
            raise ConfigError(
                f"argument --replicas: {self.replicas} copies need as many servers, at most {MAX_REPLICAS}, not"
                f" {self.servers}: raise --servers"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"argument --port: must be between 0 and 65535, not {self.port}")
        if self.state and os.path.exists(self.state):
            raise ConfigError(
                f"argument --state: {self.state!r} exists: it is of an earlier run, whose servers are gone and"
                " their values with them. Name a new file, or leave the flag out"
            )
        if self.staleness is not None:
            check_only_with("--staleness", self.mode, "ssp")
            check_at_least("--staleness", self.staleness, 0)
        if self.every is not None:
            check_only_with("--every", self.mode, "local")
            check_at_least("--every", self.every, 1)
        return self


Config = TypeVar("Config", WorkerConfig, RunConfig)


def flags(config: type[WorkerConfig] | type[RunConfig]) -> dict[str, bool]:
    """The command line flags of a configuration, each with whether it takes a value."""
    own = {_flag(each.name): bool(each.metadata["metavar"]) for each in _options(config)}
    return {**own, "-h": False, "--help": False, "--version": False}


def parse(
    config: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    examples: str,
    environ: Mapping[str, str] = os.environ,
) -> tuple[Config, Command]:
    """Read a command line; a mistake ends the program with status 2 and a line that names the flag.

    Returns:
        The checked settings and the user's command.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=config.usage,
        description=description,
        epilog=examples,
        formatter_class=Layout,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version()}", help="show the version and exit"
    )
    groups: dict[str, argparse._ActionsContainer] = {"options": parser}
    for each in _options(config):
        group = each.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        _add(groups[group], each, environ)
    try:
        options, command = split(argv, flags(config))
        values = parser.parse_args(options)
        if command is None:
            raise ConfigError("argument SCRIPT: say what to run: a Python file, or -m MODULE")
        command.check()
        return config(**vars(values), **_secrets(config, environ)).checked(), command
    except ConfigError as error:
        parser.print_usage(sys.stderr)
        parser.exit(2, f"{prog}: error: {error}\n")


def _options(config: type[WorkerConfig] | type[RunConfig]) -> list[dataclasses.Field[Any]]:
    """The fields that are flags."""
    return [each for each in dataclasses.fields(config) if each.metadata]


def _secrets(config: type[WorkerConfig] | type[RunConfig], environ: Mapping[str, str]) -> dict[str, Any]:
    """What is read from the environment only."""
    return {"token": environ.get(VARIABLES["token"], "").strip()} if config is WorkerConfig else {}


def _add(parser: argparse._ActionsContainer, each: dataclasses.Field[Any], environ: Mapping[str, str]) -> None:
    settings = each.metadata
    if not settings["metavar"]:
        parser.add_argument(_flag(each.name), action="store_true", help=settings["help"])
        return
    text = settings["help"]
    if text != argparse.SUPPRESS and each.default not in (None, ""):
        text += " (default: %(default)s)"
    parser.add_argument(
        _flag(each.name),
        type=settings["kind"],
        default=environ.get(settings["env"]) or each.default,
        choices=settings["choices"],
        metavar=None if settings["choices"] else settings["metavar"],
        help=text,
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
