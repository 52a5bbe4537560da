"""Tables: admitted, cut, placed. Pure.

`admit` looks at a schema with plain integers and allocates nothing; `create_table` then
writes the table and all its partitions in one decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paramesh.errors import refuse
from paramesh.routing import DTYPE_SIZE, PARTITION_BYTES, schema_digest, storage_dtype, storage_elements, validate_spec
from paramesh.v1 import types_pb2 as pb

from paramesh_coordinator.balance import Load, place
from paramesh_coordinator.operators import LEDGER
from paramesh_coordinator.rows import PartitionRow, TableRow
from paramesh_coordinator.state import ClusterState, Draft

__all__ = ["Limits", "admit", "create_table", "find_table", "form_ledger"]


@dataclass(frozen=True)
class Limits:
    """What a job may hold."""

    table_bytes: int
    partitions: int


def admit(spec: pb.TableSpec, limits: Limits) -> None:
    """Refuse a schema that is wrong or absurd, before anything is allocated for it.

    Raises:
        RequestRefused: NAME, SHAPE, DTYPE, MISSING_FIELD, UNIMPLEMENTED (replicas).
        StateRefused: QUOTA.
    """
    validate_spec(spec)
    total = sum(DTYPE_SIZE[storage_dtype(t.dtype)] * storage_elements(t) for t in spec.tensors)
    if total > limits.table_bytes:
        raise refuse(
            "QUOTA",
            f"table {spec.name!r} has {total} bytes of values, more than max_table_bytes ({limits.table_bytes})",
            table=spec.name,
            bytes=total,
        )
    count = -(-total // (spec.partition_bytes or PARTITION_BYTES))
    if count > limits.partitions:
        raise refuse(
            "QUOTA",
            f"table {spec.name!r} would have {count} partitions, more than max_partitions ({limits.partitions}); "
            "raise partition_bytes",
            table=spec.name,
        )
    if spec.replicas > 1:
        raise refuse("UNIMPLEMENTED", f"table {spec.name!r} asks for {spec.replicas} replicas; this release keeps one")


def find_table(rows: Sequence[TableRow], spec: pb.TableSpec) -> TableRow | None:
    """The table of that name, if its schema is the same.

    Raises:
        StateRefused: SCHEMA, if it is another.
    """
    row = next((row for row in rows if row.name == spec.name), None)
    if row is not None and row.digest != schema_digest(spec):
        raise refuse(
            "SCHEMA", f"table {spec.name!r} exists with another schema: {_difference(row, spec)}", table=spec.name
        )
    return row


def _difference(row: TableRow, spec: pb.TableSpec) -> str:
    """The first difference between two schemas, for people."""
    old = pb.TableSpec.FromString(row.spec)
    for mine, theirs in zip(old.tensors, spec.tensors, strict=False):
        if mine != theirs:
            return f"{mine.name} {list(mine.shape)} there, {theirs.name} {list(theirs.shape)} here"
    if len(old.tensors) != len(spec.tensors):
        return f"{len(old.tensors)} tensors there, {len(spec.tensors)} here"
    if old.optimizer.class_name != spec.optimizer.class_name:
        return f"optimizer {old.optimizer.class_name} there, {spec.optimizer.class_name} here"
    if old.non_finite != spec.non_finite:
        return f"non_finite {_policy(old)} there, {_policy(spec)} here"
    return "group or partition_bytes differ"


def _policy(spec: pb.TableSpec) -> str:
    name = pb.NonFinite.Name(spec.non_finite).removeprefix("NON_FINITE_").lower()
    return "reject" if name == "unspecified" else name


def form_ledger(draft: Draft, min_servers: int) -> None:
    """Place partition 0 when enough servers are there; once in a job's life."""
    servers = draft.live_servers()
    if _has_ledger(draft) or len(servers) < min_servers:
        return
    (name,) = place([0], [Load(row.name) for row in servers])
    home = next(row for row in servers if row.name == name)
    draft.put(PartitionRow(LEDGER, 0, 0, 0, home.name, home.incarnation))
    draft.audit("ledger_placed", home.name, servers=[row.name for row in servers])


def _has_ledger(draft: Draft) -> bool:
    return any(row.partition == LEDGER for row in draft.rows(PartitionRow))


def create_table(draft: Draft, spec: pb.TableSpec, sizes: Sequence[int], limits: Limits) -> TableRow:
    """Write a table and place its partitions; the existing one if it is the same.

    Args:
        draft: the decision.
        spec: admitted.
        sizes: bytes of each partition, as `routing.cut` has them.
        limits: the job's.

    Raises:
        StateRefused: SCHEMA, QUOTA.
        Retryable: NOT_READY, while there are too few servers to place on.
    """
    known = find_table(draft.rows(TableRow), spec)
    if known is not None:
        return known
    servers = draft.live_servers()
    if not servers or not _has_ledger(draft):
        raise refuse("NOT_READY", f"table {spec.name!r} waits for servers; {len(servers)} registered so far")
    first = draft.job.next_partition
    if first + len(sizes) > limits.partitions:
        raise refuse("QUOTA", f"the job would have {first + len(sizes)} partitions, more than {limits.partitions}")
    homes = {row.name: row for row in servers}
    placed = place(sizes, _loads(draft))
    draft.count("next_partition", len(sizes))
    table_id = draft.count("next_table")
    row = TableRow(
        table_id=table_id,
        name=spec.name,
        group=spec.group,
        first_partition=first,
        partition_count=len(sizes),
        digest=schema_digest(spec),
        spec=spec.SerializeToString(deterministic=True),
    )
    draft.put(row)
    for index, (size, name) in enumerate(zip(sizes, placed, strict=True)):
        draft.put(PartitionRow(first + index, table_id, index, size, name, homes[name].incarnation))
    shares = {name: sum(s for s, p in zip(sizes, placed, strict=True) if p == name) for name in sorted(homes)}
    draft.audit("table_created", spec.name, table_id=table_id, partitions=len(sizes), bytes_per_server=shares)
    return row


def _loads(draft: Draft) -> list[Load]:
    parts = draft.rows(PartitionRow)
    loads = []
    for row in draft.live_servers():
        mine = [p.nbytes for p in parts if p.primary == row.ref]
        loads.append(Load(row.name, sum(mine), len(mine), row.capacity_bytes))
    return loads


def table_spec(state: ClusterState, table_id: int) -> tuple[TableRow, pb.TableSpec]:
    """A table and its schema.

    Raises:
        RequestRefused: UNKNOWN_TABLE.
    """
    row = state.table(table_id)
    if row is None:
        raise refuse("UNKNOWN_TABLE", f"no table has id {table_id}", table_id=table_id)
    return row, pb.TableSpec.FromString(row.spec)
