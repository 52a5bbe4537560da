"""Nested Python values and tensors as bytes, without pickle. Pure.

    data = pack({"last_epoch": 7, "betas": (0.9, 0.99), "ema": tensor})
    value = unpack(data)

Allowed: None, bool, int, float (also inf and NaN), str, bytes, list, tuple, set, dict,
OrderedDict, Counter, defaultdict (comes back as a dict), torch.Size, torch tensors and
numpy arrays and scalars. Anything else is refused by its path in the value: bytes that come
from another process must never be able to run code here.

The bytes are a JSON document (its length first, 8 bytes little-endian) followed by a
safetensors file of the tensors in it.
"""

from __future__ import annotations

import base64
import collections
import json
import math
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from paramesh.errors import ParameshError, refuse

__all__ = ["from_document", "pack", "to_document", "unpack"]

_LENGTH = struct.Struct("<Q")

DEPTH = 64
"""Levels of nesting; deeper is a cycle or an attack on the reader's stack."""

_MAPPINGS: dict[type, str] = {dict: "dict", collections.OrderedDict: "OrderedDict", collections.Counter: "Counter"}
_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "Size"}
_MAKERS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": lambda pairs: collections.Counter(dict(pairs)),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Size": lambda numbers: torch.Size(list(numbers)),
}


def pack(value: Any) -> bytes:
    """Turn a value into bytes.

    Raises:
        RequestRefused: FORMAT, naming the path of what is not allowed.
    """
    tensors: dict[str, torch.Tensor] = {}
    document = json.dumps(to_document(value, tensors), separators=(",", ":"), allow_nan=False).encode()
    return _LENGTH.pack(len(document)) + document + (safetensors.torch.save(tensors) if tensors else b"")


def unpack(data: bytes) -> Any:
    """Turn `pack`'s bytes back into the value.

    Raises:
        RequestRefused: FORMAT, if they are anything else.
    """
    try:
        (length,) = _LENGTH.unpack_from(data)
        end = _LENGTH.size + length
        if end > len(data):
            raise _unreadable("it is shorter than it says")
        document = json.loads(data[_LENGTH.size : end])
        tensors = safetensors.torch.load(data[end:]) if len(data) > end else {}
    except (struct.error, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise _unreadable(str(error)) from None
    return from_document(document, tensors)


def _unreadable(why: str) -> ParameshError:
    return refuse("FORMAT", f"not a value that paramesh packed: {why}")


# ---------------------------------------------------------------------- writing


def to_document(value: Any, tensors: dict[str, torch.Tensor], path: str = "value", depth: int = 0) -> Any:
    """The JSON form of a value; its tensors are added to `tensors` under their paths.

    Args:
        value: anything that the module's text allows.
        tensors: filled with contiguous CPU copies.
        path: of the value, for errors and for the tensors' names.
        depth: levels above it.

    Raises:
        RequestRefused: FORMAT, naming the path of what is not allowed.
    """
    if depth > DEPTH:
        raise refuse("FORMAT", f"{path} is nested deeper than {DEPTH} levels", path=path)
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"~": "float", "v": repr(float(value))}
    if kind is bytes:
        return {"~": "bytes", "v": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return _tensor(value, tensors, path)
    if kind is list:
        return [to_document(v, tensors, f"{path}.{i}", depth + 1) for i, v in enumerate(value)]
    if kind in _SEQUENCES:
        return {
            "~": _SEQUENCES[kind],
            "v": [to_document(v, tensors, f"{path}.{i}", depth + 1) for i, v in enumerate(value)],
        }
    if kind in _MAPPINGS or isinstance(value, collections.defaultdict):
        return _mapping(value, tensors, path, depth)
    raise refuse(
        "FORMAT",
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which cannot be kept; plain numbers, strings, "
        "lists, tuples, dicts and tensors can",
        path=path,
        type=kind.__qualname__,
    )


def _tensor(value: Any, tensors: dict[str, torch.Tensor], path: str) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        form, tensor = "tensor", value.detach().cpu()
    else:
        form, array = ("array" if isinstance(value, np.ndarray) else "scalar"), np.asarray(value)
        try:
            tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape).copy())
        except TypeError:
            raise refuse("FORMAT", f"{path} is a numpy {array.dtype}, which cannot be kept", path=path) from None
    if tensor.is_sparse or tensor.is_quantized:
        raise refuse("FORMAT", f"{path} is a sparse or quantised tensor, which cannot be kept", path=path)
    pairs = tensor.is_complex()
    name = f"{len(tensors)}:{path}"
    tensors[name] = (torch.view_as_real(tensor) if pairs else tensor).contiguous().clone()
    return {"~": form, "v": name, "complex": pairs}


def _mapping(value: Any, tensors: dict[str, torch.Tensor], path: str, depth: int) -> Any:
    plain = type(value) is dict and all(type(key) is str for key in value) and "~" not in value
    if plain:
        return {k: to_document(v, tensors, f"{path}.{k}", depth + 1) for k, v in value.items()}
    pairs = []
    for key, item in value.items():
        if not (key is None or type(key) in (bool, int, float, str, tuple)):
            raise refuse("FORMAT", f"{path} has a key of type {type(key).__qualname__}: {key!r:.80}", path=path)
        pairs.append(
            [
                to_document(key, tensors, f"{path}.key", depth + 1),
                to_document(item, tensors, f"{path}.{key}", depth + 1),
            ]
        )
    return {"~": _MAPPINGS.get(type(value), "dict"), "v": pairs}


# ---------------------------------------------------------------------- reading


def from_document(document: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value of a JSON form.

    Raises:
        RequestRefused: FORMAT, if it is not one that `to_document` makes of these tensors.
    """
    try:
        return _read(document, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # RecursionError is one
        raise _unreadable(f"{type(error).__name__}: {error}") from None


def _read(document: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(document, list):
        return [_read(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    if "~" not in document:
        return {key: _read(item, tensors) for key, item in document.items()}
    form, body = document["~"], document["v"]
    if form == "float":
        return float(body)
    if form == "bytes":
        return base64.b64decode(body, validate=True)
    if form in ("tensor", "array", "scalar"):
        tensor = tensors[body]
        tensor = torch.view_as_complex(tensor) if document.get("complex") else tensor
        return tensor if form == "tensor" else tensor.numpy() if form == "array" else tensor.numpy()[()]
    if form in ("dict", "OrderedDict", "Counter"):
        return _MAKERS[form]((_read(key, tensors), _read(item, tensors)) for key, item in body)
    return _MAKERS[form](_read(item, tensors) for item in body)
