"""Makes one checkpoint: has servers cut and write, then writes the manifest.

The manifest is the commit. Whatever goes wrong before it (a full disk, a lost primary, this
coordinator's end) leaves nothing that a loader would take for a checkpoint; training never
waits for any of it but for the copies in memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from paramesh.archive import Archive, ClusterManifest, GroupEntry, PartitionEntry, TableRecord, worker_file
from paramesh.errors import ParameshError, refuse
from paramesh.failpoints import reach
from paramesh.files import Draft as FolderDraft
from paramesh.manifest import Entry
from paramesh.v1 import checkpoint_pb2 as cp

from paramesh_coordinator.checkpoint_calls import PASSING, Calls, cut_request
from paramesh_coordinator.driver import Driver
from paramesh_coordinator.operators import LEDGER
from paramesh_coordinator.rows import PartitionRow, Ref, TableRow

__all__ = ["Maker", "Progress"]

log = logging.getLogger(__name__)

STEP_S = 120.0
"""How long a checkpoint of level step waits until a step is decided."""

WRITE_S = 60.0
"""How long partitions may take to apply the marked step and begin to write."""

WORKERS_S = 15.0
"""How long workers' own state is waited for: until each asks for its next batch."""

BATCH = 4
"""Partitions of one WriteCut: progress is seen, and a lost answer costs little."""

PAUSE_S = 25.0
"""How long a checkpoint of level aligned waits until every worker is between two clocks; the ledger ends the
pause by itself soon after."""

STEP, PARTITION, ALIGNED = cp.CHECKPOINT_LEVEL_STEP, cp.CHECKPOINT_LEVEL_PARTITION, cp.CHECKPOINT_LEVEL_ALIGNED

NAMES: dict[int, str] = {STEP: "step", PARTITION: "partition", ALIGNED: "aligned"}

SHARED = "paramesh:cut:shared"
"""Where the chief puts the workers' common state as of the marked step (paramesh.small_state)."""

OWN = "paramesh:cut:own:{rank}"
"""Where each worker puts its own: random generators, buffers."""


@dataclass
class Progress:
    """How far a checkpoint or a restore is; for people."""

    kind: str
    name: str
    phase: str = "beginning"
    done: int = 0
    total: int = 0
    error: ParameshError | None = None
    ended: bool = False


