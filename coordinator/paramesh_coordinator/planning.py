"""The legs of `replicas.plan`, and what the coordinator remembers only while it runs.

    recent.note(effect, now)                 # failovers for silence, dropped followers
    senses = recent.senses(liveness, now)    # what the next decision may know of it

A restart forgets it. That is safe: it only spaces decisions out, it permits nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from paramesh.errors import ParameshError

from paramesh_coordinator import replicas
from paramesh_coordinator.checkers import Liveness
from paramesh_coordinator.failover import SECOND_FAILOVER_SECONDS
from paramesh_coordinator.rates import Rates
from paramesh_coordinator.rows import PartitionRow, PartitionState, Ref
from paramesh_coordinator.state import Dropped, Effect, FailedOver, NodeKey, Senses

if TYPE_CHECKING:
    from paramesh_coordinator.driver import Driver

__all__ = ["Planning", "Recent"]

log = logging.getLogger(__name__)

K = TypeVar("K")

DROPPED_SECONDS = 60.0
"""As long, whoever was dropped is made a learner of that partition again only if there is nobody else."""

LEARNER_SECONDS, LEARNER_BYTES = 120.0, 1 << 20
"""A learner has so long to catch up, and a second more for so many bytes; then its place goes to another."""

PAUSE_SECONDS = 0.1
"""Between two plans, at least: each is a commit, and a new map for everybody."""

LOOK_SECONDS = 0.5
"""Looks again after that long without a commit: time passes for those that are held back."""


class Recent:
    """Moments by the monotonic clock."""

    def __init__(self) -> None:
        self.rates = Rates()
        self.uneven = False
        """Requests have been uneven for so long that the next plan mends it."""
        self._failovers: dict[int, float] = {}
        self._dropped: dict[tuple[int, Ref], float] = {}
        self._learning: dict[tuple[int, Ref], float] = {}
        """Since when each learner of an online partition is one."""
        self.stuck: frozenset[tuple[int, Ref]] = frozenset()

    def watch(self, parts: Iterable[PartitionRow], now: float) -> None:
        """Look who is catching up, and since when."""
        online = [part for part in parts if part.state is PartitionState.ONLINE]
        learning = {(part.partition, ref): part.nbytes for part in online for ref in part.learners}
        self._learning = {key: self._learning.get(key, now) for key in learning}
        self.stuck = frozenset(
            key
            for key, since in self._learning.items()
            if now - since > LEARNER_SECONDS + learning[key] / LEARNER_BYTES
        )

    def note(self, effect: Effect, now: float) -> None:
        """Remember a committed effect."""
        if isinstance(effect, FailedOver):
            self._failovers[effect.partition] = now
        elif isinstance(effect, Dropped):
            self._dropped[effect.partition, effect.ref] = now

    def senses(self, liveness: Liveness, now: float) -> Senses:
        """What a decision taken now may know."""
        self._failovers = _younger(self._failovers, now - SECOND_FAILOVER_SECONDS)
        self._dropped = _younger(self._dropped, now - DROPPED_SECONDS)
        return Senses(
            fresh=lambda ref: liveness.fresh(NodeKey("server", *ref), now),
            held_back=frozenset(self._failovers),
            dropped={key: now - at for key, at in self._dropped.items()},
            stuck=self.stuck,
            rates=self.rates.by_partition(),
            uneven=self.uneven,
        )

    @property
    def waits(self) -> bool:
        """Whether time alone may change what a plan says."""
        return bool(self._failovers or self._dropped)


def _younger(moments: Mapping[K, float], oldest: float) -> dict[K, float]:
    return {key: at for key, at in moments.items() if at > oldest}


class Planning:
    """Plans after every change of the map, and now and then while something waits for its time."""

    def __init__(self, driver: Driver):
        self._driver = driver
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._planned = -1
        """The map's version at which there was nothing left to do."""

    def start(self) -> None:
        """Begin with what an earlier coordinator left."""
        self._driver.after_commit(self._wake.set)
        self._wake.set()
        self._task = asyncio.create_task(self._run(), name="coordinator-planning")

    async def stop(self) -> None:
        """End; nothing is lost, the next coordinator plans anew."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while not self._driver.deposed.done():
            try:
                async with asyncio.timeout(LOOK_SECONDS):  # wait_for of Python 3.11 can lose the cancelling of `stop`
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if self._is_due():
                await self._plan()
                await asyncio.sleep(PAUSE_SECONDS)

    def _is_due(self) -> bool:
        state = self._driver.state
        self._driver.recent.uneven = self._is_uneven()
        self._driver.recent.watch(state.rows(PartitionRow).values(), self._driver.clock())
        if self._driver.recent.uneven or self._driver.recent.stuck:
            return True
        if state.job.unsettled or state.moves() or any(row.draining for row in state.live_servers()):
            return True
        if state.job.map_version == self._planned and not self._driver.recent.waits:
            return False
        live = {row.ref for row in state.live_servers()}
        if not replicas.is_even(state.rows(PartitionRow).values(), live):
            return True
        self._planned = state.job.map_version
        return False

    def _is_uneven(self) -> bool:
        """Whether some server has served many more requests than another for a while, and nobody looked lately."""
        parts = self._driver.state.rows(PartitionRow).values()
        led = {part.partition: part.primary for part in parts if part.state is PartitionState.ONLINE}
        able = [row.ref for row in self._driver.state.live_servers() if not row.draining]
        return self._driver.config.rebalance and self._driver.recent.rates.due(led, able, self._driver.clock())

    async def _plan(self) -> None:
        try:
            changed = await self._driver.decide(partial(replicas.plan, auto=self._driver.config.rebalance))
        except ParameshError as error:
            log.error("replicas not planned, will try again reason=%s error=%s", error.reason, error)
            return
        if self._driver.recent.uneven:
            self._driver.recent.rates.planned(self._driver.clock())
            self._driver.recent.uneven = False
        # Surplus replicas go only while all who stay are fresh: asked again until it is so.
        surplus = any(len(part.isr) > part.replicas for part in self._driver.state.rows(PartitionRow).values())
        self._planned = -1 if changed or surplus else self._driver.state.job.map_version
