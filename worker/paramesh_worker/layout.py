"""How `ps-worker` and `ps-run` lay out their --help."""

from __future__ import annotations

import argparse
import shutil

__all__ = ["Layout", "version"]


class Layout(argparse.RawDescriptionHelpFormatter):
    """The layout of `paramesh.command_help`: descriptions as written, and room for them."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, max_help_position=28, width=min(columns, 110))


def version() -> str:
    """The release that is installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("paramesh")
    except PackageNotFoundError:
        return "unknown"
