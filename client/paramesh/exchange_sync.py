"""The synchronous step (BSP): stage, Ready, [norms and one clip factor], pull.

The order is the protocol's: a Ready is sent only when every partition has acknowledged the
contribution, and the pull of the next step carries the decision, so that whichever worker comes first
makes the servers sum. What was staged is kept until every partition has applied the step: by then it
was pulled, so it lives as long as `step` does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from paramesh.asked import Asked, name_attempts, set_all, was_overtaken
from paramesh.encoded import Encoded, Snapshot
from paramesh.errors import Fenced, ParameshError, RequestRefused, StateRefused, refuse
from paramesh.exchange import (
    PULL_TRIES,
    Contribution,
    Exchange,
    GroupSettings,
    Outcome,
    Resumed,
    Table,
    as_messages,
    gathered,
)
from paramesh.profiling import phase
from paramesh.speculation import Speculation, Staged
from paramesh.v1 import ledger_pb2, types_pb2

if TYPE_CHECKING:
    import torch

    from paramesh.membership import Session
    from paramesh.v1.parameter_server_pb2 import PullHeader

log = logging.getLogger(__name__)


class SyncExchange(Exchange):
    """One group in sync mode; also what local mode exchanges its deltas with."""

    def __init__(self, session: Session, settings: GroupSettings, tables: Sequence[Table]):
        super().__init__(session, settings, tables)
        self.committed: list[types_pb2.StepRecord] = []
        """Decisions that partitions may lack: the record of the step before."""
        self.speculation: Speculation | None = None
        """Set once the group is open, if gradients may be pushed during backward."""
        self.overlap = False
        """Whether `step` may return while values are still arriving."""
        self._arriving: concurrent.futures.Future[None] | None = None
        """The pull under way; None: all values are in place."""
        self._arrived: dict[int, threading.Event] = {}
        """partition -> set when its last frame is written, or when the pull ended."""
        self._unseen: dict[int, torch.Tensor] = {}
        """Parameters of the pull under way that no forward has waited for, by id."""
        self._holders: dict[int, list[int]] = {}
        """id of parameter -> partitions that hold a part of it."""
        self._overtaken = False
        """Whether steps of others went on before this worker had the values of the one just decided."""
        self._asked: Asked | None = None
        """The Ready of a step that is not over here: an error may have cut it off at any point after."""
        self._incomplete = False
        """Whether values of `position` did not all arrive."""
        self._attempts: tuple[int | None, dict[int, int]] = (None, {})
        """A step, and the highest attempt used for it in each partition: other bytes need a higher one."""

    def pull_now(self, position: ledger_pb2.GroupPosition) -> None:
        """Pulls exactly the group's next step; again if others moved on meanwhile."""
        self._settle(position.next_step)
        self.finish()
        for _ in range(PULL_TRIES):
            self.before_pull()
            last = position.last if position.HasField("last") else None
            try:
                self.session.call(
                    self._pull_after_on_loop(last, position.next_step), f"parameters of step {position.next_step}"
                )
            except ParameshError as error:
                if error.reason != "STEP_OUT_OF_RANGE":
                    raise
                position = self.reopen()
                continue
            self.after_pull()
            self.position = position.next_step
            self._incomplete = False
            if self.speculation is not None:
                self.speculation.discard()
            return
        raise refuse("STEP_OUT_OF_RANGE", f"steps overtook {PULL_TRIES} pulls; become active first")

    async def _pull_after_on_loop(self, last: types_pb2.StepRecord | None, step: int) -> None:
        """Pulls values after a decision whose contributors may all be gone before it was clipped."""
        self.committed = [] if last is None else [await self._clipped_on_loop(last)]
        await self._pull_on_loop(step)

    async def _pull_on_loop(self, step: int) -> None:
        await self.client.pull(self.partitions, self.sink, group=self.group, step=step, committed=self.committed)
        self.client.applied(self.group, step - 1)

    async def snapshot_on_loop(self) -> dict[int, Snapshot]:
        """Returns cuts at the start of the next step."""
        return await self.client.snapshot(
            self.partitions, group=self.group, step=self.position, committed=self.committed
        )

    def step(self, contribution: Contribution) -> Outcome:
        """Gives one contribution and returns with the next step's parameters in place.

        Raises:
            Fenced: This worker was evicted and its contribution is in no step.
        """
        assert self.position is not None
        step = self.position
        changes = self.changed_settings()
        with phase("encode"):
            encoded, attempts, early = self._encode(contribution)
        request = ledger_pb2.ReadyRequest(
            group=self.group,
            step=step,
            weight=contribution.weight,
            skip=contribution.skip,
            samples=contribution.samples,
            hyper_parameters=as_messages(changes),
            applied_through=step,
        )
        name_attempts(request, attempts)
        self.before_pull()
        try:
            response = self.session.call(
                self._step_on_loop(Asked(request, changes), encoded, attempts, early, contribution), f"step {step}"
            )
        finally:
            if self.speculation is not None:
                self.speculation.next_step()
        self._end_step(response)
        return Outcome(step, skipped=response.record.skip, record=response.record)

    def _end_step(self, response: ledger_pb2.ReadyResponse) -> None:
        assert self._asked is not None
        self._asked.answered()
        self._receive(response.record.step + 1)
        self._asked = None

    def resume(self, may_replace: bool) -> Resumed:
        """Ends a step whose Ready was sent and that an error then cut off: the same Ready, then the pull."""
        if self._incomplete:
            self.pull_now(self.reopen())
        if self._asked is None:
            return Resumed.NOTHING
        request = self._asked.request
        if may_replace and self.session.call(self._undecided_on_loop(request.step), f"step {request.step}"):
            self._asked = None
            return Resumed.OPEN
        self.before_pull()
        self._end_step(self.session.call(self._resume_on_loop(request), f"step {request.step}"))
        if self.speculation is not None:
            self.speculation.discard()  # what a backward since has pushed was for the step that ended now
        return Resumed.ENDED

    def _settle(self, next_step: int) -> None:
        """A step that was cut off is decided by now: the ledger takes back its samples if it came too late."""
        if self._asked is None or next_step <= self._asked.request.step:
            return
        if not self._asked.known:
            self.session.call(self._ready_on_loop(self._asked.request), f"step {self._asked.request.step}")
            self._asked.answered()
        self._asked = None

    def forget_membership(self) -> None:
        """The membership ended, and with it what was staged and asked."""
        super().forget_membership()
        self._asked, self._incomplete, self._attempts = None, False, (None, {})

    def _encode(
        self, contribution: Contribution
    ) -> tuple[dict[int, Encoded], dict[int, int], dict[int, concurrent.futures.Future[object]]]:
        """Returns what is to be pushed, the attempt that counts per partition, and pushes under way already."""
        encoded: dict[int, Encoded] = {}
        attempts: dict[int, int] = {}
        early: dict[int, concurrent.futures.Future[object]] = {}
        if contribution.skip and self.speculation is not None:
            self.speculation.discard()  # the gradient did not change after backward: no mistake of a bet
        for partition, presence, parts in gathered(self.tables, contribution, self.host):
            staged = None if self.speculation is None else self.speculation.settle(partition, presence, parts)
            if staged is not None:
                attempts[partition], early[partition] = staged.attempt, staged.future
                continue
            attempts[partition] = self._next_attempt(partition)
            encoded[partition] = Encoded.from_parts(partition, presence, parts)
        return encoded, attempts, early

    def refused(self) -> None:
        """The gradient of this step is not given; the next one's bytes go under higher attempts."""
        if self.speculation is not None:
            self.speculation.next_step()

    def _next_attempt(self, partition: int) -> int:
        """Returns an attempt above all that this step was tried with in a partition, during backward or in `step`."""
        if self._attempts[0] != self.position:
            self._attempts = (self.position, {})
        used = self._attempts[1]
        used[partition] = used.get(partition, 0) + 1
        return used[partition]

    def push_early(self, partition: int, encoded: Encoded) -> Staged:
        """Pushes one partition during backward; its bytes are copied before this returns."""
        step, attempt = self.position or 0, self._next_attempt(partition)
        self.client.freeze_staged(encoded, self.group, step, attempt)
        push = self.client.push_staged(self.group, step, {partition: encoded}, {partition: attempt}, self.committed)
        return Staged(encoded, attempt, self.session.submit(push))

    # ------------------------------------------------------------------ arrival of values

    @property
    def _overlaps(self) -> bool:
        # With backup workers, steps go on without this one: values could be replaced under its forward.
        return self.overlap and not self.settings.backup_workers

    def _receive(self, step: int) -> None:
        """Values of the next step are here, on their way (with overlap), or gone already."""
        if self._overtaken:
            self.pull_now(self.reopen())
            return
        self.position = step
        if not self._overlaps:
            self.after_pull()
            return
        self._arrived = {partition: threading.Event() for partition in self.partitions}
        self._unseen = {id(p): p for table in self.tables for p in table.plan.parameters}
        arrived = self._arrived
        self._arriving = self.session.submit(self._pull_on_loop(step))
        self._arriving.add_done_callback(lambda _: set_all(arrived))

    def sink(self, partition: int, header: PullHeader, payload: memoryview) -> None:
        """Takes one pulled frame, and tells who waits for the partition when it is the last."""
        super().sink(partition, header, payload)
        if header.frame.last and partition in self._arrived:
            self._arrived[partition].set()

    def wait_for(self, parameters: Sequence[torch.Tensor]) -> None:
        """Returns when these parameters have the values of the next step.

        Raises:
            ParameshError: What ended the pull, if it failed.
        """
        if self._arriving is None:
            return
        mine = [p for p in parameters if id(p) in self._unseen]
        for parameter in mine:
            for partition in self._partitions_of(parameter):
                self._arrived[partition].wait()
        if self._arriving.done() and not was_overtaken(self._arriving):
            self._arriving.result()
        # Before their forward, exactly once: autograd refuses a backward through values that
        # were marked as changed after it had saved them.
        self.scatter.finish(mine)
        for parameter in mine:
            del self._unseen[id(parameter)]

    def _partitions_of(self, parameter: torch.Tensor) -> list[int]:
        if not self._holders:
            for table in self.tables:
                holders = table.plan.partitions_by_parameter()
                self._holders.update(zip(map(id, table.plan.parameters), holders, strict=True))
        return self._holders[id(parameter)]

    def finish(self) -> None:
        """Returns when all values of the next step are in place."""
        if self._arriving is None:
            return
        arriving, self._arriving = self._arriving, None
        try:
            self.session.wait(arriving, f"parameters of step {self.position}")
        except BaseException:
            self._incomplete = True
            if not was_overtaken(arriving):
                raise
            self.pull_now(self.reopen())
            return
        self.scatter.finish(self._unseen.values())
        self._unseen = {}
        self.edits.remember()

    def opened(self) -> None:
        """Starts to watch gradients, if the options ask for it."""
        if self.settings.speculate and self.speculation is None:
            plans = [table.plan for table in self.tables]
            self.speculation = Speculation(plans, self.push_early, lambda: self.ready)
            self.speculation.watch()

    @property
    def ready(self) -> bool:
        """Whether a gradient that is computed now belongs to `position`."""
        return self.open and self.position is not None and self.session.active

    # ------------------------------------------------------------------ on the IO thread

    async def _step_on_loop(
        self,
        asked: Asked,
        encoded: Mapping[int, Encoded],
        attempts: Mapping[int, int],
        early: Mapping[int, concurrent.futures.Future[object]],
        contribution: Contribution,
    ) -> ledger_pb2.ReadyResponse:
        with phase("push"):
            if encoded:
                await self.client.push_staged(self.group, asked.request.step, encoded, attempts, self.committed)
            for future in early.values():
                await asyncio.wrap_future(future)
        self._asked, contribution.told = asked, True
        try:
            with phase("ready"):
                response = await self._ready_on_loop(asked.request)
        except (RequestRefused, StateRefused):
            contribution.told = False
            raise
        await self._conclude_on_loop(response)
        return response

    async def _undecided_on_loop(self, step: int) -> bool:
        """Whether another try may still count: if that is overtaken, the ledger takes it for too late."""
        request = ledger_pb2.GetStepsRequest(group=self.group, first=step, limit=1)
        return (await self.client.ledger.get_steps(request)).next_step <= step

    async def _resume_on_loop(self, request: ledger_pb2.ReadyRequest) -> ledger_pb2.ReadyResponse:
        response = await self._ready_on_loop(request)
        await self._conclude_on_loop(response)
        return response

    async def _conclude_on_loop(self, response: ledger_pb2.ReadyResponse) -> None:
        """After a decision: its clip factor, and the values of the next step."""
        self._overtaken = False
        try:
            record = await self._clipped_on_loop(response.record)
            response.record.CopyFrom(record)
            self.committed = [record]
            if not self._overlaps:
                await self._pull_on_loop(record.step + 1)
        except ParameshError as error:
            if error.reason != "STEP_OUT_OF_RANGE":
                raise
            # Too late for a step (backup workers), or evicted after its Ready: the group is further.
            self._overtaken = True

    async def _ready_on_loop(self, request: ledger_pb2.ReadyRequest) -> ledger_pb2.ReadyResponse:
        """Ready until decided; an evicted worker is told the decision of a step it was named in."""
        try:
            response = await self.client.ledger.ready(request)
        except (RequestRefused, StateRefused) as error:
            self._asked = None  # the ledger took no note of it: nothing to resume
            if error.reason != "STEP_OUT_OF_RANGE":
                raise
            raise Fenced(f"the decision of step {request.step} is forgotten: {error}", reason="EVICTED") from error
        if response.record.step != request.step:
            raise Fenced(f"asked for step {request.step}, the group is at {response.record.step}", reason="EVICTED")
        if not response.included:
            log.warning("too late step=%d: the step was decided without this contribution", request.step)
        return response

    async def _clipped_on_loop(self, record: types_pb2.StepRecord) -> types_pb2.StepRecord:
        """Returns a decision as partitions can apply it: with its clip factor, if it needs one."""
        if not record.needs_clip or record.has_clip_factor or record.skip:
            return record
        before = [r for r in self.committed if r.step < record.step]
        try:
            norms = await self.client.norms(self.partitions, self.group, [*before, record])
        except ParameshError as error:
            if error.reason != "STEP_OUT_OF_RANGE":
                raise
            norms = {}  # a partition has applied it, so the factor is known: the ledger answers at once
        parts = [
            ledger_pb2.PartitionSquaredNorm(partition=partition, squared_norm=value)
            for partition, value in norms.items()
        ]
        request = ledger_pb2.ClipRequest(group=self.group, step=record.step, norms=parts)
        return (await self.client.ledger.clip(request)).record
