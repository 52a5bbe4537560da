"""Noticing that parameters were edited outside the optimizer.

    edits.begin(); edits.note(partition, frame) ...; edits.remember()     # around a pull
    edits.check()                                                         # at the next step

What a pull brought is the truth; whoever edits `p` afterwards would see the edit undone by the next
pull. Looking at every byte would cost a pass over the model each step, so there are two cheap looks
first (has autograd's version counter or the storage moved, do 16 samples spread over the tensor still
read the same, which catches `p.data.clamp_()`), and only what looks different is held against the
checksums that came with the pulled frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paramesh.errors import refuse
from paramesh.framing import checksum
from paramesh.tensors import Bytes, HostCopies, TablePlan, flat_bytes
from paramesh.v1 import types_pb2

SAMPLES = 16
"""Places looked at in each tensor: an edit of all elements is found for certain, one of a single
element of a large tensor through `.data` is not, and costs nothing but being undone."""


@dataclass
class _Look:
    """One parameter as it was after the last pull."""

    version: int
    pointer: int
    samples: Bytes | None
    """A strided view of its bytes, for contiguous CPU parameters."""
    seen: bytes
    """What the samples read."""


class Edits:
    """Remembers what was pulled into some tables' parameters."""

    def __init__(self, plans: Sequence[TablePlan]):
        self._plans = plans
        self._frames: dict[int, list[types_pb2.Frame]] = {}
        """partition -> frames of the last pull, for their checksums."""
        self._looks: list[list[_Look]] = []
        """Per table and parameter; kept from step to step, refreshed by `remember`."""
        self._armed = False
        """Whether `_looks` describe what the last pull brought."""

    def begin(self) -> None:
        """A pull starts: forget the one before."""
        self._frames.clear()
        self._armed = False

    def note(self, partition: int, frame: types_pb2.Frame) -> None:
        """A frame of the pull arrived and was written."""
        self._frames.setdefault(partition, []).append(frame)

    def remember(self) -> None:
        """The pull is complete: look at every parameter."""
        if not self._looks:
            self._looks = [[_look(parameter) for parameter in plan.parameters] for plan in self._plans]
        else:
            for plan, looks in zip(self._plans, self._looks, strict=True):
                for index, parameter in enumerate(plan.parameters):
                    looks[index] = _again(looks[index], parameter)
        self._armed = True

    def forget(self) -> None:
        """Edits are meant (an assignment): the next check passes."""
        self._armed = False

    def check(self) -> None:
        """Compares parameters with what was pulled.

        Raises:
            ParametersChanged: PARAMETERS_CHANGED, naming the first edited parameter.
        """
        for plan, looks in zip(self._plans, self._looks if self._armed else [], strict=False):
            touched = [i for i, look in enumerate(looks) if _moved(look, plan.parameters[i])]
            if not touched:
                continue
            holders = plan.partitions_by_parameter()
            flats = HostCopies().flats(plan.parameters)
            for index in touched:
                if any(self._differs(plan, partition, flats) for partition in holders[index]):
                    raise refuse(
                        "PARAMETERS_CHANGED",
                        f"parameter {plan.names[index]!r} was edited outside the optimizer since the last "
                        "step; the servers do not know, and the next pull would undo it. If it is meant, "
                        "call paramesh.assign(model) on every worker after the edit",
                        parameter=plan.names[index],
                    )
                looks[index] = _look(plan.parameters[index])

    def _differs(self, plan: TablePlan, partition: int, flats: Sequence[Bytes | None]) -> bool:
        flat = partition_bytes(plan, partition, flats)
        for frame in self._frames.get(partition, ()):
            if frame.codec == types_pb2.CODEC_NONE:
                piece = flat[frame.offset : frame.offset + frame.length].data
                if checksum((piece,), frame.checksum_kind) != frame.checksum:
                    return True
        return False


def partition_bytes(plan: TablePlan, partition: int, flats: Sequence[Bytes | None]) -> Bytes:
    """Returns the flat layout of one partition with zeros between segments; a copy."""
    flat = np.zeros(plan.layout(partition).nbytes, np.uint8)
    _, parts = plan.gather(partition, flats)
    for offset, view in parts:
        flat[offset : offset + view.nbytes] = view
    return flat


def _look(parameter: torch.Tensor) -> _Look:
    samples = None
    if parameter.device.type == "cpu" and parameter.is_contiguous():
        samples = _strided(flat_bytes(parameter))
    seen = b"" if samples is None else samples.tobytes()
    return _Look(parameter._version, parameter.data_ptr(), samples, seen)


def _again(look: _Look, parameter: torch.Tensor) -> _Look:
    if look.pointer != parameter.data_ptr():
        return _look(parameter)
    look.version = parameter._version
    if look.samples is not None:
        look.seen = look.samples.tobytes()
    return look


def _strided(flat: Bytes) -> Bytes:
    # Whole words: the low bytes of a float change with any edit, the high ones may not.
    words = flat[: len(flat) // 8 * 8].reshape(-1, 8) if len(flat) >= 8 else flat
    return words[:: max(1, len(words) // SAMPLES)]


def _moved(look: _Look, parameter: torch.Tensor) -> bool:
    if look.version != parameter._version or look.pointer != parameter.data_ptr():
        return True
    return look.samples is not None and look.samples.tobytes() != look.seen
