"""Which samples reached the user's loop and wait for a step to count them. Pure.

    deliveries.delivered(range, samples=64)        # DataLoader, as it hands out a batch
    ranges, weight = deliveries.take("g0")         # optimizer, for the Ready of this step
    deliveries.restore(ranges, "g0")               # the Ready never got a decision

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
        self._before: dict[object, int] = {}
        """For each group, `_taken` before its last take."""
        self._stepped: dict[object, int] = {}
        """For each group, `_samples` when its last step used up the gradient."""
        self._lost = 0
        """`_samples` when a membership last ended: those that no step had taken are others' now."""

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
        before = self._before[group] = self._taken.get(group, 0)
        weight = self._samples - max(before, self._lost)
        self._taken[group] = self._samples
        return ranges, float(weight) if weight > 0 else 1.0

    def restore(self, ranges: Iterable[SampleRange], group: object) -> None:
        """Undo a group's last take: its Ready had no outcome, the next one counts the same samples."""
        self._pending = [*ranges, *self._pending]
        self._taken[group] = self._stepped[group] = self._before.get(group, 0)

    def lost(self, group: object) -> bool:
        """Note that a group's gradient is used up now; whether it holds samples of an ended membership.

        Micro-batches that were accumulated before an eviction went back to the others with their leases:
        a gradient that holds one of them must count nowhere.
        """
        began = self._stepped.get(group, 0)
        self._stepped[group] = self._samples
        return began < self._lost

    def clear(self) -> None:
        """Forget all ranges: their leases ended with the membership (eviction)."""
        self._pending = []
        self._lost = self._samples
