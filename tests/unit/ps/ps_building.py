"""What the server's unit tests build with: tables, contributions, records, a slow reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import torch
from paramesh import hyper, routing
from paramesh.framing import checksum
from paramesh.routing import PartitionLayout
from paramesh.v1 import types_pb2 as pb
from paramesh_server.aggregate import TORCH_DTYPE
from paramesh_server.partition import Partition
from paramesh_server.requests import StagedAt
from paramesh_server.staging import Budget, Contribution, FrameBytes, assemble
from paramesh_server.writes import SlotFrame

GROUP = 7
"""The group's number in all tests: not 0, not 1, so that a forgotten one shows."""

DTYPES = {
    "fp32": pb.DTYPE_FLOAT32,
    "fp64": pb.DTYPE_FLOAT64,
    "fp16": pb.DTYPE_FLOAT16,
    "bf16": pb.DTYPE_BFLOAT16,
}


def table(
    lengths: Sequence[int],
    optimizer: str = "SGD",
    settings: Mapping[str, hyper.Value] | None = None,
    dtype: int = pb.DTYPE_FLOAT32,
    partition_bytes: int = 0,
) -> pb.TableSpec:
    """A table of flat tensors."""
    return pb.TableSpec(
        name="g/0",
        group="g",
        tensors=[pb.TensorSpec(name=f"t{i}", shape=[n], dtype=dtype) for i, n in enumerate(lengths)],
        optimizer=pb.OptimizerSpec(
            class_name=optimizer, hyper_parameters=hyper.to_protos({"lr": 0.5} if settings is None else settings)
        ),
        partition_bytes=partition_bytes,
    )


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy().data)


def frame(offset: int, data: bytes) -> FrameBytes:
    """A received frame, at an odd address as real ones are."""
    return FrameBytes(offset, len(data), memoryview(b"?" * 5 + data)[5:], checksum((data,)))


def presence_bits(present: Sequence[bool]) -> bytes:
    """Presence as it travels."""
    if all(present):
        return b""
    return sum(1 << i for i, there in enumerate(present) if there).to_bytes((len(present) + 7) // 8, "little")


def contribution(
    layout: PartitionLayout, gradients: Sequence[torch.Tensor | None], frame_bytes: int = 0
) -> Contribution:
    """One gradient per segment (None: absent), in frames of at most `frame_bytes`."""
    frames = []
    for segment, gradient in zip(layout.segments, gradients, strict=True):
        if gradient is None:
            continue
        data = raw(gradient.to(TORCH_DTYPE[segment.dtype]))
        step = frame_bytes or len(data)
        frames += [frame(segment.offset + at, data[at : at + step]) for at in range(0, len(data), step)]
    return assemble(layout, presence_bits([g is not None for g in gradients]), frames)


def random_gradients(layout: PartitionLayout, seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    """Normal numbers, one tensor per segment."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(s.length, generator=generator, dtype=torch.float64) * scale).to(TORCH_DTYPE[s.dtype])
        for s in layout.segments
    ]


def record(
    step: int, contributors: Sequence[tuple[int, float]], *, mean: bool = True, attempt: int = 1, **fields: object
) -> pb.StepRecord:
    """A decision: (client, weight) in rank order."""
    return pb.StepRecord(
        group=GROUP,
        step=step,
        contributors=[
            pb.Contributor(client_id=client, rank=rank, weight=weight, attempt=attempt)
            for rank, (client, weight) in enumerate(contributors)
        ],
        loss_reduction=pb.LOSS_REDUCTION_MEAN if mean else pb.LOSS_REDUCTION_SUM,
        **fields,  # type: ignore[arg-type]
    )


def fresh(spec: pb.TableSpec, index: int = 0, budget: int = 1 << 30) -> Partition:
    """A partition without values."""
    layout = routing.cut(spec)[index]
    return Partition(index + 1, 1, layout, spec, epoch=1, budget=Budget(budget))


def value_writes(layout: PartitionLayout, values: Sequence[torch.Tensor]) -> list[SlotFrame]:
    """An assign of all values."""
    return [SlotFrame(frame(s.offset, raw(v)), "") for s, v in zip(layout.segments, values, strict=True)]


def ready(spec: pb.TableSpec, index: int = 0, seed: int = 1, budget: int = 1 << 30) -> Partition:
    """A partition with random first values."""
    partition = fresh(spec, index, budget)
    values = random_gradients(partition.layout, seed)
    partition.assign(1, 1, value_writes(partition.layout, values), init_attempt=1)
    return partition


def stage(partition: Partition, client: int, gradients: Sequence[torch.Tensor | None], step: int = 0) -> None:
    """Put one contribution of attempt 1."""
    partition.stage(client, StagedAt(GROUP, step, 1), contribution(partition.layout, gradients))


def reference_sum(
    gradients: Sequence[numpy.ndarray | None],
    weights: Sequence[float],
    *,
    mean: bool,
    clip: float | None,
    wide: type[numpy.floating],
) -> numpy.ndarray | None:
    """Section 10 of the protocol, one element at a time, in numpy's scalars: no fma possible."""
    present = [(g, w) for g, w in zip(gradients, weights, strict=True) if g is not None]
    if not present:
        return None
    out = numpy.empty(len(present[0][0]), dtype=wide)
    for i in range(len(out)):
        accumulator = None
        for gradient, weight in present:
            term = wide(gradient[i]) * wide(weight) if mean else wide(gradient[i])
            accumulator = term if accumulator is None else accumulator + term
        if mean:
            accumulator = accumulator / wide(sum(weights))
        if clip is not None:
            accumulator = accumulator * wide(numpy.float32(clip))
        out[i] = accumulator
    return out
