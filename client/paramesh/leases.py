"""The index batches of one epoch, leased from the ledger.

    epoch = LeasedEpoch(session, terms, ahead=4, training=True)
    while epoch.refill():                  # waits; False: every sample of the epoch is counted
        for batch in torch_loader_over(epoch):
            epoch.deliver()                # this batch, and no later one, reached the loop
            yield batch
    epoch.close()

Torch draws index batches ahead of its prefetching workers, so what was drawn and what was
delivered are two queues. Drawing never waits for *other* workers: a worker that waited
while it holds undelivered leases would wait for others that wait for it. `refill` waits,
and is called only when nothing is held.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from paramesh.errors import Fenced, ParameshError
from paramesh.profiling import phase
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1.types_pb2 import SampleRange

if TYPE_CHECKING:
    import concurrent.futures

    from paramesh.membership import Session

__all__ = ["EpochTerms", "LeasedEpoch", "permutation"]

log = logging.getLogger(__name__)

COVER = 0.05
"""Seconds of the loop that leases asked for ahead should cover: a hundred times the call,
and too little for a slow worker to hoard the end of an epoch from a fast one."""

MOST = 64
"""Leases asked for at once, at most."""

CLOSE_TIMEOUT = 5.0
"""Seconds to give leases back after a `break`; eviction would return them anyway."""


def permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of samples in one epoch: a function of its arguments alone.

    Args:
        length: number of samples.
        seed: the loader's.
        epoch: from 0.

    Returns:
        int64 tensor [length], the same on every worker with the same torch; torch's global
        generator is not touched.
    """
    # splitmix64: neighbouring (seed, epoch) must not give neighbouring generator states,
    # of which torch keeps the low 32 bits only.
    mixed = (seed * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    mixed ^= mixed >> 31
    generator = torch.Generator().manual_seed(mixed & (2**63 - 1))
    return torch.randperm(length, generator=generator)


@dataclass(frozen=True)
class EpochTerms:
    """What all workers must agree on to lease from one epoch."""

    dataset: str
    """The loader's name; "" is the first one's."""
    epoch: int
    length: int
    """Samples in the dataset."""
    chunk: int
    """Samples of one lease: the batch size."""
    drop_last: bool
    seed: int
    shuffle: bool

    def order(self) -> torch.Tensor | None:
        """The epoch's permutation, int64 [length]; None: as the dataset has them."""
        return permutation(self.length, self.seed, self.epoch) if self.shuffle else None


class LeasedEpoch:
    """One worker's part of one epoch; an iterator of index batches. Training thread only.

    Args:
        session: the membership.
        terms: the same on every worker.
        ahead: index batches that torch draws before the first delivery.
        training: whether the next steps count these samples. False (evaluation): delivered
            means done.
    """

    def __init__(self, session: Session, terms: EpochTerms, *, ahead: int, training: bool):
        self._session = session
        self._terms = terms
        self._ahead = ahead
        self._training = training
        self._membership = session.membership
        """The membership under which the leases below were given."""
        self._order: torch.Tensor | None = None
        self._leased: deque[SampleRange] = deque()
        """Given by the ledger, not drawn yet, oldest first."""
        self._drawn: deque[SampleRange] = deque()
        """Drawn by torch, not delivered yet, oldest first."""
        self._evaluated: list[SampleRange] = []
        """Delivered by an evaluation: no step will name them."""
        self._asked: concurrent.futures.Future[lg.LeaseResponse] | None = None
        """A request for leases under way, made ahead of need."""
        self._calls = 0
        """Lease calls so far: the ledger repeats the answer to a number that it knows."""
        self._dry = False
        """Whether the ledger had nothing to give at once; until the next `refill`."""
        self._finished = False
        """Whether the ledger said that the epoch is over."""
        self._interval = 0.0
        """Seconds between deliveries, smoothed; 0 until there were two."""
        self._last = 0.0

    # ------------------------------------------------------------------ leasing

    def _request(self, want: int, *, wait: bool, declare: bool = False) -> lg.LeaseRequest:
        terms = self._terms
        self._calls += 1
        return lg.LeaseRequest(
            dataset=terms.dataset,
            epoch=terms.epoch,
            length=terms.length,
            chunk=terms.chunk,
            want=want,
            drop_last=terms.drop_last,
            # Only a waiting call's count; sent with each call they would add up.
            delivered=self._delivered() if wait or declare else [],
            seed=terms.seed,
            wait=wait,
            call=self._calls,
        )

    def _delivered(self) -> list[SampleRange]:
        """Ranges that the loop has had and no step has taken: they do not hold the epoch open."""
        if self.stale:
            return []  # returned to the others when the membership ended
        if not self._training:
            return self._evaluated
        return self._session.deliveries.pending(self._terms.dataset, self._terms.epoch)

    def _want(self) -> int:
        cover = math.ceil(COVER / self._interval) if self._interval > 0 else 1
        return max(1, min(MOST, self._ahead + cover))

    @property
    def stale(self) -> bool:
        """Whether the leases in hand belong to a membership that is over."""
        return self._membership != self._session.membership

    def refill(self) -> bool:
        """Wait for leases, holding none; False when the epoch is finished."""
        self._settle()
        session = self._session
        session.end_pause()  # shares are dealt to those who are not idle
        with phase("lease"):
            while True:
                response = session.request(
                    lambda: session.client.ledger.lease(self._request(self._want(), wait=True)),
                    f"data of epoch {self._terms.epoch}",
                )
                if response.between:
                    session.forget_activity()
                if response.leases or response.finished:
                    break
                time.sleep(0.02)  # an answer without either is a long poll that ended early
        self._membership = session.membership
        self._leased.extend(response.leases)
        self._dry = False
        self._finished = response.finished
        return bool(response.leases)

    def _settle(self) -> None:
        """Forget what the old membership leased; take in what is still being answered."""
        if self.stale:
            self._drop()
        elif self._asked is not None:
            self._harvest()

    def _drop(self) -> None:
        self._leased.clear()
        self._drawn.clear()
        self._evaluated.clear()
        if self._asked is not None:
            self._asked.cancel()
            self._asked = None

    def _ask_ahead(self) -> None:
        if self._asked is None and not self._dry:
            request = self._request(self._want(), wait=False)
            self._asked = self._session.submit(self._session.client.ledger.lease(request))

    def _harvest(self) -> None:
        asked, self._asked = self._asked, None
        if asked is None:
            return
        try:
            with phase("lease"):
                response = self._session.wait(asked, f"data of epoch {self._terms.epoch}")
        except Fenced:
            self._session.rejoin()
            self._drop()
            return
        if response.between:
            self._session.forget_activity()
        self._leased.extend(response.leases)
        self._dry = not response.leases

    # ------------------------------------------------------------------ drawing, delivering

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """The next index batch; StopIteration when none is to be had at once."""
        if not self._leased and not self.stale:
            self._ask_ahead()
            self._harvest()
        if self.stale or not self._leased:
            raise StopIteration
        lease = self._leased.popleft()
        self._drawn.append(lease)
        if len(self._leased) <= self._want() // 2:
            self._ask_ahead()
        return self._indices(lease)

    def _indices(self, lease: SampleRange) -> list[int]:
        if not self._terms.shuffle:
            return list(range(lease.begin, lease.end))
        if self._order is None:
            self._order = self._terms.order()
            assert self._order is not None
        indices: list[int] = self._order[lease.begin : lease.end].tolist()
        return indices

    def deliver(self) -> None:
        """Note that the oldest drawn batch is handed to the loop now."""
        lease = self._drawn.popleft()
        if self._training:
            self._session.deliveries.delivered(lease, lease.end - lease.begin)
        else:
            self._evaluated.append(lease)
        now = time.monotonic()
        if self._last:
            spent = now - self._last
            self._interval = spent if not self._interval else 0.8 * self._interval + 0.2 * spent
        self._last = now

    def close(self) -> None:
        """Give back what the loop has not seen. Does not raise: it runs in `finally`."""
        try:
            if not self._session.closed:
                self._settle()
                self._give_back()
        except ParameshError as error:
            log.warning("leases not returned reason=%s: %s", error.reason, error)
        finally:
            self._drop()

    def _give_back(self) -> None:
        session, terms = self._session, self._terms
        returned = [*self._drawn, *self._leased]
        if self._finished:
            # What an evaluation had is consumed by no step; the ledger need not remember it.
            returned += self._evaluated
        elif self._delivered():
            # A `break`: what the loop had must not keep the others waiting for the epoch's end.
            # Declaring is part of asking, so what is given in answer goes back at once.
            request = self._request(1, wait=False, declare=True)
            returned += session.call(session.client.ledger.lease(request), "batches to declare", CLOSE_TIMEOUT).leases
        if returned:
            give = lg.ReturnLeasesRequest(dataset=terms.dataset, epoch=terms.epoch, leases=returned)
            session.call(session.client.ledger.return_leases(give), "leases to return", CLOSE_TIMEOUT)
