"""Who serves the ledger: `ledger_host.LedgerHost`, method by method, around the real `LedgerService`.

The service and everything under it are the real ones; `loop.py` gives them the world's time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from paramesh.errors import ParameshError, refuse
from paramesh.routing import Routes
from paramesh.v1 import types_pb2 as pb
from paramesh_server import ledger_log
from paramesh_server.insync import Ref
from paramesh_server.ledger_host import NOT_MADE, READS
from paramesh_server.ledger_machine import LedgerMachine
from paramesh_server.ledger_service import LedgerService
from paramesh_server.replica import Replica, Role
from paramesh_server.roles import take_role
from paramesh_server.shards import ARRIVAL_S

from tests.simulation.kernel import Signal, Task
from tests.simulation.slots import Slot

if TYPE_CHECKING:
    from tests.simulation.server import Server

JOB = "default"
T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A call of the service `Ledger`, as it travels."""

    method: str
    request: Any
    timeout: float


class Context:
    """Of gRPC's: how long the caller still waits."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def time_remaining(self) -> float:
        """When asked at once."""
        return self._seconds


class Service(LedgerService):
    """The real one; what it has done is looked at."""

    looked: Callable[[], None] = staticmethod(lambda: None)

    def _act(self, event: Callable[[float], T]) -> T:
        try:
            return super()._act(event)
        finally:
            self.looked()


class LedgerHost:
    """Holds a replica of the ledger while the map lists one here."""

    def __init__(self, server: Server) -> None:
        self.server, self.kernel = server, server.kernel
        self._service: LedgerService | None = None
        self._served = Signal()
        self._starting: Task | None = None
        self._routes: Routes | None = None

    @property
    def slot(self) -> Slot | None:
        """Beside the others, where streams and checks look for it."""
        return self.server.held.get(0)

    async def follow(
        self, routes: Routes, row: pb.Partition, *, mine: bool, listed: bool, dead: frozenset[Ref]
    ) -> Slot | None:
        """Hold, lead or let go of the ledger's replica, and hand it the job's configuration."""
        self._routes = routes
        if not listed:
            await self.close()
        elif self.slot is not None or row.state not in NOT_MADE:
            if self.slot is None:
                machine = LedgerMachine(routes.map.config, row.epoch)
                self.server.held[0] = Slot(self.server, Replica(machine, self.server.ref))
            slot = self.server.held[0]
            slot.min_isr = max(1, routes.map.config.min_isr)
            if await take_role(slot, row, mine=mine, dead=dead):  # type: ignore[arg-type]
                self.kernel.note(
                    f"{self.server.ref.node} leads p0 epoch={row.epoch} lsn={slot.replica.machine.log.lsn}"
                )
                await self._end_service()
                self._start(slot)
            elif slot.replica.role is not Role.PRIMARY:
                await self._end_service()
            if self._service is not None:
                self._service.update_config(routes.map.config)
            slot.stir()
        self._served.fire()
        return self.slot

    def fresh(self) -> LedgerMachine:
        """A fresh state for a snapshot to fill."""
        assert self._routes is not None
        return LedgerMachine(self._routes.map.config, 0)

    def _start(self, slot: Slot) -> None:
        if self._starting is not None:
            self._starting.cancel()
        self._starting = self.server.spawn(self._begin(slot), "begin")

    async def _begin(self, slot: Slot) -> None:
        while not slot.replica.serving:
            if slot.closed or slot.replica.role is not Role.PRIMARY:
                return
            await slot.stirred(ARRIVAL_S)
        machine, routes, checks = slot.replica.machine, self._routes, self.server.world.checks
        assert isinstance(machine, LedgerMachine)
        assert routes is not None

        def sink(record: ledger_log.Record) -> None:
            slot.check_primary()
            before = machine.log.last
            machine.append(record)
            slot.replica.appended(self.kernel.now)
            checks.logged(slot, before)
            checks.ledger.appended(record)
            slot.stir()

        reign = slot.replica.reign

        async def committed(_: int) -> None:
            await self._committed(slot, machine.log.lsn, reign)

        machine.ledger.serve(sink, routes.map.config, self.kernel.now)
        service = Service(
            JOB, routes.generation, routes.map.config,
            ledger=machine.ledger, committed=committed, now=lambda: self.kernel.now,
        )  # fmt: skip
        service.looked = lambda: checks.state(slot, machine)
        self._service = service
        self._served.fire()
        self.kernel.note(f"{self.server.ref.node} serves the ledger: {machine.ledger.summary()}")
        checks.ledger.serves(self.server.ref.node, machine.ledger)
        try:
            if fenced := sorted(self.server.fenced):
                await service.fence(fenced)
        except ParameshError:
            pass

    async def _committed(self, slot: Slot, lsn: int, reign: int) -> None:
        await slot.released(lsn, reign)

    async def _end_service(self) -> None:
        service, self._service = self._service, None
        if service is None:
            return
        await service.close()
        if self.slot is not None:
            machine = self.slot.replica.machine
            assert isinstance(machine, LedgerMachine)
            machine.forget_what_was_volatile()

    async def service(self) -> LedgerService:
        """The ledger, once it serves."""
        deadline = self.kernel.now + ARRIVAL_S
        while self._service is None and self._leads() and self.kernel.now < deadline:
            await self.kernel.wait(self._served.next, deadline - self.kernel.now)
        if self._service is not None and not self._leads():
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

    async def evict(self, client: int, term: int, why: str) -> Slot:
        """Take a client out of the ledger; whose."""
        service, slot = await self.service(), self.server.held[0]
        await service.evict(client, term, why)
        return slot

    async def fence(self, clients: tuple[int, ...]) -> None:
        """Tell the ledger, if it is led here, whom to refuse for ever."""
        if self._leads():
            await (await self.service()).fence(clients)

    async def close(self) -> None:
        """Let the ledger go."""
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
        await self._end_service()
        slot = self.server.held.pop(0, None)
        if slot is not None:
            self.kernel.note(f"{self.server.ref.node} drops p0")
            await slot.close()

    async def call(self, asked: Asked) -> tuple[Slot, Any]:
        """`_forward`: one call of the service `Ledger`; who answers, and the answer as it travels."""
        service, slot = await self.service(), self.server.held[0]
        if asked.method not in READS:
            slot.check_writable()
        answer = await getattr(service, asked.method)(asked.request, Context(asked.timeout))
        if asked.method not in READS:
            slot.check_writable()
        return slot, type(answer).FromString(answer.SerializeToString(deterministic=True))
