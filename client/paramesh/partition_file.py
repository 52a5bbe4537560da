"""A partition's state as one safetensors file, written as a stream and read strictly. Pure.

    for chunk in chunks(metadata, parts): ...           # bytes-like: header, then the parts
    metadata, parts = read(data, "partition-3.safetensors")

Any safetensors reader can open it: `values` and `state/SEGMENT/NAME` are bytes (U8) of the
partition's flat layout, `scalar/SEGMENT/NAME` one F64. What the bytes mean is in the
table's schema, in the manifest. Metadata are strings; `state` is a ReplicaState, base64.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
from google.protobuf.message import DecodeError

from paramesh.errors import ParameshError, refuse
from paramesh.v1 import replication_pb2 as rp

__all__ = ["Part", "chunks", "metadata_of", "name_of", "read", "state_of"]

VERSION = "1"

CHUNK = 4 << 20
"""Bytes handed to the file at once."""

_LENGTH = struct.Struct("<Q")
_NAME = re.compile(r"(state|scalar)/(0|[1-9][0-9]{0,8})/([A-Za-z0-9_]{1,80})")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the file: the values (slot ""), an optimizer state, or one number of it."""

    slot: str
    segment: int
    scalar: bool
    data: Any
    """A bytes-like; for a scalar its 8 bytes."""


def name_of(partition: int) -> str:
    """The file of a partition."""
    return f"partition-{partition}.safetensors"


def metadata_of(partition: int, state: rp.ReplicaState) -> dict[str, str]:
    """What the file says beside its tensors."""
    return {
        "paramesh": VERSION,
        "partition": str(partition),
        "lsn": str(state.lsn),
        "applied_step": str(state.applied_step),
        "state": base64.b64encode(state.SerializeToString(deterministic=True)).decode(),
    }


def chunks(metadata: Mapping[str, str], parts: Sequence[Part]) -> Iterator[Any]:
    """The file, piece by piece; nothing is copied."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for part in parts:
        size = len(part.data)
        header[_key(part)] = {
            "dtype": "F64" if part.scalar else "U8",
            "shape": [] if part.scalar else [size],
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield _LENGTH.pack(len(text)) + text
    for part in parts:
        view = memoryview(part.data)
        for begin in range(0, len(view), CHUNK):
            yield view[begin : begin + CHUNK]


def _key(part: Part) -> str:
    if part.scalar:
        return f"scalar/{part.segment}/{part.slot}"
    return f"state/{part.segment}/{part.slot}" if part.slot else "values"


def read(data: bytes, where: str) -> tuple[dict[str, str], list[Part]]:
    """What `chunks` wrote.

    Raises:
        RequestRefused: DAMAGED, these are not its bytes; VERSION, a newer Paramesh wrote it.
    """
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        (length,) = _LENGTH.unpack_from(data)
        metadata = json.loads(data[_LENGTH.size : _LENGTH.size + length]).get("__metadata__", {})
    except (safetensors.SafetensorError, struct.error, ValueError, RecursionError) as error:
        raise _damaged(where, str(error)) from None
    if metadata.get("paramesh") != VERSION:
        raise refuse("VERSION", f"{where} has layout {metadata.get('paramesh')!r}; this release reads {VERSION}")
    parts = [_part(name, body, where) for name, body in tensors]
    if sum(not part.slot for part in parts) != 1:
        raise _damaged(where, "it holds no values")
    return metadata, parts


def _part(name: str, body: Mapping[str, Any], where: str) -> Part:
    content = body["data"]
    if name == "values" and body["dtype"] == "U8":
        return Part("", 0, False, content)
    found = _NAME.fullmatch(name)
    scalar = found is not None and found[1] == "scalar"
    if found is None or body["dtype"] != ("F64" if scalar else "U8") or (scalar and len(content) != 8):
        raise _damaged(where, f"it holds {name[:80]!r}, {body['dtype']}")
    return Part(found[3], int(found[2]), scalar, content)


def state_of(metadata: Mapping[str, str], partition: int, where: str) -> rp.ReplicaState:
    """The state that the metadata carry.

    Raises:
        RequestRefused: DAMAGED, it is another partition's, or none.
    """
    try:
        state = rp.ReplicaState.FromString(base64.b64decode(metadata["state"], validate=True))
    except (KeyError, ValueError, binascii.Error, DecodeError) as error:
        raise _damaged(where, f"its state cannot be read: {error}") from None
    if metadata.get("partition") != str(partition):
        raise _damaged(where, f"it is partition {metadata.get('partition', '?')[:20]}, not {partition}")
    return state


def _damaged(where: str, why: str) -> ParameshError:
    return refuse("DAMAGED", f"{where} is not a partition's file: {why[:200]}", path=where)
