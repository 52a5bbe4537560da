"""A worker's gradients on their way into a step: sparse ones are refused, those that are not finite are judged.

    contributions = [contribution_of(exchange, skip=False) for exchange in exchanges]
    judge.skips(exchanges, contributions)          # raises NON_FINITE, or says whether the step is a skip

A contribution counts in every partition or in none, and only its worker sees all of it. So the worker is the
judge, before a Ready (sync, local) or a push (async, ssp) could make it count anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from paramesh.errors import refuse
from paramesh.exchange import Contribution, Exchange
from paramesh.tensors import TablePlan

log = logging.getLogger(__name__)


def gradients_of(exchange: Exchange) -> list[list[torch.Tensor | None]]:
    """Returns `p.grad` per table and parameter."""
    return [[p.grad for p in table.plan.parameters] for table in exchange.tables]


def contribution_of(exchange: Exchange, skip: bool) -> Contribution:
    """Returns the gradients of now as a contribution.

    Raises:
        TensorMismatch: One is sparse.
    """
    gradients = gradients_of(exchange)
    for table, found in zip(exchange.tables, gradients, strict=True):
        _refuse_sparse(table.plan, found)
    return Contribution(gradients, skip=skip)


def _refuse_sparse(plan: TablePlan, gradients: Sequence[torch.Tensor | None]) -> None:
    for name, gradient in zip(plan.names, gradients, strict=True):
        if gradient is not None and gradient.layout is not torch.strided:
            raise refuse(
                "TENSOR_MISMATCH",
                f"parameter {name!r} has a sparse gradient; dense tables cannot take it: use paramesh.Embedding "
                "in place of torch.nn.Embedding(sparse=True), or sparse=False",
                tensor=name,
            )


def with_gradient(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Returns the parameters of an optimizer that have a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


class Judge:
    """Holds contributions against a policy for NaN and infinity.

    Args:
        policy: "reject", "skip" or "allow".
    """

    def __init__(self, policy: str):
        self.policy = policy
        self.skipped = 0
        """Contributions of this worker that became a skip; for people."""

    def skips(
        self,
        exchanges: Sequence[Exchange],
        contributions: Sequence[Contribution],
        *,
        amp: bool = False,
        stored: bool = True,
        of: str = "the gradient of",
    ) -> bool:
        """Whether the step is to be a skip.

        Args:
            exchanges: The table groups of one optimizer; if one's gradient is bad, none counts.
            contributions: One per exchange.
            amp: A GradScaler is at work: what it did not see (unscaling by less than 1) is a skip too.
            stored: They travel: they are brought into their parameters' dtype first, and kept so.
            of: What it is, for people.

        Raises:
            RequestRefused: NON_FINITE, under "reject".
        """
        if self.policy == "allow":
            return False
        names: list[str] = []
        tensors: list[torch.Tensor | None] = []
        for exchange, contribution in zip(exchanges, contributions, strict=True):
            if stored:
                contribution.gradients = _in_dtype_of_parameters(exchange, contribution.gradients)
            names += [name for table in exchange.tables for name in table.plan.names]
            tensors += [gradient for row in contribution.gradients for gradient in row]
        bad = first_not_finite(tensors)
        if bad is None:
            return False
        step = exchanges[0].position
        if self.policy == "reject" and not amp:
            for exchange in exchanges:
                exchange.refused()
            raise refuse(
                "NON_FINITE",
                f"{of} parameter {names[bad]!r} holds NaN or infinity at step {step}; nothing was changed. Lower the "
                "learning rate, look at loss and data, use a GradScaler in mixed precision, or skip such steps with "
                'DistributedOptimizer(..., non_finite="skip")',
                tensor=names[bad],
                step=step,
                group=exchanges[0].settings.name,
            )
        self._count(names[bad], step, exchanges[0].settings.name)
        return True

    def _count(self, name: str, step: int | None, group: str) -> None:
        self.skipped += 1
        # Once for people; a run that meets many of them is not to fill its log.
        level = logging.WARNING if self.skipped == 1 else logging.DEBUG
        log.log(level, "non_finite=skip group=%s step=%s parameter=%s skipped=%d", group, step, name, self.skipped)


def _in_dtype_of_parameters(
    exchange: Exchange, gradients: Sequence[Sequence[torch.Tensor | None]]
) -> list[list[torch.Tensor | None]]:
    """Returns gradients as they will be stored: 1e5 is finite in fp32 and infinite in fp16.

    The copy is the one that encoding would make; nearly every gradient has its parameter's dtype and is not copied.
    """
    return [
        [
            g if g is None or g.dtype == p.dtype else g.to(p.dtype)
            for p, g in zip(table.plan.parameters, row, strict=True)
        ]
        for table, row in zip(exchange.tables, gradients, strict=True)
    ]


@torch.no_grad()
def first_not_finite(tensors: Sequence[torch.Tensor | None]) -> int | None:
    """Returns the position of the first tensor with a NaN or an infinity; None if all are finite.

    One read of each tensor, where it lies, without the GIL, and one wait per device and dtype: a sum is finite only if
    all its terms are. It may overflow although they are, so only then each element is looked at (a second pass that
    makes temporary copies). A sum is several times cheaper than `isfinite` or a largest magnitude.
    """
    sums: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for position, tensor in enumerate(tensors):
        if tensor is not None:
            sums.setdefault((tensor.device, tensor.dtype), []).append((position, _elements(tensor).sum()))
    suspects: list[int] = []
    for members in sums.values():
        finite = torch.isfinite(torch.stack([total for _, total in members])).tolist()
        suspects += [position for (position, _), fine in zip(members, finite, strict=True) if not fine]
    for position in sorted(suspects):
        tensor = tensors[position]
        if tensor is not None and not bool(torch.isfinite(_elements(tensor)).all()):
            return position
    return None


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what a tensor holds; local mode takes sparse gradients too."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
