"""The sum of a step's contributions, the same bits on every machine. Pure.

    gradient = Gradient(layout)
    parts = [Part(contribution, weight), ...]              # in rank order
    sum_parts(layout, parts, Reduction(total, clip), gradient)

Defined by the protocol, section 10: the first present contributor's `g*w`, then `+ g*w` of
each further one in rank order, each product and each sum rounded by itself (no fma, which
`add(alpha=)` would use), then `/ sum(w)` of *all* contributors, then `* clip`. fp64 sums in
fp64, everything else in fp32 and is rounded to its dtype once, at the end.

It reads straight out of the received frames and goes block by block, so that accumulator
and scratch stay in the cache: one pass over the frames, one write of the result.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from paramesh.routing import DTYPE_SIZE, PartitionLayout, Segment
from paramesh.v1 import types_pb2 as pb

from paramesh_server.staging import Contribution

TORCH_DTYPE: dict[int, torch.dtype] = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_FLOAT64: torch.float64,
    pb.DTYPE_FLOAT16: torch.float16,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
}
"""Storage dtype of the wire -> torch's."""

BLOCK = 32768
"""Elements summed at a time: 128 KiB of fp32, so that accumulator, scratch and one
contribution's block fit a 512 KiB level 2 cache. Torch's own grain for going parallel is
the same number, so a block is never split over threads either."""

with warnings.catch_warnings():
    # torch warns, once per process, that a tensor over read-only bytes could be written.
    # Received frames are only ever read.
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(8), dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Part:
    """One contributor's share of a sum; None multiplies by nothing (a sum reduction)."""

    contribution: Contribution
    weight: float | None


@dataclass(frozen=True, slots=True)
class Reduction:
    """What happens to the sum."""

    total_weight: float | None = None
    """Divide by it; None: a sum reduction."""
    clip: float | None = None
    """Multiply by it, last."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of one segment's elements inside one frame."""

    begin: int
    end: int
    data: torch.Tensor


def flat_views(layout: PartitionLayout, flat: torch.Tensor) -> list[torch.Tensor]:
    """One view per segment of a partition's flat bytes, in the segment's dtype."""
    return [flat[s.offset : s.offset + s.nbytes].view(TORCH_DTYPE[s.dtype]) for s in layout.segments]


class Gradient:
    """Memory for one partition's summed gradient, one view per segment.

    Args:
        layout: the partition's.
        flat: bytes to use, at least as many as the layout's; None: fresh ones.
    """

    def __init__(self, layout: PartitionLayout, flat: torch.Tensor | None = None) -> None:
        self.flat = torch.empty(layout.nbytes, dtype=torch.uint8) if flat is None else flat
        self.views = flat_views(layout, self.flat)


