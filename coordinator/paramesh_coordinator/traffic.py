"""How many copies may be on their way at a time: by server, and by link between two hosts. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from paramesh_coordinator.rows import Ref

__all__ = ["MoveLimits", "Traffic"]


@dataclass(frozen=True)
class MoveLimits:
    """How many replicas a server sends and receives at a time, repairs included: training needs the network too."""

    into: int = 2
    out_of: int = 2
    between: int = 2
    """From the servers of one host to those of another, over one link."""


class Traffic:
    """Copies on their way, by server and by pair of hosts."""

    def __init__(self, hosts: Mapping[Ref, str]) -> None:
        self._hosts = hosts
        self._into, self._out_of = Counter[Ref](), Counter[Ref]()
        self._between = Counter[tuple[str, str]]()

    def add(self, source: Ref, target: Ref) -> None:
        """One more goes from one to the other."""
        self._into[target] += 1
        self._out_of[source] += 1
        self._between[self._link(source, target)] += 1

    def _link(self, source: Ref, target: Ref) -> tuple[str, str]:
        return self._hosts.get(source, ""), self._hosts.get(target, "")

    def has_room(self, source: Ref, target: Ref, limits: MoveLimits) -> bool:
        """Whether one more may."""
        here, there = link = self._link(source, target)
        crowded = here != there and self._between[link] >= limits.between
        return self._into[target] < limits.into and self._out_of[source] < limits.out_of and not crowded
