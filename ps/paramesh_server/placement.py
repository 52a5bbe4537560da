"""From the map to this process: which partitions to hold, and whether the ledger is here.

The map is the coordinator's decision, already committed; following it is idempotent. A row
that lists (my name, my incarnation) as primary, in sync or learner and that is not held is
made, empty; one that is held and lists me no longer is dropped. A row with another
incarnation of me is not mine. Being named primary is the order to take over: whoever is
named was in sync, so it has everything that was ever acknowledged, or nothing ever was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from paramesh.channel import header
from paramesh.coordinator_link import CoordinatorLink
from paramesh.errors import ParameshError
from paramesh.retry import Backoff
from paramesh.routing import PartitionLayout, Routes, cut
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.coordinator_pb2_grpc import CatalogStub, MapServiceStub

from paramesh_server.aggregate import Workspace
from paramesh_server.handover import HandOver, leads_elsewhere
from paramesh_server.insync import Ref
from paramesh_server.ledger_host import NOT_MADE, LedgerHost
from paramesh_server.partition import Partition
from paramesh_server.roles import take_role
from paramesh_server.shards import Held, Shards, Slot
from paramesh_server.staging import Budget

log = logging.getLogger(__name__)

LEDGER = 0
"""Number of the ledger's partition."""

CALL_S = 3.0
"""Deadline of one look at the coordinator on behalf of a waiting request."""


async def _nothing_staged(held: Held, row: pb.Partition) -> None:
    """For tests of placement alone."""


