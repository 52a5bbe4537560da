"""`paramesh.retry.Backoff` with the simulation's generator."""

from __future__ import annotations

import random


class Backoff:
    """Waits of 50 ms doubling to 2 s, with jitter."""

    def __init__(self, rng: random.Random, first: float = 0.05, cap: float = 2.0) -> None:
        self._rng, self._next, self._cap = rng, first, cap

    def next(self) -> float:
        """Seconds to wait now."""
        wait = self._next
        self._next = min(self._cap, wait * 2)
        return wait * self._rng.uniform(0.5, 1.0)
