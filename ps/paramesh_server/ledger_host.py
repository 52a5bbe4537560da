"""The ledger's door: gRPC calls go to the ledger while its partition is here.

gRPC fixes its services before a server starts, and the map moves the ledger later; so the
service is always registered and refuses with NOT_PRIMARY while the ledger is elsewhere.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from paramesh.channel import grpc
from paramesh.errors import ParameshError, refuse
from paramesh.routing import Routes
from paramesh.v1 import ledger_pb2 as lg

from paramesh_server.ledger_service import LedgerService

log = logging.getLogger(__name__)


class LedgerHost:
    """Holds the ledger service while partition 0 is here.

    Args:
        job: the cluster's name.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._service: LedgerService | None = None
        self._routes: Routes | None = None

    async def follow(self, routes: Routes, *, mine: bool, keep: bool) -> None:
        """Make the ledger, hand it the job's configuration, or let it go.

        Args:
            routes: the newest map.
            mine: the map says that the ledger is here and serves.
            keep: the map says that the ledger was here last; its state is the only copy.
        """
        self._routes = routes
        if self._service is not None and keep:
            self._service.update_config(routes.map.config)
        elif self._service is not None:
            await self.close()
        elif mine:
            self._service = LedgerService(self._job, routes.generation, routes.map.config, now=time.monotonic)
            log.info("ledger=here generation=%d", routes.generation)

    def service(self) -> LedgerService:
        """The ledger.

        Raises:
            ParameshError: NOT_PRIMARY (with a hint), NOT_READY.
        """
        if self._service is None:
            raise self._elsewhere()
        return self._service

    def _elsewhere(self) -> ParameshError:
        if self._routes is None or 0 not in self._routes:
            return refuse("NOT_READY", "the ledger is not placed yet, as far as this server knows")
        try:
            node, epoch = self._routes.primary(0)
        except ParameshError as error:
            return error
        return refuse("NOT_PRIMARY", f"the ledger is at {node.ref.node}", primary=node.address, epoch=epoch)

    async def evict(self, client: int, term: int, why: str) -> bool:
        """Take a client out of the ledger; whether it was a member."""
        return await self.service().evict(client, term, why)

    async def fence(self, clients: Sequence[int]) -> None:
        """Tell the ledger, if it is here, whom to refuse for ever."""
        if self._service is not None:
            await self._service.fence(clients)

    async def close(self) -> None:
        """Let the ledger go."""
        service, self._service = self._service, None
        close = getattr(service, "close", None)
        if close is not None and inspect.isawaitable(done := close()):
            await done

    def register(self, server: grpc.aio.Server) -> None:
        """Register the service `Ledger`, whose calls go to whatever ledger is here."""
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                self._forward(method.name),
                request_deserializer=getattr(lg, method.input_type.name).FromString,
                response_serializer=getattr(lg, method.output_type.name).SerializeToString,
            )
            for method in lg.DESCRIPTOR.services_by_name["Ledger"].methods
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("paramesh.v1.Ledger", handlers),))

    def _forward(self, method: str) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            return await getattr(self.service(), method)(request, context)

        return call