class Placement:
    """Follows the map.

    Args:
        me: this process's name and incarnation.
        job: the cluster's name.
        link: where schemas come from.
        shards: what this process holds.
        ledger: where the ledger is, if it is here.
        budget: bytes that all partitions may stage.
        follow: called when a replica's role or followers may have changed.
    """

    def __init__(
        self,
        me: pb.ReplicaRef,
        job: str,
        link: CoordinatorLink,
        shards: Shards,
        ledger: LedgerHost,
        budget: Budget,
        follow: Callable[[Slot], None] = lambda _: None,
    ) -> None:
        self._me = me
        self._ref = Ref.of(me)
        self._follow_up = follow
        self.hand_over: HandOver = _nothing_staged
        """Called, and awaited, with a replica here that leads no longer, before it is let go of."""
        self._job = job
        self._link = link
        self._shards = shards
        self._ledger = ledger
        self._budget = budget
        self._workspace = Workspace()
        self._schemas: dict[int, tuple[pb.TableSpec, tuple[PartitionLayout, ...]]] = {}
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.generation = 0
        """Of the newest map."""
        self.on_cut: Callable[[Partition, str], None] | None = None
        """Takes cuts of partitions for checkpoints."""

    def mine(self, partition: int) -> bool:
        """Whether the newest map gives a partition to this process."""
        routes = self._shards.routes
        if routes is None or partition not in routes:
            return False
        return self._is_mine(routes.partition(partition))

    @property
    def me(self) -> Ref:
        """This process."""
        return self._ref

    @property
    def schemas(self) -> dict[int, pb.TableSpec]:
        """Of the tables that were asked for here, by id."""
        return {table_id: spec for table_id, (spec, _) in self._schemas.items()}

    def row(self, partition: int) -> pb.Partition | None:
        """A partition's row in the newest map."""
        routes = self._shards.routes
        return None if routes is None or partition not in routes else routes.partition(partition)

    def listed(self, partition: int) -> bool:
        """Whether the newest map lists a replica in this process."""
        routes = self._shards.routes
        return routes is not None and partition in routes and self._keeps(routes.partition(partition))

    def _is_mine(self, row: pb.Partition) -> bool:
        return row.primary == self._me and row.state not in NOT_MADE

    def on_map(self, routes: Routes) -> None:
        """A new map came: follow it, one after the other."""
        self._shards.routes = routes
        task = asyncio.ensure_future(self._follow(routes))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def refresh(self) -> None:
        """Fetch the map now and follow it.

        Raises:
            ParameshError: UNREACHABLE, or what the coordinator refused with.
        """
        request = co.GetMapRequest(request=header(self._job))
        answer = await self._link.call(
            lambda channel: MapServiceStub(channel).GetMap(request, timeout=CALL_S), CALL_S, "the map"
        )
        self._link.set_map(Routes(answer.map))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CALL_S)

    async def _follow(self, routes: Routes) -> None:
        """Follow one map until it is done, or a newer one is there."""
        backoff = Backoff()
        while True:
            async with self._lock:
                if routes is not self._shards.routes or await self._try(routes):
                    return
            await asyncio.sleep(backoff.next())

    async def _try(self, routes: Routes) -> bool:
        """Whether nothing is left to be done; what passes (no coordinator) is worth repeating."""
        try:
            await self._reconcile(routes)
        except ParameshError as error:
            log.warning("placement=waiting map_version=%d reason=%s: %s", routes.version, error.reason, error)
            return False
        except Exception:
            log.exception("placement=failed map_version=%d", routes.version)
        return True

    async def _reconcile(self, routes: Routes) -> None:
        if self.generation and routes.generation > self.generation:
            log.warning("generation=%d is over; dropping everything", self.generation)
            await self._drop_all()
        self.generation = routes.generation
        rows = {row.id: row for row in routes.map.partitions}
        for number, held in list(self._shards.held.items()):
            if leads_elsewhere(held, rows.get(number), self._me):
                log.warning("partition=%d goes to=%s epoch=%d", number, rows[number].primary.node, rows[number].epoch)
                await self.hand_over(held, rows[number])
        for number in [n for n in self._shards.held if n not in rows or not self._keeps(rows[n])]:
            log.info("partition=%d dropped map_version=%d", number, routes.version)
            await self._shards.drop(number)
        if LEDGER in rows:
            await self._follow_ledger(routes, rows[LEDGER])
        for number, row in rows.items():
            here = number in self._shards.held or row.state not in NOT_MADE
            if number != LEDGER and self._keeps(row) and here:
                await self._hold(row)  # nothing is made for an OFFLINE row: it would be empty

    def _keeps(self, row: pb.Partition) -> bool:
        """An OFFLINE row keeps its old replicas: their memory is the only copy that there is."""
        return row.primary == self._me or self._me in row.isr or self._me in row.learners

    async def _hold(self, row: pb.Partition) -> None:
        held = self._shards.held.get(row.id)
        if held is None:
            try:
                held = self._shards.add(await self.make(row), self._ref)
            except ParameshError as error:
                if error.reason in ("UNREACHABLE", "DEADLINE"):
                    raise  # the coordinator is away: asked again
                log.error("partition=%d cannot be made reason=%s: %s", row.id, error.reason, error)
                self._shards.fail(row.id, error)
                return
        held.min_isr = max(1, self._config().min_isr)
        if await take_role(held, row, mine=self._is_mine(row), dead=self._dead()):
            await held.run(lambda: self._shards.fence_remembered(held.partition), inline=True)
        held.stir()
        self._follow_up(held)

    async def _follow_ledger(self, routes: Routes, row: pb.Partition) -> None:
        mine, listed = self._is_mine(row), self._keeps(row)
        slot = await self._ledger.follow(routes, row, mine=mine, listed=listed, dead=self._dead())
        if slot is not None:
            self._follow_up(slot)

    def _config(self) -> pb.JobConfig:
        routes = self._shards.routes
        return pb.JobConfig() if routes is None else routes.map.config

    def _dead(self) -> frozenset[Ref]:
        routes = self._shards.routes
        nodes = [] if routes is None else routes.map.nodes
        return frozenset(Ref.of(n.ref) for n in nodes if n.state in (pb.NODE_STATE_DEAD, pb.NODE_STATE_LEFT))

    async def make(self, row: pb.Partition) -> Partition:
        """An empty replica of a partition.

        Raises:
            ParameshError: UNREACHABLE, if the schema is not known here and nobody answers.
        """
        spec, layouts = await self._schema(row.table_id)
        partition = Partition(
            row.id,
            row.table_id,
            layouts[row.index],
            spec,
            epoch=row.epoch,
            budget=self._budget,
            workspace=self._workspace,
        )
        partition.on_cut = self.on_cut
        log.info("partition=%d table=%s epoch=%d bytes=%d made", row.id, spec.name, row.epoch, partition.layout.nbytes)
        return partition

    async def _schema(self, table_id: int) -> tuple[pb.TableSpec, tuple[PartitionLayout, ...]]:
        if table_id not in self._schemas:
            request = co.DescribeTableRequest(request=header(self._job, self.generation), table_id=table_id)
            answer = await self._link.call(
                lambda channel: CatalogStub(channel).DescribeTable(request, timeout=CALL_S), CALL_S, f"table {table_id}"
            )
            self._schemas[table_id] = (answer.spec, cut(answer.spec))
        return self._schemas[table_id]

    async def _drop_all(self) -> None:
        for number in list(self._shards.held):
            await self._shards.drop(number)
        self._shards.failed.clear()
        self._schemas.clear()
        await self._ledger.close()

    async def close(self) -> None:
        """Drop everything: the process stops."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._drop_all()
