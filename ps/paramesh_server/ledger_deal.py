"""Dealing the chunks of an epoch among members. Pure arithmetic.

    deal = Deal([(0, 10)], 3)      # chunks 0..9 among three
    deal.take(1, 2)                # [1, 4]: the i-th chunk of position p is number i * 3 + p
    deal.remaining()               # [(0, 1), (2, 4), (5, 10)]

Chunks that are left after a deal are runs again, so that an epoch of 10^6 chunks costs no
more than what was really dealt out of order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

Run = tuple[int, int]
"""Chunks begin..end-1."""


class Deal:
    """A sequence of chunks, dealt round-robin to `ways` positions.

    Attributes:
        size: chunks that were there at the start.
        left: chunks that nobody took yet.
    """

    __slots__ = ("_runs", "_starts", "_taken", "left", "size", "ways")

    def __init__(self, runs: Sequence[Run], ways: int):
        self._runs = list(runs)
        self._starts = [0]
        """Position of each run's first chunk in the sequence, and the end of the last."""
        for begin, end in self._runs:
            self._starts.append(self._starts[-1] + end - begin)
        self.size = self.left = self._starts[-1]
        self.ways = ways
        self._taken = [0] * ways
        """How many chunks each position took."""

    @classmethod
    def restored(cls, runs: Sequence[Run], taken: Sequence[int]) -> Deal:
        """The deal whose `runs` and `taken` these were.

        Raises:
            ValueError: no deal has such.
        """
        if not taken:
            raise ValueError("a deal has at least one position")
        for (_, earlier), (begin, _) in pairwise(runs):
            if begin <= earlier:
                raise ValueError(f"runs of a deal overlap or touch at chunk {begin}")
        if any(begin >= end for begin, end in runs):
            raise ValueError("a run of a deal is empty")
        deal = cls(runs, len(taken))
        for position, count in enumerate(taken):
            if count > deal.available(position):
                raise ValueError(f"position {position} of a deal took {count} chunks, more than its share")
        deal._taken = list(taken)
        deal.left -= sum(taken)
        return deal

    @property
    def runs(self) -> list[Run]:
        """The chunks that were there at the start."""
        return self._runs

    @property
    def taken(self) -> list[int]:
        """How many chunks each position took."""
        return self._taken

    def __repr__(self) -> str:
        """All that matters, for the digest of replicated state."""
        return f"Deal({self._runs}, {self.ways}, taken={self._taken})"

    def available(self, position: int) -> int:
        """How many chunks are left for a position."""
        share = (self.size - position + self.ways - 1) // self.ways
        return share - self._taken[position]

    def peek(self, position: int, count: int) -> list[int]:
        """The next `count` chunks of a position; fewer if fewer are left."""
        first = self._taken[position]
        steps = range(first, first + min(count, self.available(position)))
        return [self._chunk(i * self.ways + position) for i in steps]

    def take(self, position: int, count: int) -> list[int]:
        """Take what `peek` shows."""
        chunks = self.peek(position, count)
        self._taken[position] += len(chunks)
        self.left -= len(chunks)
        return chunks

    def _chunk(self, index: int) -> int:
        run = bisect_right(self._starts, index) - 1
        return self._runs[run][0] + index - self._starts[run]

    def remaining(self) -> list[Run]:
        """What nobody took, as sorted runs."""
        lowest, highest = min(self._taken), max(self._taken)
        gaps = [
            self._chunk(index)
            for i in range(lowest, highest)
            for position, taken in enumerate(self._taken)
            if i >= taken and (index := i * self.ways + position) < self.size
        ]
        return merge(self._tail(min(highest * self.ways, self.size)), gaps)

    def _tail(self, index: int) -> list[Run]:
        runs = []
        for run, (begin, end) in enumerate(self._runs):
            skip = max(0, index - self._starts[run])
            if begin + skip < end:
                runs.append((begin + skip, end))
        return runs


def merge(runs: Iterable[Run], chunks: Iterable[int]) -> list[Run]:
    """Sorted runs that hold exactly the given disjoint runs and chunks."""
    merged: list[Run] = []
    for begin, end in sorted([*runs, *((chunk, chunk + 1) for chunk in chunks)]):
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged
