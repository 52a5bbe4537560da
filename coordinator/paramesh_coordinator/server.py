"""A whole coordinator in an object: in a process of its own, or in a test's event loop.

server = CoordinatorServer(CoordinatorConfig(bind="127.0.0.1:0"))
await server.start()
... server.address ...
await server.stop()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from paramesh.admission import Admission
from paramesh.bounds import Bounds
from paramesh.channel import add_port, grpc, server_options
from paramesh.descriptors import connections_within
from paramesh.errors import ConfigError, ParameshError
from paramesh.gate import Gate
from paramesh.listening import why_not_listen
from paramesh.status import typed_errors

from paramesh_coordinator.config import CoordinatorConfig, parse_bind
from paramesh_coordinator.driver import Driver
from paramesh_coordinator.election import Switch, campaign
from paramesh_coordinator.reign import Reign
from paramesh_coordinator.store import MemoryStore, MetaStore, SqliteStore, StoreError
from paramesh_coordinator.store.etcd_target import EtcdTarget

__all__ = ["CoordinatorServer"]

log = logging.getLogger(__name__)

GRACE_SECONDS = 0.2
"""For calls under way when it stops; watches and beats never end by themselves."""


class CoordinatorServer:
    """A coordinator; `start` once, `stop` once.

    On a file or in memory it leads from its start. On etcd it serves at once, stands by while
    another leads, and leads when its turn comes.

    Args:
        config: what to run as.
        store: where to keep rows instead of what `config.state` says; closed by `stop`.
    """

    def __init__(self, config: CoordinatorConfig, store: MetaStore | None = None):
        self.config = config
        self._given_store = store
        self._reign: Reign | None = None
        self._switch = Switch()
        self._server: grpc.aio.Server | None = None
        self._over: asyncio.Future[ParameshError] | None = None
        self._campaigning: asyncio.Task[None] | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """host:port that it serves on; empty before `start`."""
        return self._address

    @property
    def term(self) -> int:
        """The term that it leads or led; 0 before."""
        return self._reign.store.term if self._reign else 0

    @property
    def _driver(self) -> Driver | None:
        return self._reign.driver if self._reign else None

    @property
    def _store(self) -> MetaStore | None:
        return self._reign.store if self._reign else None

    async def start(self) -> None:
        """Open the store, bind, load, serve; on etcd: bind, serve, and stand for election.

        Raises:
            ConfigError: `state` or `bind` cannot be used, or the file is another job's.
        """
        self._over = asyncio.get_running_loop().create_future()
        # Bound first: a second coordinator on the same address must not raise the term.
        config = self.config
        gate, admission = Gate.of(config.security), Admission(Bounds(config.max_calls, config.max_uploads))
        options = server_options(connections_within(config.max_connections, 1))
        self._server = grpc.aio.server(interceptors=[typed_errors(gate=gate, admission=admission)], options=options)
        self._address = _bind(self._server, config)
        target = self.config.state
        try:
            if isinstance(target, EtcdTarget) and self._given_store is None:
                self._campaigning = asyncio.create_task(self._campaign(target), name="coordinator-campaign")
            else:
                await self._lead(self._given_store or _open(target))
            await _serve(self._server, self._switch)
        except BaseException:
            await self.stop()
            raise
        log.info("serving address=%s job=%s term=%d", self._address, self.config.job, self.term)

    async def _lead(self, store: MetaStore) -> None:
        try:
            reign = Reign(self.config, store)
        except BaseException:
            store.close()
            raise
        self._reign = reign
        try:
            await reign.start()
        except BaseException:
            await reign.stop()
            raise
        reign.driver.deposed.add_done_callback(self._deposed)
        reign.add_services(self._switch)

    def _deposed(self, told: asyncio.Future[ParameshError]) -> None:
        if self._over is None or self._over.done() or told.cancelled():
            return
        error = told.result()
        if isinstance(error, ConfigError):
            self._over.set_exception(error)
        else:
            self._over.set_result(error)

    async def _campaign(self, target: EtcdTarget) -> None:
        """Lead once; an election that comes to nothing for etcd's sake is repeated."""
        assert self._over is not None
        address = self.config.advertise or self._address
        try:
            while True:
                store = await campaign(target, address, self._switch.stand_by)
                try:
                    await self._lead(store)
                except (StoreError, TimeoutError) as error:
                    log.warning("elected in vain term=%d, will try again: %s", store.term, error)
                    continue
                log.info("leading address=%s job=%s term=%d", address, self.config.job, store.term)
                return
        except Exception as error:
            if not self._over.done():
                self._over.set_exception(error)

    async def wait_deposed(self) -> ParameshError:
        """Wait until a newer coordinator has taken over the store; returns its word for it.

        Raises:
            ConfigError: it cannot lead with this state: not this job's, not readable, or empty although
                servers hold the job's partitions.
        """
        assert self._over is not None, "start() first"
        return await asyncio.shield(self._over)

    async def stop(self) -> None:
        """Stop serving, finish the commit under way, close the store. Repeatable."""
        if self._campaigning is not None:
            self._campaigning.cancel()
            await asyncio.gather(self._campaigning, return_exceptions=True)
            self._campaigning = None
        if self._server is not None:
            await self._server.stop(GRACE_SECONDS)
            self._server = None
        if self._reign is not None:
            await self._reign.stop()
        if self._over is not None and self._over.done():
            with contextlib.suppress(Exception):
                self._over.exception()  # nobody may have waited for it


def _open(state: object) -> MetaStore:
    return MemoryStore() if state is None else SqliteStore.open(Path(str(state)))


def _bind(server: grpc.aio.Server, config: CoordinatorConfig) -> str:
    bind = config.bind
    host, wanted = parse_bind(bind)
    why, port = why_not_listen(host, wanted), 0
    if not why:
        try:
            port = add_port(server, bind, config.security)
        except RuntimeError:
            why = "somebody else came first"
    if not port:
        raise ConfigError(
            f"bind: {bind} cannot be listened on: {why}; is another process there? (ss -ltnp shows it)",
            metadata={"key": "bind"},
        )
    return f"{host}:{port}"


async def _serve(server: grpc.aio.Server, switch: Switch) -> None:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    healthy = health.aio.HealthServicer()
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    server.add_generic_rpc_handlers((switch,))
    await server.start()
