"""Rules of the protocol, each taken out: proof that the simulation would notice.

    with BROKEN["ack before the in-sync set"]():
        simulate(seed)          # raises Failure, for one of the first few seeds

Each name says which rule is missing. They patch the real cores, or, where the rule is a
shell's, the handler that stands for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from paramesh import files
from paramesh.async_client import AsyncClient
from paramesh.errors import refuse
from paramesh_coordinator import failover
from paramesh_coordinator.checkers import Liveness, Verdict
from paramesh_coordinator.rows import PartitionRow
from paramesh_coordinator.state import Draft
from paramesh_server import decisions, insync
from paramesh_server.aggregate import Part
from paramesh_server.dedup import Dedup
from paramesh_server.insync import InSync
from paramesh_server.ledger_log import Left
from paramesh_server.ledger_members import Members
from paramesh_server.ledger_service import LedgerService
from paramesh_server.log import Record
from paramesh_server.partition import Partition
from paramesh_server.replica import Replica, Role
from paramesh_server.staging import Staging

from tests.simulation import replication
from tests.simulation.dataplane import DataPlane
from tests.simulation.ledger_host import LedgerHost
from tests.simulation.slots import Slot
from tests.simulation.workers import Worker
from tests.simulation.world import World

Broken = Callable[[], AbstractContextManager[Any]]

BROKEN: dict[str, Broken] = {}


def _broken(name: str) -> Callable[[Broken], Broken]:
    def note(variant: Broken) -> Broken:
        BROKEN[name] = variant
        return variant

    return note


def _patch(owner: object, name: str, new: object) -> AbstractContextManager[Any]:
    return mock.patch.object(owner, name, new)


# --- the output commit and the in-sync set ---


@_broken("answers leave before the in-sync set has their records")
def _ack_early() -> AbstractContextManager[Any]:
    async def released(self: Slot, lsn: int, reign: int, *, kept: bool = False) -> None:
        self.check_primary()
        self.server.world.checks.released(self, lsn)

    return _patch(Slot, "released", released)


@_broken("a learner joins at lag")
def _join_at_lag() -> AbstractContextManager[Any]:
    """It is asked for, and then not waited for, as soon as it is near."""

    def wish(self: InSync, now: float) -> insync.Wish | None:
        if self._wish is not None:
            return None
        near = {ref for ref in self.learners if ref in self._acked and self.last - self._acked[ref] <= 64}
        if not near:
            return real(self, now)
        self._wish, self._asked = insync.Wish(self.isr | near, self._version, "near"), now
        asked, self._wish = self._wish, None
        return asked

    real = InSync.wish
    return _patch(InSync, "wish", wish)


@_broken("a learner that is asked for is not waited for")
def _wish_not_waited() -> AbstractContextManager[Any]:
    def waiting(self: InSync) -> frozenset[insync.Ref]:
        return self.isr - {self.me}

    return _patch(InSync, "_waiting", waiting)


@_broken("who is asked to leave is not waited for any more")
def _shrink_early() -> AbstractContextManager[Any]:
    def waiting(self: InSync) -> frozenset[insync.Ref]:
        wished = self._wish.isr if self._wish is not None else self.isr
        return (wished | self._joining) - {self.me}

    return _patch(InSync, "_waiting", waiting)


@_broken("a refused wish counts as an outcome")
def _refusal_is_outcome() -> AbstractContextManager[Any]:
    """The call may still arrive: until the row changes nobody knows."""

    def wish(self: InSync, now: float) -> insync.Wish | None:
        self._wish = None
        return real(self, now)

    real = InSync.wish
    return _patch(InSync, "wish", wish)


@_broken("whoever is alive is promoted")
def _promote_anybody() -> AbstractContextManager[Any]:
    def successor(draft: Draft, part: PartitionRow, old: Any, live: set[Any], load: Any, revived: Any) -> Any:
        return min((ref for ref in (*part.isr, *part.learners) if ref in live), default=None, key=lambda r: r.name)

    return _patch(failover, "_successor", successor)


@_broken("a promotion for silence trims the in-sync set")
def _trim_on_silence() -> AbstractContextManager[Any]:
    def promoted(part: PartitionRow, new: Any) -> PartitionRow:
        return dataclasses.replace(real(part, new), isr=(new,))

    real = failover.promoted_row
    return _patch(failover, "promoted_row", promoted)


@_broken("a learner is promoted like a member of the in-sync set")
def _learners_count() -> AbstractContextManager[Any]:
    def promoted(part: PartitionRow, new: Any) -> PartitionRow:
        row = real(part, new)
        return dataclasses.replace(row, isr=(*row.isr, *(r for r in row.learners if r not in row.isr)), learners=())

    real = failover.promoted_row
    return _patch(failover, "promoted_row", promoted)


@_broken("a learner's word from before the newest row counts")
def _old_word_counts() -> AbstractContextManager[Any]:
    """Seeds 2 and 543 of before: a replica was dropped and made again, and taken for the old one."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        def follow(self: InSync, row: Any, now: float, dead: Any = frozenset()) -> None:
            acked = dict(self._acked)
            real(self, row, now, dead)
            self._acked.update({ref: lsn for ref, lsn in acked.items() if ref in self.followers})

        def check_row(self: replication.Sender) -> None:
            self._version = self._slot.replica.insync.version

        def greet(self: Replica, epoch: int, version: int = 0) -> None:
            greeted(self, epoch)

        real, greeted = InSync.follow, Replica.greet
        with (
            _patch(InSync, "follow", follow),
            _patch(replication.Sender, "_check_row", check_row),
            _patch(Replica, "greet", greet),
        ):
            yield

    return patched()


