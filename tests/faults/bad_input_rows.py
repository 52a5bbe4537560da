"""The bad-input matrix (design 4, section 2): the data plane, as far as dense tables go.

A row is one wrong request: what is sent, the reason that must come back, and what it may
leave behind. Numbers are those of the matrix. Staged pushes, decisions and reads are in
`bad_input_step_rows`, registration and schemas in `bad_input_control_rows`, the ledger in
`bad_input_ledger_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from paramesh import framing
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import parameter_server_pb2 as ps
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


def changed_gradient() -> bytes:
    """Other bytes than `GRADIENT`, of the same length."""
    return torch.full((21,), 2.0).numpy().tobytes()


def with_one(value: float) -> bytes:
    """`GRADIENT` with one number replaced, in `w`."""
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
    return b.push(changed_gradient(), sequenced=_seq(seq=1))


def _unfinished(b: Bench) -> Any:
    frame = b.frame(GRADIENT, last=False)
    return b.push_messages([framing.encode(b.header(frame=frame), [GRADIENT])])


def _flood(b: Bench) -> Any:
    """Many times the partition's bytes before the last frame."""
    more = framing.encode(b.header(frame=b.frame(GRADIENT, last=False)), [GRADIENT])
    return b.push_messages([*[more] * 5000, framing.encode(b.header(), [GRADIENT])])


def _describe(b: Bench, table: int) -> Any:
    return b.coordinator("Catalog", "DescribeTable", co.DescribeTableRequest(request=b.client.header(), table_id=table))


def pull_of(b: Bench, **changes: Any) -> list[ps.PartitionPull]:
    """What to pull: the partition, with changes."""
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


NAMES = [
    "", "a b", "a\nb", "a\x00b", "x" * 257, "x" * 1_000_000, "../etc", "a/../b", "caf\u00e9", "cafe\u0301",
    "\U0001f600",
]  # fmt: skip
"""Row 31: none of them is a name."""

DATA_ROWS = [
    Row(1, "unknown table", "UNKNOWN_TABLE", lambda b: _describe(b, 77)),
    Row(2, "push to an unknown partition", "WRONG_PARTITION", lambda b: b.push(partition=4_000_000)),
    Row(2, "pull of an unknown partition", "WRONG_PARTITION",
        lambda b: b.pull(partitions=pull_of(b, partition=4_000_000))),
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
    *[Row(10, f"a gradient with {value}", "NON_FINITE", lambda b, value=value: b.push(with_one(value)), noop=True)
      for value in (math.nan, math.inf, -math.inf)],
    Row(11, "finite and beyond fp32 under its scale", "NON_FINITE",
        lambda b: b.push(with_one(3e38), sequenced=_seq(grad_scale=2.0)), noop=True),
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
    Row(33, "future epoch in a pull", "UNKNOWN_EPOCH", lambda b: b.pull(partitions=pull_of(b, epoch=9))),
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
    Row(53, "an infinite gradient scale", "WEIGHT",
        lambda b: b.push(sequenced=_seq(grad_scale=math.inf)), noop=True),
    Row(5, "assign of a part of an element", "PAYLOAD_SIZE", lambda b: _assign(b, GRADIENT[:46])),
    Row(5, "assign beyond the partition", "PAYLOAD_SIZE", lambda b: _assign(b, GRADIENT * 3)),
    Row(5, "assign to an unknown state", "TENSOR_MISMATCH", lambda b: _assign(b, slot="momentum_of_nothing")),
    Row(26, "assign of damaged bytes", "CRC", lambda b: _assign(b, frame=b.frame(GRADIENT, checksum=1))),
    Row(30, "assign without id", "MISSING_FIELD", lambda b: _assign(b, assign_id=0)),
]  # fmt: skip
