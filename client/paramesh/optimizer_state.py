"""Optimizer state between servers and torch's `state_dict`.

    with gathered_state(attachment): inner.state_dict()     # state lies in `inner.state` meanwhile
    load_into_cluster(attachment)                           # what `inner.load_state_dict` left there

Servers keep state per segment; torch keeps it per parameter. Elementwise states ("exp_avg") are put
together from the segments, scalar ones ("step") are the same in every segment of a parameter.
"""

from __future__ import annotations

import contextlib
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paramesh.encoded import SlotWrite, Snapshot
from paramesh.routing import DTYPE_SIZE
from paramesh.tensors import Bytes, TablePlan, flat_bytes

if TYPE_CHECKING:
    from paramesh.attachment import Attachment
    from paramesh.exchange import Exchange

State = dict[torch.Tensor, dict[str, Any]]


def hyper_parameters_only(inner: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns a state_dict with param groups and no state."""
    packed: dict[str, Any] = torch.optim.Optimizer.state_dict(_without_state(inner))
    return packed


def _without_state(inner: torch.optim.Optimizer) -> Any:
    bare = object.__new__(torch.optim.Optimizer)
    bare.__dict__.update(inner.__dict__)
    bare.state = defaultdict(dict)
    return bare


@contextlib.contextmanager
def gathered_state(attachment: Attachment) -> Iterator[None]:
    """Puts the servers' state into the inner optimizer for a while."""
    inner = attachment.inner
    kept = inner.state
    inner.state = defaultdict(dict)
    try:
        for exchange in attachment.main:
            inner.state.update(attachment.snapshot(exchange))
        yield
    finally:
        inner.state = kept


def state_of(exchange: Exchange, cuts: Mapping[int, Snapshot]) -> State:
    """Returns per parameter what the servers' snapshots hold of its optimizer state."""
    found: State = {}
    for table in exchange.tables:
        for partition in table.plan.partitions:
            _collect(table.plan, partition, cuts[partition], found)
    return found


def _collect(plan: TablePlan, partition: int, cut: Snapshot, found: State) -> None:
    segments = plan.layout(partition).segments
    scalar_dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    for (slot, index), number in cut.scalars.items():
        parameter = plan.parameters[segments[index].tensor]
        found.setdefault(parameter, {})[slot] = torch.tensor(number, dtype=scalar_dtype)
    for slot, pieces in cut.elements.items():
        if not slot:
            continue  # the values themselves
        for offset, data in pieces:
            _put(plan, partition, slot, offset, np.frombuffer(data, np.uint8), found)


def _put(plan: TablePlan, partition: int, slot: str, offset: int, data: Bytes, found: State) -> None:
    for segment in plan.layout(partition).segments:
        begin, stop = max(segment.offset, offset), min(segment.offset + segment.nbytes, offset + data.nbytes)
        if begin >= stop:
            continue
        parameter = plan.parameters[segment.tensor]
        state = found.setdefault(parameter, {})
        if slot not in state:
            state[slot] = torch.zeros(parameter.shape, dtype=parameter.dtype)
        first = segment.start * DTYPE_SIZE[segment.dtype] - segment.offset
        flat_bytes(state[slot])[first + begin : first + stop] = data[begin - offset : stop - offset]


def writes_of(exchange: Exchange, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> dict[int, list[SlotWrite]]:
    """Returns loaded optimizer state as writes, per partition; parameters without state have none."""
    writes: dict[int, list[SlotWrite]] = {}
    for table in exchange.tables:
        plan = table.plan
        for partition in plan.partitions:
            for index, segment in enumerate(plan.layout(partition).segments):
                slots = state.get(plan.parameters[segment.tensor], {})
                first = segment.start * DTYPE_SIZE[segment.dtype]
                for name, value in slots.items():
                    if not isinstance(value, torch.Tensor):
                        continue  # None: SGD's momentum buffer before its first step
                    if (value.dim() == 0 and plan.parameters[segment.tensor].dim() != 0) or name in SCALARS:
                        number = struct.pack("<d", float(value))
                        write = SlotWrite(number, slot=name, segment=index, scalar=True)
                    else:
                        flat = flat_bytes(value.to(plan.parameters[segment.tensor].dtype).cpu())
                        write = SlotWrite(flat[first : first + segment.nbytes].data, offset=segment.offset, slot=name)
                    writes.setdefault(partition, []).append(write)
    return writes


SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
"""States that torch keeps as one number per parameter; a scalar parameter's others have no dimension either."""


def load_into_cluster(attachment: Attachment) -> None:
    """Moves the state that lies in the inner optimizer to the servers; every worker calls it.

    Before the first step it is kept, and the owner of first values writes it beside them.
    """
    inner = attachment.inner
    state: State = dict(inner.state)
    inner.state.clear()
    attachment.take_loaded(state)
    for exchange in attachment.main:
        if exchange.position is not None:
            attachment.assign(exchange, writes_of(exchange, state))


def first_values_with(exchange: Exchange, state: State) -> Callable[[int], dict[int, list[SlotWrite]]]:
    """Returns what an owner of first values writes when state was loaded before."""

    def initialise(init_attempt: int) -> dict[int, list[SlotWrite]]:
        values, extra = exchange.values_to_assign(init_attempt), writes_of(exchange, state)
        return {partition: values[partition] + extra.get(partition, []) for partition in values}

    return initialise
