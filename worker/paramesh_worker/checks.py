"""Checks of single settings; each refusal is a `ConfigError` that names the flag."""

from __future__ import annotations

import math
import re

from paramesh.errors import ConfigError

__all__ = ["check_address", "check_at_least", "check_name", "check_only_with", "check_seconds"]

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,200}")
"""As names on the wire, without the slash that separates host and index in a slot."""


def check_at_least(flag: str, value: int, bound: int) -> None:
    """Refuse a number below a bound."""
    if value < bound:
        raise ConfigError(f"argument {flag}: must be at least {bound}, not {value}")


def check_seconds(flag: str, value: float) -> None:
    """Refuse what is no time."""
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"argument {flag}: must be a number of seconds, 0 or more, not {value}")


def check_only_with(flag: str, mode: str | None, wanted: str) -> None:
    """Refuse a setting of another mode."""
    # Without --mode the script chooses, and the setting is a default for it.
    if mode not in (None, wanted):
        raise ConfigError(f"argument {flag}: only with --mode {wanted}, not with --mode {mode}")


def check_name(flag: str, value: str) -> None:
    """Refuse what cannot be a name in the cluster."""
    if not _NAME.fullmatch(value) or ".." in value:
        raise ConfigError(f"argument {flag}: {value[:80]!r} must match [A-Za-z0-9_.:-]{{1,200}}, without '..'")


def check_address(flag: str, address: str) -> None:
    """Refuse what is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise ConfigError(f"argument {flag}: {address[:80]!r} is not HOST:PORT with a port from 1 to 65535")
