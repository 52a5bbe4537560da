"""What was told of the ledger, and whether every later primary of it keeps to that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paramesh.errors import ParameshError
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as pb
from paramesh_server.ledger_log import Left, Record

from tests.simulation.ledger_host import Asked

if TYPE_CHECKING:
    from paramesh_server.ledger import Ledger

    from tests.simulation.slots import Slot
    from tests.simulation.world import World

POSITIONS = ("Join", "OpenGroup", "SetActivity")
"""Calls whose answers say where a group stands."""


class LedgerChecks:
    """Hears of every answer of the service `Ledger` as it leaves, whether or not it arrives."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.decided: dict[int, pb.StepRecord] = {}
        """Step -> its decision, as it was first told."""
        self.evicted: dict[int, float] = {}
        """Client -> when some ledger decided that it is out for ever."""
        self._joined: dict[int, int] = {}
        """Client -> rank, as it was told."""
        self._leaving: dict[int, None] = {}
        """Who asked to leave: it may have come about at any time since."""
        self._dead: dict[int, int] = {}
        """Who is evicted, as somebody was told -> by the primary of which epoch."""
        self._active: dict[int, int] = {}
        """Client -> the first step that cannot be decided without it, as it was told."""
        self._loose: dict[int, None] = {}
        """Who asked to be waited for no more, at any time."""
        self._permitted: dict[tuple[int, int], set[int]] = {}
        """(step, partition) -> whom it may go without, as somebody was told."""

    def _fail(self, what: str) -> None:
        self._world.checks.fail(what)

    # --- what is decided ---

    def appended(self, record: Record) -> None:
        """A ledger that serves has decided something; it may be lost still."""
        if isinstance(record.body, Left) and record.body.evicted:
            client = record.body.client_id
            self.evicted.setdefault(client, self._world.kernel.now)
            if not self._world.is_closed(client):
                self._fail(f"14: the ledger evicts client {client}, whom nobody has declared dead")

    # --- what is told ---

    def asked(self, slot: Slot | None, asked: Asked) -> bool:
        """A request is here: what it asks for may come about, whatever is answered.

        Returns:
            Whether it can be nothing but refused: somebody was told that its client is evicted. A primary of
            an earlier epoch, who has not heard of the next one, may not know; it decides nothing any more.
        """
        client, request = asked.request.request.client_id, asked.request
        if asked.method == "Leave":
            self._leaving[client] = None
        elif asked.method == "SetActivity" and request.activity != lg.ACTIVITY_ACTIVE:
            self._loose[client] = None
        dead = self._dead.get(client)
        known = dead is not None and slot is not None and slot.replica.machine.epoch >= dead
        return known and asked.method in POSITIONS

    def told(self, slot: Slot, asked: Asked, answer: Any, doomed: bool) -> None:
        """An answer leaves."""
        client = asked.request.request.client_id
        if doomed:
            self._fail(f"14: client {client} was told that it is evicted, and now {asked.method} is answered")
        if asked.method == "Join":
            self._joined[client] = answer.rank
        elif asked.method == "SetActivity" and asked.request.activity == lg.ACTIVITY_ACTIVE:
            self._activated(client, answer)
        elif asked.method == "Ready":
            self._ready(slot, asked.request, answer)
        elif asked.method == "GetSteps":
            for record in answer.records:
                self._decided(record)
        elif asked.method == "ReportMissing":
            key = (asked.request.step, asked.request.partition)
            self._permitted.setdefault(key, set()).update(answer.degraded)
        for position in self._positions(asked.method, answer):
            if position.HasField("last"):
                self._decided(position.last)

    def refused(self, slot: Slot | None, asked: Asked, error: ParameshError) -> None:
        """A refusal leaves."""
        client = asked.request.request.client_id
        if error.reason == "EVICTED" and slot is not None:
            self.dead(slot, client)
        elif error.reason == "NOT_MEMBER" and self._stays(client):
            self._fail(f"14: client {client} was told that it had joined, and now that it has not")

    def dead(self, slot: Slot, client: int) -> None:
        """Somebody was told that it is evicted."""
        self._dead.setdefault(client, slot.replica.machine.epoch)

    def _positions(self, method: str, answer: Any) -> list[lg.GroupPosition]:
        if method not in POSITIONS:
            return []
        return [answer.position] if method == "OpenGroup" else list(answer.groups)

    def _activated(self, client: int, answer: lg.SetActivityResponse) -> None:
        for position in answer.groups:
            self._active.setdefault(client, position.next_step)

    def _ready(self, slot: Slot, request: lg.ReadyRequest, answer: lg.ReadyResponse) -> None:
        self._decided(answer.record)
        client = request.request.client_id
        if answer.record.step != request.step:
            self._fail(f"14: client {client} was ready for step {request.step}, and was told step {answer.record.step}")
        named = [c.attempt for c in answer.record.contributors if c.client_id == client]
        if answer.included and named != [request.attempt]:
            self._fail(f"14: client {client} was told that step {request.step} has its contribution, which it has not")
        if len(slot.replica.insync.isr) < slot.min_isr:
            self._fail(f"10: step {request.step} was told with {len(slot.replica.insync.isr)} in sync")

    def _decided(self, record: pb.StepRecord) -> None:
        known = self.decided.get(record.step)
        if known is not None:
            if known != record:
                self._fail(f"14: step {record.step} was told as {known}, and now as {record}")
            return
        self.decided[record.step] = record
        there = {named.client_id for named in record.contributors}
        for client, first in self._active.items():
            waited = first <= record.step and client not in self._loose and self._stays(client)
            if waited and client not in there:
                self._fail(f"14: step {record.step} was decided without client {client}, who is active since {first}")
        self._world.kernel.note(f"step {record.step} is told: {sorted(there)}")
        self._world.faults.decided(record)

    def _stays(self, client: int) -> bool:
        """Whether it must be a member still: it was told that it had joined, and nothing has ended that."""
        return client in self._joined and client not in self._leaving and not self._world.is_closed(client)

    # --- who serves ---

    def serves(self, name: str, ledger: Ledger) -> None:
        """A ledger begins to serve, or is looked at: everything that anybody was told is in it."""
        self._check_members(name, ledger)
        for group in ledger._groups.state.values():
            for step, record in self.decided.items():
                kept = group.records.get(step)
                if kept != record and not step < group.first_kept:
                    self._fail(f"14: step {step} was told as {record}, and the ledger at {name} has {kept}")
            for (step, partition), clients in self._permitted.items():
                known = group.degraded.get((step, partition), set())
                if not (clients <= known or step < group.first_kept):
                    self._fail(f"14: p{partition} may do step {step} without {clients}, at {name} without {known}")
        if self.decided and not ledger._groups.state:
            self._fail(f"14: steps were decided, and the ledger at {name} has no group")

    def _check_members(self, name: str, ledger: Ledger) -> None:
        members = ledger._members.state.members
        ranks = [member.rank for member in members.values()]
        if len(set(ranks)) < len(ranks):
            self._fail(f"14: two members have one rank at {name}: {sorted(ranks)}")
        for client, rank in self._joined.items():
            known = members.get(client)
            if self._stays(client) and (known is None or known.rank != rank):
                self._fail(
                    f"14: client {client} was told that it had joined as rank {rank}; the ledger at {name} has {known}"
                )
        for client in self._dead:
            if client not in ledger.tombstones:
                self._fail(f"14: client {client} was evicted, and the ledger at {name} has no tombstone of it")
