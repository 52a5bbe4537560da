"""What is staged follows a partition that moves: `handover.py`, step by step, mixed into a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paramesh.errors import ParameshError, refuse
from paramesh.v1 import types_pb2 as pb
from paramesh_server.handover import SHIP_S, TAKE_S, Staged
from paramesh_server.insync import Ref
from paramesh_server.replica import Role

from tests.simulation.retry import Backoff

if TYPE_CHECKING:
    from tests.simulation.slots import Slot


@dataclass(frozen=True)
class Shipment:
    """Everything that an old primary had staged of one partition."""

    target: Ref
    partition: int
    epoch: int
    staged: Staged


class Handover:
    """`handover.Handover`: both sides."""

    async def deposed(self: Any, slot: Slot, row: pb.Partition) -> None:
        """Lead no longer, and ship what is staged."""
        slot.replica.heed(row.epoch)
        slot.stir()
        staged = await slot.run(lambda: slot.partition.staging.all())
        if staged:
            self.spawn(self._ship(slot.number, staged), "ship")

    async def _ship(self: Any, number: int, staged: Staged) -> None:
        deadline, backoff = self.kernel.now + SHIP_S, Backoff(self.world.rng)
        while True:
            try:
                await self._ship_once(number, staged)
                return
            except ParameshError as error:
                self.kernel.note(f"{self.ref.node} cannot hand p{number} over: {error!r}")
            if self.kernel.now >= deadline:
                return
            await self.kernel.sleep(backoff.next())

    async def _ship_once(self: Any, number: int, staged: Staged) -> None:
        row = self.routes.partition(number)
        target = Ref.of(row.primary)
        if target == self.ref:
            return
        shipment = Shipment(target, number, row.epoch, staged)
        await self.net.call(self.process, target.node, "take_over_staged", shipment, SHIP_S)
        self.kernel.note(f"{self.ref.node} handed {len(staged)} staged of p{number} to {target.node}")

    async def take_over_staged(self: Any, shipment: Shipment) -> None:
        """Stage what an old primary had staged."""
        if shipment.target != self.ref:
            raise refuse("UNKNOWN_NODE", f"this is {self.ref.node} of another incarnation")
        slot = await self._led(shipment.partition, shipment.epoch)
        for key, contribution in shipment.staged:
            await slot.lead(lambda key=key, made=contribution: slot.partition.take_staged(key, made))

    async def _led(self: Any, number: int, epoch: int) -> Slot:
        slot: Slot | None = await self.find_replica(number)
        if slot is None:
            raise refuse("NOT_READY", f"the map lists no replica of partition {number} here")
        deadline = self.kernel.now + TAKE_S
        while not (slot.replica.role is Role.PRIMARY and slot.partition.epoch >= epoch):
            if slot.replica.promised > epoch:
                raise refuse("NOT_PRIMARY", f"partition {number} has another primary now")
            if self.kernel.now >= deadline or slot.closed:
                raise refuse("NOT_READY", f"partition {number} is not led here yet")
            await slot.stirred(deadline - self.kernel.now)
        return slot
