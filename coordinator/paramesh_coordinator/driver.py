"""The thin body around the pure brain: commits decisions, then acts on them; ticks.

    driver = Driver(config, store)
    await driver.start()
    client_id = await driver.decide(lambda draft: membership.register_client(draft, hello))

One task takes decisions one at a time, in order, so a decision always sees the state that
it is compared against. The commit runs in a thread (an fsync may take a while and beats
must be answered meanwhile) and is finished even if the caller hangs up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from paramesh import failpoints
from paramesh.errors import ConfigError, ParameshError, refuse
from paramesh.headroom import Headroom
from paramesh.v1 import coordinator_pb2 as co

from paramesh_coordinator import membership, replicas
from paramesh_coordinator.checkers import Liveness, Silent
from paramesh_coordinator.config import CoordinatorConfig
from paramesh_coordinator.feed import MapFeed
from paramesh_coordinator.planning import Recent
from paramesh_coordinator.rows import JobRow, PartitionRow, Ref, TableRow, encode
from paramesh_coordinator.stalls import STALL_TIMEOUTS, Stalls, demote, resume
from paramesh_coordinator.state import ClusterState, Draft, Ended, NodeKey, Registered, build_map
from paramesh_coordinator.store.base import MetaStore
from paramesh_coordinator.tight import Tight

__all__ = ["Driver", "boottime", "fresh_job"]

log = logging.getLogger(__name__)

T = TypeVar("T")
Decision = Callable[[Draft], Any]

TICKS_PER_BEAT = 5
"""Death is found at most a tick after the timeout: 0.1 s of the default 2 s."""


def boottime() -> float:
    """Seconds that go on while the machine sleeps, so that waking up is a late tick."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def fresh_job(config: CoordinatorConfig) -> JobRow:
    """The job's row as an empty store begins with it."""
    return JobRow(
        name=config.job,
        start_workers=config.start_workers,
        min_workers=config.min_workers,
        replicas=config.replicas,
        gather_ms=round(config.gather * 1000),
        step_timeout_ms=round(config.step_timeout * 1000),
        push_timeout_ms=round(config.push_timeout * 1000),
        min_isr=config.min_isr,
    )


def _reach(when: str, draft: Draft) -> None:
    """A test may end this process before or after the commit of each kind of decision."""
    if failpoints.armed():
        for kind in {kind for kind, _, _ in draft.audited}:
            failpoints.reach(f"{when}.{kind}")


