"""Moves of replicas: asked for, planned, carried out; and draining servers. Pure.

A move is a row: its target becomes a learner; the partition's primary has it join the in-sync
set; then one decision makes it primary, if the source was that, and takes the source out. The
source needs no word of it: it can acknowledge nothing that the target lacks. So a move needs
no more of servers than a failover does, and a coordinator that restarts goes on from the rows.

    move = ask(draft, partition, "server-0", "server-2")       # an operator
    drain(draft, "server-0", why)                              # gives away what it holds
    advance(draft, limits)                                     # after every change of the map
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from paramesh.errors import refuse

from paramesh_coordinator import operators
from paramesh_coordinator.balance import Load
from paramesh_coordinator.catalog import loads_of
from paramesh_coordinator.failover import promoted_row
from paramesh_coordinator.rebalance import Move, Placed, empty, rebalance
from paramesh_coordinator.rows import (
    ClientRow,
    ClientState,
    MoveRow,
    MoveStage,
    PartitionRow,
    PartitionState,
    Ref,
    ServerRow,
    moved,
)
from paramesh_coordinator.state import Draft
from paramesh_coordinator.traffic import MoveLimits, Traffic

__all__ = [
    "KEPT_MOVES", "Drained", "MoveLimits", "advance", "ask", "describe", "drain", "dry_run", "even_out", "plan",
    "plan_even", "undrain",
]  # fmt: skip

KEPT_MOVES = 200
"""Rows of moves that are over, kept for `psctl` to tell what became of them."""


def _open_moves(draft: Draft) -> list[MoveRow]:
    return [row for row in draft.rows(MoveRow) if row.active]


def _draining(servers: Iterable[ServerRow]) -> set[str]:
    return {row.name for row in servers if row.draining}


# --- carrying out ----------------------------------------------------------------------


def advance(draft: Draft, limits: MoveLimits | None = None) -> int:
    """Take every open move as far as it goes now; how many rows were changed.

    What died or went elsewhere meanwhile ends its moves; whatever a cancelled one leaves (a
    learner too many) the planner of replicas clears away.
    """
    limits = limits or MoveLimits()
    online = [part for part in draft.rows(PartitionRow) if part.state is PartitionState.ONLINE]
    live = {row.ref: row for row in draft.live_servers()}
    traffic = Traffic({ref: row.host_id for ref, row in live.items()})
    for row in online:
        for ref in row.learners:
            traffic.add(row.primary, ref)
    changed = 0
    for move in _open_moves(draft):
        part = draft.partition(move.partition)
        why_not = _why_over(move, part, live)
        if why_not or part is None:
            end(draft, move, why_not)
        elif move.target in part.isr:
            if not _may_commit(draft, move, part, live):
                continue
            _commit(draft, move, part)
        elif move.target in part.learners or not _may_copy(draft, move, part, traffic, limits):
            continue
        else:
            _copy(draft, move, part)
            traffic.add(part.primary, move.target)
        changed += 1
    _forget_old(draft)
    return changed


def _why_over(move: MoveRow, part: PartitionRow | None, live: dict[Ref, ServerRow]) -> str:
    """Why a move cannot go on; empty if it can."""
    if part is None or part.state is not PartitionState.ONLINE:
        return "the partition is offline"
    if part.epoch != move.epoch:
        return f"the partition failed over to {part.server} (epoch {part.epoch}, planned at {move.epoch})"
    for ref, what in ((move.source, "source"), (move.target, "target")):
        if ref not in live:
            return f"its {what} {ref.name} is gone"
    if move.source not in part.isr:
        return f"{move.source.name} is not in sync any more"
    if live[move.target].draining:
        return f"its target {move.target.name} drains"
    if move.swap and (part.primary != move.source or move.target not in part.isr):
        return f"{move.target.name} is not in sync any more"
    return ""


def _may_commit(draft: Draft, move: MoveRow, part: PartitionRow, live: dict[Ref, ServerRow]) -> bool:
    """Who stays was heard just now: one who leaves may be the only good copy of what is about to be lost."""
    staying = [ref for ref in part.isr if ref in live and (move.swap or ref != move.source)]
    return all(draft.senses.fresh(ref) for ref in staying)


def _commit(draft: Draft, move: MoveRow, part: PartitionRow) -> None:
    """The one decision: the target leads if the source did, and the source is out, but for a swap."""
    isr = part.isr if move.swap else tuple(ref for ref in part.isr if ref != move.source)
    row = dataclasses.replace(part, isr=isr)
    if part.primary == move.source:
        row = promoted_row(row, move.target)
        operators.ask_again(draft, {move.target})
    draft.put(row)
    draft.put(dataclasses.replace(move, stage=moved(move.stage, MoveStage.DONE)))
    draft.audit(
        "primary_swapped" if move.swap else "replica_moved", str(move.partition), move=move.move,
        source=str(move.source), target=str(move.target), epoch=row.epoch, why=move.why,
    )  # fmt: skip


def _may_copy(draft: Draft, move: MoveRow, part: PartitionRow, traffic: Traffic, limits: MoveLimits) -> bool:
    rested = draft.senses.dropped.get((part.partition, move.target), REST_SECONDS) >= REST_SECONDS
    return rested and traffic.has_room(part.primary, move.target, limits)


REST_SECONDS = 2.0
"""As for learners of the planner: whatever made a dropped server lag needs a moment."""


def _copy(draft: Draft, move: MoveRow, part: PartitionRow) -> None:
    draft.put(dataclasses.replace(part, learners=(*part.learners, move.target)))
    if move.stage is MoveStage.WANTED:
        draft.put(dataclasses.replace(move, stage=moved(move.stage, MoveStage.COPYING)))
    draft.audit("move_copying", str(move.partition), move=move.move, source=str(move.source), target=str(move.target))


def end(draft: Draft, move: MoveRow, reason: str) -> None:
    """Cancel a move; a learner that it brought goes, unless the partition lacks replicas."""
    draft.put(dataclasses.replace(move, stage=moved(move.stage, MoveStage.CANCELLED), reason=reason))
    draft.audit(
        "move_cancelled", str(move.partition), move=move.move, source=str(move.source), target=str(move.target),
        reason=reason,
    )  # fmt: skip


def _forget_old(draft: Draft) -> None:
    over = [row for row in draft.rows(MoveRow) if not row.active]
    for row in over[:-KEPT_MOVES]:
        draft.delete(row)


def describe(move: MoveRow) -> str:
    """One line for people: what goes where, why, and what it waits for."""
    what = "the lead of partition" if move.swap else "partition"
    stage = "copying" if move.stage is MoveStage.COPYING else "waits for its turn"
    return f"move {what} {move.partition} from {move.source.name} to {move.target.name} ({move.why}): {stage}"


# --- planning --------------------------------------------------------------------------


def _picture(draft: Draft) -> tuple[list[Placed], list[ServerRow]]:
    """What the balancer looks at: partitions as they will be when the open moves are done."""
    servers = draft.live_servers()
    live = {row.ref for row in servers}
    moving = {row.partition: row for row in _open_moves(draft)}
    placed = []
    for part in draft.rows(PartitionRow):
        if part.primary not in live:
            continue
        names = [ref.name for ref in part.isr if ref in live and ref != part.primary]
        fixed = part.state is not PartitionState.ONLINE or bool(part.learners) or part.partition in moving
        rate = draft.senses.rates.get(part.partition, 0)
        placed.append(Placed(part.partition, part.nbytes, part.primary.name, tuple(names), rate, fixed))
    return placed, servers


def plan_even(draft: Draft) -> list[Move]:
    """What `even_out` would do."""
    placed, servers = _picture(draft)
    return rebalance(placed, _expected(draft, servers), _draining(servers))


def _expected(draft: Draft, servers: Sequence[ServerRow]) -> list[Load]:
    """Loads as they will be when the open moves are done."""
    parts = {part.partition: part for part in draft.rows(PartitionRow)}
    for move in _open_moves(draft):
        part = parts.get(move.partition)
        if part is None or move.source not in part.isr:
            continue
        isr = part.isr if move.swap else tuple(ref for ref in part.isr if ref != move.source)
        isr = (*(ref for ref in isr if ref != move.target), move.target)
        learners = tuple(ref for ref in part.learners if ref != move.target)
        row = dataclasses.replace(part, isr=isr, learners=learners)
        if part.primary == move.source:
            row = promoted_row(row, move.target)
        parts[move.partition] = row
    rates = Counter[str]()
    for each in parts.values():
        rates[each.server] += draft.senses.rates.get(each.partition, 0)
    return [dataclasses.replace(load, rate=rates[load.name]) for load in loads_of(servers, list(parts.values()))]


def even_out(draft: Draft, why: str) -> list[MoveRow]:
    """Plan moves that make bytes, then requests, even, and write them down."""
    return _write(draft, plan_even(draft), why)


def dry_run(draft: Draft, why: str) -> list[MoveRow]:
    """The rows that `even_out` would write, with number 0; nothing is written."""
    refs = {row.name: row.ref for row in draft.live_servers()}
    return [_row(0, draft, move, refs, why) for move in plan_even(draft)]


def _row(number: int, draft: Draft, move: Move, refs: Mapping[str, Ref], why: str) -> MoveRow:
    part = draft.partition(move.partition)
    assert part is not None
    why = f"{why}: {move.why}" if move.why else why
    return MoveRow(number, move.partition, part.epoch, refs[move.source], refs[move.target], move.swap, why)


def _write(draft: Draft, planned: Iterable[Move], why: str) -> list[MoveRow]:
    refs = {row.name: row.ref for row in draft.live_servers()}
    rows = [_row(draft.count("next_move"), draft, move, refs, why) for move in planned]
    for row in rows:
        draft.put(row)
    if rows:
        moves = [f"{row.partition}: {row.source.name} -> {row.target.name}{' (swap)' * row.swap}" for row in rows]
        draft.audit("moves_planned", why, count=len(moves), moves=moves[:50])
    return rows


def plan(draft: Draft, *, auto: bool, settled: bool) -> int:
    """Plan for servers that drain, and for those that came or went; how many moves were added.

    Args:
        draft: the decision.
        auto: bytes are evened out without being asked when servers came or went.
        settled: every partition has the replicas that it can have; before that, evening out waits.
    """
    added = 0
    placed, servers = _picture(draft)
    draining = _draining(servers)
    if draining:
        for name in sorted(draining):
            leaving = empty(placed, _expected(draft, servers), draining)
            added += len(_write(draft, [m for m in leaving if m.source == name], f"drain of {name}"))
            placed, servers = _picture(draft)
    if draft.job.unsettled and settled and not _open_moves(draft):
        rows = even_out(draft, "rebalance: servers came or went") if auto else []
        if not rows:
            draft.change_job(unsettled=False)
        added += len(rows)
    elif draft.senses.uneven and auto and settled and not _open_moves(draft):
        added += len(even_out(draft, "rebalance: requests are uneven"))
    return added


# --- the operator ----------------------------------------------------------------------


def _live(draft: Draft, name: str, incarnation: int = 0) -> ServerRow:
    found = next((row for row in draft.live_servers() if row.name == name), None)
    if found is None or incarnation not in (0, found.incarnation):
        raise refuse("UNKNOWN_NODE", f"no live server is named {name[:80]!r}; psctl status lists them")
    return found


def ask(draft: Draft, partition: int, source: str, target: str) -> MoveRow:
    """An operator moves one replica; the same open move again if it is asked for twice.

    If `source` leads and `target` is in sync already, only the lead changes hands.

    Raises:
        RequestRefused: WRONG_PARTITION.
        StateRefused: UNKNOWN_NODE; QUOTA, if there is no room; NODE_NAME, if `target` has a replica.
        Retryable: NOT_READY, if another move of the partition is under way, or it is offline.
    """
    part = draft.partition(partition)
    if part is None:
        raise refuse("WRONG_PARTITION", f"the job has no partition {partition}; psctl partitions lists them")
    giver, taker = _live(draft, source), _live(draft, target)
    for row in _open_moves(draft):
        if row.partition == partition:
            if (row.source, row.target) == (giver.ref, taker.ref):
                return row
            raise _busy(f"partition {partition} is on its way from {row.source.name} to {row.target.name} ({row.why})")
    if part.state is not PartitionState.ONLINE:
        raise _busy(f"partition {partition} is offline")
    swap = _check_places(draft, part, giver, taker)
    move = Move(partition, source, target, swap)
    return _write(draft, [move], "psctl move")[0]


def _busy(what: str) -> Exception:
    return refuse("NOT_READY", f"{what}; ask again when that is over")


def _check_places(draft: Draft, part: PartitionRow, giver: ServerRow, taker: ServerRow) -> bool:
    """Refuse what cannot be; whether it is a swap."""
    if giver.ref not in part.isr:
        names = ", ".join(ref.name for ref in part.isr)
        raise refuse("UNKNOWN_NODE", f"server {giver.name!r} has no replica of partition {part.partition}; {names}")
    if taker.draining:
        raise refuse("NOT_READY", f"server {taker.name!r} drains ({taker.draining}); psctl undrain ends that")
    if taker.ref in part.isr and part.primary == giver.ref and taker.ref != giver.ref:
        return True
    if taker.ref in part.holders:
        raise refuse("NODE_NAME", f"server {taker.name!r} has a replica of partition {part.partition} already")
    if taker.fingerprint != giver.fingerprint:
        raise refuse("UNKNOWN_NODE", f"{taker.name!r} computes other bits than {giver.name!r}: no replicas")
    (load,) = loads_of([taker], draft.rows(PartitionRow))
    if not load.takes(part.nbytes):
        raise refuse("QUOTA", f"server {taker.name!r} has no room for {part.nbytes} bytes (--capacity-bytes)")
    return False


@dataclass(frozen=True)
class Drained:
    """How far a draining server is."""

    held: tuple[int, ...]
    """Partitions of which it holds a replica."""
    moving: tuple[int, ...]
    """Of these, the ones on their way, or whose turn comes."""
    only: tuple[int, ...]
    """Of these, the ones that nobody else has in sync."""
    nowhere: bool
    """No other server is there to take anything, or nobody trains any more."""


def drain(draft: Draft, name: str, why: str, *, incarnation: int = 0, leaving: bool = False) -> Drained:
    """Have a server give away what it holds, and get nothing new; repeatable.

    Args:
        draft: the decision.
        name: the server's.
        why: for people.
        incarnation: of the process meant; 0: whichever is live.
        leaving: the server itself asks, before it ends. With nowhere to go nothing begins, and it
            need not wait.

    Raises:
        StateRefused: UNKNOWN_NODE.
    """
    row = _live(draft, name, incarnation)
    others = [other for other in draft.live_servers() if not other.draining and other.ref != row.ref]
    trains = any(c.state is ClientState.LIVE for c in draft.rows(ClientRow))
    nowhere = not others or (leaving and not trains)
    if not row.draining and not (leaving and nowhere):
        row = dataclasses.replace(row, draining=why)
        draft.put(row)
        draft.audit("server_draining", name, incarnation=row.incarnation, why=why)
        for move in _open_moves(draft):
            if move.target == row.ref:
                end(draft, move, f"its target {name} drains")
        plan(draft, auto=False, settled=False)
    return _how_far(draft, row.ref, nowhere)


def _how_far(draft: Draft, ref: Ref, nowhere: bool) -> Drained:
    live = {row.ref for row in draft.live_servers()}
    parts = draft.rows(PartitionRow)
    held = [p for p in parts if ref in p.holders or ref == p.primary]
    # One that another move or a repair holds up gets its own move after that.
    moving = {row.partition for row in _open_moves(draft)}
    moving |= {p.partition for p in held if p.learners and p.state is PartitionState.ONLINE}
    only = [p.partition for p in held if ref in p.isr and not any(r in live for r in p.isr if r != ref)]
    numbers = [p.partition for p in held]
    return Drained(tuple(numbers), tuple(n for n in numbers if n in moving), tuple(only), nowhere)


def undrain(draft: Draft, name: str) -> Drained:
    """A draining server is one like the others again.

    Raises:
        StateRefused: UNKNOWN_NODE.
    """
    row = _live(draft, name)
    if row.draining:
        draft.put(dataclasses.replace(row, draining=""))
        draft.change_job(unsettled=True)
        draft.audit("server_undrained", name, incarnation=row.incarnation, was=row.draining)
        for move in _open_moves(draft):
            if move.source == row.ref and move.why.startswith("drain of "):
                end(draft, move, f"{name} drains no longer")
    return _how_far(draft, row.ref, False)
