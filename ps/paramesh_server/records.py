"""What a record of a dense partition carries, written and read. Pure.

    body, payload = push_body(update, contribution)      # at the primary
    update, contribution = read_push(layout, record)     # at a follower: the same again

Applying a record must give the same bits everywhere, so it carries what was computed with,
not what was received: a step travels as the sum that the primary made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from paramesh import hyper
from paramesh.errors import refuse
from paramesh.framing import Buffer
from paramesh.routing import PartitionLayout
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from paramesh_server.dedup import Digest, Entry
from paramesh_server.log import Record
from paramesh_server.requests import Update
from paramesh_server.staging import Contribution, FrameBytes, unpack_presence
from paramesh_server.writes import SlotFrame

LOST = "LOST"
"""Reason of a NOOP that stands for acknowledged updates which went with a primary: up to its seq."""

Made = tuple[rp.LogRecord, Sequence[Buffer]]
"""A record's body and its payload."""


def pack_presence(present: Sequence[bool]) -> bytes:
    """One bit per segment, LSB first."""
    bits = sum(1 << i for i, there in enumerate(present) if there)
    return bits.to_bytes((len(present) + 7) // 8, "little")


def joined(record: Record) -> memoryview:
    """A record's payload in one piece; copies only if it came in several."""
    if len(record.payload) == 1:
        return memoryview(record.payload[0])
    return memoryview(b"".join(record.payload))


def push_body(update: Update, contribution: Contribution) -> Made:
    """A sequenced update that was applied; the payload is the frames as they were received."""
    body = rp.PushBody(
        presence=pack_presence(contribution.present),
        frames=[rp.FramePart(offset=f.offset, length=f.length, checksum=f.checksum) for f in contribution.frames],
        changed=hyper.to_protos(update.changed),
        skip=update.skip,
        scale=update.scale,
        digest=contribution.digest,
    )
    return rp.LogRecord(push=body), [f.payload for f in contribution.frames]


def read_push(layout: PartitionLayout, record: Record) -> tuple[Update, Contribution]:
    """The update and the gradient of a PUSH."""
    body, data, at, frames = record.body.push, joined(record), 0, []
    for part in body.frames:
        frames.append(FrameBytes(part.offset, part.length, data[at : at + part.length], part.checksum))
        at += part.length
    _check_length(record, at)
    present = () if body.skip else unpack_presence(layout, body.presence)
    update = Update(record.header.seq, hyper.from_protos(body.changed), body.skip, body.scale)
    return update, Contribution(present, tuple(frames), body.digest, at)


def noop_body(digest: Digest, reason: str, message: str) -> Made:
    """A refused update whose number is used up."""
    return rp.LogRecord(noop=rp.NoopBody(reason=reason, message=message, digest=digest)), ()


def read_noop(record: Record) -> Entry:
    """What a duplicate of a refused update is answered with."""
    body = record.body.noop
    return Entry(body.digest, record.header.lsn, (body.reason, body.message))


def step_body(
    decided: pb.StepRecord, present: Sequence[bool] | None, total: torch.Tensor | None, without: Collection[int] = ()
) -> Made:
    """A step as it was summed; `present` and `total` (bytes) are None if nothing was."""
    summed = [c.client_id for c in decided.contributors if c.client_id not in without] if without else []
    body = rp.StepBody(record=decided, present=b"" if present is None else pack_presence(present), summed=summed)
    return rp.LogRecord(decided=body), [] if total is None else [total.numpy().data]


def read_step(layout: PartitionLayout, record: Record) -> tuple[pb.StepRecord, list[bool], torch.Tensor | None]:
    """A step's decision, who is present, and the sum as flat bytes (None: a skip)."""
    body = record.body.decided
    if not record.nbytes:
        return body.record, [], None
    _check_length(record, layout.nbytes)
    present = list(unpack_presence(layout, body.present))
    return body.record, present, torch.frombuffer(joined(record), dtype=torch.uint8)


def assign_body(writes: Sequence[SlotFrame], init_attempt: int) -> Made:
    """A write from outside."""
    parts = [
        rp.SlotPart(slot=w.slot, segment=w.segment, scalar=w.scalar, offset=w.frame.offset, length=w.frame.length)
        for w in writes
    ]
    body = rp.AssignBody(parts=parts, init_attempt=init_attempt)
    return rp.LogRecord(assign=body), [w.frame.payload for w in writes]


def read_assign(record: Record) -> tuple[list[SlotFrame], int]:
    """The writes of an ASSIGN and its attempt of first values."""
    body, data, at, writes = record.body.assign, joined(record), 0, []
    for part in body.parts:
        size = 8 if part.scalar else part.length
        frame = FrameBytes(part.offset, part.length, data[at : at + size], 0)
        writes.append(SlotFrame(frame, part.slot, part.segment, part.scalar))
        at += size
    _check_length(record, at)
    return writes, body.init_attempt


def _check_length(record: Record, expected: int) -> None:
    if record.nbytes != expected:
        raise refuse("PAYLOAD_SIZE", f"record {record.header.lsn} has {record.nbytes} bytes, its body says {expected}")
