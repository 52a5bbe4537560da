"""The bad-input matrix (design 4, section 2), as far as dense tables and registration go.

A row is one wrong request: what is sent, the reason that must come back, and what it may
leave behind. Numbers are those of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from paramesh import framing
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import replication_pb2, replication_pb2_grpc
from paramesh.v1 import types_pb2 as pb

from tests.faults.bench import GRADIENT, Bench, number


@dataclass(frozen=True)
class Row:
    """One wrong request."""

    number: int
    """In the matrix."""
    what: str
    reason: str
    """The one that must come back."""
    send: Callable[[Bench], Any]
    noop: bool = False
    """The refused seq is consumed as a NOOP, which the state hash sees; values stay."""

    @property
    def id(self) -> str:
        """For pytest."""
        return f"{self.number:02}-{self.what.replace(' ', '-')}"


def _staged(**changes: Any) -> ps.StagedKey:
    return ps.StagedKey(**{"group": 1, "step": 0, "attempt": 1, **changes})


def _seq(**changes: Any) -> ps.SequenceKey:
    return ps.SequenceKey(**{"seq": 1, **changes})


def _changed_gradient() -> bytes:
    return torch.full((21,), 2.0).numpy().tobytes()


def _with(value: float) -> bytes:
    gradient = torch.ones(21)
    gradient[3] = value
    return gradient.numpy().tobytes()


def _sequence(b: Bench, *seqs: int) -> Any:
    outcome = None
    for seq in seqs:
        outcome = b.push(sequenced=_seq(seq=seq))
    return outcome


def _reuse(b: Bench) -> Any:
    """The same seq with other bytes: the first is undone by nobody, so it is sent before the snapshot."""
    return b.push(_changed_gradient(), sequenced=_seq(seq=1))


def _tensors(*shapes: list[int], dtype: int = pb.DTYPE_FLOAT32) -> list[pb.TensorSpec]:
    return [pb.TensorSpec(name=f"w{i}", shape=s, dtype=dtype) for i, s in enumerate(shapes)]


def _optimizer(name: str, *settings: pb.HyperParameter) -> pb.OptimizerSpec:
    return pb.OptimizerSpec(class_name=name, hyper_parameters=settings)


def _unfinished(b: Bench) -> Any:
    frame = b.frame(GRADIENT, last=False)
    return b.push_messages([framing.encode(b.header(frame=frame), [GRADIENT])])


def _flood(b: Bench) -> Any:
    """Many times the partition's bytes before the last frame."""
    more = framing.encode(b.header(frame=b.frame(GRADIENT, last=False)), [GRADIENT])
    return b.push_messages([*[more] * 5000, framing.encode(b.header(), [GRADIENT])])


def _control(b: Bench, method: str, request: Any) -> Any:
    request.request.CopyFrom(pb.RequestHeader(job="default", generation=1, protocol=1))
    return b._unary(b.control, replication_pb2_grpc.ServerControlStub, method, request)


def _register_client(b: Bench, **changes: Any) -> Any:
    fields = {"request": pb.RequestHeader(job="default", protocol=1), "incarnation": 5, "slot": "x/0", "role": "worker"}
    return b.coordinator("Membership", "RegisterClient", co.RegisterClientRequest(**{**fields, **changes}))


def _describe(b: Bench, table: int) -> Any:
    return b.coordinator("Catalog", "DescribeTable", co.DescribeTableRequest(request=b.client.header(), table_id=table))


def _pull_of(b: Bench, **changes: Any) -> list[ps.PartitionPull]:
    return [ps.PartitionPull(**{"partition": b.partition, "epoch": 1, **changes})]


def _assign(b: Bench, payload: bytes = GRADIENT, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "request": b.client.header(), "partition": b.partition, "epoch": 1, "frame": b.frame(payload), "assign_id": 1,
    }  # fmt: skip
    header = ps.AssignHeader(**{**fields, **changes})
    for outcome in b.raw("assign", [framing.encode(header, [payload])]).outcomes:
        if outcome.HasField("error"):
            from paramesh.status import from_detail

            raise from_detail(outcome.error)


NAMES = ["", "a b", "a\nb", "a\x00b", "x" * 257, "../etc", "a/../b", "caf\u00e9", "\U0001f600"]

