"""How many requests a second each partition serves, and when that is worth a move. Pure: time is passed in.

    rates.note(ref, beat.loads, now)
    rates.by_partition(now)                      # for the balancer
    rates.due(primaries, now)                    # uneven for a while, and not mended lately

Counts are those of a primary's process, so they begin anew when the lead changes; until there is
enough of the new ones, the partition counts for what it served before.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from paramesh_coordinator.rebalance import RATE_FLOOR, is_uneven
from paramesh_coordinator.rows import Ref

__all__ = ["Rates"]

SAMPLE_SECONDS = 1.0
"""Between two counts that are kept."""

WINDOW_SECONDS = 20.0
"""What a rate is the mean of: steps and pauses of training are shorter."""

ENOUGH_SECONDS = 10.0
"""Counts of a shorter time say nothing."""

SUSTAINED_SECONDS = 30.0
"""Requests must be uneven for as long before anything moves: a burst is over before a copy has arrived."""

REST_SECONDS = 60.0
"""After a plan for their sake as long nothing moves for their sake."""


@dataclass
class _Counts:
    ref: Ref
    samples: deque[tuple[float, int]] = field(default_factory=deque)
    rate: int = 0
    """The last that was known."""


class Rates:
    """What primaries counted lately."""

    def __init__(self) -> None:
        self._counts: dict[int, _Counts] = {}
        self._uneven_since: float | None = None
        self._planned: float | None = None

    def note(self, ref: Ref, loads: Iterable[tuple[int, int]], now: float) -> None:
        """A beat of a primary: (partition, requests so far)."""
        for partition, requests in loads:
            known = self._counts.setdefault(partition, _Counts(ref))
            samples = known.samples
            if known.ref != ref or (samples and requests < samples[-1][1]):
                known.ref = ref
                samples.clear()
            if not samples or now - samples[-1][0] >= SAMPLE_SECONDS:
                samples.append((now, requests))
            while samples and now - samples[0][0] > WINDOW_SECONDS:
                samples.popleft()
            if len(samples) > 1 and samples[-1][0] - samples[0][0] >= ENOUGH_SECONDS:
                known.rate = round((samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0]))

    def by_partition(self) -> dict[int, int]:
        """Requests a second of each partition that served any."""
        return {partition: known.rate for partition, known in self._counts.items() if known.rate}

    def due(self, primaries: Mapping[int, Ref], servers: Iterable[Ref], now: float) -> bool:
        """Whether requests were uneven for long enough, and nothing was planned for that lately.

        Args:
            primaries: who leads each online partition.
            servers: the live ones that may lead.
            now: seconds.
        """
        load = Counter(dict.fromkeys(servers, 0))
        for partition, rate in self.by_partition().items():
            if primaries.get(partition) in load:
                load[primaries[partition]] += rate
        uneven = len(load) > 1 and max(load.values()) >= RATE_FLOOR and is_uneven(load.values())
        if not uneven:
            self._uneven_since = None
            return False
        if self._uneven_since is None:
            self._uneven_since = now
        rested = self._planned is None or now - self._planned >= REST_SECONDS
        return rested and now - self._uneven_since >= SUSTAINED_SECONDS

    def planned(self, now: float) -> None:
        """A plan was made, or there was nothing that could be."""
        self._planned, self._uneven_since = now, None
