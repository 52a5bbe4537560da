"""What the coordinator has this server do for checkpoints: mark, write, drop, load.

Writing and reading go through a thread of their own: neither training nor heartbeats wait
for a disk. Every call is repeatable; what was written once is confirmed again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from paramesh import partition_file
from paramesh.channel import grpc
from paramesh.errors import refuse
from paramesh.failpoints import reach
from paramesh.files import Draft, Folder
from paramesh.v1 import checkpoint_pb2 as cp
from paramesh.v1 import types_pb2 as pb

from paramesh_server.cuts import Cut, Cuts, cut_of
from paramesh_server.ledger import LedgerCut
from paramesh_server.ledger_host import LedgerHost
from paramesh_server.ledger_machine import LedgerMachine
from paramesh_server.ledger_restore import renewed
from paramesh_server.log import Position
from paramesh_server.partition import Partition
from paramesh_server.placement import LEDGER, Placement
from paramesh_server.shards import Held, Shards
from paramesh_server.staging import FrameBytes
from paramesh_server.writes import SlotFrame

log = logging.getLogger(__name__)

SERVICE = "paramesh.v1.CheckpointControl"

LEDGER_FILE = "ledger.bin"

LEVELS = (cp.CHECKPOINT_LEVEL_STEP, cp.CHECKPOINT_LEVEL_PARTITION, cp.CHECKPOINT_LEVEL_ALIGNED)

CUT_WAIT_S = 1.0
"""How long one WriteCut waits for the marked step; the coordinator asks again."""

T = TypeVar("T")


class CheckpointControl:
    """The servicer of `CheckpointControl`.

    Args:
        check: refuses headers of other jobs and generations, and lower terms.
        shards: the partitions here.
        ledger: the ledger, if it is here.
        placement: makes partitions, knows the map.
        cuts: what partitions left when they applied the marked step.
    """

    def __init__(
        self,
        check: Callable[[pb.RequestHeader, int], None],
        shards: Shards,
        ledger: LedgerHost,
        placement: Placement,
        cuts: Cuts,
    ) -> None:
        self._check = check
        self._shards = shards
        self._ledger = ledger
        self._placement = placement
        self._cuts = cuts
        self._written: dict[int, cp.WrittenCut] = {}
        """What was written of `_checkpoint`, by partition."""
        self._checkpoint = ""
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="paramesh-checkpoint")

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    # ------------------------------------------------------------------ writing

    async def MarkStep(self, request: cp.MarkStepRequest, context: Any) -> cp.MarkStepResponse:
        """Have the ledger's next decisions carry the id."""
        self._check(request.request, request.term)
        service = await self._ledger.service()
        if service.cut is None or service.cut.checkpoint != request.checkpoint:
            service.ledger.want_cut(request.checkpoint)
        return cp.MarkStepResponse()

    async def PauseClocks(self, request: cp.PauseClocksRequest, context: Any) -> cp.PauseClocksResponse:
        """Hold finished clocks; say whether anybody is in the middle of one."""
        self._check(request.request, request.term)
        quiet, ranks = (await self._ledger.service()).pause_clocks(request.checkpoint)
        return cp.PauseClocksResponse(quiet=quiet, waiting_for=ranks)

    async def ResumeClocks(self, request: cp.ResumeClocksRequest, context: Any) -> cp.ResumeClocksResponse:
        """Let everybody go on; say whether the pause lasted until now."""
        self._check(request.request, request.term)
        whole, torn = (await self._ledger.service()).resume_clocks(request.checkpoint)
        return cp.ResumeClocksResponse(whole=whole, torn=torn)

    async def TakeCut(self, request: cp.TakeCutRequest, context: Any) -> cp.TakeCutResponse:
        """Copy partitions in memory; the ledger only in a quiet pause."""
        self._check(request.request, request.term)
        for number in request.partitions:
            if number == LEDGER:
                await self._take_ledger(request.checkpoint)
            else:
                held = await self._shards.find(number)
                cut = await held.lead(partial(cut_of, held.partition), inline=False)
                self._cuts.put(request.checkpoint, number, cut)
        return cp.TakeCutResponse()

    async def _take_ledger(self, checkpoint: str) -> None:
        service = await self._ledger.service()
        if not service.pause_clocks(checkpoint)[0]:
            raise refuse("NOT_READY", "a member is in the middle of a clock")
        service.cut = service.ledger.cut(checkpoint)

    async def WriteCut(self, request: cp.WriteCutRequest, context: Any) -> cp.WriteCutResponse:
        """Write some partitions' cuts."""
        self._check(request.request, request.term)
        if request.level not in LEVELS:
            raise refuse("UNIMPLEMENTED", f"cuts of level {request.level} are not made by this release")
        if self._checkpoint != request.checkpoint:
            self._checkpoint, self._written = request.checkpoint, {}
        return cp.WriteCutResponse(written=[await self._one(number, request) for number in request.partitions])

    async def _one(self, number: int, request: cp.WriteCutRequest) -> cp.WrittenCut:
        known = self._written.get(number)
        if known is not None:
            return known
        done = await (self._write_ledger(request) if number == LEDGER else self._write(number, request))
        reach("checkpoint.report.begun", done.file)
        if self._checkpoint == request.checkpoint:
            self._written[number] = done
        return done

    async def _write_ledger(self, request: cp.WriteCutRequest) -> cp.WrittenCut:
        service = await self._ledger.service()
        cut = service.cut
        if request.level == cp.CHECKPOINT_LEVEL_PARTITION:
            cut = service.cut = service.ledger.cut(request.checkpoint)
        if cut is None or cut.checkpoint != request.checkpoint:
            await asyncio.sleep(0.05)
            raise refuse("NOT_READY", "the marked step is not decided yet, or the pause is over")
        if cut.torn():
            raise refuse("NOT_FOUND", f"no step is a cut of all groups: {cut.torn()}")
        slot = self._ledger.slot
        if slot is None:
            raise refuse("NOT_PRIMARY", "the ledger has moved to another server")
        # The cut counts the ledger's own records; the log has those of epochs and marks besides.
        await slot.released(slot.replica.machine.log.lsn, slot.replica.reign)
        entry = await self._put(request.folder, LEDGER_FILE, [cut.data])
        entry.lsn = cut.lsn
        entry.groups.extend(_groups(cut))
        return entry

    async def _write(self, number: int, request: cp.WriteCutRequest) -> cp.WrittenCut:
        held = await self._shards.find(number)
        reign = held.replica.reign
        cut = await self._cut(held, request)
        await held.released(cut.state.lsn, reign)
        metadata = partition_file.metadata_of(number, cut.state)
        entry = await self._put(
            request.folder, partition_file.name_of(number), partition_file.chunks(metadata, cut.parts)
        )
        self._cuts.done(request.checkpoint, number)
        entry.partition, entry.group = number, cut.group
        entry.lsn, entry.applied_step = cut.state.lsn, cut.state.applied_step
        return entry

    async def _cut(self, held: Held, request: cp.WriteCutRequest) -> Cut:
        if request.level == cp.CHECKPOINT_LEVEL_PARTITION:
            cut = await held.lead(lambda: cut_of(held.partition), inline=False)
            self._cuts.put(request.checkpoint, held.number, cut)
            return cut
        deadline = asyncio.get_running_loop().time() + CUT_WAIT_S
        while True:
            found = self._cuts.get(request.checkpoint, held.number)
            left = deadline - asyncio.get_running_loop().time()
            if found is not None:
                return found
            if left <= 0:
                raise refuse("NOT_READY", f"partition {held.number} has not applied the marked step here")
            await held.changed(min(left, 0.1))

    async def _put(self, folder: str, name: str, chunks: Iterable[Any]) -> cp.WrittenCut:
        entry = await self._on_disk(lambda: Draft(folder, folder).put(name, chunks))
        return cp.WrittenCut(file=name, bytes=entry.bytes, sha256=bytes.fromhex(entry.sha256))

    async def DropCut(self, request: cp.DropCutRequest, context: Any) -> cp.DropCutResponse:
        """Forget a checkpoint."""
        self._check(request.request, request.term)
        reach("checkpoint.cut.dropped")
        self._cuts.drop(request.checkpoint)
        if self._checkpoint == request.checkpoint:
            self._written = {}
        if self._ledger.serving is not None:
            self._ledger.serving.ledger.want_cut("")
            self._ledger.serving.resume_clocks(request.checkpoint)
            self._ledger.serving.cut = None
        return cp.DropCutResponse()

    # ------------------------------------------------------------------ loading

    async def LoadCut(self, request: cp.LoadCutRequest, context: Any) -> cp.LoadCutResponse:
        """Make partitions of this server what files say."""
        self._check(request.request, request.term)
        if self._placement.generation != request.request.generation:
            await self._placement.refresh()
        if self._placement.generation != request.request.generation:
            raise refuse("NOT_READY", f"generation {request.request.generation} has not come to this server yet")
        for file in request.files:
            await self._load(file, request)
        return cp.LoadCutResponse(partitions=[file.partition for file in request.files])

    async def _load(self, file: cp.CutFile, request: cp.LoadCutRequest) -> None:
        number = file.partition
        if (self._ledger.slot if number == LEDGER else self._shards.held.get(number)) is not None:
            return  # loaded before: the answer was lost
        row = self._placement.row(number)
        if row is None or row.state != pb.PARTITION_STATE_RESTORING or not self._placement.listed(number):
            raise refuse("NOT_PRIMARY", f"partition {number} is not to be loaded here", partition=number)
        folder = Folder(request.folder)
        data = await self._on_disk(lambda: folder.read_as(file.file, file.bytes, file.sha256.hex()))
        if number == LEDGER:
            extra = {key: await self._extra(folder, name) for key, name in request.extra.items()}
            self._ledger.load(await self._on_disk(lambda: self._ledger_machine(data, row.epoch, extra)))
            return
        partition = await self._placement.make(row)
        await self._on_disk(lambda: _restore(partition, data, file, request.last_client))
        self._shards.add(partition, self._placement.me)
        log.info("partition=%d loaded lsn=%d step=%d", number, partition.log.lsn, partition.applied_step)

    async def _extra(self, folder: Folder, name: str) -> tuple[int, bytes]:
        version, _, value = (await self._on_disk(lambda: folder.read(name))).partition(b"\n")
        return int(version), value

    def _ledger_machine(self, data: bytes, epoch: int, extra: dict[str, tuple[int, bytes]]) -> LedgerMachine:
        machine = self._ledger.fresh()
        machine.epoch = epoch
        state = renewed(data, extra)
        machine.ledger.install(state)
        machine.log.reset(Position(machine.ledger.lsn, epoch))
        return machine

    def register(self, server: grpc.aio.Server) -> None:
        """Register the service."""
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                getattr(self, method.name),
                getattr(cp, method.input_type.name).FromString,
                getattr(cp, method.output_type.name).SerializeToString,
            )
            for method in cp.DESCRIPTOR.services_by_name["CheckpointControl"].methods
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def close(self) -> None:
        """What is being written is finished, and the loop goes on meanwhile; nothing begins any more."""
        await asyncio.to_thread(self._disk.shutdown, wait=True, cancel_futures=True)


