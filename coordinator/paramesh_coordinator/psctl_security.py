"""`psctl certs` and `psctl tokens`: a development CA and what it issues; keys of tokens and tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from paramesh.command_help import PlainCommand, PlainGroup
from paramesh.errors import ConfigError, ParameshError
from paramesh.identity import Identity, Role
from paramesh.security import Security
from paramesh.tokens import LONGEST_S, TokenKeys

__all__ = ["certs", "tokens"]

HOURS = LONGEST_S // 3600

certs = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode=None, cls=PlainGroup,
    help="A development CA in a folder, and certificates of it.",
)  # fmt: skip
tokens = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode=None, cls=PlainGroup,
    help="Tokens, the light alternative to certificates, and the keys that sign them.",
)  # fmt: skip

Folder = Annotated[Path, typer.Argument(help="Folder of the CA.", metavar="DIR", show_default=False)]
OfRole = Annotated[Role, typer.Option("--role", help="What the process may be.", show_default=False)]
Name = Annotated[
    str,
    typer.Option(
        help="Who it is. It may bear this name in the cluster, and those that go on after it with - . or /.",
        metavar="NAME",
        show_default=False,
    ),
]
Job = Annotated[str, typer.Option(envvar="PARAMESH_JOB", help="Name of the cluster.", metavar="JOB")]


@certs.callback()
def _certs() -> None:
    """A development CA in a folder, and certificates of it."""


@tokens.callback()
def _tokens() -> None:
    """Tokens, the light alternative to certificates, and the keys that sign them."""


@contextmanager
def _mistakes() -> Iterator[None]:
    """A mistake in an option is a message and status 2."""
    try:
        yield
    except ConfigError as error:
        typer.echo(f"psctl: {error}", err=True)
        raise typer.Exit(2) from None
    except ParameshError as error:
        typer.echo(f"psctl: {error}", err=True)
        raise typer.Exit(2) from None


@certs.command(cls=PlainCommand)
def init(
    folder: Folder,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the CA is valid.", metavar="DAYS")] = 365,
) -> None:
    """Make a CA: DIR/ca.pem, which every process is given, and DIR/ca.key, which signs."""
    from paramesh.certificates import make_authority

    with _mistakes():
        files = make_authority(folder, days)
    typer.echo(f"made {files.cert}, for --tls-ca of every process, and {files.key}, which signs: keep it to yourself")


@certs.command(cls=PlainCommand)
def issue(
    folder: Folder,
    role: OfRole,
    name: Name,
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address at which it is dialled, such as 10.0.0.2; for servers and coordinators. May be "
            "repeated.",
            metavar="HOST",
        ),
    ] = None,
    job: Job = "default",
    days: Annotated[float, typer.Option(min=0.0, max=825, help="How long it is valid.", metavar="DAYS")] = 90.0,
) -> None:
    """Issue a certificate: DIR/ROLE-NAME.pem and its key DIR/ROLE-NAME.key, mode 0600.

    Again with the same name replaces both: running processes take them up by themselves.
    """
    from paramesh.certificates import issue as issue_certificate

    with _mistakes():
        identity = Identity(job, role, name)
        files = issue_certificate(folder, identity, host or [], days)
    typer.echo(f"issued {identity.uri}: --tls-cert {files.cert} --tls-key {files.key} --tls-ca {folder / 'ca.pem'}")


KeysFile = Annotated[
    Path, typer.Option("--keys", help="File of `psctl tokens keys`.", metavar="FILE", show_default=False)
]


@tokens.command(cls=PlainCommand)
def keys(
    file: Annotated[Path, typer.Argument(help="For --token-keys.", metavar="FILE", show_default=False)],
) -> None:
    """Make FILE with a key that signs tokens, mode 0600; or put a new key before the one in it.

    Tokens of the key before stay valid until the next rotation. Running processes take the file up by themselves.
    """
    from paramesh.certificates import write

    with _mistakes():
        older = Security(token_keys=str(file)).read_keys() if file.exists() else None
        made = TokenKeys.fresh(older)
        write(file, made.text().encode())
    typer.echo(f"wrote {file}: {len(made.keys)} of at most 2 keys, {next(iter(made.keys))} signs")


@tokens.command(name="issue", cls=PlainCommand)
def issue_token(
    keys: KeysFile,
    role: OfRole,
    name: Name,
    job: Job = "default",
    hours: Annotated[
        float, typer.Option(min=0.0, max=float(HOURS), help="How long it is valid.", metavar="HOURS")
    ] = 12.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Write it there, mode 0600, instead of printing it.", metavar="FILE", show_default=False),
    ] = None,
) -> None:
    """Issue a token. Give it in a file (--token-file, PARAMESH_TOKEN_FILE) or in PARAMESH_TOKEN."""
    from paramesh.certificates import write

    with _mistakes():
        token = Security(token_keys=str(keys)).read_keys().sign(Identity(job, role, name), time.time() + hours * 3600)
        if out is not None:
            write(out, f"{token}\n".encode())
    typer.echo(token if out is None else f"wrote {out}, valid for {hours:g} hours")
