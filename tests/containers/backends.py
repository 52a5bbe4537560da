"""The backends by name, and whether this machine has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.containers.hosts import HostCluster

NAMES = ("compose", "netns", "processes")
BEGAN = pytest.StashKey[float]()
_CHOSEN = pytest.StashKey["Backend"]()

LACKS: dict[str, tuple[str, ...]] = {"compose": (), "netns": ("compose",), "processes": ("compose", "wires")}
"""Markers of scenarios that a backend cannot have."""


@dataclass(frozen=True)
class Backend:
    """One way to have hosts."""

    title: str
    kind: type[HostCluster]

    def make(self, **arguments: Any) -> HostCluster:
        """A cluster, not started."""
        return self.kind(**arguments)


def chosen(config: pytest.Config) -> Backend:
    """The backend of `--backend`; made ready at the first call.

    Raises:
        pytest.UsageError: this machine cannot have it. Nothing is skipped.
    """
    if _CHOSEN not in config.stash:
        config.stash[_CHOSEN] = _ready(config.getoption("backend"))
    return config.stash[_CHOSEN]


def _ready(name: str) -> Backend:
    if name == "netns":
        from tests.containers import netns

        if why := netns.available():
            raise pytest.UsageError(f"--backend netns: {why}")
        return Backend(netns.NetnsCluster.kind, netns.NetnsCluster)
    if name == "compose":
        from tests.containers import compose, engine

        title = engine.ready()
        return Backend(f"docker compose ({title})", compose.ComposeCluster)
    from tests.containers.local import LocalCluster

    return Backend(LocalCluster.kind, LocalCluster)
