"""The coordinator's care for checkpoints: on request, periodically, and loading one.

    custody = Custody(driver)
    custody.start()                              # resumes a restore, begins the periodic ones
    name = await custody.create(level, "best")   # goes on in the background; `progress` tells
    await custody.restore("best")

One thing at a time: a checkpoint, or a restore.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from paramesh.archive import LATEST, Archive, ClusterManifest, worker_file
from paramesh.errors import ConfigError, ParameshError, refuse
from paramesh.manifest import check_name
from paramesh.v1 import checkpoint_pb2 as cp

from paramesh_coordinator import restoring
from paramesh_coordinator.catalog import Limits
from paramesh_coordinator.checkpoint_calls import PASSING, Calls
from paramesh_coordinator.checkpoints import ALIGNED, NAMES, PARTITION, SHARED, STEP, Maker, Progress
from paramesh_coordinator.driver import Driver
from paramesh_coordinator.operators import LEDGER
from paramesh_coordinator.rows import PartitionRow, Ref, ServerRow, TableRow

__all__ = ["Custody"]

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the steps are looked at for --checkpoint-every Nsteps."""

AGAIN_S = 5.0
"""After a periodic checkpoint failed, the next attempt; a lost primary is replaced by then."""

PLACE_S = 0.5
"""How often servers are looked for while a restore waits for some."""

SMALL_STATE = "paramesh:state"
"""Where workers look for what they share (paramesh.small_state)."""


T = TypeVar("T")


