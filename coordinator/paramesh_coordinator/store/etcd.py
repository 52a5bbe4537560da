"""The store in etcd, for several coordinators: whoever holds the lease leads, and only it commits.

    won = EtcdStore.campaign(EtcdTarget.parse("etcd://127.0.0.1:2379/paramesh"), "127.0.0.1:7070")
    if isinstance(won, Leader): ...           # somebody else leads; ask again later

Keys, all under the prefix: `rows/<key>`, the rows; `leader`, tied to the leader's lease, so
that etcd itself deletes it when the leader is gone; `head`, the term and the number of its
transactions; `schema`.

Every transaction compares `leader` (still the very key that this handle created) and `head`
(still what this handle wrote last), and raises `head`. So a coordinator that lost its lease
or whose term is over commits nothing, however late its call arrives; and a transaction that
nobody answered may be repeated: found done, it was the first copy that did it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from paramesh.errors import ConfigError, ParameshError, refuse

from paramesh_coordinator.store.base import StoreConflict, StoreError, Watcher, Watchers
from paramesh_coordinator.store.etcd_client import EtcdClient, EtcdRefused, EtcdSilent, nested, past
from paramesh_coordinator.store.etcd_target import EtcdTarget
from paramesh_coordinator.store.etcdv3 import etcd_pb2 as pb

__all__ = ["EtcdStore", "Leader"]

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
"""Of the rows, as in `sqlite`."""

LEASE_SECONDS = 2
"""etcd's own least, with its default times (1.5 elections). A killed leader's successor comes that much later,
plus what etcd takes to notice (0.5 s) and a look of the standby's."""

RENEW_SECONDS = LEASE_SECONDS / 4
"""Three renewals may be lost before the lease is."""

COMMIT_SECONDS = 5.0
"""How long the outcome of a commit may stay unknown: an election inside etcd takes 1-2 s. Then this coordinator
steps down, since it does not know its own state any more."""

READ_SECONDS = 5.0

PAGE = 1000
"""Keys of one read."""

MAX_COMPARED = 100
"""Keys that one transaction may compare: etcd's 128 operations less ours, with room."""


class Leader(NamedTuple):
    """Who leads now, as it said of itself."""

    address: str
    term: int


