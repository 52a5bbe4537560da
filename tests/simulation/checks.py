"""The invariants of the protocol (section 11), looked at from outside, where everything is seen."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy
from paramesh.v1 import replication_pb2 as rp
from paramesh_coordinator.rows import NodeState, PartitionRow, PartitionState, ServerRow
from paramesh_coordinator.state import Draft, NodeKey
from paramesh_server.insync import Ref
from paramesh_server.ledger_machine import LedgerMachine
from paramesh_server.log import Log, Position, RecordHeader
from paramesh_server.partition import Partition
from paramesh_server.replica import Machine, Role

from tests.simulation.coordinator import TIMEOUT_S
from tests.simulation.dataplane import Answer, Push
from tests.simulation.kernel import Violation
from tests.simulation.ledger_checks import LedgerChecks
from tests.simulation.slots import Slot
from tests.simulation.workers import reference_step

if TYPE_CHECKING:
    from tests.simulation.clients import AsyncPusher, Client
    from tests.simulation.world import World

HASHED = 0.1
"""Part of the moments at which a replica's state is hashed."""


class Checks:
    """Hears of everything that counts, and raises `Violation`."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._rng = random.Random(seed)
        self.rows: dict[int, PartitionRow] = {}
        """As committed in the store."""
        self._live: dict[Ref, bool] = {}
        self._certain: dict[Ref, bool] = {}
        self._records: dict[tuple[int, int, int], RecordHeader] = {}
        """(partition, lsn, epoch) -> the one record of that place."""
        self._before: dict[tuple[int, int, int], Position] = {}
        """The place before each: below a snapshot, what is in a log is known from here."""
        self._hashes: dict[tuple[int, int, int], bytes] = {}
        self._released: dict[int, dict[int, int]] = {}
        """Partition -> lsn -> epoch of every record that an answer was based on."""
        self._leaders: dict[tuple[int, int], Ref] = {}
        self._answers: dict[tuple[int, int, int], int] = {}
        self.acked: dict[tuple[int, int], int] = {}
        """(client, seq) -> element, of acknowledged pushes."""
        self._seen: dict[str, set[int]] = {}
        self._staged: dict[tuple[int, int, int], object] = {}
        """(partition, step, client) -> the state that acknowledged holding its contribution."""
        self.gathered: dict[tuple[int, int], tuple[int, ...]] = {}
        """(partition, step) -> who was left out when it was summed last."""
        self._without: dict[tuple[int, int, int], tuple[int, ...]] = {}
        """Place of a STEP -> who was left out."""
        self.ledger = LedgerChecks(world)
        self._references: dict[tuple[int, int, tuple[tuple[int, ...], ...]], numpy.ndarray] = {}

    def fail(self, what: str) -> None:
        """An invariant, by its number, does not hold."""
        self._world.kernel.note(f"VIOLATION {what}")
        raise Violation(what)

    # --- logs ---

    def appended(self, slot: Slot, before: Position) -> None:
        """A replica's log may have grown, and its state with it."""
        self.logged(slot, before)
        self.state(slot)

    def logged(self, slot: Slot, before: Position) -> None:
        """One place, one record, wherever it is."""
        log = slot.replica.machine.log
        for header in reversed(log._ring):
            if header.lsn <= before.lsn:
                break
            self._before.setdefault((slot.number, header.lsn, header.epoch), log.before(header.lsn))
            key = (slot.number, header.lsn, header.epoch)
            if key not in self._records and slot.replica.role is Role.PRIMARY:
                self._enough(slot, header)
            if header.kind == rp.RECORD_KIND_STEP and key not in self._records:
                self._summed(slot, key, header.step)
            known = self._records.setdefault(key, header)
            if known != header:
                self.fail(f"7: two records at {key}: {known} and {header} at {slot.server.ref.node}")

    def _enough(self, slot: Slot, header: RecordHeader) -> None:
        """10: no client's record is appended while too few are in sync."""
        there = len(slot.replica.insync.isr)
        if header.kind in (rp.RECORD_KIND_PUSH, rp.RECORD_KIND_STEP) and there < self._world.profile.min_isr:
            self.fail(f"10: {header} was appended to p{slot.number} with {there} in sync")

    def _summed(self, slot: Slot, key: tuple[int, int, int], step: int) -> None:
        """14: nobody is left out whose contribution this very primary has acknowledged."""
        without = self._without[key] = self.gathered.get((slot.number, step), ())
        for client in without:
            if client not in self.ledger.evicted:
                self.fail(f"14: p{slot.number} sums step {step} without client {client}, who lives")
            if self._staged.get((slot.number, step, client)) is slot.replica.machine:
                self.fail(f"14: p{slot.number} sums step {step} without client {client}, whom it acknowledged")

    def state(self, slot: Slot, machine: Machine | None = None, *, always: bool = False) -> None:
        """8: equal place in the log, equal bits."""
        if not always and self._rng.random() > HASHED:
            return
        machine = machine or slot.replica.machine
        last = machine.log.last
        key = (slot.number, last.lsn, last.epoch)
        found = machine.state_hash() if isinstance(machine, Partition) else machine.capture().ledger
        if self._hashes.setdefault(key, found) != found:
            self.fail(f"8: two states at {key}, one of them at {slot.server.ref}")

    def released(self, slot: Slot, lsn: int) -> None:
        """An answer leaves that is based on everything up to here."""
        if not lsn:
            return
        log, epoch = slot.replica.machine.log, slot.replica.machine.epoch
        leader = self._leaders.setdefault((slot.number, epoch), slot.server.ref)
        if leader != slot.server.ref:
            self.fail(f"4: p{slot.number} epoch {epoch} was acknowledged by {leader} and {slot.server.ref}")
        known = self._released.setdefault(slot.number, {})
        at = _epoch_at(log, lsn)
        if known.setdefault(lsn, at) != at:
            self.fail(f"1: p{slot.number} lsn {lsn} was released under epoch {known[lsn]}, now it is of {at}")
        self._check_in_sync(slot.number, lsn)

    def _check_in_sync(self, number: int, lsn: int) -> None:
        """9, 11, 5: whoever may be promoted has everything that anybody was ever told."""
        row = self.rows.get(number)
        if row is None or not lsn:
            return
        at = Position(lsn, self._released[number][lsn])
        for ref in row.isr:
            server = self._world.servers.get(Ref(*ref))
            if server is None or not server.process.alive:
                continue
            slot = server.held.get(number)
            if slot is None or not self._has(slot, at):
                last = slot.replica.last if slot else "nothing"
                self.fail(f"9: {ref} is in sync of p{number} and lacks the released {at}; it has {last}, row {row}")

    def _has(self, slot: Slot, at: Position) -> bool:
        """Whether a replica has a record, in its log or under the snapshot that it began with."""
        if slot.replica._has(at):
            return True
        found = slot.replica.machine.log._base
        while found.lsn > at.lsn:
            found = self._before[slot.number, found.lsn, found.epoch]
        return found == at

    # --- decisions ---

    def committed(self, draft: Draft) -> None:
        """A decision is in the store."""
        for row in draft.writes.values():
            if isinstance(row, ServerRow):
                self._silent(row)
                self._live[Ref(*row.ref)] = row.state is NodeState.LIVE
                self._certain[Ref(*row.ref)] = row.certain or row.state is NodeState.LEFT
                for ref in self._live:  # whoever comes under a name buries those before
                    self._certain[ref] |= ref.node == row.name and ref.incarnation < row.incarnation
        for row in draft.writes.values():
            if isinstance(row, PartitionRow):
                self._row(row)
        for row in self.rows.values():
            if (row.state is PartitionState.ONLINE) != self._live.get(Ref(*row.primary), False):
                self.fail(f"22: {row} and its primary's state differ")

    def _silent(self, row: ServerRow) -> None:
        """19: silence is death only while the coordinator itself ran."""
        certain = row.certain or row.state in (NodeState.LIVE, NodeState.LEFT)
        if certain or not self._live.get(Ref(*row.ref)):
            return
        coordinator = self._world.coordinator
        ran = coordinator.decided - coordinator.heard.get(NodeKey("server", *row.ref), coordinator.began)
        if 0 <= ran < TIMEOUT_S:  # below 0: it was heard while the decision was being written
            self.fail(f"19: {row.ref} was declared dead, and the coordinator ran for {ran:.2f} s since it was heard")

    def _row(self, row: PartitionRow) -> None:
        old = self.rows.get(row.partition)
        self.rows[row.partition] = row
        if old is not None:
            if row.epoch < old.epoch or row.version <= old.version:
                self.fail(f"4: epochs and versions only rise: {old} -> {row}")
            if row.primary != old.primary:
                self._promoted(old, row)
        released = self._released.get(row.partition)
        if released:
            self._check_in_sync(row.partition, max(released))

    def _promoted(self, old: PartitionRow, row: PartitionRow) -> None:
        """9: of the in-sync set; and silence takes nobody out of it, for it may be the only good copy."""
        if row.primary not in old.isr:
            self.fail(f"9: {row.primary} was promoted and not in sync: {old} -> {row}")
        planned = self._live.get(Ref(*old.primary), False)
        for ref in set(old.isr) - set(row.isr):
            if not planned and not self._certain.get(Ref(*ref), False):
                self.fail(f"9: a promotion for silence took {ref} out of the in-sync set: {old} -> {row}")

    def always(self) -> None:
        """What is looked at now and then."""
        for number, released in self._released.items():
            self._check_in_sync(number, max(released))

    # --- clients ---

    def answered(self, slot: Slot, request: Push, answer: Answer) -> None:
        """3: a duplicate's reply equals the first."""
        if request.staged is not None:
            held = (slot.number, request.staged.step, request.client)
            self._staged[held] = slot.replica.machine
        if not request.seq:
            return
        key = (request.partition, request.client, request.seq)
        first = self._answers.setdefault(key, answer.lsn)
        if first != answer.lsn:
            self.fail(f"3: push {key} was answered lsn {first}, now {answer.lsn}")

    def acknowledged(self, client: int, seq: int, element: int, answer: Answer) -> None:
        """A client has its answer."""
        self.acked[client, seq] = element

    def expected(self, client: AsyncPusher) -> set[int]:
        """What a read of this client that starts now has to show."""
        mine = {e for (c, _), e in self.acked.items() if c == client.client_id}
        return mine | self._seen.get(client.name, set())

    def read(self, client: Client, expected: set[int], answer: Answer) -> None:
        """13: no client reads its own past."""
        values = numpy.frombuffer(answer.values, dtype=numpy.float32)
        self._count(values)
        shown = set(numpy.flatnonzero(values).tolist())
        if not expected <= shown:
            self.fail(f"13: {client.name} reads lsn {answer.lsn} of epoch {answer.epoch} without {expected - shown}")
        self._seen.setdefault(client.name, set()).update(shown)

    def _count(self, values: numpy.ndarray) -> None:
        for element in numpy.flatnonzero((values != 0) & (values != -1)).tolist():
            self.fail(f"2: the update of element {element} was applied {-values[element]:g} times")

    def step_read(self, partition: int, step: int, answer: Answer) -> None:
        """15: what workers get at a step is the reference's, bit for bit."""
        at = Position(answer.lsn, self._released[partition][answer.lsn])
        left_out = self._left_out(partition, at)
        expected = self._reference(partition, step, tuple(left_out.get(t, ()) for t in range(step)))
        if answer.values != expected.tobytes():
            self.fail(f"15: partition {partition} at step {step} differs from the reference ({at})")

    def _left_out(self, partition: int, at: Position) -> dict[int, tuple[int, ...]]:
        found = {}
        while at.lsn and self._without:
            key = (partition, at.lsn, at.epoch)
            header = self._records.get(key)
            if header is not None and header.kind == rp.RECORD_KIND_STEP:
                found[header.step] = self._without[key]
            at = self._before.get(key, Position(0, 0))
        return found

    def _reference(self, partition: int, step: int, without: tuple[tuple[int, ...], ...]) -> numpy.ndarray:
        if not step:
            return self._world.first_array(partition)
        key = (partition, step, without)
        if key not in self._references:
            before = self._reference(partition, step - 1, without[:-1])
            record = self.ledger.decided[step - 1]
            gradients = []
            for named in record.contributors:
                if named.client_id not in without[-1]:
                    attempt = next((o.attempt for o in named.overrides if o.partition == partition), named.attempt)
                    made = self._world.gradients[named.client_id, step - 1, partition, attempt]
                    gradients.append((made, named.weight))
            self._references[key] = reference_step(before, gradients)
        return self._references[key]

    # --- the end ---

    def quiescent(self) -> None:
        """All is done and nothing fails any more."""
        for number, row in sorted(self.rows.items()):
            released = self._released.get(number, {})
            for lsn in sorted(released):
                self._check_in_sync(number, lsn)
            for ref in row.isr:
                server = self._world.servers.get(Ref(*ref))
                if server is not None and server.process.alive and number in server.held:
                    self.state(server.held[number], always=True)
        self._check_applied()
        ledger = self._world.leader(0)
        assert ledger is not None
        assert isinstance(ledger.replica.machine, LedgerMachine)
        self.ledger.serves(ledger.server.ref.node, ledger.replica.machine.ledger)

    def _check_applied(self) -> None:
        """1, 2: every acknowledged update is there, none is there twice."""
        number = self._world.async_partition
        slot = self._world.leader(number)
        assert slot is not None
        values = numpy.frombuffer(bytes(slot.partition.values), dtype=numpy.float32)
        self._count(values)
        for (client, seq), element in self.acked.items():
            if values[element] != -1:
                self.fail(f"1: push {seq} of client {client} was acknowledged and is lost")
        unknown = set(numpy.flatnonzero(values).tolist()) - set(self._world.elements.values())
        if unknown:
            self.fail(f"2: elements {unknown} that nobody pushed")


def _epoch_at(log: Log, lsn: int) -> int:
    return log.last.epoch if lsn == log.lsn else log.before(lsn + 1).epoch
