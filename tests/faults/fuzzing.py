"""Messages that no client of ours would send, for every call of every service: built, and mutated.

for call in calls(): ...                      # every RPC of the descriptors
data.draw(built(call))                        # bytes of a well-formed message with wild fields
data.draw(mutated(valid))                     # bytes of a valid one, changed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from paramesh.v1 import (
    checkpoint_pb2,
    coordinator_pb2,
    ledger_pb2,
    parameter_server_pb2,
    recovery_pb2,
    replication_pb2,
)

DEPTH = 3
"""Of messages within messages: deeper ones are recursion of the same few types."""

EXTREMES = [0, 1, 2, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**31), -(2**63)]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e30, 1e308, float("inf"), float("-inf"), float("nan"), 5e-324]
TEXTS = ["", "default", "t", "w", "a b", "../x", "x" * 300, "\n", "caf\u00e9", "server-0", "127.0.0.1:1", "0.0.0.0:0"]
BLOBS = [b"", b"\0", b"\xff" * 9, b"x" * 32, b"x" * 4096]

_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1), FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SFIXED32: (-(2**31), 2**31 - 1), FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1), FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SINT64: (-(2**63), 2**63 - 1), FieldDescriptor.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1), FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_ENUM: (0, 2**31 - 1),
}  # fmt: skip


@dataclass(frozen=True)
class Rpc:
    """One call of the contract."""

    service: str
    name: str
    request: Any
    """The message type."""
    many: bool
    """The request is a stream."""
    streams: bool
    """The answer is one."""

    @property
    def path(self) -> str:
        """As gRPC spells it."""
        return f"/paramesh.v1.{self.service}/{self.name}"


def calls() -> Iterator[Rpc]:
    """Every RPC of every service."""
    for module in (parameter_server_pb2, ledger_pb2, coordinator_pb2, replication_pb2, checkpoint_pb2, recovery_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                request = GetMessageClass(method.input_type)
                yield Rpc(service.name, method.name, request, method.client_streaming, method.server_streaming)


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type in _INTEGERS:
        low, high = _INTEGERS[field.type]
        return st.sampled_from([n for n in EXTREMES if low <= n <= high]) | st.integers(low, high)
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return st.sampled_from(FLOATS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(TEXTS)
    return st.sampled_from(BLOBS)


@st.composite
def built(draw: st.DrawFn, kind: Any, header: Any = None, depth: int = DEPTH) -> Any:
    """A message of a type with some of its fields set to something.

    Args:
        draw: Hypothesis'.
        kind: the message type.
        header: a right `RequestHeader`, used for most of the messages: else few would pass its check.
        depth: of messages within it.
    """
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.full_name == "paramesh.v1.RequestHeader":
            if header is not None and draw(st.integers(0, 9)):
                getattr(message, field.name).CopyFrom(header)
            continue
        if draw(st.booleans()):
            _fill(draw, message, field, header, depth)
    return message


def _fill(draw: st.DrawFn, message: Any, field: FieldDescriptor, header: Any, depth: int) -> None:
    entry = field.message_type is not None and field.message_type.GetOptions().map_entry
    if entry:
        return  # maps are in snapshots only, and their entries are scalars
    if field.message_type is None:
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_scalar(field), max_size=3)))
        else:
            setattr(message, field.name, draw(_scalar(field)))
    elif depth:
        inner = GetMessageClass(field.message_type)
        if field.is_repeated:
            for _ in range(draw(st.integers(0, 2))):
                getattr(message, field.name).add().CopyFrom(draw(built(inner, header, depth - 1)))
        else:
            getattr(message, field.name).CopyFrom(draw(built(inner, header, depth - 1)))


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes of a valid message with some changed, cut, repeated or put in."""
    data = bytearray(valid or b"\0")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        act = draw(st.sampled_from(["flip", "cut", "double", "insert", "huge"]))
        if act == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif act == "cut":
            del data[at:]
        elif act == "double":
            data[at:at] = data[at : at + 16]
        elif act == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            data[at:at] = b"\xff\xff\xff\xff\x0f"  # a length of 4 GiB
    return bytes(data)