class EtcdStore:
    """A handle on one prefix, and the lead; see `MetaStore`."""

    def __init__(self, target: EtcdTarget, client: EtcdClient, lease: int, term: int, created: int):
        self._target = target
        self._client = client
        self._lease = lease
        self._term = term
        self._created = created
        """Revision at which our leader key was created: another's differs, even of the same address."""
        self._done = 0
        """Transactions of this term that are committed."""
        self._mutex = threading.Lock()
        self._watchers = Watchers()
        self._closed = threading.Event()
        self._over: ParameshError | None = None
        self._on_over: list[Callable[[ParameshError], None]] = []
        self._keeper = threading.Thread(target=self._keep, name="paramesh-lease", daemon=True)
        self._keeper.start()

    @classmethod
    def campaign(cls, target: EtcdTarget, address: str, client: EtcdClient | None = None) -> EtcdStore | Leader:
        """Lead, with the term raised, if nobody does.

        Args:
            target: the cluster's place in etcd.
            address: host:port of this coordinator, for those that ask another.
            client: to ask with; the store's from then on, if it is won.

        Returns:
            The store, or who leads.

        Raises:
            ConfigError: `state`: the prefix holds rows of a newer release, or no rows of ours.
            StoreError: etcd does not answer, or refuses.
        """
        asking = client or EtcdClient(target.endpoints)
        won: EtcdStore | Leader | None = None
        try:
            with _typed(target):
                won = cls._campaign(target, address, asking)
            return won
        finally:
            if client is None and not isinstance(won, EtcdStore):
                asking.close()

    @classmethod
    def _campaign(cls, target: EtcdTarget, address: str, client: EtcdClient) -> EtcdStore | Leader:
        found = _look(client, target)
        _check_schema(target, found)
        term = _term_of(found)
        if "leader" in found:
            return _leader(found["leader"], term)
        lease = client.grant(LEASE_SECONDS, READ_SECONDS).ID
        created = _take(client, target, found, lease, address)
        return Leader("", term) if created is None else cls(target, client, lease, term + 1, created)

    @property
    def term(self) -> int:
        """The term of this handle."""
        return self._term

    def get(self, key: str) -> bytes | None:
        """The value of a key, or None."""
        self._check_open()
        with _typed(self._target):
            found = self._client.range(pb.RangeRequest(key=self._row(key)), READ_SECONDS)
        return found.kvs[0].value if found.kvs else None

    def scan(self, prefix: str, start: str = "", limit: int | None = None) -> list[tuple[str, bytes]]:
        """Pairs with the prefix, from `start`, in key order; all of one moment."""
        self._check_open()
        at, end = self._row(max(prefix, start)), past(self._row(prefix))
        skipped, revision = len(self._row("")), 0
        pairs: list[tuple[str, bytes]] = []
        while at < end and (limit is None or len(pairs) < limit):
            wanted = PAGE if limit is None else min(PAGE, limit - len(pairs))
            request = pb.RangeRequest(key=at, range_end=end, limit=wanted, revision=revision)
            with _typed(self._target):
                found = self._client.range(request, READ_SECONDS)
            pairs += [(kv.key[skipped:].decode(), kv.value) for kv in found.kvs]
            if not found.more:
                break
            at, revision = found.kvs[-1].key + b"\0", found.header.revision
        return pairs

    def transact(self, compare: Mapping[str, bytes | None], writes: Mapping[str, bytes | None]) -> None:
        """Commit all or nothing; on the disks of most of etcd's members when it returns."""
        with self._mutex:
            self._check_open()
            if self._over is not None:
                raise self._over
            request = self._request(compare, writes)
            try:
                answer = self._client.txn(request, COMMIT_SECONDS)
            except EtcdSilent as error:
                # It may yet be committed, so this handle knows neither the rows nor what it may compare.
                raise self._end(f"the outcome of a commit is not known: {error}") from error
            except EtcdRefused as error:
                raise StoreError(_remedy(self._target, error)) from error
            if not answer.succeeded:
                self._judge(answer, compare)
            self._done += 1
        self._watchers.tell(writes)

    def watch(self, prefix: str, watcher: Watcher) -> Callable[[], None]:
        """Call `watcher` after each commit of this handle that touches `prefix`."""
        return self._watchers.add(prefix, watcher)

    def lift(self, term: int) -> None:
        """Make the term at least `term`."""
        with self._mutex:
            self._check_open()
            lifted, head = max(self._term, term), _key(self._target, "head")
            leader = _key(self._target, "leader")
            request = pb.TxnRequest(
                compare=[
                    pb.Compare(target=pb.Compare.CREATE, key=leader, create_revision=self._created),
                    _equals(head, self._head(self._done)),
                ],
                success=[_put(head, f"{lifted} 0".encode())],
                failure=[_read(head)],
            )
            with _typed(self._target):
                answer = self._client.txn(request, COMMIT_SECONDS)
            if not answer.succeeded and answer.responses[0].response_range.kvs[0].value != f"{lifted} 0".encode():
                raise self._end(f"term {self._term} is over; another is in charge of {self._target}")
            self._term, self._done = lifted, 0

    def when_over(self, callback: Callable[[ParameshError], None]) -> None:
        """Call `callback`, in any thread, once this handle is known to lead no more."""
        self._on_over.append(callback)
        if self._over is not None:
            callback(self._over)

    def close(self) -> None:
        """Give up the lead, so that another need not wait for the lease to run out. Repeatable."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._keeper.join(LEASE_SECONDS)
        with self._mutex:
            try:
                self._client.revoke(self._lease, 1.0)
            except (EtcdSilent, EtcdRefused) as error:
                log.debug("lease not given back: %s", error)
            self._client.close()

    # --- transactions ----------------------------------------------------------------

    def _row(self, key: str) -> bytes:
        return f"{self._target.prefix}/rows/{key}".encode()

    def _head(self, done: int) -> bytes:
        return f"{self._term} {done}".encode()

    def _request(self, compare: Mapping[str, bytes | None], writes: Mapping[str, bytes | None]) -> pb.TxnRequest:
        if len(compare) > MAX_COMPARED:
            raise refuse("QUOTA", f"{len(compare)} keys compared at once; etcd takes {MAX_COMPARED}")
        leader, head = _key(self._target, "leader"), _key(self._target, "head")
        compared = [
            pb.Compare(target=pb.Compare.CREATE, key=leader, create_revision=self._created),
            _equals(head, self._head(self._done)),
            *(_equals(self._row(key), value) for key, value in compare.items()),
        ]
        ops = [_put(head, self._head(self._done + 1))]
        for key, value in writes.items():
            row = self._row(key)
            ops.append(
                pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=row)) if value is None else _put(row, value)
            )
        looks = [head, leader, *(self._row(key) for key in compare)]
        return pb.TxnRequest(compare=compared, success=nested(ops), failure=[_read(key) for key in looks])

    def _judge(self, answer: pb.TxnResponse, compare: Mapping[str, bytes | None]) -> None:
        """Return if an earlier copy of this transaction was committed after all.

        Raises:
            StateRefused: STALE_TERM.
            StoreConflict: a comparison failed.
        """
        head, leader, *rows = (next(iter(one.response_range.kvs), None) for one in answer.responses)
        if head is not None and head.value == self._head(self._done + 1):
            return
        if head is None or head.value != self._head(self._done):
            term = head.value.split()[0].decode() if head is not None else "none"
            raise self._end(f"term {self._term} is over; term {term} is in charge of {self._target}")
        if leader is None or leader.create_revision != self._created:
            raise self._end(f"the lease of term {self._term} has run out")
        for (key, expected), row in zip(compare.items(), rows, strict=True):
            if (None if row is None else row.value) != expected:
                raise StoreConflict(f"{key!r} was changed by somebody else", key)
        raise StoreError(f"{self._target} refused a transaction although nothing it compared differs")

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise StoreError(f"the store {self._target} is closed")

    # --- the lead --------------------------------------------------------------------

    def _keep(self) -> None:
        """Renew the lease until it is closed, or lost."""
        good_until = time.monotonic() + LEASE_SECONDS
        while not self._closed.wait(RENEW_SECONDS):
            asked = time.monotonic()
            try:
                ttl = self._client.keep_alive(self._lease, max(0.1, good_until - asked))
            except EtcdSilent as error:
                if not self._closed.is_set():
                    self._end(f"the lease of term {self._term} could not be renewed: {error}")
                return
            except EtcdRefused as error:
                self._end(f"the lease of term {self._term} was not renewed: {error}")
                return
            if ttl <= 0:
                self._end(f"the lease of term {self._term} has run out")
                return
            good_until = asked + ttl

    def _end(self, why: str) -> ParameshError:
        """This handle leads no more; the error that says so."""
        if self._over is None:
            self._over = refuse("STALE_TERM", why)
            for callback in tuple(self._on_over):
                callback(self._over)
        return self._over


@contextmanager
def _typed(target: EtcdTarget) -> Iterator[None]:
    """Refusals by etcd of reads and elections as a StoreError."""
    try:
        yield
    except (EtcdSilent, EtcdRefused) as error:
        raise StoreError(_remedy(target, error)) from error


def _remedy(target: EtcdTarget, error: Exception) -> str:
    """What etcd said, and what to do about it where that is known."""
    said = str(error)
    for sign, remedy in _REMEDIES.items():
        if sign in said:
            return f"{target}: {said}; {remedy}"
    return f"{target}: {said}"


_REMEDIES = {
    "request is too large": "start etcd with a larger --max-request-bytes: one decision must fit in one request",
    "larger than max": "start etcd with a larger --max-request-bytes: one decision must fit in one request",
    "too many operations": "start etcd with --max-txn-ops=128 (its default) or more",
    "space exceeded": "etcd is full: compact and defragment it, disarm its alarm, and set "
    "--auto-compaction-retention so that it does not fill again",
    "no answer within": "is etcd running there, and has it a majority?",
}


def _key(target: EtcdTarget, name: str) -> bytes:
    return f"{target.prefix}/{name}".encode()


def _equals(key: bytes, value: bytes | None) -> pb.Compare:
    """That a key holds a value; None: that it is absent (a comparison of values fails for absent keys)."""
    if value is None:
        return pb.Compare(target=pb.Compare.CREATE, key=key, create_revision=0)
    return pb.Compare(target=pb.Compare.VALUE, key=key, value=value)


def _put(key: bytes, value: bytes, lease: int = 0) -> pb.RequestOp:
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def _read(key: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


_NAMES = ("schema", "head", "leader")


def _look(client: EtcdClient, target: EtcdTarget) -> dict[str, pb.KeyValue]:
    """The keys that are no rows, of one moment."""
    answer = client.txn(pb.TxnRequest(success=[_read(_key(target, name)) for name in _NAMES]), READ_SECONDS)
    return {
        n: one.response_range.kvs[0] for n, one in zip(_NAMES, answer.responses, strict=True) if one.response_range.kvs
    }


def _check_schema(target: EtcdTarget, found: Mapping[str, pb.KeyValue]) -> None:
    schema = found["schema"].value.decode(errors="replace") if "schema" in found else ""
    if schema not in ("", str(SCHEMA_VERSION)) or ("head" in found and not schema):
        raise ConfigError(
            f"state: {target} has schema version {schema or '?'}, this release reads {SCHEMA_VERSION}; use the "
            "release that wrote it, or another prefix",
            metadata={"key": "state"},
        )


def _term_of(found: Mapping[str, pb.KeyValue]) -> int:
    return int(found["head"].value.split()[0]) if "head" in found else 0


def _leader(found: pb.KeyValue, term: int) -> Leader:
    try:
        return Leader(str(json.loads(found.value)["address"]), term)
    except (ValueError, KeyError, TypeError):
        return Leader("", term)


def _take(
    client: EtcdClient, target: EtcdTarget, found: Mapping[str, pb.KeyValue], lease: int, address: str
) -> int | None:
    """Become the leader at the term that was seen, plus one; the revision of our key, or None if another did."""
    head, leader = _key(target, "head"), _key(target, "leader")
    request = pb.TxnRequest(
        compare=[_equals(leader, None), _equals(head, found["head"].value if "head" in found else None)],
        success=[
            _put(leader, json.dumps({"address": address}).encode(), lease),
            _put(head, f"{_term_of(found) + 1} 0".encode()),
            _put(_key(target, "schema"), str(SCHEMA_VERSION).encode()),
        ],
        failure=[_read(leader)],
    )
    answer = client.txn(request, READ_SECONDS)
    if answer.succeeded:
        return int(answer.header.revision)
    now = next(iter(answer.responses[0].response_range.kvs), None)
    # Ours already: an earlier copy of this transaction was committed, and its answer was lost.
    if now is not None and now.lease == lease:
        return int(now.create_revision)
    client.revoke(lease, READ_SECONDS)
    return None
