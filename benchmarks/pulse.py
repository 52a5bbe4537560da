"""When a worker's frames go out and come in, and so how long its training stood still.

    pulse = Pulse()
    pulse.listen()                   # in the worker, before it connects
    ...
    pulse.stills                     # [(begin, end), ...], time.monotonic()
    longest_still([mine, yours], begin, end)

A step gets longer when its machine has more to do; it pauses when nothing of it moves. The first shows
in its length, the second only here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from paramesh.lanes.grpc_lane import GrpcLane, Sink
from paramesh.v1 import parameter_server_pb2 as ps

LEAST = 0.01
"""Seconds without a frame that are worth noting."""

Stills = Sequence[tuple[float, float]]


class Pulse:
    """The times at which not one frame of a push or a pull went out or came in."""

    def __init__(self) -> None:
        self.stills: list[tuple[float, float]] = []
        self._last = time.monotonic()

    def beat(self) -> None:
        """A frame moved."""
        now = time.monotonic()
        if now - self._last > LEAST:
            self.stills.append((self._last, now))
        self._last = now

    def listen(self) -> None:
        """Hear every frame of this process from now on."""
        push, pull = GrpcLane.push, GrpcLane.pull

        async def heard_push(lane: GrpcLane, messages: Iterable[bytes], timeout: float) -> list[ps.PartitionOutcome]:
            outcomes = await push(lane, self._heard(messages), timeout)
            self.beat()
            return outcomes

        async def heard_pull(
            lane: GrpcLane, request: ps.PullRequest, sink: Sink, timeout: float
        ) -> dict[int, ps.PullHeader]:
            def heard(partition: int, header: ps.PullHeader, payload: memoryview) -> None:
                sink(partition, header, payload)
                self.beat()

            return await pull(lane, request, heard, timeout)

        GrpcLane.push, GrpcLane.pull = heard_push, heard_pull  # type: ignore[method-assign]

    def _heard(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        for message in messages:
            self.beat()
            yield message


def longest_still(workers: Sequence[Stills], begin: float, end: float) -> float:
    """The longest time, in seconds, in which none of the workers had a frame, of those that touch begin to end."""
    common: Stills = [(float("-inf"), float("inf"))]
    for stills in workers:
        common = _both(common, stills)
    return max((b - a for a, b in common if a < end and b > begin), default=0.0)


def _both(left: Stills, right: Stills) -> list[tuple[float, float]]:
    """The times that are in both; each side's are in order and apart."""
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            found.append((begin, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return found
