"""The user's torch optimizer, on the segments of one partition.

    settings = check_settings("Adam", {"lr": 1e-3})          # torch's own checks
    optimizer = PartitionOptimizer("Adam", settings, values, layout)
    optimizer.step(gradient.views, present)

The class is torch's, looked up in a fixed table, with one torch parameter per segment, each
a view of the partition's flat memory: semantics are torch's because the code is. One
implementation per class is fixed (fused where torch has it on the CPU, else the plain loop),
so that with cuts at multiples of 64 elements neither cuts nor threads change a bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from paramesh import hyper
from paramesh.errors import refuse
from paramesh.hyper_check import complete_settings
from paramesh.routing import PartitionLayout
from torch import optim

from paramesh_server.aggregate import TORCH_DTYPE

FUSED: dict[str, Callable[..., optim.Optimizer]] = {
    "SGD": optim.SGD,
    "Adam": optim.Adam,
    "AdamW": optim.AdamW,
    "Adagrad": optim.Adagrad,
}
"""Run as one native kernel per parameter, where torch has it for the dtype."""

LOOP: dict[str, Callable[..., optim.Optimizer]] = {
    "RMSprop": optim.RMSprop,
    "Rprop": optim.Rprop,
    "Adadelta": optim.Adadelta,
    "Adamax": optim.Adamax,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "ASGD": optim.ASGD,
}
"""Run as torch's single-tensor loop (foreach off)."""

REFUSED: dict[str, str] = {
    "Adafactor": "its factored moments need whole matrices, and a matrix may be cut",
    "Muon": "it orthogonalises whole matrices, and a matrix may be cut",
    "LBFGS": "it evaluates the closure several times within one step",
    "SparseAdam": "sparse gradients belong in paramesh.Embedding",
}
"""Known classes whose step is not elementwise, each with the reason that the user reads."""

Setting = hyper.Value
"""One of them: a number, a flag, a tuple of numbers or None."""

Settings = Mapping[str, Setting]
"""Hyper-parameters by torch's names."""


def optimizer_class(class_name: str) -> Callable[..., optim.Optimizer]:
    """The torch class of a name out of the fixed list.

    Raises:
        UnsupportedOptimizer: UNSUPPORTED_OPTIMIZER; says why, or names those that work.
    """
    found = FUSED.get(class_name) or LOOP.get(class_name)
    if found is None:
        why = REFUSED.get(class_name, "servers run only: " + ", ".join(sorted({*FUSED, *LOOP})))
        raise refuse(
            "UNSUPPORTED_OPTIMIZER", f"optimizer {class_name[:80]!r} is not supported: {why}", optimizer=class_name[:80]
        )
    return found


def check_settings(class_name: str, settings: Settings) -> dict[str, Setting]:
    """Hyper-parameters of a class, complete with its defaults, after torch's own checks.

    Args:
        class_name: one of the fixed list.
        settings: by torch's names; what only says how to compute is ignored.

    Raises:
        UnsupportedOptimizer: UNSUPPORTED_OPTIMIZER.
        RequestRefused: HYPER_PARAMETER; carries torch's own words.
    """
    return complete_settings(optimizer_class(class_name), settings)


@functools.cache
def _implementation(class_name: str, dtype: torch.dtype) -> dict[str, bool]:
    """The fixed implementation of a class for a dtype, by trying it once."""
    if class_name in FUSED:
        parameter = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        parameter.grad = torch.zeros(2, dtype=dtype)
        try:
            FUSED[class_name]([parameter], fused=True).step()
        except (RuntimeError, TypeError):
            return {"foreach": False}
        return {"fused": True}
    return {"foreach": False}


@dataclass(frozen=True, slots=True)
class SlotKind:
    """What one optimizer state is like."""

    scalar: bool
    """One number per tensor, such as `step`."""
    dtype: torch.dtype


def slot_kinds(class_name: str, settings: Settings, dtype: torch.dtype) -> dict[str, SlotKind]:
    """The states that a class keeps per parameter, seen by stepping a tiny one."""
    return _slot_kinds(class_name, tuple(sorted(settings.items())), dtype)


@functools.lru_cache(maxsize=256)
def _slot_kinds(class_name: str, settings: tuple[tuple[str, Setting], ...], dtype: torch.dtype) -> dict[str, SlotKind]:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    parameter.grad = torch.ones(2, dtype=dtype)
    optimizer = optimizer_class(class_name)([parameter], **_implementation(class_name, dtype), **dict(settings))
    optimizer.step()
    return {
        name: SlotKind(value.dim() == 0, value.dtype)
        for name, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }


