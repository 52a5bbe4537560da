"""A store that lives and dies with its process: for tests and `--ephemeral`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from paramesh.errors import ParameshError, refuse

from paramesh_coordinator.store.base import StoreConflict, Watcher, Watchers

__all__ = ["MemoryMedium", "MemoryStore"]


class MemoryMedium:
    """What survives a handle, as a file does; hand it to the next `MemoryStore`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rows: dict[str, bytes] = {}
        self.term = 0


class MemoryStore:
    """A handle on a medium; see `MetaStore`."""

    def __init__(self, medium: MemoryMedium | None = None):
        self._medium = medium or MemoryMedium()
        self._watchers = Watchers()
        with self._medium.lock:
            self._medium.term += 1
            self._term = self._medium.term

    @property
    def term(self) -> int:
        """The term of this handle."""
        return self._term

    def get(self, key: str) -> bytes | None:
        """The value of a key, or None."""
        with self._medium.lock:
            return self._medium.rows.get(key)

    def scan(self, prefix: str, start: str = "", limit: int | None = None) -> list[tuple[str, bytes]]:
        """Pairs with the prefix, from `start`, in key order."""
        with self._medium.lock:
            pairs = [(k, v) for k, v in self._medium.rows.items() if k.startswith(prefix) and k >= start]
        return sorted(pairs)[:limit]

    def transact(self, compare: Mapping[str, bytes | None], writes: Mapping[str, bytes | None]) -> None:
        """Commit all or nothing."""
        with self._medium.lock:
            if self._medium.term != self._term:
                raise refuse("STALE_TERM", f"term {self._term} is over; term {self._medium.term} is in charge")
            for key, expected in compare.items():
                if self._medium.rows.get(key) != expected:
                    raise StoreConflict(f"{key!r} was changed by somebody else", key)
            for key, value in writes.items():
                if value is None:
                    self._medium.rows.pop(key, None)
                else:
                    self._medium.rows[key] = value
        self._watchers.tell(writes)

    def watch(self, prefix: str, watcher: Watcher) -> Callable[[], None]:
        """Call `watcher` after each commit that touches `prefix`."""
        return self._watchers.add(prefix, watcher)

    def lift(self, term: int) -> None:
        """Make the term at least `term`."""
        with self._medium.lock:
            if self._medium.term != self._term:
                raise refuse("STALE_TERM", f"term {self._term} is over; term {self._medium.term} is in charge")
            self._term = self._medium.term = max(self._term, term)

    def when_over(self, callback: Callable[[ParameshError], None]) -> None:
        """A newer handle is noticed by the next commit only."""

    def close(self) -> None:
        """Nothing to let go of."""
