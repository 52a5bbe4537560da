"""Who is here, who died, who left: decisions on a draft. Pure.

Each function is one event; it refuses with a typed error before it writes anything, and
repeating it changes nothing. Death is decided here and nowhere else; `checkers` only
says who is silent.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from paramesh.errors import refuse
from paramesh.identity import Identity
from paramesh.routing import check_name

from paramesh_coordinator import operators
from paramesh_coordinator.catalog import form_ledger
from paramesh_coordinator.checkers import Silent
from paramesh_coordinator.client_ids import next_client
from paramesh_coordinator.failover import Settled, forget, settle, tell_offline
from paramesh_coordinator.rows import (
    ClientRow,
    ClientState,
    HostRow,
    NodeState,
    PartitionRow,
    Ref,
    ServerRow,
    moved,
)
from paramesh_coordinator.state import Draft, Ended, NodeKey, Registered

__all__ = [
    "KEPT_CLIENTS",
    "ClientHello",
    "all_silent",
    "check_incarnation",
    "client_left",
    "exit_of_host",
    "exit_of_server",
    "exit_of_slot",
    "host_left",
    "register_client",
    "register_host",
    "register_server",
    "server_left",
    "server_refuses",
    "silent",
]

KEPT_CLIENTS = 1000
"""Closed client rows kept for `psctl workers` and for fencing at servers that come later.
The ledger's tombstones and ids that are never reused stand behind the forgotten ones."""


@dataclass(frozen=True)
class ClientHello:
    """What RegisterClient says."""

    incarnation: int
    slot: str
    host: str
    host_incarnation: int
    host_id: str
    role: str


def check_incarnation(incarnation: int, what: str) -> None:
    """Refuse the zero incarnation.

    Raises:
        RequestRefused: INCARNATION.
    """
    if not incarnation:
        raise refuse("INCARNATION", f"{what} has incarnation 0; draw a random number at each start")


# --- servers ---------------------------------------------------------------------------


def register_server(draft: Draft, hello: ServerRow, *, replace: bool, old_is_gone: bool, min_servers: int) -> None:
    """A server comes, comes back, or repeats itself.

    Args:
        draft: the decision.
        hello: the row as the server describes itself.
        replace: it asked to fence a live process of its name.
        old_is_gone: the live process of its name was dialled and nothing listens there.
        min_servers: how many servers the ledger waits for.

    Raises:
        StateRefused: NODE_NAME, if another live process has the name.
        RequestRefused: NAME, INCARNATION.
    """
    check_name(hello.name, "server name")
    check_incarnation(hello.incarnation, f"server {hello.name!r}")
    known = next((row for row in draft.rows(ServerRow) if row.ref == hello.ref), None)
    if known is not None and known.state is NodeState.LIVE:
        draft.effects.append(Registered(NodeKey("server", *hello.ref)))
        return
    if known is not None and (known.certain or known.state is NodeState.LEFT):
        raise refuse(
            "INCARNATION",
            f"this process of server {hello.name!r} has ended ({known.reason}); start it anew with another incarnation",
        )
    rival = next((row for row in draft.live_servers() if row.name == hello.name), None)
    if rival is not None:
        _check_name_is_free("server", hello.name, rival.address, replace=replace, old_is_gone=old_is_gone)
    _bury_predecessors(draft, hello)
    draft.change_job(unsettled=True)
    if known is None:
        draft.put(hello)
        draft.audit("server_registered", hello.name, incarnation=hello.incarnation, address=hello.address)
    else:
        _revive(draft, known)
    draft.effects.append(Registered(NodeKey("server", *hello.ref)))
    operators.fence_at_newcomer(draft, hello.name)
    form_ledger(draft, min_servers)


def _check_name_is_free(kind: str, name: str, where: str, *, replace: bool, old_is_gone: bool) -> None:
    if replace or old_is_gone:
        return
    raise refuse(
        "NODE_NAME",
        f"{kind} {name!r} is live{f' at {where}' if where else ''}; choose another name, wait until it is "
        "declared dead, or register with replace",
        name=name,
    )


def _bury_predecessors(draft: Draft, hello: ServerRow) -> None:
    """Registering as a new incarnation is positive death of every earlier one."""
    earlier = [row for row in draft.rows(ServerRow) if row.name == hello.name and row.ref != hello.ref]
    for row in earlier:
        _end_server(draft, row, NodeState.DEAD, f"replaced by incarnation {hello.incarnation:x}", certain=True)
    held = {ref for part in draft.rows(PartitionRow) for ref in (part.primary, *part.holders)}
    for row in earlier:
        if row.ref not in held:
            draft.delete(row)  # nothing in the map names it any more


