"""Whom a command of `psctl` asks, and how it proves who asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import typer
from paramesh.errors import ConfigError
from paramesh.security import PLAIN, Security

from paramesh_coordinator.following import Moves
from paramesh_coordinator.inspection import Coordinators

__all__ = ["Target", "addresses", "file_option", "target_of"]

SECURITY = "security"
"""The group of --help."""


def file_option(variable: str, text: str) -> Any:
    """An option that names a file, of the security settings."""
    return typer.Option(envvar=variable, help=text, metavar="FILE", show_default=False, rich_help_panel=SECURITY)


@dataclass(frozen=True)
class Target:
    """Whom to ask: flags before the command, overridden by flags after it."""

    coordinator: str
    job: str
    security: Security = PLAIN

    @property
    def coordinators(self) -> Coordinators:
        """Their addresses, and how to talk to them; a mistake in either ends psctl with status 2."""
        try:
            self.security.check(job=self.job)
        except ConfigError as error:
            key = error.metadata["key"]
            typer.echo(f"psctl: {str(error).replace(f'{key}:', f'--{key}:'.replace('_', '-'), 1)}", err=True)
            raise typer.Exit(2) from None
        return Coordinators(tuple(addresses(self.coordinator)), self.security)

    def read(self, read: Callable[..., Awaitable[Any]], *more: Any) -> Awaitable[Any]:
        """Ask with one of `inspection`'s functions."""
        return read(self.coordinators, self.job, *more)

    def moves(self, wait: bool, as_json: bool) -> Moves:
        """Shows moves until they are over."""
        return Moves(self.coordinators, self.job, wait, as_json)


def target_of(context: typer.Context, coordinator: str | None, job: str | None) -> Target:
    """The target of a command: its own flags before those of psctl."""
    given: Target = context.obj
    target = Target(coordinator or given.coordinator, job or given.job, given.security)
    addresses(target.coordinator)
    return target


def addresses(coordinator: str) -> list[str]:
    """The addresses of --coordinator; a wrong one ends psctl with status 2."""
    found = [part.strip() for part in coordinator.split(",") if part.strip()]
    for address in found:
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdecimal() and 1 <= int(port) <= 65535):
            typer.echo(f"psctl: --coordinator: {address!r} is not host:port, such as 127.0.0.1:7070", err=True)
            raise typer.Exit(2)
    if not found:
        typer.echo("psctl: --coordinator: names nobody", err=True)
        raise typer.Exit(2)
    return found
