"""Who takes over: what a server's end or return means for in-sync sets. Pure.

    forget(draft, ref, certain=True)       # out of every set that it may leave
    settled = settle(draft)                # then every partition gets a live primary, or is OFFLINE

Only a live member of the in-sync set is ever made primary: it alone has everything that was
acknowledged. Certain death takes a server out of the sets; silence does not, for it may be
the only good copy of what its successor is about to lose. The map row is the order: servers
follow it (docs/decisions/0005).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from paramesh_coordinator import operators
from paramesh_coordinator.rows import NodeState, PartitionRow, PartitionState, Ref, ServerRow, moved
from paramesh_coordinator.state import Draft, FailedOver

__all__ = ["Settled", "forget", "promoted_row", "settle", "tell_offline"]

SECOND_FAILOVER_SECONDS = 30.0
"""A partition that failed over for silence waits that long, or for positive death, before it
does so again: a flapping network must not wear out the in-sync set."""


@dataclass
class Settled:
    """What changed hands.

    Attributes:
        promoted: new primary by partition.
        offline: partitions that went offline.
        before: the primary before, of each of both.
    """

    promoted: dict[int, Ref] = field(default_factory=dict)
    offline: list[int] = field(default_factory=list)
    before: dict[int, Ref] = field(default_factory=dict)

    def evidence(self, ref: Ref) -> dict[str, object]:
        """For the audit line about one server: what it was the primary of."""
        by_name: dict[str, list[int]] = {}
        for partition, new in self.promoted.items():
            if self.before[partition] == ref:
                by_name.setdefault(new.name, []).append(partition)
        lost = [partition for partition in self.offline if self.before[partition] == ref]
        return {"offline": lost} | ({"promoted": by_name} if by_name else {})


def forget(draft: Draft, ref: Ref, *, certain: bool) -> None:
    """Take a server that is not live any more out of learners and, if it certainly ended, in-sync sets.

    The last member of an in-sync set stays, so that people see whom the partition waited for.
    """
    for part in draft.rows(PartitionRow):
        learners = tuple(r for r in part.learners if r != ref)
        isr = part.isr
        if certain and ref in isr and len(isr) > 1:
            isr = tuple(r for r in isr if r != ref)
        if (isr, learners) != (part.isr, part.learners):
            draft.put(dataclasses.replace(part, isr=isr, learners=learners))


def settle(draft: Draft, revived: Ref | None = None) -> Settled:
    """Give every partition whose primary is not live an in-sync one that is, or take it offline.

    One that failed over for silence lately is not given away a second time on silence alone;
    it comes back when that primary is known to have ended, when somebody of its in-sync set
    is heard again, or after `SECOND_FAILOVER_SECONDS`.

    Args:
        draft: the decision.
        revived: a server that was just heard again; it is the primary of every offline partition
            that has it in sync.
    """
    servers = {row.ref: row for row in draft.rows(ServerRow)}
    live = {ref for ref, row in servers.items() if row.state is NodeState.LIVE}
    parts = draft.rows(PartitionRow)
    load = Counter(dict.fromkeys(live, 0))
    for part in parts:
        if part.state is PartitionState.ONLINE and part.primary in live:
            load[part.primary] += part.nbytes
    settled = Settled()
    for part in parts:
        if part.state is PartitionState.RESTORING or (part.state is PartitionState.ONLINE and part.primary in live):
            continue  # what is restored has one copy, on disk: `restoring` places it anew
        new = _successor(draft, part, servers[part.primary], live, load, revived)
        if new is not None:
            load[new] += part.nbytes
            settled.promoted[part.partition], settled.before[part.partition] = new, part.primary
            draft.put(promoted_row(part, new))
            if new != part.primary and not servers[part.primary].certain:
                draft.effects.append(FailedOver(part.partition))
        elif part.state is PartitionState.ONLINE:
            settled.offline.append(part.partition)
            settled.before[part.partition] = part.primary
            draft.put(dataclasses.replace(part, state=moved(part.state, PartitionState.OFFLINE)))
    operators.ask_again(draft, set(settled.promoted.values()))
    return settled


def _successor(
    draft: Draft, part: PartitionRow, old: ServerRow, live: set[Ref], load: Counter[Ref], revived: Ref | None
) -> Ref | None:
    if revived in part.isr and revived in live:
        return revived
    if not old.certain and part.partition in draft.senses.held_back:
        return None
    candidates = [ref for ref in part.isr if ref in live]
    # One that was not heard for two beats is live still, but may be the next to be declared dead.
    draining = {row.ref for row in draft.live_servers() if row.draining}
    return min(
        candidates, key=lambda ref: (not draft.senses.fresh(ref), ref in draining, load[ref], ref.name), default=None
    )


def promoted_row(part: PartitionRow, new: Ref) -> PartitionRow:
    """The row under a new primary, which is in sync: next epoch, online."""
    return dataclasses.replace(
        part,
        server=new.name,
        incarnation=new.incarnation,
        epoch=part.epoch + 1,
        state=PartitionState.ONLINE,
        isr=(new, *(ref for ref in part.isr if ref != new)),
    )


def tell_offline(draft: Draft, offline: Iterable[int]) -> None:
    """Say loudly which partitions have nobody, whom they wait for, and what would bring them back."""
    certain = {row.ref for row in draft.rows(ServerRow) if row.certain}
    live = {row.ref for row in draft.live_servers()}
    told: dict[tuple[str, str], list[int]] = {}
    for partition in sorted(offline):
        part = draft.partition(partition)
        assert part is not None
        told.setdefault((",".join(map(str, part.isr)), _remedy(part, certain, live)), []).append(partition)
    for (waits_for, remedy), partitions in told.items():
        subject = ",".join(map(str, partitions[:8])) + (",..." if len(partitions) > 8 else "")
        draft.audit("partition_offline", subject, partitions=partitions, waits_for=waits_for, remedy=remedy)


def _remedy(part: PartitionRow, certain: set[Ref], live: set[Ref]) -> str:
    if any(ref in live for ref in part.isr):
        return (
            f"it failed over for silence less than {SECOND_FAILOVER_SECONDS:.0f} s ago; it comes back when "
            f"{part.primary.name} is heard again, is known to have ended, or when that time is over"
        )
    if not set(part.isr) <= certain:
        silent = ", ".join(str(ref) for ref in part.isr if ref not in certain)
        return f"it comes back by itself when the very process {silent} is heard again (paused? cut off?)"
    if part.learners:
        names = ", ".join(ref.name for ref in part.learners)
        return f"every in-sync copy is gone; psctl promote takes an incomplete one, with loss, from: {names}"
    return "every copy is gone; start the job anew from its last checkpoint"
