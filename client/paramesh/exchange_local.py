"""Local steps: the user's optimizer runs on the worker, every H-th step the workers agree.

What is exchanged is `start - current`, where `start` is what the last exchange brought: as a gradient of an
outer optimizer that the servers run. SGD with lr=1 makes that the average of the workers' parameters,
SGD with Nesterov momentum makes it DiLoCo.
"""

from __future__ import annotations

import torch

from paramesh.exchange import Contribution, Outcome
from paramesh.exchange_sync import SyncExchange


class LocalExchange(SyncExchange):
    """One group in local mode; a step here is an exchange, after `every` local ones."""

    start: list[list[torch.Tensor]]
    """Per table and parameter: the values that the last exchange brought."""

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

    def step(self, contribution: Contribution) -> Outcome:
        """Exchanges deltas; the contribution's gradients were used up by local steps."""
        contribution.gradients = self.deltas()
        return super().step(contribution)
