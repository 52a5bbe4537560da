"""The contract of a store, which tests/contracts/test_store_contract.py holds every backend to.

store = SqliteStore.open(path)                # raises the term: we are the newest coordinator
store.transact({"job": old}, {"job": new})    # all or nothing, and only under our term
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from paramesh.errors import ParameshError

__all__ = ["MetaStore", "StoreConflict", "StoreError", "Watchers"]

Watcher = Callable[[frozenset[str]], None]
"""Called with the keys of one commit that match the watched prefix."""


class StoreError(ParameshError):
    """The store cannot be read or written now (disk full, damaged); nothing was committed."""

    def __init__(self, message: str):
        super().__init__(message, reason="NOT_READY")


class StoreConflict(ParameshError):
    """A compared key holds something else; nothing was committed."""

    def __init__(self, message: str, key: str):
        super().__init__(message, reason="INTERNAL", metadata={"key": key})


class MetaStore(Protocol):
    """Keys to bytes, with transactions that are refused once a newer coordinator has opened it.

    Thread-safe. Keys sort as their UTF-8 bytes do.
    """

    @property
    def term(self) -> int:
        """The counter that opening this handle raised; from 1."""

    def get(self, key: str) -> bytes | None:
        """The value of a key, or None."""

    def scan(self, prefix: str, start: str = "", limit: int | None = None) -> list[tuple[str, bytes]]:
        """Pairs whose key begins with `prefix` and is >= `start`, in key order."""

    def transact(self, compare: Mapping[str, bytes | None], writes: Mapping[str, bytes | None]) -> None:
        """Commit all writes or none; durable when it returns.

        Args:
            compare: keys and what they must hold now; None: must be absent.
            writes: keys and what they hold afterwards; None deletes.

        Raises:
            StateRefused: STALE_TERM, if the store was opened again since.
            StoreConflict: a comparison failed.
            StoreError: the medium failed.
        """

    def watch(self, prefix: str, watcher: Watcher) -> Callable[[], None]:
        """Call `watcher` after each commit of this handle that touches `prefix`.

        It is called in the thread that commits, must not block and must not call the store.

        Returns:
            A function that ends the watch.
        """

    def lift(self, term: int) -> None:
        """Make the term at least `term`, so that rows that came from another store go on after it.

        Raises:
            StateRefused: STALE_TERM, if the store was opened again since.
            StoreError: the medium failed.
        """

    def when_over(self, callback: Callable[[ParameshError], None]) -> None:
        """Call `callback`, in any thread, if this handle is known to be over before a commit shows it."""

    def close(self) -> None:
        """Let go of the store. Repeatable."""


class Watchers:
    """The watchers of one handle."""

    def __init__(self) -> None:
        self._watchers: list[tuple[str, Watcher]] = []

    def add(self, prefix: str, watcher: Watcher) -> Callable[[], None]:
        """Add one; returns the function that removes it."""
        entry = (prefix, watcher)
        self._watchers.append(entry)

        def remove() -> None:
            if entry in self._watchers:
                self._watchers.remove(entry)

        return remove

    def tell(self, keys: Iterable[str]) -> None:
        """Tell each watcher the keys that match its prefix, if any."""
        touched = frozenset(keys)
        for prefix, watcher in tuple(self._watchers):
            matching = frozenset(key for key in touched if key.startswith(prefix))
            if matching:
                watcher(matching)
