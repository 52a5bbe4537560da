"""What this server holds and knows, told when the coordinator's store is lost (`psctl meta rebuild`).

Recovery(job, ...).register(server)       # on both ports: an operator may know either

Only reads. It answers whether or not there is a coordinator; whoever asks finds that out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from paramesh.channel import check_header, grpc
from paramesh.errors import refuse
from paramesh.routing import Routes
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import recovery_pb2 as rc
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.recovery_pb2_grpc import RecoveryServicer, add_RecoveryServicer_to_server

from paramesh_server.ledger_machine import LedgerMachine
from paramesh_server.replica import Role
from paramesh_server.shards import Slot

__all__ = ["Recovery"]

SECONDS = 4.0
"""For all replicas here: each is asked when what runs on it has ended."""


class Recovery(RecoveryServicer):
    """The servicer.

    Args:
        job: this cluster's name.
        coordinators: the addresses that this server was given.
        hello: what it says when it registers.
        routes: the newest map.
        slots: all replicas here.
        schemas: of the tables that are known here.
        fenced: clients that this process was told to fence.
        term: the highest of a coordinator that was heard of.
    """

    def __init__(
        self,
        job: str,
        coordinators: str,
        hello: Callable[[], co.RegisterServerRequest],
        routes: Callable[[], Routes | None],
        slots: Callable[[], list[Slot]],
        schemas: Callable[[], Mapping[int, pb.TableSpec]],
        fenced: Callable[[], set[int]],
        term: Callable[[], int],
    ) -> None:
        self._job = job
        self._coordinators = coordinators
        self._hello = hello
        self._routes = routes
        self._slots = slots
        self._schemas = schemas
        self._fenced = fenced
        self._term = term

    async def Testify(self, request: rc.TestifyRequest, context: grpc.aio.ServicerContext) -> rc.TestifyResponse:
        """Everything at once."""
        check_header(request.request, self._job, 0)
        said = rc.TestifyResponse(server=self._hello(), coordinators=self._coordinators, term=self._term())
        routes = self._routes()
        if routes is not None:
            said.map.CopyFrom(routes.map)
        for table_id, spec in self._schemas().items():
            said.tables.add(table_id=table_id, spec=spec)
        memory = _Clients(set(self._fenced()))
        try:
            async with asyncio.timeout(SECONDS):
                for slot in self._slots():
                    # Under its lock: the pool may be changing what is read.
                    await slot.run(lambda slot=slot: _tell(slot, said, memory), inline=True)  # type: ignore[misc]
        except TimeoutError:
            raise refuse("DEADLINE", f"waited {SECONDS:g} s for work on the replicas here to end") from None
        memory.tell(said)
        return said

    def register(self, *servers: grpc.aio.Server) -> None:
        """Serve it on these ports."""
        for server in servers:
            add_RecoveryServicer_to_server(self, server)


class _Clients:
    """Whom the replicas here remember."""

    def __init__(self, fenced: set[int]) -> None:
        self.known: set[int] = set()
        self.members: dict[int, str] = {}
        self.fenced = fenced
        self.fenced_through = 0

    def remember(self, state: rp.ReplicaState) -> None:
        self.known.update(memory.client_id for memory in state.clients)
        self.fenced.update(state.fenced)
        self.fenced_through = max(self.fenced_through, state.fenced_through)

    def tell(self, said: rc.TestifyResponse) -> None:
        for client in sorted(self.known | self.members.keys()):
            if client not in self.fenced and client > self.fenced_through:
                said.clients.add(client_id=client, member=client in self.members, slot=self.members.get(client, ""))
        said.fenced.extend(sorted(client for client in self.fenced if client > self.fenced_through))
        said.fenced_through = self.fenced_through


def _tell(slot: Slot, said: rc.TestifyResponse, memory: _Clients) -> None:
    replica = slot.replica
    last = replica.last
    said.replicas.add(
        partition=slot.number,
        leads=replica.role is Role.PRIMARY,
        promised=max(replica.promised, replica.machine.epoch),
        last_lsn=last.lsn,
        last_epoch=last.epoch,
    )
    machine = replica.machine
    if isinstance(machine, LedgerMachine):
        memory.members |= machine.ledger.slots
        memory.fenced |= machine.ledger.tombstones
    else:
        memory.remember(machine.capture())
