"""The store in one SQLite file: WAL, synchronous=FULL, one writer.

Two guards, because each alone has a hole. The file lock refuses a second coordinator at
once; the term, compared in every transaction, stops an old one if the lock was got round
(a lock file removed by hand, a file system without locks).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from paramesh.errors import ConfigError, ParameshError, refuse

from paramesh_coordinator.store.base import StoreConflict, StoreError, Watcher, Watchers

__all__ = ["SCHEMA_VERSION", "SqliteStore"]

SCHEMA_VERSION = 2
"""Of the file. Raised when an older release could not read the rows of this one: 2 has in-sync sets."""

READABLE = frozenset({1, SCHEMA_VERSION})
"""Versions whose rows this release reads; opening raises the file's to the newest."""

PRIVATE = 0o600
"""The file names addresses and job structure; nobody else's business."""


class SqliteStore:
    """A handle on one file; see `MetaStore`."""

    def __init__(self, path: Path, db: sqlite3.Connection, lock_file: int, term: int):
        self._path = path
        self._db = db
        self._lock_file = lock_file
        self._term = term
        self._mutex = threading.Lock()
        self._watchers = Watchers()
        self._closed = False

    @classmethod
    def open(cls, path: Path) -> SqliteStore:
        """Open or create the file and raise the term.

        Raises:
            ConfigError: `state`: another coordinator has it open, it is no file of ours, or
                of a newer release, or cannot be written.
        """
        path = Path(os.path.realpath(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock_file = _lock(path)
        except OSError as error:
            raise _wrong(f"{path} cannot be used: {error.strerror or error}") from error
        try:
            db, term = _connect(path)
        except (sqlite3.Error, OSError) as error:
            os.close(lock_file)
            raise _wrong(f"{path} cannot be used as a coordinator's state: {error}") from error
        except ConfigError:
            os.close(lock_file)
            raise
        return cls(path, db, lock_file, term)

    @property
    def term(self) -> int:
        """The term of this handle."""
        return self._term

    def get(self, key: str) -> bytes | None:
        """The value of a key, or None."""
        with self._guarded():
            found = self._db.execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
        return None if found is None else bytes(found[0])

    def scan(self, prefix: str, start: str = "", limit: int | None = None) -> list[tuple[str, bytes]]:
        """Pairs with the prefix, from `start`, in key order."""
        query = "SELECT key, value FROM rows WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"
        # U+10FFFF sorts after every character that a key may hold.
        bounds = (max(prefix, start), prefix + "\U0010ffff", -1 if limit is None else limit)
        with self._guarded():
            return [(key, bytes(value)) for key, value in self._db.execute(query, bounds)]

    def transact(self, compare: Mapping[str, bytes | None], writes: Mapping[str, bytes | None]) -> None:
        """Commit all or nothing; on the disk when it returns."""
        with self._guarded():
            # IMMEDIATE takes the write lock before the comparisons, so nothing slips between.
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._compare(compare)
                for key, value in writes.items():
                    if value is None:
                        self._db.execute("DELETE FROM rows WHERE key = ?", (key,))
                    else:
                        self._db.execute("INSERT OR REPLACE INTO rows (key, value) VALUES (?, ?)", (key, value))
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        self._watchers.tell(writes)

    def _compare(self, compare: Mapping[str, bytes | None]) -> None:
        term = _term(self._db)
        if term != self._term:
            raise refuse("STALE_TERM", f"term {self._term} is over; term {term} is in charge of {self._path.name}")
        for key, expected in compare.items():
            found = self._db.execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
            if (None if found is None else bytes(found[0])) != expected:
                raise StoreConflict(f"{key!r} was changed by somebody else", key)

    def watch(self, prefix: str, watcher: Watcher) -> Callable[[], None]:
        """Call `watcher` after each commit that touches `prefix`."""
        return self._watchers.add(prefix, watcher)

    def lift(self, term: int) -> None:
        """Make the term at least `term`."""
        with self._guarded():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._compare({})
                lifted = max(self._term, term)
                self._db.execute("UPDATE term SET term = ?", (lifted,))
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._term = lifted

    def when_over(self, callback: Callable[[ParameshError], None]) -> None:
        """A newer handle is noticed by the next commit only."""

    def close(self) -> None:
        """Close the file and give up the lock. Repeatable."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            self._db.close()
            os.close(self._lock_file)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        with self._mutex:
            if self._closed:
                raise StoreError(f"the store {self._path.name} is closed")
            try:
                yield
            except sqlite3.Error as error:
                raise StoreError(f"the store {self._path.name} failed: {error}") from error


def _lock(path: Path) -> int:
    """Lock `<path>.lock` until the process ends, however it ends."""
    lock_file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock_file, 32, 0).decode(errors="replace").strip() or "?"
        os.close(lock_file)
        raise _wrong(
            f"{path} is in use by another coordinator (pid {holder}); stop that one first, or give this one "
            "another file"
        ) from None
    except OSError:
        os.close(lock_file)
        raise
    os.ftruncate(lock_file, 0)
    os.pwrite(lock_file, str(os.getpid()).encode(), 0)
    return lock_file


def _connect(path: Path) -> tuple[sqlite3.Connection, int]:
    # Created by us first: SQLite would create it readable to others, and gives its -wal
    # and -shm files the mode of the main file.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE))
    os.chmod(path, PRIVATE)
    db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        # FULL: a commit is on the disk before anybody acts on it; NORMAL may lose the last
        # ones in a power cut, and then ids or epochs would be used twice.
        db.execute("PRAGMA synchronous = FULL")
        _migrate(db, path)
        return db, _raise_term(db, path)
    except BaseException:
        db.close()
        raise


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if version == SCHEMA_VERSION:
        return
    if version in READABLE:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION:d}")
        return
    if version or tables:
        raise _wrong(
            f"{path} has schema version {version}, this release reads {min(READABLE)} to {SCHEMA_VERSION}; "
            "use the release that wrote it, or another file"
        )
    db.execute("BEGIN IMMEDIATE")
    db.execute("CREATE TABLE rows (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
    db.execute("CREATE TABLE term (one INTEGER PRIMARY KEY CHECK (one = 1), term INTEGER NOT NULL)")
    db.execute("INSERT INTO term VALUES (1, 0)")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION:d}")
    db.execute("COMMIT")


def _raise_term(db: sqlite3.Connection, path: Path) -> int:
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE term SET term = term + 1")
    term = _term(db)
    db.execute("COMMIT")
    if not term:
        raise _wrong(f"{path} has no term; it is damaged")
    return term


def _term(db: sqlite3.Connection) -> int:
    found = db.execute("SELECT term FROM term").fetchone()
    return int(found[0]) if found else 0


def _wrong(problem: str) -> ConfigError:
    return ConfigError(f"state: {problem}", metadata={"key": "state"})