@_broken("a new primary knows only of its own commits")
def _nothing_inherited() -> AbstractContextManager[Any]:
    """Seed 229 of before: a learner joined without what earlier primaries had acknowledged."""

    def init(self: InSync, me: insync.Ref, silent: float = insync.SILENT_S, inherited: int = 0) -> None:
        real(self, me, silent)

    real = InSync.__init__
    return _patch(InSync, "__init__", init)


@_broken("silence counts while the coordinator was stopped")
def _silence_of_its_own() -> AbstractContextManager[Any]:
    """Both defences: the tick that came late, and the doubt while most are silent."""

    def renew(self: Liveness, now: float, why: str) -> Verdict:
        return Verdict(tuple(self._silent(now)))

    return _patch(Liveness, "_renew", renew)


# --- logs ---


@_broken("an older primary's records are acknowledged to the next")
def _old_tail_acknowledged() -> AbstractContextManager[Any]:
    """Seed 100 of three replicas, of before."""
    return _patch(Replica, "matched", property(lambda self: self.last.lsn))


@_broken("a follower truncates on hearing of an epoch")
def _truncate() -> AbstractContextManager[Any]:
    def promise(self: Replica, epoch: int) -> None:
        if epoch > self.promised:
            self._tail.clear()
        real(self, epoch)

    real = Replica.promise
    return _patch(Replica, "promise", promise)


@_broken("the commit is taken without matching the log")
def _commit_unmatched() -> AbstractContextManager[Any]:
    def learn(self: Replica, epoch: int, at: Any, commit: int) -> None:
        self.greet(epoch)
        self._commit = max(self._commit, min(commit, self.last.lsn))

    return _patch(Replica, "learn", learn)


@_broken("records are held without looking at the one before")
def _no_previous() -> AbstractContextManager[Any]:
    def replace(self: Replica, at: Any, previous: Any, record: Record) -> None:
        while self._tail and self._tail[-1].header.lsn >= at.lsn:
            self._tail.pop()
        if at.lsn == self.last.lsn + 1:
            self._tail.append(record)

    return _patch(Replica, "_replace", replace)


@_broken("a follower takes records of an older epoch")
def _no_promise() -> AbstractContextManager[Any]:
    def greet(self: Replica, epoch: int, version: int = 0) -> None:
        if self.role is not Role.PRIMARY:
            self.machine.log.replicated = True

    return _patch(Replica, "greet", greet)


@_broken("a new primary serves before its EPOCH is everywhere")
def _serve_early() -> AbstractContextManager[Any]:
    def lead(self: Replica, row: Any, now: float, dead: Any = frozenset()) -> None:
        real(self, row, now, dead)
        self._serves_from = 0
        self.insync.commit = max(self.insync.commit, self.machine.log.lsn)

    real = Replica.lead
    return _patch(Replica, "lead", lead)


@_broken("a deposed primary's senders never start again")
def _senders_end() -> AbstractContextManager[Any]:
    """The bug of seed 138 in `outbound.py`."""

    def sync(self: replication.Outbound, slot: Slot) -> None:
        dead = {key: task for key, task in self._senders.items() if task.done}
        for task in dead.values():
            task.done = False
        real(self, slot)
        for task in dead.values():
            task.done = True

    real = replication.Outbound.sync
    return _patch(replication.Outbound, "sync", sync)


# --- exactly once ---


@_broken("a follower replays without writing dedup entries")
def _replay_without_dedup() -> AbstractContextManager[Any]:
    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        def replay(self: Partition, record: Record) -> None:
            kept, self.dedup = self.dedup, Dedup()
            real(self, record)
            self.dedup = kept

        real = Partition.replay
        with _patch(Partition, "replay", replay):
            yield

    return patched()


@_broken("a snapshot brings no dedup entries")
def _snapshot_without_dedup() -> AbstractContextManager[Any]:
    def restored(cls: type[Dedup], state: Any) -> Dedup:
        return Dedup()

    return _patch(Dedup, "restored", classmethod(restored))


