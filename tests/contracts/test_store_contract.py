"""What every store must hold to; a new backend inherits `StoreContract`.

Each test names what breaks in the cluster if it fails.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paramesh.errors import ConfigError, ParameshError
from paramesh_coordinator.store import MemoryStore, MetaStore, SqliteStore, StoreConflict, StoreError
from paramesh_coordinator.store.memory import MemoryMedium

KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\U0010ffff"), min_size=1, max_size=4)


class StoreContract:
    """Inherit, and give `reopen`: a new handle on the same medium; the first on an empty one."""

    @pytest.fixture
    def store(self) -> MetaStore:
        store = self.reopen()
        yield store
        store.close()

    @pytest.fixture(autouse=True)
    def medium(self, tmp_path: Path) -> None:
        """Make an empty medium."""
        raise AssertionError("a backend overrides this")

    def reopen(self) -> MetaStore:
        raise AssertionError("a backend overrides this")

    def reopen_beside(self, store: MetaStore) -> MetaStore:
        """A second handle while the first is open, as after a takeover."""
        return self.reopen()

    def test_an_absent_key_is_none(self, store: MetaStore) -> None:
        assert store.get("nothing") is None
        assert store.scan("") == []

    def test_what_was_written_is_read(self, store: MetaStore) -> None:
        store.transact({}, {"a": b"1", "b": b"", "c": bytes(range(256))})
        assert store.get("a") == b"1"
        assert store.get("b") == b""
        assert store.get("c") == bytes(range(256))

    def test_writes_replace_and_none_deletes(self, store: MetaStore) -> None:
        store.transact({}, {"a": b"1", "b": b"1"})
        store.transact({}, {"a": b"2", "b": None, "never": None})
        assert store.scan("") == [("a", b"2")]

    def test_scan_takes_prefix_start_and_limit_in_key_order(self, store: MetaStore) -> None:
        keys = ["x/3", "x/1", "x/20", "y/1", "x", "x/\u00e9"]
        store.transact({}, {key: key.encode() for key in keys})
        assert [k for k, _ in store.scan("x/")] == ["x/1", "x/20", "x/3", "x/\u00e9"]
        assert [k for k, _ in store.scan("x/", start="x/2")] == ["x/20", "x/3", "x/\u00e9"]
        assert [k for k, _ in store.scan("x/", start="x/2", limit=2)] == ["x/20", "x/3"]
        assert store.scan("x/", limit=0) == []

    def test_prefixes_are_no_patterns(self, store: MetaStore) -> None:
        store.transact({}, {"a%b": b"1", "a_b": b"2", "axb": b"3", "a'; DROP TABLE rows; --": b"4"})
        assert [k for k, _ in store.scan("a%")] == ["a%b"]
        assert [k for k, _ in store.scan("a_")] == ["a_b"]
        assert store.get("a'; DROP TABLE rows; --") == b"4"

    @pytest.mark.parametrize("compare", [{"a": b"other"}, {"a": None}, {"absent": b"1"}])
    def test_a_failed_comparison_commits_nothing(self, store: MetaStore, compare: dict[str, bytes | None]) -> None:
        store.transact({}, {"a": b"1"})
        with pytest.raises(StoreConflict) as caught:
            store.transact(compare, {"a": b"2", "b": b"2"})
        assert caught.value.metadata["key"] in compare
        assert store.scan("") == [("a", b"1")]

    def test_a_comparison_that_holds_lets_through(self, store: MetaStore) -> None:
        store.transact({"a": None}, {"a": b"1"})
        store.transact({"a": b"1", "b": None}, {"a": b"2"})
        assert store.get("a") == b"2"

    def test_rows_and_term_outlive_the_handle(self, store: MetaStore) -> None:
        store.transact({}, {"a": b"1"})
        term = store.term
        store.close()
        again = self.reopen()
        assert again.get("a") == b"1"
        assert again.term == term + 1
        again.close()

    def test_the_first_term_is_one(self, store: MetaStore) -> None:
        assert store.term == 1

    def test_a_later_handle_makes_the_older_ones_transactions_fail(self, store: MetaStore) -> None:
        """Else a paused coordinator commits after its successor has decided otherwise (row 15)."""
        store.transact({}, {"a": b"1"})
        newer = self.reopen_beside(store)
        assert newer.term == store.term + 1
        with pytest.raises(ParameshError) as caught:
            store.transact({}, {"a": b"stale"})
        assert caught.value.reason == "STALE_TERM"
        newer.transact({"a": b"1"}, {"a": b"2"})
        assert newer.get("a") == b"2"
        newer.close()

    def test_a_watch_hears_the_keys_of_its_prefix_after_the_commit(self, store: MetaStore) -> None:
        heard: list[frozenset[str]] = []
        stop = store.watch("x/", heard.append)
        store.transact({}, {"x/1": b"1", "x/2": b"1", "y": b"1"})
        store.transact({}, {"y": b"2"})
        with pytest.raises(StoreConflict):
            store.transact({"y": None}, {"x/3": b"1"})
        stop()
        store.transact({}, {"x/1": None})
        assert heard == [frozenset({"x/1", "x/2"})]

    def test_threads_do_not_tear_each_others_transactions(self, store: MetaStore) -> None:
        def add(name: str) -> None:
            for number in range(50):
                store.transact({}, {f"{name}/a": b"%d" % number, f"{name}/b": b"%d" % number})
                pairs = dict(store.scan(f"{name}/"))
                assert pairs[f"{name}/a"] == pairs[f"{name}/b"]

        threads = [threading.Thread(target=add, args=(str(n),)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [v for _, v in store.scan("")] == [b"49"] * 6

    def test_a_term_can_be_lifted_and_goes_on_from_there(self, store: MetaStore) -> None:
        """Rows that come from another store: servers refuse the orders of a lower term."""
        store.transact({}, {"a": b"1"})
        store.lift(41)
        store.transact({"a": b"1"}, {"a": b"2"})
        store.lift(7)
        assert store.term == 41
        newer = self.reopen_beside(store)
        assert (newer.term, newer.get("a")) == (42, b"2")
        with pytest.raises(ParameshError) as caught:
            store.lift(99)
        assert caught.value.reason == "STALE_TERM"
        newer.close()

    def test_close_is_repeatable(self, store: MetaStore) -> None:
        store.close()
        store.close()

    # The store is emptied by each example, and inheriting a property is what a contract is for.
    @settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(
        st.lists(st.dictionaries(KEYS, st.none() | st.binary(max_size=4), max_size=4), max_size=6),
        KEYS,
    )
    def test_it_is_a_sorted_dictionary(
        self, store: MetaStore, transactions: list[dict[str, bytes | None]], prefix: str
    ) -> None:
        store.transact({}, {key: None for key, _ in store.scan("")})
        model: dict[str, bytes] = {}
        for writes in transactions:
            store.transact({key: model.get(key) for key in writes}, writes)
            model.update({k: v for k, v in writes.items() if v is not None})
            model = {k: v for k, v in model.items() if writes.get(k, v) is not None}
        assert store.scan("") == sorted(model.items())
        assert store.scan(prefix) == sorted((k, v) for k, v in model.items() if k.startswith(prefix))


class TestMemoryStore(StoreContract):
    """The store of tests and --ephemeral."""

    @pytest.fixture(autouse=True)
    def medium(self) -> None:
        self._medium = MemoryMedium()

    def reopen(self) -> MetaStore:
        return MemoryStore(self._medium)


class TestSqliteStore(StoreContract):
    """The store of a real cluster, and what only a file can get wrong."""

    @pytest.fixture(autouse=True)
    def medium(self, tmp_path: Path) -> None:
        self.path = tmp_path / "run" / "coordinator.sqlite"

    def reopen(self) -> MetaStore:
        return SqliteStore.open(self.path)

    def reopen_beside(self, store: MetaStore) -> MetaStore:
        # Somebody removed the lock file by hand: the term must still hold.
        Path(f"{self.path}.lock").unlink()
        return self.reopen()

    def test_a_second_coordinator_is_refused_at_once(self, store: MetaStore) -> None:
        with pytest.raises(ConfigError, match=rf"in use by another coordinator \(pid {os.getpid()}\)"):
            self.reopen()
        store.transact({}, {"a": b"1"})  # and the first does not notice

    def test_a_link_to_the_file_is_the_same_file(self, store: MetaStore, tmp_path: Path) -> None:
        link = tmp_path / "link.sqlite"
        link.symlink_to(self.path)
        with pytest.raises(ConfigError, match="in use"):
            SqliteStore.open(link)

    def test_the_lock_dies_with_its_process(self) -> None:
        code = (
            "import sys, pathlib, time; from paramesh_coordinator.store import SqliteStore\n"
            "s = SqliteStore.open(pathlib.Path(sys.argv[1])); s.transact({}, {'a': b'1'})\n"
            "print('ready', flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", code, str(self.path)], stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            with pytest.raises(ConfigError, match=f"pid {holder.pid}"):
                self.reopen()
            holder.send_signal(signal.SIGKILL)
            holder.wait(10)
        store = self.reopen()
        assert (store.get("a"), store.term) == (b"1", 2)
        store.close()

    def test_nobody_else_may_read_it(self, store: MetaStore) -> None:
        store.transact({}, {"a": b"1"})
        for path in self.path.parent.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path

    def test_an_existing_file_is_made_private(self) -> None:
        self.reopen().close()
        self.path.chmod(0o644)
        self.reopen().close()
        assert stat.S_IMODE(self.path.stat().st_mode) == 0o600

    def test_commits_are_synchronous_and_in_a_log(self, store: MetaStore) -> None:
        db = store._db
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    def test_a_newer_schema_is_refused_and_left_alone(self) -> None:
        self.reopen().close()
        with sqlite3.connect(self.path) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
        before = self.path.read_bytes()
        with pytest.raises(ConfigError, match="schema version 99"):
            self.reopen()
        assert self.path.read_bytes() == before

    @pytest.mark.parametrize("content", [b"not a database, but long enough to be looked at" * 100, b"\0" * 4096])
    def test_another_file_is_refused_and_left_alone(self, content: bytes) -> None:
        self.path.parent.mkdir(parents=True)
        self.path.write_bytes(content)
        with pytest.raises(ConfigError, match="state: "):
            self.reopen()
        assert self.path.read_bytes() == content

    def test_somebody_elses_database_is_refused(self) -> None:
        self.path.parent.mkdir(parents=True)
        db = sqlite3.connect(self.path)
        db.execute("CREATE TABLE theirs (a)")
        db.commit()
        db.close()
        with pytest.raises(ConfigError, match="schema version 0"):
            self.reopen()

    def test_a_folder_that_cannot_be_used_is_a_clear_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="state: "):
            SqliteStore.open(tmp_path / "file" / "coordinator.sqlite")

    def test_a_full_disk_commits_nothing_and_says_so(self, store: MetaStore) -> None:
        """Row 34: no decisions, no wrong ones; and when there is room again it goes on."""
        store.transact({}, {"a": b"1"})
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError) as caught:
            store.transact({}, {"a": b"2", "big": bytes(1 << 20)})
        assert caught.value.reason == "NOT_READY"
        assert store.scan("") == [("a", b"1")]
        store._db.execute("PRAGMA max_page_count = 1073741823")
        store.transact({}, {"a": b"3"})
        assert store.get("a") == b"3"

    def test_a_closed_store_refuses(self, store: MetaStore) -> None:
        store.close()
        with pytest.raises(StoreError, match="closed"):
            store.get("a")
