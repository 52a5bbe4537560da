"""How a table is cut into partitions, and where each partition is. Pure.

    layouts = cut(spec)                 # the same everywhere: client, server, coordinator
    routes = Routes(partition_map)
    node, epoch = routes.primary(layouts_first_id)

A table's tensors are laid end to end, each at a multiple of 64 elements, and the line is
cut into partitions of nearly equal bytes at multiples of 64 elements from a tensor's
start. The number of partitions follows from bytes, never from the number of servers, so
that a checkpoint fits any cluster and a sum does not depend on placement.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from paramesh.errors import ParameshError, PartitionOffline, refuse
from paramesh.v1 import types_pb2 as pb

ALIGN = 64
"""Elements. Cuts fall on multiples of it, so that neither SIMD width nor a cut changes a
bit of an elementwise optimizer (torch's vector loops and their scalar tails differ)."""

ALIGN_BYTES = 64
"""Bytes. Every segment starts at a multiple: a cache line, and the widest SIMD load."""

PARTITION_BYTES = 32 << 20
"""Default bound on one partition's values: small enough that a move takes well under a
second and that a server pipelines several, large enough that metadata stays in KBs."""

MAX_ELEMENTS = 1 << 40
"""A tensor above this is refused: 4 TiB of fp32 is a mistake, not a model."""

MAX_TENSORS = 1 << 20
"""A table above this is refused."""

OPTIMIZERS = frozenset(
    {"SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Rprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD"}
)
"""Class names that servers run, here by name because the coordinator, which refuses the
others before it places anything, has no torch. A test holds the three lists together."""

NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")

DTYPE_SIZE: dict[int, int] = {
    pb.DTYPE_FLOAT32: 4,
    pb.DTYPE_FLOAT64: 8,
    pb.DTYPE_FLOAT16: 2,
    pb.DTYPE_BFLOAT16: 2,
}
"""Bytes of an element of each storage dtype."""

_STORAGE: dict[int, int] = {
    pb.DTYPE_COMPLEX64: pb.DTYPE_FLOAT32,
    pb.DTYPE_COMPLEX128: pb.DTYPE_FLOAT64,
}


@dataclass(frozen=True)
class Segment:
    """The part of one tensor that lies in one partition.

    Lengths count elements of the storage dtype; a complex element counts as two.
    """

    tensor: int
    """Index of the tensor in the table."""
    start: int
    """First element, counted from the tensor's start; a multiple of 64."""
    length: int
    """Number of elements."""
    dtype: int
    """Storage dtype."""
    offset: int
    """First byte in the partition's flat layout; a multiple of 64."""

    @property
    def nbytes(self) -> int:
        """Bytes of the segment, padding not counted."""
        return self.length * DTYPE_SIZE[self.dtype]


@dataclass(frozen=True)
class PartitionLayout:
    """The flat layout of one partition."""

    index: int
    """Position in the table, from 0."""
    nbytes: int
    """Bytes of the flat layout, padding between segments included."""
    segments: tuple[Segment, ...]


def check_name(name: str, what: str) -> None:
    """Refuse a name with characters that shells, logs or paths would stumble over.

    Raises:
        RequestRefused: NAME.
    """
    if not NAME.fullmatch(name) or ".." in name.split("/"):
        raise refuse("NAME", f"{what} {name[:80]!r} must match [A-Za-z0-9_.:/-]{{1,256}} with no '..' segment")


def storage_dtype(dtype: int) -> int:
    """The dtype that a tensor is stored and sent as: complex as real pairs.

    Raises:
        TensorMismatch: DTYPE, if unknown or unspecified.
    """
    stored = _STORAGE.get(dtype, dtype)
    if stored not in DTYPE_SIZE:
        raise refuse("DTYPE", f"dtype {dtype} is not one that tables hold", dtype=dtype)
    return stored


def storage_elements(tensor: pb.TensorSpec) -> int:
    """Elements of a tensor in its storage dtype; Python ints, so nothing overflows.

    Raises:
        TensorMismatch: SHAPE, on a negative dimension or an absurd product.
    """
    if any(d < 0 for d in tensor.shape):
        raise refuse("SHAPE", f"tensor {tensor.name!r} has a negative dimension: {list(tensor.shape)}")
    count = math.prod(tensor.shape) * (2 if tensor.dtype in _STORAGE else 1)
    if count >= 1 << 63:
        raise refuse("SHAPE", f"tensor {tensor.name!r} has 2^63 elements or more: {list(tensor.shape)}")
    if count > MAX_ELEMENTS:
        raise refuse("QUOTA", f"tensor {tensor.name!r} has {count} elements, more than {MAX_ELEMENTS}")
    if count == 0:
        raise refuse("SHAPE", f"tensor {tensor.name!r} is empty: {list(tensor.shape)}; leave it out")
    return count


def validate_spec(spec: pb.TableSpec) -> None:
    """Refuse a schema that cannot be a dense table; allocates nothing.

    Raises:
        RequestRefused: NAME, DTYPE, SHAPE, QUOTA, UNSUPPORTED_OPTIMIZER, UNIMPLEMENTED or MISSING_FIELD.
    """
    check_name(spec.name, "table name")
    check_name(spec.group, "table group")
    if not spec.tensors:
        raise refuse("MISSING_FIELD", f"table {spec.name!r} has no tensors")
    if len(spec.tensors) > MAX_TENSORS:
        raise refuse("QUOTA", f"table {spec.name!r} has {len(spec.tensors)} tensors, more than {MAX_TENSORS}")
    if spec.partition_bytes and spec.partition_bytes < ALIGN * 8:
        raise refuse("QUOTA", f"partition_bytes {spec.partition_bytes} is below {ALIGN * 8}")
    if spec.non_finite not in pb.NonFinite.values():
        raise refuse("UNIMPLEMENTED", f"table {spec.name!r}: no policy non_finite={spec.non_finite} in this release")
    if spec.acks not in pb.Acks.values():
        raise refuse("UNIMPLEMENTED", f"table {spec.name!r}: no acks={spec.acks} in this release")
    if not spec.optimizer.class_name:
        raise refuse("MISSING_FIELD", f"table {spec.name!r} names no optimizer class")
    if spec.optimizer.class_name not in OPTIMIZERS:
        raise refuse(
            "UNSUPPORTED_OPTIMIZER",
            f"optimizer {spec.optimizer.class_name[:80]!r} is not supported; servers run only "
            + ", ".join(sorted(OPTIMIZERS)),
            optimizer=spec.optimizer.class_name[:80],
        )
    seen: set[str] = set()
    for tensor in spec.tensors:
        check_name(tensor.name, "tensor name")
        if tensor.name in seen:
            raise refuse("NAME", f"table {spec.name!r} has two tensors named {tensor.name!r}")
        seen.add(tensor.name)
        storage_dtype(tensor.dtype)
        storage_elements(tensor)


def schema_digest(spec: pb.TableSpec) -> bytes:
    """sha256 over the schema: what must be equal for two workers to share a table.

    Replica count and hyper-parameter values are not in it: they may differ between a
    run and its restart.
    """
    digest = hashlib.sha256()
    digest.update(repr((spec.name, spec.group, spec.optimizer.class_name, spec.partition_bytes)).encode())
    if spec.non_finite:  # else as before there was such a field: digests are kept
        digest.update(repr(("non_finite", int(spec.non_finite))).encode())
    if spec.acks:
        digest.update(repr(("acks", int(spec.acks))).encode())
    for tensor in spec.tensors:
        digest.update(repr((tensor.name, tuple(tensor.shape), int(tensor.dtype))).encode())
    return digest.digest()


def cut(spec: pb.TableSpec) -> tuple[PartitionLayout, ...]:
    """Cut a table into partitions of nearly equal bytes.

    Deterministic in the spec alone. Every partition holds at most about
    `partition_bytes` of values (padding to 64 bytes between segments not counted).

    Raises:
        RequestRefused: as `validate_spec`.
    """
    validate_spec(spec)
    bound = spec.partition_bytes or PARTITION_BYTES
    blocks = [(storage_dtype(t.dtype), storage_elements(t)) for t in spec.tensors]
    total = sum(count * DTYPE_SIZE[dtype] for dtype, count in blocks)
    count = max(1, -(-total // bound))
    target = -(-total // count)
    cutter = _Cutter(target, count)
    for index, (dtype, elements) in enumerate(blocks):
        cutter.lay(index, dtype, elements)
    return cutter.finish()


class _Cutter:
    """Lays tensors on the line and closes a partition when it has its share of bytes."""

    def __init__(self, target: int, count: int):
        self._target = target
        self._count = count
        self._done: list[PartitionLayout] = []
        self._segments: list[Segment] = []
        self._bytes = 0
        """Bytes of values laid so far in all: where the line stands."""
        self._offset = 0
        """Next free byte in the open partition, padding included."""

    def lay(self, tensor: int, dtype: int, elements: int) -> None:
        size = DTYPE_SIZE[dtype]
        start = 0
        while start < elements:
            room = self._target * (len(self._done) + 1) - self._bytes
            last = len(self._done) == self._count - 1
            fit = elements - start if last else min(elements - start, _round_up(-(-room // size)))
            if fit <= 0:
                self._close()
                continue
            self._segments.append(Segment(tensor, start, fit, dtype, self._offset))
            self._offset = -(-(self._offset + fit * size) // ALIGN_BYTES) * ALIGN_BYTES
            self._bytes += fit * size
            start += fit

    def _close(self) -> None:
        self._done.append(PartitionLayout(len(self._done), self._offset, tuple(self._segments)))
        self._segments, self._offset = [], 0

    def finish(self) -> tuple[PartitionLayout, ...]:
        if self._segments:
            self._close()
        return tuple(self._done)


def _round_up(elements: int) -> int:
    return -(-elements // ALIGN) * ALIGN


class Routes:
    """A partition map, indexed for look-ups. Immutable; a new map makes new routes."""

    def __init__(self, partition_map: pb.PartitionMap):
        self.map = partition_map
        self.version = partition_map.version
        self.generation = partition_map.generation
        self._nodes = {(n.ref.node, n.ref.incarnation): n for n in partition_map.nodes}
        self._partitions = {p.id: p for p in partition_map.partitions}
        self._tables = {t.name: t for t in partition_map.tables}

    def partition(self, partition: int) -> pb.Partition:
        """The map's row.

        Raises:
            RequestRefused: WRONG_PARTITION, if the job has no such partition.
        """
        row = self._partitions.get(partition)
        if row is None:
            raise refuse("WRONG_PARTITION", f"the job has no partition {partition}", partition=partition)
        return row

    def __contains__(self, partition: int) -> bool:
        return partition in self._partitions

    def primary(self, partition: int) -> tuple[pb.Node, int]:
        """The node that acknowledges for a partition, and the epoch.

        Raises:
            RequestRefused: WRONG_PARTITION.
            PartitionOffline: PARTITION_OFFLINE; names the server, why, and the remedy.
            Retryable: NOT_READY, while it is loaded from a checkpoint.
        """
        row = self.partition(partition)
        if row.state == pb.PARTITION_STATE_RESTORING:
            raise refuse("NOT_READY", f"partition {partition} is being loaded from a checkpoint", partition=partition)
        if row.state == pb.PARTITION_STATE_OFFLINE or not row.HasField("primary"):
            raise self._offline(row)
        node = self._nodes.get((row.primary.node, row.primary.incarnation))
        if node is None or node.state in (pb.NODE_STATE_DEAD, pb.NODE_STATE_LEFT):
            raise self._offline(row)
        return node, row.epoch

    def is_offline(self, partition: int) -> bool:
        """Whether nobody acknowledges for a partition now."""
        try:
            self.primary(partition)
        except PartitionOffline:
            return True
        except ParameshError:
            pass
        return False

    def has_live_copy(self, partition: int) -> bool:
        """Whether a live server is in sync: what is offline comes back by itself then."""
        row = self._partitions.get(partition)
        nodes = [] if row is None else [self._nodes.get((ref.node, ref.incarnation)) for ref in row.isr]
        return any(node is not None and node.state not in (pb.NODE_STATE_DEAD, pb.NODE_STATE_LEFT) for node in nodes)

    def _offline(self, row: pb.Partition) -> Exception:
        name = row.primary.node or (row.isr[0].node if row.isr else "?")
        node = self._nodes.get((row.primary.node, row.primary.incarnation))
        table = next((t.name for t in self.map.tables if t.table_id == row.table_id), "ledger")
        why = (node.reason if node else "") or "it is gone"
        others = sorted({ref.node for ref in row.isr} - {name})
        held = f"the other complete copies were at {', '.join(others)}, which are lost too" if others else "it held"
        held += " the only complete copy" if not others else ""
        return refuse(
            "PARTITION_OFFLINE",
            f"server {name!r} is lost ({why}); {held} (partition {row.id} of {table!r}). "
            "Start the cluster anew (a new --state file for ps-coordinator), and the job from its last checkpoint "
            "(paramesh.load) or from the start.",
            server=name,
            partition=row.id,
            table=table,
            why=why,
        )

    def table(self, name: str) -> pb.TableEntry:
        """The map's entry of a table.

        Raises:
            RequestRefused: UNKNOWN_TABLE.
        """
        entry = self._tables.get(name)
        if entry is None:
            known = ", ".join(sorted(self._tables)) or "none"
            raise refuse("UNKNOWN_TABLE", f"no table {name!r}; there are: {known}", table=name)
        return entry

    def partitions_of(self, name: str) -> range:
        """Ids of a table's partitions, in order.

        Raises:
            RequestRefused: UNKNOWN_TABLE.
        """
        entry = self.table(name)
        return range(entry.first_partition, entry.first_partition + entry.partition_count)

    def by_server(self, partitions: Iterable[int]) -> dict[str, list[int]]:
        """Group partitions by the data address of their primary, order kept.

        Raises:
            PartitionOffline: if any of them has no live primary.
        """
        groups: dict[str, list[int]] = {}
        for partition in partitions:
            node, _ = self.primary(partition)
            groups.setdefault(node.address, []).append(partition)
        return groups