class Custody:
    """Everything about checkpoints that the coordinator does.

    Args:
        driver: decisions and state.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._config = driver.config
        self._calls = Calls(driver)
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: asyncio.Task[None] | None = None
        self.progress: Progress | None = None
        """What is under way, or ended last."""

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Resume a restore, or begin with the one that was asked for.

        Raises:
            ConfigError: the checkpoint to begin with cannot be loaded; the state is as if never used.
        """
        location = self._driver.state.job.restoring
        if not location and self._config.restore:
            if self._unused():
                try:
                    location = await self._begin(self._config.restore)
                except ParameshError as error:
                    raise ConfigError(f"restore: {error}", metadata={"key": "restore"}) from error
            else:
                log.warning("restore=%s is not loaded again: the state file has the job already", self._config.restore)
        if location:
            progress = Progress("restore", location.rstrip("/").rpartition("/")[2], "verifying")
            self._run(self._resume(location), progress)
        if self._config.checkpoint_seconds or self._config.checkpoint_steps:
            self._spawn(self._periodically())

    def _unused(self) -> bool:
        """Whether nothing was ever made or loaded on this state: an attempt with a wrong path does not count."""
        state = self._driver.state
        held = len(state.rows(ServerRow)) + len(state.rows(PartitionRow)) + len(state.rows(TableRow))
        return state.job.generation == 1 and not held

    async def _resume(self, location: str) -> None:
        """Go on with a restore that is committed to; if its files are gone, another one may be asked for."""
        await self._restoring(await asyncio.to_thread(_manifest_at, location, False), location)

    async def stop(self) -> None:
        """End everything; a checkpoint under way is given up and cleaned away."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._calls.close()

    def _spawn(self, body: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(body)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _run(self, body: Coroutine[Any, Any, None], progress: Progress) -> asyncio.Task[None]:
        self.progress = progress
        self._busy = self._spawn(self._guarded(body, progress))
        return self._busy

    async def _guarded(self, body: Coroutine[Any, Any, None], progress: Progress) -> None:
        try:
            await body
            progress.phase = "done"
        except ParameshError as error:
            progress.error, progress.phase = error, "failed"
            log.error("%s=%s failed reason=%s: %s", progress.kind, progress.name, error.reason, error)
            await self._audit(f"{progress.kind}_failed", progress.name, reason=error.reason, error=str(error)[:300])
        except Exception as error:
            log.exception("%s=%s failed", progress.kind, progress.name)
            progress.error, progress.phase = refuse("INTERNAL", f"{type(error).__name__}; see the log"), "failed"
        finally:
            progress.ended = True

    async def _audit(self, kind: str, subject: str, **evidence: object) -> None:
        with contextlib.suppress(ParameshError):
            await self._driver.decide(lambda draft: draft.audit(kind, subject, **evidence))

    def _check_idle(self) -> None:
        if self._busy is not None and not self._busy.done() and self.progress is not None:
            raise refuse("NOT_READY", f"{self.progress.kind} {self.progress.name} is under way: {self.progress.phase}")

    def archive(self) -> Archive:
        """The root.

        Raises:
            StateRefused: NOT_FOUND, there is none.
        """
        if not self._config.checkpoint_dir:
            raise refuse("NOT_FOUND", "the coordinator has no --checkpoint-dir; start it with one")
        return Archive(self._config.checkpoint_dir)

    # ------------------------------------------------------------------ making

    async def create(self, level: int = 0, name: str = "", *, periodic: bool = False) -> str:
        """Begin a checkpoint; returns its name at once.

        Raises:
            ParameshError: NOT_READY, PATH, UNIMPLEMENTED, NOT_FOUND, SCHEMA.
        """
        self._check_idle()
        if self._driver.state.job.restoring:
            raise refuse("NOT_READY", f"{self._driver.state.job.restoring} is being restored")
        archive = self.archive()
        if level not in (0, *NAMES):
            raise refuse("MISSING_FIELD", f"level {level} is none of step, partition and aligned")
        if name:
            check_name(name)
        progress = Progress("checkpoint", name or "?")
        named: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        task = self._run(self._make(archive, level, name, periodic, progress, named), progress)
        return await _begun(named, task)

    async def _make(
        self, archive: Archive, level: int, name: str, periodic: bool, progress: Progress, named: asyncio.Future[str]
    ) -> None:
        try:
            maker = await self._maker(archive, level, name, periodic, progress)
        except BaseException as error:
            named.set_exception(error if isinstance(error, ParameshError) else refuse("INTERNAL", str(error)))
            raise
        named.set_result(maker.name)
        manifest = await maker.run()
        steps = {g.name: g.next_step for g in manifest.groups}
        await self._audit("checkpoint_made", manifest.name, level=manifest.level, steps=steps, bytes=manifest.size)
        log.info("checkpoint=%s level=%s steps=%s", manifest.name, manifest.level, steps)
        removed = await asyncio.to_thread(archive.prune, self._config.checkpoint_keep) if periodic else []
        if removed:
            await self._audit("checkpoints_removed", ",".join(removed), keep=self._config.checkpoint_keep)

    async def _maker(self, archive: Archive, level: int, name: str, periodic: bool, progress: Progress) -> Maker:
        """What is asked for, if it can be had; tidies the root."""
        await asyncio.to_thread(archive.sweep)
        number = await asyncio.to_thread(archive.next_number)
        stepping = await self._calls.steps()
        if level == STEP and not stepping:
            raise refuse("SCHEMA", "no group has taken a step: level step needs one; level partition does not")
        if level == ALIGNED and stepping:
            raise refuse("SCHEMA", "a group trains in steps: level step is the exact one; aligned is for async and ssp")
        level = level or (STEP if stepping else PARTITION)
        progress.name = name or f"checkpoint-{number:06d}"
        if await asyncio.to_thread(archive.exists, progress.name):
            raise refuse("PATH", f"checkpoint {progress.name!r} is there already; choose another name", name=name)
        return Maker(self._driver, self._calls, archive, progress.name, level, number, periodic, progress)

    async def _periodically(self) -> None:
        loop = asyncio.get_running_loop()
        every, steps = self._config.checkpoint_seconds, self._config.checkpoint_steps
        last_at, last_step = loop.time(), await self._stands()
        while True:
            due = last_at + every if every else loop.time() + LOOK_S
            await asyncio.sleep(max(0.05, min(due - loop.time(), LOOK_S)))
            now = await self._stands()
            if now < last_step:
                last_step = now  # restored
            if every and loop.time() < due:
                continue
            if steps and now < last_step + steps:
                continue
            if await self._one_periodic():
                last_at, last_step = loop.time(), now - now % steps if steps else now
            else:
                await asyncio.sleep(AGAIN_S)

    async def _stands(self) -> int:
        try:
            return await self._calls.steps()
        except ParameshError:
            return 0

    async def _one_periodic(self) -> bool:
        """Whether one was made, or there is nothing to make one of yet."""
        try:
            await self.create(periodic=True)
        except ParameshError as error:
            log.info("no periodic checkpoint now reason=%s: %s", error.reason, error)
            return False
        progress, busy = self.progress, self._busy
        assert busy is not None
        assert progress is not None
        await asyncio.wait([busy])
        return progress.error is None

    # ------------------------------------------------------------------ loading

    async def restore(self, name: str) -> str:
        """Verify a checkpoint, raise the generation, and load it in the background.

        Args:
            name: of one, or `latest`.

        Returns:
            Its name.

        Raises:
            ParameshError: NOT_READY, PATH, NOT_FOUND, FORMAT, DAMAGED, VERSION, SCHEMA: nothing changed.
        """
        self._check_idle()
        archive = self.archive()
        check_name(name)
        progress = Progress("restore", name, "verifying")
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self._run(self._restore(archive.folder(name).path, progress, begun), progress)
        await _begun(begun, task)
        return progress.name

    async def _restore(self, location: str, progress: Progress, begun: asyncio.Future[None]) -> None:
        try:
            location = await self._begin(location)
            manifest = await asyncio.to_thread(_manifest_at, location, False)
            progress.name = location.rstrip("/").rpartition("/")[2]
        except BaseException as error:
            begun.set_exception(error if isinstance(error, ParameshError) else refuse("INTERNAL", str(error)))
            raise
        begun.set_result(None)
        await self._restoring(manifest, location)

    async def _begin(self, location: str) -> str:
        """Verify everything, then commit to it; where it is."""
        location, manifest, damaged = await asyncio.to_thread(_whole_at, location)
        for name, problem in damaged.items():
            log.error("checkpoint=%s is passed over: %s", name, problem)
            await self._audit("checkpoint_damaged", name, error=problem[:300])
        limits = Limits(self._config.max_table_bytes, self._config.max_partitions)
        await asyncio.to_thread(restoring.check, manifest, limits)
        await self._driver.decide(lambda draft: restoring.begin(draft, manifest, location))
        return location

    async def _restoring(self, manifest: ClusterManifest, location: str) -> None:
        """Until every partition serves; servers may come and go meanwhile."""
        progress = self.progress
        assert progress is not None
        progress.total = len(manifest.partitions)
        loaded: dict[int, Ref] = {}
        while True:
            progress.phase = "waiting for servers"
            placed = await self._driver.decide(lambda draft: restoring.place(draft, manifest, self._config.min_servers))
            progress.phase = "loading" if placed else progress.phase
            wanted: dict[Ref, list[int]] = {}
            for partition, ref in placed.items():
                if loaded.get(partition) != ref:
                    wanted.setdefault(ref, []).append(partition)
            await asyncio.gather(*(self._load(ref, some, manifest, location, loaded) for ref, some in wanted.items()))
            progress.done = sum(loaded.get(partition) == ref for partition, ref in placed.items())
            complete = placed and progress.done == len(placed)
            if complete and await self._driver.decide(lambda draft: restoring.finish(draft, loaded)):
                return
            await asyncio.sleep(PLACE_S)

    async def _load(
        self, ref: Ref, partitions: list[int], manifest: ClusterManifest, location: str, loaded: dict[int, Ref]
    ) -> None:
        """Have one server load its partitions; what passes is tried again by the caller."""
        steps = {g.group: g.next_step for g in manifest.groups if g.steps}
        entries = {entry.partition: entry for entry in manifest.partitions}
        files = []
        for partition in partitions:
            entry, listed = entries[partition], manifest.files[entries[partition].file]
            replaced = manifest.level == "partition" and partition != LEDGER and entry.group in steps
            files.append(
                cp.CutFile(
                    partition=partition,
                    file=entry.file,
                    bytes=listed.bytes,
                    sha256=bytes.fromhex(listed.sha256),
                    applied_step=steps[entry.group] if replaced else 0,
                    has_applied_step=replaced,
                )
            )
        keys = {SMALL_STATE if key == SHARED else key: worker_file(i) for i, key in enumerate(manifest.workers)}
        request = cp.LoadCutRequest(folder=location, files=files, last_client=manifest.next_client - 1, extra=keys)
        try:
            await self._calls.send(ref, "LoadCut", request)
        except ParameshError as error:
            if error.reason not in PASSING | {"UNKNOWN_NODE", "NOT_PRIMARY"}:
                raise
            log.warning("restore waits server=%s reason=%s: %s", ref.name, error.reason, error)
        else:
            loaded.update(dict.fromkeys(partitions, ref))


async def _begun(begun: asyncio.Future[T], task: asyncio.Task[None]) -> T:
    """What came of beginning; after a refusal the task is over too, and the next one may begin."""
    try:
        return await asyncio.shield(begun)
    except ParameshError:
        await asyncio.wait([task])
        raise


def _whole_at(location: str) -> tuple[str, ClusterManifest, dict[str, str]]:
    """A checkpoint with every digest compared: where it is, and for `latest` which newer ones are damaged."""
    root, _, name = location.rstrip("/").rpartition("/")
    if name != LATEST:
        return location, _manifest_at(location, True), {}
    manifest, damaged = Archive(root or "/").newest_whole()
    return f"{root}/{manifest.name}", manifest, damaged


def _manifest_at(location: str, verify: bool) -> ClusterManifest:
    root, _, name = location.rstrip("/").rpartition("/")
    return Archive(root or "/").manifest(name, verify=verify)
