"""What psctl knows: the coordinator's and the ledger's answers as plain dictionaries.

    status = await read_status(Coordinators(("127.0.0.1:7070",)), "default")
    status["servers"][0]["state"]          # "live"

`--json` prints these as they are; `display` draws tables of them.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from paramesh.channel import aio_channel, grpc, header
from paramesh.errors import ParameshError, refuse
from paramesh.routing import DTYPE_SIZE, Routes, storage_dtype, storage_elements
from paramesh.security import PLAIN, Security
from paramesh.status import from_rpc_error
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.coordinator_pb2_grpc import AdminStub, CatalogStub
from paramesh.v1.ledger_pb2_grpc import LedgerStub

from paramesh_coordinator.operators import LEDGER

__all__ = ["Coordinators", "ask_coordinator", "promote", "read_events", "read_partitions", "read_status", "read_tables"]

REACH_SECONDS = 4.0
"""For all addresses together, so that a mistyped one is an error message within 5 s."""

LEDGER_SECONDS = 2.0
"""A ledger that does not answer must not hide what the coordinator said."""

ELECTION_LOOK_SECONDS = 0.2
"""Between two rounds while the coordinators elect one."""

_AWAY = frozenset({"UNREACHABLE", "DEADLINE"})

_NODE = {value: name.removeprefix("NODE_STATE_").lower() for name, value in pb.NodeState.items()}
_PARTITION = {value: name.removeprefix("PARTITION_STATE_").lower() for name, value in pb.PartitionState.items()}
_ACTIVITY = {value: name.removeprefix("ACTIVITY_").lower() for name, value in lg.Activity.items()}
_MODE = {value: name.removeprefix("MODE_").lower() for name, value in lg.Mode.items()}


@dataclass(frozen=True)
class Coordinators:
    """Where the coordinators of a cluster are, and how they are talked to.

    Attributes:
        addresses: host:port of each.
        security: of every channel, also to servers.
    """

    addresses: tuple[str, ...]
    security: Security = PLAIN


async def ask_coordinator(
    coordinators: Coordinators, service: Any, method: str, request: Message, seconds: float = REACH_SECONDS
) -> tuple[Any, str]:
    """The answer of the first coordinator that gives one, and its address.

    Args:
        coordinators: whom to ask.
        service: the stub's class.
        method: of it.
        request: what is asked.
        seconds: for all addresses together; more for what reads many files. Nobody listening is
            found out at once, whatever it is.

    Raises:
        ParameshError: UNREACHABLE, or the coordinator's refusal.
    """
    clock = asyncio.get_running_loop().time
    until = clock() + seconds
    while True:
        failures, asked = [], list(coordinators.addresses)
        for address in asked:
            async with aio_channel(address, coordinators.security) as channel:
                try:
                    call = getattr(service(channel), method)
                    return await call(
                        request, timeout=seconds / len(coordinators.addresses), wait_for_ready=False
                    ), address
                except grpc.RpcError as exc:
                    failures.append(from_rpc_error(exc, address))
            leader = failures[-1].metadata.get("leader", "")
            if leader and leader not in asked:
                asked.append(leader)
        # All that answered stand by: one of them leads in a moment.
        if not all(f.reason in _AWAY or "standby" in f.metadata for f in failures) or clock() >= until:
            break
        if not any("standby" in f.metadata for f in failures):
            break
        await asyncio.sleep(ELECTION_LOOK_SECONDS)
    answered = next((f for f in sorted(failures, key=_stands_by) if f.reason not in _AWAY), None)
    if answered is not None:
        raise answered
    raise refuse(
        "UNREACHABLE",
        f"no coordinator answers at {', '.join(coordinators.addresses)}. Check that ps-coordinator runs there (it logs "
        "'serving address=...'), and that --coordinator or PARAMESH_COORDINATOR names it. A cluster "
        f"whose coordinator is away trains on meanwhile. ({failures[-1]})",
    )


def _stands_by(failure: ParameshError) -> bool:
    return "standby" in failure.metadata


async def read_status(coordinators: Coordinators, job: str) -> dict[str, Any]:
    """Everything on one page.

    Raises:
        ParameshError: UNREACHABLE, or the coordinator's refusal (WRONG_CLUSTER, ...).
    """
    request = co.GetStatusRequest(request=header(job))
    answer, address = await ask_coordinator(coordinators, AdminStub, "GetStatus", request)
    ledger = await _read_ledger(answer.map, coordinators.security)
    return {
        "job": answer.map.job,
        "coordinator": address,
        "generation": answer.map.generation,
        "term": answer.map.term,
        "map_version": answer.map.version,
        "uptime_s": answer.uptime_ms / 1000,
        "servers": [_server(row) for row in answer.servers],
        "partitions": _states(answer.map.partitions),
        "ledger": _ledger(ledger) if isinstance(ledger, lg.LedgerStatusResponse) else {"error": ledger},
        "tables": [_table(entry, answer.map) for entry in answer.map.tables],
        "hosts": [_host(row) for row in answer.hosts],
        "workers": _workers(answer.clients, ledger),
        "pending": list(answer.pending),
    }


async def _read_ledger(current: pb.PartitionMap, security: Security) -> lg.LedgerStatusResponse | str:
    """The ledger's own figures, or why there are none."""
    try:
        if LEDGER not in Routes(current):
            return f"not placed yet: {len(current.nodes)} servers registered"
        node, _ = Routes(current).primary(LEDGER)
    except ParameshError as error:
        return str(error)
    request = lg.LedgerStatusRequest(request=header(current.job, current.generation))
    async with aio_channel(node.address, security) as channel:
        try:
            answer = await LedgerStub(channel).LedgerStatus(request, timeout=LEDGER_SECONDS)
        except grpc.RpcError as exc:
            return str(from_rpc_error(exc, f"{node.ref.node} ({node.address})"))
    assert isinstance(answer, lg.LedgerStatusResponse)
    return answer


