"""The stream between a primary and a follower: `outbound.py` and `inbound.py`, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paramesh.errors import ParameshError, refuse
from paramesh.v1 import replication_pb2 as rp
from paramesh_server.inbound import WATCH_S
from paramesh_server.insync import Ref
from paramesh_server.log import Position, Record
from paramesh_server.outbound import GREETING_S, IDLE_S
from paramesh_server.partition import Partition
from paramesh_server.replica import Machine, Role
from paramesh_server.writes import SlotFrame

from tests.simulation.kernel import Future, Kernel, Process, Task
from tests.simulation.network import End, Network, Stream, StreamEnded
from tests.simulation.retry import Backoff
from tests.simulation.slots import Slot

if TYPE_CHECKING:
    from tests.simulation.server import Server
    from tests.simulation.world import World

INSTALL_S = 5.0
"""`outbound.INSTALL_S`, for a table of a few hundred bytes."""


@dataclass(frozen=True)
class Greeting:
    """The first message of a stream."""

    primary: Ref
    follower: Ref
    partition: int
    epoch: int
    version: int = 0


@dataclass(frozen=True)
class Head:
    """A record, or a notice of the commit."""

    epoch: int
    previous: Position
    commit: int
    record: Record | None = None


@dataclass(frozen=True)
class Where:
    """A follower's answer."""

    epoch: int
    last: Position
    applied: Position
    error: ParameshError | None = None


@dataclass(frozen=True)
class Snapshot:
    """One atomic cut."""

    greeting: Greeting
    state: rp.ReplicaState
    writes: tuple[SlotFrame, ...]


