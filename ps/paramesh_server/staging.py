"""Contributions that wait for their step's decision. Pure.

    contribution = assemble(layout, presence, frames)      # refuses what does not fit exactly
    staging.put(group, step, client, attempt, contribution)
    staging.get(group, step, client, attempt)              # None: NOT_STAGED
    staging.drop_through(group, step)                      # the step is applied

Frames are kept as they came: views of the received messages, no copy. Which contributions
count is the ledger's decision; nothing here knows who is a member.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from paramesh.errors import refuse
from paramesh.routing import ALIGN_BYTES, PartitionLayout

from paramesh_server.dedup import Digest, fold

StagedKey = tuple[int, int, int, int]
"""(group, step, client, attempt)."""


@dataclass(frozen=True, slots=True)
class FrameBytes:
    """The bytes of one received frame, where they were received."""

    offset: int
    """First byte in the partition's flat layout."""
    length: int
    """Bytes of the flat layout that the payload stands for."""
    payload: memoryview
    checksum: int


@dataclass(frozen=True, slots=True)
class Contribution:
    """One worker's gradient for one partition, exactly covering its present segments."""

    present: tuple[bool, ...]
    """Per segment: has a gradient."""
    frames: tuple[FrameBytes, ...]
    """In order of offset, disjoint."""
    digest: Digest
    nbytes: int = field(default=0)
    """Bytes that it holds in memory."""


def unpack_presence(layout: PartitionLayout, presence: bytes) -> tuple[bool, ...]:
    """Presence bits (LSB first) as one bool per segment; empty means all present.

    Raises:
        TensorMismatch: TENSOR_MISMATCH, if the bits are not those of this partition.
    """
    count = len(layout.segments)
    if not presence:
        return (True,) * count
    if len(presence) != (count + 7) // 8 or int.from_bytes(presence, "little") >> count:
        raise refuse(
            "TENSOR_MISMATCH",
            f"presence has {len(presence)} bytes; the partition has {count} segments",
            segments=count,
        )
    bits = int.from_bytes(presence, "little")
    return tuple(bool(bits >> i & 1) for i in range(count))


def check_frame(layout: PartitionLayout, frame: FrameBytes) -> None:
    """Refuse a frame that lies outside the partition or lies about its size.

    Raises:
        TensorMismatch: PAYLOAD_SIZE.
    """
    if frame.offset % ALIGN_BYTES or frame.offset + frame.length > layout.nbytes:
        raise refuse(
            "PAYLOAD_SIZE",
            f"frame [{frame.offset}, +{frame.length}) does not lie in a partition of {layout.nbytes} bytes "
            f"at a multiple of {ALIGN_BYTES}",
            partition_bytes=layout.nbytes,
        )
    if len(frame.payload) != frame.length:
        raise refuse(
            "PAYLOAD_SIZE",
            f"frame at {frame.offset} declares {frame.length} bytes and brings {len(frame.payload)}",
        )


def assemble(
    layout: PartitionLayout, presence: bytes, frames: Sequence[FrameBytes], salt: tuple[object, ...] = ()
) -> Contribution:
    """Make a contribution of frames that cover every present segment, and no absent one.

    Padding between segments may be covered or not. Frames may come in any order.

    Args:
        layout: the partition's.
        presence: bits as received.
        frames: as received; checksums are verified by the caller.
        salt: further parts of the digest (the options of a sequenced push).

    Raises:
        TensorMismatch: TENSOR_MISMATCH, PAYLOAD_SIZE.
    """
    present = unpack_presence(layout, presence)
    ordered = tuple(sorted((f for f in frames if f.length), key=lambda f: f.offset))
    end = 0
    for frame in ordered:
        check_frame(layout, frame)
        if frame.offset < end:
            raise refuse("PAYLOAD_SIZE", f"two frames cover byte {frame.offset}", offset=frame.offset)
        end = frame.offset + frame.length
    _check_cover(layout, present, ordered)
    digest = fold(presence, salt, *((f.offset, f.checksum) for f in ordered))
    return Contribution(present, ordered, digest, sum(f.length for f in ordered))


def _check_cover(layout: PartitionLayout, present: Sequence[bool], frames: Sequence[FrameBytes]) -> None:
    """One walk along both lists: both are sorted and disjoint."""
    at = 0
    for index, segment in enumerate(layout.segments):
        begin, end = segment.offset, segment.offset + segment.nbytes
        while at < len(frames) and frames[at].offset + frames[at].length <= begin:
            at += 1
        covered, probe = begin, at
        while probe < len(frames) and frames[probe].offset < end:
            if not present[index]:
                raise refuse("PAYLOAD_SIZE", f"segment {index} is absent and has bytes", segment=index)
            if frames[probe].offset > covered:
                break
            covered = frames[probe].offset + frames[probe].length
            probe += 1
        if present[index] and covered < end:
            raise refuse(
                "PAYLOAD_SIZE", f"segment {index} lacks bytes [{covered}, {end})", segment=index, missing=end - covered
            )


class Budget:
    """Bytes that all partitions of a server may hold in staged contributions."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, nbytes: int) -> None:
        """Account for bytes that are now held.

        Raises:
            StateRefused: QUOTA.
        """
        if self.used + nbytes > self.limit:
            raise refuse(
                "QUOTA",
                f"staging {nbytes} bytes would pass the server's limit of {self.limit} "
                f"({self.used} held); add servers or raise --staged-bytes",
                limit=self.limit,
                used=self.used,
            )
        self.used += nbytes

    def give(self, nbytes: int) -> None:
        """Account for bytes that are no longer held."""
        self.used -= nbytes


class Staging:
    """What one partition holds for steps that are not decided or not applied yet."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held: dict[StagedKey, Contribution] = {}
        """(group, step, client, attempt) -> what came. All attempts stay until the step is applied: only
        the decision says which counts, and it may name one that the worker has tried to replace."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(contribution.nbytes for contribution in self._held.values())

    def put(self, group: int, step: int, client: int, attempt: int, contribution: Contribution) -> bool:
        """Hold a contribution; false if this attempt was held before.

        Raises:
            ParameshError: SEQ_REUSED, if the same attempt came with other bytes; QUOTA;
                MISSING_FIELD, if the attempt is 0.
        """
        if attempt < 1:
            raise refuse("MISSING_FIELD", "attempt counts from 1", field="attempt")
        key = (group, step, client, attempt)
        before = self._held.get(key)
        if before is not None:
            if before.digest != contribution.digest:
                raise refuse(
                    "SEQ_REUSED", f"attempt {attempt} of client {client} for step {step} came with other bytes"
                )
            return False
        self._budget.take(contribution.nbytes)
        self._held[key] = contribution
        return True

    def get(self, group: int, step: int, client: int, attempt: int) -> Contribution | None:
        """The contribution of exactly this attempt, if held."""
        return self._held.get((group, step, client, attempt))

    def all(self) -> list[tuple[StagedKey, Contribution]]:
        """Everything that is held, in the order in which it came."""
        return list(self._held.items())

    def drop_through(self, group: int, step: int) -> None:
        """Let go of everything up to and including a step: it is applied."""
        for key in [k for k in self._held if k[0] == group and k[1] <= step]:
            self._budget.give(self._held.pop(key).nbytes)

    def clear(self) -> None:
        """Let go of everything: the partition goes away, or the generation rose."""
        for contribution in self._held.values():
            self._budget.give(contribution.nbytes)
        self._held.clear()

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        return iter(self._held)
