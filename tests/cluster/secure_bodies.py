"""What workers do while somebody listens on the wire."""

from __future__ import annotations

import paramesh
import torch
from torch import nn

from tests.cluster.desk import Desk

TABLE = "name-on-the-wire"
VALUE, GRADIENT = 1.2345678, -7.654321


def secret(desk: Desk) -> None:
    """Three steps of a table whose name, values and gradients are easily found in a capture."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.constant_(model.weight, VALUE)
    # At rate 0 the values stay what they are, and every pull brings them once more.
    optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, name=TABLE)
    for _ in range(3):
        model.weight.grad = torch.full_like(model.weight, GRADIENT)
        optimizer.step()
    desk.emit("final", value=float(model.weight[0, 0].detach()))
