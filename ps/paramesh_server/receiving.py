"""Frames of one stream, gathered by partition until each partition's last one.

Nothing is kept of a partition whose frames do not fit it: a client cannot make a server
hold more than the partition's own bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from paramesh.bounds import RETRY_MS
from paramesh.errors import ParameshError, refuse
from paramesh.framing import Framed, verify
from paramesh.routing import PartitionLayout
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

from paramesh_server.counters import Counters
from paramesh_server.dedup import fold
from paramesh_server.staging import Contribution, FrameBytes, assemble
from paramesh_server.writes import SlotFrame

H = TypeVar("H", ps.PushHeader, ps.AssignHeader)

MAX_FRAMES = 64
"""Frames of a partition beyond one per 8 bytes: room for an empty and a few scalar ones."""


ASSIGN_COPIES = 8
"""Times the partition's bytes that one assign may bring: values and the three or four
states of an optimizer, with room."""


class InFlight:
    """Bytes that a server holds of unfinished streams.

    Args:
        counters: where the figure is shown.
        limit: refuse above it.
    """

    def __init__(self, counters: Counters, limit: int) -> None:
        self._counters = counters
        self._limit = limit

    def full(self, nbytes: int) -> bool:
        """Whether so many more would pass the limit."""
        return self._counters.in_flight + nbytes > self._limit

    def take(self, nbytes: int) -> None:
        """Account for received bytes.

        Raises:
            Retryable: OVERLOADED; metadata `retry_after_ms` says how long to wait.
        """
        if self.full(nbytes):
            raise refuse(
                "OVERLOADED",
                f"{self._counters.in_flight} bytes of unfinished requests are held, the limit is {self._limit} "
                "(--in-flight-bytes)",
                retry_after_ms=RETRY_MS,
            )
        self._counters.in_flight += nbytes
        self._counters.bytes_in += nbytes

    def give(self, nbytes: int) -> None:
        """Account for bytes that were staged, applied or dropped."""
        self._counters.in_flight -= nbytes


@dataclass
class Incoming(Generic[H]):
    """The frames of one partition in one stream, as they come."""

    first: H
    """Header of the first frame: the one that says what it is."""
    frames: list[Framed[H]] = field(default_factory=list)
    nbytes: int = 0
    """Payload bytes held."""
    error: ParameshError | None = None
    """Why no more frames are kept."""


class Gathering(Generic[H]):
    """The open partitions of one stream.

    Args:
        in_flight: where held bytes are accounted for.
        bound: the most bytes that a partition's frames may bring; None: not known here.
    """

    def __init__(self, in_flight: InFlight, bound: Callable[[int], int | None]) -> None:
        self._in_flight = in_flight
        self._bound = bound
        self._open: dict[int, Incoming[H]] = {}
        self._closed: set[int] = set()

    def take(self, framed: Framed[H]) -> Incoming[H] | None:
        """Keep a frame; the partition's frames, if this was the last of them.

        Raises:
            ParameshError: OVERLOADED; PAYLOAD_SIZE, if the partition's last frame came before.
        """
        header, payload = framed
        if header.partition in self._closed:
            raise refuse("PAYLOAD_SIZE", f"frames of partition {header.partition} follow its last one")
        self._in_flight.take(payload.nbytes)
        incoming = self._open.setdefault(header.partition, Incoming(header))
        incoming.frames.append(framed)
        incoming.nbytes += payload.nbytes
        bound = self._bound(header.partition)
        if incoming.error is not None or (
            bound is not None and (incoming.nbytes > bound or len(incoming.frames) > MAX_FRAMES + bound // 8)
        ):
            self._refuse(incoming, bound)
        if not header.frame.last:
            return None
        self._closed.add(header.partition)
        return self._open.pop(header.partition)

    def _refuse(self, incoming: Incoming[H], bound: int | None) -> None:
        self._in_flight.give(incoming.nbytes)
        incoming.nbytes = 0
        incoming.frames.clear()
        incoming.error = incoming.error or refuse("PAYLOAD_SIZE", f"more than {bound} bytes came for the partition")

    def unfinished(self) -> list[Incoming[H]]:
        """The partitions whose last frame has not come; they are the caller's from now on."""
        rest = list(self._open.values())
        self._open.clear()
        return rest

    def drop(self) -> None:
        """Let go of what is not finished: the stream broke."""
        for incoming in self._open.values():
            self._in_flight.give(incoming.nbytes)
        self._open.clear()


def _checked(frame: pb.Frame, payload: memoryview) -> FrameBytes:
    if frame.codec != pb.CODEC_NONE:
        raise refuse("CODEC", f"codec {frame.codec} is not known here; send CODEC_NONE", codec=frame.codec)
    verify(frame, payload)
    return FrameBytes(frame.offset, frame.length, payload, frame.checksum)


def contribution_of(layout: PartitionLayout, incoming: Incoming[ps.PushHeader]) -> Contribution:
    """Verify a push's frames and put them together; copies nothing.

    Raises:
        ParameshError: CRC, CODEC, PAYLOAD_SIZE, TENSOR_MISMATCH.
    """
    frames = [_checked(header.frame, payload) for header, payload in incoming.frames]
    sequenced = incoming.first.sequenced
    salt = (sequenced.skip, sequenced.grad_scale) if incoming.first.HasField("sequenced") else ()
    if salt and sequenced.skip:
        # Nothing of it counts, so nothing of it need fit.
        return Contribution((), (), fold("skip", *(frame.checksum for frame in frames)))
    return assemble(layout, incoming.first.presence, frames, salt)


def writes_of(incoming: Incoming[ps.AssignHeader]) -> Sequence[SlotFrame]:
    """Verify an assign's frames.

    Raises:
        ParameshError: CRC, CODEC.
    """
    return [
        SlotFrame(_checked(header.frame, payload), header.slot, header.segment, header.scalar)
        for header, payload in incoming.frames
    ]
