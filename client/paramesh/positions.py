"""Where this worker stands in the data: which epoch each loader's next loop is.

    number = positions.next_epoch("")      # iter(loader): 0, 1, 2, ...; None: others are past it
    for epoch in positions.epochs(10):     # starts where the cluster is
        ...

Counters are local and follow the script, so they agree on all workers; the ledger knows
how far the cluster is. A restarted worker runs its script from the top, and the loops that
the cluster has left behind yield nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from paramesh.errors import refuse
from paramesh.v1 import ledger_pb2 as lg

if TYPE_CHECKING:
    from paramesh.membership import Session

__all__ = ["Positions"]

EPOCHS_KEY = "paramesh:epochs"
"""Ledger state: version = the epoch that some worker last began in `epochs`, value = the
loaders' counters at that moment, as JSON."""


class Positions:
    """Epoch counters of one worker's loaders. Training thread only."""

    def __init__(self, session: Session):
        self._session = session
        self._next: dict[str, int] = {}
        """For each loader, the epoch of its next loop; `next_epoch` counts it up."""
        self._live: dict[str, int] = {}
        """For each loader, the highest epoch that anybody had begun when its first loop
        started here; those before are over."""
        self._names = 0

    @property
    def loops(self) -> dict[str, int]:
        """For each loader, how many loops this script has begun."""
        return dict(self._next)

    def look_again(self) -> None:
        """This worker rejoined: the cluster may have left more epochs behind."""
        self._live.clear()

    def next_loader_name(self) -> str:
        """The key of the next loader that has no name: "", "loader-1", "loader-2", ..."""
        number, self._names = self._names, self._names + 1
        return f"loader-{number}" if number else ""

    def next_epoch(self, name: str) -> int | None:
        """Count up a loader's epoch.

        Returns:
            The number of the epoch that starts now; None if the cluster left it behind before
            this worker came: nothing is to be yielded.
        """
        number = self._next.get(name, 0)
        self._next[name] = number + 1
        if name not in self._live:
            self._live[name] = self._begun(name)
        self._session.small_state.loop_began()
        return number if number >= self._live[name] else None

    def _begun(self, name: str) -> int:
        session = self._session
        status = session.request(
            lambda: session.client.ledger.ledger_status(lg.LedgerStatusRequest()), "the live epoch"
        )
        return max((epoch.epoch for epoch in status.epochs if epoch.dataset == name), default=0)

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs from the live one on, up to `count`."""
        epoch = self._resume()
        while epoch < count:
            self._begin(epoch)
            yield epoch
            epoch += 1

    def _resume(self) -> int:
        session = self._session
        stored = session.request(
            lambda: session.client.ledger.get_state(lg.GetStateRequest(key=EPOCHS_KEY)), "the live epoch"
        )
        if not stored.found:
            return 0
        counters = json.loads(stored.value)
        if not isinstance(counters, dict) or not all(isinstance(n, int) for n in counters.values()):
            raise refuse("FORMAT", f"the ledger's state {EPOCHS_KEY!r} is not a table of epoch numbers")
        for name, number in counters.items():
            self._next[name] = max(number, self._next.get(name, 0))
        return int(stored.version)

    def _begin(self, epoch: int) -> None:
        session = self._session
        value = json.dumps(self._next, sort_keys=True).encode()
        session.request(
            lambda: session.client.ledger.put_state(lg.PutStateRequest(key=EPOCHS_KEY, version=epoch, value=value)),
            f"the ledger to note epoch {epoch}",
        )
        session.small_state.keep_now()
