"""Values and cuts as encoded messages, made once and sent to whoever asks.

    encoded = encode_values(partition, CHECKSUM_KIND_CRC32C)     # under the partition's lock
    for message in encoded.messages: ...                          # later, without it

The messages are immutable copies, so a pull streams one consistent state while the
partition goes on; W workers that pull the same step share one encoding. Copies on the way
out: into the message here, and into gRPC's own buffer when it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paramesh.framing import FRAME_BYTES, checksum, encode
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

from paramesh_server.log import Position
from paramesh_server.partition import Partition
from paramesh_server.writes import SlotBytes


@dataclass(frozen=True)
class EncodedValues:
    """A partition's values at one point of its log."""

    at: Position
    """The last record that they reflect; its number alone could be an older primary's."""
    applied_step: int
    messages: tuple[bytes, ...]


def _frame(data: memoryview, offset: int, kind: int, last: bool) -> pb.Frame:
    return pb.Frame(
        offset=offset,
        length=data.nbytes,
        codec=pb.CODEC_NONE,
        checksum_kind=kind,  # type: ignore[arg-type]
        checksum=checksum((data,), kind),
        last=last,
    )


def _pieces(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    for at in range(0, data.nbytes, FRAME_BYTES):
        yield at, data[at : at + FRAME_BYTES]


def encode_values(partition: Partition, kind: int) -> EncodedValues:
    """Encode the whole flat layout, padding included, as `PullResponse` messages."""
    at, step = partition.log.last, partition.applied_step
    messages = []
    for begin, piece in _pieces(partition.values):
        header = ps.PullHeader(
            partition=partition.id,
            epoch=partition.epoch,
            lsn=at.lsn,
            applied_step=step,
            frame=_frame(piece, begin, kind, begin + piece.nbytes == partition.layout.nbytes),
        )
        messages.append(encode(header, (piece,)))
    return EncodedValues(at, step, tuple(messages))


def encode_cut(partition: Partition, kind: int) -> list[bytes]:
    """Encode values and optimizer state as `SnapshotResponse` messages, the last one done."""
    messages = []
    for slot in partition.cut():
        pieces = [(0, slot.data)] if slot.scalar else _pieces(slot.data)
        for at, piece in pieces:
            header = _snapshot_header(partition, slot)
            header.frame.CopyFrom(_frame(piece, slot.offset + at, kind, False))
            messages.append(encode(header, (piece,)))
    end = ps.SnapshotHeader(
        partition=partition.id,
        epoch=partition.epoch,
        lsn=partition.log.lsn,
        applied_step=partition.applied_step,
        partition_done=True,
    )
    messages.append(encode(end))
    return messages


def _snapshot_header(partition: Partition, slot: SlotBytes) -> ps.SnapshotHeader:
    return ps.SnapshotHeader(
        partition=partition.id,
        epoch=partition.epoch,
        lsn=partition.log.lsn,
        applied_step=partition.applied_step,
        slot=slot.slot,
        segment=slot.segment,
        scalar=slot.scalar,
    )
