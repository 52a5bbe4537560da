"""The bench of `bench.py` before real processes: a coordinator and servers as a user starts them."""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine
from typing import Any

import paramesh
from paramesh.client import Client
from paramesh.io import IoThread
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import parameter_server_pb2_grpc as ps_grpc

from tests.cluster import inspection
from tests.cluster.processes import ProcessCluster
from tests.cluster.waiting import wait_until
from tests.faults.bench import Bench


class Far:
    """What a bench asks of a cluster, of one whose processes are not ours."""

    def __init__(self, processes: ProcessCluster) -> None:
        self.processes = processes
        self.address = processes.coordinator_address

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something on the IO loop."""
        return IoThread.get().run(work, 60.0, "a call of the bench")

    def client(self) -> Client:
        """A client of its own."""
        return paramesh.connect(self.address)


class ProcessBench(Bench):
    """A bench whose cluster is looked at over the wire only."""

    def __init__(self, processes: ProcessCluster) -> None:
        super().__init__(Far(processes))  # type: ignore[arg-type]
        self.processes = processes

    def ledger_state(self) -> str:
        """A hash of everything that replicas of the ledger agree on, as its server says."""
        request = ps.InspectRequest(request=self.tool._client.header(), partitions=[0], state_hash=True)
        (info,) = self._unary(self.server, ps_grpc.ParameterServerStub, "Inspect", request).partitions
        return f"{info.lsn} {info.state_hash.hex()}"

    def decisions(self) -> bytes:
        """The number of the coordinator's newest decision, and of its map."""
        request = co.ListEventsRequest(request=self.tool._client.header(), limit=1)
        (newest,) = self.coordinator("Admin", "ListEvents", request).events
        return f"{newest.id} {inspection.partition_map(self.cluster.address).version}".encode()

    def settle(self) -> None:
        """Wait until the coordinator has nothing pending."""
        wait_until(lambda: not inspection.status(self.cluster.address).pending, 10, "evictions to be confirmed")

    def close(self) -> None:
        """Let go of the clients."""
        with contextlib.suppress(Exception):
            self.tool.close()
            self.cluster.call(self.client.close())