def _groups(cut: LedgerCut) -> list[cp.CutGroup]:
    return [
        cp.CutGroup(group=number, name=name, steps=steps, next_step=step, ranks=cut.ranks)
        for number, (name, steps, step) in sorted(cut.groups.items())
    ]


def _restore(partition: Partition, data: bytes, file: cp.CutFile, last_client: int) -> None:
    """Fill a fresh partition. The clients of before are over: one low-water mark instead of their entries."""
    metadata, parts = partition_file.read(data, file.file)
    state = partition_file.state_of(metadata, file.partition, file.file)
    if file.has_applied_step:
        state.applied_step = file.applied_step
    del state.clients[:], state.fenced[:]
    state.lost = 0  # told, and of a generation that is over
    state.fenced_through = max(state.fenced_through, last_client)
    state.epoch = partition.epoch
    partition.restore(state, [_frame(partition, part) for part in parts])


def _frame(partition: Partition, part: partition_file.Part) -> SlotFrame:
    segments = partition.layout.segments
    if part.slot and part.segment >= len(segments):
        raise refuse("TENSOR_MISMATCH", f"partition {partition.id} has no segment {part.segment}")
    offset = segments[part.segment].offset if part.slot and not part.scalar else 0
    frame = FrameBytes(offset, 0 if part.scalar else len(part.data), memoryview(part.data), 0)
    return SlotFrame(frame, part.slot, part.segment, part.scalar)
