"""What tests look at in a live cluster: the coordinator's and the ledger's own words.

Each function opens a channel and closes it again: a test's view must not depend on
connections that a fault has cut.
"""

from __future__ import annotations

import contextlib
from typing import Any

from paramesh.channel import CHANNEL_OPTIONS, grpc, header
from paramesh.v1 import coordinator_pb2 as coordinator
from paramesh.v1 import coordinator_pb2_grpc as coordinator_grpc
from paramesh.v1 import ledger_pb2 as ledger
from paramesh.v1 import ledger_pb2_grpc as ledger_grpc
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import parameter_server_pb2_grpc as ps_grpc
from paramesh.v1 import types_pb2 as pb

CALL_SECONDS = 5.0
"""Deadline of one look."""


def _ask(address: str, stub: Any, method: str, request: Any) -> Any:
    """The answer; of several addresses with commas, the first that gives one."""
    *others, last = address.split(",")
    for one in others:
        with contextlib.suppress(grpc.RpcError):
            return _ask(one, stub, method, request)
    with grpc.insecure_channel(last, options=CHANNEL_OPTIONS) as channel:
        return getattr(stub(channel), method)(request, timeout=CALL_SECONDS)


def status(address: str, job: str = "default") -> coordinator.GetStatusResponse:
    """The coordinator's status."""
    generation = partition_map(address, job).generation
    request = coordinator.GetStatusRequest(request=header(job, generation))
    return _ask(address, coordinator_grpc.AdminStub, "GetStatus", request)


def partition_map(address: str, job: str = "default") -> pb.PartitionMap:
    """The map."""
    request = coordinator.GetMapRequest(request=header(job))
    return _ask(address, coordinator_grpc.MapServiceStub, "GetMap", request).map


def live_servers(address: str, job: str = "default") -> list[str]:
    """Names of servers that the map calls live."""
    return [n.ref.node for n in partition_map(address, job).nodes if n.state == pb.NODE_STATE_LIVE]


def events(address: str, job: str = "default") -> list[coordinator.Event]:
    """The audit table, oldest first."""
    generation = partition_map(address, job).generation
    request = coordinator.ListEventsRequest(request=header(job, generation), limit=1000)
    return list(_ask(address, coordinator_grpc.AdminStub, "ListEvents", request).events)


def primary_address(address: str, partition: int, job: str = "default") -> str:
    """Where a partition is served."""
    found = partition_map(address, job)
    row = next(p for p in found.partitions if p.id == partition)
    return next(n.address for n in found.nodes if n.ref == row.primary)


def ledger_status(address: str, job: str = "default") -> ledger.LedgerStatusResponse:
    """Members, groups and epochs as the ledger knows them."""
    found = partition_map(address, job)
    request = ledger.LedgerStatusRequest(request=header(job, found.generation))
    return _ask(primary_address(address, 0, job), ledger_grpc.LedgerStub, "LedgerStatus", request)


def inspect(address: str, job: str = "default", state_hash: bool = True) -> dict[str, ps.InspectResponse]:
    """What each live server says of its partitions, by server name."""
    found = partition_map(address, job)
    request = ps.InspectRequest(request=header(job, found.generation), state_hash=state_hash)
    return {
        node.ref.node: _ask(node.address, ps_grpc.ParameterServerStub, "Inspect", request)
        for node in found.nodes
        if node.state == pb.NODE_STATE_LIVE
    }


def inspect_at(address: str, job: str = "default") -> ps.InspectResponse:
    """What the server at a data address says of its partitions."""
    return _ask(address, ps_grpc.ParameterServerStub, "Inspect", ps.InspectRequest(request=header(job, 1)))


def state_hashes(address: str, job: str = "default") -> dict[int, tuple[int, bytes]]:
    """(lsn, state hash) of every partition."""
    return {
        info.partition: (info.lsn, info.state_hash)
        for response in inspect(address, job).values()
        for info in response.partitions
    }
