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
from paramesh_server.shards import Slot

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
            changes = self._collect()
            if changes:
                try:
                    await self._ask(changes)
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
