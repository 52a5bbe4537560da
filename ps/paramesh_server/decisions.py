"""Reading a step's record: who counts, with what weight, and what happens to the sum. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from paramesh.errors import refuse
from paramesh.v1 import types_pb2 as pb

from paramesh_server.aggregate import Part, Reduction
from paramesh_server.staging import Staging

MAX_WEIGHT = 1e15
"""A weight above this is a mistake: it is a number of samples or tokens of one step."""


def for_one_thread(records: Iterable[pb.StepRecord]) -> list[pb.StepRecord]:
    """Copies that nobody else holds; make them on the loop, before the work goes to a thread.

    A request names several partitions, which are worked on side by side, and protobuf's objects (upb, 7.36) are
    not made for it, not even to be read: what looks like a copy, `request.committed[0]`, is one object for
    all who ask, and two threads that took it up and let go of it left one of them with freed memory.
    """
    made = []
    for record in records:
        copy = pb.StepRecord()
        copy.CopyFrom(record)
        made.append(copy)
    return made


def check_record(record: pb.StepRecord) -> None:
    """Refuse a record that no ledger would decide; sums would silently be wrong.

    Raises:
        RequestRefused: MISSING_FIELD, WEIGHT.
    """
    if record.loss_reduction == pb.LOSS_REDUCTION_UNSPECIFIED and not record.skip:
        raise refuse("MISSING_FIELD", f"the record of step {record.step} has no loss_reduction", field="loss_reduction")
    ranks = [contributor.rank for contributor in record.contributors]
    if ranks != sorted(set(ranks)):
        raise refuse("MISSING_FIELD", f"contributors of step {record.step} are not in rank order", field="rank")
    for contributor in record.contributors:
        if not (math.isfinite(contributor.weight) and 0 < contributor.weight <= MAX_WEIGHT):
            raise refuse(
                "WEIGHT", f"weight {contributor.weight} of client {contributor.client_id}", weight=contributor.weight
            )


def reduction_of(record: pb.StepRecord, without: Collection[int] = ()) -> Reduction:
    """Divisor (over all contributors but those that a DEGRADED step went without) and clip factor."""
    clip = record.clip_factor if record.has_clip_factor else None
    if record.loss_reduction == pb.LOSS_REDUCTION_SUM:
        return Reduction(None, clip)
    total = 0.0
    for contributor in record.contributors:
        if contributor.client_id not in without:
            total += contributor.weight
    return Reduction(total, clip)


@dataclass(frozen=True, slots=True)
class Decided:
    """What one partition sums in one step."""

    parts: list[Part]
    """In rank order; none: the parameters stay."""
    reduction: Reduction
    without: tuple[int, ...] = ()
    """Named by the decision and not here, with the ledger's permission."""


def gather(record: pb.StepRecord, partition: int, staging: Staging) -> Decided:
    """Everything that a decision names for one partition.

    Raises:
        Retryable: NOT_STAGED; metadata `client_ids` lists whose are missing without permission.
    """
    if record.skip:
        return Decided([], reduction_of(record))
    permitted = {c for d in record.degraded if d.partition == partition for c in d.client_ids}
    parts, without = parts_of(record, partition, staging, permitted)
    return Decided(parts, reduction_of(record, without), tuple(without))


def attempt_in(contributor: pb.Contributor, partition: int) -> int:
    """The attempt that counts in one partition."""
    for override in contributor.overrides:
        if override.partition == partition:
            return override.attempt
    return contributor.attempt


def parts_of(
    record: pb.StepRecord, partition: int, staging: Staging, permitted: Collection[int] = ()
) -> tuple[list[Part], list[int]]:
    """The contributions that a record names, in rank order, with their weights; and who is missing.

    Args:
        record: the decision.
        partition: whose.
        staging: what it holds.
        permitted: clients that it may go without.

    Raises:
        Retryable: NOT_STAGED; metadata `client_ids` lists whose are missing.
    """
    weighted = record.loss_reduction != pb.LOSS_REDUCTION_SUM
    parts, missing = [], []
    for contributor in record.contributors:
        attempt = attempt_in(contributor, partition)
        held = staging.get(record.group, record.step, contributor.client_id, attempt)
        if held is None:
            missing.append(contributor.client_id)
        else:
            parts.append(Part(held, contributor.weight if weighted else None))
    if not set(missing) <= set(permitted):
        missing = [client for client in missing if client not in permitted]
        raise refuse(
            "NOT_STAGED",
            f"partition {partition} lacks contributions of step {record.step} from clients {missing}",
            partition=partition,
            step=record.step,
            client_ids=",".join(map(str, missing)),
        )
    return parts, missing
