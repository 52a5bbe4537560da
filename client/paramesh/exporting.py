"""A cluster's checkpoint as a plain state_dict: one safetensors file that needs no Paramesh.

    export_checkpoint("runs/1/checkpoint-000007", "net.safetensors")

    model.load_state_dict(safetensors.torch.load_file("net.safetensors"), strict=False)

It holds every parameter of the tables under its own name, and the buffers (BatchNorm's and
the like) that the checkpoint has of the chief. Nothing is computed and torch is not needed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors

from paramesh.archive import ClusterManifest, worker_file
from paramesh.errors import refuse
from paramesh.files import Folder, write_file
from paramesh.partition_file import name_of, read
from paramesh.routing import DTYPE_SIZE, cut, storage_elements
from paramesh.v1 import types_pb2 as pb

__all__ = ["export_checkpoint", "plain_tensors"]

_NAMES: dict[int, str] = {
    pb.DTYPE_FLOAT32: "F32",
    pb.DTYPE_FLOAT64: "F64",
    pb.DTYPE_FLOAT16: "F16",
    pb.DTYPE_BFLOAT16: "BF16",
    pb.DTYPE_COMPLEX64: "C64",
}

_OWN = "paramesh:cut:own:"


def export_checkpoint(checkpoint: str, path: str, *, group: str = "") -> dict[str, tuple[str, list[int]]]:
    """Write the parameters and buffers of a checkpoint as one safetensors file.

    Args:
        checkpoint: folder or URL of a checkpoint by the cluster.
        path: the file, local or a URL that fsspec knows; replaced at once.
        group: only the tables of this group; needed if two models share parameters' names.

    Returns:
        dtype and shape of each tensor, by name.

    Raises:
        StateRefused: NOT_FOUND, VERSION.
        RequestRefused: FORMAT, DAMAGED, PATH; DTYPE, if safetensors has no such type.
    """
    tensors = plain_tensors(checkpoint, group)
    write_file(path, b"".join(_file(tensors)))
    return {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}


def plain_tensors(checkpoint: str, group: str = "") -> dict[str, tuple[str, list[int], Any]]:
    """dtype, shape and bytes of each parameter and buffer, by name; as `export_checkpoint`."""
    folder = Folder(checkpoint)
    manifest = ClusterManifest.read(folder.open(), folder.path)
    tensors: dict[str, tuple[str, list[int], Any]] = {}
    for table in manifest.tables:
        if group and table.group != group:
            continue
        spec = pb.TableSpec.FromString(table.spec)
        for name, tensor in _of_table(folder, table.first_partition, spec).items():
            if name in tensors:
                raise refuse(
                    "FORMAT",
                    f"two groups have a parameter {name!r}: choose one with --group, of "
                    f"{', '.join(sorted({t.group for t in manifest.tables}))}",
                    name=name,
                )
            tensors[name] = tensor
    if not tensors:
        raise refuse("NOT_FOUND", f"{checkpoint} has no parameters" + (f" of group {group!r}" if group else ""))
    for name, buffer in _buffers(folder, manifest).items():
        tensors.setdefault(name, buffer)
    return tensors


def _of_table(folder: Folder, first: int, spec: pb.TableSpec) -> dict[str, tuple[str, list[int], Any]]:
    content = [bytearray(storage_elements(t) * _size(t)) for t in spec.tensors]
    for layout in cut(spec):
        where = name_of(first + layout.index)
        _, parts = read(folder.read(where), f"{folder.path}/{where}")
        values = memoryview(next(part.data for part in parts if not part.slot))
        if len(values) != layout.nbytes:
            raise refuse("DAMAGED", f"{folder.path}/{where} has {len(values)} bytes of values, not {layout.nbytes}")
        for segment in layout.segments:
            at = segment.start * DTYPE_SIZE[segment.dtype]
            content[segment.tensor][at : at + segment.nbytes] = values[segment.offset : segment.offset + segment.nbytes]
    return {t.name: (_dtype(t), list(t.shape), data) for t, data in zip(spec.tensors, content, strict=True)}


def _size(tensor: pb.TensorSpec) -> int:
    return {pb.DTYPE_COMPLEX64: 4, pb.DTYPE_COMPLEX128: 8}.get(tensor.dtype) or DTYPE_SIZE[tensor.dtype]


def _dtype(tensor: pb.TensorSpec) -> str:
    if tensor.dtype not in _NAMES:
        raise refuse("DTYPE", f"safetensors has no {pb.DType.Name(tensor.dtype)}, which {tensor.name!r} is")
    return _NAMES[tensor.dtype]


def _buffers(folder: Folder, manifest: ClusterManifest) -> dict[str, tuple[str, list[int], Any]]:
    """Buffers as the lowest rank had them; the layout is `paramesh.plain`'s: a document, then tensors."""
    keys = [key for key in manifest.workers if key.startswith(_OWN)]
    if not keys:
        return {}
    data = folder.read(worker_file(manifest.workers.index(keys[0]))).partition(b"\n")[2]
    try:
        (length,) = struct.unpack_from("<Q", data)
        models = json.loads(data[8 : 8 + length])["buffers"]
        stored = dict(safetensors.deserialize(data[8 + length :]))  # type: ignore[no-untyped-call]
        return {name: _stored(stored[form["v"]]) for model in models for name, form in model.items()}
    except (struct.error, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise refuse("DAMAGED", f"{folder.path}: the chief's own state cannot be read: {error}") from None


def _stored(body: Mapping[str, Any]) -> tuple[str, list[int], Any]:
    return body["dtype"], list(body["shape"]), body["data"]


def _file(tensors: Mapping[str, tuple[str, list[int], Any]]) -> Iterator[bytes]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, _, data in tensors.values():
        yield bytes(data)
