"""One request to many partitions: to their primaries in parallel, until each has answered.

What a partition refused for a passing reason is repeated, with the same bytes and the same
seq, when what the refusal asks for was done (a newer map, decided steps, a wait); other
refusals are raised.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from paramesh.coordinator_link import CoordinatorLink
from paramesh.errors import Action, ParameshError, PartitionOffline, Retryable, refuse
from paramesh.lanes.grpc_lane import GrpcLane
from paramesh.ledger_client import LedgerClient
from paramesh.retry import Backoff, told_to_wait
from paramesh.routing import Routes
from paramesh.v1 import ledger_pb2
from paramesh.v1 import types_pb2 as pb

__all__ = ["Answers", "Delivery"]

_PASSING = ("UNREACHABLE", "DEADLINE")

OFFLINE_S = 2.0
"""Seconds in which a partition that is offline may come back before its loss is told: a server that was
only slow is heard again within one. More, and a lost one would not be named within 5 s of its last word."""

HELD_BACK_S = 35.0
"""The same while a live server has a complete copy: the coordinator gives it the partition after 30 s, if
the primary, which fell silent soon after a failover, is not heard before."""

BROUGHT_S = 0.02
"""Seconds before the next try when a new primary was just brought what it lacked: others do the same now."""

R = TypeVar("R")
Answers = Mapping[int, R | ParameshError]


class Delivery(abc.ABC):
    """Lanes to servers, and requests over them. Lives on the IO loop; `AsyncClient` is one.

    Args:
        link: where the map comes from.

    Attributes:
        ledger: asked for decided steps; set by the subclass.
    """

    ledger: LedgerClient

    generation = 0
    """The job's when this client registered. 0: not known."""

    def __init__(self, link: CoordinatorLink) -> None:
        self.link = link
        self._lanes: dict[str, GrpcLane] = {}
        self._offline: dict[int, float] = {}
        """Since when each partition is offline, as far as this client was told."""
        self._closing: asyncio.Future[None] | None = None
        """The last lane being closed; held so that the task is not collected."""
        link.listeners.append(self._on_map)

    @property
    def routes(self) -> Routes:
        """The newest map.

        Raises:
            StateRefused: OLD_GENERATION, the job was restored: what this client knows is over.
        """
        routes = self.link.routes
        assert routes is not None
        if self.generation and routes.generation > self.generation:
            raise refuse(
                "OLD_GENERATION",
                f"generation {self.generation} is over; the job was restored as generation {routes.generation}: "
                "start this script anew, it goes on at the checkpoint (ps-worker and ps-run do so)",
                generation=routes.generation,
            )
        return routes

    def lane(self, address: str) -> GrpcLane:
        """The lane to a server, made on first use."""
        if address not in self._lanes:
            self._lanes[address] = GrpcLane(address, self.link.security)
        return self._lanes[address]

    async def primary(self, partition: int, deadline: float) -> tuple[pb.Node, int]:
        """The node and epoch of a partition, waiting for a map that has it.

        Args:
            partition: its id.
            deadline: on `time.monotonic`.

        Raises:
            PartitionOffline: its server is lost, and did not come back for a while.
            Timeout: DEADLINE, if no map names it in time.
        """
        while True:
            await self._listed(partition, deadline)
            version = self.routes.version
            try:
                return self.routes.primary(partition)
            except PartitionOffline:
                left = min(self._patience(partition), deadline - time.monotonic())
                if left <= 0:
                    raise
            except Retryable:  # it is being loaded from a checkpoint
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
            await self.link.wait_for_map(version, left)

    async def _listed(self, partition: int, deadline: float) -> None:
        while partition not in self.routes:
            left = deadline - time.monotonic()
            if left <= 0 or not await self.link.wait_for_map(self.routes.version, left):
                what = "the ledger" if partition == 0 else f"partition {partition}"
                raise refuse(
                    "DEADLINE",
                    f"no server holds {what} yet: are enough ps-server processes running?",
                    what=what,
                )

    def _patience(self, partition: int) -> float:
        """Seconds for which a partition that is offline may still come back by itself."""
        since = self._offline.setdefault(partition, time.monotonic())
        bound = HELD_BACK_S if self.routes.has_live_copy(partition) else OFFLINE_S
        return since + bound - time.monotonic()

    def _on_map(self, routes: Routes) -> None:
        self._offline = {p: since for p, since in self._offline.items() if routes.is_offline(p)}
        alive = {n.address for n in routes.map.nodes if n.state in (pb.NODE_STATE_LIVE, pb.NODE_STATE_DRAINING)}
        for node in routes.map.nodes:  # a stalled one too: what waits there is better asked elsewhere
            if node.address not in alive and node.address in self._lanes:
                lane = self._lanes.pop(node.address)
                lane.lose(node.reason)
                self._closing = asyncio.ensure_future(lane.close())

    async def _deliver(
        self,
        partitions: Iterable[int],
        send: Callable[[GrpcLane, list[int], list[pb.StepRecord]], Awaitable[Answers[R]]],
        *,
        timeout: float,
        what: str,
        group: int = 0,
        committed: Sequence[pb.StepRecord] = (),
    ) -> dict[int, R]:
        """Send to the primaries of `partitions` until each has answered well.

        Raises:
            ParameshError: the first refusal that repeating does not mend.
            Timeout: DEADLINE, with what was refused last.
        """
        deadline = time.monotonic() + timeout
        pending, results, backoff = list(partitions), dict[int, R](), Backoff()
        records = list(committed)
        while True:
            version = self.routes.version
            answers = await self._send_all(pending, send, records, deadline)
            results.update({p: a for p, a in answers.items() if not isinstance(a, ParameshError)})
            failed = {p: a for p, a in answers.items() if isinstance(a, ParameshError)}
            if not failed:
                return results
            worst = self._first_to_raise(failed)
            if worst is not None:
                raise worst
            last = next(iter(failed.values()))
            if time.monotonic() >= deadline:
                raise refuse("DEADLINE", f"waited {timeout:g} s for {what}: {last}", what=what, last=last.reason)
            records = await self._mend(failed, group, records, version, backoff)
            pending = [p for p in pending if p in failed]

    async def _send_all(
        self,
        pending: list[int],
        send: Callable[[GrpcLane, list[int], list[pb.StepRecord]], Awaitable[Answers[R]]],
        records: list[pb.StepRecord],
        deadline: float,
    ) -> dict[int, R | ParameshError]:
        groups: dict[str, list[int]] = {}
        while pending and not groups:
            for partition in pending:
                await self.primary(partition, deadline)
            with contextlib.suppress(PartitionOffline, Retryable):  # the map changed while another was waited for
                groups = self.routes.by_server(pending)

        async def one(address: str, mine: list[int]) -> dict[int, R | ParameshError]:
            try:
                got = await send(self.lane(address), mine, records)
            except ParameshError as error:
                return dict.fromkeys(mine, error)
            missing = refuse("UNREACHABLE", f"{address} ended the stream early", peer=address)
            return {p: got.get(p, missing) for p in mine}

        answers: dict[int, R | ParameshError] = {}
        for part in await asyncio.gather(*(one(a, mine) for a, mine in groups.items())):
            answers.update(part)
        return answers

    async def _mend(
        self,
        failed: Mapping[int, ParameshError],
        group: int,
        records: list[pb.StepRecord],
        version: int,
        backoff: Backoff,
    ) -> list[pb.StepRecord]:
        """Do what the refusals ask for before the next try; the records to send then."""
        reasons = {error.reason for error in failed.values()}
        if "NEED_STEPS" in reasons:
            behind = min(int(e.metadata.get("applied_step", "0")) for e in failed.values() if e.reason == "NEED_STEPS")
            answer = await self.ledger.get_steps(ledger_pb2.GetStepsRequest(group=group, first=behind))
            have = {r.step: r for r in [*records, *answer.records]}  # the ledger's may have their clip factor by now
            supplied = [have[step] for step in sorted(have)]
            if supplied == records:  # what is needed is still to come: a decision or a clip factor
                await asyncio.sleep(backoff.next())
            return supplied
        brought = False
        for partition, error in failed.items():
            if error.reason == "NOT_STAGED":
                brought |= await self._mend_staging(partition, error, group, records)
        wait = min(backoff.next(), BROUGHT_S) if brought else backoff.next()
        told = max(map(told_to_wait, failed.values()))
        if told:
            await asyncio.sleep(told)
        elif reasons & {"UNREACHABLE", "STALE_EPOCH", "NOT_PRIMARY", "PARTITION_OFFLINE"}:
            if await self.link.wait_for_map(version, wait):
                backoff.reset()  # it moved: whatever is refused next has not been waited for yet
        else:
            await asyncio.sleep(wait)
        return records

    async def _mend_staging(
        self, partition: int, error: ParameshError, group: int, records: Sequence[pb.StepRecord]
    ) -> bool:
        """A new primary lacks contributions: bring it mine, and ask whether it may go without others'.

        The permission, if there is one, goes into the record of `records` that is sent next.

        Returns:
            Whether mine was among them, and was sent.
        """
        missing = [int(c) for c in error.metadata["client_ids"].split(",")]
        step = int(error.metadata["step"])  # not always that of the last record
        if await self._restage(partition, group, step, missing, records):
            return True
        answer = await self.ledger.report_missing(
            ledger_pb2.ReportMissingRequest(group=group, step=step, partition=partition, client_ids=missing)
        )
        for record in records:
            if record.step == step and answer.degraded:
                known = [d for d in record.degraded if d.partition == partition]
                permission = known[0] if known else record.degraded.add(partition=partition)
                permission.client_ids[:] = sorted({*permission.client_ids, *answer.degraded})
        return False

    @abc.abstractmethod
    async def _restage(
        self, partition: int, group: int, step: int, missing: Sequence[int], records: Sequence[pb.StepRecord]
    ) -> bool:
        """Bring a partition this client's contribution of a step again, if it lacks it; whether it did.

        The decision goes along: a partition takes what it names even of a client that is fenced.
        """

    def _first_to_raise(self, failed: Mapping[int, ParameshError]) -> ParameshError | None:
        for partition, error in failed.items():
            if error.reason == "PARTITION_OFFLINE" and self._patience(partition) > 0:
                continue  # a server's map is newer than ours; it may come back
            if error.reason not in _PASSING and error.action in (Action.RAISE, Action.REJOIN):
                return error
        return None

    async def close_lanes(self) -> None:
        """Close every channel to servers; calls in flight end."""
        for lane in self._lanes.values():
            await lane.close()
        self._lanes.clear()
