"""A whole coordinator in an object: in a process of its own, or in a test's event loop.

server = CoordinatorServer(CoordinatorConfig(bind="127.0.0.1:0"))
await server.start()
... server.address ...
await server.stop()
"""

from __future__ import annotations

import asyncio
import logging

from paramesh.channel import SERVER_OPTIONS, grpc
from paramesh.errors import ConfigError, ParameshError
from paramesh.listening import why_not_listen
from paramesh.status import typed_errors
from paramesh.v1.checkpoint_pb2_grpc import add_CheckpointsServicer_to_server
from paramesh.v1.coordinator_pb2_grpc import (
    add_AdminServicer_to_server,
    add_CatalogServicer_to_server,
    add_MapServiceServicer_to_server,
    add_MembershipServicer_to_server,
    add_ReplicasServicer_to_server,
)

from paramesh_coordinator.admin import AdminService
from paramesh_coordinator.checkpoint_admin import CheckpointsService
from paramesh_coordinator.config import CoordinatorConfig, parse_bind
from paramesh_coordinator.custody import Custody
from paramesh_coordinator.driver import Driver
from paramesh_coordinator.errands import Errands
from paramesh_coordinator.planning import Planning
from paramesh_coordinator.servicer import CatalogService, MapService, MembershipService, ReplicasService
from paramesh_coordinator.store import MemoryStore, MetaStore, SqliteStore

__all__ = ["CoordinatorServer"]

log = logging.getLogger(__name__)

GRACE_SECONDS = 0.2
"""For calls under way when it stops; watches and beats never end by themselves."""


class CoordinatorServer:
    """A coordinator; `start` once, `stop` once.

    Args:
        config: what to run as.
        store: where to keep rows instead of what `config.state` says; closed by `stop`.
    """

    def __init__(self, config: CoordinatorConfig, store: MetaStore | None = None):
        self.config = config
        self._given_store = store
        self._store: MetaStore | None = None
        self._driver: Driver | None = None
        self._errands: Errands | None = None
        self._planning: Planning | None = None
        self._custody: Custody | None = None
        self._server: grpc.aio.Server | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """host:port that it serves on; empty before `start`."""
        return self._address

    @property
    def term(self) -> int:
        """The term that its start raised; 0 before `start`."""
        return self._store.term if self._store else 0

    async def start(self) -> None:
        """Open the store, bind, load, serve.

        Raises:
            ConfigError: `state` or `bind` cannot be used, or the file is another job's.
        """
        # Bound first: a second coordinator on the same address must not raise the term.
        server = grpc.aio.server(interceptors=[typed_errors()], options=SERVER_OPTIONS)
        self._address = _bind(server, self.config.bind)
        try:
            self._store = self._given_store or _open(self.config)
            self._driver = Driver(self.config, self._store)
            self._check_job(self._driver)
            fresh = self._driver.state.job.map_version == 0
            await self._driver.start()
            self._errands = Errands(self._driver)
            self._errands.start()
            self._planning = Planning(self._driver)
            self._planning.start()
            self._custody = Custody(self._driver, fresh=fresh)
            await self._custody.start()
            await _serve(server, self._driver, self._custody)
        except BaseException as error:
            await server.stop(None)
            await self.stop()
            if isinstance(error, ValueError):
                raise ConfigError(f"state: {error}", metadata={"key": "state"}) from error
            raise
        self._server = server
        log.info("serving address=%s job=%s term=%d", self._address, self.config.job, self.term)

    def _check_job(self, driver: Driver) -> None:
        stored = driver.state.job.name
        if stored != self.config.job:
            raise ConfigError(
                f"job: the state file belongs to job {stored!r}, not {self.config.job!r}", metadata={"key": "job"}
            )
        differing = driver.settings_differ()
        if differing:
            log.warning("settings of the job's first start hold, not this one's flags: %s", ", ".join(differing))

    async def wait_deposed(self) -> ParameshError:
        """Wait until a newer coordinator has taken over the store; returns its word for it."""
        assert self._driver is not None, "start() first"
        return await asyncio.shield(self._driver.deposed)

    async def stop(self) -> None:
        """Stop serving, finish the commit under way, close the store. Repeatable."""
        if self._server is not None:
            await self._server.stop(GRACE_SECONDS)
            self._server = None
        if self._custody is not None:
            await self._custody.stop()
            self._custody = None
        if self._planning is not None:
            await self._planning.stop()
            self._planning = None
        if self._errands is not None:
            await self._errands.stop()
            self._errands = None
        if self._driver is not None:
            await self._driver.stop()
        if self._store is not None:
            self._store.close()


def _open(config: CoordinatorConfig) -> MetaStore:
    return MemoryStore() if config.state is None else SqliteStore.open(config.state)


def _bind(server: grpc.aio.Server, bind: str) -> str:
    host, wanted = parse_bind(bind)
    why, port = why_not_listen(host, wanted), 0
    if not why:
        try:
            port = server.add_insecure_port(bind)
        except RuntimeError:
            why = "somebody else came first"
    if not port:
        raise ConfigError(
            f"bind: {bind} cannot be listened on: {why}; is another process there? (ss -ltnp shows it)",
            metadata={"key": "bind"},
        )
    return f"{host}:{port}"


async def _serve(server: grpc.aio.Server, driver: Driver, custody: Custody) -> None:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    add_MembershipServicer_to_server(MembershipService(driver), server)
    add_MapServiceServicer_to_server(MapService(driver), server)
    add_CatalogServicer_to_server(CatalogService(driver), server)
    add_ReplicasServicer_to_server(ReplicasService(driver), server)
    add_AdminServicer_to_server(AdminService(driver), server)
    add_CheckpointsServicer_to_server(CheckpointsService(driver, custody), server)
    healthy = health.aio.HealthServicer()
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await server.start()
