"""Whether torch takes some hyper-parameters; asked by workers before a step is decided, and by servers.

    complete = complete_settings(torch.optim.Adam, {"lr": 1e-3})     # with torch's defaults; HYPER_PARAMETER

A decided step cannot be taken back, so whatever a server would refuse must be refused before: both ask here.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from paramesh.errors import refuse
from paramesh.hyper import LOCAL_FLAGS, Value

Factory = Callable[..., torch.optim.Optimizer]
"""A class of torch.optim."""

SCHEDULERS = frozenset({"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"})
"""Notes that LR schedulers keep in a param group; no optimizer reads them."""

FIXED = {"AdamW": frozenset({"decoupled_weight_decay"})}
"""What a class keeps in its defaults and does not take: it says what the class is."""


def complete_settings(kind: Factory, settings: Mapping[str, Value]) -> dict[str, Value]:
    """Returns hyper-parameters of a class, complete with its defaults, after torch's own checks.

    Args:
        kind: The class.
        settings: By torch's names; what only says how to compute is ignored.

    Raises:
        RequestRefused: HYPER_PARAMETER; carries torch's own words.
    """
    known, name_of = _known(kind), kind.__name__
    ignored = LOCAL_FLAGS | SCHEDULERS | FIXED.get(name_of, frozenset())
    asked = {name: value for name, value in settings.items() if name not in ignored}
    for name, value in asked.items():
        if name not in known:
            raise refuse("HYPER_PARAMETER", f"{name_of} has no hyper-parameter {name[:80]!r}", name=name[:80])
        _check_kind(name_of, name, value, known[name])
    complete = {**known, **asked}
    _construct(kind, tuple(sorted(complete.items())))
    return complete


@functools.cache
def _known(kind: Factory) -> dict[str, Any]:
    """Constructor arguments of a class with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(kind).parameters.items()
        if name != "params" and name not in LOCAL_FLAGS
    }


def _check_kind(class_name: str, name: str, value: Value, default: Any) -> None:
    """Torch does not look at kinds, and lets NaN pass where it compares with `<`."""
    numbers = value if isinstance(value, tuple) else (value,)
    if isinstance(default, bool):
        fits = isinstance(value, bool)
    elif isinstance(default, tuple):
        fits = isinstance(value, tuple) and len(value) == len(default)
    else:
        fits = isinstance(value, float | int) and not isinstance(value, bool)
    if fits and not isinstance(default, bool):
        fits = all(isinstance(n, float | int) and math.isfinite(n) for n in numbers)
    if not fits:
        raise refuse(
            "HYPER_PARAMETER",
            f"{class_name}({name}={value}) does not fit: the default is {default}",
            name=name,
            value=value,
        )


@functools.lru_cache(maxsize=256)
def _construct(kind: Factory, settings: tuple[tuple[str, Value], ...]) -> None:
    """Lets torch's constructor judge; cached, as every partition and step asks the same."""
    try:
        kind([torch.nn.Parameter(torch.zeros(1))], **dict(settings))
    except (ValueError, TypeError, RuntimeError) as error:
        raise refuse("HYPER_PARAMETER", f"{kind.__name__}: {error}", optimizer=kind.__name__) from error
