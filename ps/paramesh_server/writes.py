"""Writing values and optimizer state into a partition, all or nothing. Pure.

    plan = plan_writes(layout, optimizer, writes, whole_values=True)    # refuses, changes nothing
    plan.apply(values, optimizer)

An assign may bring values (slot ""), elementwise states ("exp_avg") and scalar ones
("step"). Everything is checked before the first byte is written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from paramesh.errors import refuse
from paramesh.routing import DTYPE_SIZE, PartitionLayout

from paramesh_server.aggregate import TORCH_DTYPE
from paramesh_server.optimizer import PartitionOptimizer
from paramesh_server.staging import FrameBytes, check_frame

VALUES = ""
"""The slot that means the parameters themselves."""


@dataclass(frozen=True, slots=True)
class SlotFrame:
    """One received assign frame."""

    frame: FrameBytes
    slot: str
    segment: int = 0
    """For scalars."""
    scalar: bool = False


@dataclass(frozen=True, slots=True)
class _Copy:
    """A run of elements of one segment to be overwritten."""

    segment: int
    slot: str
    begin: int
    data: torch.Tensor


@dataclass
class Plan:
    """What an assign will write; made whole before anything is written."""

    copies: list[_Copy] = field(default_factory=list)
    scalars: dict[tuple[int, str], float] = field(default_factory=dict)

    def apply(self, values: Sequence[torch.Tensor], optimizer: PartitionOptimizer) -> None:
        """Write. Cannot refuse: `plan_writes` has looked at everything."""
        for copy in self.copies:
            target = values[copy.segment] if copy.slot == VALUES else optimizer.slot(copy.segment, copy.slot)
            target.detach()[copy.begin : copy.begin + len(copy.data)].copy_(copy.data)
        for (segment, slot), number in self.scalars.items():
            optimizer.slot(segment, slot).fill_(number)

    def slots_of(self, segment: int) -> dict[str, int]:
        """Slot -> elements written of one segment's optimizer state."""
        written: dict[str, int] = {slot: 1 for at, slot in self.scalars if at == segment}
        for copy in self.copies:
            if copy.segment == segment and copy.slot != VALUES:
                written[copy.slot] = written.get(copy.slot, 0) + len(copy.data)
        return written


def plan_writes(
    layout: PartitionLayout, optimizer: PartitionOptimizer, writes: Sequence[SlotFrame], *, whole_values: bool
) -> Plan:
    """Check an assign and lay out what it will write.

    Args:
        layout: the partition's.
        optimizer: the partition's, for which states exist.
        writes: all frames of the assign.
        whole_values: first values must cover every element.

    Raises:
        TensorMismatch: PAYLOAD_SIZE or TENSOR_MISMATCH.
    """
    plan = Plan()
    for write in writes:
        if write.scalar:
            _plan_scalar(layout, optimizer, write, plan)
        elif write.frame.length:
            _plan_elements(layout, write, plan)
    _check_overlap(plan)
    written = sum(len(copy.data) for copy in plan.copies if copy.slot == VALUES)
    if whole_values and written != sum(segment.length for segment in layout.segments):
        raise refuse("PAYLOAD_SIZE", f"first values bring {written} elements, not the whole partition")
    for segment in range(len(layout.segments)):
        _check_state(layout, optimizer, plan, segment)
    return plan


def _plan_scalar(layout: PartitionLayout, optimizer: PartitionOptimizer, write: SlotFrame, plan: Plan) -> None:
    if write.segment >= len(layout.segments) or len(write.frame.payload) != 8:
        raise refuse(
            "PAYLOAD_SIZE", f"scalar {write.slot[:80]!r} of segment {write.segment}: no such segment, or not 8 bytes"
        )
    kind = optimizer.kinds(write.segment).get(write.slot)
    if kind is None or not kind.scalar:
        raise refuse("TENSOR_MISMATCH", f"{optimizer.class_name} keeps no scalar state {write.slot[:80]!r}")
    plan.scalars[write.segment, write.slot] = struct.unpack("<d", write.frame.payload)[0]


def _plan_elements(layout: PartitionLayout, write: SlotFrame, plan: Plan) -> None:
    """Split one frame at the segments that it covers; padding in between is dropped."""
    check_frame(layout, write.frame)
    low, high = write.frame.offset, write.frame.offset + write.frame.length
    for index, segment in enumerate(layout.segments):
        begin, end = max(low, segment.offset), min(high, segment.offset + segment.nbytes)
        if begin >= end:
            continue
        size = DTYPE_SIZE[segment.dtype]
        if (end - begin) % size:
            raise refuse("PAYLOAD_SIZE", f"a frame ends inside an element of segment {index}", segment=index)
        data = torch.frombuffer(
            write.frame.payload, dtype=TORCH_DTYPE[segment.dtype], count=(end - begin) // size, offset=begin - low
        )
        plan.copies.append(_Copy(index, write.slot, (begin - segment.offset) // size, data))


def _check_overlap(plan: Plan) -> None:
    """Two writes of one element would make the result depend on their order."""
    ends: dict[tuple[int, str], int] = {}
    for copy in sorted(plan.copies, key=lambda c: (c.segment, c.slot, c.begin)):
        if copy.begin < ends.get((copy.segment, copy.slot), 0):
            raise refuse("PAYLOAD_SIZE", f"two frames write {copy.slot or 'values'!r} of segment {copy.segment}")
        ends[copy.segment, copy.slot] = copy.begin + len(copy.data)


def _check_state(layout: PartitionLayout, optimizer: PartitionOptimizer, plan: Plan, segment: int) -> None:
    """A segment without state must get all of it: torch makes it all at once, or not at all."""
    written = plan.slots_of(segment)
    if not written:
        return
    kinds = optimizer.kinds(segment)
    unknown = [slot for slot in written if slot not in kinds]
    if unknown:
        raise refuse(
            "TENSOR_MISMATCH", f"{optimizer.class_name} keeps no state {unknown[0][:80]!r}", slot=unknown[0][:80]
        )
    mixed = [copy.slot for copy in plan.copies if copy.segment == segment and copy.slot and kinds[copy.slot].scalar]
    if mixed:
        raise refuse("TENSOR_MISMATCH", f"state {mixed[0]!r} is one number per tensor", slot=mixed[0])
    if optimizer.has_state(segment):
        return
    length = layout.segments[segment].length
    for slot, kind in kinds.items():
        need = 1 if kind.scalar else length
        if written.get(slot, 0) != need:
            raise refuse(
                "TENSOR_MISMATCH",
                f"segment {segment} has no state yet and gets {written.get(slot, 0)} of {need} elements of {slot!r}",
                slot=slot,
            )


@dataclass(frozen=True, slots=True)
class SlotBytes:
    """One slot of one cut, as bytes in the flat layout or as one number."""

    slot: str
    segment: int
    scalar: bool
    offset: int
    data: memoryview
    """A view of live memory: encode it before the partition changes."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.detach().view(torch.uint8).numpy().data


def cut_slots(layout: PartitionLayout, flat: torch.Tensor, optimizer: PartitionOptimizer) -> Iterator[SlotBytes]:
    """Everything that a snapshot holds: values, then each state by segment and name."""
    yield SlotBytes(VALUES, 0, False, 0, tensor_bytes(flat))
    for slot in optimizer.slots():
        if slot.value.dim() == 0:
            number = memoryview(struct.pack("<d", float(slot.value)))
            yield SlotBytes(slot.name, slot.segment, True, 0, number)
        else:
            offset = layout.segments[slot.segment].offset
            yield SlotBytes(slot.name, slot.segment, False, offset, tensor_bytes(slot.value))
