"""Parameters as partitions: gradients out as lists of buffers, values in from frames.

    plan = TablePlan(name, group, parameters, optimizer_spec)   # cut as servers cut it
    plan.place(first_partition)                                 # once the coordinator has numbered them
    flats = host.flats([p.grad for p in plan.parameters])       # flat bytes, no copy on CPU
    presence, parts = plan.gather(partition, flats)             # what goes on the wire
    sink = Scatter(plans); sink.write(partition, offset, payload); sink.finish()

The wire order is logical row-major whatever the memory format, complex numbers are pairs of reals, and
every dtype is moved as bytes, so that bf16 needs no numpy type of its own. Contiguous CPU tensors are
neither copied on the way out nor on the way in: buffers are views of `p.grad` and of `p`.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from paramesh.errors import refuse
from paramesh.routing import DTYPE_SIZE, PartitionLayout, cut
from paramesh.v1 import types_pb2

Bytes = npt.NDArray[np.uint8]
DTYPES: dict[torch.dtype, types_pb2.DType.ValueType] = {
    torch.float32: types_pb2.DTYPE_FLOAT32,
    torch.float64: types_pb2.DTYPE_FLOAT64,
    torch.float16: types_pb2.DTYPE_FLOAT16,
    torch.bfloat16: types_pb2.DTYPE_BFLOAT16,
    torch.complex64: types_pb2.DTYPE_COMPLEX64,
    torch.complex128: types_pb2.DTYPE_COMPLEX128,
}
"""What a table can hold."""

_NUMPY = frozenset({torch.float32, torch.float64, torch.float16})
"""Those that numpy has too; complex ones go by way of real pairs."""


def tensor_spec(name: str, tensor: torch.Tensor) -> types_pb2.TensorSpec:
    """Returns the schema of a parameter.

    Raises:
        TensorMismatch: DTYPE, if tables cannot hold its dtype.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise refuse("DTYPE", f"parameter {name!r} is {tensor.dtype}; tables hold floats and complex numbers")
    return types_pb2.TensorSpec(name=name, shape=list(tensor.shape), dtype=dtype)