class Workspace:
    """Gradient memory that all partitions of a process share and use again.

    There are as many buffers as sums were ever computed at the same time. Fresh memory would
    cost more in page faults than the sum itself; one buffer per partition would double what
    a server holds.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    @contextlib.contextmanager
    def borrow(self, layout: PartitionLayout) -> Iterator[Gradient]:
        """A gradient of a layout, with whatever it last held, until the block ends."""
        try:
            flat = self._free.pop()  # pop and append are atomic: sums run side by side
        except IndexError:
            flat = torch.empty(0, dtype=torch.uint8)
        if len(flat) < layout.nbytes:
            flat = torch.empty(layout.nbytes, dtype=torch.uint8)
        try:
            yield Gradient(layout, flat)
        finally:
            self._free.append(flat)


def _pieces(contribution: Contribution, segment: Segment, first: int) -> tuple[list[_Piece], int]:
    """The segment's bytes as views of the frames, and the frame to go on from."""
    size, dtype = DTYPE_SIZE[segment.dtype], TORCH_DTYPE[segment.dtype]
    begin, end = segment.offset, segment.offset + segment.nbytes
    frames, pieces = contribution.frames, []
    while frames[first].offset + frames[first].length <= begin:
        first += 1
    at = first
    while at < len(frames) and frames[at].offset < end:
        frame = frames[at]
        low, high = max(begin, frame.offset), min(end, frame.offset + frame.length)
        data = torch.frombuffer(frame.payload, dtype=dtype, count=(high - low) // size, offset=low - frame.offset)
        pieces.append(_Piece((low - begin) // size, (high - begin) // size, data))
        at += 1
    return pieces, max(first, at - 1)


def _blocks(length: int, contributors: Sequence[list[_Piece]]) -> Iterator[tuple[int, int]]:
    """Element ranges within which every contributor has one run of bytes."""
    edges = set(range(0, length, BLOCK))
    for pieces in contributors:
        edges.update(piece.begin for piece in pieces)
    ordered = [*sorted(edges), length]
    yield from itertools.pairwise(ordered)


class _Summer:
    """Sums one range after another, with scratch memory that is used again."""

    def __init__(self, dtype: torch.dtype, reduction: Reduction) -> None:
        self._half = dtype in (torch.float16, torch.bfloat16)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._accumulator = torch.empty(BLOCK, dtype=wide)
        self._scratch = torch.empty(BLOCK, dtype=wide)
        self._reduction = reduction
        self.squares = 0.0
        """Sum of squares of what was summed, before the clip, in fp64; see `norm`."""
        self.norm = False

    def block(self, runs: Sequence[tuple[torch.Tensor, float | None]], out: torch.Tensor) -> None:
        """Sum equally long runs, in order, into `out`."""
        accumulator = self._accumulator[: len(out)] if self._half or self.norm else out
        scratch = self._scratch[: len(out)]
        self._weigh(*runs[0], accumulator)
        for data, weight in runs[1:]:
            if weight is None and not self._half:
                accumulator.add_(data)
                continue
            self._weigh(data, weight, scratch)
            accumulator.add_(scratch)
        total = self._reduction.total_weight
        if total is not None and total != 1.0:
            accumulator.div_(total)
        if self.norm:
            self.squares += float(accumulator.to(torch.float64).square_().sum())
            return
        if self._reduction.clip is not None:
            accumulator.mul_(self._reduction.clip)
        if accumulator is not out:
            out.copy_(accumulator)

    def _weigh(self, data: torch.Tensor, weight: float | None, out: torch.Tensor) -> None:
        """`out = data * weight`, rounded once. x * 1 is x, so that one is only copied."""
        if weight is None or weight == 1.0:
            out.copy_(data)
        elif self._half:
            # Widen first: a product of a half and a number would be rounded to half.
            out.copy_(data).mul_(weight)
        else:
            torch.mul(data, weight, out=out)


def _walk(
    layout: PartitionLayout, parts: Sequence[Part], summers: dict[int, _Summer], views: Sequence[torch.Tensor]
) -> list[bool]:
    cursors = [0] * len(parts)
    anywhere = []
    for index, segment in enumerate(layout.segments):
        runs: list[tuple[list[_Piece], float | None]] = []
        for number, part in enumerate(parts):
            if part.contribution.present[index]:
                pieces, cursors[number] = _pieces(part.contribution, segment, cursors[number])
                runs.append((pieces, part.weight))
        anywhere.append(bool(runs))
        if runs:
            _sum_segment(segment, runs, summers[segment.dtype], views[index])
    return anywhere


def _sum_segment(
    segment: Segment, runs: Sequence[tuple[list[_Piece], float | None]], summer: _Summer, out: torch.Tensor
) -> None:
    at = [0] * len(runs)
    for begin, end in _blocks(segment.length, [pieces for pieces, _ in runs]):
        block = []
        for number, (pieces, weight) in enumerate(runs):
            while pieces[at[number]].end <= begin:
                at[number] += 1
            piece = pieces[at[number]]
            block.append((piece.data[begin - piece.begin : end - piece.begin], weight))
        summer.block(block, out[begin:end])


def _summers(layout: PartitionLayout, reduction: Reduction) -> dict[int, _Summer]:
    return {dtype: _Summer(TORCH_DTYPE[dtype], reduction) for dtype in {s.dtype for s in layout.segments}}


def sum_parts(layout: PartitionLayout, parts: Sequence[Part], reduction: Reduction, gradient: Gradient) -> list[bool]:
    """Sum contributions into a gradient.

    Args:
        layout: the partition's.
        parts: in rank order.
        reduction: divisor and clip.
        gradient: where the result goes; segments absent everywhere keep what they held.

    Returns:
        Per segment: whether any contributor had it.
    """
    return _walk(layout, parts, _summers(layout, reduction), gradient.views)


def squared_norm(
    layout: PartitionLayout, parts: Sequence[Part], reduction: Reduction, like: Sequence[torch.Tensor]
) -> float:
    """The squared norm of the sum, before any clip, in fp64; blocks added in order.

    Args:
        layout: the partition's.
        parts: in rank order.
        reduction: its divisor counts, its clip does not.
        like: one tensor per segment, for their lengths; not written.
    """
    summers = _summers(layout, reduction)
    for summer in summers.values():
        summer.norm = True
    _walk(layout, parts, summers, like)
    return math.fsum(summers[dtype].squares for dtype in sorted(summers))
