"""How the commands of the roles present themselves: the same plain layout for each.

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=PlainCommand, epilog=EXAMPLES)(run)

`--help` says: usage, one line of purpose, what one must know, options in groups with their defaults, examples,
exit status. That is also what argparse writes for `ps-worker` and `ps-run`, which typer cannot parse because
everything after their script belongs to the script. An option's group is its `rich_help_panel`.

typer brings a click of its own, or takes the installed one, by release: so nothing of click is named here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["PlainCommand", "PlainGroup", "version_option"]

WIDTH = 110
"""Columns at most; a terminal that has fewer gets fewer."""

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH}


def version_option(name: str) -> Any:
    """The `--version` option of a command: prints "NAME x.y.z" and ends it."""

    def show(value: bool) -> None:
        if value:
            import paramesh

            typer.echo(f"{name} {paramesh.__version__}")
            raise typer.Exit

    return typer.Option("--version", callback=show, is_eager=True, help="Show the version and exit.")


class PlainCommand(TyperCommand):
    """A command whose help is plain; its epilog is printed as it is written."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **_with_settings(settings))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the whole help."""
        _write(self, {}, ctx, formatter)


class PlainGroup(TyperGroup):
    """The same for a command with sub-commands."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **_with_settings(settings))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the whole help."""
        _write(self, self.commands, ctx, formatter)


def _with_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"context_settings": SETTINGS | (settings.get("context_settings") or {})}


def _write(command: Any, below: Mapping[str, Any], ctx: Any, formatter: Any) -> None:
    formatter.write_usage(ctx.command_path, "[options] COMMAND" if below else "[options]", prefix="usage: ")
    formatter.write_paragraph()
    formatter.write_text(command.help or "")
    if below:
        with formatter.section("commands"):
            formatter.write_dl([(name, _sentence(each.help or "")) for name, each in below.items()])
    for name, rows in _groups(command.get_params(ctx)).items():
        with formatter.section(name):
            formatter.write_dl(rows, col_max=26)
    if command.epilog:
        formatter.write(f"\n{command.epilog.strip()}\n")


def _groups(params: Sequence[Any]) -> dict[str, list[tuple[str, str]]]:
    """Lines of help by group: "options" first, the others in the order in which the command names them."""
    groups: dict[str, list[tuple[str, str]]] = {"options": []}
    always = ("help", "version")
    for param in sorted(params, key=lambda param: param.name not in always):
        if param.param_type_name == "option" and not param.hidden:
            group = getattr(param, "rich_help_panel", None) or "options"
            groups.setdefault(group, []).append((_names(param), _sentence(param.help or "") + _default(param)))
    return groups


def _names(option: Any) -> str:
    names = ", ".join(sorted(option.opts, key=len))
    if option.is_flag:
        return names
    # By the default, as not every release of typer gives an option its type's choices.
    if isinstance(option.default, enum.Enum):
        return f"{names} {{{','.join(str(each.value) for each in type(option.default))}}}"
    return f"{names} {option.metavar or 'N'}"


def _sentence(text: str) -> str:
    """As a phrase of a list: no capital, no full stop."""
    text = " ".join(text.split()).removesuffix(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _default(option: Any) -> str:
    default = getattr(option.default, "value", option.default)
    if option.is_flag or default is None or callable(default) or getattr(option, "show_default", True) is False:
        return ""
    variable = f"${option.envvar}, else " if option.envvar else ""
    return f" (default: {variable}{default})"
