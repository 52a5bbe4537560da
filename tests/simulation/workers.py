"""Synchronous workers: `exchange_sync.py`, `delivery.py` and `joining.py`, asking the real ledger through the map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from paramesh.asked import name_attempts
from paramesh.errors import Fenced, ParameshError, refuse
from paramesh.exchange import PULL_TRIES
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as pb
from paramesh_server.requests import StagedAt
from paramesh_server.staging import Contribution

from tests.simulation.clients import Client
from tests.simulation.dataplane import Pull, Push
from tests.simulation.kernel import Violation
from tests.simulation.ledger_client import LedgerClient

if TYPE_CHECKING:
    from tests.simulation.world import World


class Worker(Client):
    """Trains until the last step: stages, waits for the decision, pulls."""

    forgets_early = False
    """Broken on purpose: what was staged is forgotten as soon as the step is decided."""

    def __init__(self, world: World, name: str) -> None:
        self.kept: dict[tuple[int, int], Contribution] = {}
        """(partition, attempt) -> bytes of `kept_step`."""
        self.kept_step = -1
        self.rank: int | None = None
        """Of its last membership: it asks for it again."""
        self.group = 0
        self.position = 0
        """The step whose values it has."""
        self.committed: list[pb.StepRecord] = []
        """Decisions that partitions may lack: the record of the step before."""
        super().__init__(world, name)
        self.ledger = LedgerClient(self)

    async def live(self) -> None:
        while True:
            await self.register()
            try:
                await self._train()
                return
            except Fenced as error:
                if not self.world.is_closed(self.client_id):
                    raise Violation(f"17: {self.name} got {error!r}, and lives") from error
                self.kernel.note(f"{self.name} begins anew: {error!r}")

    async def _train(self) -> None:
        await self._join()
        while self.position < self.world.profile.steps:
            if self.world.rng.random() < self.world.profile.pauses:
                await self._between()
            await self._step()
            await self.kernel.sleep(self.world.rng.uniform(0.0, self.world.profile.step_s))
        await self.ledger.ask("Leave", lg.LeaveRequest())

    # --- joining.py, membership.py, exchange.py ---

    async def _join(self) -> None:
        request = lg.JoinRequest(
            slot=self.name, preferred_rank=self.rank or 0, has_preferred_rank=self.rank is not None
        )
        self.rank = (await self.ledger.ask("Join", request)).rank
        self.kept, self.kept_step = {}, -1
        opened = await self.ledger.ask("OpenGroup", lg.OpenGroupRequest(spec=self.world.group_spec()))
        self.group = opened.group
        if not opened.initialised:
            await self._first_values()
        await self._activate()

    async def _first_values(self) -> None:
        """`_first_values_on_loop`; the owner of the tables has written them."""
        while True:
            answer = await self.ledger.ask("AwaitInit", lg.AwaitInitRequest(group=self.group))
            if answer.initialised:
                return
            if answer.owner:
                commit = lg.CommitInitRequest(group=self.group, init_attempt=answer.init_attempt)
                try:
                    await self.ledger.ask("CommitInit", commit)
                    return
                except ParameshError as error:
                    if error.reason != "INITIALISING":
                        raise

    async def _activate(self) -> None:
        """`ensure_active` and `on_active`: steps wait for it, and it has their values."""
        request = lg.SetActivityRequest(activity=lg.ACTIVITY_ACTIVE)
        answer = await self.ledger.ask("SetActivity", request)
        await self._pull_now(next(position for position in answer.groups if position.group == self.group))

    async def _between(self) -> None:
        """A loader ends, and another one begins a while later."""
        await self.ledger.ask("SetActivity", lg.SetActivityRequest(activity=lg.ACTIVITY_BETWEEN))
        await self.kernel.sleep(self.world.rng.uniform(0.0, 2.5))
        await self._activate()

    async def _reopen(self) -> lg.GroupPosition:
        answer = await self.ledger.ask("OpenGroup", lg.OpenGroupRequest(spec=self.world.group_spec()))
        return answer.position  # type: ignore[no-any-return]

    # --- exchange_sync.py ---

    async def _pull_now(self, position: lg.GroupPosition) -> None:
        """The values of the group's next step; again if others moved on meanwhile."""
        for _ in range(PULL_TRIES):
            self.committed = [position.last] if position.HasField("last") else []
            try:
                await self._pull(position.next_step)
            except ParameshError as error:
                if error.reason != "STEP_OUT_OF_RANGE":
                    raise
                position = await self._reopen()
                continue
            self.position = position.next_step
            return
        raise refuse("STEP_OUT_OF_RANGE", f"steps overtook {PULL_TRIES} pulls")

    async def _step(self) -> None:
        step = self.position
        if step >= self.world.profile.steps:
            return
        attempts = await self._stage(step)
        request = lg.ReadyRequest(group=self.group, step=step, weight=1 + self.client_id % 3, applied_through=step)
        name_attempts(request, attempts)
        record = (await self._ready(request)).record
        if self.forgets_early:
            self.kept.clear()
        self.committed = [record]
        if self.world.rng.random() < self.world.profile.idle:  # the next batch is loaded first
            await self.kernel.sleep(self.world.rng.uniform(0.0, 1.5))
        try:
            await self._pull(record.step + 1)
            self.position = record.step + 1
        except ParameshError as error:
            if error.reason != "STEP_OUT_OF_RANGE":
                raise
            await self._pull_now(await self._reopen())  # evicted after its Ready: the group is further
        self.kept.clear()

    async def _ready(self, request: lg.ReadyRequest) -> lg.ReadyResponse:
        """`_ready_on_loop`."""
        try:
            response: lg.ReadyResponse = await self.ledger.ask("Ready", request)
        except ParameshError as error:
            if error.reason != "STEP_OUT_OF_RANGE":
                raise
            raise Fenced(f"the decision of step {request.step} is forgotten: {error}", reason="EVICTED") from error
        if not response.included:
            self.kernel.note(f"{self.name} is too late for step {request.step}")
        return response

    async def _stage(self, step: int) -> dict[int, int]:
        """Sometimes computed twice: the second attempt is what is named."""
        self.kept, self.kept_step = {}, step
        rng, attempts = self.world.rng, {}
        for partition in self.world.sync_partitions:
            attempts[partition] = 1
            self._keep(step, partition, 1)
        if rng.random() < 0.25:
            again = rng.choice(self.world.sync_partitions)
            await self._put(step, again, 1)
            attempts[again] = 2
            self._keep(step, again, 2)
        await self.kernel.gather(self.process, *(self._put(step, p, a) for p, a in attempts.items()))
        return attempts

    def _keep(self, step: int, partition: int, attempt: int) -> None:
        self.kept[partition, attempt] = self.world.gradient(self.client_id, step, partition, attempt)

    async def _put(self, step: int, partition: int, attempt: int) -> None:
        at = StagedAt(self.group, step, attempt)
        made = self.kept[partition, attempt]
        request = Push(self.client_id, partition, 0, made, staged=at, committed=tuple(self.committed))
        await self.deliver("push", request, self._mend)

    async def _pull(self, step: int) -> None:
        pulls = [self._pull_one(step, p, self.committed) for p in self.world.sync_partitions]
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
            more = await self.ledger.ask("GetSteps", lg.GetStepsRequest(group=self.group, first=first))
            have = {record.step: record for record in [*request.committed, *more.records]}
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
        report = lg.ReportMissingRequest(group=self.group, step=step, partition=partition, client_ids=missing)
        permitted = list((await self.ledger.ask("ReportMissing", report)).degraded)
        if not permitted:
            return request
        return _with(request, tuple(_degraded(record, step, partition, permitted) for record in request.committed))

    async def _restage(self, asked: Any, step: int) -> bool:
        partition = asked.partition
        again = [(a, made) for (p, a), made in sorted(self.kept.items(), key=lambda kept: kept[0]) if p == partition]
        for attempt, made in again:
            self.kernel.note(f"{self.name} brings p{partition} step {step} attempt {attempt} again")
            try:
                at = StagedAt(self.group, step, attempt)
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