@dataclass(frozen=True, slots=True)
class Slot:
    """One optimizer state of one segment."""

    name: str
    segment: int
    value: torch.Tensor
    """Shaped like the segment, or of no dimension (a scalar)."""


class PartitionOptimizer:
    """A torch optimizer over the segments of one partition."""

    def __init__(
        self, class_name: str, settings: Settings, views: Sequence[torch.Tensor], layout: PartitionLayout
    ) -> None:
        self.class_name = class_name
        self.settings: dict[str, Setting] = check_settings(class_name, settings)
        self._dtypes = [TORCH_DTYPE[segment.dtype] for segment in layout.segments]
        # Made outside any no_grad: the views share the partition's memory.
        self._parameters = [torch.nn.Parameter(view, requires_grad=True) for view in views]
        self.reset()

    def reset(self) -> None:
        """Forget all state: as freshly constructed."""
        groups: dict[tuple[tuple[str, bool], ...], list[torch.nn.Parameter]] = {}
        for parameter, dtype in zip(self._parameters, self._dtypes, strict=True):
            how = tuple(_implementation(self.class_name, dtype).items())
            groups.setdefault(how, []).append(parameter)
        make = optimizer_class(self.class_name)
        self._optimizers = [make(parameters, **dict(how), **self.settings) for how, parameters in groups.items()]
        self._owner = {
            id(parameter): optimizer
            for optimizer, parameters in zip(self._optimizers, groups.values(), strict=True)
            for parameter in parameters
        }

    def merged(self, changed: Settings) -> dict[str, Setting]:
        """The settings after a change, checked; changes nothing.

        Raises:
            RequestRefused: HYPER_PARAMETER.
        """
        return check_settings(self.class_name, {**self.settings, **changed})

    def configure(self, settings: dict[str, Setting]) -> None:
        """Put checked settings (from `merged`) into force."""
        self.settings = settings
        for optimizer in self._optimizers:
            optimizer.param_groups[0].update(settings)

    def step(self, gradients: Sequence[torch.Tensor], present: Sequence[bool]) -> None:
        """One optimizer step. A segment that is not present is left alone, as torch does.

        Args:
            gradients: one per segment, of its length and dtype; read only.
            present: which of them count.
        """
        chosen = [i for i, there in enumerate(present) if there]
        for batch in self._batches(chosen):
            for index in batch:
                self._parameters[index].grad = gradients[index]
            for optimizer in self._optimizers:
                optimizer.step()
            for index in batch:
                self._parameters[index].grad = None

    def _batches(self, chosen: list[int]) -> list[list[int]]:
        """Torch's fused SGD cannot mix parameters with and without a momentum buffer."""
        if self.class_name != "SGD" or not self.settings["momentum"]:
            return [chosen] if chosen else []
        fresh = [i for i in chosen if self._state(i).get("momentum_buffer") is None]
        known = [i for i in chosen if self._state(i).get("momentum_buffer") is not None]
        return [batch for batch in (fresh, known) if batch]

    def _state(self, segment: int) -> dict[str, Any]:
        parameter = self._parameters[segment]
        state: dict[str, Any] = self._owner[id(parameter)].state[parameter]
        return state

    def slots(self) -> Iterator[Slot]:
        """Every state, by segment and then by name."""
        for segment in range(len(self._parameters)):
            for name, value in sorted(self._state(segment).items()):
                if isinstance(value, torch.Tensor):
                    yield Slot(name, segment, value)

    @property
    def nbytes(self) -> int:
        """Bytes of all state."""
        return sum(slot.value.nbytes for slot in self.slots())

    def kinds(self, segment: int) -> dict[str, SlotKind]:
        """The states that a segment has once it has stepped."""
        return slot_kinds(self.class_name, self.settings, self._dtypes[segment])

    def has_state(self, segment: int) -> bool:
        """Whether a segment has any state yet."""
        return any(isinstance(value, torch.Tensor) for value in self._state(segment).values())

    def slot(self, segment: int, name: str) -> torch.Tensor:
        """A state to write into, made (as zeros) if it is not there.

        Raises:
            TensorMismatch: TENSOR_MISMATCH, if this optimizer keeps no such state.
        """
        kind = self.kinds(segment).get(name)
        if kind is None:
            raise refuse(
                "TENSOR_MISMATCH", f"{self.class_name} keeps no state {name[:80]!r} with these settings", slot=name[:80]
            )
        state = self._state(segment)
        if not isinstance(state.get(name), torch.Tensor):
            shape = () if kind.scalar else self._parameters[segment].shape
            state[name] = torch.zeros(shape, dtype=kind.dtype)
        value: torch.Tensor = state[name]
        return value