@dataclass
class Maker:
    """One checkpoint in the making.

    Attributes:
        level: STEP, PARTITION or ALIGNED.
        number: of the root's checkpoints.
        progress: updated as it goes.
    """

    driver: Driver
    calls: Calls
    archive: Archive
    name: str
    level: int
    number: int
    periodic: bool
    progress: Progress
    _primaries: dict[int, tuple[Ref, int]] = field(default_factory=dict)
    _entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def _id(self) -> str:
        """Unique over restarts of the coordinator: a server must not take an older cut for this one's."""
        return f"{self.name}#{self.number}.{self.driver.term}.{self.driver.state.job.generation}"

    async def run(self) -> ClusterManifest:
        """Make it.

        Raises:
            ParameshError: why there is none; nothing is left behind.
        """
        parts = sorted(self.driver.state.rows(PartitionRow).values(), key=lambda row: row.partition)
        if not parts:
            raise refuse("NOT_READY", "there is nothing to write yet: the job has no partitions")
        self._primaries = {row.partition: self.calls.primary(row.partition) for row in parts}
        self.progress.total = len(parts)
        checkpoint = self._id
        draft = await asyncio.to_thread(self.archive.draft, self.name)
        try:
            await asyncio.to_thread(draft.begin)
            reach("checkpoint.begun")
            manifest = await self._written(draft, parts, checkpoint)
            self.progress.phase = "committing"
            reach("checkpoint.commit.begun")
            await asyncio.to_thread(self._commit, draft, manifest)
            reach("checkpoint.commit.done")
            return dataclasses.replace(manifest, files=dict(self._entries))
        except BaseException:
            await asyncio.to_thread(draft.abort)
            raise
        finally:
            await self.calls.everywhere("DropCut", lambda: cp.DropCutRequest(checkpoint=checkpoint))

    def _commit(self, draft: FolderDraft, manifest: ClusterManifest) -> None:
        for name, entry in self._entries.items():
            if draft.size(name) != entry.bytes:
                raise refuse(
                    "PATH",
                    f"{name} was written by a server and is not at {draft.url} for the coordinator: --checkpoint-dir "
                    "must be shared by all machines, or an object store",
                    path=draft.url,
                )
        reach("before.manifest")
        draft.commit(manifest.document(), self._entries)
        reach("after.manifest")

    async def _written(self, draft: FolderDraft, parts: list[PartitionRow], checkpoint: str) -> ClusterManifest:
        if self.level == STEP:
            self.progress.phase = "waiting for a step"
            mark = cp.MarkStepRequest(checkpoint=checkpoint)
            await self.calls.insist(self._primaries[LEDGER][0], "MarkStep", mark, WRITE_S)
            reach("checkpoint.marked")
        torn = await self._align(parts, checkpoint) if self.level == ALIGNED else []
        ledger = (await self._write(draft, checkpoint, self.level, [LEDGER], STEP_S))[LEDGER]
        self.progress.phase = "writing"
        levels = self._levels(parts, ledger)
        written = {LEDGER: ledger} | await self._write_all(draft, checkpoint, levels)
        self._check_fits(parts, written, ledger, levels)
        workers = await self._workers(draft, ledger, checkpoint) if self.level != PARTITION else []
        return dataclasses.replace(self._manifest(parts, written, ledger, workers), torn=tuple(torn))

    async def _align(self, parts: list[PartitionRow], checkpoint: str) -> list[int]:
        """Have every partition copied while no worker is in the middle of a clock; who was torn.

        Raises:
            ParameshError: DEADLINE, a worker did not come to the end of its clock; NOT_READY, the pause broke.
        """
        self.progress.phase = "waiting for workers to finish their clocks"
        ledger = self._primaries[LEDGER][0]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PAUSE_S
        while True:
            told = await self.calls.insist(ledger, "PauseClocks", cp.PauseClocksRequest(checkpoint=checkpoint), PAUSE_S)
            if told.quiet:
                break
            if loop.time() >= deadline:
                ranks = ", ".join(map(str, told.waiting_for))
                raise refuse("DEADLINE", f"ranks {ranks} did not finish their clock within {PAUSE_S:.0f} s")
            await asyncio.sleep(0.02)
        self.progress.phase = "cutting"
        await self._take(parts, checkpoint)
        self._check_primaries(self._primaries)
        resume = cp.ResumeClocksRequest(checkpoint=checkpoint)
        answer = await self.calls.insist(ledger, "ResumeClocks", resume, WRITE_S)
        if not answer.whole:
            raise refuse("NOT_READY", "the pause ended before every partition was copied; ask again")
        return list(answer.torn)

    async def _take(self, parts: list[PartitionRow], checkpoint: str) -> None:
        """Copies in memory on all servers, side by side."""
        by_server: dict[Ref, list[int]] = {}
        for part in parts:
            by_server.setdefault(self._primaries[part.partition][0], []).append(part.partition)
        takes = (
            self.calls.insist(ref, "TakeCut", cp.TakeCutRequest(checkpoint=checkpoint, partitions=some), PAUSE_S)
            for ref, some in by_server.items()
        )
        await asyncio.gather(*takes)

    def _levels(self, parts: list[PartitionRow], ledger: cp.WrittenCut) -> dict[int, int]:
        """How each dense partition is cut: those of groups that step at the marked one; all as they were copied."""
        if self.level == ALIGNED:
            return {part.partition: ALIGNED for part in parts if part.partition != LEDGER}
        stepping = {g.name for g in ledger.groups if g.steps and g.next_step}
        groups = {row.table_id: row.group for row in self.driver.state.rows(TableRow).values()}
        return {
            part.partition: STEP if self.level == STEP and groups[part.table_id] in stepping else PARTITION
            for part in parts
            if part.partition != LEDGER
        }

    async def _write_all(self, draft: FolderDraft, checkpoint: str, levels: dict[int, int]) -> dict[int, cp.WrittenCut]:
        """Every dense partition, its servers side by side."""
        by_server: dict[tuple[Ref, int], list[int]] = {}
        for partition, level in sorted(levels.items()):
            by_server.setdefault((self._primaries[partition][0], level), []).append(partition)

        async def one(level: int, partitions: list[int]) -> dict[int, cp.WrittenCut]:
            done: dict[int, cp.WrittenCut] = {}
            for at in range(0, len(partitions), BATCH):
                done |= await self._write(draft, checkpoint, level, partitions[at : at + BATCH], WRITE_S)
            return done

        tasks = [asyncio.ensure_future(one(level, some)) for (_, level), some in by_server.items()]
        try:
            found: dict[int, cp.WrittenCut] = {}
            for done in await asyncio.gather(*tasks):
                found |= done
            return found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(
        self, draft: FolderDraft, checkpoint: str, level: int, partitions: list[int], seconds: float
    ) -> dict[int, cp.WrittenCut]:
        """Partitions of one server; repeated while they have the primary that was asked first."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        ref = self._primaries[partitions[0]][0]
        while True:
            self._check_primaries(partitions)
            try:
                request = cut_request(checkpoint, draft.url, level, partitions)
                answer = await self.calls.send(ref, "WriteCut", request)
                break
            except ParameshError as error:
                if error.reason not in PASSING | {"NOT_PRIMARY"}:
                    raise
                if loop.time() >= deadline:
                    raise refuse("DEADLINE", f"{self.progress.phase} took more than {seconds:.0f} s: {error}") from None
            await asyncio.sleep(0.05)
        for done in answer.written:
            reach("checkpoint.report.received", done.file)
            self._entries[done.file] = Entry(done.bytes, done.sha256.hex())
            self.progress.done += 1
        return {done.partition: done for done in answer.written}

    def _check_primaries(self, partitions: Iterable[int]) -> None:
        for partition in partitions:
            if self.calls.primary(partition) != self._primaries[partition]:
                raise refuse(
                    "NOT_PRIMARY",
                    f"partition {partition} lost its primary {self._primaries[partition][0].name}, and its cut with it",
                )

    def _check_fits(
        self,
        parts: list[PartitionRow],
        written: dict[int, cp.WrittenCut],
        ledger: cp.WrittenCut,
        levels: dict[int, int],
    ) -> None:
        next_step = {g.name: g.next_step for g in ledger.groups}
        groups = {row.table_id: row.group for row in self.driver.state.rows(TableRow).values()}
        for part in parts:
            if levels.get(part.partition) != STEP:
                continue
            at, due = written[part.partition].applied_step, next_step[groups[part.table_id]]
            if at != due:
                raise refuse("INTERNAL", f"partition {part.partition} was cut at step {at}, the ledger at {due}")

    # ------------------------------------------------------------------ workers

    async def _workers(self, draft: FolderDraft, ledger: cp.WrittenCut, checkpoint: str) -> list[str]:
        """What workers put into the ledger as of the marked step; the keys of what came in time."""
        ranks = next((list(g.ranks) for g in ledger.groups), [])
        wanted = [SHARED, *(OWN.format(rank=rank) for rank in ranks)]
        self.progress.phase = "waiting for workers' own state"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WORKERS_S
        found: dict[str, bytes] = {}
        while len(found) < len(wanted) and loop.time() < deadline:
            for key in [key for key in wanted if key not in found]:
                value = await self._worker_value(key, checkpoint)
                if value is not None:
                    found[key] = value
            if len(found) < len(wanted):
                await asyncio.sleep(0.05)
        if len(found) < len(wanted):
            missing = ", ".join(key for key in wanted if key not in found)
            log.warning("checkpoint=%s goes without workers' own state: %s", self.name, missing)
        keys = [key for key in wanted if key in found]
        for index, key in enumerate(keys):
            name = worker_file(index)
            self._entries[name] = await asyncio.to_thread(draft.put, name, [found[key]])
        return keys

    async def _worker_value(self, key: str, checkpoint: str) -> bytes | None:
        """`version`, a line feed, and the value; None while it is not this checkpoint's."""
        try:
            answer = await self.calls.small_state(key)
        except ParameshError as error:
            if error.reason in PASSING | {"NOT_PRIMARY"}:
                return None
            raise
        told, _, value = answer.value.partition(b"\n")
        if not answer.found or told != b"checkpoint " + checkpoint.encode():
            return None
        return b"%d\n" % answer.version + value

    # ------------------------------------------------------------------ the manifest

    def _manifest(
        self,
        parts: list[PartitionRow],
        written: dict[int, cp.WrittenCut],
        ledger: cp.WrittenCut,
        workers: list[str],
    ) -> ClusterManifest:
        job = self.driver.state.job
        tables = sorted(self.driver.state.rows(TableRow).values(), key=lambda row: row.table_id)
        made = {row.partition for row in parts}
        if any(t.first_partition + i not in made for t in tables for i in range(t.partition_count)):
            raise refuse("NOT_READY", "a table was made meanwhile")
        return ClusterManifest(
            name=self.name,
            number=self.number,
            level=NAMES[self.level],
            job=job.name,
            generation=job.generation,
            term=self.driver.term,
            created_at_ms=round(time.time() * 1000),
            periodic=self.periodic,
            next_client=job.next_client,
            next_table=job.next_table,
            next_partition=job.next_partition,
            tables=tuple(
                TableRecord(t.table_id, t.name, t.group, t.first_partition, t.partition_count, t.spec) for t in tables
            ),
            partitions=tuple(_entry(row, written[row.partition]) for row in parts),
            groups=tuple(GroupEntry(g.group, g.name, g.steps, g.next_step) for g in ledger.groups),
            workers=tuple(workers),
        )


def _entry(row: PartitionRow, done: cp.WrittenCut) -> PartitionEntry:
    return PartitionEntry(
        partition=row.partition,
        table_id=row.table_id,
        index=row.index,
        nbytes=row.nbytes,
        epoch=row.epoch,
        lsn=done.lsn,
        applied_step=done.applied_step,
        group=done.group,
        file=done.file,
    )