class Driver:
    """Owns the store, the state, the clock and the tasks.

    Attributes:
        state: what is committed. Written only by the decision task.
        feed: the map that follows from it.
        deposed: set, with the reason, when a newer coordinator has taken over the store.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        store: MetaStore,
        clock: Callable[[], float] = boottime,
        wall: Callable[[], float] = time.time,
    ):
        self.config = config
        self.store = store
        self.clock = clock
        self.started = clock()
        self.deposed: asyncio.Future[ParameshError] = asyncio.get_running_loop().create_future()
        self._wall = wall
        self.state = ClusterState.load(store.scan(""), fresh_job(config))
        self.feed = MapFeed(build_map(self.state, store.term))
        self.liveness = self._new_liveness()
        self.stalls = Stalls(STALL_TIMEOUTS * config.failure_timeout, config.heartbeat_interval)
        self.tight = Tight(Headroom(config.memory_watermark))
        self.recent = Recent()
        """What happened lately, by the clock."""
        self.figures: dict[NodeKey, co.HeartbeatRequest] = {}
        """The last beat of each node, for people."""
        self._listeners: list[Callable[[], None]] = []
        self._queue: asyncio.Queue[tuple[Decision, asyncio.Future[Any]]] = asyncio.Queue()
        self._commits = ThreadPoolExecutor(1, thread_name_prefix="paramesh-commit")
        self._tasks: list[asyncio.Task[None]] = []
        self._telling: list[asyncio.Task[None]] = []
        """Events of servers' memory, while they are written down."""
        self._judging: asyncio.Task[None] | None = None
        """The decision on the last tick's silent nodes, while it is under way."""
        self._grace_told = ""
        self._began_empty = False
        """Whether the store held no cluster when this coordinator started."""

    def _new_liveness(self) -> Liveness:
        first_nonce = secrets.randbelow(1 << 62) + 1
        config = self.config
        return Liveness(
            config.heartbeat_interval, config.failure_timeout, config.client_timeout, self.clock(), first_nonce
        )

    @property
    def term(self) -> int:
        """This coordinator's term."""
        return self.store.term

    async def start(self) -> None:
        """Commit the new term's first decision, watch everybody, begin to tick.

        Raises:
            ParameshError: the store refuses; the coordinator cannot serve.
        """
        now = self.clock()
        for node in self.state.beating():
            self.liveness.track(node, now, heard=False)
        self._spawn(self._take_decisions(), "decisions")
        restarted = self.state.job.map_version > 0
        self._began_empty = not restarted
        if not restarted:
            self.store.transact({JobRow.PREFIX: None}, {JobRow.PREFIX: encode(self.state.job)})
        await self.decide(lambda draft: self._begin(draft, restarted))
        self._spawn(self._tick(), "tick")

    def _begin(self, draft: Draft, restarted: bool) -> None:
        if not draft.job.cluster:
            draft.change_job(cluster=secrets.token_hex(8))
        draft.raise_map()  # so that every watcher learns the new term
        replicas.adopt(draft)
        draft.audit(
            "coordinator_restarted" if restarted else "coordinator_started",
            self.config.job,
            watched=len(self.state.beating()),
            pending=len(self.state.operations()),
        )

    def _spawn(self, body: Any, name: str) -> None:
        self._tasks.append(asyncio.create_task(body, name=f"coordinator-{name}"))

    async def stop(self) -> None:
        """End the tasks; a decision being committed is finished first."""
        tasks = [*self._tasks, *self._telling, *([self._judging] if self._judging else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._commits.shutdown(wait=True)
        while not self._queue.empty():
            _, answer = self._queue.get_nowait()
            if not answer.done():
                answer.set_exception(refuse("NOT_READY", "the coordinator is stopping"))

    # --- decisions -----------------------------------------------------------------

    async def decide(self, decision: Callable[[Draft], T]) -> T:
        """Take a decision: commit what it writes, apply it, act on it.

        Returns:
            What `decision` returned, once committed.

        Raises:
            ParameshError: its refusal, or the store's; nothing was changed.
        """
        if self.deposed.done():
            raise self.deposed.result()
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((decision, answer))
        return await answer

    async def _take_decisions(self) -> None:
        while True:
            decision, answer = await self._queue.get()
            if answer.cancelled():
                continue
            # Shielded: a commit under way must be applied, or memory and store part ways.
            work = asyncio.ensure_future(self._decide(decision))
            try:
                result = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.gather(work, return_exceptions=True)
                if not answer.done():
                    answer.set_exception(refuse("NOT_READY", "the coordinator is stopping"))
                raise
            except Exception as error:
                if not answer.done():
                    answer.set_exception(error)
            else:
                if not answer.done():
                    answer.set_result(result)

    async def _decide(self, decision: Decision) -> Any:
        senses = self.recent.senses(self.liveness, self.clock())
        draft = Draft(self.state, self.term, round(self._wall() * 1000), senses)
        result = decision(draft)
        if draft.writes:
            await self._commit(draft)
            self.state.apply(draft.writes)
        self._act(draft)
        return result

    async def _commit(self, draft: Draft) -> None:
        loop = asyncio.get_running_loop()
        _reach("before", draft)
        try:
            await loop.run_in_executor(self._commits, self.store.transact, draft.compare, draft.encoded())
        except ParameshError as error:
            if error.reason == "STALE_TERM":
                self.step_down(error)
            else:
                log.error("commit refused reason=%s error=%s", error.reason, error)
            raise
        _reach("after", draft)

    def _act(self, draft: Draft) -> None:
        for effect in draft.effects:
            if isinstance(effect, Registered):
                self.liveness.track(effect.node, self.clock())
            elif isinstance(effect, Ended):
                self.liveness.forget(effect.node)
                self.stalls.forget(Ref(effect.node.name, effect.node.incarnation))
                self.tight.forget(Ref(effect.node.name, effect.node.incarnation))
                self.figures.pop(effect.node, None)
            else:
                self.recent.note(effect, self.clock())
        for kind, subject, evidence in draft.audited:
            level = logging.ERROR if kind == "partition_offline" else logging.INFO
            log.log(level, "decided kind=%s subject=%s evidence=%s", kind, subject, evidence)
        if self.state.job.map_version != self.feed.current.version:
            self.feed.publish(build_map(self.state, self.term))
        if draft.writes:
            for listener in self._listeners:
                listener()

    def after_commit(self, listener: Callable[[], None]) -> None:
        """Call `listener` on the loop after every commit."""
        self._listeners.append(listener)

    def meet_stranger(self, name: str, cluster: str, address: str) -> ParameshError:
        """A server that follows another cluster's map wants to register; the refusal.

        A store that was empty at this start and has placed nothing is then the wrong one, or
        the right one was lost: this coordinator stops before it does harm.
        """
        told = (
            f"server {name!r} holds partitions of job {self.config.job!r} under cluster {cluster}, and this "
            f"coordinator's state is cluster {self.state.job.cluster}"
        )
        if self._began_empty and not self.state.rows(TableRow):
            self.step_down(
                ConfigError(
                    f"state: it was empty, but {told}. Give --state the store that the cluster was started with; if it "
                    f"is lost: psctl meta rebuild --to STATE --server {address}, STATE being an empty one",
                    metadata={"key": "state"},
                )
            )
        else:
            log.error("refused: %s; end that server, or give it its own coordinator", told)
        return refuse("NOT_READY", f"{told}: it must be given its own coordinator, or be started anew")

    def step_down(self, error: ParameshError) -> None:
        """A newer coordinator is in charge: take no further decision."""
        if not self.deposed.done():
            log.error("stepping down term=%d reason=%s", self.term, error)
            self.deposed.set_result(error)

    # --- time ----------------------------------------------------------------------

    def beat(self, node: NodeKey, request: co.HeartbeatRequest, *, remote: bool) -> int | None:
        """Take in a beat, from another machine or not; the nonce to answer with, or None for who is not live here."""
        nonce = self.liveness.beat(node, request.echo, self.clock(), remote=remote)
        if nonce is not None:
            self.figures[node] = request
            if node.kind == "server":
                ref = Ref(node.name, node.incarnation)
                self.stalls.note(ref, request.stalled_ms / 1000, request.stalled_at, self.clock())
                if self.tight.note(ref, request.memory_tight):
                    self._tell_tight(ref, request)
                self.recent.rates.note(ref, ((one.partition, one.requests) for one in request.loads), self.clock())
        return nonce

    def _tell_tight(self, ref: Ref, beat: co.HeartbeatRequest) -> None:
        """Write down that a server's memory passed its watermark, up or down."""
        kind = "server_memory_tight" if beat.memory_tight else "server_memory_eased"
        rss = beat.rss_bytes
        log.log(logging.WARNING if beat.memory_tight else logging.INFO, "%s name=%s rss=%d", kind, ref.name, rss)

        async def tell() -> None:
            with contextlib.suppress(ParameshError):  # the store is full, or another leads: it is in the log
                await self.decide(lambda draft: draft.audit(kind, ref.name, incarnation=ref.incarnation, rss_bytes=rss))

        self._telling = [task for task in self._telling if not task.done()]
        self._telling.append(asyncio.create_task(tell(), name="coordinator-memory"))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.config.heartbeat_interval / TICKS_PER_BEAT)
            verdict = self.liveness.tick(self.clock())
            self._tell_grace(verdict.grace)
            # Not awaited here: a slow commit must not make the next tick late.
            if (verdict.dead or self._stalls_due()) and (self._judging is None or self._judging.done()):
                self._judging = asyncio.create_task(self._judge(verdict.dead), name="coordinator-judge")

    def _stalls_due(self) -> bool:
        """Whether a server that stalls leads something or is not drained yet, or one that did not stall lately is."""
        now, servers = self.clock(), {row.ref: row for row in self.state.live_servers()}
        due, calm = {stall.ref for stall in self.stalls.due(now)}, self.stalls.calm(now)
        if any(ref in servers and servers[ref].stalled for ref in calm):
            return True
        if not due & servers.keys():
            return False
        led = {part.primary for part in self.state.rows(PartitionRow).values()}
        return any(ref in led or not servers[ref].draining for ref in due & servers.keys())

    def _tell_grace(self, why: str) -> None:
        if bool(why) != bool(self._grace_told):
            log.warning("grace %s", f"begins anew why={why!r}" if why else "ends; silence counts again")
        self._grace_told = why

    async def _judge(self, dead: tuple[Silent, ...]) -> None:
        try:
            await self.decide(lambda draft: self._declare(draft, dead))
        except ParameshError as error:
            log.error("nobody declared dead, will try again reason=%s error=%s", error.reason, error)

    def _declare(self, draft: Draft, dead: tuple[Silent, ...]) -> None:
        now = self.clock()
        # Somebody may have been heard while this decision waited in the queue.
        still = [one for one in dead if self.liveness.silence(one.node, now) > one.timeout]
        membership.all_silent(draft, still)
        for stall in self.stalls.due(now):
            demote(draft, stall)
        for ref in self.stalls.calm(now):
            resume(draft, ref)

    def settings_differ(self) -> list[str]:
        """Settings that the job agreed on at its start and this start's flags contradict."""
        mine, agreed = fresh_job(self.config), self.state.job
        agreed_on = (
            "start_workers",
            "min_workers",
            "replicas",
            "min_isr",
            "gather_ms",
            "step_timeout_ms",
            "push_timeout_ms",
        )
        return [name for name in agreed_on if getattr(mine, name) != getattr(agreed, name)]
