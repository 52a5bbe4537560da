"""The bad-input matrix (design 4, section 2): staged pushes, decisions that travel with requests, reads."""

from __future__ import annotations

import math
from typing import Any

from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

from tests.faults.bad_input_rows import Row, changed_gradient, pull_of
from tests.faults.bench import GRADIENT, Bench

GROUP = 7
"""Of the table, as far as its partition has been told."""


def staged(b: Bench, payload: bytes = GRADIENT, *, committed: Any = None, **changes: Any) -> Any:
    """Push a contribution to a step."""
    key = ps.StagedKey(**{"group": GROUP, "step": 0, "attempt": 1, **changes})
    return b.push(payload, sequenced=None, staged=key, committed=committed)


def record(b: Bench, **changes: Any) -> pb.StepRecord:
    """A decision that names this client alone, with changes."""
    named = pb.Contributor(client_id=b.client.client_id, rank=0, weight=1.0, attempt=1)
    fields: dict[str, Any] = {
        "group": GROUP, "step": 0, "loss_reduction": pb.LOSS_REDUCTION_MEAN, "contributors": [named],
    }  # fmt: skip
    return pb.StepRecord(**{**fields, **changes})


def pull_at(b: Bench, step: int, *committed: pb.StepRecord) -> Any:
    """Pull the values at the start of a step."""
    return b.pull(group=GROUP, at_step=True, step=step, committed=committed)


def _weighing(b: Bench, weight: float) -> Any:
    """A decision with an impossible weight, for a contribution that is there."""
    staged(b)
    b.snapshot()
    named = pb.Contributor(client_id=b.client.client_id, rank=0, weight=weight, attempt=1)
    return pull_at(b, 1, record(b, contributors=[named]))


def _two_of_a_rank(b: Bench) -> Any:
    staged(b)
    b.snapshot()
    named = pb.Contributor(client_id=b.client.client_id, rank=0, weight=1.0, attempt=1)
    return pull_at(b, 1, record(b, contributors=[named, named]))


def _reused(b: Bench) -> Any:
    staged(b)
    b.snapshot()
    return staged(b, changed_gradient())


def _fenced(b: Bench, send: Any) -> Any:
    b.fence(b.client.client_id)
    b.snapshot()
    return send(b)


def _floor(b: Bench, **changes: Any) -> Any:
    return b.pull(partitions=pull_of(b, **changes))


def _snapshot(b: Bench, **changes: Any) -> Any:
    fields: dict[str, Any] = {"request": b.client.header(), "partitions": pull_of(b)}
    return b.frames("snapshot", ps.SnapshotRequest(**{**fields, **changes}))


def _norms(b: Bench, **changes: Any) -> Any:
    fields: dict[str, Any] = {"request": b.client.header(), "partitions": pull_of(b)}
    return b.norms(ps.NormsRequest(**{**fields, **changes}))


STEP_ROWS = [
    Row(2, "a contribution to an unknown partition", "WRONG_PARTITION",
        lambda b: b.push(partition=4_000_000, sequenced=None, staged=ps.StagedKey(group=GROUP, attempt=1))),
    Row(2, "push to partition -1", "WRONG_PARTITION", lambda b: b.push(partition=2**32 - 1)),
    Row(2, "push to the ledger's partition", "WRONG_PARTITION", lambda b: b.push(partition=0)),
    Row(2, "pull of the ledger's partition", "WRONG_PARTITION", lambda b: b.pull(partitions=pull_of(b, partition=0))),
    Row(2, "snapshot of an unknown partition", "WRONG_PARTITION",
        lambda b: _snapshot(b, partitions=pull_of(b, partition=4_000_000))),
    Row(2, "norms of an unknown partition", "WRONG_PARTITION",
        lambda b: _norms(b, partitions=pull_of(b, partition=4_000_000), committed=[record(b)])),
    Row(6, "a contribution too short", "PAYLOAD_SIZE", lambda b: staged(b, GRADIENT[:64])),
    Row(7, "a contribution too long", "PAYLOAD_SIZE", lambda b: staged(b, GRADIENT * 3)),
    Row(9, "an empty contribution", "PAYLOAD_SIZE", lambda b: staged(b, b"")),
    Row(23, "a pull in an unknown codec", "CODEC", lambda b: b.pull(codec=99)),
    Row(23, "a pull in a codec of a later release", "CODEC", lambda b: b.pull(codec=pb.CODEC_TOP_K)),
    Row(26, "a pull under an unknown checksum", "CODEC", lambda b: b.pull(checksum_kind=99)),
    Row(26, "a damaged contribution", "CRC",
        lambda b: b.push(sequenced=None, staged=ps.StagedKey(group=GROUP, attempt=1),
                         frame=b.frame(GRADIENT, checksum=1))),
    Row(30, "norms of no step", "MISSING_FIELD", lambda b: _norms(b)),
    Row(30, "epoch 0 in a pull", "MISSING_FIELD", lambda b: _floor(b, epoch=0)),
    Row(30, "a decision that does not say how to reduce", "MISSING_FIELD",
        lambda b: pull_at(b, 1, record(b, loss_reduction=pb.LOSS_REDUCTION_UNSPECIFIED))),
    Row(30, "a decision that names a rank twice", "MISSING_FIELD", _two_of_a_rank),
    Row(33, "future epoch in a snapshot", "UNKNOWN_EPOCH", lambda b: _snapshot(b, partitions=pull_of(b, epoch=9))),
    Row(33, "a floor of a future epoch", "UNKNOWN_EPOCH", lambda b: _floor(b, floor_lsn=1, floor_epoch=9)),
    Row(35, "another job in a snapshot", "WRONG_CLUSTER", lambda b: _snapshot(b, request=b.request(job="other"))),
    Row(35, "another job in norms", "WRONG_CLUSTER", lambda b: _norms(b, request=b.request(job="other"))),
    Row(36, "generation 0 in a pull", "OLD_GENERATION", lambda b: b.pull(request=b.request(generation=0))),
    Row(41, "a contribution of a fenced client", "CLIENT_FENCED", lambda b: _fenced(b, staged)),
    Row(50, "a floor 2^40 ahead", "FLOOR", lambda b: _floor(b, floor_lsn=1 << 40, floor_epoch=1)),
    Row(50, "a floor of 2^64 - 1", "FLOOR", lambda b: _floor(b, floor_lsn=2**64 - 1, floor_epoch=1)),
    Row(50, "a floor that does not come in time", "DEADLINE",
        lambda b: b.pull(partitions=pull_of(b, floor_lsn=1 << 20, floor_epoch=1), seconds=0.5)),
    Row(51, "a contribution to step 2", "NEED_STEPS", lambda b: staged(b, step=2)),
    Row(51, "values of a step that is not decided", "NEED_STEPS", lambda b: pull_at(b, 3)),
    Row(51, "a decision of step 2", "NEED_STEPS", lambda b: pull_at(b, 3, record(b, step=2))),
    Row(51, "a decision without what it names", "NOT_STAGED", lambda b: pull_at(b, 1, record(b))),
    Row(51, "norms without what the decision names", "NOT_STAGED", lambda b: _norms(b, committed=[record(b)])),
    Row(52, "two contributions under one attempt", "SEQ_REUSED", _reused),
    *[Row(53, f"a decision with weight {weight}", "WEIGHT", lambda b, weight=weight: _weighing(b, weight))
      for weight in (math.nan, math.inf, -1.0, 0.0, 1e30)],
]  # fmt: skip
