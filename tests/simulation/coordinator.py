"""The coordinator's process: `driver.py`, `planning.py`, `errands.py` and the services, as handlers.

Decisions are the real ones, on the real rows, in the real store in memory. What it knows beside
the store dies with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from paramesh.errors import ParameshError, refuse
from paramesh.routing import Routes
from paramesh_coordinator import catalog, membership, moves, operators, replicas
from paramesh_coordinator.checkers import Liveness, Silent
from paramesh_coordinator.driver import TICKS_PER_BEAT, fresh_job
from paramesh_coordinator.planning import LOOK_SECONDS, PAUSE_SECONDS, Recent
from paramesh_coordinator.replicas import Wish
from paramesh_coordinator.rows import JobRow, PartitionRow, Ref, ServerRow, encode
from paramesh_coordinator.state import ClusterState, Draft, Ended, NodeKey, Registered, build_map
from paramesh_coordinator.store import MemoryStore

from tests.simulation.kernel import Lock, Process, Signal, Task
from tests.simulation.retry import Backoff

if TYPE_CHECKING:
    from tests.simulation.world import World

BEAT_S, TIMEOUT_S, CLIENT_TIMEOUT_S = 0.5, 2.0, 10.0
LIMITS = catalog.Limits(1 << 30, 64)


class Coordinator:
    """One run of it on the store of the world."""

    def __init__(self, world: World) -> None:
        self.world, self.kernel, self.net = world, world.kernel, world.net
        self.process = Process("coordinator")
        self.store = MemoryStore(world.medium)
        self.state = ClusterState.load(self.store.scan(""), fresh_job(world.config))
        first_nonce = world.rng.randrange(1 << 40) + 1
        self.liveness = Liveness(BEAT_S, TIMEOUT_S, CLIENT_TIMEOUT_S, self.kernel.now, first_nonce)
        self.heard: dict[NodeKey, float] = {}
        """Node -> how long this process had run (not stopped) when it was heard last; for the checks."""
        self.recent = Recent()
        self.routes = Routes(build_map(self.state, self.store.term))
        self._published = Signal()
        self._committed = Signal()
        self._deciding = Lock()
        self._planned = -1
        self._errands: dict[int, Task] = {}
        for node in self.state.beating():
            self.liveness.track(node, self.kernel.now, heard=False)
        self.began = self.decided = self.ran
        self._started = self.kernel.spawn(self.process, self._start(), "start")

    async def _start(self) -> None:
        restarted = self.state.job.map_version > 0
        if not restarted:
            self.store.transact({JobRow.PREFIX: None}, {JobRow.PREFIX: encode(self.state.job)})
        await self.decide(self._begin)
        for body in (self._tick(), self._plan()):
            self.kernel.spawn(self.process, body, "coordinator")

    def _begin(self, draft: Draft) -> None:
        draft.raise_map()
        replicas.adopt(draft)

    # --- decisions ---

    async def decide(self, decision: Callable[[Draft], Any]) -> Any:
        """One at a time; once begun it ends, whoever asked."""
        work = self.kernel.spawn(self.process, self._queued(decision), "decision")
        return await work

    async def _queued(self, decision: Callable[[Draft], Any]) -> Any:
        await self._deciding.acquire()
        try:
            return await self._decide(decision)
        finally:
            self._deciding.release()

    async def _decide(self, decision: Callable[[Draft], Any]) -> Any:
        draft = Draft(self.state, self.store.term, 0, self.recent.senses(self.liveness, self.kernel.now))
        self.decided = self.ran
        result = decision(draft)
        if draft.writes:
            await self.kernel.sleep(self.world.commit_delay())
            if self._started.done:
                self.world.refuse_commit()
            self.store.transact(draft.compare, draft.encoded())
            self.world.checks.committed(draft)
            await self.kernel.sleep(self.world.commit_delay())
            self.state.apply(draft.writes)
        self._act(draft)
        return result

    def _act(self, draft: Draft) -> None:
        for effect in draft.effects:
            if isinstance(effect, Registered):
                self.liveness.track(effect.node, self.kernel.now)
                self.heard[effect.node] = self.ran
            elif isinstance(effect, Ended):
                self.liveness.forget(effect.node)
            else:
                self.recent.note(effect, self.kernel.now)
        for kind, subject, evidence in draft.audited:
            self.kernel.note(f"coordinator {kind} {subject} {evidence[:200]}")
        if self.state.job.map_version != self.routes.version:
            self.routes = Routes(build_map(self.state, self.store.term))
            self._published.fire()
        if draft.writes:
            self._committed.fire()
            self._look()

    # --- time ---

    @property
    def ran(self) -> float:
        """Seconds of the world in which this process was not stopped."""
        return self.kernel.now - self.process.stopped

    async def _tick(self) -> None:
        judging: Task | None = None
        while True:
            await self.kernel.sleep(BEAT_S / TICKS_PER_BEAT)
            verdict = self.liveness.tick(self.kernel.now)
            if verdict.dead and (judging is None or judging.done):
                judge = partial(self._declare, dead=verdict.dead)
                judging = self.kernel.spawn(self.process, self.decide(judge), "judge")

    def _declare(self, draft: Draft, dead: tuple[Silent, ...]) -> None:
        now = self.kernel.now
        still = [one for one in dead if self.liveness.silence(one.node, now) > one.timeout]
        membership.all_silent(draft, still)

    async def _plan(self) -> None:
        while True:
            await self.kernel.wait(self._committed.next, LOOK_SECONDS)
            if not self._is_due():
                continue
            try:
                changed = await self.decide(replicas.plan)
            except ParameshError:
                continue
            surplus = any(len(part.isr) > part.replicas for part in self.state.rows(PartitionRow).values())
            self._planned = -1 if changed or surplus else self.state.job.map_version
            await self.kernel.sleep(PAUSE_SECONDS)

    def _is_due(self) -> bool:
        state = self.state
        if state.job.unsettled or state.moves() or any(row.draining for row in state.live_servers()):
            return True
        return self.recent.waits or state.job.map_version != self._planned

    # --- errands.py ---

    def _look(self) -> None:
        for operation in self.state.operations():
            number = operation.operation
            if number not in self._errands or self._errands[number].done:
                self._errands[number] = self.kernel.spawn(self.process, self._errand(number), "errand")

    async def _errand(self, number: int) -> None:
        backoff = Backoff(self.world.rng)
        while (operation := self._operation(number)) is not None:
            committed = self._committed.next
            calls, done = list[operators.Call](), [False]
            try:
                if operators.finished(operation, self.state):
                    await self.decide(partial(operators.finish, operation=operation))
                    return
                calls = operators.next_calls(operation, self.state)
                done = await self.kernel.gather(self.process, *(self._send(call) for call in calls))
            except ParameshError as error:
                self.kernel.note(f"operation {number} waits: {error!r}")
            if not calls:
                await self.kernel.wait(committed, 2.0)
            elif not all(done):
                await self.kernel.sleep(backoff.next())

    def _operation(self, number: int) -> Any:
        return next((row for row in self.state.operations() if row.operation == number), None)

    async def _send(self, call: operators.Call) -> bool:
        method = "evict" if call.stage.value == "evict" else "fence"
        term = self.store.term
        order = (term, call.clients[0], call.why) if method == "evict" else (term, call.clients)
        try:
            await self.net.call(self.process, call.control_address, method, order, 2.0)
        except ParameshError:
            return False
        await self.decide(lambda draft: operators.confirm(draft, call))
        return True

    # --- services ---

    async def _ready(self) -> None:
        if not self._started.done:
            await self._started

    async def register_server(self, hello: ServerRow) -> None:
        await self._ready()
        gone = not any(row.ref == hello.ref for row in self.state.live_servers())
        await self.decide(
            lambda draft: membership.register_server(
                draft, hello, replace=False, old_is_gone=gone, min_servers=self.world.profile.servers
            )
        )

    async def beat(self, request: tuple[NodeKey, int]) -> tuple[int, bool]:
        who, echo = request
        await self._ready()
        nonce = self.liveness.beat(who, echo, self.kernel.now)
        if self.liveness.silence(who, self.kernel.now) == 0:
            self.heard[who] = self.ran
        return nonce or 0, nonce is None

    async def watch(self, version: int) -> Routes:
        await self._ready()
        if self.world.rng.random() < self.world.profile.late_maps:
            await self.kernel.sleep(self.world.rng.uniform(0.0, self.world.profile.late_maps_s))
        if self.routes.version <= version:
            await self.kernel.wait(self._published.next, 2.5)
        return self.routes

    async def get_map(self, _: None) -> Routes:
        await self._ready()
        return self.routes

    async def change_isr(self, request: Any) -> tuple[list[int], Routes]:
        await self._ready()
        asking, changes = request
        wishes = [Wish(p, e, v, tuple(Ref(*r) for r in isr), why) for p, e, v, isr, why in changes]
        if self.world.rng.random() < self.world.profile.late_wishes:
            await self.kernel.sleep(self.world.rng.uniform(0.0, 4.0))
        done = await self.decide(lambda draft: replicas.change_isr(draft, Ref(*asking), wishes))
        return done, self.routes

    async def report_exit(self, ref: Any) -> None:
        await self._ready()
        await self.decide(lambda draft: membership.exit_of_server(draft, Ref(*ref), -9))

    async def register_client(self, slot: str) -> int:
        await self._ready()
        incarnation = 1 + sum(map(ord, slot))
        hello = membership.ClientHello(incarnation, slot, "", 0, "h", "worker")
        return int(await self.decide(lambda draft: membership.register_client(draft, hello)))

    async def client_left(self, client: int) -> None:
        await self._ready()
        await self.decide(lambda draft: membership.client_left(draft, client))

    async def client_gone(self, client: int) -> None:
        """A client is declared dead: silence, or an exit report of its supervisor."""
        await self._ready()
        await self.decide(lambda draft: membership.all_silent(draft, [Silent(NodeKey.client(client), 10.1, 10.0)]))

    async def create_table(self, spec: Any) -> None:
        await self._ready()
        if len(self.state.live_servers()) < self.world.profile.servers:
            raise refuse("NOT_READY", "waits for servers")
        sizes = [layout.nbytes for layout in self.world.layouts_of(spec)]
        await self.decide(lambda draft: catalog.create_table(draft, spec, sizes, LIMITS))

    # --- psctl ---

    async def psctl(self, request: tuple[Any, ...]) -> None:
        """`move PARTITION FROM TO`, `drain NAME`, `undrain NAME`."""
        await self._ready()
        verb, *arguments = request
        verbs: dict[str, Callable[..., Any]] = {
            "move": moves.ask,
            "drain": partial(moves.drain, why="psctl drain"),
            "undrain": moves.undrain,
        }
        await self.decide(lambda draft: verbs[verb](draft, *arguments))