DATA_ROWS = [
    Row(1, "unknown table", "UNKNOWN_TABLE", lambda b: _describe(b, 77)),
    Row(2, "push to an unknown partition", "WRONG_PARTITION", lambda b: b.push(partition=4_000_000)),
    Row(2, "pull of an unknown partition", "WRONG_PARTITION",
        lambda b: b.pull(partitions=_pull_of(b, partition=4_000_000))),
    Row(6, "payload shorter than declared", "PAYLOAD_SIZE",
        lambda b: b.push(frame=b.frame(GRADIENT, length=88)), noop=True),
    Row(6, "bytes of a segment missing", "PAYLOAD_SIZE", lambda b: b.push(GRADIENT[:64]), noop=True),
    Row(7, "payload longer than declared", "PAYLOAD_SIZE",
        lambda b: b.push(frame=b.frame(GRADIENT, length=80)), noop=True),
    Row(7, "bytes beyond the partition", "PAYLOAD_SIZE", lambda b: b.push(GRADIENT * 3), noop=True),
    Row(7, "offset beyond the partition", "PAYLOAD_SIZE",
        lambda b: b.push(frame=b.frame(GRADIENT, offset=1 << 40)), noop=True),
    Row(7, "offset near 2^64", "PAYLOAD_SIZE",
        lambda b: b.push(frame=b.frame(GRADIENT, offset=2**64 - 64)), noop=True),
    Row(7, "offset off the grid", "PAYLOAD_SIZE", lambda b: b.push(frame=b.frame(GRADIENT, offset=4)), noop=True),
    Row(7, "many times the partition's bytes", "PAYLOAD_SIZE", _flood, noop=True),
    Row(9, "an empty dense push", "PAYLOAD_SIZE", lambda b: b.push(b""), noop=True),
    Row(9, "presence of too many segments", "TENSOR_MISMATCH", lambda b: b.push(presence=b"\xff" * 9), noop=True),
    Row(9, "bytes of an absent segment", "PAYLOAD_SIZE", lambda b: b.push(presence=b"\x01"), noop=True),
    Row(9, "a presence bit beyond the segments", "TENSOR_MISMATCH", lambda b: b.push(presence=b"\x07"), noop=True),
    Row(23, "unknown codec", "CODEC", lambda b: b.push(frame=b.frame(GRADIENT, codec=99)), noop=True),
    Row(23, "no codec", "CODEC", lambda b: b.push(frame=b.frame(GRADIENT, codec=pb.CODEC_UNSPECIFIED)), noop=True),
    Row(22, "a codec bomb", "CODEC",
        lambda b: b.push(b"0123456789", frame=b.frame(b"0123456789", codec=pb.CODEC_TOP_K, length=1 << 40)), noop=True),
    Row(26, "damaged bytes", "CRC", lambda b: b.push(frame=b.frame(GRADIENT, checksum=1))),
    Row(26, "unknown checksum kind", "CODEC", lambda b: b.push(frame=b.frame(GRADIENT, checksum_kind=9)), noop=True),
    Row(30, "no client id", "MISSING_FIELD", lambda b: b.push(request=b.request(client_id=0))),
    Row(30, "no request header", "VERSION", lambda b: b.push(request=None)),
    Row(30, "seq 0", "MISSING_FIELD", lambda b: b.push(sequenced=_seq(seq=0))),
    Row(30, "epoch 0", "MISSING_FIELD", lambda b: b.push(epoch=0)),
    Row(30, "neither staged nor sequenced", "MISSING_FIELD", lambda b: b.push(sequenced=None)),
    Row(30, "attempt 0", "MISSING_FIELD", lambda b: b.push(sequenced=None, staged=_staged(attempt=0))),
    Row(30, "a stream that ends before its last frame", "MISSING_FIELD", _unfinished, noop=True),
    Row(33, "future epoch in a push", "UNKNOWN_EPOCH", lambda b: b.push(epoch=2)),
    Row(33, "future epoch in a pull", "UNKNOWN_EPOCH", lambda b: b.pull(partitions=_pull_of(b, epoch=9))),
    Row(35, "another job", "WRONG_CLUSTER", lambda b: b.push(request=b.request(job="other"))),
    Row(35, "another job in a pull", "WRONG_CLUSTER", lambda b: b.pull(request=b.request(job="other"))),
    Row(36, "generation 0", "OLD_GENERATION", lambda b: b.push(request=b.request(generation=0))),
    Row(39, "a gap in the sequence", "SEQ_GAP", lambda b: b.push(sequenced=_seq(seq=2))),
    Row(39, "an unknown client far ahead", "CLIENT_FENCED", lambda b: b.push(sequenced=_seq(seq=9))),
    Row(45, "protocol 0", "VERSION", lambda b: b.push(request=b.request(protocol=0))),
    Row(45, "a newer protocol", "VERSION", lambda b: b.pull(request=b.request(protocol=2))),
    Row(48, "a hyper-parameter torch refuses", "HYPER_PARAMETER",
        lambda b: b.push(sequenced=_seq(hyper_parameters=[
            pb.TableHyperParameters(table_id=1, hyper_parameters=[number("lr", -1.0)])])), noop=True),
    Row(48, "an unknown hyper-parameter", "HYPER_PARAMETER",
        lambda b: b.push(sequenced=_seq(hyper_parameters=[
            pb.TableHyperParameters(table_id=1, hyper_parameters=[number("no_such", 1.0)])])), noop=True),
    Row(50, "a floor 2^40 ahead", "SEQ_TOO_FAR",
        lambda b: b.pull(partitions=_pull_of(b, floor_lsn=1 << 40, floor_epoch=1))),
    Row(53, "an infinite gradient scale", "WEIGHT",
        lambda b: b.push(sequenced=_seq(grad_scale=math.inf)), noop=True),
    Row(5, "assign of a part of an element", "PAYLOAD_SIZE", lambda b: _assign(b, GRADIENT[:46])),
    Row(5, "assign beyond the partition", "PAYLOAD_SIZE", lambda b: _assign(b, GRADIENT * 3)),
    Row(5, "assign to an unknown state", "TENSOR_MISMATCH", lambda b: _assign(b, slot="momentum_of_nothing")),
    Row(26, "assign of damaged bytes", "CRC", lambda b: _assign(b, frame=b.frame(GRADIENT, checksum=1))),
    Row(30, "assign without id", "MISSING_FIELD", lambda b: _assign(b, assign_id=0)),
]  # fmt: skip