def _revive(draft: Draft, row: ServerRow) -> None:
    """The very process that fell silent speaks again, so its memory is still there.

    Partitions that were offline and have it in sync come back with it under a new epoch.
    """
    draft.put(dataclasses.replace(row, state=moved(row.state, NodeState.LIVE), reason=""))
    settled = settle(draft, revived=row.ref)
    back = [partition for partition, new in settled.promoted.items() if new == row.ref]
    draft.audit("server_heard_again", row.name, incarnation=row.incarnation, was=row.reason, partitions=back)


def _end_server(
    draft: Draft, row: ServerRow, state: NodeState, reason: str, *, certain: bool, **evidence: object
) -> None:
    """It left, or its end is certain, or has become so: others take over in the same transaction."""
    if row.state is not NodeState.LIVE:
        if certain and row.state is NodeState.DEAD and not row.certain:
            _now_certain(draft, row, reason)
        return
    _mark_ended(draft, row, state, reason, certain=certain)
    settled = settle(draft)
    about = {"incarnation": row.incarnation, "reason": reason} | settled.evidence(row.ref) | evidence
    draft.audit(f"server_{state}", row.name, **about)
    tell_offline(draft, settled.offline)


def _mark_ended(draft: Draft, row: ServerRow, state: NodeState, reason: str, *, certain: bool) -> None:
    draft.put(dataclasses.replace(row, state=moved(row.state, state), reason=reason, certain=certain))
    draft.effects.append(Ended(NodeKey("server", *row.ref)))
    draft.change_job(unsettled=True)
    forget(draft, row.ref, certain=certain)


def _now_certain(draft: Draft, row: ServerRow, evidence: str) -> None:
    """One that was dead for silence is known to have ended: in-sync sets need not wait for it."""
    draft.put(dataclasses.replace(row, certain=True))
    forget(draft, row.ref, certain=True)
    settled = settle(draft)
    about = {"incarnation": row.incarnation, "was": row.reason, "evidence": evidence}
    draft.audit("server_death_certain", row.name, **about, **settled.evidence(row.ref))


def _server(draft: Draft, ref: Ref) -> ServerRow | None:
    return next((row for row in draft.rows(ServerRow) if row.ref == ref), None)


def exit_of_server(draft: Draft, ref: Ref, exit_code: int) -> None:
    """The helper of a server says that its process ended: positive death."""
    row = _server(draft, ref)
    if row is not None:
        _end_server(draft, row, NodeState.DEAD, f"process ended: {ending(exit_code)}", certain=True)


def server_refuses(draft: Draft, ref: Ref) -> None:
    """Both ports of a server refused to be dialled, twice, after its beats broke off: positive death."""
    row = _server(draft, ref)
    if row is not None:
        _end_server(draft, row, NodeState.DEAD, "process ended: its ports refuse connections", certain=True)


def server_left(draft: Draft, ref: Ref) -> None:
    """A server says goodbye; others take over what they have in sync, the rest goes with it."""
    row = _server(draft, ref)
    if row is not None:
        _end_server(draft, row, NodeState.LEFT, "shut down", certain=True)


# --- hosts -----------------------------------------------------------------------------


def register_host(draft: Draft, hello: HostRow, *, replace: bool) -> None:
    """A supervisor comes, comes back, or repeats itself.

    Raises:
        StateRefused: NODE_NAME, if another live process has the name.
        RequestRefused: NAME, INCARNATION.
    """
    check_name(hello.name, "host name")
    check_incarnation(hello.incarnation, f"host {hello.name!r}")
    known = draft.host(hello.name)
    if known is not None and known.ref == hello.ref:
        if known.certain or known.state is NodeState.LEFT:
            raise refuse("INCARNATION", f"this process of host {hello.name!r} has ended ({known.reason})")
        if known.state is NodeState.DEAD:
            draft.put(dataclasses.replace(known, state=moved(known.state, NodeState.LIVE), reason=""))
            draft.audit("host_heard_again", hello.name, incarnation=hello.incarnation, was=known.reason)
        draft.effects.append(Registered(NodeKey("host", *hello.ref)))
        return
    if known is not None and known.state is NodeState.LIVE:
        _check_name_is_free("host", hello.name, "", replace=replace, old_is_gone=False)
        _end_host(draft, known, NodeState.DEAD, f"replaced by incarnation {hello.incarnation:x}", certain=True)
    draft.put(hello)
    draft.effects.append(Registered(NodeKey("host", *hello.ref)))
    draft.audit("host_registered", hello.name, incarnation=hello.incarnation, slots=hello.slots)
    _claim_slots(draft, hello)


