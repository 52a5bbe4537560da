"""The requests of clients: `servicer.py` and `reads.py`, step by step, mixed into a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paramesh.errors import ParameshError, refuse
from paramesh.v1 import types_pb2 as pb
from paramesh_server.reads import FLOOR_S
from paramesh_server.requests import Outcome, StagedAt, Update
from paramesh_server.servicer import GAP_S
from paramesh_server.staging import Contribution
from paramesh_server.writes import SlotFrame

from tests.simulation.slots import Slot

if TYPE_CHECKING:
    from tests.simulation.kernel import Kernel
    from tests.simulation.world import World


@dataclass(frozen=True)
class Push:
    """A sequenced update, a staged contribution, or first values, for one partition."""

    client: int
    partition: int
    epoch: int
    contribution: Contribution | None = None
    seq: int = 0
    staged: StagedAt | None = None
    committed: tuple[pb.StepRecord, ...] = ()
    writes: tuple[SlotFrame, ...] = ()


@dataclass(frozen=True)
class Pull:
    """A read of one partition."""

    client: int
    partition: int
    epoch: int
    floor: tuple[int, int] = (0, 0)
    step: int | None = None
    committed: tuple[pb.StepRecord, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a partition says."""

    lsn: int
    epoch: int
    applied_step: int
    duplicate: bool = False
    values: bytes = field(default=b"", repr=False)


class DataPlane:
    """`servicer.DataPlane` and `reads.Reads`."""

    world: World
    kernel: Kernel
    held: dict[int, Slot]
    find: Callable[..., Any]

    async def push(self, request: Push) -> Answer:
        """One partition's outcome, released like any answer."""
        slot = await self.find(request.partition, request.epoch)
        reign = slot.replica.reign
        try:
            outcome = await self._push(slot, request)
            partition = slot.partition
            answer = Answer(outcome.lsn, partition.epoch, partition.applied_step, outcome.duplicate)
            await slot.released(partition.log.lsn, reign, kept=True)
        except ParameshError as error:
            raise await self._refusal(error, slot, reign) from None
        self.world.checks.answered(slot, request, answer)
        return answer

    async def _refusal(self, error: ParameshError, slot: Slot, reign: int) -> ParameshError:
        if error.reason not in ("NOT_PRIMARY", "NOT_ENOUGH_REPLICAS"):
            try:
                await slot.released(slot.partition.log.lsn, reign)
            except ParameshError as newer:
                return newer
        return error

    async def _push(self, slot: Slot, request: Push) -> Outcome:
        slot.check_writable()
        client, made = request.client, request.contribution
        outcome: Outcome
        if request.writes:
            outcome = await slot.write(lambda: slot.partition.assign(client, 1, request.writes, 1))
        elif request.staged is not None:
            at, records = request.staged, list(request.committed)
            assert made is not None
            outcome = await slot.write(lambda: slot.partition.stage(client, at, made, records))
        else:
            outcome = await self._update(slot, request)
        return outcome

    async def _update(self, slot: Slot, request: Push) -> Outcome:
        update, made = Update(request.seq, {}), request.contribution
        assert made is not None
        deadline = self.kernel.now + GAP_S
        while True:
            outcome: Outcome = await slot.write(lambda: slot.partition.push(request.client, update, made))
            if not outcome.held:
                return outcome
            if not await slot.changed(deadline - self.kernel.now):
                raise refuse("SEQ_GAP", f"seq {update.seq} came, an earlier one did not")

    async def pull(self, request: Pull) -> Answer:
        """One partition's values at one point of its log."""
        slot = await self.find(request.partition, request.epoch)
        reign = slot.replica.reign
        try:
            if request.step is not None:
                answer = await slot.lead(lambda: self._at_step(slot, request))
            else:
                answer = await self._above_floor(slot, request)
            await slot.released(answer.lsn, reign, kept=bool(request.committed))
        except ParameshError as error:
            raise await self._refusal(error, slot, reign) from None
        return answer

    def _at_step(self, slot: Slot, request: Pull) -> Answer:
        assert request.step is not None
        if slot.partition.applied_step < request.step:
            slot.check_writable()
        slot.partition.commit(request.committed)
        slot.partition.check_step(request.step)
        return self._encode(slot)

    async def _above_floor(self, slot: Slot, request: Pull) -> Answer:
        partition = slot.partition
        floor_epoch, floor_lsn = request.floor
        if floor_epoch > partition.epoch:
            raise refuse("UNKNOWN_EPOCH", f"the floor is of epoch {floor_epoch}")
        floor = floor_lsn if floor_epoch == partition.epoch else 0
        deadline = self.kernel.now + min(FLOOR_S, 3.0)
        while partition.log.lsn < floor:
            if not await slot.changed(deadline - self.kernel.now):
                raise refuse("DEADLINE", f"partition {partition.id} is at lsn {partition.log.lsn}, floor {floor}")

        def work() -> Answer:
            partition.check_ready()
            return self._encode(slot)

        answer: Answer = await slot.lead(work)
        return answer

    def _encode(self, slot: Slot) -> Answer:
        partition = slot.partition
        return Answer(partition.log.lsn, partition.epoch, partition.applied_step, values=bytes(partition.values))

    async def fence_all(self: Any, clients: tuple[int, ...]) -> int:
        """`DataPlane.fence`."""
        self.fenced.update(dict.fromkeys(clients))
        done = 0
        for slot in [slot for number, slot in self.held.items() if number]:
            try:
                reign = slot.replica.reign
                await slot.lead(lambda slot=slot: [slot.partition.fence(client) for client in clients])
                await slot.released(slot.partition.log.lsn, reign)
                done += 1
            except ParameshError as error:
                if error.reason != "NOT_PRIMARY":
                    raise
        return done
