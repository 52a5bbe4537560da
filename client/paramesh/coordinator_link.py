"""The client's link to the coordinator: registration, the map, the catalog.

The coordinator may be away at any time: calls repeat over the list of addresses until
their deadline; the map watch reconnects for ever and keeps the last map meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from paramesh.channel import aio_channel, grpc, header
from paramesh.errors import Action, ParameshError, refuse
from paramesh.retry import Backoff, told_to_wait
from paramesh.rotation import CAP_S, NEXT_S, Rotation, elsewhere
from paramesh.routing import Routes
from paramesh.security import PLAIN, Security
from paramesh.status import from_rpc_error
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import coordinator_pb2_grpc

log = logging.getLogger(__name__)

_WARN_AFTER_S = 3.0
"""Seconds of trying in silence: a person in front of a wrong address waits no longer."""

_WATCH_SILENCE_S = 25.0
"""The coordinator repeats the map every 10 s; two missed repeats mean a dead stream."""


class CoordinatorLink:
    """Calls to the coordinator and the newest map. Lives on the IO loop.

    Args:
        addresses: `host:port[,host:port...]`.
        job: the cluster's name.
        security: of the channels to it, and to the servers that it names.
    """

    def __init__(self, addresses: str, job: str, security: Security = PLAIN):
        self._turns = Rotation(addresses)
        self.job = job
        self.security = security
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.routes: Routes | None = None
        self.map_changed = asyncio.Event()
        """Set and replaced at every new map."""
        self.listeners: list[Callable[[Routes], None]] = []
        self._watcher: asyncio.Task[None] | None = None
        self._watched = ""
        """Where the watch is now; empty between two."""
        self._stream: Any = None

    def channel(self) -> grpc.aio.Channel:
        """The channel to the coordinator that answered last."""
        address = self.address
        if address not in self._channels:
            self._channels[address] = aio_channel(address, self.security)
        return self._channels[address]

    @property
    def address(self) -> str:
        """The coordinator in use."""
        return self._turns.address

    async def call(
        self,
        make: Callable[[grpc.aio.Channel], Awaitable[Any]],
        timeout: float,
        what: str,
        passing: frozenset[str] = frozenset(),
    ) -> Any:
        """Repeat a call over the addresses until it is answered.

        Args:
            make: starts the call on a channel, with a deadline of its own.
            timeout: seconds in all.
            what: for the error's text.
            passing: reasons that pass by themselves in this call, whatever they mean in others.

        Raises:
            Unavailable: UNREACHABLE after `timeout`, naming the addresses.
            Timeout: DEADLINE after `timeout`, with what the coordinator refused with last.
            ParameshError: what the coordinator refused with.
        """
        deadline = time.monotonic() + timeout
        warn_at = time.monotonic() + _WARN_AFTER_S
        while True:
            address = self.address
            try:
                answer = await make(self.channel())
            except grpc.RpcError as exc:
                error = from_rpc_error(exc, address)
            else:
                self._answered(address)
                return answer
            refused = error.action is Action.BACK_OFF or error.reason in passing
            if not elsewhere(error) and not refused:
                raise error
            if time.monotonic() >= deadline:
                raise self._gave_up(error, timeout, what, refused)
            if time.monotonic() >= warn_at:
                left = deadline - time.monotonic()
                log.warning("%s: still trying for %d s more: %s", what, left, error)
                warn_at = time.monotonic() + 2 * _WARN_AFTER_S
            # Another call may have turned already: two turns would skip an address.
            wait = self._turns.failed(error) if address == self.address else 0.0
            await asyncio.sleep(max(wait, NEXT_S, told_to_wait(error)))

    def _answered(self, address: str) -> None:
        if address == self.address:
            self._turns.succeeded()
            if self._watched not in ("", address) and self._stream is not None:
                # The watch hangs at one that is stopped or cut off: silence alone would take long to tell.
                self._stream.cancel()

    def _gave_up(self, error: ParameshError, timeout: float, what: str, refused: bool) -> ParameshError:
        if refused:
            return refuse("DEADLINE", f"waited {timeout:g} s for {what}: {error}", what=what, last=error.reason)
        addresses = ", ".join(self._turns.addresses)
        return refuse(
            "UNREACHABLE",
            f"no coordinator answered at {addresses} within {timeout:g} s ({what}). Is ps-coordinator running "
            f"there, and is PARAMESH_COORDINATOR right? Last: {error}",
            addresses=addresses,
        )

    def set_map(self, routes: Routes) -> None:
        """Take a map if it is newer."""
        if self.routes is not None and (routes.version <= self.routes.version or self._is_strange(routes)):
            return
        self.routes = routes
        changed, self.map_changed = self.map_changed, asyncio.Event()
        changed.set()
        for listener in self.listeners:
            listener(routes)

    def _is_strange(self, routes: Routes) -> bool:
        """Whether a map is another cluster's, of the same job name: a coordinator without its state, or not ours."""
        mine = self.routes.map if self.routes is not None else None
        if mine is None or not mine.partitions or not mine.cluster or not routes.map.cluster:
            return False
        strange: bool = mine.cluster != routes.map.cluster
        if strange:
            log.error(
                "map ignored: the coordinator at %s is of cluster %s, ours is %s; was it started on an empty --state?",
                self.address, routes.map.cluster, mine.cluster,
            )  # fmt: skip
        return strange

    async def wait_for_map(self, version: int, timeout: float) -> bool:
        """Wait until the map is newer than `version`; False if it was not within `timeout`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.routes is None or self.routes.version <= version:
                    await self.map_changed.wait()
                return True
        return False

    def start_watch(self) -> None:
        """Start following the map."""
        self._watcher = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        backoff = Backoff(cap=CAP_S)
        while True:
            address, wait = self.address, None
            try:
                await self._watch_at(address)
            except asyncio.CancelledError:
                if _ending():
                    raise
                wait = NEXT_S  # only the stream was cancelled: another coordinator answers
            except (grpc.RpcError, TimeoutError) as exc:
                log.debug("map watch broke address=%s error=%r", address, exc)
                error = from_rpc_error(exc, address) if isinstance(exc, grpc.RpcError) else None
                if address == self.address:
                    wait = self._turns.failed(error)
            self._watched = ""
            await asyncio.sleep(backoff.next() if wait is None else max(wait, NEXT_S))

    async def _watch_at(self, address: str) -> None:
        """Follow the map at one coordinator until the stream ends."""
        stub = coordinator_pb2_grpc.MapServiceStub(self.channel())
        version = self.routes.version if self.routes else 0
        self._watched = address
        self._stream = stream = stub.WatchMap(co.WatchMapRequest(request=header(self.job), version=version))
        while True:
            async with asyncio.timeout(_WATCH_SILENCE_S):
                response = await stream.read()
            if response is grpc.aio.EOF:
                return
            self.set_map(Routes(response.map))
            if address == self.address:
                self._turns.succeeded()

    async def close(self) -> None:
        """Stop watching and close the channels."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        for channel in self._channels.values():
            await channel.close()


def _ending() -> bool:
    """Whether this task, and not only a stream that it reads, is being cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