def _server(row: co.ServerStatus) -> dict[str, Any]:
    return {
        "name": row.node.ref.node,
        "incarnation": f"{row.node.ref.incarnation:x}",
        "state": _NODE[row.node.state],
        "reason": row.node.reason,
        "address": row.node.address,
        "control_address": row.node.control_address,
        "host_id": row.node.host_id,
        "silence_s": row.silence_ms / 1000,
        "partitions": row.replicas,
        "online": row.primaries,
        "value_bytes": row.value_bytes,
        "bytes_in": row.bytes_in,
        "bytes_out": row.bytes_out,
        "rss_bytes": row.rss_bytes,
        "applied_lsn": row.applied_lsn,
        "queue_depth": row.queue_depth,
    }


def _host(row: co.HostStatus) -> dict[str, Any]:
    state = _NODE[row.state]
    return {"name": row.name, "state": state, "silence_s": row.silence_ms / 1000, "slots": row.slots}


def _states(rows: Sequence[pb.Partition]) -> dict[str, int]:
    return dict(Counter(_PARTITION[row.state] for row in rows))


def _table(entry: pb.TableEntry, current: pb.PartitionMap) -> dict[str, Any]:
    ids = range(entry.first_partition, entry.first_partition + entry.partition_count)
    rows = [row for row in current.partitions if row.id in ids]
    return {
        "name": entry.name,
        "table_id": entry.table_id,
        "group": entry.group,
        "first_partition": entry.first_partition,
        "partitions": entry.partition_count,
        "states": _states(rows),
        "servers": dict(Counter(row.primary.node for row in rows)),
    }


def _ledger(answer: lg.LedgerStatusResponse) -> dict[str, Any]:
    return {
        "phase": answer.phase,
        "members": len(answer.members),
        "evictions": answer.evictions,
        "lsn": answer.lsn,
        "groups": [
            {
                "name": g.name,
                "mode": _MODE[g.mode],
                "step": g.next_step,
                "waiting_for": list(g.waiting_for),
                "min_clock": g.min_clock,
                "max_clock": g.max_clock,
                "widest_gap": g.widest_gap,
                "staleness": g.staleness,
                "skipped_steps": g.skipped_steps,
                "initialised": g.initialised,
            }
            for g in answer.groups
        ],
        "epochs": [
            {"dataset": e.dataset, "epoch": e.epoch, "length": e.length, "consumed": e.consumed} for e in answer.epochs
        ],
        "figures": {f.name: f.value if math.isfinite(f.value) else str(f.value) for f in answer.figures},
    }


def _workers(clients: Sequence[co.ClientStatus], ledger: lg.LedgerStatusResponse | str) -> list[dict[str, Any]]:
    """Clients of the coordinator joined with members of the ledger; members without a row too."""
    members = {} if isinstance(ledger, str) else {m.client_id: m for m in ledger.members}
    rows = [_worker(client, members.pop(client.client_id, None)) for client in clients]
    strays = [co.ClientStatus(client_id=m.client_id, slot=m.slot, state="unknown") for m in members.values()]
    rows += [_worker(stray, members[stray.client_id]) for stray in strays]
    return sorted(rows, key=lambda row: (row["rank"] is None, row["rank"], row["client_id"]))


