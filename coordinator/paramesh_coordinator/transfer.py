"""Moves a coordinator's rows from one store to another, offline, and proves it: psctl meta move.

    report = move_state(open_state("run.sqlite"), open_state("etcd://127.0.0.1:2379/paramesh/run-7"))

While it is under way, and after it, a store that must not be started on holds a row that no
coordinator can read: the target until its rows were compared with the source's, the source
from then on. Terms go on: servers refuse the orders of a lower one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from paramesh.errors import ConfigError

from paramesh_coordinator.rows import JobRow, decode
from paramesh_coordinator.store import MetaStore, SqliteStore
from paramesh_coordinator.store.etcd import EtcdStore
from paramesh_coordinator.store.etcd_target import SCHEME, EtcdTarget

__all__ = ["Moved", "check_not_moved", "move_state", "open_state", "write_state"]

MARK = "moved"
"""The row that keeps coordinators off; its value says why."""

BATCH_ROWS, BATCH_BYTES = 1000, 512 << 10
"""Of one transaction: well below what etcd takes in one request (1.5 MiB)."""


@dataclass(frozen=True)
class Moved:
    """What was moved."""

    rows: int
    digest: str
    """Of all keys and values, equal at both ends."""
    term: int
    """The next coordinator's is above it."""


def open_state(text: str) -> MetaStore:
    """Open what `--state` would; the term rises.

    Raises:
        ConfigError: `state`: it cannot be used, or a coordinator has it open.
        StoreError: etcd does not answer.
    """
    if not text.startswith(SCHEME):
        return SqliteStore.open(Path(text))
    target = EtcdTarget.parse(text)
    won = EtcdStore.campaign(target, "")
    if isinstance(won, EtcdStore):
        return won
    raise _wrong(f"{target} is in use by the coordinator at {won.address or '?'}; stop all coordinators first")


def check_not_moved(store: MetaStore) -> None:
    """Refuse a store whose rows are elsewhere.

    Raises:
        ConfigError: `state`: they were moved, or are being moved.
    """
    found = store.get(MARK)
    if found is not None:
        raise _wrong(found.decode(errors="replace"))


def move_state(source: MetaStore, target: MetaStore, names: tuple[str, str]) -> Moved:
    """Copy every row, compare, and make the source unusable. Both stay open.

    Args:
        source: what was used until now.
        target: empty, or itself moved away from before.
        names: of source and target, for the marks.

    Raises:
        ConfigError: `state`: the source holds no cluster, or the target holds one.
        StoreError: a medium failed; the source is as it was, the move may be repeated.
    """
    moved = f"the rows were moved to {names[1]}: give --state that".encode()
    if source.get(MARK) != moved or target.get(MARK) is None:  # else the last two writes of a move are missing
        check_not_moved(source)
    rows = [row for row in source.scan("") if row[0] != MARK]
    if not any(key == JobRow.PREFIX for key, _ in rows):
        raise _wrong(f"{names[0]} holds no cluster")
    for key, value in rows:
        try:
            decode(key, value)
        except ValueError as error:
            raise _wrong(f"{names[0]}: {error}") from error
    digest = _fill(target, rows, source.term, names[1], f"a move from {names[0]} is not complete: repeat it")
    # The source first: between the two nobody can start on either, and repeating the move mends that.
    source.transact({}, {MARK: moved})
    target.transact({}, {MARK: None})
    return Moved(len(rows), digest, target.term)


def write_state(target: MetaStore, rows: Sequence[tuple[str, bytes]], term: int, name: str) -> Moved:
    """Write rows that were made anew: all of them, or a store that no coordinator starts on.

    Args:
        target: empty, or left by a write that broke off.
        rows: in key order.
        term: the next coordinator's is above it.
        name: of the target, for errors.

    Raises:
        ConfigError: `state`: the target holds a cluster.
        StoreError: the medium failed; it may be repeated.
    """
    digest = _fill(target, rows, term, name, "making this state anew is not complete: repeat psctl meta rebuild")
    target.transact({}, {MARK: None})
    return Moved(len(rows), digest, target.term)


def _fill(target: MetaStore, rows: Sequence[tuple[str, bytes]], term: int, name: str, incomplete: str) -> str:
    """Everything but the mark's end; the digest of what is there."""
    _empty(target, name, incomplete)
    for batch in _batches(rows):
        target.transact({}, dict(batch))
    wanted, found = _digest(rows), _digest([row for row in target.scan("") if row[0] != MARK])
    if found != wanted:
        raise _wrong(f"{name} does not hold what was written to it; nothing was moved")
    target.lift(term)
    return wanted


def _empty(target: MetaStore, name: str, incomplete: str) -> None:
    """Mark the target as incomplete, then clear what an earlier or broken move left there."""
    rows = target.scan("")
    if rows and target.get(MARK) is None:
        raise _wrong(f"{name} holds a cluster already; give an empty one")
    target.transact({}, {MARK: incomplete.encode()})
    for batch in _batches([row for row in rows if row[0] != MARK]):
        target.transact({}, dict.fromkeys(key for key, _ in batch))


def _batches(rows: Sequence[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    batch: list[tuple[str, bytes]] = []
    size = 0
    for key, value in rows:
        if batch and (len(batch) == BATCH_ROWS or size + len(key) + len(value) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((key, value))
        size += len(key) + len(value)
    if batch:
        yield batch


def _digest(rows: Sequence[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for key, value in rows:
        name = key.encode()
        digest.update(b"%d %d " % (len(name), len(value)) + name + value)
    return digest.hexdigest()


def _wrong(problem: str) -> ConfigError:
    return ConfigError(f"state: {problem}", metadata={"key": "state"})
