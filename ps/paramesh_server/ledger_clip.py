"""What is said about a step after its decision: the clip factor, and missing parts. Pure.

clips.clip(request)              # all partitions' squared norms -> one fp32 factor
clips.report_missing(request)    # which evicted contributors a partition may go without
"""

from __future__ import annotations

import math
import struct

from paramesh.errors import refuse
from paramesh.v1.ledger_pb2 import ClipRequest, ClipResponse, ReportMissingRequest, ReportMissingResponse
from paramesh.v1.types_pb2 import StepRecord

from paramesh_server.ledger_groups import GroupState
from paramesh_server.ledger_log import ClipSet, Degraded, Desk, StepDecided, Wait
from paramesh_server.ledger_members import Members
from paramesh_server.ledger_steps import Steps

DEGRADE_AFTER_S = 2.0
"""Seconds after a contributor's eviction in which it may still re-stage what a step names:
one failure timeout, after which nobody believes that it lives."""


def clip_factor(squared_norms: list[float], max_norm: float) -> float | None:
    """The factor of `torch.nn.utils.clip_grad_norm_`, rounded once to fp32; None: the norm is not finite.

    Args:
        squared_norms: of each partition, in partition order; summed in fp64 in that order.
        max_norm: the bound, > 0.
    """
    total = 0.0
    for squared in squared_norms:
        total += squared
    if not math.isfinite(total):
        return None
    factor = min(1.0, max_norm / (math.sqrt(total) + 1e-6))
    return float(struct.unpack("<f", struct.pack("<f", factor))[0])


class Clips:
    """Clip factors and DEGRADED permissions of decided steps."""

    def __init__(self, desk: Desk, members: Members, steps: Steps):
        self._desk = desk
        self._members = members
        self._steps = steps
        self._norms: dict[tuple[int, int], dict[int, float]] = {}
        """For (group, step), squared norms by partition as far as told. Volatile."""
        desk.on(ClipSet, self._apply_clip)
        desk.on(Degraded, self._apply_degraded)
        desk.on(StepDecided, self._apply_decided)

    # ------------------------------------------------------------------ clipping

    def clip(self, request: ClipRequest) -> ClipResponse | Wait:
        """Take norms of a decided step; answer its record when the factor is known.

        The first complete set of norms wins: they are a function of the step, so all agree. A norm
        that is not finite turns the step into a skip: it is decided, so it must have an end, and no
        factor makes a NaN harmless.

        Raises:
            RequestRefused: UNKNOWN_GROUP, WRONG_PARTITION, NON_FINITE (a square below 0).
            StateRefused: SCHEMA, STEP_OUT_OF_RANGE.
        """
        group = self._steps.group(request.group)
        record = self._steps.record(group, request.step)
        if record.has_clip_factor or record.skip or not record.needs_clip:
            return ClipResponse(record=record)
        known = self._norms.setdefault((group.number, request.step), {})
        self._check(group, request)
        for norm in request.norms:
            known.setdefault(norm.partition, norm.squared_norm)
        lacking = [p for p in group.spec.partitions if p not in known]
        if lacking:
            return Wait(
                ("clip", group.number, request.step),
                f"squared norms of partitions {lacking[:8]} for step {request.step} of group {group.spec.name}",
                lambda: self._members.ranks([c.client_id for c in record.contributors]),
            )
        ordered = [known[partition] for partition in sorted(known)]
        factor = clip_factor(ordered, group.spec.max_grad_norm)
        if factor is None:
            self._desk.notice(
                f"skipped group={group.spec.name} step={request.step} squared_norms={ordered[:8]}: a gradient "
                "holds NaN or infinity"
            )
        self._desk.commit(ClipSet(group.number, request.step, factor))
        return ClipResponse(record=group.records[request.step])

    @staticmethod
    def _check(group: GroupState, request: ClipRequest) -> None:
        partitions = set(group.spec.partitions)
        for norm in request.norms:
            if norm.partition not in partitions:
                raise refuse("WRONG_PARTITION", f"partition {norm.partition} is not of group {group.spec.name}")
            if norm.squared_norm < 0:
                raise refuse(
                    "NON_FINITE",
                    f"the squared gradient norm of partition {norm.partition} in step {request.step} is "
                    f"{norm.squared_norm}",
                    partition=norm.partition,
                    step=request.step,
                )

    # ------------------------------------------------------------------ missing contributions

    def report_missing(self, request: ReportMissingRequest) -> ReportMissingResponse:
        """Say which contributions of a step a partition may go without.

        Only those of clients that are gone since DEGRADE_AFTER_S: the others re-stage.

        Raises:
            RequestRefused: UNKNOWN_GROUP.
            StateRefused: SCHEMA, STEP_OUT_OF_RANGE.
        """
        group = self._steps.group(request.group)
        record = self._steps.record(group, request.step)
        named = {c.client_id for c in record.contributors} & set(request.client_ids)
        gone = [
            client_id
            for client_id in sorted(named)
            if self._members.get(client_id) is None
            and self._desk.now - self._members.gone_since(client_id) >= DEGRADE_AFTER_S
        ]
        permitted = group.degraded.get((request.step, request.partition), set())
        if not set(gone) <= permitted:
            self._desk.commit(Degraded(group.number, request.step, request.partition, tuple(gone)))
            self._desk.notice(
                f"degraded group={group.spec.name} step={request.step} partition={request.partition} clients={gone}"
            )
        return ReportMissingResponse(
            degraded=sorted(group.degraded.get((request.step, request.partition), set()) & named)
        )

    # ------------------------------------------------------------------ applying

    def _apply_clip(self, body: ClipSet) -> None:
        group = self._steps.group(body.group)
        record = StepRecord()
        record.CopyFrom(group.records[body.step])  # answers on their way out hold the old one
        if body.factor is None:
            record.skip = True
            group.skipped += 1
        else:
            record.clip_factor, record.has_clip_factor = body.factor, True
        group.records[body.step] = record
        self._norms.pop((body.group, body.step), None)
        self._desk.wake(("clip", body.group, body.step))

    def _apply_degraded(self, body: Degraded) -> None:
        group = self._steps.group(body.group)
        group.degraded.setdefault((body.step, body.partition), set()).update(body.client_ids)

    def _apply_decided(self, body: StepDecided) -> None:
        number = body.record.group
        for key in [key for key in self._norms if key[0] == number and key[1] < body.keep_from]:
            del self._norms[key]
