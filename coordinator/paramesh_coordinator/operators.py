"""What closed clients still need done on servers: stored, repeated until confirmed. Pure.

A client that died: its row is closed and an operation written in one transaction, then
EVICT at the ledger's primary, then FENCE at every live server, then the operation goes.
A restart finds the operation and goes on; both calls are idempotent at the servers.

Promotions do not lose any of it. EVICT goes to whoever is the ledger's primary when it is
sent, and a confirmed one is committed, so it is in every in-sync log. A confirmed FENCE is
committed in the partitions that the server was the primary of; of all others the server
remembers the client, and appends its FENCE when it becomes their primary. That promise of
the servers is relied on once an operation is finished. Until then who is promoted is asked
again as well (`ask_again`).

    for call in next_calls(operation, state): ...send it...
    confirm(draft, call)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paramesh_coordinator.rows import (
    ClientRow,
    ClientState,
    NodeState,
    OperationRow,
    PartitionState,
    Ref,
    ServerRow,
    Stage,
    moved,
)

if TYPE_CHECKING:
    from paramesh_coordinator.state import ClusterState, Draft

__all__ = [
    "LEDGER", "Call", "ask_again", "close_client", "confirm", "describe", "fence_at_newcomer", "finish", "finished",
    "next_calls",
]  # fmt: skip

LEDGER = 0
"""The ledger's partition."""


@dataclass(frozen=True)
class Call:
    """One RPC that an operation needs now."""

    operation: int
    stage: Stage
    server: Ref
    control_address: str
    clients: tuple[int, ...]
    why: str


def close_client(draft: Draft, client_id: int, why: str, *, evict: bool) -> None:
    """Write down what a closed client needs: EVICT first if it died, then FENCE."""
    stage = Stage.EVICT if evict else Stage.FENCE
    draft.put(OperationRow(draft.count("next_operation"), stage, (client_id,), why))


def fence_at_newcomer(draft: Draft, server: str) -> None:
    """A server that comes, or comes back, must learn who was evicted while it was not there."""
    evicted = tuple(c.client_id for c in draft.rows(ClientRow) if c.state is ClientState.EVICTED)
    if evicted:
        why = f"evicted before {server} came"
        draft.put(OperationRow(draft.count("next_operation"), Stage.FENCE, evicted, why, only=server))


def next_calls(operation: OperationRow, state: ClusterState) -> list[Call]:
    """The calls to make now; none while the ledger is offline, or when all is confirmed."""
    if operation.stage is Stage.EVICT:
        ledger = state.partition(LEDGER)
        if ledger is None or ledger.state is not PartitionState.ONLINE:
            return []
        targets = [row for row in state.live_servers() if row.ref == ledger.primary]
    else:
        targets = [row for row in state.live_servers() if _concerns(operation, row.name, row.ref)]
    return [
        Call(operation.operation, operation.stage, row.ref, row.control_address, operation.clients, operation.why)
        for row in targets
    ]


def _concerns(operation: OperationRow, name: str, ref: Ref) -> bool:
    return str(ref) not in operation.confirmed and (not operation.only or name == operation.only)


def finished(operation: OperationRow, state: ClusterState) -> bool:
    """Whether every live server that it concerns has confirmed.

    Dead servers are not waited for: one that is heard again gets its own FENCE.
    """
    return operation.stage is Stage.FENCE and not next_calls(operation, state)


def confirm(draft: Draft, call: Call) -> None:
    """A server has done what a call asked. Nothing if the operation is past that."""
    operation = next((row for row in draft.rows(OperationRow) if row.operation == call.operation), None)
    if operation is None or operation.stage is not call.stage:
        return
    if call.stage is Stage.EVICT:
        draft.put(dataclasses.replace(operation, stage=moved(operation.stage, Stage.FENCE)))
        draft.audit("evict_confirmed", str(call.clients[0]), operation=call.operation, ledger=str(call.server))
        return
    done = dataclasses.replace(operation, confirmed=(*operation.confirmed, str(call.server)))
    draft.put(done)


def ask_again(draft: Draft, promoted: Collection[Ref]) -> None:
    """Servers became primaries: what they confirmed of unfinished FENCEs, they confirmed as less."""
    names = {str(ref) for ref in promoted}
    for operation in draft.rows(OperationRow) if names else ():
        if names.intersection(operation.confirmed):
            left = tuple(name for name in operation.confirmed if name not in names)
            draft.put(dataclasses.replace(operation, confirmed=left))


def finish(draft: Draft, operation: OperationRow) -> None:
    """Forget an operation that has nothing left to do; nothing if it has again by now."""
    current = next((row for row in draft.rows(OperationRow) if row.operation == operation.operation), None)
    if current is None or not finished(current, draft.state):
        return
    moved(operation.stage, Stage.DONE)
    draft.delete(operation)
    draft.audit("fence_confirmed", ",".join(map(str, operation.clients[:8])), operation=operation.operation)


def describe(operation: OperationRow, state: ClusterState) -> str:
    """One line for people: what is to be done, why, and what it waits for."""
    who = ", ".join(map(str, operation.clients[:8])) + (" ..." if len(operation.clients) > 8 else "")
    where = "at the ledger" if operation.stage is Stage.EVICT else f"at {operation.only or 'every server'}"
    return f"{operation.stage} client {who} {where}: {operation.why}; waits for {_awaited(operation, state)}"


def _awaited(operation: OperationRow, state: ClusterState) -> str:
    names = ", ".join(call.server.name for call in next_calls(operation, state))
    if operation.stage is not Stage.EVICT:
        return f"{names} to confirm" if names else "nothing"
    if names:
        return f"{names}, the ledger's server, to confirm"
    ledger = state.partition(LEDGER)
    if ledger is None:
        return "servers: the ledger has no place yet"
    name = ledger.primary.name
    server = next((row for row in state.rows(ServerRow).values() if row.ref == ledger.primary), None)
    why = f" ({server.reason})" if server is not None and server.reason else ""
    if server is not None and server.state is NodeState.DEAD and not server.certain:
        return f"{name}, the ledger's server, to be heard again{why}"
    # Its state was in that process's memory alone, so nothing that happens can confirm it.
    return f"the ledger, which was lost with {name}{why}: start the job anew"
