"""The control port: what the coordinator orders. Lower terms are refused.

A paused coordinator that wakes up after another has taken over still believes itself in
charge; its term, raised at each start, tells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from paramesh.channel import check_header, grpc
from paramesh.errors import refuse
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from paramesh_server.ledger_host import LedgerHost
from paramesh_server.servicer import DataPlane

log = logging.getLogger(__name__)

SERVICE = "paramesh.v1.ServerControl"


class ServerControl:
    """The servicer of `ServerControl`: Fence and Evict.

    Args:
        job: this cluster's name.
        generation: this job's generation now.
        plane: where partitions are fenced.
        ledger: where clients are evicted.
    """

    def __init__(self, job: str, generation: Callable[[], int], plane: DataPlane, ledger: LedgerHost) -> None:
        self._job = job
        self._generation = generation
        self._plane = plane
        self._ledger = ledger
        self.term = 0
        """The highest seen: in orders, in maps, at registration."""

    def saw(self, term: int) -> None:
        """A coordinator of this term exists."""
        self.term = max(self.term, term)

    def check(self, request: pb.RequestHeader, term: int) -> None:
        """Refuse an order of another job or generation, or of a coordinator that was replaced.

        Raises:
            StateRefused: VERSION, WRONG_CLUSTER, OLD_GENERATION, STALE_TERM.
            RequestRefused: MISSING_FIELD.
        """
        check_header(request, self._job, self._generation())
        if not term:
            raise refuse("MISSING_FIELD", "an order carries the coordinator's term", field="term")
        if term < self.term:
            raise refuse("STALE_TERM", f"term {term} is over; a coordinator of term {self.term} is in charge")
        self.saw(term)

    async def Fence(self, request: rp.FenceRequest, context: grpc.aio.ServicerContext) -> rp.FenceResponse:
        """Forbid clients for ever, in every partition here. Repeatable."""
        self.check(request.request, request.term)
        clients = list(request.client_ids)
        if 0 in clients:  # before the first of them is fenced: all or none
            raise refuse("MISSING_FIELD", "client_ids has a 0", field="client_ids")
        await self._ledger.fence(clients)
        partitions = await self._plane.fence(clients)
        log.info("fenced clients=%s partitions=%d term=%d", clients, partitions, request.term)
        return rp.FenceResponse(partitions=partitions)

    async def Evict(self, request: rp.EvictRequest, context: grpc.aio.ServicerContext) -> rp.EvictResponse:
        """Take a client out of the ledger. Repeatable."""
        self.check(request.request, request.term)
        if not request.client_id:
            raise refuse("MISSING_FIELD", "client_id is 0", field="client_id")
        was_member = await self._ledger.evict(request.client_id, request.term, request.why)
        log.info("evicted client=%d was_member=%s why=%r", request.client_id, was_member, request.why[:200])
        return rp.EvictResponse(was_member=was_member)

    def register(self, server: grpc.aio.Server) -> None:
        """Register what is served. BecomePrimary is not yet: gRPC answers UNIMPLEMENTED."""
        handlers = {
            "Fence": grpc.unary_unary_rpc_method_handler(
                self.Fence, rp.FenceRequest.FromString, rp.FenceResponse.SerializeToString
            ),
            "Evict": grpc.unary_unary_rpc_method_handler(
                self.Evict, rp.EvictRequest.FromString, rp.EvictResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
