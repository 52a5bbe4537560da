"""What travels: a partition's encoded contribution, slot writes, snapshots.

`Encoded` is made from buffers that lie over the gradients (no copy), and turned into wire
messages once, when it is first sent or frozen. The messages are kept until every partition
has applied the step; what is sent again are these bytes, with a new header if the epoch
or the attempt changed, never an encoding anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from paramesh.framing import DEFAULT_CHECKSUM, FRAME_BYTES, Buffer, checksum, encode
from paramesh.routing import ALIGN_BYTES
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

_PAD = bytes(ALIGN_BYTES)


def _bytes_of(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


@dataclass
class _Frame:
    """One frame's bytes: pieces until first sent, then one view into the kept message."""

    offset: int
    length: int
    checksum: int
    parts: list[memoryview]


@dataclass
class Encoded:
    """One partition's part of a contribution or update.

    Attributes:
        partition: the partition's id.
        presence: bit i (LSB first) says that segment i has a gradient; empty: all have.
        nbytes: payload bytes in all.
    """

    partition: int
    presence: bytes
    nbytes: int
    _frames: list[_Frame]
    _key: bytes = b""
    _messages: list[bytes] = field(default_factory=list)

    @classmethod
    def from_parts(
        cls,
        partition: int,
        presence: bytes,
        parts: Sequence[tuple[int, Buffer]],
        frame_bytes: int = FRAME_BYTES,
    ) -> Encoded:
        """Cut buffers into frames and sum their checksums; copies nothing.

        Args:
            partition: the partition's id.
            presence: the segments' bits, or empty when all are present.
            parts: (byte offset in the flat layout, C-contiguous buffer), ascending; each
                starts at a multiple of 64. Neighbours less than 64 bytes apart share frames.
            frame_bytes: payload of a frame; a multiple of 64.

        The buffers must not change until the first send, or `freeze`.
        """
        frames: list[_Frame] = []
        for start, views in _runs(parts):
            frames.extend(_cut(start, views, frame_bytes))
        return cls(partition, presence, sum(f.length for f in frames), frames)

    def frames(self) -> Iterator[tuple[int, int, list[memoryview]]]:
        """(offset, length, buffers) of each frame, for comparing with a gradient."""
        for frame in self._frames:
            yield frame.offset, frame.length, frame.parts

    def messages(self, header: ps.PushHeader) -> list[bytes]:
        """The wire messages under a header without frame and presence.

        Made once; made again from the kept bytes when the header (epoch, attempt, seq)
        differs from the last time.
        """
        key = header.SerializeToString(deterministic=True)
        if self._messages and key == self._key:
            return self._messages
        self._messages = [self._message(header, i) for i in range(max(1, len(self._frames)))]
        self._key = key
        return self._messages

    def _message(self, header: ps.PushHeader, index: int) -> bytes:
        head = ps.PushHeader()
        head.CopyFrom(header)
        head.partition = self.partition
        if index == 0:
            head.presence = self.presence
        if not self._frames:  # nothing present: one empty frame says so
            head.frame.CopyFrom(_frame_header(0, 0, checksum(()), True))
            return encode(head)
        frame = self._frames[index]
        last = index == len(self._frames) - 1
        head.frame.CopyFrom(_frame_header(frame.offset, frame.length, frame.checksum, last))
        message = encode(head, frame.parts)
        # The payload ends the message: from now on the message is what is kept.
        frame.parts = [memoryview(message)[len(message) - frame.length :]]
        return message


def _frame_header(offset: int, length: int, value: int, last: bool) -> pb.Frame:
    return pb.Frame(
        offset=offset,
        length=length,
        codec=pb.CODEC_NONE,
        checksum_kind=DEFAULT_CHECKSUM,
        checksum=value,
        last=last,
    )


def _runs(parts: Sequence[tuple[int, Buffer]]) -> Iterator[tuple[int, list[memoryview]]]:
    """Join neighbours, with the padding between them, into runs without holes."""
    start, end, views = 0, 0, list[memoryview]()
    for offset, buffer in parts:
        view = _bytes_of(buffer)
        if views and offset - end < ALIGN_BYTES:
            if offset > end:
                views.append(memoryview(_PAD)[: offset - end])
        else:
            if views:
                yield start, views
            start, views = offset, []
        views.append(view)
        end = offset + view.nbytes
    if views:
        yield start, views


def _cut(start: int, views: list[memoryview], frame_bytes: int) -> Iterator[_Frame]:
    """Cut a run into frames of at most `frame_bytes`."""
    held: list[memoryview] = []
    size = 0
    for whole in views:
        view = whole
        while view.nbytes:
            piece = view[: frame_bytes - size]
            held.append(piece)
            size += piece.nbytes
            view = view[piece.nbytes :]
            if size == frame_bytes:
                yield _Frame(start, size, checksum(held), held)
                start, held, size = start + size, [], 0
    if held:
        yield _Frame(start, size, checksum(held), held)


@dataclass(frozen=True)
class SlotWrite:
    """A piece of values or optimizer state to be written to a partition.

    Attributes:
        data: C-contiguous buffer; for a scalar, 8 bytes of little-endian float64.
        offset: first byte in the partition's flat layout; a multiple of 64.
        slot: "" for values, else the state's name in torch, such as "exp_avg".
        segment: the segment a scalar belongs to.
        scalar: the state has one element per tensor.
    """

    data: Buffer
    offset: int = 0
    slot: str = ""
    segment: int = 0
    scalar: bool = False

    def messages(self, header: ps.AssignHeader) -> Iterator[tuple[ps.AssignHeader, list[memoryview]]]:
        """(header, payload parts) of each frame; the caller marks the last one."""
        view = _bytes_of(self.data)
        pieces = [(0, view)] if self.scalar else list(_pieces(view))
        for at, piece in pieces:
            head = ps.AssignHeader()
            head.CopyFrom(header)
            head.slot, head.segment, head.scalar = self.slot, self.segment, self.scalar
            head.frame.CopyFrom(_frame_header(self.offset + at, piece.nbytes, checksum((piece,)), False))
            yield head, [piece]


def _pieces(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    for at in range(0, view.nbytes, FRAME_BYTES):
        yield at, view[at : at + FRAME_BYTES]


@dataclass
class Snapshot:
    """One partition's atomic cut.

    Attributes:
        lsn: the log position of the cut.
        applied_step: how many steps it reflects.
        elements: slot -> (byte offset in the flat layout, bytes), in order; slot "" is
            the values.
        scalars: (slot, segment) -> number.
    """

    partition: int
    lsn: int = 0
    applied_step: int = 0
    elements: dict[str, list[tuple[int, memoryview]]] = field(default_factory=dict)
    scalars: dict[tuple[str, int], float] = field(default_factory=dict)
