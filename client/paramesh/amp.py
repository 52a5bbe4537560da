"""Mixed precision: what `torch.amp.GradScaler` tells an optimizer, and what it must be told back.

A scaler whose optimizer supports scaling sets `optimizer.grad_scale` and `optimizer.found_inf` just before
`optimizer.step()`. Gradients are pushed unscaled, so that workers may have different scales; an inf on one
worker makes the step a skip for all, and then every worker's scaler must back off alike. A scaler reads
that from tensors of its own, which it does not hand out: it is recognised when it sets `found_inf`.
"""

from __future__ import annotations

import sys

import torch


class AmpState:
    """`grad_scale` and `found_inf` of one step. Set and deleted by the scaler through properties."""

    def __init__(self) -> None:
        self.grad_scale: torch.Tensor | None = None
        self.has_grad_scale = False
        self.found_inf: torch.Tensor | None = None
        self.scaler: torch.amp.GradScaler | None = None
        """Who set `found_inf`; None if it was set by hand."""

    def set_found_inf(self, value: torch.Tensor) -> None:
        """Takes `found_inf` and notes whose frame it comes from; called by the property's setter."""
        self.found_inf = value
        setter = sys._getframe(2).f_locals.get("self")
        self.scaler = setter if isinstance(setter, torch.amp.GradScaler) else None

    @property
    def inf(self) -> bool:
        """Whether this worker's gradients hold an inf or NaN; waits for the device."""
        return self.found_inf is not None and float(self.found_inf) > 0

    @torch.no_grad()
    def unscale(self, gradients: list[torch.Tensor]) -> None:
        """Divides gradients by the scale, in place, with the scaler's own arithmetic."""
        if self.grad_scale is None:
            return  # not under AMP, or the user called scaler.unscale_() already
        groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for gradient in gradients:
            groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        for (device, _), members in groups.items():
            inverse = self.grad_scale.to(device).double().reciprocal().float()
            found = torch.zeros((), dtype=torch.float32, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(members, found, inverse)
        self.grad_scale = None

    def learn(self, optimizer: object) -> None:
        """Tells the scaler that somebody found an inf: its next `update()` backs off."""
        if self.scaler is None:
            return
        found = self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        for tensor in found.values():
            tensor.fill_(1.0)
        if not found:  # no gradient at all on this worker
            found[torch.device("cpu")] = torch.ones((), dtype=torch.float32)
