"""A server process: the shells of `paramesh_server` as handlers around its pure cores.

Each method mirrors one of the real shell, and names it: what the real one awaits, this one
awaits, and between two awaits both do the same. The memory of a crashed process is gone.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from paramesh.errors import ParameshError, refuse
from paramesh.routing import Routes
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator.rows import ServerRow
from paramesh_coordinator.state import NodeKey
from paramesh_server.handover import leads_elsewhere
from paramesh_server.insync import Ref
from paramesh_server.ledger_host import NOT_MADE
from paramesh_server.partition import Partition
from paramesh_server.replica import Replica, Role
from paramesh_server.roles import take_role
from paramesh_server.shards import ARRIVAL_S
from paramesh_server.staging import Budget

from tests.simulation.dataplane import DataPlane
from tests.simulation.handover import Handover
from tests.simulation.kernel import Process, Signal, Task
from tests.simulation.ledger_host import Asked, LedgerHost
from tests.simulation.replication import Inbound, Outbound
from tests.simulation.retry import Backoff
from tests.simulation.slots import Slot

if TYPE_CHECKING:
    from tests.simulation.world import World

BEAT_S = 0.5
LOOK_S = 0.15
"""`wishes.LOOK_S` is 0.05: a look costs more than anything else here."""
MARK_S = 4.0
"""`marks.MARK_S` is a minute: a seed lives less."""
CALL_S = 2.0


class Server(DataPlane, Inbound, Handover):
    """One incarnation."""

    def __init__(self, world: World, name: str, incarnation: int) -> None:
        self.world, self.kernel, self.net = world, world.kernel, world.net
        self.process = Process(name)
        self.ref = Ref(name, incarnation)
        self.me = self.ref.proto()
        self.held: dict[int, Slot] = {}
        self.routes: Routes | None = None
        self.fenced: dict[int, None] = {}
        self.term = 0
        self._arrived = Signal()
        self._reconciling = False
        self._turn = Signal()
        self._registering: Task | None = None
        self.outbound = Outbound(self)
        self.ledger_host = LedgerHost(self)
        self.spawn(self._start(), "start")

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str) -> Task:
        return self.kernel.spawn(self.process, coro, name)

    async def pool(self) -> None:
        """A hop to the pool, or none."""
        if self.world.rng.random() < self.world.profile.pooled:
            await self.kernel.sleep(self.world.rng.uniform(0.0, self.world.profile.pool_s))

    async def call(self, method: str, request: Any, timeout: float = CALL_S) -> Any:
        """Ask the coordinator."""
        return await self.net.call(self.process, "coordinator", method, request, timeout)

    # --- registration, beats, the map ---

    async def _start(self) -> None:
        await self._register()
        self.spawn(self._beat(), "beat")
        self.spawn(self._watch(), "watch")
        self.spawn(self._wish(), "wishes")
        self.spawn(self._mark(), "marks")

    async def _register(self) -> None:
        name, backoff = self.ref.node, Backoff(self.world.rng, cap=1.0)
        hello = ServerRow(name, self.ref.incarnation, f"{name}", f"{name}", f"host-{name}", "0", b"k", 0)
        while True:
            try:
                await self.call("register_server", hello)
                return
            except ParameshError as error:
                if error.reason == "INCARNATION":
                    self.kernel.note(f"{self.ref} ends: {error}")
                    self.world.end(self)
                    return
            await self.kernel.sleep(backoff.next())

    async def _beat(self) -> None:
        nonce, who = 0, NodeKey("server", *self.ref)
        while True:
            try:
                nonce, unknown = await self.call("beat", (who, nonce), timeout=BEAT_S * 0.9)
                if unknown and (self._registering is None or self._registering.done):
                    self._registering = self.spawn(self._register(), "register again")
            except ParameshError:
                pass
            await self.kernel.sleep(BEAT_S)

    async def _watch(self) -> None:
        backoff = Backoff(self.world.rng, cap=1.0)
        while True:
            try:
                routes = await self.call("watch", self.routes.version if self.routes else 0, timeout=3.0)
                self.set_map(routes)
                backoff = Backoff(self.world.rng, cap=1.0)
            except ParameshError:
                await self.kernel.sleep(backoff.next())

    # --- wishes.py ---

    async def _wish(self) -> None:
        while True:
            changes = self._collect()
            if changes:
                try:
                    _, routes = await self.call("change_isr", (self.ref, changes))
                    self.set_map(routes)
                except ParameshError:
                    pass
            await self.kernel.sleep(LOOK_S)

    def _collect(self) -> list[tuple[int, int, int, tuple[Ref, ...], str]]:
        changes = []
        for slot in list(self.held.values()):
            if slot.replica.role is not Role.PRIMARY or slot.closed:
                continue
            before = slot.replica.commit
            wish = slot.replica.insync.wish(self.kernel.now)
            if slot.replica.commit != before:
                slot.stir()
            if wish is not None:
                epoch = slot.replica.machine.epoch
                self.kernel.note(f"{self.ref.node} wishes p{slot.number} {sorted(wish.isr)} because {wish.why}")
                changes.append((slot.number, epoch, wish.version, tuple(sorted(wish.isr)), wish.why))
        return changes

    async def _mark(self) -> None:
        """`marks.py`."""
        while True:
            slots = [s for s in self.held.values() if s.replica.role is Role.PRIMARY and s.replica.insync.followers]
            if not slots:
                await self.kernel.sleep(MARK_S)
            for slot in slots:
                await self.kernel.sleep(MARK_S / len(slots))
                try:
                    await slot.lead(slot.replica.machine.mark)
                except ParameshError:
                    pass

    # --- placement.py ---

    def set_map(self, routes: Routes) -> None:
        """`CoordinatorLink.set_map`, and everybody who listens."""
        if self.routes is not None and routes.version <= self.routes.version:
            return
        self.routes = routes
        self.term = max(self.term, routes.map.term)
        self.spawn(self._follow(routes), "follow")

    async def refresh(self) -> None:
        self.set_map(await self.call("get_map", None))

    def mine(self, number: int) -> bool:
        return self.routes is not None and number in self.routes and self._is_mine(self.routes.partition(number))

    def listed(self, number: int) -> bool:
        return self.routes is not None and number in self.routes and self._keeps(self.routes.partition(number))

    def _is_mine(self, row: pb.Partition) -> bool:
        return row.primary == self.me and row.state not in NOT_MADE

    def _keeps(self, row: pb.Partition) -> bool:
        return row.primary == self.me or self.me in row.isr or self.me in row.learners

    async def _follow(self, routes: Routes) -> None:
        backoff = Backoff(self.world.rng, cap=1.0)
        while True:
            while self._reconciling:
                await self._turn.next
            if routes is not self.routes:
                return
            self._reconciling = True
            try:
                await self._reconcile(routes)
                return
            except ParameshError as error:
                self.kernel.note(f"{self.ref.node} waits with map {routes.version}: {error!r}")
            finally:
                self._reconciling = False
                self._turn.fire()
            await self.kernel.sleep(backoff.next())

    async def _reconcile(self, routes: Routes) -> None:
        rows = {row.id: row for row in routes.map.partitions}
        for number, slot in list(self.held.items()):
            if leads_elsewhere(slot, rows.get(number), self.me):  # type: ignore[arg-type]
                await self.deposed(slot, rows[number])
        for number in [n for n in self.held if n and (n not in rows or not self._keeps(rows[n]))]:
            self.kernel.note(f"{self.ref.node} drops p{number}")
            await self.held.pop(number).close()
        if 0 in rows:
            await self._follow_ledger(routes, rows[0])
        for number, row in rows.items():
            here = number in self.held or row.state not in NOT_MADE
            if number and self._keeps(row) and here:
                await self._hold(row)

    async def _follow_ledger(self, routes: Routes, row: pb.Partition) -> None:
        mine, listed = self._is_mine(row), self._keeps(row)
        slot = await self.ledger_host.follow(routes, row, mine=mine, listed=listed, dead=self._dead())
        if slot is not None:
            self.outbound.sync(slot)

    async def _hold(self, row: pb.Partition) -> None:
        slot = self.held.get(row.id)
        if slot is None:
            machine = await self.make(row)
            slot = self.held[row.id] = Slot(self, Replica(machine, self.ref))
            self._arrived.fire()
        assert self.routes is not None
        slot.min_isr = max(1, self.routes.map.config.min_isr)
        mine, before = self._is_mine(row), slot.replica.role
        if await take_role(slot, row, mine=mine, dead=self._dead()):  # type: ignore[arg-type]
            self.kernel.note(f"{self.ref.node} leads p{row.id} epoch={row.epoch} lsn={slot.replica.machine.log.lsn}")
            await slot.run(lambda: self._fence_remembered(slot))
        elif before is Role.PRIMARY and not mine:
            self.kernel.note(f"{self.ref.node} hears of p{row.id} epoch={row.epoch} role={slot.replica.role.value}")
        slot.stir()
        self.outbound.sync(slot)

    def _dead(self) -> frozenset[Ref]:
        assert self.routes is not None
        gone = (pb.NODE_STATE_DEAD, pb.NODE_STATE_LEFT)
        return frozenset(Ref.of(node.ref) for node in self.routes.map.nodes if node.state in gone)

    def _fence_remembered(self, slot: Slot) -> None:
        for client in sorted(self.fenced):
            slot.partition.fence(client)

    async def make(self, row: pb.Partition) -> Partition:
        """An empty replica."""
        await self.kernel.sleep(self.world.rng.uniform(0.0, 0.01))
        spec, layouts = self.world.schema(row.table_id)
        return Partition(row.id, row.table_id, layouts[row.index], spec, epoch=row.epoch, budget=Budget(1 << 30))

    # --- control.py, ledger_host.py ---

    def _check_term(self, term: int) -> None:
        if term < self.term:
            raise refuse("STALE_TERM", f"term {term} is over")
        self.term = term

    async def evict(self, request: tuple[int, int, str]) -> bool:
        """`ServerControl.Evict`."""
        term, client, why = request
        self._check_term(term)
        self.world.checks.ledger.dead(await self.ledger_host.evict(client, term, why), client)
        return True

    async def fence(self, request: tuple[int, tuple[int, ...]]) -> int:
        """`ServerControl.Fence`."""
        term, clients = request
        self._check_term(term)
        await self.ledger_host.fence(clients)
        return await self.fence_all(clients)

    async def ledger(self, asked: Asked) -> Any:
        """The service `Ledger`."""
        checks = self.world.checks.ledger
        doomed = checks.asked(self.held.get(0), asked)
        try:
            slot, answer = await self.ledger_host.call(asked)
        except ParameshError as error:
            checks.refused(self.held.get(0), asked, error)
            raise
        checks.told(slot, asked, answer, doomed)
        return answer

    # --- shards.py ---

    async def find(self, number: int, epoch: int) -> Slot:
        """The slot, if this process is its primary or about to be; at that epoch."""
        slot = await self._find(number)
        slot.partition.check_epoch(epoch)
        return slot

    async def _find(self, number: int) -> Slot:
        slot = self.held.get(number)
        if slot is not None and slot.replica.serving:
            return slot
        if self.routes is None or number not in self.routes:
            await self.refresh()
        if self.mine(number):
            slot = await self._wait_for(number)
            if slot is not None:
                return slot
        raise refuse("NOT_READY" if self.mine(number) else "NOT_PRIMARY", f"partition {number}")

    async def _wait_for(self, number: int) -> Slot | None:
        deadline = self.kernel.now + ARRIVAL_S
        while self.kernel.now < deadline:
            slot = self.held.get(number)
            if slot is None:
                await self.kernel.wait(self._arrived.next, deadline - self.kernel.now)
            elif slot.replica.serving:
                return slot
            else:
                await slot.stirred(deadline - self.kernel.now)
        return None

    async def find_replica(self, number: int) -> Slot | None:
        """The replica whatever its role, once it is made; `server.Server._replica`."""
        if not number:
            return self.held.get(0)
        deadline = self.kernel.now + ARRIVAL_S
        while self.kernel.now < deadline and number not in self.held and self.listed(number):
            await self.kernel.wait(self._arrived.next, deadline - self.kernel.now)
        return self.held.get(number)
