"""Changes of replica sets that are nobody's death: compare-and-set by primaries, new learners,
surplus ones, and the operator's promotion with loss. Pure.

    done = change_isr(draft, primary, wishes)     # a primary asks
    for change in plan_replicas(parts, servers, senses): ...      # the coordinator plans
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from paramesh.errors import refuse

from paramesh_coordinator import moves, operators
from paramesh_coordinator.balance import Load, follower
from paramesh_coordinator.catalog import loads_of
from paramesh_coordinator.failover import promoted_row, settle
from paramesh_coordinator.rows import LossRow, MoveRow, NodeState, PartitionRow, PartitionState, Ref, ServerRow
from paramesh_coordinator.state import Draft, Dropped, Senses

__all__ = [
    "Change",
    "Limits",
    "Wish",
    "adopt",
    "change_isr",
    "is_even",
    "note_losses",
    "plan",
    "plan_replicas",
    "promote_with_loss",
]

REST_SECONDS = 2.0
"""A server that a primary has dropped is not made its learner again before: whatever made it
lag needs a moment, and each catch-up costs a snapshot."""


@dataclass(frozen=True)
class Wish:
    """One change of an in-sync set, as a primary asks for it."""

    partition: int
    epoch: int
    version: int
    isr: tuple[Ref, ...]
    why: str


def change_isr(draft: Draft, asking: Ref, wishes: Sequence[Wish]) -> list[int]:
    """Compare and set; what cannot be is left alone, and the map tells the asker.

    Done is only what the primary of the very row (epoch, version) asks: members that it adds are
    learners on live servers, and it may drop members only if it was itself heard less than two
    beats ago (else a cut-off primary would throw out the healthy ones). A wish for the set as it
    is counts as a change too: it ends the doubt about an earlier one.

    Returns:
        The partitions whose set was changed.
    """
    live = {row.ref for row in draft.live_servers()}
    done = []
    for wish in wishes:
        part = draft.partition(wish.partition)
        if part is None or not _may(draft, part, asking, wish, live):
            continue
        isr = (part.primary, *(ref for ref in wish.isr if ref != part.primary))
        added, removed = [r for r in isr if r not in part.isr], [r for r in part.isr if r not in isr]
        learners = tuple(ref for ref in part.learners if ref not in added)
        draft.put(dataclasses.replace(part, isr=isr, learners=learners))
        draft.effects += [Dropped(part.partition, ref) for ref in removed]
        kind = "isr_shrunk" if removed else "isr_grown" if added else "isr_kept"
        draft.audit(
            kind, str(part.partition), primary=str(asking), isr=_names(isr), why=wish.why[:200],
            **{key: _names(refs) for key, refs in (("added", added), ("removed", removed)) if refs},
        )  # fmt: skip
        done.append(part.partition)
    return done


def note_losses(draft: Draft, asking: Ref, losses: Mapping[int, int]) -> None:
    """Write down acknowledged updates that went with a primary (acks=primary), and tell each total once.

    Args:
        draft: the decision.
        asking: who says so; only a partition's primary is believed.
        losses: total by partition, since it was made.
    """
    known = {row.partition: row.total for row in draft.rows(LossRow)}
    for partition, total in sorted(losses.items()):
        part = draft.partition(partition)
        if part is None or part.primary != asking or total <= known.get(partition, 0):
            continue
        draft.put(LossRow(partition, total))
        lost = total - known.get(partition, 0)
        draft.audit("updates_lost", str(partition), lost=lost, total=total, primary=str(asking), epoch=part.epoch)


def _names(refs: Iterable[Ref]) -> list[str]:
    return [str(ref) for ref in refs]


def _may(draft: Draft, part: PartitionRow, asking: Ref, wish: Wish, live: set[Ref]) -> bool:
    if part.state is not PartitionState.ONLINE or part.primary != asking or asking not in live:
        return False
    if (part.epoch, part.version) != (wish.epoch, wish.version):
        return False
    if len(set(wish.isr)) != len(wish.isr) or asking not in wish.isr:
        return False
    if any(ref not in part.learners or ref not in live for ref in wish.isr if ref not in part.isr):
        return False
    return set(part.isr) <= set(wish.isr) or draft.senses.fresh(asking)


# --- planning --------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """How many replicas catch up at a time: each costs a snapshot over the network."""

    per_target: int = 2
    per_primary: int = 2


@dataclass(frozen=True)
class Change:
    """One step of a plan."""

    kind: str
    """`learner_added`, `learner_removed` or `replica_removed`."""
    row: PartitionRow
    """The row as it is to be."""
    ref: Ref
    """Whom it is about."""


def plan_replicas(
    parts: Sequence[PartitionRow],
    servers: Sequence[ServerRow],
    senses: Senses,
    limits: Limits | None = None,
    moving: Iterable[MoveRow] = (),
) -> list[Change]:
    """What to do so that online partitions get the replicas they ask for, one step per partition.

    Too few: a learner, on another host if there is a choice, where fewest bytes are. Too many: first
    learners go, then in-sync followers, from whoever holds most. Those with the fewest in-sync
    replicas come first; what the limits leave out comes when learners have caught up.

    Args:
        parts: all partitions.
        servers: the live ones.
        senses: nobody is removed unless all who stay were heard just now.
        limits: of learners at a time.
        moving: open moves: what they bring is one replica more than is asked for, until they are done.
    """
    planner = _Planner(parts, servers, senses, limits or Limits(), moving)
    changes = (planner.step(part) for part in planner.by_need(parts))
    return [change for change in changes if change is not None]


class _Planner:
    """The loads as of the steps planned so far."""

    def __init__(
        self,
        parts: Sequence[PartitionRow],
        servers: Sequence[ServerRow],
        senses: Senses,
        limits: Limits,
        moving: Iterable[MoveRow],
    ):
        self._senses = senses
        self._limits = limits
        self._moving = {move.partition: move for move in moving}
        self._draining = {row.ref for row in servers if row.draining}
        self._refs = {row.name: row.ref for row in servers}
        self._live = set(self._refs.values())
        self._loads: dict[str, Load] = {load.name: load for load in loads_of(servers, parts)}
        # Learners of an offline partition wait; only those that catch up cost anything.
        online = [part for part in parts if part.state is PartitionState.ONLINE]
        self._into: Counter[Ref] = Counter(ref for part in online for ref in part.learners)
        self._out_of: Counter[Ref] = Counter(part.primary for part in online for _ in part.learners)

    def by_need(self, parts: Sequence[PartitionRow]) -> list[PartitionRow]:
        """Online partitions, the barest first."""
        online = [part for part in parts if part.state is PartitionState.ONLINE and part.primary in self._live]
        return sorted(online, key=lambda part: (len(self._in_sync(part)), part.partition))

    def _in_sync(self, part: PartitionRow) -> list[Ref]:
        return [ref for ref in part.isr if ref in self._live]

    def step(self, part: PartitionRow) -> Change | None:
        """The next thing that this partition needs."""
        gone = next((ref for ref in part.learners if ref not in self._live), None)
        if gone is not None:
            return _without_learner(part, gone)
        move = self._moving.get(part.partition)
        brought = move is not None and not move.swap and move.target in part.holders
        missing = part.replicas + brought - len(self._in_sync(part)) - len(part.learners)
        if missing > 0:
            return self._add(part)
        if missing < 0:
            surplus = [ref for ref in part.learners if move is None or ref != move.target]
            return _without_learner(part, surplus[-1]) if surplus else self._remove(part)
        return None

    def _add(self, part: PartitionRow) -> Change | None:
        if self._out_of[part.primary] >= self._limits.per_primary:
            return None
        open_to = [load for name, load in self._loads.items() if self._takes_more(part, name)]
        shunned = {ref.name for partition, ref in self._senses.dropped if partition == part.partition}
        here = [part.primary, *(ref for ref in (*self._in_sync(part), *part.learners) if ref != part.primary)]
        target = follower(part.nbytes, [self._loads[ref.name] for ref in here], open_to, shunned)
        if target is None:
            return None
        ref = self._refs[target.name]
        self._loads[target.name] = target.plus_copy(part.nbytes)
        self._into[ref] += 1
        self._out_of[part.primary] += 1
        return Change("learner_added", dataclasses.replace(part, learners=(*part.learners, ref)), ref)

    def _takes_more(self, part: PartitionRow, name: str) -> bool:
        ref = self._refs[name]
        rested = self._senses.dropped.get((part.partition, ref), REST_SECONDS) >= REST_SECONDS
        return rested and ref not in self._draining and self._into[ref] < self._limits.per_target

    def _remove(self, part: PartitionRow) -> Change | None:
        """The follower that is beside another one on its host, then the one that holds most."""
        in_sync = self._in_sync(part)
        hosts = Counter(self._loads[ref.name].host for ref in in_sync)
        move = self._moving.get(part.partition)
        kept = {part.primary} | ({move.source, move.target} if move is not None else set())
        followers = [ref for ref in in_sync if ref not in kept]
        if not followers:
            return None
        ref = max(
            followers,
            key=lambda r: (r in self._draining, hosts[self._loads[r.name].host] > 1, self._loads[r.name].total, r.name),
        )
        # If whoever stays has just fallen silent, the surplus replica may be the one to promote.
        if not all(self._senses.fresh(other) for other in in_sync if other != ref):
            return None
        load = self._loads[ref.name]
        self._loads[ref.name] = dataclasses.replace(
            load, copies=load.copies - part.nbytes, partitions=load.partitions - 1
        )
        return Change("replica_removed", dataclasses.replace(part, isr=tuple(r for r in part.isr if r != ref)), ref)


def _without_learner(part: PartitionRow, ref: Ref) -> Change:
    return Change(
        "learner_removed", dataclasses.replace(part, learners=tuple(r for r in part.learners if r != ref)), ref
    )


def is_even(parts: Iterable[PartitionRow], live: Collection[Ref]) -> bool:
    """Whether a plan would find nothing to do, without making one."""
    for part in parts:
        in_sync = sum(ref in live for ref in part.isr)
        if part.state is not PartitionState.ONLINE:
            if in_sync:
                return False
        elif in_sync + len(part.learners) != part.replicas:
            return False
    return True


def plan(draft: Draft, *, auto: bool = True) -> int:
    """Decide the next steps; also gives partitions that were held back to somebody, once they may go.

    Args:
        draft: the decision.
        auto: bytes are evened out without being asked when servers came or went.

    Returns:
        How many partitions and moves were changed.
    """
    settled = settle(draft)
    for partition, new in settled.promoted.items():
        draft.audit("partition_promoted", str(partition), to=str(new), was=str(settled.before[partition]))
    advanced = _give_up(draft) + moves.advance(draft)
    moving = [row for row in draft.rows(MoveRow) if row.active]
    # Who was given up a moment ago is not asked again in the same breath.
    dropped = dict(draft.senses.dropped) | dict.fromkeys(draft.senses.stuck, 0.0)
    senses = dataclasses.replace(draft.senses, dropped=dropped)
    changes = plan_replicas(draft.rows(PartitionRow), draft.live_servers(), senses, moving=moving)
    by_kind: dict[tuple[str, Ref], list[int]] = {}
    for change in changes:
        draft.put(change.row)
        by_kind.setdefault((change.kind, change.ref), []).append(change.row.partition)
    for (kind, ref), partitions in by_kind.items():
        draft.audit(kind, ref.name, incarnation=ref.incarnation, partitions=partitions)
    quiet = not changes and not any(part.learners for part in draft.rows(PartitionRow))
    planned = moves.plan(draft, auto=auto, settled=quiet)
    return len(changes) + len(settled.promoted) + advanced + planned


def _give_up(draft: Draft) -> int:
    """Take away learners that do not catch up, and the moves that wait for them: their places go to others."""
    given_up = 0
    for partition, ref in sorted(draft.senses.stuck):
        part = draft.partition(partition)
        if part is None or ref not in part.learners:
            continue
        draft.put(_without_learner(part, ref).row)
        draft.effects.append(Dropped(partition, ref))
        draft.audit("learner_given_up", ref.name, incarnation=ref.incarnation, partition=partition)
        for move in draft.rows(MoveRow):
            if move.active and (move.partition, move.target) == (partition, ref):
                moves.end(draft, move, f"{ref.name} did not catch up in time")
        given_up += 1
    return given_up


def adopt(draft: Draft) -> None:
    """Give rows of before replication their version: the map's as of this decision."""
    for part in draft.rows(PartitionRow):
        if not part.version:
            draft.put(part)


