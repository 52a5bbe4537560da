"""Moving the coordinator's rows: all or nothing, both ways, and nobody starts on the wrong place."""

from __future__ import annotations

from pathlib import Path

import pytest
from paramesh.errors import ConfigError
from paramesh_coordinator.config import CoordinatorConfig
from paramesh_coordinator.driver import fresh_job
from paramesh_coordinator.rows import JobRow, encode
from paramesh_coordinator.store import MemoryStore, SqliteStore, StoreError
from paramesh_coordinator.store.memory import MemoryMedium
from paramesh_coordinator.transfer import MARK, check_not_moved, move_state

NAMES = ("from.sqlite", "etcd://h:1/p")
ROWS = {JobRow.PREFIX: encode(fresh_job(CoordinatorConfig()))}


def filled(term: int = 5) -> MemoryStore:
    store = MemoryStore()
    store.transact({}, ROWS)
    store.lift(term)
    return store


def test_rows_and_terms_go_on_elsewhere_and_the_old_place_is_closed() -> None:
    source, medium = filled(), MemoryMedium()
    moved = move_state(source, MemoryStore(medium), NAMES)
    target = MemoryStore(medium)
    assert (dict(target.scan("")), target.term, moved.rows) == (ROWS, 6, 1)
    check_not_moved(target)
    with pytest.raises(ConfigError, match="moved to etcd://h:1/p: give --state that"):
        check_not_moved(source)
    with pytest.raises(ConfigError, match="moved to"):
        move_state(source, MemoryStore(), ("from.sqlite", "elsewhere"))


def test_there_and_back(tmp_path: Path) -> None:
    first, second = SqliteStore.open(tmp_path / "a"), MemoryStore()
    first.transact({}, ROWS)
    move_state(first, second, ("a", "b"))
    second.transact({}, {"client/1": None})
    move_state(second, first, ("b", "a"))
    check_not_moved(first)
    assert dict(first.scan("")) == ROWS
    first.close()


@pytest.mark.parametrize("broken", range(1, 6))
def test_a_move_that_breaks_anywhere_can_be_repeated_and_leaves_at_most_one_place_to_start_on(broken: int) -> None:
    class Breaking(MemoryStore):
        left = broken

        def transact(self, compare, writes) -> None:
            type(self).left -= 1
            if not type(self).left:
                raise StoreError("the medium failed")
            super().transact(compare, writes)

    source_medium, target_medium = MemoryMedium(), MemoryMedium()
    first = MemoryStore(source_medium)
    first.transact({}, ROWS)
    if broken < 5:
        with pytest.raises(StoreError):
            move_state(Breaking(source_medium), Breaking(target_medium), NAMES)
    startable = [m for m in (source_medium, target_medium) if MARK not in m.rows and m.rows]
    assert len(startable) <= 1
    if broken < 5:
        move_state(MemoryStore(source_medium), MemoryStore(target_medium), NAMES)
        assert target_medium.rows == ROWS
        assert MARK in source_medium.rows


def test_what_is_no_cluster_or_holds_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no cluster"):
        move_state(MemoryStore(), MemoryStore(), NAMES)
    with pytest.raises(ConfigError, match="holds a cluster already"):
        move_state(filled(), filled(), NAMES)
    odd = filled()
    odd.transact({}, {"what": b"?"})
    with pytest.raises(ConfigError, match="unknown key"):
        move_state(odd, MemoryStore(), NAMES)
