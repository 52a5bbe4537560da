"""The ledger's door: gRPC calls go to the ledger while this process is its primary.

gRPC fixes its services before a server starts, and the map moves the ledger later; so the
service is always registered and refuses with NOT_PRIMARY while the ledger is elsewhere.
A follower only replays. A new primary decides nothing before its own EPOCH is committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

from paramesh.channel import grpc
from paramesh.errors import ParameshError, refuse
from paramesh.routing import Routes
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

from paramesh_server import ledger_log
from paramesh_server.insync import Ref
from paramesh_server.ledger_machine import LedgerMachine
from paramesh_server.ledger_service import LedgerService
from paramesh_server.replica import Replica, Role
from paramesh_server.roles import take_role
from paramesh_server.room import Room
from paramesh_server.shards import ARRIVAL_S, Slot

log = logging.getLogger(__name__)

NOT_MADE = (pb.PARTITION_STATE_OFFLINE, pb.PARTITION_STATE_RESTORING)
"""States in which no replica is made: it would be empty."""

READS = frozenset({"GetState", "GetSteps", "LedgerStatus"})
"""Calls that never append a record."""


class LedgerHost:
    """Holds a replica of the ledger while the map lists one here.

    Args:
        job: the cluster's name.
        me: this process.
        pool: for what is long; the ledger itself lives on the event loop.
        fenced: clients that this process was told to fence, for a new primary to hear of.
        room: whether there is memory for new members; None: always.
    """

    def __init__(
        self,
        job: str,
        me: Ref,
        pool: Executor,
        fenced: Callable[[], Iterable[int]] = lambda: (),
        room: Room | None = None,
    ) -> None:
        self._room = room
        self._job = job
        self._me = me
        self._pool = pool
        self._fenced = fenced
        self._service: LedgerService | None = None
        self._served = asyncio.Event()
        """Replaced and set when a service begins, or another map comes."""
        self._starting: asyncio.Task[None] | None = None
        self._routes: Routes | None = None
        self.slot: Slot | None = None
        """The replica here, whatever its role."""

    async def follow(
        self, routes: Routes, row: pb.Partition, *, mine: bool, listed: bool, dead: frozenset[Ref] = frozenset()
    ) -> Slot | None:
        """Hold, lead or let go of the ledger's replica, and hand it the job's configuration.

        Args:
            routes: the newest map.
            row: the ledger's.
            mine: this process is its primary, and it is not OFFLINE.
            listed: the map lists a replica here.
            dead: processes that the coordinator has declared dead.
        """
        self._routes = routes
        if not listed:
            await self.close()
        elif self.slot is not None or row.state not in NOT_MADE:
            if self.slot is None:
                self.slot = Slot(Replica(self.empty(routes, row.epoch), self._me), self._pool)
                log.info("ledger=here primary=%s generation=%d", mine, routes.generation)
            self.slot.min_isr = max(1, routes.map.config.min_isr)
            if await take_role(self.slot, row, mine=mine, dead=dead):
                await self._end_service()  # of an earlier reign that a follower ended before any map did
                self._start(self.slot)
            elif self.slot.replica.role is not Role.PRIMARY:
                await self._end_service()
            if self._service is not None:
                self._service.update_config(routes.map.config)
            self.slot.stir()
        self._announce()
        return self.slot

    def load(self, machine: LedgerMachine) -> None:
        """Hold the ledger of a checkpoint, until the map says that it leads."""
        self.slot = Slot(Replica(machine, self._me), self._pool)
        log.info("ledger=loaded lsn=%d", machine.log.lsn)

    def empty(self, routes: Routes, epoch: int) -> LedgerMachine:
        """A fresh state: for a replica that was just placed, or for a snapshot."""
        return LedgerMachine(routes.map.config, epoch)

    def fresh(self) -> LedgerMachine:
        """A fresh state for a snapshot to fill."""
        assert self._routes is not None
        return self.empty(self._routes, 0)

    def _announce(self) -> None:
        served, self._served = self._served, asyncio.Event()
        served.set()

    # ------------------------------------------------------------------ serving

    def _start(self, slot: Slot) -> None:
        if self._starting is not None:
            self._starting.cancel()
        self._starting = asyncio.ensure_future(self._begin(slot))

    async def _begin(self, slot: Slot) -> None:
        """Serve as soon as everything that this replica took over is committed."""
        while not slot.replica.serving:
            if slot.closed or slot.replica.role is not Role.PRIMARY:
                return
            await slot.stirred(ARRIVAL_S)
        machine, routes = slot.replica.machine, self._routes
        assert isinstance(machine, LedgerMachine)
        assert routes is not None

        def sink(record: ledger_log.Record) -> None:
            slot.check_primary()
            machine.append(record)
            slot.replica.appended(time.monotonic())
            slot.stir()

        reign = slot.replica.reign

        async def committed(_: int) -> None:
            await slot.released(machine.log.lsn, reign)

        machine.ledger.serve(sink, routes.map.config, time.monotonic())
        self._service = LedgerService(
            self._job, routes.generation, routes.map.config, ledger=machine.ledger, committed=committed
        )
        self._announce()
        with contextlib.suppress(ParameshError):  # deposed meanwhile: its successor hears of them too
            if fenced := sorted(self._fenced()):
                await self._service.fence(fenced)

    async def _end_service(self) -> None:
        service, self._service = self._service, None
        if service is None:
            return
        await service.close()
        if self.slot is not None:
            machine = self.slot.replica.machine
            assert isinstance(machine, LedgerMachine)
            machine.forget_what_was_volatile()

    @property
    def serving(self) -> LedgerService | None:
        """The ledger, if it serves here now."""
        return self._service

    def info(self) -> ps.PartitionInfo | None:
        """Where the ledger is at, if it serves here."""
        if self._service is None or self.slot is None:
            return None
        machine = self.slot.replica.machine
        digest = bytes.fromhex(self._service.ledger.state_digest())
        return ps.PartitionInfo(partition=0, epoch=machine.epoch, lsn=machine.log.lsn, state_hash=digest)

    async def service(self) -> LedgerService:
        """The ledger, once it serves.

        Raises:
            ParameshError: NOT_PRIMARY (with a hint), NOT_READY.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ARRIVAL_S):
                while self._service is None and self._leads():
                    await self._served.wait()
        if self._service is not None and not self._leads():  # a follower said so, and the map is still to come
            await self._end_service()
        if self._service is None:
            raise self._elsewhere()
        return self._service

    def _leads(self) -> bool:
        return self.slot is not None and self.slot.replica.role is Role.PRIMARY

    def _elsewhere(self) -> ParameshError:
        if self._routes is None or 0 not in self._routes:
            return refuse("NOT_READY", "the ledger is not placed yet, as far as this server knows")
        if self._leads():
            return refuse("NOT_READY", "the ledger is being taken over here")
        try:
            node, epoch = self._routes.primary(0)
        except ParameshError as error:
            return error
        return refuse("NOT_PRIMARY", f"the ledger is at {node.ref.node}", primary=node.address, epoch=epoch)

    async def evict(self, client: int, term: int, why: str) -> bool:
        """Take a client out of the ledger; whether it was a member."""
        return await (await self.service()).evict(client, term, why)

    async def fence(self, clients: Sequence[int]) -> None:
        """Tell the ledger, if it is led here, whom to refuse for ever."""
        if self._leads():
            await (await self.service()).fence(clients)

    async def close(self) -> None:
        """Let the ledger go."""
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
        await self._end_service()
        slot, self.slot = self.slot, None
        if slot is not None:
            await slot.close()

    def register(self, server: grpc.aio.Server) -> None:
        """Register the service `Ledger`, whose calls go to whatever ledger is here."""
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                self._forward(method.name),
                request_deserializer=getattr(lg, method.input_type.name).FromString,
                response_serializer=getattr(lg, method.output_type.name).SerializeToString,
            )
            for method in lg.DESCRIPTOR.services_by_name["Ledger"].methods
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("paramesh.v1.Ledger", handlers),))

    def _forward(self, method: str) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            service, slot = await self.service(), self.slot
            assert slot is not None
            slot.requests += 1
            if method in READS:
                return await getattr(service, method)(request, context)
            slot.check_writable()
            if method == "Join":
                self._check_room(service, request.request.client_id)
            answer = await getattr(service, method)(request, context)
            slot.check_writable()  # followers may have gone since: the caller asks again, for the same answer
            return answer

        return call

    def _check_room(self, service: LedgerService, client: int) -> None:
        """Refuse a new member while memory is tight: each brings contributions to hold.

        Raises:
            Retryable: OVERLOADED.
        """
        if self._room is not None and self._room.tight and not service.ledger.is_member(client):
            raise self._room.full("there is none for another member; waiting, or add servers")
