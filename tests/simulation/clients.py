"""Clients of the simulation: asynchronous ones, and what they share with synchronous workers."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from paramesh.errors import Action, ParameshError
from paramesh.routing import Routes
from paramesh_coordinator.state import NodeKey

from tests.simulation.dataplane import Answer, Pull, Push
from tests.simulation.kernel import Process, Signal, Task, Violation
from tests.simulation.retry import Backoff

if TYPE_CHECKING:
    from tests.simulation.world import World

PASSING = ("UNREACHABLE", "DEADLINE", "PARTITION_OFFLINE", "NOT_ENOUGH_REPLICAS", "NOT_READY")
"""What a client of this world repeats: it has all the time there is."""

CALL_S = 3.0
BEAT_S = 0.5


class Client(abc.ABC):
    """A registered client with a map: `AsyncClient` and `Delivery`."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.kernel, self.net = world, world.kernel, world.net
        self.process = Process(name)
        self.name = name
        self.client_id = 0
        self.lives = 0
        self.routes: Routes | None = None
        self._map_changed = Signal()
        self.finished = False
        self.sent: deque[tuple[str, str, Any]] = deque(maxlen=12)
        """The last requests: copies of them may still be under way when this client is dead."""
        self.spawn(self._run(), "run")

    def spawn(self, coro: Any, name: str) -> Task:
        return self.kernel.spawn(self.process, coro, name)

    async def _run(self) -> None:
        self.spawn(self._watch(), "watch")
        self.spawn(self._beat(), "beat")
        try:
            await self.live()
        except ParameshError as error:
            raise Violation(f"17: {self.name} got {error!r}") from error
        self.finished = True
        await self.patiently("coordinator", "client_left", self.client_id)

    @abc.abstractmethod
    async def live(self) -> None:
        """What it does."""

    async def register(self) -> None:
        """Become a new client."""
        self.lives += 1
        self.client_id = await self.patiently("coordinator", "register_client", f"{self.name}:{self.lives}")
        self.kernel.note(f"{self.name} is client {self.client_id}")

    async def patiently(self, to: str, method: str, request: Any) -> Any:
        """A call that is repeated until it is answered; refusals that do not pass are raised."""
        backoff = Backoff(self.world.rng)
        while True:
            try:
                return await self.net.call(self.process, to, method, request, CALL_S)
            except ParameshError as error:
                if error.reason not in PASSING and error.action is not Action.BACK_OFF:
                    raise
            await self.kernel.sleep(backoff.next())

    async def _beat(self) -> None:
        nonce = 0
        while not self.finished:
            try:
                if self.client_id:
                    who = NodeKey.client(self.client_id)
                    nonce, _ = await self.net.call(self.process, "coordinator", "beat", (who, nonce), BEAT_S * 0.9)
            except ParameshError:
                pass
            await self.kernel.sleep(BEAT_S)

    async def _watch(self) -> None:
        backoff = Backoff(self.world.rng, cap=1.0)
        while not self.finished:
            try:
                routes = await self.net.call(
                    self.process, "coordinator", "watch", self.routes.version if self.routes else 0, 3.0
                )
                backoff = Backoff(self.world.rng, cap=1.0)
                if self.routes is None or routes.version > self.routes.version:
                    self.routes = routes
                    self._map_changed.fire()
            except ParameshError:
                await self.kernel.sleep(backoff.next())

    async def primary(self, partition: int) -> tuple[str, int]:
        """Address and epoch, waiting for a map that has them."""
        while True:
            if self.routes is not None and partition in self.routes:
                try:
                    node, epoch = self.routes.primary(partition)
                    return node.address, epoch
                except ParameshError:
                    pass
            await self.kernel.wait(self._map_changed.next, 1.0)

    async def once(self, method: str, request: Any) -> Answer:
        """One try at the primary of the newest map; the request is routed now."""
        address, epoch = await self.primary(request.partition)
        routed = type(request)(**{**request.__dict__, "epoch": epoch})
        self.sent.append((address, method, routed))
        answer: Answer = await self.net.call(self.process, address, method, routed, CALL_S)
        return answer

    async def pause_after(self, error: ParameshError, version: int, backoff: Backoff) -> None:
        """`Delivery._mend` for refusals that pass."""
        wait = backoff.next()
        if error.reason in ("UNREACHABLE", "STALE_EPOCH", "NOT_PRIMARY"):
            await self.wait_for_map(version, wait)
        else:
            await self.kernel.sleep(wait)

    async def wait_for_map(self, version: int, timeout: float) -> bool:
        """`CoordinatorLink.wait_for_map`: whether one is here, or comes in time, that is newer."""
        return self.version > version or await self.kernel.wait(self._map_changed.next, timeout)

    @property
    def version(self) -> int:
        """Of the newest map."""
        return self.routes.version if self.routes else 0

    async def deliver(
        self, method: str, request: Any, mend: Callable[[ParameshError, Any], Awaitable[Any]] | None = None
    ) -> Answer:
        """`Delivery._deliver` for one partition: the same request until it is answered well."""
        backoff = Backoff(self.world.rng)
        while True:
            version = self.version
            try:
                return await self.once(method, request)
            except ParameshError as error:
                if error.reason not in PASSING and error.action in (Action.RAISE, Action.REJOIN):
                    raise
                changed = await mend(error, request) if mend else None
                if changed is not None:
                    request = changed
                else:
                    await self.pause_after(error, version, backoff)


