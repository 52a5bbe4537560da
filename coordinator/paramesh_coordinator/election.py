"""Several coordinators on one etcd: whom a standby names, and how it comes to lead.

switch = Switch()                           # answers NOT_READY with the leader's address
server.add_generic_rpc_handlers((switch,))
store = await campaign(target, address, switch.stand_by)
reign.add_services(switch)                  # from now on the same port answers itself
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from paramesh.channel import grpc
from paramesh.errors import ParameshError, refuse

from paramesh_coordinator.store.base import StoreError
from paramesh_coordinator.store.etcd import EtcdStore, Leader
from paramesh_coordinator.store.etcd_client import EtcdClient
from paramesh_coordinator.store.etcd_target import EtcdTarget

__all__ = ["Switch", "campaign"]

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
"""Between two looks of a standby: a read of three keys, and a tenth of the lease."""

SAY_SECONDS = 5.0
"""How often an etcd that does not answer is mentioned."""


class Switch(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The services of whoever leads, or a refusal of every call that says who does.

    It takes handlers as a server does, so that generated code can register with it.
    """

    def __init__(self) -> None:
        self._handlers: list[Any] = []
        self._why = refuse("NOT_READY", "this coordinator is starting", standby=True)
        standing_by = self._stand_by

        async def refusing(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            raise standing_by()
            yield b""  # what makes it a generator, as a stream's handler is

        # As a stream of bytes any call can be refused, whatever its cardinality and messages.
        self._refusing = grpc.stream_stream_rpc_method_handler(refusing)

    def _stand_by(self) -> ParameshError:
        return refuse("NOT_READY", str(self._why), **self._why.metadata)

    def stand_by(self, why: str, leader: str = "") -> None:
        """Refuse from now on, naming the leader if there is one."""
        named = {"leader": leader} if leader else {}
        self._why = refuse("NOT_READY", why, standby=True, **named)

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call."""
        if not self._handlers:
            return self._refusing
        found = (handler.service(handler_call_details) for handler in self._handlers)
        return next((one for one in found if one is not None), None)

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Serve these."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """The same handlers once more, by name; the generic ones do."""


async def campaign(target: EtcdTarget, address: str, stand_by: Callable[[str, str], None]) -> EtcdStore:
    """Stand by until this coordinator leads; an etcd that does not answer is waited for.

    Args:
        target: the cluster's place in etcd.
        address: host:port of this coordinator.
        stand_by: told, at every look, why this one does not lead, and who does.

    Raises:
        ConfigError: `state`: what is there is not ours to read.
    """
    client, said, leader = EtcdClient(target.endpoints), 0.0, Leader("", 0)
    won: EtcdStore | Leader | None = None
    try:
        while True:
            try:
                won = await _look(target, address, client)
            except StoreError as error:
                stand_by(f"this coordinator cannot reach its state: {error}", "")
                if time.monotonic() > said + SAY_SECONDS:
                    log.warning("state=unreachable, will try again: %s", error)
                    said = time.monotonic()
            else:
                if isinstance(won, EtcdStore):
                    return won
                stand_by(f"this coordinator stands by; {won.address or 'another'} leads", won.address)
                if won != leader:
                    log.info("standing by leader=%s term=%d", won.address, won.term)
                    leader = won
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        if not isinstance(won, EtcdStore):
            client.close()


async def _look(target: EtcdTarget, address: str, client: EtcdClient) -> EtcdStore | Leader:
    """One look in a thread; what it won while nobody waits any more is given back."""
    work = asyncio.ensure_future(asyncio.to_thread(EtcdStore.campaign, target, address, client))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        (won,) = await asyncio.gather(work, return_exceptions=True)
        if isinstance(won, EtcdStore):
            await asyncio.to_thread(won.close)
        raise