def _worker(client: co.ClientStatus, member: lg.Member | None) -> dict[str, Any]:
    return {
        "client_id": client.client_id,
        "slot": client.slot,
        "host": client.host,
        "role": client.role,
        "state": client.state,
        "reason": client.reason,
        "rank": member.rank if member else None,
        "activity": _ACTIVITY[member.activity] if member else None,
        "clock": member.clock if member else None,
        "samples": member.samples if member else None,
    }


async def read_tables(coordinators: Coordinators, job: str) -> list[dict[str, Any]]:
    """Every table with what its schema says.

    Raises:
        ParameshError: UNREACHABLE, or the coordinator's refusal.
    """
    request = co.GetStatusRequest(request=header(job))
    answer, address = await ask_coordinator(coordinators, AdminStub, "GetStatus", request)
    ids = header(job, answer.map.generation)
    requests = (co.DescribeTableRequest(request=ids, table_id=t.table_id) for t in answer.map.tables)
    same = Coordinators((address,), coordinators.security)
    asked = (ask_coordinator(same, CatalogStub, "DescribeTable", request) for request in requests)
    described = await asyncio.gather(*asked)
    pairs = zip(answer.map.tables, described, strict=True)
    return [_table(entry, answer.map) | _schema(reply.spec) for entry, (reply, _) in pairs]


def _schema(spec: pb.TableSpec) -> dict[str, Any]:
    dtypes = Counter(pb.DType.Name(t.dtype).removeprefix("DTYPE_").lower() for t in spec.tensors)
    return {
        "tensors": len(spec.tensors),
        "parameters": sum(math.prod(t.shape) for t in spec.tensors),
        "value_bytes": sum(storage_elements(t) * DTYPE_SIZE[storage_dtype(t.dtype)] for t in spec.tensors),
        "dtypes": dict(dtypes),
        "optimizer": spec.optimizer.class_name,
    }


async def read_partitions(coordinators: Coordinators, job: str) -> list[dict[str, Any]]:
    """Every partition: where it is, who is in sync, who catches up.

    Raises:
        ParameshError: UNREACHABLE, or the coordinator's refusal.
    """
    answer, _ = await ask_coordinator(coordinators, AdminStub, "GetStatus", co.GetStatusRequest(request=header(job)))
    tables = {entry.table_id: entry.name for entry in answer.map.tables}
    return [_partition(row, tables.get(row.table_id, "ledger")) for row in answer.map.partitions]


def _partition(row: pb.Partition, table: str) -> dict[str, Any]:
    return {
        "partition": row.id,
        "table": table,
        "index": row.index,
        "state": _PARTITION[row.state],
        "epoch": row.epoch,
        "version": row.version,
        "primary": _ref(row.primary),
        "in_sync": [_ref(ref) for ref in row.isr],
        "learners": [_ref(ref) for ref in row.learners],
    }


def _ref(ref: pb.ReplicaRef) -> dict[str, str]:
    return {"name": ref.node, "incarnation": f"{ref.incarnation:x}"}


async def promote(coordinators: Coordinators, job: str, partition: int, server: str) -> dict[str, Any]:
    """Give an offline partition to an incomplete replica, with loss; the partition's new row.

    Raises:
        ParameshError: UNREACHABLE, or the coordinator's refusal, which says what to do first.
    """
    request = co.PromoteReplicaRequest(request=header(job), partition=partition, server=server, accept_loss=True)
    answer, _ = await ask_coordinator(coordinators, AdminStub, "PromoteReplica", request)
    tables = {entry.table_id: entry.name for entry in answer.map.tables}
    row = next(row for row in answer.map.partitions if row.id == partition)
    return _partition(row, tables.get(row.table_id, "ledger"))


async def read_events(coordinators: Coordinators, job: str, after: int, limit: int) -> list[dict[str, Any]]:
    """Audit lines after an id (0: the newest), oldest first.

    Raises:
        ParameshError: UNREACHABLE, or the coordinator's refusal.
    """
    request = co.ListEventsRequest(request=header(job), after=after, limit=limit)
    answer, _ = await ask_coordinator(coordinators, AdminStub, "ListEvents", request)
    return [
        {
            "id": event.id,
            "wall_time_ms": event.wall_time_ms,
            "term": event.term,
            "kind": event.kind,
            "subject": event.subject,
            "evidence": _evidence(event.evidence),
        }
        for event in answer.events
    ]


def _evidence(text: str) -> dict[str, Any]:
    """What an event's evidence says, which travels as JSON; a foreign coordinator's may be anything."""
    try:
        said = json.loads(text)
    except ValueError:
        said = text
    return said if isinstance(said, dict) else {"evidence": said}
