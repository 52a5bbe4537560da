"""`overlap_pull=True`: values arrive while the next forward runs, and modules wait for their own.

    overlap = Overlap(model, exchanges); overlap.watch()
    exchange.step(...)                 # returns with the pull under way
    model(x)                           # each module waits for what it holds

Which modules' forward runs is observed for two steps, in which pulls are waited for as usual. A parameter
whose module's forward did not run (it is used through `F.linear(x, self.embed.weight)`, say) is waited for
at the model's own forward. A module with parameters of its own also waits for those of its children, since
it may use them directly (`MultiheadAttention` does).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from paramesh.exchange_sync import SyncExchange

log = logging.getLogger(__name__)

OBSERVED_STEPS = 2
"""As in speculation: one step may be special, two make a habit."""


class Overlap:
    """Hooks on a model's modules that wait for pulled values.

    Args:
        model: The model.
        exchanges: Whose pulls are waited for.
    """

    def __init__(self, model: torch.nn.Module, exchanges: Sequence[SyncExchange]):
        self._model = model
        self.exchanges = list(exchanges)
        """Whose pulls are waited for; param groups that are added later add theirs."""
        self._needs: dict[torch.nn.Module, list[torch.Tensor]] = {}
        """Module -> parameters to wait for before its forward."""
        self._ran: set[torch.nn.Module] = set()
        """Modules whose forward ran while observing."""
        self._up_front: list[torch.Tensor] = []
        """Parameters to wait for at the model's own forward."""
        self._steps = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def active(self) -> bool:
        """Whether steps may return before values are there."""
        return self._steps >= OBSERVED_STEPS

    def watch(self) -> None:
        """Puts the hooks on."""
        for module in self._model.modules():
            if module is self._model or any(True for _ in module.parameters(recurse=False)):
                recurse = module is not self._model
                self._needs[module] = list(module.parameters(recurse=recurse))
                self._handles.append(module.register_forward_pre_hook(self._before_forward))

    def _before_forward(self, module: torch.nn.Module, _: Any) -> None:
        if not self.active:
            self._ran.add(module)
            return
        if module is self._model and not module.training:
            for exchange in self.exchanges:  # evaluation reads parameters any way it likes
                exchange.finish()
            return
        needed = self._needs[module] + (self._up_front if module is self._model else [])
        for exchange in self.exchanges:
            exchange.wait_for(needed)

    def stepped(self) -> None:
        """A step was taken; after two of them it is known what to wait for where."""
        self._steps += 1
        if self._steps == OBSERVED_STEPS:
            covered = {id(p) for module in self._ran for p in self._needs[module]}
            self._up_front = [p for p in self._model.parameters() if id(p) not in covered]
            if self._up_front:
                log.info("overlap parameters_waited_for_up_front=%d", len(self._up_front))
            self._ran.clear()
