"""Who may call what: the one table of RPCs and roles, and what an identity binds. Pure.

    roles_of("/paramesh.v1.Replication/Append")        # {Role.SERVER}
    check_call(identity, "/paramesh.v1.Ledger/Join")   # raises PERMISSION_DENIED
    check_message(identity, method, request)           # job, client id and node names are the caller's own

What is not listed nobody may call. A test holds the table against every descriptor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paramesh.errors import ParameshError, refuse
from paramesh.identity import Identity, Role
from paramesh.v1 import coordinator_pb2 as co

__all__ = ["HEALTH", "TABLE", "check_call", "check_message", "roles_of"]

WORKER, SERVER, COORDINATOR = frozenset({Role.WORKER}), frozenset({Role.SERVER}), frozenset({Role.COORDINATOR})
ADMIN = frozenset({Role.ADMIN})
LOOK = frozenset({Role.ADMIN, Role.OBSERVER})
NODES = WORKER | SERVER
EVERYBODY = frozenset(Role)

HEALTH = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List", "/grpc.health.v1.Health/Watch"})
"""Asked by probes, which carry no token: with tokens they are answered without one. They tell nothing but that it
serves. With certificates no connection comes about without one."""

TABLE: dict[str, dict[str, frozenset[Role]]] = {
    "paramesh.v1.Membership": {
        "RegisterServer": SERVER,
        "RegisterHost": WORKER,
        "RegisterClient": WORKER,
        "Heartbeat": NODES,
        "ReportExit": NODES,
        "Deregister": NODES,
    },
    "paramesh.v1.MapService": {"GetMap": EVERYBODY, "WatchMap": EVERYBODY},
    "paramesh.v1.Catalog": {"CreateTable": WORKER, "DescribeTable": NODES | LOOK},
    "paramesh.v1.Replicas": {"ChangeIsr": SERVER, "ReportLoss": SERVER},
    "paramesh.v1.Admin": {
        "GetStatus": LOOK,
        "ListEvents": LOOK,
        "ListMoves": LOOK,
        "PromoteReplica": ADMIN,
        "MovePartition": ADMIN,
        "Rebalance": ADMIN,
        "Drain": ADMIN | SERVER,  # a server drains itself; see _BOUND
    },
    "paramesh.v1.Checkpoints": {"CreateCheckpoint": ADMIN, "ListCheckpoints": LOOK, "RestoreCheckpoint": ADMIN},
    "paramesh.v1.CheckpointControl": {
        "MarkStep": COORDINATOR,
        "PauseClocks": COORDINATOR,
        "TakeCut": COORDINATOR,
        "ResumeClocks": COORDINATOR,
        "WriteCut": COORDINATOR,
        "DropCut": COORDINATOR,
        "LoadCut": COORDINATOR,
    },
    "paramesh.v1.Ledger": {
        "Join": WORKER,
        "Leave": WORKER,
        "SetActivity": WORKER,
        "OpenGroup": WORKER,
        "AwaitInit": WORKER,
        "CommitInit": WORKER,
        "Ready": WORKER,
        "Clip": WORKER,
        "Clock": WORKER,
        "GetSteps": WORKER,
        "ReportMissing": WORKER,
        "Lease": WORKER,
        "ReturnLeases": WORKER,
        "PutState": WORKER,
        "GetState": WORKER | COORDINATOR,
        "Gather": WORKER,
        "Report": WORKER,
        "LedgerStatus": WORKER | COORDINATOR | LOOK,
    },
    "paramesh.v1.ParameterServer": {
        "Push": WORKER,
        "Pull": WORKER,
        "Assign": WORKER,
        "Snapshot": WORKER,
        "Norms": WORKER,
        "Inspect": WORKER | LOOK,
    },
    "paramesh.v1.Recovery": {"Testify": ADMIN | COORDINATOR},
    "paramesh.v1.Replication": {"Append": SERVER, "Install": SERVER, "Handover": SERVER},
    "paramesh.v1.ServerControl": {"Fence": COORDINATOR, "Evict": COORDINATOR, "BecomePrimary": COORDINATOR},
    "grpc.health.v1.Health": {"Check": EVERYBODY, "List": EVERYBODY, "Watch": EVERYBODY},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": ADMIN},
}
"""Service -> method -> roles. Replication and control are between nodes; people's calls change nothing of the model."""

