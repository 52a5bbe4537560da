"""The dense workload: 20 tensors of unequal sizes, constant gradients, a known answer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

MEGA = 1 << 20
GRAIN = 1 << 16
"""Sizes are multiples of it: then each tensor is a multiple of 64 elements and no partition has padding."""
LR = 0.01
FIRST_VALUE = 0.5
_PARTS = [256, 1, 160, 1, 128, 1, 96, 1, 80, 2, 72, 3, 56, 4, 48, 8, 40, 12, 32, 23]
"""Of 1024: large and small ones in turn, 0.1 % to 25 % of the whole, as real models have."""


def parse_sizes(text: str) -> dict[str, int]:
    """Turn "1M,16M,0.25M" into element counts by name.

    Raises:
        ValueError: a size is not a positive number followed by M.
    """
    sizes = {}
    for name in text.split(","):
        number = float(name.removesuffix("M"))
        if not name.endswith("M") or not number * MEGA >= GRAIN:
            raise ValueError(f"{name!r} is not a size such as 16M (millions of parameters, at least 0.0625M)")
        sizes[name] = int(number * MEGA) // GRAIN * GRAIN
    return sizes


def tensor_sizes(elements: int) -> list[int]:
    """Element counts of the 20 tensors of a model of `elements` (a multiple of GRAIN)."""
    assert sum(_PARTS) == 1024
    return [part * elements // 1024 for part in _PARTS]


def gradient_value(rank: int) -> float:
    """What every element of worker `rank`'s gradient is; differs by worker, so a lost one shows."""
    return 1e-3 * (rank + 1)


class Flat(nn.Module):
    """Parameters with fixed gradients and no forward pass."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(
            nn.Parameter(torch.full((size,), FIRST_VALUE)) for size in tensor_sizes(elements)
        )

    def set_gradients(self, rank: int) -> None:
        """Give every parameter worker `rank`'s gradient."""
        for parameter in self.tensors:
            parameter.grad = torch.full_like(parameter, gradient_value(rank))


def expected_value(mode: str, steps: int, workers: int) -> float:
    """What every element must be after `steps` of each worker: torch itself on one vector.

    In sync mode the servers sum in rank order in fp32, divide by the sum of weights and step;
    in the others each push is a step, and their order cannot matter as all of one worker's are equal.
    """
    value = nn.Parameter(torch.full((64,), FIRST_VALUE))
    optimizer = torch.optim.SGD([value], lr=LR, fused=True)
    gradients = [torch.full((64,), gradient_value(rank)) for rank in range(workers)]
    if mode == "sync":
        mean = gradients[0].clone()
        for gradient in gradients[1:]:
            mean += gradient
        gradients = [mean / workers]
    for _ in range(steps):
        for gradient in gradients:
            value.grad = gradient.clone()
            optimizer.step()
    return float(value.detach()[0])


def steps_off(values: Iterable[torch.Tensor], expected: float, mode: str, workers: int) -> float:
    """The largest deviation from the known answer, in units of one whole step; 0 is bit-exact."""
    worst = max(float((v - expected).abs().max()) for v in values)
    gradients = [gradient_value(rank) for rank in range(workers)]
    step = LR * sum(gradients) / (workers if mode == "sync" else 1)
    return worst / step