def _claim_slots(draft: Draft, host: HostRow) -> None:
    """Clients of a state that was made anew have no host until theirs comes back: no server knows it.

    Until then they count as beating for themselves, so that one whose host is lost too is found out.
    """
    slots = {f"{host.name}/{index}" for index in range(host.slots)}
    for client in draft.rows(ClientRow):
        if client.state is ClientState.LIVE and not client.host and client.slot in slots:
            draft.put(dataclasses.replace(client, host=host.name, host_incarnation=host.incarnation))
            draft.effects.append(Ended(NodeKey.client(client.client_id)))


def _end_host(draft: Draft, row: HostRow, state: NodeState, reason: str, *, certain: bool, **evidence: object) -> None:
    if row.state is not NodeState.LIVE:
        if certain and row.state is NodeState.DEAD and not row.certain:
            draft.put(dataclasses.replace(row, certain=True))
        return
    draft.put(dataclasses.replace(row, state=moved(row.state, state), reason=reason, certain=certain))
    draft.effects.append(Ended(NodeKey("host", *row.ref)))
    draft.audit(f"host_{state}", row.name, incarnation=row.incarnation, reason=reason, **evidence)
    for client in draft.rows(ClientRow):
        if (client.host, client.host_incarnation) == row.ref:
            _evict(draft, client, f"host {row.name}: {reason}", **evidence)


def _host(draft: Draft, ref: Ref) -> HostRow | None:
    row = draft.host(ref.name)
    return row if row is not None and row.ref == ref else None


def exit_of_host(draft: Draft, ref: Ref, exit_code: int) -> None:
    """Somebody who watches a supervisor says that it ended; its children died with it."""
    row = _host(draft, ref)
    if row is not None:
        _end_host(draft, row, NodeState.DEAD, f"process ended: {ending(exit_code)}", certain=True)


def host_left(draft: Draft, ref: Ref) -> None:
    """A supervisor says goodbye; a client of it that did not is evicted."""
    row = _host(draft, ref)
    if row is not None:
        _end_host(draft, row, NodeState.LEFT, "shut down", certain=True)


# --- clients ---------------------------------------------------------------------------


def register_client(draft: Draft, hello: ClientHello, owner: Identity | None = None, most: int = 1 << 30) -> int:
    """Give a client its id; the same one if it repeats itself.

    Args:
        draft: the decision.
        hello: what it says.
        owner: who it has proved to be.
        most: how many may be registered at a time.

    Returns:
        The client id.

    Raises:
        StateRefused: QUOTA, if there are that many.
        Fenced: EVICTED, if this very registration was evicted meanwhile.
        StateRefused: UNKNOWN_NODE, if the named supervisor is not live.
        RequestRefused: NAME, INCARNATION.
    """
    # Our own clients say "host/pid" without a supervisor; others may say "pid@host", which a name may not be.
    check_name(hello.slot.replace("@", ":"), "slot")
    check_incarnation(hello.incarnation, f"client of slot {hello.slot!r}")
    known = [c for c in draft.rows(ClientRow) if (c.slot, c.incarnation) == (hello.slot, hello.incarnation)]
    if known:
        if owner is not None and not owner.owns(known[-1].client_id):
            raise refuse("PERMISSION_DENIED", f"slot {hello.slot!r} and incarnation are not {owner.name!r}'s")
        if known[-1].state is not ClientState.LIVE:
            raise refuse("EVICTED", f"client {known[-1].client_id} is over ({known[-1].reason}); register anew")
        _watch_if_alone(draft, known[-1])
        return known[-1].client_id
    if hello.host:
        host = _host(draft, Ref(hello.host, hello.host_incarnation))
        if host is None or host.state is not NodeState.LIVE:
            raise refuse(
                "UNKNOWN_NODE", f"supervisor {hello.host!r} of slot {hello.slot!r} is not registered", host=hello.host
            )
        _evict_older_of_slot(draft, hello)
    if sum(row.state is ClientState.LIVE for row in draft.rows(ClientRow)) >= most:
        raise refuse("QUOTA", f"{most} clients are registered, as many as may be (--max-clients)")
    row = ClientRow(next_client(draft, owner), **dataclasses.asdict(hello))
    draft.put(row)
    draft.audit("client_registered", row.slot, client_id=row.client_id, role=row.role, host=row.host)
    _watch_if_alone(draft, row)
    return row.client_id


