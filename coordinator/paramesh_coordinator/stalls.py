"""Who beats and makes no progress that it could make alone (a gray failure). Pure: time is passed in.

    stalls.note(ref, stalled_seconds, at, now)       # every beat of a server
    for stall in stalls.due(now): demote(draft, stall)
    for ref in stalls.calm(now): resume(draft, ref)

A server says for how long one piece of work, which waits for nobody, has been running on a
replica, or for how long its event loop did nothing. Work that goes on, however much of it, is
many pieces. One that stalls lives: it keeps its place in in-sync sets, but what it leads goes to
followers, and it gets nothing new until it has been well for a while.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from paramesh_coordinator import operators
from paramesh_coordinator.failover import SECOND_FAILOVER_SECONDS, promoted_row
from paramesh_coordinator.rows import STALLED, PartitionRow, PartitionState, Ref
from paramesh_coordinator.state import Draft, FailedOver

__all__ = ["STALL_TIMEOUTS", "Stall", "Stalls", "demote", "resume"]

STALL_TIMEOUTS = 3
"""Failure timeouts of no progress that are a failure: with two beats on the way another leads within five of
them, and a process that something keeps busy for a second or three is left alone."""


@dataclass(frozen=True)
class Stall:
    """A server that makes no progress, with the evidence."""

    ref: Ref
    seconds: float
    at: str
    """Which partition, or "the event loop"."""


@dataclass
class _Seen:
    seconds: float
    at: str
    heard: float
    """When its last beat came."""
    since: float | None
    """When it was first over the limit, without a beat in between that was not."""
    well: float
    """Since when it was not over it."""


class Stalls:
    """What the last beats of each server said.

    Args:
        limit: seconds without progress that are a failure.
        interval: seconds between beats.
    """

    def __init__(self, limit: float, interval: float) -> None:
        self._limit = limit
        self._interval = interval
        self._seen: dict[Ref, _Seen] = {}

    def note(self, ref: Ref, seconds: float, at: str, now: float) -> None:
        """A beat came."""
        seen = self._seen.setdefault(ref, _Seen(0.0, "", now, None, now))
        over = seconds > self._limit
        seen.since = (seen.since if seen.since is not None else now) if over else None
        seen.well = now if over else seen.well
        seen.seconds, seen.at, seen.heard = seconds, at[:80], now

    def forget(self, ref: Ref) -> None:
        """It ended."""
        self._seen.pop(ref, None)

    def due(self, now: float) -> list[Stall]:
        """Whoever said so in two beats and was heard just now.

        A process that was stopped as a whole speaks once of its past when it goes on; one beat is no proof.
        """
        return [
            Stall(ref, seen.seconds, seen.at)
            for ref, seen in sorted(self._seen.items())
            if seen.since is not None
            and seen.heard - seen.since >= self._interval / 2
            and now - seen.heard <= 2 * self._interval
        ]

    def calm(self, now: float) -> list[Ref]:
        """Whoever has been well for as long as keeps a partition from failing over twice."""
        return [
            ref
            for ref, seen in sorted(self._seen.items())
            if seen.since is None
            and now - seen.well >= SECOND_FAILOVER_SECONDS
            and now - seen.heard <= 2 * self._interval
        ]


def demote(draft: Draft, stall: Stall) -> bool:
    """Give what a stalled server leads to in-sync followers that are heard; whether anything changed."""
    row = next((row for row in draft.live_servers() if row.ref == stall.ref), None)
    if row is None:
        return False
    why = f"{STALLED}: {stall.at}"
    news = not row.draining
    if news:
        draft.put(dataclasses.replace(row, draining=why))
        draft.change_job(unsettled=True)
    promoted, stuck = _give_away(draft, stall.ref)
    if promoted:
        operators.ask_again(draft, set(promoted.values()))
    if news or promoted:
        by_name: dict[str, list[int]] = {}
        for partition, new in promoted.items():
            by_name.setdefault(new.name, []).append(partition)
        draft.audit(
            "server_stalled", stall.ref.name, incarnation=stall.ref.incarnation, at=stall.at,
            stalled_s=round(stall.seconds, 3), promoted=by_name, nobody_else=stuck,
        )  # fmt: skip
    return news or bool(promoted)


def _give_away(draft: Draft, ref: Ref) -> tuple[Mapping[int, Ref], list[int]]:
    """New primary by partition, and the partitions that nobody else can lead now."""
    able = {row.ref for row in draft.live_servers() if not row.stalled and row.ref != ref}
    able = {other for other in able if draft.senses.fresh(other)}
    load = Counter[Ref]()
    for part in draft.rows(PartitionRow):
        load[part.primary] += part.nbytes
    promoted: dict[int, Ref] = {}
    stuck: list[int] = []
    for part in draft.rows(PartitionRow):
        if part.primary != ref or part.state is not PartitionState.ONLINE:
            continue
        heirs = [other for other in part.isr if other in able]
        if not heirs or part.partition in draft.senses.held_back:
            stuck.append(part.partition)
            continue
        new = min(heirs, key=lambda other: (load[other], other.name))
        load[new] += part.nbytes
        promoted[part.partition] = new
        draft.put(promoted_row(part, new))
        draft.effects.append(FailedOver(part.partition))
    return promoted, stuck


def resume(draft: Draft, ref: Ref) -> bool:
    """A server that was drained for this makes progress again; whether it was."""
    row = next((row for row in draft.live_servers() if row.ref == ref), None)
    if row is None or not row.stalled:
        return False
    draft.put(dataclasses.replace(row, draining=""))
    draft.change_job(unsettled=True)
    draft.audit("server_recovered", ref.name, incarnation=ref.incarnation, was=row.draining)
    return True
