"""The store in etcd: the contract on a real etcd, and what only leases and networks can get wrong."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from paramesh.errors import ConfigError, ParameshError
from paramesh_coordinator.config import CoordinatorConfig
from paramesh_coordinator.driver import fresh_job
from paramesh_coordinator.psctl import app
from paramesh_coordinator.rows import EventRow, JobRow, encode
from paramesh_coordinator.store import MetaStore, SqliteStore, StoreConflict, StoreError
from paramesh_coordinator.store.etcd import EtcdStore, Leader
from paramesh_coordinator.store.etcd_target import EtcdTarget
from paramesh_coordinator.store.etcdv3 import etcd_pb2 as pb
from typer.testing import CliRunner

from tests.cluster.etcd import Etcd
from tests.cluster.waiting import wait_until
from tests.contracts.test_store_contract import StoreContract

pytestmark = pytest.mark.etcd
_numbers = itertools.count()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    one = Etcd(tmp_path_factory.mktemp("etcd"))
    one.start()
    yield one
    one.stop()


def won(target: EtcdTarget, address: str = "127.0.0.1:1") -> EtcdStore:
    store = EtcdStore.campaign(target, address)
    assert isinstance(store, EtcdStore), store
    return store


def end_lease(store: EtcdStore) -> None:
    """As if it had run out: etcd deletes the leader's key in the same way."""
    store._client.revoke(store._lease, 5.0)