class AsyncPusher(Client):
    """Pushes a number of one-hot gradients, some at a time, and reads in between.

    Each push subtracts 1 from an element of its own, so the table says which were applied,
    and how often.
    """

    def __init__(self, world: World, name: str, pushes: int, window: int) -> None:
        self.left, self.window = pushes, window
        self.floor = (0, 0)
        super().__init__(world, name)

    async def live(self) -> None:
        while self.left > 0:
            await self.register()
            await self._life()

    async def _life(self) -> None:
        """Until all is pushed, or this client is fenced."""
        seq, flying = 0, dict[int, Task]()
        fenced = False
        while (self.left > 0 or flying) and not fenced:
            while self.left > 0 and len(flying) < self.window and (seq - min(flying, default=seq + 1)) < 4:
                seq, self.left = seq + 1, self.left - 1
                flying[seq] = self.spawn(self._push(self.client_id, seq), f"push {seq}")
            await self.kernel.sleep(self.world.rng.uniform(0.0, self.world.profile.think_s))
            if self.world.rng.random() < 0.3:
                await self._pull()
            oldest = min(flying)
            await self.kernel.wait(flying[oldest], 1.0)
            for done in [s for s, task in flying.items() if task.done]:
                fenced = not await flying.pop(done) or fenced

    async def _push(self, client: int, seq: int) -> bool:
        """Whether it was acknowledged; else this client is fenced."""
        element, contribution = self.world.one_hot(client, seq)
        request = Push(client, self.world.async_partition, 0, contribution, seq)
        try:
            answer = await self.deliver("push", request)
        except ParameshError as error:
            if error.reason == "CLIENT_FENCED" and self.world.is_closed(client):
                return False
            raise Violation(f"17: push {seq} of client {client} was refused for good: {error!r}") from error
        self.kernel.note(f"{self.name} push {client}/{seq} element={element} lsn={answer.lsn}{'=' * answer.duplicate}")
        self.world.checks.acknowledged(client, seq, element, answer)
        self.floor = max(self.floor, (answer.epoch, answer.lsn))
        return True

    async def _pull(self) -> None:
        expected = self.world.checks.expected(self)
        request = Pull(self.client_id, self.world.async_partition, 0, self.floor if self.world.floors else (0, 0))
        try:
            answer = await self.once("pull", request)
        except ParameshError:
            return
        self.world.checks.read(self, expected, answer)
        self.floor = max(self.floor, (answer.epoch, answer.lsn))


class Reader(Client):
    """Hears from pushers how far they are, and reads no less: floors that are not of its own map.

    So do workers, whom the ledger tells the floors of the others (`exchange_async.py`).
    """

    async def live(self) -> None:
        await self.register()
        pushers = [client for client in self.world.clients if isinstance(client, AsyncPusher)]
        while not all(pusher.finished or not pusher.process.alive for pusher in pushers):
            await self.kernel.sleep(self.world.rng.uniform(0.0, self.world.profile.think_s))
            await self._read_after(self.world.rng.choice(pushers))

    async def _read_after(self, pusher: AsyncPusher) -> None:
        expected = self.world.checks.expected(pusher)
        floor = pusher.floor if self.world.floors else (0, 0)
        try:
            answer = await self.once("pull", Pull(self.client_id, self.world.async_partition, 0, floor))
        except ParameshError:
            return
        self.world.checks.read(self, expected, answer)


class Owner(Client):
    """Brings the first values of every table, then is done."""

    async def live(self) -> None:
        await self.register()
        for spec in self.world.specs:
            await self.patiently("coordinator", "create_table", spec)
        for partition, writes in self.world.first_values().items():
            await self.deliver("push", Push(self.client_id, partition, 0, writes=writes))
        self.world.ready()
