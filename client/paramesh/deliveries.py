"""Which samples reached the user's loop and wait for a step to count them. Pure.

    deliveries.delivered(range, samples=64)        # DataLoader, as it hands out a batch
    ranges, weight = deliveries.take("g0")         # optimizer, for the Ready of this step
    deliveries.restore(ranges)                     # the Ready never got a decision

Batches are counted when *delivered*: a sampler runs ahead of its prefetching workers and
cannot know what the loop has seen. A range is consumed by whichever group steps first;
the weight is counted for each group by itself, so the discriminator and the generator of
a GAN both weigh the batch that both trained on.
"""

from __future__ import annotations

from collections.abc import Iterable

from paramesh.v1.types_pb2 import SampleRange

__all__ = ["Deliveries"]


class Deliveries:
    """Delivered samples of one worker. Used by the training thread only."""

    def __init__(self) -> None:
        self._pending: list[SampleRange] = []
        """Delivered and not yet named in a Ready, in order of delivery. Only `delivered`
        and `restore` add, only `take` and `clear` remove."""
        self._samples = 0
        """Samples delivered since the worker started; never falls."""
        self._taken: dict[object, int] = {}
        """For each group, `_samples` at its last take."""

    @property
    def samples(self) -> int:
        """Samples delivered since this worker started."""
        return self._samples

    def delivered(self, delivered: SampleRange | None, samples: int) -> None:
        """Note one batch handed to the user.

        Args:
            delivered: the leased range that it covers; None: none (it counts as weight only).
            samples: how many samples it holds.
        """
        if delivered is not None:
            self._pending.append(delivered)
        self._samples += samples

    def pending(self, dataset: str, epoch: int) -> list[SampleRange]:
        """Ranges of one epoch of one loader that no step has taken yet."""
        return [r for r in self._pending if r.dataset == dataset and r.epoch == epoch]

    def take(self, group: object) -> tuple[list[SampleRange], float]:
        """Take what the next contribution of a group stands for.

        Args:
            group: any key of the table group, the same at each call.

        Returns:
            The ranges that no group has taken yet, and the contribution's weight: samples
            delivered since this group's last take, 1 if there were none.
        """
        ranges, self._pending = self._pending, []
        weight = self._samples - self._taken.get(group, 0)
        self._taken[group] = self._samples
        return ranges, float(weight) if weight > 0 else 1.0

    def restore(self, ranges: Iterable[SampleRange]) -> None:
        """Put ranges back that were taken for a Ready which had no outcome."""
        self._pending = [*ranges, *self._pending]

    def clear(self) -> None:
        """Forget all ranges: their leases ended with the membership (eviction)."""
        self._pending = []
