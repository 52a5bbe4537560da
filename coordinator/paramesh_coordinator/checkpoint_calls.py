"""Calls to servers' CheckpointControl: repeated while that can help, never for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from paramesh.channel import aio_channel, grpc, header
from paramesh.errors import ParameshError, refuse
from paramesh.retry import Backoff
from paramesh.status import from_rpc_error
from paramesh.v1 import checkpoint_pb2 as cp
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1.checkpoint_pb2_grpc import CheckpointControlStub
from paramesh.v1.ledger_pb2_grpc import LedgerStub

from paramesh_coordinator.driver import Driver
from paramesh_coordinator.operators import LEDGER
from paramesh_coordinator.rows import NodeState, PartitionState, Ref, ServerRow

__all__ = ["Calls"]

CALL_S = 600.0
"""Deadline of one WriteCut or LoadCut: gigabytes go to a slow disk. The channel's keepalive
notices a server that is gone within seconds."""

PASSING = frozenset({"NOT_READY", "UNREACHABLE", "DEADLINE", "NOT_ENOUGH_REPLICAS"})
"""Refusals that pass by themselves."""


class Calls:
    """Channels to servers' control ports."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = aio_channel(address, self._driver.config.security)
        return self._channels[address]

    def server(self, ref: Ref) -> ServerRow:
        """A live server.

        Raises:
            StateRefused: UNKNOWN_NODE, it is lost.
        """
        row = next((row for row in self._driver.state.rows(ServerRow).values() if row.ref == ref), None)
        if row is None or row.state is not NodeState.LIVE:
            raise refuse("UNKNOWN_NODE", f"server {ref.name} is lost" + (f" ({row.reason})" if row else ""))
        return row

    def primary(self, partition: int) -> tuple[Ref, int]:
        """Who acknowledges for a partition, under which epoch.

        Raises:
            PartitionOffline: nobody.
        """
        row = self._driver.state.partition(partition)
        if row is None:
            raise refuse("NOT_READY", f"partition {partition} has no place yet")
        if row.state is not PartitionState.ONLINE:
            raise refuse("PARTITION_OFFLINE", f"partition {partition} is {row.state}")
        return row.primary, row.epoch

    async def send(self, ref: Ref, method: str, request: Any, timeout: float = CALL_S) -> Any:
        """One call to one server.

        Raises:
            ParameshError: what it refused with.
        """
        job = self._driver.state.job
        request.request.CopyFrom(header(job.name, job.generation))
        request.term = self._driver.term
        address = self.server(ref).control_address
        try:
            return await getattr(CheckpointControlStub(self._channel(address)), method)(request, timeout=timeout)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"{ref.name} ({address})") from None

    async def insist(self, ref: Ref, method: str, request: Any, seconds: float) -> Any:
        """Repeat a call while its refusals are of those that pass.

        Raises:
            ParameshError: the last refusal, after `seconds` or if it does not pass.
        """
        loop, backoff = asyncio.get_running_loop(), Backoff()
        deadline = loop.time() + seconds
        while True:
            try:
                return await self.send(ref, method, request)
            except ParameshError as error:
                if error.reason not in PASSING or loop.time() >= deadline:
                    raise
            await asyncio.sleep(backoff.next())

    async def everywhere(self, method: str, make: Any) -> None:
        """Send to every live server; what fails, fails: for what is only tidying."""
        refs = [row.ref for row in self._driver.state.live_servers()]
        await asyncio.gather(*(self.send(ref, method, make(), 2.0) for ref in refs), return_exceptions=True)

    async def small_state(self, key: str) -> lg.GetStateResponse:
        """What workers keep in the ledger under a key.

        Raises:
            ParameshError: what the ledger refused with.
        """
        job = self._driver.state.job
        address = self.server(self.primary(LEDGER)[0]).address
        request = lg.GetStateRequest(request=header(job.name, job.generation), key=key)
        try:
            answer: lg.GetStateResponse = await LedgerStub(self._channel(address)).GetState(request, timeout=5.0)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, address) from None
        return answer

    async def steps(self) -> int:
        """The next step of the first group that trains in steps; 0 if there is none.

        Raises:
            ParameshError: what the ledger refused with.
        """
        job = self._driver.state.job
        address = self.server(self.primary(LEDGER)[0]).address
        request = lg.LedgerStatusRequest(request=header(job.name, job.generation))
        try:
            answer = await LedgerStub(self._channel(address)).LedgerStatus(request, timeout=5.0)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, address) from None
        return next((int(g.next_step) for g in answer.groups if g.mode in (lg.MODE_SYNC, lg.MODE_LOCAL)), 0)


def cut_request(checkpoint: str, folder: str, level: Any, partitions: list[int]) -> cp.WriteCutRequest:
    """A WriteCut without its header."""
    return cp.WriteCutRequest(checkpoint=checkpoint, folder=folder, level=level, partitions=partitions)
