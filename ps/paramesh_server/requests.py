"""What a partition is asked and what it answers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paramesh.hyper import Value


@dataclass(frozen=True, slots=True)
class StagedAt:
    """Where a contribution belongs."""

    group: int
    step: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Update:
    """A sequenced push, but for its gradient."""

    seq: int
    changed: Mapping[str, Value]
    """Hyper-parameters of this table that changed since the client's last push."""
    skip: bool = False
    scale: float = 1.0
    """Multiplies the gradient."""
    acked: int = 0
    """The last seq that the client knows to be acknowledged."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to a request that was not refused."""

    lsn: int
    duplicate: bool = False
    held: bool = False
    """An earlier push is missing: ask again when the partition has changed."""
    lost: int = 0
    """Acknowledged updates of this client that were found lost with a primary."""
