"""The bad-input matrix (design 4, section 2): the ledger."""

from __future__ import annotations

import math
from typing import Any

from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as pb

from tests.faults.bad_input_rows import NAMES, Row
from tests.faults.bench import Bench


def member(b: Bench) -> Bench:
    """Make the row's client a member."""
    b.ledger("Join", lg.JoinRequest(slot=f"bad/{b.client.client_id}"))
    b.snapshot()
    return b


def group_spec(b: Bench, **changes: Any) -> lg.GroupSpec:
    """A right group of the row's client alone, with changes."""
    fields: dict[str, Any] = {
        "name": f"bad-{b.client.client_id}", "mode": lg.MODE_SYNC, "loss_reduction": pb.LOSS_REDUCTION_MEAN,
        "structure_digest": b"x" * 32, "tensor_names": ["w"], "partitions": [b.partition],
    }  # fmt: skip
    return lg.GroupSpec(**{**fields, **changes})


def group(b: Bench, **changes: Any) -> int:
    """Open a group."""
    number = int(member(b).ledger("OpenGroup", lg.OpenGroupRequest(spec=group_spec(b, **changes))).group)
    b.snapshot()
    return number


def _open(b: Bench, **changes: Any) -> Any:
    return member(b).ledger("OpenGroup", lg.OpenGroupRequest(spec=group_spec(b, **changes)))


def _reopen(b: Bench, **changes: Any) -> Any:
    group(b)
    return b.ledger("OpenGroup", lg.OpenGroupRequest(spec=group_spec(b, **changes)))


def _ready(b: Bench, **changes: Any) -> Any:
    fields = {"group": group(b), "step": 0, "attempt": 1, "weight": 1.0}
    return b.ledger("Ready", lg.ReadyRequest(**{**fields, **changes}))


def _clock(b: Bench, mode: int = lg.MODE_SSP, **changes: Any) -> Any:
    fields: dict[str, Any] = {"group": group(b, mode=mode), "finished": 1}
    return b.ledger("Clock", lg.ClockRequest(**{**fields, **changes}))


def lease(b: Bench, **changes: Any) -> Any:
    """Lease of a dataset of the row's client alone."""
    fields: dict[str, Any] = {"dataset": f"d{b.client.client_id}", "length": 10, "chunk": 2, "want": 1}
    return member(b).ledger("Lease", lg.LeaseRequest(**{**fields, **changes}))


def _samples(b: Bench, begin: int, end: int, epoch: int = 0) -> Any:
    """Ready that names samples while [0, 2) of epoch 0 is leased."""
    number = group(b)
    lease(b)
    b.snapshot()
    samples = [pb.SampleRange(dataset=f"d{b.client.client_id}", epoch=epoch, begin=begin, end=end)]
    return b.ledger("Ready", lg.ReadyRequest(group=number, attempt=1, weight=1.0, samples=samples))


def _twice(b: Bench) -> Any:
    number = group(b)
    (mine,) = lease(b).leases
    b.snapshot()
    return b.ledger("Ready", lg.ReadyRequest(group=number, attempt=1, weight=1.0, samples=[mine, mine]))


def _other_epoch(b: Bench, **changes: Any) -> Any:
    """A second worker describes the epoch differently."""
    lease(b)
    b.snapshot()
    return lease(b, **changes)


def _old_lease(b: Bench) -> Any:
    """A lease of a membership that is over: it left, and joined again."""
    number = group(b)
    (mine,) = lease(b).leases
    b.ledger("Leave", lg.LeaveRequest())
    member(b)
    return b.ledger("Ready", lg.ReadyRequest(group=number, attempt=1, weight=1.0, samples=[mine]))


def _put(b: Bench, **changes: Any) -> Any:
    return member(b).ledger("PutState", lg.PutStateRequest(**{"key": "k", "version": 1, "value": b"x", **changes}))


def _gather(b: Bench, **changes: Any) -> Any:
    return member(b).ledger("Gather", lg.GatherRequest(**{"name": f"g{b.client.client_id}", **changes}))


def _figure(b: Bench, name: str) -> Any:
    return member(b).ledger("Report", lg.ReportRequest(figures=[lg.Figure(name=name, value=1.0)]))


