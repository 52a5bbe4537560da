"""Tables: admitted, cut, placed. Pure.

`admit` looks at a schema with plain integers and allocates nothing; `create_table` then
writes the table and all its partitions in one decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from paramesh.errors import refuse
from paramesh.routing import DTYPE_SIZE, PARTITION_BYTES, schema_digest, storage_dtype, storage_elements, validate_spec
from paramesh.v1 import types_pb2 as pb

from paramesh_coordinator.balance import Load, place_replicas
from paramesh_coordinator.config import MAX_REPLICAS
from paramesh_coordinator.operators import LEDGER
from paramesh_coordinator.rows import PartitionRow, PartitionState, Ref, ServerRow, TableRow
from paramesh_coordinator.state import ClusterState, Draft

__all__ = ["Limits", "admit", "create_table", "find_table", "form_ledger", "loads_of", "table_spec"]


TIGHT_RETRY_MS = 1000
"""How long who is refused for want of memory is told to wait: it is given back by people, not in milliseconds."""


@dataclass(frozen=True)
class Limits:
    """What a job may hold."""

    table_bytes: int
    partitions: int
    tables: int = 1 << 30


def admit(spec: pb.TableSpec, limits: Limits) -> None:
    """Refuse a schema that is wrong or absurd, before anything is allocated for it.

    Raises:
        RequestRefused: NAME, SHAPE, DTYPE, MISSING_FIELD.
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
    if spec.replicas > MAX_REPLICAS:
        raise refuse(
            "QUOTA",
            f"table {spec.name!r} asks for {spec.replicas} replicas; at most {MAX_REPLICAS} make sense",
            table=spec.name,
        )


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
    if old.acks != spec.acks:
        return f"acks {pb.Acks.Name(old.acks)} there, {pb.Acks.Name(spec.acks)} here"
    return "group or partition_bytes differ"


def _policy(spec: pb.TableSpec) -> str:
    name = pb.NonFinite.Name(spec.non_finite).removeprefix("NON_FINITE_").lower()
    return "reject" if name == "unspecified" else name


def form_ledger(draft: Draft, min_servers: int) -> None:
    """Place partition 0 when enough servers are there; once in a job's life."""
    servers = [row for row in draft.live_servers() if not row.draining]
    if _has_ledger(draft) or len(servers) < min_servers or draft.job.restoring:
        return
    replicas = draft.job.replicas
    (names,) = place_replicas([0], replicas, loads_of(servers, ()))
    isr = _refs(names, servers)
    draft.put(PartitionRow(LEDGER, 0, 0, 0, *isr[0], isr=isr, replicas=replicas))
    servers_named = [row.name for row in servers]
    draft.audit("ledger_placed", names[0], servers=servers_named, on=names, **_short(replicas, [names]))


def _refs(names: Sequence[str], servers: Sequence[ServerRow]) -> tuple[Ref, ...]:
    """The first in-sync set: replicas that begin empty have all that was acknowledged so far."""
    by_name = {row.name: row.ref for row in servers}
    return tuple(by_name[name] for name in names)


def _short(replicas: int, placed: Sequence[Sequence[str]]) -> dict[str, object]:
    """For the audit line: how many replicas were wanted, and of how many partitions some lack."""
    said: dict[str, object] = {} if replicas == 1 else {"replicas": replicas}
    if lacking := sum(len(names) < replicas for names in placed):
        said["degraded"] = lacking
    return said


def _has_ledger(draft: Draft) -> bool:
    return any(row.partition == LEDGER for row in draft.rows(PartitionRow))


def create_table(
    draft: Draft, spec: pb.TableSpec, sizes: Sequence[int], limits: Limits, tight: Collection[Ref] = ()
) -> TableRow:
    """Write a table and place its partitions; the existing one if it is the same.

    Args:
        draft: the decision.
        spec: admitted.
        sizes: bytes of each partition, as `routing.cut` has them.
        limits: the job's.
        tight: servers above their memory watermark, which get nothing.

    Raises:
        StateRefused: SCHEMA, QUOTA.
        Retryable: OVERLOADED, if all servers are.
        Retryable: NOT_READY, while there are too few servers to place on.
    """
    known = find_table(draft.rows(TableRow), spec)
    if known is not None:
        return known
    servers = draft.live_servers()
    if draft.job.restoring:
        raise refuse("NOT_READY", f"table {spec.name!r} waits until {draft.job.restoring} is restored")
    if not servers or not _has_ledger(draft):
        raise refuse("NOT_READY", f"table {spec.name!r} waits for servers; {len(servers)} registered so far")
    if len(draft.rows(TableRow)) >= limits.tables:
        raise refuse("QUOTA", f"the job has {limits.tables} tables, as many as it may (--max-tables)")
    servers = [row for row in servers if row.ref not in tight]
    if not servers:
        raise refuse(
            "OVERLOADED",
            f"table {spec.name!r} has nowhere to go: all servers are above their memory watermark; start a ps-server",
            retry_after_ms=TIGHT_RETRY_MS,
        )
    first = draft.job.next_partition
    if first + len(sizes) > limits.partitions:
        raise refuse("QUOTA", f"the job would have {first + len(sizes)} partitions, more than {limits.partitions}")
    replicas = spec.replicas or draft.job.replicas
    servers = [row for row in servers if not row.draining] or servers
    placed = place_replicas(sizes, replicas, loads_of(servers, draft.rows(PartitionRow)))
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
    for index, (size, names) in enumerate(zip(sizes, placed, strict=True)):
        isr = _refs(names, servers)
        draft.put(PartitionRow(first + index, table_id, index, size, *isr[0], isr=isr, replicas=replicas))
    shares = {s.name: sum(n for n, p in zip(sizes, placed, strict=True) if p[0] == s.name) for s in servers}
    short = _short(replicas, placed)
    draft.audit("table_created", spec.name, table_id=table_id, partitions=len(sizes), bytes_per_server=shares, **short)
    return row


def loads_of(servers: Sequence[ServerRow], parts: Sequence[PartitionRow]) -> list[Load]:
    """What each of these servers holds."""
    nbytes, copies = (dict.fromkeys((row.ref for row in servers), 0) for _ in range(2))
    held = Counter[Ref]()
    for part in parts:
        primary = part.primary if part.state is PartitionState.ONLINE else None
        for ref in part.holders:
            if ref in nbytes:
                held[ref] += 1
                (nbytes if ref == primary else copies)[ref] += part.nbytes
    return [
        Load(s.name, nbytes[s.ref], held[s.ref], s.capacity_bytes, copies[s.ref], s.host_id, s.fingerprint)
        for s in servers
    ]


def table_spec(state: ClusterState, table_id: int) -> tuple[TableRow, pb.TableSpec]:
    """A table and its schema.

    Raises:
        RequestRefused: UNKNOWN_TABLE.
    """
    row = state.table(table_id)
    if row is None:
        raise refuse("UNKNOWN_TABLE", f"no table has id {table_id}", table_id=table_id)
    return row, pb.TableSpec.FromString(row.spec)
