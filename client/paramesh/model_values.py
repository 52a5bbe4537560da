"""`assign` and `broadcast`: a model's parameters, to the servers and from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paramesh.errors import ConfigError
from paramesh.session import current

if TYPE_CHECKING:
    import torch

    from paramesh.attachment import Attachment
    from paramesh.membership import Session

__all__ = ["assign", "broadcast"]


def assign(model: torch.nn.Module) -> None:
    """Make edited parameters the cluster's: the chief's are written to the servers, all workers get them.

    Every worker calls it, between two steps, after editing parameters outside the optimizer (weight
    clipping, re-initialising a layer). Alone, or before the first step, there is nothing to do.

    Args:
        model: holds the parameters of one or more `DistributedOptimizer`s.

    Raises:
        ConfigError: no DistributedOptimizer trains this model.
        PartitionOffline: a server is lost.
    """
    session = current()
    if session is None:
        return
    for attachment in _attachments(session, model):
        for exchange in attachment.main:
            if exchange.position is not None:
                attachment.assign(exchange, exchange.values_to_assign())


def broadcast(model: torch.nn.Module) -> None:
    """Give every worker the first values now; otherwise the first loop or step does it.

    The lowest rank's are taken; a worker that joins later gets those of the step where the others are.
    Every worker calls it, since first values wait for all that the job was started with. Alone, there is
    nothing to do.

    Args:
        model: holds the parameters of one or more `DistributedOptimizer`s.

    Raises:
        ConfigError: no DistributedOptimizer trains this model.
    """
    session = current()
    if session is not None:
        for attachment in _attachments(session, model):
            attachment.on_active({})


def _attachments(session: Session, model: torch.nn.Module) -> list[Attachment]:
    mine = {id(parameter) for parameter in model.parameters()}
    found = [
        optimizer.attachment
        for optimizer in session.optimizers
        if optimizer.attachment is not None
        and any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
    ]
    if not found:
        raise ConfigError("no paramesh.DistributedOptimizer trains a parameter of this model; make it first")
    return found
