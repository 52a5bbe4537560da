"""Asynchronous steps: push applied on arrival, one word to the ledger, pull.

ssp differs from async in the ledger alone: there the answer to a finished clock waits until the next may
start, and names floors that the next pull must reflect.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from paramesh.encoded import Encoded, Snapshot
from paramesh.exchange import Contribution, Exchange, GroupSettings, Outcome, Table, as_messages, encode
from paramesh.profiling import phase
from paramesh.v1 import ledger_pb2, types_pb2

if TYPE_CHECKING:
    from paramesh.membership import Session

log = logging.getLogger(__name__)


class AsyncExchange(Exchange):
    """One group in async or ssp mode; `position` is this worker's own clock."""

    def __init__(self, session: Session, settings: GroupSettings, tables: Sequence[Table]):
        super().__init__(session, settings, tables)
        self._floors: dict[int, tuple[int, int]] = {}
        """partition -> (epoch, lsn) that the next pull must at least reflect."""
        self._lost = 0
        """Acknowledged updates of this worker that were lost with a server in the last step (acks="primary")."""

    def pull_now(self, position: ledger_pb2.GroupPosition) -> None:
        """Pulls the newest values, and takes the clock that the ledger gave."""
        self.before_pull()
        self.session.call(self.client.pull(self.partitions, self.sink, group=self.group), "the newest values")
        self.after_pull()
        self.position = position.next_step

    async def snapshot_on_loop(self) -> dict[int, Snapshot]:
        """Returns cuts of the partitions, each at its own position in its log."""
        return await self.client.snapshot(self.partitions, group=self.group)

    def step(self, contribution: Contribution) -> Outcome:
        """Pushes, finishes the clock, pulls.

        Raises:
            Fenced: This worker was evicted; parts of the update may have been applied.
        """
        assert self.position is not None
        clock = self.position
        changes = self.changed_settings()
        encoded = encode(self.tables, contribution, self.host)
        request = ledger_pb2.ClockRequest(group=self.group, finished=clock + 1, samples=contribution.samples)
        self.before_pull()
        step = self._step_on_loop(request, encoded, as_messages(changes), contribution)
        answer = self.session.call(step, f"clock {clock}")
        self.after_pull()
        if answer.checkpoint:
            self.session.small_state.cut.stepped(answer.checkpoint, clock + 1, answer.chief)
        for table, current, _ in changes:
            table.sent = current
        if self._lost:
            log.warning(
                "lost updates=%d group=%s: acknowledged by a server that is gone", self._lost, self.settings.name
            )
            for table in self.tables:  # settings may have been lost with them
                table.sent = {}
        self.position = clock + 1
        return Outcome(clock, skipped=contribution.skip)

    async def _step_on_loop(
        self,
        request: ledger_pb2.ClockRequest,
        encoded: Mapping[int, Encoded],
        settings: Sequence[types_pb2.TableHyperParameters],
        contribution: Contribution,
    ) -> ledger_pb2.ClockResponse:
        with phase("push"):
            outcomes = await self.client.push_sequenced(
                encoded, settings, skip=contribution.skip, grad_scale=self._clip(contribution)
            )
        self._lost = sum(outcome.lost for outcome in outcomes.values())
        for partition, outcome in outcomes.items():
            request.floors.add(partition=partition, epoch=outcome.epoch, lsn=outcome.lsn)
            self._raise_floor(partition, outcome.epoch, outcome.lsn)
        with phase("clock"):
            answer = await self.client.ledger.clock(request)
        for floor in answer.floors:
            self._raise_floor(floor.partition, floor.epoch, floor.lsn)
        with phase("pull"):
            headers = await self.client.pull(self.partitions, self.sink, group=self.group, floors=self._floors)
        for partition, header in headers.items():
            self._raise_floor(partition, header.epoch, header.lsn)
        return answer

    def _raise_floor(self, partition: int, epoch: int, lsn: int) -> None:
        self._floors[partition] = max(self._floors.get(partition, (0, 0)), (epoch, lsn))

    def _clip(self, contribution: Contribution) -> float:
        """Returns the factor that brings this update's norm under the bound: an update is a step by itself."""
        bound = self.settings.max_grad_norm
        if bound is None or contribution.skip:
            return 1.0
        parts = [g for group in contribution.gradients for g in group if g is not None]
        if not parts:
            return 1.0
        norm = _norm(parts)
        if not math.isfinite(norm):  # squares leave fp32 long before gradients do; this one copies them
            norm = _norm([g.to(torch.promote_types(g.dtype, torch.float64)) for g in parts])
        return min(1.0, bound / (norm + 1e-6))


def _norm(parts: Sequence[torch.Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g).double().cpu() for g in parts])))
