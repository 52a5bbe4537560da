"""What the library costs a script that runs without a cluster: nothing, within 2 %.

    python -m benchmarks alone

One process trains two copies of one model in turn, with torch's own loader and optimizer
and with Paramesh's, in short alternating blocks; the ratio of each pair of blocks cancels
whatever else the machine does, and the median over pairs is reported.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

PAIRS = 101
BLOCK_STEPS = 16
"""Steps of a block, which is one epoch, so that a loader's start is in every block alike;
about 30 ms: long beside a timer tick, short beside other load."""


def run(pairs: int = PAIRS) -> dict[str, Any]:
    """Measure; returns the median ratio, its quartiles and the two median step times."""
    for name in [n for n in os.environ if n.startswith("PARAMESH_")]:
        del os.environ[name]
    import paramesh
    import torch

    torch.set_num_threads(1)
    plain = _trainer(torch.utils.data.DataLoader, lambda optimizer, _model: optimizer)
    ours = _trainer(paramesh.DataLoader, lambda optimizer, model: paramesh.DistributedOptimizer(optimizer, model))
    _block(plain), _block(ours)
    ratios, plain_s, ours_s = [], [], []
    for pair in range(pairs):
        first, second = (plain, ours) if pair % 2 == 0 else (ours, plain)
        times = {id(first): _block(first), id(second): _block(second)}
        plain_s.append(times[id(plain)])
        ours_s.append(times[id(ours)])
        ratios.append(ours_s[-1] / plain_s[-1])
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "plain_step_ms": round(statistics.median(plain_s) / BLOCK_STEPS * 1e3, 4),
        "paramesh_step_ms": round(statistics.median(ours_s) / BLOCK_STEPS * 1e3, 4),
        "pairs": pairs,
    }


def _block(trainer: Iterator[None]) -> float:
    began = time.perf_counter()
    for _ in range(BLOCK_STEPS):
        next(trainer)
    return time.perf_counter() - began


def _trainer(loader_class: Callable[..., Any], wrap: Callable[[Any, Any], Any]) -> Iterator[None]:
    """An endless training loop that yields after every step; 0.24 M parameters, batch 64."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    dataset = torch.utils.data.TensorDataset(
        torch.randn(64 * BLOCK_STEPS, 784), torch.randint(0, 10, (64 * BLOCK_STEPS,))
    )
    loader = loader_class(dataset, batch_size=64, shuffle=True)
    optimizer = wrap(torch.optim.Adam(model.parameters(), lr=1e-3), model)
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            yield