def _watch_if_alone(draft: Draft, row: ClientRow) -> None:
    if not row.host:
        draft.effects.append(Registered(NodeKey.client(row.client_id)))


def _evict_older_of_slot(draft: Draft, hello: ClientHello) -> None:
    """A slot is one process at a time: whoever had it in this role has ended."""
    for row in draft.rows(ClientRow):
        if (row.host, row.slot, row.role) == (hello.host, hello.slot, hello.role):
            _evict(draft, row, f"slot {row.slot} registered anew")


def exit_of_slot(draft: Draft, host: Ref, slot: str, exit_code: int) -> None:
    """A supervisor says that the process of a slot ended; nothing if it had said goodbye."""
    for row in draft.rows(ClientRow):
        if (row.host, row.host_incarnation) == host and row.slot == slot:
            _evict(draft, row, f"{ending(exit_code)} (exit report from host {host.name})", exit_code=exit_code)


def client_left(draft: Draft, client_id: int) -> None:
    """A client says goodbye. Servers forget its sequence numbers; the ledger knows already."""
    row = draft.client(client_id)
    if row is not None and row.state is ClientState.LIVE:
        _close(draft, row, ClientState.LEFT, "left")


def _evict(draft: Draft, row: ClientRow, why: str, **evidence: object) -> None:
    if row.state is ClientState.LIVE:
        _close(draft, row, ClientState.EVICTED, why, **evidence)


def _close(draft: Draft, row: ClientRow, state: ClientState, why: str, **evidence: object) -> None:
    draft.put(dataclasses.replace(row, state=moved(row.state, state), reason=why))
    if not row.host:
        draft.effects.append(Ended(NodeKey.client(row.client_id)))
    draft.audit(f"client_{state}", row.slot, client_id=row.client_id, role=row.role, reason=why, **evidence)
    operators.close_client(draft, row.client_id, why, evict=state is ClientState.EVICTED)
    closed = [c for c in draft.rows(ClientRow) if c.state is not ClientState.LIVE]
    for old in closed[:-KEPT_CLIENTS]:
        draft.delete(old)


# --- silence ---------------------------------------------------------------------------


def silent(draft: Draft, node: NodeKey, silence: float, timeout: float) -> None:
    """Declare one node dead for silence; nothing if it is not live any more."""
    all_silent(draft, [Silent(node, silence, timeout)])


def all_silent(draft: Draft, dead: Sequence[Silent]) -> None:
    """Declare nodes dead for silence; nothing happens to those that are not live any more.

    All servers among them end before anything is given to another, so that no partition
    goes from one silent server to the next.
    """
    servers = [one for one in dead if one.node.kind == "server"]
    ended = [(row, one) for one in servers if (row := _live_server(draft, one.node)) is not None]
    for row, one in ended:
        _mark_ended(draft, row, NodeState.DEAD, _silence(one), certain=False)
    settled = settle(draft) if ended else Settled()
    for row, one in ended:
        about = {"incarnation": row.incarnation, "reason": _silence(one)} | settled.evidence(row.ref)
        draft.audit("server_dead", row.name, **about, **_seconds(one))
    tell_offline(draft, settled.offline)
    for one in dead:
        if one.node.kind == "host":
            host = _host(draft, Ref(one.node.name, one.node.incarnation))
            if host is not None:
                _end_host(draft, host, NodeState.DEAD, _silence(one), certain=False, **_seconds(one))
        elif one.node.kind == "client":
            client = draft.client(int(one.node.name))
            if client is not None:
                _evict(draft, client, _silence(one), **_seconds(one))


def _live_server(draft: Draft, node: NodeKey) -> ServerRow | None:
    row = _server(draft, Ref(node.name, node.incarnation))
    return row if row is not None and row.state is NodeState.LIVE else None


def _silence(one: Silent) -> str:
    return f"silent for {one.silence:.1f} s"


def _seconds(one: Silent) -> dict[str, float]:
    return {"silence_s": round(one.silence, 3), "timeout_s": one.timeout}


UNKNOWN_EXIT = 256
"""Reported of a process whose end was seen but not its code: above what any process can exit with."""

STOPPED = -int(signal.SIGSTOP)
"""Reported of a process that does not run but has not ended: none can end by SIGSTOP."""


def ending(exit_code: int) -> str:
    """An exit code for people: `SIGKILL`, `exit code 1`."""
    if exit_code == UNKNOWN_EXIT:
        return "its exit code is not known"
    if exit_code == STOPPED:
        return "stopped by SIGSTOP"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
