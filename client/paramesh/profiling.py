"""Where the wall time of a training loop goes.

    with paramesh.profile() as profile:
        train()
    sys.stderr.write(profile.table())

The library brackets what it does with `phase("push")`; that costs one context-variable
read while nobody profiles.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

__all__ = ["Phase", "Profile", "phase", "profile"]


@dataclass
class Phase:
    """One kind of work: how often it ran and how long it took in all."""

    calls: int = 0
    seconds: float = 0.0
    longest: float = 0.0


@dataclass
class Profile:
    """Wall times of the phases of one `paramesh.profile()` block.

    Phases may nest (a step contains its push); their shares need not add up to one.
    """

    seconds: float = 0.0
    """Wall time of the whole block; 0 until it ends."""
    phases: dict[str, Phase] = field(default_factory=dict)
    """By name, in order of first use."""

    def add(self, name: str, seconds: float) -> None:
        """Count one run of a phase."""
        entry = self.phases.setdefault(name, Phase())
        entry.calls += 1
        entry.seconds += seconds
        entry.longest = max(entry.longest, seconds)

    def table(self) -> str:
        """The phases as a text table, longest in all first; one line each, times in ms."""
        lines = [f"{'phase':<16} {'calls':>8} {'mean ms':>10} {'max ms':>10} {'total s':>9} {'share':>7}"]
        whole = self.seconds or sum(entry.seconds for entry in self.phases.values()) or 1.0
        for name, entry in sorted(self.phases.items(), key=lambda item: -item[1].seconds):
            mean = 1e3 * entry.seconds / entry.calls
            lines.append(
                f"{name:<16} {entry.calls:>8} {mean:>10.3f} {1e3 * entry.longest:>10.3f}"
                f" {entry.seconds:>9.3f} {entry.seconds / whole:>7.1%}"
            )
        lines.append(f"{'wall time':<16} {'':>8} {'':>10} {'':>10} {self.seconds:>9.3f}")
        return "\n".join(lines) + "\n"


_active: ContextVar[Profile | None] = ContextVar("paramesh_profile", default=None)


@contextlib.contextmanager
def profile() -> Iterator[Profile]:
    """Gather wall times of what the library does in this block, on this thread.

    Yields:
        A `Profile`, filled as the block runs; `profile.table()` shows it.
    """
    gathered = Profile()
    token = _active.set(gathered)
    began = time.perf_counter()
    try:
        yield gathered
    finally:
        gathered.seconds = time.perf_counter() - began
        _active.reset(token)


class _Timer:
    """Adds the time of a `with` block to a profile."""

    __slots__ = ("_began", "_name", "_profile")

    def __init__(self, gathered: Profile, name: str):
        self._profile = gathered
        self._name = name
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._profile.add(self._name, time.perf_counter() - self._began)


_NOTHING = contextlib.nullcontext()


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """A context manager that brackets a piece of the library's work, such as "pull"."""
    gathered = _active.get()
    return _NOTHING if gathered is None else _Timer(gathered, name)