# --- the operator ----------------------------------------------------------------------


def promote_with_loss(draft: Draft, partition: int, name: str) -> PartitionRow:
    """An operator gives an offline partition to an incomplete replica: what only others had is lost.

    Raises:
        RequestRefused: WRONG_PARTITION, if there is none, or it is online.
        StateRefused: UNKNOWN_NODE.
        PartitionOffline: an in-sync copy may still come back, or the server holds no replica.
    """
    part = draft.partition(partition)
    if part is None:
        raise refuse("WRONG_PARTITION", f"the job has no partition {partition}", partition=partition)
    servers: Mapping[Ref, ServerRow] = {row.ref: row for row in draft.rows(ServerRow)}
    target = next((row for row in servers.values() if row.name == name and row.state is NodeState.LIVE), None)
    if target is None:
        raise refuse("UNKNOWN_NODE", f"no live server is named {name[:80]!r}; psctl status lists them")
    if part.state is not PartitionState.OFFLINE:
        raise refuse(
            "WRONG_PARTITION", f"partition {partition} is online at {part.server}; there is nothing to give away"
        )
    silent = [str(ref) for ref in part.isr if ref in servers and not servers[ref].certain]
    if silent:
        raise refuse(
            "PARTITION_OFFLINE",
            f"partition {partition} has in-sync copies that may come back: {', '.join(silent)}. Let them be heard "
            "again, or make sure that they have ended: start a ps-server of the same --name, which is proof of it",
            waits_for=",".join(silent),
        )
    if target.ref not in part.learners:
        holders = ", ".join(ref.name for ref in part.learners) or "nobody"
        raise refuse("PARTITION_OFFLINE", f"server {name!r} holds no copy of partition {partition}; {holders} does")
    lost = part.isr
    row = dataclasses.replace(part, isr=(target.ref,), learners=tuple(r for r in part.learners if r != target.ref))
    row = promoted_row(row, target.ref)
    draft.put(row)
    operators.ask_again(draft, {target.ref})
    draft.audit(
        "replica_promoted", str(partition), to=str(target.ref), lost=_names(lost), accept_loss=True, epoch=row.epoch
    )
    return row
