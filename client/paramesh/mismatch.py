"""How one worker's table differs from that of the others, in words for its user."""

from __future__ import annotations

from paramesh.errors import ParameshError, refuse
from paramesh.v1 import types_pb2


def first_difference(mine: types_pb2.TableSpec, theirs: types_pb2.TableSpec) -> ParameshError | None:
    """Returns the error that names the first difference of two schemas; None if they agree."""
    if mine.optimizer.class_name != theirs.optimizer.class_name:
        return refuse(
            "TENSOR_MISMATCH",
            f"table {mine.name!r} is trained with {theirs.optimizer.class_name} by the others, "
            f"with {mine.optimizer.class_name} here",
            table=mine.name,
        )
    for ours, other in zip(mine.tensors, theirs.tensors, strict=False):
        if ours != other:
            return refuse(
                "TENSOR_MISMATCH",
                f"this worker's model differs from the others': {_described(ours)} here, {_described(other)} there",
                table=mine.name,
                tensor=ours.name,
                expected=_described(other),
            )
    if len(mine.tensors) != len(theirs.tensors):
        longer = max(mine.tensors, theirs.tensors, key=len)
        extra = longer[min(len(mine.tensors), len(theirs.tensors))]
        where = "here" if longer is mine.tensors else "there"
        return refuse(
            "TENSOR_MISMATCH",
            f"table {mine.name!r} has {len(mine.tensors)} tensors here, {len(theirs.tensors)} with the others; "
            f"the first extra one is {_described(extra)}, {where}",
            table=mine.name,
            tensor=extra.name,
        )
    return None


def _described(tensor: types_pb2.TensorSpec) -> str:
    dtype = types_pb2.DType.Name(tensor.dtype).removeprefix("DTYPE_").lower()
    return f"{tensor.name} {list(tensor.shape)} {dtype}"
