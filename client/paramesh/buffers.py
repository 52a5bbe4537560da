"""`sync_buffers="mean"`: running statistics (BatchNorm's) averaged over the workers at every step.

They ride in a table group of their own, as local mode's deltas do: "gradient" = before - now, SGD with
lr=1, weights as the step's. Integer buffers, such as counters, stay each worker's own.
"""

from __future__ import annotations

import torch

from paramesh.errors import ConfigError
from paramesh.exchange import Contribution, GroupSettings, Outcome, Table
from paramesh.exchange_local import LocalExchange
from paramesh.hyper import to_protos
from paramesh.membership import Session
from paramesh.options import outer_optimizer
from paramesh.tensors import TablePlan, wire_name
from paramesh.v1 import types_pb2


class BufferExchange(LocalExchange):
    """The floating-point buffers of a model."""

    keeps_local_steps = False  # a variance moved by another one's change could become negative

    @classmethod
    def of(cls, session: Session, name: str, model: torch.nn.Module) -> BufferExchange:
        """Makes the group of a model's buffers.

        Raises:
            ConfigError: It has none.
        """
        named = [(wire_name(label), buffer) for label, buffer in model.named_buffers() if buffer.is_floating_point()]
        if not named:
            raise ConfigError('sync_buffers="mean": the model has no floating-point buffers')
        class_name, settings = outer_optimizer("average")
        spec = types_pb2.OptimizerSpec(class_name=class_name, hyper_parameters=to_protos(settings))
        plan = TablePlan(name, name, named, spec)
        return cls(session, GroupSettings(name), [Table(plan, lambda: settings)])

    def step(self, contribution: Contribution) -> Outcome:
        """Averages what the buffers are now."""
        return super().step(contribution)