CONTROL_ROWS = [
    Row(37, "fence of a lower term", "STALE_TERM",
        lambda b: _control(b, "Fence", replication_pb2.FenceRequest(term=1, client_ids=[12345]))),
    Row(37, "evict of a lower term", "STALE_TERM",
        lambda b: _control(b, "Evict", replication_pb2.EvictRequest(term=1, client_id=12345))),
    Row(30, "fence without a term", "MISSING_FIELD",
        lambda b: _control(b, "Fence", replication_pb2.FenceRequest(client_ids=[12345]))),
    Row(38, "promotion is not served yet", "UNIMPLEMENTED",
        lambda b: _control(b, "BecomePrimary", replication_pb2.BecomePrimaryRequest(term=99))),
    Row(43, "a live server's name", "NODE_NAME", lambda b: b.register_server(name="server-0", address=b.control)),
    Row(30, "incarnation 0", "INCARNATION", lambda b: b.register_server(incarnation=0)),
    Row(44, "an address nobody listens on", "ADDRESS", lambda b: b.register_server(address="127.0.0.1:1")),
    Row(44, "an address that is none", "ADDRESS", lambda b: b.register_server(address="nowhere")),
    Row(45, "a server of another protocol", "VERSION",
        lambda b: b.register_server(request=pb.RequestHeader(job="default", protocol=2))),
    Row(35, "a server of another job", "WRONG_CLUSTER",
        lambda b: b.register_server(request=pb.RequestHeader(job="other", protocol=1))),
    Row(35, "a client of another job", "WRONG_CLUSTER",
        lambda b: _register_client(b, request=pb.RequestHeader(job="other", protocol=1))),
    Row(30, "a client with incarnation 0", "INCARNATION", lambda b: _register_client(b, incarnation=0)),
    Row(42, "a client of an unknown supervisor", "UNKNOWN_NODE",
        lambda b: _register_client(b, host="nobody", host_incarnation=4)),
    Row(46, "the same table with another schema", "SCHEMA", lambda b: b.create_table(name="t")),
    Row(47, "10^18 elements", "QUOTA", lambda b: b.create_table(tensors=_tensors([10**12, 10**6]))),
    Row(47, "more bytes than the job's limit", "QUOTA",
        lambda b: b.create_table(tensors=_tensors([1 << 39], [1 << 39]))),
    Row(8, "a negative dimension", "SHAPE", lambda b: b.create_table(tensors=_tensors([3, -4]))),
    Row(8, "dimensions that overflow", "SHAPE", lambda b: b.create_table(tensors=_tensors([2**62, 8]))),
    Row(8, "dimensions that overflow to 0", "SHAPE", lambda b: b.create_table(tensors=_tensors([2**32, 2**32]))),
    Row(4, "dtype 0", "DTYPE", lambda b: b.create_table(tensors=_tensors([4], dtype=pb.DTYPE_UNSPECIFIED))),
    Row(4, "unknown dtype", "DTYPE", lambda b: b.create_table(tensors=_tensors([4], dtype=77))),
    Row(48, "an unknown optimizer", "UNSUPPORTED_OPTIMIZER",
        lambda b: b.create_table(optimizer=_optimizer("Adafactor"))),
    Row(49, "an optimizer by path", "UNSUPPORTED_OPTIMIZER",
        lambda b: b.create_table(optimizer=_optimizer("os.system"))),
    *[Row(31, f"table name {i}", "NAME", lambda b, name=name: b.create_table(name=name))
      for i, name in enumerate(NAMES)],
    Row(31, "tensor name with a newline", "NAME",
        lambda b: b.create_table(tensors=[pb.TensorSpec(name="a\nb", shape=[1], dtype=pb.DTYPE_FLOAT32)])),
    Row(31, "two tensors of one name", "NAME",
        lambda b: b.create_table(tensors=[pb.TensorSpec(name="a", shape=[1], dtype=pb.DTYPE_FLOAT32)] * 2)),
]  # fmt: skip


