"""What tests of replication ask of a cluster: who leads, who is in sync, and whether all counts are exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paramesh
import torch
from paramesh.client import Client
from paramesh.v1 import types_pb2 as pb

from tests.cluster import inspection
from tests.cluster.handle import ClusterHandle, WorkerHandle
from tests.cluster.replica_bodies import OWN, counters, make_counters

TRAIN = "tests.cluster.replica_bodies:train"
PUSH = "tests.cluster.replica_bodies:push"


@dataclass(frozen=True)
class Row:
    """One partition of the map."""

    id: int
    primary: str
    isr: tuple[str, ...]
    learners: tuple[str, ...]
    epoch: int
    online: bool

    @property
    def followers(self) -> list[str]:
        """In sync, and not the primary."""
        return [name for name in self.isr if name != self.primary]


def rows(cluster: ClusterHandle) -> dict[int, Row]:
    """The map's partitions, by number."""
    return {
        p.id: Row(
            p.id, p.primary.node, tuple(r.node for r in p.isr), tuple(r.node for r in p.learners),
            p.epoch, p.state != pb.PARTITION_STATE_OFFLINE,
        )
        for p in inspection.partition_map(cluster.coordinator_address).partitions
    }  # fmt: skip


def wait_until_in_sync(cluster: ClusterHandle, replicas: int, deadline: float = 60.0) -> dict[int, Row]:
    """Wait until every partition has all its replicas in sync; the rows then."""

    def full() -> dict[int, Row] | None:
        found = rows(cluster)
        return found if all(len(row.isr) >= replicas and row.online for row in found.values()) else None

    found = cluster.wait_until(full, deadline, f"every partition to have {replicas} replicas in sync")
    assert found is not None
    return found


def start_pushers(
    cluster: ClusterHandle, count: int = 2, tables: int = 6, acks: str = "isr", **args: Any
) -> list[WorkerHandle]:
    """Tables of counts, and workers that push to all of them; returns when all are acknowledged."""
    with paramesh.connect(cluster.coordinator_address) as client:
        make_counters(client, tables, acks)
    pushers = [cluster.start_worker(PUSH, supervised=False, **args) for _ in range(count)]
    cluster.wait_until(lambda: all(w.events("running") for w in pushers), 60, "every partition to acknowledge")
    return pushers


def stop_pushers(cluster: ClusterHandle, pushers: list[WorkerHandle], deadline: float = 60.0) -> None:
    """Let them finish what is under way."""
    for pusher in pushers:
        pusher.open_gate("stop")
    cluster.wait_until(lambda: all(w.events("acked") for w in pushers), deadline, "the pushers to stop")


@dataclass(frozen=True)
class Account:
    """Acknowledged pushes against the tables."""

    acked: int
    lost: int
    duplicated: int
    below: int
    """Reads that lacked what had been acknowledged to their client."""

    def assert_exact(self) -> None:
        """Nothing lost, nothing twice, nobody read its own past."""
        assert self.acked > 0
        assert (self.lost, self.duplicated, self.below) == (0, 0, 0), self


def account(cluster: ClusterHandle, pushers: list[WorkerHandle]) -> Account:
    """Compare every cell with what was acknowledged to its pusher; the pushers have stopped."""
    with paramesh.connect(cluster.coordinator_address) as client:
        parts = [account_of(client, name, pusher) for name in counters(client) for pusher in pushers]
    acked, lost, duplicated = (sum(column) for column in zip(*parts, strict=True))
    return Account(acked, lost, duplicated, sum(len(w.events("below")) for w in pushers))


def account_of(client: Client, table: str, pusher: WorkerHandle) -> tuple[int, int, int]:
    """(acknowledged, lost, duplicated) of one pusher in one table."""
    (partition,) = client._client.routes.partitions_of(table)
    values = client.pull(table)["w"].tolist()
    counts = pusher.last("acked")["acked"][str(partition)]
    found = [int(v) for v in values[pusher.index * OWN : (pusher.index + 1) * OWN]]
    lost = sum(max(0, count - there) for count, there in zip(counts, found, strict=True))
    return sum(counts), lost, sum(max(0, there - count) for count, there in zip(counts, found, strict=True))


def compare_where_online(cluster: ClusterHandle, pushers: list[WorkerHandle], found: dict[int, Row]) -> None:
    """Of partitions that are online every acknowledged push is there; of the others clients were told."""
    for pusher in pushers:
        failed = {e["partition"]: e["reason"] for e in pusher.events("failed")}
        assert set(failed.values()) <= {"PARTITION_OFFLINE"}, failed
        online = {p for p, row in found.items() if row.online and p}
        assert set(failed).isdisjoint(online), "a partition that is online failed its client"
    with paramesh.connect(cluster.coordinator_address) as client:
        for name in counters(client):
            (partition,) = client._client.routes.partitions_of(name)
            if found[partition].online:
                one = [account_of(client, name, pusher) for pusher in pushers]
                assert all(lost == doubled == 0 for _, lost, doubled in one), (name, one)


def recoveries(
    pushers: list[WorkerHandle], before: dict[int, Row], partitions: list[int], since: float = 0.0
) -> dict[int, dict[str, Any]]:
    """Of each partition, the latest first acknowledgement by any pusher under an epoch above the one before.

    Args:
        pushers: who pushes.
        before: the rows before the fault.
        partitions: those that need another primary.
        since: when the fault was; an epoch may have risen just before, by a move.

    Returns:
        The events; empty for as long as one is missing.
    """
    found: dict[int, dict[str, Any]] = {}
    for partition in partitions:
        for pusher in pushers:
            mine = [e for e in pusher.events("epoch") if e["partition"] == partition and e["t"] > since]
            later = [e for e in mine if e["epoch"] > before[partition].epoch]
            if not later:
                return {}
            if partition not in found or later[0]["t"] > found[partition]["t"]:
                found[partition] = later[0]
    return found


def values(cluster: ClusterHandle) -> dict[str, torch.Tensor]:
    """Every tensor of every table, by name."""
    with paramesh.connect(cluster.coordinator_address) as client:
        return {name: value for table in client.tables() for name, value in client.pull(table).items()}


def led_by(found: dict[int, Row], server: str, *, ledger: bool = False) -> list[int]:
    """Partitions whose primary a server is."""
    return [p for p, row in found.items() if row.primary == server and (p or ledger)]
