"""Asks the coordinator for the in-sync sets that this process' primaries wish for.

One call carries the wishes of all partitions: when a host is lost, hundreds of sets change
at once. What became of them is read from the map, never from silence.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from paramesh.channel import header
from paramesh.coordinator_link import CoordinatorLink
from paramesh.errors import ParameshError
from paramesh.routing import Routes
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1.coordinator_pb2_grpc import ReplicasStub

from paramesh_server.insync import Ref
from paramesh_server.replica import Role
from paramesh_server.shards import Held, Slot

log = logging.getLogger(__name__)

LOOK_S = 0.05
"""Seconds between looks: a learner that caught up joins, a silent one leaves, that much later."""

CALL_S = 2.0
"""Deadline of a call: it is repeated, the same, while the outcome is unknown."""


class Wishes:
    """The task that asks.

    Args:
        job: the cluster's name.
        generation: this job's generation now.
        me: this process.
        link: the coordinator.
        slots: every replica of this process.
    """

    def __init__(
        self,
        job: str,
        generation: Callable[[], int],
        me: Ref,
        link: CoordinatorLink,
        slots: Callable[[], Iterable[Slot]],
    ) -> None:
        self._job = job
        self._generation = generation
        self._me = me
        self._link = link
        self._slots = slots
        self._task: asyncio.Task[None] | None = None
        self._told: dict[tuple[int, int], int] = {}
        """What was lost, as the coordinator knows it; by (generation, partition)."""

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            changes, losses = self._collect(), self._losses()
            if changes or losses:
                try:
                    if changes:
                        await self._ask(changes)
                    if losses:
                        await self._report(losses)
                except ParameshError as error:
                    log.warning("in-sync sets wait for the coordinator reason=%s: %s", error.reason, error)
                except Exception:
                    log.exception("asking for in-sync sets failed")
            await asyncio.sleep(LOOK_S)

    def _collect(self) -> list[co.IsrChange]:
        changes, now = [], time.monotonic()
        for slot in self._slots():
            if slot.replica.role is not Role.PRIMARY or slot.closed:
                continue
            before = slot.replica.commit
            wish = slot.replica.insync.wish(now)
            if slot.replica.commit != before:
                slot.stir()  # a slow learner is not waited for any more
            if wish is not None:
                isr = [ref.proto() for ref in sorted(wish.isr)]
                epoch = slot.replica.machine.epoch
                changes.append(
                    co.IsrChange(partition=slot.number, epoch=epoch, version=wish.version, isr=isr, why=wish.why)
                )
        return changes

    def _losses(self) -> list[co.PartitionLoss]:
        """What the coordinator has yet to hear of; only what is committed, and so stays true."""
        losses = []
        for slot in self._slots():
            if isinstance(slot, Held) and slot.partition.lost > self._told.get((self._generation(), slot.number), 0):
                replica = slot.replica
                if replica.serving and replica.commit >= replica.machine.log.lsn:
                    losses.append(
                        co.PartitionLoss(partition=slot.number, epoch=slot.partition.epoch, total=slot.partition.lost)
                    )
        return losses

    async def _report(self, losses: list[co.PartitionLoss]) -> None:
        request = co.ReportLossRequest(
            request=header(self._job, self._generation()), primary=self._me.proto(), losses=losses
        )
        await self._link.call(
            lambda channel: ReplicasStub(channel).ReportLoss(request, timeout=CALL_S), CALL_S, "reporting a loss"
        )
        for loss in losses:
            self._told[request.request.generation, loss.partition] = loss.total
            log.error("partition=%d lost=%d acknowledged updates went with a primary", loss.partition, loss.total)

    async def _ask(self, changes: list[co.IsrChange]) -> None:
        request = co.ChangeIsrRequest(
            request=header(self._job, self._generation()), primary=self._me.proto(), changes=changes
        )
        response = await self._link.call(
            lambda channel: ReplicasStub(channel).ChangeIsr(request, timeout=CALL_S), CALL_S, "changing in-sync sets"
        )
        for change in changes:
            done = change.partition in response.done
            log.info("isr partition=%d done=%s why=%s", change.partition, done, change.why)
        self._link.set_map(Routes(response.map))