class TestEtcdStore(StoreContract):
    """The store of several coordinators."""

    @pytest.fixture(autouse=True)
    def medium(self, etcd: Etcd) -> None:
        self.target = EtcdTarget((etcd.endpoint,), f"paramesh/test-{next(_numbers)}")

    def reopen(self) -> MetaStore:
        return won(self.target)

    def reopen_beside(self, store: MetaStore) -> MetaStore:
        assert isinstance(store, EtcdStore)
        end_lease(store)
        return self.reopen()

    def test_while_one_leads_others_are_told_its_address(self) -> None:
        store = won(self.target, "host-a:7070")
        assert EtcdStore.campaign(self.target, "host-b:7070") == Leader("host-a:7070", 1)
        store.transact({}, {"a": b"1"})
        store.close()
        again = won(self.target, "host-b:7070")
        assert (again.term, again.get("a")) == (2, b"1")
        again.close()

    def test_without_its_lease_it_commits_nothing_even_if_nobody_else_leads(self, store: EtcdStore) -> None:
        end_lease(store)
        with pytest.raises(ParameshError) as caught:
            store.transact({}, {"a": b"late"})
        assert caught.value.reason == "STALE_TERM"
        again = won(self.target)
        assert again.scan("") == []
        again.close()

    def test_who_lost_the_lease_is_told_without_a_commit(self, store: EtcdStore) -> None:
        over = threading.Event()
        store.when_over(lambda error: over.set() if error.reason == "STALE_TERM" else None)
        end_lease(store)
        assert over.wait(10)

    def test_a_transaction_that_came_twice_counts_once(self, store: EtcdStore) -> None:
        """Its answer was lost, so it is sent again: it must neither fail nor be judged by what it wrote itself."""
        request = store._request({"a": None}, {"a": b"1"})
        assert store._client.txn(request, 5.0).succeeded
        store.transact({"a": None}, {"a": b"1"})
        assert store.get("a") == b"1"
        store.transact({"a": b"1"}, {"a": b"2"})
        with pytest.raises(StoreConflict):
            store.transact({"a": b"1"}, {"a": b"3"})

    def test_a_late_copy_of_an_earlier_transaction_changes_nothing(self, store: EtcdStore) -> None:
        late = store._request({}, {"a": b"old"})
        store.transact({}, {"a": b"1"})
        store.transact({}, {"a": b"2"})
        assert not store._client.txn(late, 5.0).succeeded
        assert store.get("a") == b"2"

    @pytest.mark.parametrize("count", [127, 128, 3000, 10_000])
    def test_a_transaction_of_many_rows_is_one(self, store: EtcdStore, count: int) -> None:
        """A lost server is one transaction for all its partitions; etcd takes 128 operations side by side."""
        rows = {f"p/{n:05d}": b"x" * 60 for n in range(count)}
        store.transact({}, rows)
        assert dict(store.scan("")) == rows
        revisions = store._client.range(
            pb.RangeRequest(key=store._row(""), range_end=store._row("\U0010ffff"), limit=count), 5.0
        )
        assert len({kv.mod_revision for kv in revisions.kvs}) == 1
        with pytest.raises(StoreConflict):
            store.transact({"p/00000": b"y"}, dict.fromkeys(rows))
        store.transact({"p/00000": b"x" * 60}, dict.fromkeys(rows))
        assert store.scan("") == []

    def test_what_does_not_fit_is_refused_by_name_and_the_next_goes_on(self, store: EtcdStore) -> None:
        with pytest.raises(StoreError, match="--max-request-bytes") as caught:
            store.transact({}, {"big": bytes(2 << 20), "a": b"1"})
        assert caught.value.reason == "NOT_READY"
        assert store.scan("") == []
        store.transact({}, {"a": b"2"})
        assert store.get("a") == b"2"

    def test_a_newer_schema_is_refused(self, store: EtcdStore) -> None:
        put = pb.PutRequest(key=f"{self.target.prefix}/schema".encode(), value=b"99")
        store._client.txn(pb.TxnRequest(success=[pb.RequestOp(request_put=put)]), 5.0)
        with pytest.raises(ConfigError, match="schema version 99"):
            EtcdStore.campaign(self.target, "")

    def test_prefixes_do_not_see_each_other(self, store: EtcdStore) -> None:
        beside = won(EtcdTarget(self.target.endpoints, self.target.prefix + "0"))
        below = won(EtcdTarget(self.target.endpoints, self.target.prefix + "/below"))
        for one, value in ((store, b"1"), (beside, b"2"), (below, b"3")):
            one.transact({}, {"a": value})
        assert [(one.get("a"), one.term) for one in (store, beside, below)] == [(b"1", 1), (b"2", 1), (b"3", 1)]
        assert [one.scan("") for one in (store, beside)] == [[("a", b"1")], [("a", b"2")]]
        beside.close()
        below.close()

    def test_a_dead_member_is_passed_over(self, store: EtcdStore, etcd: Etcd) -> None:
        store.close()
        several = won(EtcdTarget(("127.0.0.1:9", etcd.endpoint), self.target.prefix))
        several.transact({}, {"a": b"1"})
        assert several.get("a") == b"1"
        several.close()

    def test_a_cluster_moves_here_from_a_file_and_back(self, tmp_path: Path) -> None:
        file, target = str(tmp_path / "run.sqlite"), str(self.target)
        opened = SqliteStore.open(Path(file))
        rows = {f"event/{n:020d}": encode(EventRow(n, 1, 1, "kind", "subject", "x" * 300)) for n in range(5000)}
        rows |= {JobRow.PREFIX: encode(fresh_job(CoordinatorConfig()))}
        opened.transact({}, rows)
        opened.lift(7)
        opened.close()
        for source, into in ((file, target), (target, file)):
            done = CliRunner().invoke(app, ["meta", "move", "--from", source, "--to", into])
            assert done.exit_code == 0, done.output
            assert f"moved rows={len(rows)} sha256=" in done.output
        again = SqliteStore.open(Path(file))
        assert dict(again.scan("")) == rows
        assert again.term > 9
        again.close()
        refused = CliRunner().invoke(app, ["meta", "move", "--from", target, "--to", str(tmp_path / "other")])
        assert refused.exit_code == 1
        assert "moved to" in refused.output

    def test_a_closed_store_refuses(self, store: MetaStore) -> None:
        store.close()
        with pytest.raises(StoreError, match="closed"):
            store.get("a")


def test_an_outage_of_etcd_ends_the_lead_and_the_outcome_is_settled_afterwards(tmp_path: Path) -> None:
    """A commit that nobody answered may have happened: whoever asked must not go on by what it remembers."""
    etcd = Etcd(tmp_path)
    etcd.start()
    target = EtcdTarget((etcd.endpoint,), "paramesh/outage")
    store = won(target)
    store.transact({}, {"a": b"1"})
    etcd.send(signal.SIGSTOP)
    with pytest.raises(ParameshError) as caught:
        store.transact({}, {"a": b"2"})
    assert caught.value.reason == "STALE_TERM"
    etcd.send(signal.SIGCONT)
    again = wait_until(lambda: isinstance(s := EtcdStore.campaign(target, ""), EtcdStore) and s, 20, "the next leader")
    assert again.get("a") in (b"1", b"2")
    assert again.term == 2
    with pytest.raises(ParameshError):
        store.transact({}, {"a": b"3"})
    assert again.get("a") in (b"1", b"2")
    store.close()
    again.close()
    etcd.stop()
