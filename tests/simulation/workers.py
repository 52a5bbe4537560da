"""Synchronous workers, and a ledger that is always there and always right.

The replicated ledger is not simulated: what stands here decides as the real one does, in one
process that never fails. Staging, decisions that travel with requests, and what a new primary
lacks are the real thing: `exchange_sync.py` and `delivery.py` on the real partitions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from paramesh.errors import ParameshError, refuse
from paramesh.v1 import types_pb2 as pb
from paramesh_server.requests import StagedAt
from paramesh_server.staging import Contribution

from tests.simulation.clients import Client
from tests.simulation.dataplane import Pull, Push
from tests.simulation.kernel import Process, Signal, Violation

if TYPE_CHECKING:
    from tests.simulation.world import World

GROUP = 7
PERMIT_S = 2.0
"""After its eviction, a contribution that is missing somewhere may be left out there."""


class Ledger:
    """Who counts, and what was decided."""

    def __init__(self, world: World) -> None:
        self.world, self.kernel = world, world.kernel
        self.process = Process("ledger")
        self.records: list[pb.StepRecord] = []
        self.gone: dict[int, float] = {}
        """Evicted client -> when."""
        self._ranks: dict[int, int] = {}
        self._ready: dict[int, dict[int, int]] = {}
        self._started = False
        self._decided = Signal()

    async def join(self, client: int) -> int:
        """The step from which it is required."""
        if client in self.gone:
            raise refuse("EVICTED", f"client {client} was evicted")
        if client not in self._ranks:
            free = next(rank for rank in range(len(self._ranks) + 1) if rank not in self._ranks.values())
            self._ranks[client] = free
        self._started = self._started or len(self._ranks) >= self.world.profile.workers
        return len(self.records)

    async def leave(self, client: int) -> None:
        """It is done."""
        self._ranks.pop(client, None)

    def evicted(self, client: int) -> None:
        """It is dead, says the coordinator. Repeatable."""
        if client not in self.gone:
            self.kernel.note(f"ledger evicts client {client}")
            self.gone[client] = self.kernel.now
            self._ranks.pop(client, None)
            self._ready.pop(client, None)
            self._decide()

    async def ready(self, request: tuple[int, int, dict[int, int]]) -> pb.StepRecord:
        """Everything is staged: which attempt in which partition. The decision, when it is there."""
        client, step, attempts = request
        if step < len(self.records):
            return self.records[step]
        if client not in self._ranks:
            raise refuse("EVICTED", f"client {client} was evicted")
        self._ready[client] = attempts
        self._decide()
        if step >= len(self.records):
            await self.kernel.wait(self._decided.next, 2.0)
        if step >= len(self.records):
            raise refuse("WAITING_FOR_WORKERS", "others are not ready")
        return self.records[step]

    def _decide(self) -> None:
        if not self._started or not self._ranks or any(client not in self._ready for client in self._ranks):
            return
        record = pb.StepRecord(group=GROUP, step=len(self.records), loss_reduction=pb.LOSS_REDUCTION_MEAN)
        for rank, client in sorted((rank, client) for client, rank in self._ranks.items()):
            attempts = self._ready[client]
            first = min(attempts.values())
            named = record.contributors.add(client_id=client, rank=rank, weight=1 + client % 3, attempt=first)
            for partition, attempt in sorted(attempts.items()):
                if attempt != first:
                    named.overrides.add(partition=partition, attempt=attempt)
        self._ready.clear()
        self.records.append(record)
        self.world.faults.decided(record)
        self.kernel.note(f"ledger decides step {record.step}: {[c.client_id for c in record.contributors]}")
        self._decided.fire()

    async def get_steps(self, first: int) -> list[pb.StepRecord]:
        """Decisions from a step on."""
        return self.records[first:]

    async def report_missing(self, request: tuple[int, int, list[int]]) -> list[int]:
        """Without whom a partition may go on: those that are evicted, a while after that."""
        _, _, clients = request
        return [c for c in clients if self.kernel.now - self.gone.get(c, self.kernel.now) >= PERMIT_S]


class Worker(Client):
    """Trains until the last step: stages, waits for the decision, pulls."""

    forgets_early = False
    """Broken on purpose: what was staged is forgotten as soon as the step is decided."""

    def __init__(self, world: World, name: str) -> None:
        self.kept: dict[tuple[int, int], Contribution] = {}
        """(partition, attempt) -> bytes of `kept_step`."""
        self.kept_step = -1
        super().__init__(world, name)

    async def live(self) -> None:
        while True:
            await self.register()
            try:
                await self._train()
                return
            except ParameshError as error:
                if error.reason not in ("EVICTED", "CLIENT_FENCED", "STEP_OUT_OF_RANGE"):
                    raise Violation(f"17: {self.name} got {error!r}") from error
                self.kernel.note(f"{self.name} begins anew: {error!r}")

    async def _train(self) -> None:
        step = await self.patiently("ledger", "join", self.client_id)
        records: list[pb.StepRecord] = []
        await self._pull(step, records)
        while step < self.world.profile.steps:
            attempts = await self._stage(step, records)
            record = await self.patiently("ledger", "ready", (self.client_id, step, attempts))
            if self.forgets_early:
                self.kept.clear()
            step, records = step + 1, [record]
            if self.world.rng.random() < self.world.profile.idle:  # the next batch is loaded first
                await self.kernel.sleep(self.world.rng.uniform(0.0, 1.5))
            await self._pull(step, records)
            self.kept.clear()
            await self.kernel.sleep(self.world.rng.uniform(0.0, self.world.profile.step_s))
        await self.patiently("ledger", "leave", self.client_id)

    async def _stage(self, step: int, records: list[pb.StepRecord]) -> dict[int, int]:
        """Sometimes computed twice: the second attempt is what is named."""
        self.kept, self.kept_step = {}, step
        rng, attempts = self.world.rng, {}
        for partition in self.world.sync_partitions:
            attempts[partition] = 1
            self._keep(step, partition, 1)
        if rng.random() < 0.25:
            again = rng.choice(self.world.sync_partitions)
            await self._put(step, again, 1, records)
            attempts[again] = 2
            self._keep(step, again, 2)
        puts = [self._put(step, p, a, records) for p, a in attempts.items()]
        await self.kernel.gather(self.process, *puts)
        return attempts

    def _keep(self, step: int, partition: int, attempt: int) -> None:
        self.kept[partition, attempt] = self.world.gradient(self.client_id, step, partition, attempt)

    async def _put(self, step: int, partition: int, attempt: int, records: list[pb.StepRecord]) -> None:
        at = StagedAt(GROUP, step, attempt)
        made = self.kept[partition, attempt]
        request = Push(self.client_id, partition, 0, made, staged=at, committed=tuple(records))
        await self.deliver("push", request, self._mend)

    async def _pull(self, step: int, records: list[pb.StepRecord]) -> None:
        pulls = [self._pull_one(step, p, records) for p in self.world.sync_partitions]
        await self.kernel.gather(self.process, *pulls)

    async def _pull_one(self, step: int, partition: int, records: list[pb.StepRecord]) -> None:
        request = Pull(self.client_id, partition, 0, step=step, committed=tuple(records))
        answer = await self.deliver("pull", request, self._mend)
        self.world.checks.step_read(partition, step, answer)

    # --- delivery.py ---

    async def _mend(self, error: ParameshError, request: Any) -> Any:
        """What a refusal asks for; None: only to wait."""
        if error.reason == "NEED_STEPS":
            first = int(error.metadata["applied_step"])
            more = await self.patiently("ledger", "get_steps", first)
            have = {record.step: record for record in [*request.committed, *more]}
            supplied = tuple(have[step] for step in sorted(have))
            return None if supplied == request.committed else _with(request, supplied)
        if error.reason != "NOT_STAGED":
            return None
        changed = await self._mend_staging(error, request)
        await self.kernel.sleep(self.world.rng.uniform(0.02, 0.2))
        return changed

    async def _mend_staging(self, error: ParameshError, request: Any) -> Any:
        partition, step = request.partition, int(error.metadata["step"])
        missing = [int(client) for client in error.metadata["client_ids"].split(",")]
        if self.client_id in missing and self.kept_step == step and await self._restage(request, step):
            return request
        permitted = await self.patiently("ledger", "report_missing", (step, partition, missing))
        if not permitted:
            return request
        return _with(request, tuple(_degraded(record, step, partition, permitted) for record in request.committed))

    async def _restage(self, asked: Any, step: int) -> bool:
        partition = asked.partition
        again = [(a, made) for (p, a), made in sorted(self.kept.items(), key=lambda kept: kept[0]) if p == partition]
        for attempt, made in again:
            self.kernel.note(f"{self.name} brings p{partition} step {step} attempt {attempt} again")
            try:
                at = StagedAt(GROUP, step, attempt)
                await self.once("push", Push(self.client_id, partition, 0, made, staged=at, committed=asked.committed))
            except ParameshError as error:
                self.kernel.note(f"{self.name} was refused: {error!r}")
                if error.reason == "SEQ_REUSED":
                    raise
        return bool(again)


def _with(request: Any, records: tuple[pb.StepRecord, ...]) -> Any:
    return type(request)(**{**request.__dict__, "committed": records})


def _degraded(record: pb.StepRecord, step: int, partition: int, clients: list[int]) -> pb.StepRecord:
    if record.step != step:
        return record
    changed = pb.StepRecord()
    changed.CopyFrom(record)
    known = [d for d in changed.degraded if d.partition == partition]
    permission = known[0] if known else changed.degraded.add(partition=partition)
    permission.client_ids[:] = sorted({*permission.client_ids, *clients})
    return changed


def reference_step(values: numpy.ndarray, gradients: list[tuple[numpy.ndarray, float]]) -> numpy.ndarray:
    """Section 10 (ii), for SGD with lr 1: in rank order, fp32, each product and sum rounded."""
    total, weights = None, 0.0
    for gradient, weight in gradients:
        term = gradient * numpy.float32(weight)
        total = term if total is None else total + term
        weights += weight
    if total is None:
        return values
    return values - total / numpy.float32(weights)
