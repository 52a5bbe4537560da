"""How much memory is left before something is killed for it: by the container's limit, or the machine's.

    headroom = Headroom(0.9)
    headroom.tight            # above 90 %: take on nothing new
    headroom.used, headroom.limit

In a container the limit is its cgroup's (v2 or v1), and what counts is what the kernel cannot drop:
usage without the inactive file cache, as Kubernetes judges. Without one it is this process's own
resident memory against the machine's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Headroom"]

LOOK_S = 0.5
"""Seconds that a look is good for: a server takes in 1 GB in that time at most."""

EASE = 0.05
"""It is tight no more when this far below the watermark: else it would be so every other moment."""

_UNLIMITED = 1 << 60
"""cgroup v1 writes a number of pages near 2^63 for "no limit"."""


class Headroom:
    """Memory of this process's container, or of this process.

    Args:
        watermark: share of the limit above which it is tight; 0: never.
        root: where /proc and /sys are, for tests.
        now: seconds of a clock that only rises.
    """

    def __init__(self, watermark: float, root: Path = Path("/"), now: Callable[[], float] = time.monotonic) -> None:
        self._watermark = watermark
        self._root = root
        self._now = now
        self._cgroup = _limiting_cgroup(root)
        self.limit = self._cgroup[0] if self._cgroup else _machine_bytes(root)
        """Bytes that may be used."""
        self.used = 0
        """Bytes, at the last look."""
        self._tight = False
        self._looked = -LOOK_S

    @property
    def tight(self) -> bool:
        """Whether nothing new should be taken on; looks at most twice a second."""
        if self._watermark and self._now() - self._looked >= LOOK_S:
            self._looked = self._now()
            self.used = self._use()
            share = self.used / self.limit if self.limit else 0.0
            self._tight = share > (self._watermark - EASE if self._tight else self._watermark)
        return self._tight

    def _use(self) -> int:
        if self._cgroup is None:
            return _resident_bytes(self._root)
        _, folder, current, cache = self._cgroup
        return max(0, (_number(folder / current) or 0) - _field(folder / "memory.stat", cache))

    def __str__(self) -> str:
        """For people."""
        return f"{self.used >> 20} of {self.limit >> 20} MiB, watermark {self._watermark:.0%}"


def _limiting_cgroup(root: Path) -> tuple[int, Path, str, str] | None:
    """Limit, folder, file of the usage and field of the file cache: of the tightest cgroup above this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            found += _walk(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            found += _walk(base, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return min(found, key=lambda one: one[0], default=None)


def _walk(base: Path, path: str, limit: str, current: str, cache: str) -> list[tuple[int, Path, str, str]]:
    """Every limit from a cgroup up to the root. A path that is not mounted here is of the host: the root is ours."""
    found = []
    folder = base / path.strip("/")
    for place in (folder, *folder.parents):
        bound = _number(place / limit)
        if bound is not None and bound < _UNLIMITED:
            found.append((bound, place, current, cache))
        if place == base:
            break
    return found


def _number(path: Path) -> int | None:
    """A file's number; None if there is none ("max" among others)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int:
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _machine_bytes(root: Path) -> int:
    kib = _field_of_meminfo(root / "proc/meminfo")
    return kib << 10 if kib else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _field_of_meminfo(path: Path) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _resident_bytes(root: Path) -> int:
    try:
        return int((root / "proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