_BY_PATH = {f"/{service}/{method}": roles for service, methods in TABLE.items() for method, roles in methods.items()}


def roles_of(path: str) -> frozenset[Role]:
    """Who may call a method, by its path; nobody if it is not listed."""
    return _BY_PATH.get(path, frozenset())


def check_call(identity: Identity, path: str) -> None:
    """Refuse a call that the role may not make.

    Raises:
        AccessDenied: PERMISSION_DENIED.
    """
    roles = _BY_PATH.get(path, frozenset())
    if identity.role not in roles:
        allowed = ", ".join(sorted(roles)) or "nobody"
        raise _denied(f"{path[:120]} is for {allowed}, not for {identity.role} {identity.name!r}", identity)


def check_message(identity: Identity, path: str, message: Any) -> None:
    """Refuse a request in somebody else's name.

    Args:
        identity: the caller's.
        path: of the method.
        message: one decoded request, or a framed one.

    Raises:
        AccessDenied: PERMISSION_DENIED: another job, another's client id, another node's name.
    """
    body = getattr(message, "header", message)
    header = getattr(body, "request", None)
    if header is not None:
        if header.job and header.job != identity.job:
            raise _denied(f"{identity.uri} is of job {identity.job!r}, the request of {header.job[:80]!r}", identity)
        if header.client_id and not identity.owns(header.client_id):
            raise _denied(f"client {header.client_id} is not {identity.name!r}'s", identity)
    bound = _BOUND.get(path)
    if bound is not None:
        bound(identity, body)


def _denied(why: str, identity: Identity) -> ParameshError:
    return refuse("PERMISSION_DENIED", why, role=identity.role, name=identity.name)


def _own(identity: Identity, name: str, what: str) -> None:
    if not identity.covers(name):
        raise _denied(
            f"{what} {name[:80]!r} is not {identity.name!r}, whose certificate or token this is, nor under it", identity
        )


def _named(what: str) -> Callable[[Identity, Any], None]:
    return lambda identity, body: _own(identity, body.name, what)


def _node(identity: Identity, body: Any) -> None:
    """A beat, an exit report or a goodbye: of a server by a server, of the rest by workers."""
    kind = body.kind
    if kind and (kind == co.NODE_KIND_SERVER) != (identity.role is Role.SERVER):
        raise _denied(f"a {identity.role} does not speak for a node of kind {kind}", identity)
    if body.name or kind in (co.NODE_KIND_SERVER, co.NODE_KIND_HOST):
        _own(identity, body.name, "node")


def _client(identity: Identity, body: Any) -> None:
    if body.host:
        _own(identity, body.host, "host")
        _own(identity, body.slot, "slot")


def _drain(identity: Identity, body: Any) -> None:
    if identity.role is Role.SERVER:
        _own(identity, body.server, "server")


def _from(field: str) -> Callable[[Identity, Any], None]:
    """The sender that the first message of a stream names; the later ones name nobody."""

    def check(identity: Identity, body: Any) -> None:
        if body.HasField("request") or body.HasField(field):
            _own(identity, getattr(body, field).node, "server")

    return check


_BOUND: dict[str, Callable[[Identity, Any], None]] = {
    "/paramesh.v1.Membership/RegisterServer": _named("server"),
    "/paramesh.v1.Membership/RegisterHost": _named("host"),
    "/paramesh.v1.Membership/RegisterClient": _client,
    "/paramesh.v1.Membership/Heartbeat": _node,
    "/paramesh.v1.Membership/ReportExit": _node,
    "/paramesh.v1.Membership/Deregister": _node,
    "/paramesh.v1.Admin/Drain": _drain,
    "/paramesh.v1.Replicas/ChangeIsr": _from("primary"),
    "/paramesh.v1.Replicas/ReportLoss": _from("primary"),
    "/paramesh.v1.Replication/Append": _from("primary"),
    "/paramesh.v1.Replication/Install": _from("primary"),
    "/paramesh.v1.Replication/Handover": _from("source"),
}
"""Methods whose request names a node: it must be the caller's own."""
