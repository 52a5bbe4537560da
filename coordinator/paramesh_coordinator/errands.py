"""Carries out pending operations: calls servers, repeats until they confirm.

One task per operation, woken by every commit. Rules are in `operators`; this is the legs.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from paramesh import failpoints
from paramesh.channel import aio_channel, grpc, header
from paramesh.errors import ParameshError
from paramesh.retry import Backoff
from paramesh.status import from_rpc_error
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1.replication_pb2_grpc import ServerControlStub

from paramesh_coordinator import operators
from paramesh_coordinator.driver import Driver
from paramesh_coordinator.operators import Call
from paramesh_coordinator.rows import OperationRow, Stage

__all__ = ["Errands"]

log = logging.getLogger(__name__)

CALL_SECONDS = 2.0
"""Deadline of one EVICT or FENCE: both take milliseconds, and are repeated anyway."""

ASLEEP_SECONDS = 2.0
"""Looks again after that long without a commit; only a safety net."""


class Errands:
    """The tasks and channels behind `driver.state.operations()`."""

    def __init__(self, driver: Driver):
        self._driver = driver
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._changed = asyncio.Event()
        self._stopped = False
        """Set by `stop`: a commit that was under way then must not start an operation."""

    def start(self) -> None:
        """Resume what an earlier coordinator left, and follow every commit from now on."""
        self._driver.after_commit(self._look)
        self._look()

    async def stop(self) -> None:
        """End all; the store keeps what is not confirmed."""
        self._stopped = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()

    def _look(self) -> None:
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()
        if self._stopped:
            return
        for operation in self._driver.state.operations():
            number = operation.operation
            if number not in self._tasks:
                self._tasks[number] = asyncio.create_task(self._run(number), name=f"operation-{number}")
                self._tasks[number].add_done_callback(partial(self._forget, number))

    def _forget(self, number: int, _: object) -> None:
        self._tasks.pop(number, None)

    def _operation(self, number: int) -> OperationRow | None:
        return next((row for row in self._driver.state.operations() if row.operation == number), None)

    async def _run(self, number: int) -> None:
        backoff = Backoff()
        while (operation := self._operation(number)) is not None and not self._driver.deposed.done():
            changed = self._changed
            calls: list[Call] = []
            done: list[bool] = []
            try:
                if operators.finished(operation, self._driver.state):
                    await self._driver.decide(partial(operators.finish, operation=operation))
                    return
                calls = operators.next_calls(operation, self._driver.state)
                done = list(await asyncio.gather(*(self._call(call) for call in calls)))
            except ParameshError as error:
                log.warning("operation waits operation=%d reason=%s error=%s", number, error.reason, error)
                done = [False]
            if not calls:
                await _wait(changed, ASLEEP_SECONDS)
            elif not all(done):
                await asyncio.sleep(backoff.next())

    async def _call(self, call: Call) -> bool:
        try:
            failpoints.reach(f"before.{call.stage}")
            if not await self._send_while_wanted(call):
                return False
            failpoints.reach(f"after.{call.stage}")
        except grpc.RpcError as exc:
            error = from_rpc_error(exc, call.control_address)
            log.warning(
                "%s not confirmed clients=%s server=%s reason=%s error=%s",
                call.stage, call.clients, call.server, error.reason, error,
            )  # fmt: skip
            if error.reason == "STALE_TERM":
                self._driver.step_down(error)
            return False
        await self._driver.decide(lambda draft: operators.confirm(draft, call))
        return True

    async def _send_while_wanted(self, call: Call) -> bool:
        """Make a call, but not to its deadline if its target has died or leads no longer; whether it was answered."""
        sending = asyncio.ensure_future(self._send(call))
        try:
            while not sending.done() and self._is_wanted(call):
                changed = asyncio.ensure_future(self._changed.wait())
                try:
                    await asyncio.wait({sending, changed}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
            if not sending.done():
                return False
            await sending
            return True
        finally:
            sending.cancel()

    def _is_wanted(self, call: Call) -> bool:
        operation = self._operation(call.operation)
        wanted = [] if operation is None else operators.next_calls(operation, self._driver.state)
        return any((one.stage, one.server) == (call.stage, call.server) for one in wanted)

    async def _send(self, call: Call) -> None:
        stub = ServerControlStub(self._channel(call.control_address))
        request = header(self._driver.state.job.name, self._driver.state.job.generation)
        term = self._driver.term
        if call.stage is Stage.EVICT:
            evict = rp.EvictRequest(request=request, term=term, client_id=call.clients[0], why=call.why)
            await stub.Evict(evict, timeout=CALL_SECONDS)
        else:
            await stub.Fence(rp.FenceRequest(request=request, term=term, client_ids=call.clients), timeout=CALL_SECONDS)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = aio_channel(address, self._driver.config.security)
        return self._channels[address]


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        pass