def _evicted(b: Bench, method: str, request: Any) -> Any:
    member(b)
    b.fence(b.client.client_id)
    b.snapshot()
    return b.ledger(method, request)


def _foreign(b: Bench, **changes: Any) -> Any:
    return b.ledger("Join", lg.JoinRequest(slot="x/0"), b.request(**changes))


LEDGER_ROWS = [
    Row(30, "joining without client id", "MISSING_FIELD", lambda b: _foreign(b, client_id=0)),
    Row(35, "joining another job", "WRONG_CLUSTER", lambda b: _foreign(b, job="other")),
    Row(36, "joining generation 0", "OLD_GENERATION", lambda b: _foreign(b, generation=0)),
    Row(45, "joining with a newer protocol", "VERSION", lambda b: _foreign(b, protocol=2)),
    Row(41, "joining of an evicted client", "EVICTED", lambda b: _evicted(b, "Join", lg.JoinRequest(slot="x/0"))),
    Row(41, "an activity of an evicted client", "EVICTED",
        lambda b: _evicted(b, "SetActivity", lg.SetActivityRequest(activity=lg.ACTIVITY_ACTIVE))),
    Row(51, "ready of step 2", "STEP_OUT_OF_RANGE", lambda b: _ready(b, step=2)),
    Row(51, "ready of step 2^63", "STEP_OUT_OF_RANGE", lambda b: _ready(b, step=1 << 63)),
    Row(51, "ready of an unknown group", "UNKNOWN_GROUP", lambda b: _ready(b, group=999)),
    Row(51, "ready of one who never joined", "NOT_MEMBER",
        lambda b: b.ledger("Ready", lg.ReadyRequest(group=group_of_another(b), weight=1.0, attempt=1))),
    Row(51, "ready in a group of clocks", "SCHEMA", lambda b: _ready(b, group=group(b, mode=lg.MODE_ASYNC))),
    Row(51, "norms of an undecided step", "STEP_OUT_OF_RANGE",
        lambda b: b.ledger("Clip", lg.ClipRequest(group=group(b), step=0))),
    Row(51, "a contribution missing in an undecided step", "STEP_OUT_OF_RANGE",
        lambda b: b.ledger("ReportMissing", lg.ReportMissingRequest(group=group(b), step=0, partition=1))),
    Row(51, "a clock that skips one", "CLOCK", lambda b: _clock(b, finished=2)),
    Row(51, "a clock in a group of steps", "SCHEMA", lambda b: _clock(b, mode=lg.MODE_SYNC)),
    Row(2, "a floor of a foreign partition", "WRONG_PARTITION",
        lambda b: _clock(b, floors=[lg.Floor(partition=77, epoch=1, lsn=1)])),
    Row(30, "ready under attempt 0", "MISSING_FIELD", lambda b: _ready(b, attempt=0)),
    Row(30, "ready under an override of attempt 0", "MISSING_FIELD",
        lambda b: _ready(b, overrides=[pb.Attempt(partition=b.partition, attempt=0)])),
    Row(53, "weight NaN", "WEIGHT", lambda b: _ready(b, weight=math.nan)),
    Row(53, "weight infinite", "WEIGHT", lambda b: _ready(b, weight=math.inf)),
    Row(53, "weight negative", "WEIGHT", lambda b: _ready(b, weight=-1.0)),
    Row(53, "weight 0", "WEIGHT", lambda b: _ready(b, weight=0.0)),
    Row(53, "weight 10^30", "WEIGHT", lambda b: _ready(b, weight=1e30)),
    Row(53, "a mean weighed NaN", "WEIGHT", lambda b: _gather(b, values=[1.0], weight=math.nan)),
    Row(53, "a mean weighed negatively", "WEIGHT", lambda b: _gather(b, values=[1.0], weight=-1.0)),
    Row(56, "samples of somebody else", "LEASE",
        lambda b: _ready(b, samples=[pb.SampleRange(dataset="", epoch=0, begin=0, end=4)])),
    Row(56, "samples of another chunk", "LEASE", lambda b: _samples(b, 4, 6)),
    Row(56, "samples of an epoch that is not open", "LEASE", lambda b: _samples(b, 0, 2, epoch=9)),
    Row(56, "samples twice in one step", "LEASE", _twice),
    Row(56, "samples of an earlier membership", "LEASE", _old_lease),
    Row(56, "samples backwards", "SAMPLE_RANGE", lambda b: _samples(b, 2, 0)),
    Row(56, "no samples", "SAMPLE_RANGE", lambda b: _samples(b, 2, 2)),
    Row(56, "samples backwards of a dataset that is not there", "SAMPLE_RANGE",
        lambda b: _ready(b, samples=[pb.SampleRange(dataset="", epoch=0, begin=4, end=0)])),
    Row(56, "samples beyond the end", "SAMPLE_OUT_OF_RANGE", lambda b: _samples(b, 0, 12)),
    Row(56, "samples to 2^64", "SAMPLE_OUT_OF_RANGE", lambda b: _samples(b, 0, 2**64 - 1)),
    Row(56, "a clock of samples backwards", "SAMPLE_RANGE",
        lambda b: _clock(b, samples=[pb.SampleRange(dataset="", epoch=0, begin=4, end=0)])),
    Row(56, "lease of chunks of 0 samples", "MISSING_FIELD", lambda b: lease(b, chunk=0)),
    Row(56, "lease of 2^33 chunks", "QUOTA", lambda b: lease(b, length=1 << 33, chunk=1)),
    Row(56, "an epoch of another length", "SCHEMA", lambda b: _other_epoch(b, length=11)),
    Row(56, "an epoch of another seed", "SCHEMA", lambda b: _other_epoch(b, seed=3)),
    Row(30, "activity 0", "MISSING_FIELD", lambda b: member(b).ledger("SetActivity", lg.SetActivityRequest())),
    Row(30, "activity 9", "MISSING_FIELD",
        lambda b: member(b).ledger("SetActivity", lg.SetActivityRequest(activity=9))),
    Row(30, "a group of no mode", "MISSING_FIELD", lambda b: _open(b, mode=lg.MODE_UNSPECIFIED)),
    Row(30, "a group of no structure", "MISSING_FIELD", lambda b: _open(b, structure_digest=b"")),
    Row(48, "max_grad_norm NaN", "HYPER_PARAMETER", lambda b: _open(b, max_grad_norm=math.nan)),
    Row(48, "max_grad_norm negative", "HYPER_PARAMETER", lambda b: _open(b, max_grad_norm=-1.0)),
    Row(46, "a group of another model", "TENSOR_MISMATCH", lambda b: _reopen(b, structure_digest=b"y" * 32)),
    Row(46, "a group of another mode", "SCHEMA", lambda b: _reopen(b, mode=lg.MODE_SSP)),
    Row(39, "a round of a barrier that is not the next", "STEP_OUT_OF_RANGE", lambda b: _gather(b, round=3)),
    Row(18, "state of 5 MiB", "STATE_TOO_LARGE", lambda b: _put(b, value=bytes(5 << 20))),
    *[Row(31, f"state key {i}", "NAME", lambda b, name=name: _put(b, key=name)) for i, name in enumerate(NAMES)],
    *[Row(31, f"group name {i}", "NAME", lambda b, name=name: _open(b, name=name)) for i, name in enumerate(NAMES)],
    *[Row(31, f"barrier name {i}", "NAME", lambda b, name=name: _gather(b, name=name))
      for i, name in enumerate(NAMES)],
    *[Row(31, f"figure name {i}", "NAME", lambda b, name=name: _figure(b, name)) for i, name in enumerate(NAMES)],
    *[Row(31, f"dataset {i}", "NAME", lambda b, name=name: lease(b, dataset=name))
      for i, name in enumerate(NAMES) if name],
    *[Row(31, f"member slot {i}", "NAME", lambda b, name=name: b.ledger("Join", lg.JoinRequest(slot=name)))
      for i, name in enumerate(NAMES) if name],
]  # fmt: skip


def group_of_another(b: Bench) -> int:
    """A group that this row's client has nothing to do with."""
    mine = b.client
    number = group(b)
    b.ledger("Leave", lg.LeaveRequest())
    b.new_client()
    assert b.client is not mine
    b.snapshot()
    return number
