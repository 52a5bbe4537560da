"""Being known to the coordinator: registration, heartbeats, goodbye.

A server never exits for want of a coordinator: it waits, serves on, and registers again when
a coordinator that has forgotten it is back. It ends only when told that it is not wanted:
another process has its name, or it was declared dead for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from paramesh.channel import grpc, header
from paramesh.coordinator_link import CoordinatorLink
from paramesh.errors import ParameshError
from paramesh.retry import Backoff
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1.coordinator_pb2_grpc import MembershipStub

from paramesh_server.beat import Figures, Identity
from paramesh_server.config import ServerConfig
from paramesh_server.heartbeat import Heartbeat, start_heartbeat

log = logging.getLogger(__name__)

CALL_S = 6.0
"""Deadline of one registration: the coordinator dials back with 2 s for each port."""

ROUND_S = 5.0
"""How long one round of attempts lasts before the wait is mentioned in the log."""

FATAL = frozenset(
    {"NODE_NAME", "ADDRESS", "WRONG_CLUSTER", "VERSION", "INCARNATION", "NAME", "STALE_TERM", "PERMISSION_DENIED"}
)
"""Refusals that no waiting cures, beyond `name_patience` for the first two."""

PATIENT = frozenset({"NODE_NAME", "ADDRESS"})
"""Refusals that may pass: a dead predecessor not yet noticed, a port that is just coming up."""


class Registration:
    """This process as the coordinator knows it.

    Args:
        config: who and where we are.
        link: calls to the coordinator.
        figures: what beats carry.
        on_fatal: called when a later registration is refused for good.
    """

    def __init__(
        self,
        config: ServerConfig,
        link: CoordinatorLink,
        figures: Callable[[], Figures],
        on_fatal: Callable[[ParameshError], None],
    ) -> None:
        self._config = config
        self._link = link
        self._request = co.RegisterServerRequest()
        self._figures = figures
        self._on_fatal = on_fatal
        self._heartbeat: Heartbeat | None = None
        self._again: asyncio.Task[None] | None = None
        self.generation = 0
        """The job's, as of the last registration or map; 0 before the first."""
        self.term = 0
        """The highest term of a coordinator that was seen."""

    def introduce(self, request: co.RegisterServerRequest) -> None:
        """What `RegisterServer` will say."""
        self._request = request

    @property
    def hello(self) -> co.RegisterServerRequest:
        """What `RegisterServer` says."""
        return self._request

    async def start(self) -> None:
        """Register, however long it takes, and start to beat.

        Raises:
            ParameshError: one of the FATAL reasons.
        """
        answer = await self._register()
        identity = Identity(
            self._config.coordinator,
            self._config.job,
            answer.generation,
            self._config.name,
            self._request.incarnation,
            (answer.heartbeat_interval_ms or 500) / 1000,
            (answer.failure_timeout_ms or 2000) / 1000,
            self._config.security,
        )
        self._heartbeat = start_heartbeat(self._config.heartbeat, identity, self._figures, self._unknown)

    async def _register(self) -> co.RegisterServerResponse:
        started, backoff = time.monotonic(), Backoff()
        while True:
            routes = self._link.routes
            if routes is not None and routes.map.partitions:
                self._request.cluster = routes.map.cluster
            try:
                answer = await self._link.call(
                    lambda channel: MembershipStub(channel).RegisterServer(self._request, timeout=CALL_S),
                    ROUND_S,
                    f"registering server {self._config.name!r}",
                )
                break
            except ParameshError as error:
                patient = error.reason in PATIENT and time.monotonic() - started < self._config.name_patience
                if error.reason in FATAL and not patient:
                    raise
                log.warning(
                    "registration=waiting name=%s reason=%s after_s=%.0f: %s",
                    self._config.name,
                    error.reason,
                    time.monotonic() - started,
                    error,
                )
            await asyncio.sleep(backoff.next())
        self.generation = max(self.generation, answer.generation)
        self.term = max(self.term, answer.term)
        log.info(
            "registration=done name=%s coordinator=%s term=%d generation=%d",
            self._config.name,
            self._link.address,
            answer.term,
            answer.generation,
        )
        response: co.RegisterServerResponse = answer
        return response

    def _unknown(self) -> None:
        """A beat was answered "unknown": the coordinator lost us, or thought us dead."""
        if self._again is None or self._again.done():
            self._again = asyncio.ensure_future(self._register_again())

    async def _register_again(self) -> None:
        try:
            await self._register()
        except ParameshError as error:
            self._on_fatal(error)

    async def stop(self, *, goodbye: bool) -> None:
        """Stop beating; say goodbye to a coordinator that is there."""
        tasks: list[Awaitable[Any]] = []
        if self._again is not None:
            self._again.cancel()
            tasks.append(self._again)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._heartbeat is None:
            return
        if goodbye:
            request = co.DeregisterRequest(
                request=header(self._config.job, self.generation),
                kind=co.NODE_KIND_SERVER,
                name=self._config.name,
                incarnation=self._request.incarnation,
            )
            with contextlib.suppress(grpc.RpcError):
                await MembershipStub(self._link.channel()).Deregister(request, timeout=1.0)
        await self._heartbeat.stop()
        self._heartbeat = None
