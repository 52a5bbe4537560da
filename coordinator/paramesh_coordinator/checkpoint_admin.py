"""What people ask about checkpoints: the service behind `psctl checkpoint` and its like."""

from __future__ import annotations

import asyncio

from paramesh.archive import Archive, ClusterManifest
from paramesh.channel import grpc
from paramesh.errors import ParameshError
from paramesh.status import detail_of
from paramesh.v1 import checkpoint_pb2 as cp
from paramesh.v1.checkpoint_pb2_grpc import CheckpointsServicer

from paramesh_coordinator.checkpoints import NAMES, Progress
from paramesh_coordinator.custody import Custody
from paramesh_coordinator.driver import Driver
from paramesh_coordinator.servicer import check

__all__ = ["CheckpointsService", "entries"]

_LEVELS = {name: cp.CheckpointLevel.ValueType(level) for level, name in NAMES.items()}


class CheckpointsService(CheckpointsServicer):
    """Create, list, restore."""

    def __init__(self, driver: Driver, custody: Custody):
        self._driver = driver
        self._custody = custody

    async def CreateCheckpoint(
        self, request: cp.CreateCheckpointRequest, context: grpc.aio.ServicerContext
    ) -> cp.CreateCheckpointResponse:
        """Begin one."""
        check(self._driver, request.request, registering=True)
        return cp.CreateCheckpointResponse(name=await self._custody.create(request.level, request.name))

    async def ListCheckpoints(
        self, request: cp.ListCheckpointsRequest, context: grpc.aio.ServicerContext
    ) -> cp.ListCheckpointsResponse:
        """What is there, and what is under way."""
        check(self._driver, request.request, registering=True)
        archive = self._custody.archive()
        found = await asyncio.to_thread(entries, archive, request.verify)
        task = self._custody.progress
        return cp.ListCheckpointsResponse(
            root=archive.root, checkpoints=found, task=None if task is None else _task(task)
        )

    async def RestoreCheckpoint(
        self, request: cp.RestoreCheckpointRequest, context: grpc.aio.ServicerContext
    ) -> cp.RestoreCheckpointResponse:
        """Verify, commit to it, and load in the background."""
        check(self._driver, request.request, registering=True)
        return cp.RestoreCheckpointResponse(name=await self._custody.restore(request.name))


def _task(progress: Progress) -> cp.CheckpointTask:
    return cp.CheckpointTask(
        kind=progress.kind,
        name=progress.name,
        phase=progress.phase,
        done=progress.done,
        total=progress.total,
        error=None if progress.error is None else detail_of(progress.error, progress.kind),
        ended=progress.ended,
    )


def entries(archive: Archive, verify: bool) -> list[cp.CheckpointEntry]:
    """Every folder under a root, oldest first; what cannot be loaded says why."""
    found = []
    for name in archive.names():
        try:
            entry = _entry(archive.manifest(name, verify=verify))
            entry.name = name
            folder = archive.folder(name)
            folder.manifest()
            if entry.level == cp.CHECKPOINT_LEVEL_ALIGNED and (torn := archive.manifest(name).torn):
                entry.warnings.append(f"clients {list(torn)} died in the middle of an update: some of it may be there")
            entry.warnings.extend(f"{stranger} belongs to nobody" for stranger in folder.strangers())
        except ParameshError as error:
            entry = cp.CheckpointEntry(name=name, problem=str(error))
        found.append(entry)
    return sorted(found, key=lambda entry: (entry.number, entry.name))


def _entry(manifest: ClusterManifest) -> cp.CheckpointEntry:
    return cp.CheckpointEntry(
        level=_LEVELS[manifest.level],
        number=manifest.number,
        created_at_ms=manifest.created_at_ms,
        bytes=manifest.size,
        generation=manifest.generation,
        partitions=len(manifest.partitions),
        steps={group.name: group.next_step for group in manifest.groups if group.steps},
    )