def _member(b: Bench) -> Bench:
    """Make the row's client a member, with the group of its own."""
    b.ledger("Join", lg.JoinRequest(slot=f"bad/{b.client.client_id}"))
    return b


def _group(b: Bench) -> int:
    spec = lg.GroupSpec(
        name=f"bad-{b.client.client_id}", mode=lg.MODE_SYNC, loss_reduction=pb.LOSS_REDUCTION_MEAN,
        structure_digest=b"x" * 32, tensor_names=["w"], partitions=[b.partition],
    )  # fmt: skip
    return int(_member(b).ledger("OpenGroup", lg.OpenGroupRequest(spec=spec)).group)


def _ready(b: Bench, **changes: Any) -> Any:
    fields = {"group": _group(b), "step": 0, "attempt": 1, "weight": 1.0}
    return b.ledger("Ready", lg.ReadyRequest(**{**fields, **changes}))


def _lease(b: Bench, **changes: Any) -> Any:
    fields: dict[str, Any] = {"dataset": f"d{b.client.client_id}", "length": 10, "chunk": 2, "want": 1}
    return _member(b).ledger("Lease", lg.LeaseRequest(**{**fields, **changes}))


LEDGER_ROWS = [
    Row(51, "ready of step 2", "STEP_OUT_OF_RANGE", lambda b: _ready(b, step=2)),
    Row(51, "ready of an unknown group", "UNKNOWN_GROUP", lambda b: _ready(b, group=999)),
    Row(51, "ready of one who never joined", "NOT_MEMBER",
        lambda b: b.ledger("Ready", lg.ReadyRequest(group=1, weight=1.0, attempt=1))),
    Row(53, "weight NaN", "WEIGHT", lambda b: _ready(b, weight=math.nan)),
    Row(53, "weight infinite", "WEIGHT", lambda b: _ready(b, weight=math.inf)),
    Row(53, "weight negative", "WEIGHT", lambda b: _ready(b, weight=-1.0)),
    Row(53, "weight 0", "WEIGHT", lambda b: _ready(b, weight=0.0)),
    Row(53, "weight 10^30", "WEIGHT", lambda b: _ready(b, weight=1e30)),
    Row(56, "samples of somebody else", "LEASE",
        lambda b: _ready(b, samples=[pb.SampleRange(dataset="", epoch=0, begin=0, end=4)])),
    Row(56, "samples backwards", "LEASE",
        lambda b: _ready(b, samples=[pb.SampleRange(dataset="", epoch=0, begin=4, end=0)])),
    Row(56, "lease of chunks of 0 samples", "MISSING_FIELD", lambda b: _lease(b, chunk=0)),
    Row(30, "activity 0", "MISSING_FIELD", lambda b: _member(b).ledger("SetActivity", lg.SetActivityRequest())),
    Row(31, "state under a bad key", "NAME",
        lambda b: _member(b).ledger("PutState", lg.PutStateRequest(key="a b", version=1, value=b"x"))),
    Row(18, "state of 5 MiB", "STATE_TOO_LARGE",
        lambda b: _member(b).ledger("PutState", lg.PutStateRequest(key="k", version=1, value=bytes(5 << 20)))),
]  # fmt: skip
