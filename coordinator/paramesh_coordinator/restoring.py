"""A job goes on from a checkpoint: the rows of it. Pure.

    check(manifest, limits)                        # before anything is changed
    begin(draft, manifest, "s3://bucket/run/c")    # the generation rises, all rows are new
    place(draft, manifest, min_servers)            # RESTORING, as servers come and go
    finish(draft)                                  # ONLINE, all at once

A restore gives up everything after its checkpoint. The generation fences: whatever belongs
to the one before is refused by every server that has heard of the new one, and a server
that has not holds nothing that the new one uses.
"""

from __future__ import annotations

import dataclasses

from google.protobuf.message import DecodeError
from paramesh.archive import ClusterManifest
from paramesh.errors import refuse
from paramesh.routing import cut, schema_digest
from paramesh.v1 import types_pb2 as pb

from paramesh_coordinator.balance import place as place_primaries
from paramesh_coordinator.catalog import Limits, admit, loads_of
from paramesh_coordinator.failover import promoted_row
from paramesh_coordinator.rows import (
    ClientRow,
    ClientState,
    LossRow,
    MoveRow,
    OperationRow,
    PartitionRow,
    PartitionState,
    Ref,
    Row,
    TableRow,
    moved,
)
from paramesh_coordinator.state import Draft, Ended, NodeKey

__all__ = ["begin", "check", "finish", "place"]


def check(manifest: ClusterManifest, limits: Limits) -> None:
    """Refuse schemas that are wrong, or that this release cuts into other partitions.

    Raises:
        RequestRefused: FORMAT, NAME, SHAPE, DTYPE.
        StateRefused: SCHEMA, QUOTA.
    """
    for table in manifest.tables:
        try:
            spec = pb.TableSpec.FromString(table.spec)
        except DecodeError:
            raise refuse("FORMAT", f"the schema of table {table.name[:80]!r} cannot be read") from None
        if (spec.name, spec.group) != (table.name, table.group):
            raise refuse("FORMAT", f"the schema of table {table.name[:80]!r} is another table's")
        admit(spec, limits)
        sizes = [layout.nbytes for layout in cut(spec)]
        ids = range(table.first_partition, table.first_partition + table.partition_count)
        written = [p.nbytes for p in sorted(manifest.partitions, key=lambda p: p.partition) if p.partition in ids]
        if sizes != written:
            raise refuse(
                "SCHEMA",
                f"table {table.name!r} is cut into {len(sizes)} partitions by this release and into "
                f"{len(written)} others in the checkpoint: load it with the release that wrote it, and export it",
                table=table.name,
            )
    if len(manifest.partitions) > limits.partitions:
        raise refuse("QUOTA", f"{len(manifest.partitions)} partitions are more than max_partitions")


def begin(draft: Draft, manifest: ClusterManifest, location: str) -> None:
    """Raise the generation; every table, partition and client of before is gone.

    So is a restore that failed, or that this one replaces: `custody` has one at a time.
    """
    job = draft.job
    old: list[Row] = [*draft.rows(PartitionRow), *draft.rows(TableRow)]
    for row in [*old, *draft.rows(OperationRow), *draft.rows(LossRow), *draft.rows(MoveRow)]:
        draft.delete(row)
    for client in draft.rows(ClientRow):
        if client.state is ClientState.LIVE:
            # No EVICT, no FENCE: the generation keeps out every client of before.
            left = moved(client.state, ClientState.LEFT)
            draft.put(dataclasses.replace(client, state=left, reason=f"the job was restored from {manifest.name}"))
            if not client.host:
                draft.effects.append(Ended(NodeKey.client(client.client_id)))
    draft.change_job(
        generation=max(job.generation, manifest.generation) + 1,
        restoring=location,
        next_client=max(job.next_client, manifest.next_client),
        next_table=max(job.next_table, manifest.next_table),
        next_partition=max(job.next_partition, manifest.next_partition),
    )
    for table in manifest.tables:
        digest = schema_digest(pb.TableSpec.FromString(table.spec))
        draft.put(
            TableRow(
                table.table_id,
                table.name,
                table.group,
                table.first_partition,
                table.partition_count,
                digest,
                table.spec,
            )
        )
    draft.raise_map()
    draft.audit("restore_began", manifest.name, location=location, generation=draft.job.generation, was=job.generation)


def place(draft: Draft, manifest: ClusterManifest, min_servers: int) -> dict[int, Ref]:
    """Give every partition that lacks one a live server to load it.

    Returns:
        Every partition's server; empty while there are too few servers.
    """
    servers = [row for row in draft.live_servers() if not row.draining]
    live = {row.ref for row in servers}
    placed = {row.partition: row for row in draft.rows(PartitionRow)}
    if not servers or (not placed and len(servers) < min_servers):
        return {}
    lacking = [p for p in manifest.partitions if p.partition not in placed or placed[p.partition].primary not in live]
    names = place_primaries([p.nbytes for p in lacking], loads_of(servers, list(placed.values())))
    refs = {row.name: row.ref for row in servers}
    replicas = {t.table_id: pb.TableSpec.FromString(t.spec).replicas for t in manifest.tables}
    for part, name in zip(lacking, names, strict=True):
        old = placed.get(part.partition)
        placed[part.partition] = PartitionRow(
            part.partition,
            part.table_id,
            part.index,
            part.nbytes,
            *refs[name],
            epoch=max(part.epoch, old.epoch if old else 0) + 1,
            state=PartitionState.RESTORING,
            replicas=replicas.get(part.table_id, 0) or draft.job.replicas,
        )
        draft.put(placed[part.partition])
    return {number: row.primary for number, row in placed.items()}


def finish(draft: Draft, loaded: dict[int, Ref]) -> bool:
    """Let every partition serve; False if one was lost meanwhile and must be loaded again.

    Args:
        draft: the decision.
        loaded: which server has confirmed which partition.
    """
    live = {row.ref for row in draft.live_servers()}
    rows = draft.rows(PartitionRow)
    if any(row.primary not in live or loaded.get(row.partition) != row.primary for row in rows):
        return False
    for row in rows:
        moved(row.state, PartitionState.ONLINE)
        draft.put(promoted_row(row, row.primary))
    draft.change_job(restoring="")
    draft.audit("restored", draft.job.name, generation=draft.job.generation, partitions=len(rows))
    return True