def flat_bytes(tensor: torch.Tensor) -> Bytes:
    """Returns a CPU tensor's elements, row-major, as bytes: a view if it is contiguous, else a copy.

    Args:
        tensor: Any shape, one of `DTYPES`. Lazy conjugates are resolved.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype in _NUMPY and tensor.is_contiguous() and not tensor.is_neg():
        # What nearly every gradient is; three calls instead of six, for models of 500 tensors.
        direct: Bytes = tensor.numpy().reshape(-1).view(np.uint8)
        return direct
    plain = tensor
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    array: Bytes = plain.resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array


class HostCopies:
    """Brings tensors to where bytes can be read: nothing to do on CPU, pinned buffers for GPUs."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}
        """Position -> pinned buffer of that tensor's shape; kept from step to step, since pinning is slow."""

    def flats(self, tensors: Sequence[torch.Tensor | None]) -> list[Bytes | None]:
        """Returns flat bytes per tensor, None where there is none.

        Copies from GPUs are queued first and waited for once per device.
        """
        on_host: list[torch.Tensor | None] = []
        devices: set[torch.device] = set()
        for position, tensor in enumerate(tensors):
            if tensor is None or tensor.device.type == "cpu":
                on_host.append(tensor)
                continue
            buffer = self._buffer(position, tensor)
            buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            if tensor.is_cuda:
                devices.add(tensor.device)
            on_host.append(buffer)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return [None if tensor is None else flat_bytes(tensor) for tensor in on_host]

    def _buffer(self, position: int, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(position)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[position] = buffer
        return buffer


class TablePlan:
    """One dense table: some parameters, and how they are cut.

    Args:
        name: The table's name, unique in the job.
        group: The table group that it steps with.
        named: Names and parameters in the order of the param group; empty tensors are left out,
            since no element of them can change.
        optimizer: What servers run on it.
        partition_bytes: Bound on one partition's values; None: the default (32 MiB).
    """

    def __init__(
        self,
        name: str,
        group: str,
        named: Sequence[tuple[str, torch.Tensor]],
        optimizer: types_pb2.OptimizerSpec,
        partition_bytes: int | None = None,
    ):
        kept = [(label, tensor) for label, tensor in named if tensor.numel()]
        self.names = [label for label, _ in kept]
        self.parameters = [tensor for _, tensor in kept]
        self.spec = types_pb2.TableSpec(
            name=name,
            group=group,
            tensors=[tensor_spec(label, tensor) for label, tensor in kept],
            optimizer=optimizer,
            partition_bytes=partition_bytes or 0,
        )
        self.layouts: tuple[PartitionLayout, ...] = cut(self.spec) if kept else ()
        self.table_id = 0
        """The coordinator's number of the table; 0 until `place`."""
        self.first_partition = 0
        """The number of its first partition; 0 until `place`."""

    def place(self, table_id: int, first_partition: int) -> None:
        """Takes note of the numbers that the coordinator gave."""
        self.table_id, self.first_partition = table_id, first_partition

    @property
    def partitions(self) -> range:
        """Ids of the table's partitions."""
        return range(self.first_partition, self.first_partition + len(self.layouts))

    def layout(self, partition: int) -> PartitionLayout:
        """Returns the flat layout of a partition by its id."""
        return self.layouts[partition - self.first_partition]

    def partitions_by_parameter(self) -> list[list[int]]:
        """Returns, per parameter, the ids of the partitions that hold a part of it."""
        found: list[list[int]] = [[] for _ in self.parameters]
        for partition in self.partitions:
            for segment in self.layout(partition).segments:
                if partition not in found[segment.tensor][-1:]:
                    found[segment.tensor].append(partition)
        return found

    def gather(self, partition: int, flats: Sequence[Bytes | None]) -> tuple[bytes, list[tuple[int, memoryview]]]:
        """Returns presence bits and the bytes of one partition.

        Args:
            partition: Its id.
            flats: Per parameter of the table its flat bytes, or None where it has no gradient.

        Returns:
            Presence, bit i (LSB first) set where segment i has bytes; and for each present segment
            its offset in the partition's flat layout and a view of its bytes.
        """
        segments = self.layout(partition).segments
        presence = bytearray(-(-len(segments) // 8))
        parts: list[tuple[int, memoryview]] = []
        for index, segment in enumerate(segments):
            flat = flats[segment.tensor]
            if flat is not None:
                presence[index >> 3] |= 1 << (index & 7)
                first = segment.start * DTYPE_SIZE[segment.dtype]
                parts.append((segment.offset, flat[first : first + segment.nbytes].data))
        return bytes(presence), parts


class Scatter:
    """Writes received frames into parameters.

    A contiguous CPU parameter is written in place, as frames arrive, on the thread they arrive on; others
    go through a buffer that `finish` copies, on the caller's thread.
    """

    def __init__(self, plans: Iterable[TablePlan]):
        self._plans = list(plans)
        self._targets: dict[int, tuple[int, Bytes]] = {}
        """id of parameter -> (its data_ptr when the view was made, flat bytes to write to)."""
        self._staged: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """id of parameter -> (parameter, buffer in row-major order) for those not written in place."""
        self._places: dict[int, tuple[list[int], list[tuple[int, int, int, torch.Tensor]]]] = {}
        """partition -> (segment offsets, (offset, first byte in the tensor, bytes, parameter))."""
        for plan in self._plans:
            for partition in plan.partitions:
                rows = [
                    (s.offset, s.start * DTYPE_SIZE[s.dtype], s.nbytes, plan.parameters[s.tensor])
                    for s in plan.layout(partition).segments
                ]
                self._places[partition] = ([row[0] for row in rows], rows)

    def prepare(self) -> None:
        """Looks at every parameter once, on the caller's thread: has it moved, can it be written in place?"""
        for plan in self._plans:
            for parameter in plan.parameters:
                known = self._targets.get(id(parameter))
                if known is None or known[0] != parameter.data_ptr():
                    self._targets[id(parameter)] = (parameter.data_ptr(), self._target(parameter))

    def _target(self, parameter: torch.Tensor) -> Bytes:
        self._staged.pop(id(parameter), None)
        if parameter.device.type == "cpu" and parameter.is_contiguous() and not parameter.is_neg():
            return flat_bytes(parameter)
        buffer = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
        self._staged[id(parameter)] = (parameter, buffer)
        return flat_bytes(buffer)

    def write(self, partition: int, offset: int, payload: memoryview) -> None:
        """Writes one frame's bytes, which start at `offset` of the partition's flat layout.

        Raises:
            RequestRefused: PAYLOAD_SIZE, if they reach beyond the partition.
        """
        offsets, rows = self._places[partition]
        source = np.frombuffer(payload, np.uint8)
        end = offset + source.nbytes
        if offset < 0 or end > (rows[-1][0] + rows[-1][2] + 63) // 64 * 64:
            raise refuse("PAYLOAD_SIZE", f"bytes {offset}..{end} lie outside partition {partition}")
        for place, first, nbytes, parameter in rows[max(0, bisect_right(offsets, offset) - 1) :]:
            if place >= end:
                break
            begin, stop = max(place, offset), min(place + nbytes, end)
            if begin < stop:
                target = self._targets[id(parameter)][1]
                target[first + begin - place : first + stop - place] = source[begin - offset : stop - offset]

    @torch.no_grad()
    def finish(self, parameters: Iterable[torch.Tensor] | None = None) -> None:
        """Makes what was written visible: copies buffers, and tells autograd that values changed.

        Args:
            parameters: Those whose values are complete; None: all.
        """
        devices: set[torch.device] = set()
        if parameters is None:
            parameters = [parameter for plan in self._plans for parameter in plan.parameters]
        for parameter in parameters:
            staged = self._staged.get(id(parameter))
            if staged is None:
                torch.autograd.graph.increment_version(parameter)
                continue
            parameter.copy_(staged[1], non_blocking=parameter.is_cuda)
            if parameter.is_cuda:
                devices.add(parameter.device)
        for device in devices:  # the buffers are written again by the next pull
            torch.cuda.current_stream(device).synchronize()


def named_parameters(model: Any, groups: Iterable[dict[str, Any]]) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """Returns per param group the parameters with their names in the model, tied ones once.

    A parameter that the model does not own (a learned temperature, say) is named by its place:
    `group.<group>.<position>`.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(id(parameter), wire_name(name))
    return [
        [(names.get(id(p), f"group.{index}.{position}"), p) for position, p in enumerate(group["params"])]
        for index, group in enumerate(groups)
    ]


def wire_name(name: str) -> str:
    """Returns a parameter's name as tables may hold it: `[A-Za-z0-9_.:/-]{1,256}`.

    torch.compile's `_orig_mod.` is cut off: compiled or not is one worker's own business. Other
    characters (a ModuleDict may have any) become `_`, and then, as in a name that is too long, a
    checksum of the original keeps names apart.
    """
    plain = name.replace("_orig_mod.", "")
    clean = re.sub(r"[^A-Za-z0-9_.:/-]", "_", plain)
    if clean == plain and len(clean) <= 256:
        return clean
    return f"{clean[:240]}:{zlib.crc32(plain.encode()):08x}"