class Outbound:
    """`outbound.Outbound`: all senders of a process."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._senders: dict[tuple[int, Ref], Task] = {}

    def sync(self, slot: Slot) -> None:
        """One sender for each follower of a partition that is led here."""
        leads = slot.replica.role is Role.PRIMARY and not slot.closed
        wanted = sorted(slot.replica.insync.followers) if leads else []
        for (number, ref), task in list(self._senders.items()):
            if number == slot.number and ref not in wanted:
                task.cancel()
                self._senders.pop((slot.number, ref), None)
                slot.replica.pins.pop(ref, None)
        for ref in wanted:
            known = self._senders.get((slot.number, ref))
            if known is None or known.done:
                self._senders[slot.number, ref] = self.server.spawn(self._send(slot, ref), "sender")

    async def _send(self, slot: Slot, ref: Ref) -> None:
        server = self.server
        backoff, snapshot = Backoff(server.world.rng, cap=1.0), False
        while slot.replica.role is Role.PRIMARY and not slot.closed:
            stream = Sender(server, slot, ref, snapshot)
            try:
                await stream.run()
                snapshot = False
            except (ParameshError, StreamEnded) as error:
                snapshot = isinstance(error, ParameshError) and error.reason == "DIVERGED"
                server.kernel.note(f"{server.ref.node} stream of p{slot.number} to {ref.node} broke: {error!r}")
            if not stream.installed:
                slot.replica.pins.pop(ref, None)
            slot.replica.insync.lost(ref)
            slot.stir()
            if stream.answered:
                backoff = Backoff(server.world.rng, cap=1.0)
            await server.kernel.sleep(backoff.next())


class Sender:
    """`outbound._Stream`: one try."""

    def __init__(self, server: Server, slot: Slot, ref: Ref, snapshot: bool) -> None:
        self._server, self._slot, self._ref, self._snapshot = server, slot, ref, snapshot
        self._epoch = slot.replica.machine.epoch
        self._version = slot.replica.insync.version
        self.answered = self.installed = False

    @property
    def _log(self) -> Any:
        return self._slot.replica.machine.log

    def _greeting(self) -> Greeting:
        return Greeting(self._server.ref, self._ref, self._slot.number, self._epoch, self._version)

    def _check_known(self) -> None:
        """`Outbound.channel`: the map must know the process."""
        routes = self._server.routes
        if routes is None or all(Ref.of(node.ref) != self._ref for node in routes.map.nodes):
            raise refuse("UNREACHABLE", f"the map does not say where {self._ref.node} is")

    async def run(self) -> None:
        """Greet, catch up, follow; returns only by an error, or after a snapshot."""
        self._check_known()
        stream = self._server.net.open(self._server.process, self._ref.node, "append")
        try:
            stream.near.send(self._greeting())
            reading = self._server.spawn(self._read(stream), "greeting")
            if not await self._server.kernel.wait(reading, GREETING_S):
                raise refuse("DEADLINE", "no answer to a greeting")
            answer: Where = await reading
            self.answered = True
            at = self._start(answer)
            if at is None:
                await self._install()
                return
            self._acked(at.lsn)
            await self._follow(stream, at)
        finally:
            stream.cancel()

    async def _read(self, stream: Stream) -> Where:
        try:
            answer: Where = await stream.near.get()
        except StreamEnded:
            raise refuse("UNREACHABLE", f"{self._ref.node} ended the stream") from None
        if answer.error is not None:
            if answer.error.reason == "STALE_EPOCH":
                self._slot.replica.heed(answer.epoch)
                self._slot.stir()
            raise answer.error
        return answer

    def _start(self, answer: Where) -> Position | None:
        if self._snapshot:
            return None
        if self._log.holds(answer.last) and self._log.after(answer.last.lsn) is not None:
            return answer.last
        before = answer.applied
        if before.lsn < answer.last.lsn and self._log.holds(before) and self._log.after(before.lsn) is not None:
            return before
        return None

    def _acked(self, lsn: int) -> None:
        replica = self._slot.replica
        if replica.role is not Role.PRIMARY:
            raise refuse("NOT_PRIMARY", f"partition {self._slot.number} was deposed")
        before = replica.insync.commit
        replica.insync.acked(self._ref, lsn, self._server.kernel.now, self._version)
        pin = replica.pins.get(self._ref)
        if pin is not None and lsn > pin:
            del replica.pins[self._ref]
        replica.trim()
        if replica.insync.commit != before:
            self._slot.stir()

    async def _follow(self, stream: Stream, at: Position) -> None:
        reader = self._server.spawn(self._take_answers(stream), "answers")
        try:
            sent, told = at, -1
            while not reader.done:
                self._check_row()
                commit = self._slot.replica.commit
                records = self._log.after(sent.lsn)
                if records is None:
                    return
                for record in records:
                    head = Head(self._epoch, sent, self._slot.replica.commit, record)
                    stream.near.send(head)
                    sent, told = Position(record.header.lsn, record.header.epoch), commit
                if not records and told < min(commit, sent.lsn):
                    told = commit
                    stream.near.send(Head(self._epoch, sent, commit))
                elif not records:
                    await self._idle(reader)
            await reader
        finally:
            reader.cancel()

    def _check_row(self) -> None:
        insync = self._slot.replica.insync
        if self._ref in insync.learners and insync.version != self._version:
            raise refuse("NOT_READY", f"the row of partition {self._slot.number} has changed")

    async def _idle(self, reader: Task) -> None:
        either = Future()
        self._slot.moved.waiters.append(either.set)
        reader.waiters.append(either.set)
        await self._server.kernel.wait(either, IDLE_S)
        if self._slot.replica.role is not Role.PRIMARY:
            raise refuse("NOT_PRIMARY", f"partition {self._slot.number} was deposed")

    async def _take_answers(self, stream: Stream) -> None:
        while True:
            answer = await self._read(stream)
            self._acked(answer.last.lsn)

    async def _install(self) -> None:
        slot = self._slot
        slot.replica.pins[self._ref] = 0
        lsn, snapshot = await slot.lead(self._cut)
        slot.replica.pins[self._ref] = lsn
        self._server.kernel.note(f"{self._server.ref.node} snapshot of p{slot.number} to {self._ref.node} lsn={lsn}")
        await self._server.net.call(self._server.process, self._ref.node, "install", snapshot, INSTALL_S)
        self.installed = True

    def _cut(self) -> tuple[int, Snapshot]:
        machine = self._slot.replica.machine
        writes = []
        if isinstance(machine, Partition) and not machine.initialising:
            for part in machine.cut():
                writes.append(self._server.world.frame_of(part))
        return machine.log.lsn, Snapshot(self._greeting(), machine.capture(), tuple(writes))


class Inbound:
    """`inbound.Inbound`: the follower's side, mixed into a server."""

    world: World
    kernel: Kernel
    net: Network
    process: Process
    ref: Ref

    async def _accepting(self: Any, first: Greeting, version: int) -> Slot:
        if first.follower != self.ref:
            raise refuse("UNKNOWN_NODE", f"this is {self.ref.node} of another incarnation")
        slot: Slot | None = await self.find_replica(first.partition)
        if slot is None:
            raise refuse("NOT_READY", f"the map lists no replica of partition {first.partition} here")
        slot.replica.greet(first.epoch, version)
        return slot

    async def append(self: Any, end: End) -> None:
        """Take records of one partition, and acknowledge each."""
        slot: Slot | None = None
        try:
            first = await end.get()
            slot = await self._accepting(first, first.version)
            end.send(_where(slot))
            while True:
                if self._take(slot, await self._until_diverged(slot, end)):
                    end.send(_taken(slot))
        except StreamEnded:
            return
        except ParameshError as error:
            end.send(_refusal(slot, error))

    async def _until_diverged(self: Any, slot: Slot, end: End) -> Head:
        coming = self.spawn(_next(end), "coming")
        try:
            while True:
                if slot.closed:
                    raise refuse("NOT_READY", f"partition {slot.number} was given up here")
                if slot.replica.diverged:
                    raise refuse("DIVERGED", f"partition {slot.number} has another state here than at its primary")
                either = Future()
                slot.moved.waiters.append(either.set)
                coming.waiters.append(either.set)
                if not coming.done:
                    await self.kernel.wait(either, WATCH_S)
                if coming.done and not slot.replica.diverged and not slot.closed:
                    head: Head | None = await coming
                    if head is None:
                        raise StreamEnded
                    return head
        finally:
            coming.cancel()

    def _take(self: Any, slot: Slot, head: Head) -> bool:
        replica = slot.replica
        if head.record is None:
            replica.learn(head.epoch, head.previous, head.commit)
            self._apply(slot)
            return False
        header = head.record.header
        replica.offer(head.epoch, head.previous, head.record)
        replica.learn(head.epoch, Position(header.lsn, header.epoch), head.commit)
        self._apply(slot)
        return True

    def _apply(self: Any, slot: Slot) -> None:
        if slot.replica.due and not slot.applying:
            slot.applying = True
            self.spawn(self._apply_due(slot), "apply")

    async def _apply_due(self: Any, slot: Slot) -> None:
        try:
            while slot.replica.due:
                await slot.run(slot.replica.apply)
                self.world.checks.state(slot)
        except ParameshError as error:
            slot.stir()
            if error.reason != "NOT_PRIMARY":
                self.world.checks.fail(f"8: {self.ref.node} p{slot.number} diverged: {error!r}")
        finally:
            slot.applying = False

    async def _empty(self: Any, number: int) -> Machine:
        """`Server._empty`."""
        if not number:
            return self.ledger_host.fresh()  # type: ignore[no-any-return]
        return await self.make(self.routes.partition(number))  # type: ignore[no-any-return]

    async def install(self: Any, snapshot: Snapshot) -> int:
        """Take a whole snapshot; until its last byte is here the old state stays."""
        first = snapshot.greeting
        slot = await self._accepting(first, 0)
        machine = await self._empty(first.partition)
        await self.pool()
        machine.restore(snapshot.state, snapshot.writes)
        slot.replica.greet(first.epoch)
        await slot.run(lambda: slot.replica.install(machine))
        self.kernel.note(f"{self.ref.node} installed p{first.partition} lsn={snapshot.state.lsn}")
        self.world.checks.state(slot)
        return int(snapshot.state.lsn)


async def _next(end: End) -> Head | None:
    try:
        head: Head = await end.get()
        return head
    except StreamEnded:
        return None


def _where(slot: Slot, error: ParameshError | None = None) -> Where:
    replica = slot.replica
    return Where(replica.promised, replica.last, replica.machine.log.last, error)


def _taken(slot: Slot) -> Where:
    """After a record: an older primary's tail beyond it is not acknowledged."""
    where = _where(slot)
    return Where(where.epoch, Position(min(where.last.lsn, slot.replica.matched), 0), where.applied)


def _refusal(slot: Slot | None, error: ParameshError) -> Where:
    where = Where(0, Position(0, 0), Position(0, 0), error) if slot is None else _where(slot, error)
    if error.reason == "STALE_EPOCH":
        return Where(int(error.metadata.get("epoch", "0")), where.last, where.applied, error)
    return where
