"""What a script has made that a checkpoint or a restarted worker needs.

registry = paramesh.session.registry()      # the session's, or the process's when alone
registry.remember(optimizer)
registry.objects["scheduler"] = scheduler
"""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["Registry"]


class Registry:
    """Optimizers, held weakly, and objects with small state, held until the end."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        """By the name that `paramesh.state(name=...)` gave; each has state_dict and
        load_state_dict. Strong: a scheduler made in a function must outlive it."""
        self._optimizers: list[weakref.ref[Any]] = []

    def remember(self, optimizer: Any) -> None:
        """Note a `DistributedOptimizer`; again is harmless."""
        if all(known is not optimizer for known in self.optimizers):
            self._optimizers.append(weakref.ref(optimizer))

    @property
    def optimizers(self) -> list[Any]:
        """The living optimizers, in the order in which the script made them."""
        alive = [ref() for ref in self._optimizers]
        self._optimizers = [ref for ref, it in zip(self._optimizers, alive, strict=True) if it is not None]
        return [optimizer for optimizer in alive if optimizer is not None]
