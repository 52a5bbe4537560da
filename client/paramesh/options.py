"""The options of `DistributedOptimizer`, checked once, and the optimizers that servers can run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paramesh.config import MODES
from paramesh.errors import ConfigError, refuse
from paramesh.hyper import Value, numeric
from paramesh.hyper_check import complete_settings
from paramesh.routing import ALIGN
from paramesh.v1 import types_pb2

SUPPORTED: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
)
"""Elementwise, so that a parameter may be cut anywhere without changing a bit. Looked up by exact class:
a subclass may do anything, and classes travel as names out of this list."""

Outer = str | tuple[str, float, float] | tuple[type[Any], dict[str, Any]] | torch.optim.Optimizer | None
"""What `outer=` takes; see `outer_optimizer`."""


NON_FINITE: dict[str, types_pb2.NonFinite.ValueType] = {
    "reject": types_pb2.NON_FINITE_UNSPECIFIED,
    "skip": types_pb2.NON_FINITE_SKIP,
    "allow": types_pb2.NON_FINITE_ALLOW,
}
"""What `non_finite=` takes, as a table's schema has it."""


ACKS: dict[str, types_pb2.Acks.ValueType] = {
    "isr": types_pb2.ACKS_UNSPECIFIED,
    "primary": types_pb2.ACKS_PRIMARY,
}
"""What `acks=` takes, as a table's schema has it."""


def check_supported(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Refuses an optimizer that servers cannot run.

    Local mode runs the optimizer on the worker, so there any will do but those that call the closure
    several times.

    Raises:
        UnsupportedOptimizer: UNSUPPORTED_OPTIMIZER, naming it and what is supported.
    """
    kind = type(optimizer)
    if kind in SUPPORTED or (mode == "local" and not isinstance(optimizer, torch.optim.LBFGS)):
        return
    names = ", ".join(cls.__name__ for cls in SUPPORTED)
    raise refuse(
        "UNSUPPORTED_OPTIMIZER",
        f"{kind.__module__}.{kind.__qualname__} cannot run on parameter servers, which hold slices of "
        f"tensors; supported are {names} of torch.optim"
        + ("" if isinstance(optimizer, torch.optim.LBFGS) else "; mode='local' runs any optimizer on the worker"),
        optimizer=kind.__name__,
    )


def check_settings(class_name: str, settings: Mapping[str, Value]) -> None:
    """Refuses hyper-parameters that torch, and so every server, refuses.

    Raises:
        RequestRefused: HYPER_PARAMETER, in torch's own words.
    """
    kind = next(cls for cls in SUPPORTED if cls.__name__ == class_name)
    complete_settings(kind, settings)


@dataclass(frozen=True)
class Options:
    """How a `DistributedOptimizer` trains; see its docstring for the fields."""

    mode: str = "sync"
    staleness: int = 4
    every: int = 1
    outer: Outer = None
    loss_reduction: str = "mean"
    max_grad_norm: float | None = None
    backup_workers: int = 0
    overlap_pull: bool = False
    speculate: bool = True
    sync_buffers: str | None = None
    name: str | None = None
    partition_bytes: int | None = None
    non_finite: str = "reject"
    acks: str = "isr"

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, MODES)
        _one_of("loss_reduction", self.loss_reduction, ("mean", "sum"))
        _one_of("sync_buffers", self.sync_buffers, (None, "mean"))
        _one_of("non_finite", self.non_finite, tuple(NON_FINITE))
        _one_of("acks", self.acks, tuple(ACKS))
        if self.acks != "isr" and self.mode != "async":
            raise ConfigError(
                f"acks={self.acks!r} belongs to mode='async', not to mode={self.mode!r}: there a step counts"
            )
        _whole("staleness", self.staleness, 0)
        _whole("every", self.every, 1)
        _whole("backup_workers", self.backup_workers, 0)
        if self.partition_bytes is not None:
            _whole("partition_bytes", self.partition_bytes, ALIGN * 8)
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, (int, float)) and 0 < norm < math.inf):
            raise ConfigError(f"max_grad_norm={norm!r} must be a number above 0, or None")
        if self.outer is not None and self.mode != "local":
            raise ConfigError(f"outer={self.outer!r} belongs to mode='local', not to mode={self.mode!r}")
        if self.backup_workers and self.mode != "sync":
            raise ConfigError(f"backup_workers={self.backup_workers} belongs to mode='sync', not to {self.mode!r}")


def outer_optimizer(outer: Outer) -> tuple[str, dict[str, Value]]:
    """Returns class name and settings of local mode's outer optimizer.

    Args:
        outer: None or "average": plain averaging. ("nesterov", lr, momentum): DiLoCo's. A torch optimizer:
            its class and first group's settings, whatever its parameters; (class, {settings}): the same.

    Raises:
        ConfigError: Something else.
        UnsupportedOptimizer: Its class is not one that servers run.
    """
    if outer is None or outer == "average":
        return "SGD", settings_of(torch.optim.SGD([torch.zeros(1)], lr=1.0))
    if isinstance(outer, torch.optim.Optimizer):
        check_supported(outer, "sync")
        return type(outer).__name__, settings_of(outer)
    if isinstance(outer, tuple) and len(outer) == 2 and isinstance(outer[0], type):
        return outer_optimizer(outer[0]([torch.zeros(1)], **outer[1]))
    if isinstance(outer, tuple) and len(outer) == 3 and outer[0] == "nesterov":
        _, lr, momentum = outer
        return "SGD", settings_of(torch.optim.SGD([torch.zeros(1)], lr=lr, momentum=momentum, nesterov=True))
    raise ConfigError(
        f"outer={outer!r} must be 'average', ('nesterov', lr, momentum) or a torch optimizer's class and "
        "settings, such as (torch.optim.SGD, {'lr': 0.7, 'momentum': 0.9})"
    )


def settings_of(optimizer: torch.optim.Optimizer, group: int = 0) -> dict[str, Value]:
    """Returns the settings of one param group that travel."""
    return numeric(optimizer.param_groups[group], optimizer.defaults)


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
