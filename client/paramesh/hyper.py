"""Hyper-parameters of torch optimizers: how they travel, and what changed since last time.

    current = numeric(optimizer.param_groups[0], optimizer.defaults)   # {"lr": 0.1, "betas": (0.9, 0.999)}
    changed = difference(previous, current)                            # what a Ready or a push carries
    protos = to_protos(changed)

Only settings that the optimizer's own constructor knows (`optimizer.defaults`) travel: a scheduler's
`initial_lr` or a user's `name` in a group are nobody's business but theirs. Flags that choose an
implementation (`foreach`, `fused`, ...) stay local too: a server has one fixed implementation per class,
so that the place where a parameter is cut changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from paramesh.errors import refuse
from paramesh.v1 import types_pb2

Value = float | int | bool | tuple[float, ...] | None
"""A setting in plain Python: what torch accepts again."""

LOCAL_FLAGS = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Settings that choose how the same arithmetic is carried out; they do not travel."""


def numeric(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Value]:
    """Returns the settings of a param group that travel, as plain numbers.

    Args:
        group: One of `optimizer.param_groups`.
        defaults: The optimizer's `defaults`, which name what is a setting at all.

    Raises:
        ParameshError: HYPER_PARAMETER, naming a setting that is not a number, bool, tuple of
            numbers or None, or one that is not finite.
    """
    return {name: _plain(name, group[name]) for name in defaults if name in group and name not in LOCAL_FLAGS}


def difference(previous: Mapping[str, Value], current: Mapping[str, Value]) -> dict[str, Value]:
    """Returns the settings in `current` that `previous` lacks or has otherwise (0.0 and False differ)."""
    return {
        name: value
        for name, value in current.items()
        if name not in previous
        or previous[name] != value
        or isinstance(previous[name], bool) != isinstance(value, bool)
    }


def to_protos(settings: Mapping[str, Value]) -> list[types_pb2.HyperParameter]:
    """Returns settings as messages, in the order given."""
    return [_to_proto(name, value) for name, value in settings.items()]


def from_protos(messages: Iterable[types_pb2.HyperParameter]) -> dict[str, Value]:
    """Returns messages as settings; the inverse of `to_protos` but for int and float, which are one."""
    return {message.name: _from_proto(message) for message in messages}


def _plain(name: str, value: Any) -> Value:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_number(name, item) for item in value)
    return _number(name, value)


def _number(name: str, value: Any) -> float | int:
    if not isinstance(value, (int, float)):
        item = getattr(value, "item", None)  # a tensor lr, or a numpy scalar
        if item is None or getattr(value, "size", None) is None:
            raise _not_numeric(name, value)
        try:
            value = item()
        except (RuntimeError, ValueError) as error:
            raise _not_numeric(name, value) from error
        if not isinstance(value, (int, float)):
            raise _not_numeric(name, value)
    if not math.isfinite(value):
        raise refuse("HYPER_PARAMETER", f"{name}={value} is not finite", name=name)
    return value


def _not_numeric(name: str, value: object) -> Exception:
    return refuse(
        "HYPER_PARAMETER",
        f"{name} is a {type(value).__name__}; only numbers, bools, tuples of numbers and None travel",
        name=name,
    )


def _to_proto(name: str, value: Value) -> types_pb2.HyperParameter:
    if value is None:
        return types_pb2.HyperParameter(name=name, none=True)
    if isinstance(value, bool):
        return types_pb2.HyperParameter(name=name, flag=value)
    if isinstance(value, tuple):
        return types_pb2.HyperParameter(name=name, numbers=types_pb2.NumberList(numbers=value))
    return types_pb2.HyperParameter(name=name, number=value)


def _from_proto(message: types_pb2.HyperParameter) -> Value:
    kind = message.WhichOneof("value")
    if kind == "number":
        return message.number
    if kind == "flag":
        return message.flag
    if kind == "numbers":
        return tuple(message.numbers.numbers)
    if kind == "none":
        return None
    raise refuse("HYPER_PARAMETER", f"{message.name} has no value", name=message.name)