@_broken("FENCE leaves no tombstone")
def _no_tombstone() -> AbstractContextManager[Any]:
    def fence(self: Dedup, client: int) -> bool:
        known = client in self._clients
        self._clients.pop(client, None)
        return known

    return _patch(Dedup, "fence", fence)


@_broken("no floor is sent with a pull")
def _no_floor() -> AbstractContextManager[Any]:
    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        def pull_of(self: AsyncClient, partition: int, floors: Any = None) -> Any:
            return real(self, partition)

        real = AsyncClient._pull_of
        with _patch(World, "floors", False), _patch(AsyncClient, "_pull_of", pull_of):
            yield

    return patched()


@_broken("a folder is not synced after a rename")
def _folder_not_synced() -> AbstractContextManager[Any]:
    """Of checkpoints, and whatever else is written by `paramesh.files`."""
    return _patch(files, "_sync_folder", lambda place: None)


@_broken("a pull shows what is not committed")
def _dirty_read() -> AbstractContextManager[Any]:
    async def pull(self: Any, request: Any) -> Any:
        slot = await self.find(request.partition, request.epoch)
        if request.step is not None:
            answer = await slot.lead(lambda: self._at_step(slot, request))
        else:
            answer = await self._above_floor(slot, request)
        self.world.checks.released(slot, answer.lsn)
        return answer

    return _patch(DataPlane, "pull", pull)


# --- steps ---


@_broken("a lower attempt wins")
def _lower_attempt() -> AbstractContextManager[Any]:
    def attempt_in(contributor: Any, partition: int) -> int:
        return 1

    return _patch(decisions, "attempt_in", attempt_in)


@_broken("a worker forgets its contribution at STEP")
def _forget_at_step() -> AbstractContextManager[Any]:
    return _patch(Worker, "forgets_early", True)


@_broken("a fenced contribution comes without the decision that names it")
def _bare_restaging() -> AbstractContextManager[Any]:
    """Seed 502 of before."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        async def restage(self: Worker, asked: Any, step: int) -> bool:
            bare = dataclasses.replace(asked, committed=())
            return bool(await real(self, bare, step))

        def preamble(self: AsyncClient, records: Any) -> bytes:
            return whole(self, [])

        real, whole = Worker._restage, AsyncClient._preamble
        with _patch(Worker, "_restage", restage), _patch(AsyncClient, "_preamble", preamble):
            yield

    return patched()


@_broken("FENCE drops what is staged")
def _fence_drops() -> AbstractContextManager[Any]:
    def fence(self: Partition, client: int) -> bool:
        for key in [key for key in self.staging._held if key[2] == client]:
            self.staging._budget.give(self.staging._held.pop(key).nbytes)
        return real(self, client)

    real = Partition.fence
    return _patch(Partition, "fence", fence)


@_broken("contributions are summed as they came")
def _arrival_order() -> AbstractContextManager[Any]:
    def parts_of(record: Any, partition: int, staging: Staging, permitted: Any = ()) -> tuple[list[Part], list[int]]:
        parts, missing = real(record, partition, staging, permitted)
        came = [id(made) for made in staging._held.values()]
        return sorted(parts, key=lambda part: came.index(id(part.contribution))), missing

    real = decisions.parts_of
    return _patch(decisions, "parts_of", parts_of)


@_broken("a step goes on without what is missing")
def _permit_all() -> AbstractContextManager[Any]:
    def parts_of(record: Any, partition: int, staging: Staging, permitted: Any = ()) -> tuple[list[Part], list[int]]:
        return real(record, partition, staging, [c.client_id for c in record.contributors])

    real = decisions.parts_of
    return _patch(decisions, "parts_of", parts_of)


# --- the ledger ---


@_broken("an answer of the ledger leaves before its records are everywhere")
def _ledger_early() -> AbstractContextManager[Any]:
    async def committed(self: LedgerHost, slot: Slot, lsn: int, reign: int) -> None:
        slot.check_primary()
        self.server.world.checks.released(slot, lsn)

    return _patch(LedgerHost, "_committed", committed)


@_broken("a follower of the ledger replays without writing tombstones")
def _replay_without_tombstones() -> AbstractContextManager[Any]:
    def apply_left(self: Members, body: Left) -> None:
        known = set(self.state.tombstones)
        real(self, body)
        if self._desk.sink is None:
            self.state.tombstones = known

    real = Members._apply_left
    return _patch(Members, "_apply_left", apply_left)


@_broken("a deposed ledger goes on until a map says so")
def _deposed_ledger_goes_on() -> AbstractContextManager[Any]:
    """Its successor's records are in it, and it still takes requests."""

    def check_open(self: LedgerService) -> None:
        if self._closed:
            raise refuse("NOT_PRIMARY", "the ledger has moved to another server")

    return _patch(LedgerService, "_check_open", check_open)
