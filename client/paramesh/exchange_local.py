"""Local steps: the user's optimizer runs on the worker, every H-th step the workers agree.

What is exchanged is `start - current`, where `start` is what the last exchange brought: as a gradient of an
outer optimizer that the servers run. SGD with lr=1 makes that the average of the workers' parameters,
SGD with Nesterov momentum makes it DiLoCo.
"""

from __future__ import annotations

import torch

from paramesh.exchange import Contribution, Outcome, Resumed
from paramesh.exchange_sync import SyncExchange
from paramesh.v1 import ledger_pb2


class LocalExchange(SyncExchange):
    """One group in local mode; a step here is an exchange, after `every` local ones."""

    start: list[list[torch.Tensor]]
    """Per table and parameter: the values that the last exchange brought."""
    keeps_local_steps = True
    """Whether what changed here since the last exchange outlives a pull that comes between."""
    _giving = False
    """Whether the local steps are being exchanged: then a pull brings what became of them."""

    @torch.no_grad()
    def pull_now(self, position: ledger_pb2.GroupPosition) -> None:
        """Pulls the group's next step, and takes this worker's local steps since the last exchange along.

        Their samples count in the next exchange, so they must be in its delta. First values and those
        after an eviction (no position) replace everything: there the samples are somebody else's.
        """
        if self.position is None or self._giving or not self.keeps_local_steps:
            super().pull_now(position)
            return
        parameters = [p for table in self.tables for p in table.plan.parameters]
        mine = [p.detach().clone() for p in parameters]
        starts = [start for row in self.start for start in row]
        try:
            super().pull_now(position)
        except BaseException:
            for p, value in zip(parameters, mine, strict=True):
                p.copy_(value)  # half a pull must not pass for local steps
            raise
        for p, value, start in zip(parameters, mine, starts, strict=True):
            p.add_(value - start)

    def take_assigned(self) -> None:
        """Pulls what was assigned; that replaces local steps too."""
        self.after_pull()
        super().take_assigned()

    def after_pull(self) -> None:
        """Keeps a copy of what was pulled, to subtract from."""
        super().after_pull()
        self.edits.forget()  # local steps change parameters: that is what they are for
        self.start = [[p.detach().clone() for p in table.plan.parameters] for table in self.tables]

    @torch.no_grad()
    def deltas(self) -> list[list[torch.Tensor | None]]:
        """Returns start - current for every parameter."""
        return [
            [before - p.detach() for before, p in zip(starts, table.plan.parameters, strict=True)]
            for starts, table in zip(self.start, self.tables, strict=True)
        ]

    @torch.no_grad()
    def undo_local_steps(self) -> None:
        """Sets parameters back to what the last exchange brought."""
        for table, starts in zip(self.tables, self.start, strict=True):
            for p, start in zip(table.plan.parameters, starts, strict=True):
                p.copy_(start)

    def resume(self, may_replace: bool) -> Resumed:
        """Ends an exchange that was cut off: what is pulled has this worker's local steps in it."""
        self._giving = True
        try:
            return super().resume(may_replace)
        finally:
            self._giving = False

    def step(self, contribution: Contribution) -> Outcome:
        """Exchanges deltas: those that the contribution has, or those of now if it has none."""
        contribution.gradients = contribution.gradients or self.deltas()
        self._giving = True
        try:
            return super().step(contribution)
        finally:
            self._giving = False
