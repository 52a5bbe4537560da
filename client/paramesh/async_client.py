"""The asynchronous client: routing, retries and sequence numbers over lanes.

    client = await AsyncClient.connect("127.0.0.1:7070")
    outcomes = await client.push_staged(group, step, {p: encoded}, {p: 1})
    await client.pull([p], sink, group=group, step=step + 1, committed=[record])

Everything here runs on the IO loop. Each call delivers to many partitions: they are
grouped by server, sent in parallel, and what a partition refused for a passing reason is
repeated (same bytes, same seq) until its deadline; other refusals are raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paramesh.channel import header as make_header
from paramesh.coordinator_link import CoordinatorLink
from paramesh.delivery import Answers, Delivery
from paramesh.encoded import Encoded, SlotWrite, Snapshot
from paramesh.errors import ParameshError, refuse
from paramesh.framing import DEFAULT_CHECKSUM, encode
from paramesh.lanes.grpc_lane import GrpcLane, Sink
from paramesh.ledger_client import LedgerClient
from paramesh.memory import keep_big_buffers
from paramesh.retry import CONSUMED
from paramesh.routing import Routes
from paramesh.security import PLAIN, Security
from paramesh.status import from_detail
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import coordinator_pb2_grpc
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

log = logging.getLogger(__name__)

PUSH_TIMEOUT_S = 60.0
"""After this the outcome of a push is unknown, if the job's configuration does not say."""

READ_TIMEOUT_S = 60.0
"""Seconds in which values must come; nothing hangs on it, a read is repeated at will."""


class AsyncClient(Delivery):
    """A registered client of one job. Make it with `connect`.

    Attributes:
        client_id: from the coordinator, never reused.
        ledger: calls to the ledger.
        heartbeat_interval: seconds between beats, as the coordinator asked.
    """

    def __init__(self, link: CoordinatorLink, registration: co.RegisterClientResponse):
        super().__init__(link)
        self.job = link.job
        self.client_id = registration.client_id
        self.generation = registration.generation
        self.heartbeat_interval = registration.heartbeat_interval_ms / 1000
        self.ledger = LedgerClient(self)
        self._seq: dict[int, int] = {}
        self._seq_locks: dict[int, asyncio.Lock] = {}
        self._spoiled = ""
        """Why no more updates are pushed: what became of one is unknown, so its seq is neither free nor taken."""
        self._assign_ids = 0
        self._kept: dict[int, _Kept] = {}
        """Group -> what was staged for its newest step: a new primary may need it again."""
        link.set_map(Routes(registration.map))
        link.start_watch()

    @classmethod
    async def connect(
        cls,
        coordinators: str,
        job: str = "default",
        *,
        slot: str | None = None,
        host: str = "",
        host_incarnation: int = 0,
        role: str = "worker",
        timeout: float = 30.0,
        security: Security = PLAIN,
    ) -> AsyncClient:
        """Register with the coordinator and fetch the map.

        Args:
            coordinators: `host:port[,host:port...]`.
            job: the cluster's name.
            slot: the supervisor's name of the place; None: this process's own.
            host: the supervisor that beats for this process; "": it beats for itself.
            host_incarnation: the supervisor's.
            role: "worker" or "tool".
            timeout: seconds in all.
            security: of every channel.

        Raises:
            AccessDenied: UNAUTHENTICATED or PERMISSION_DENIED.
            Unavailable: UNREACHABLE, if no coordinator answers.
            Timeout: DEADLINE, if the supervisor is not (or not again) registered in time.
            StateRefused: WRONG_CLUSTER or VERSION.
        """
        if role == "worker":
            keep_big_buffers()
        link = CoordinatorLink(coordinators, job, security)
        hostname = socket.gethostname()
        request = co.RegisterClientRequest(
            request=make_header(job),
            incarnation=secrets.randbits(63) | 1,
            slot=slot or f"{hostname}/{os.getpid()}.{secrets.token_hex(3)}",
            host=host,
            host_incarnation=host_incarnation,
            host_id=hostname,
            role=role,
        )
        try:
            registration = await link.call(
                lambda ch: coordinator_pb2_grpc.MembershipStub(ch).RegisterClient(request, timeout=5.0),
                timeout,
                "registering a client",
                # A supervisor that was thought dead registers again, but its worker may be quicker.
                passing=frozenset({"UNKNOWN_NODE"}),
            )
        except BaseException:
            await link.close()
            raise
        return cls(link, registration)

    # -- where things are ---------------------------------------------------------

    @property
    def push_timeout(self) -> float:
        """Seconds after which the outcome of a push is unknown, as the whole job has agreed."""
        return self.routes.map.config.push_timeout_ms / 1000 or PUSH_TIMEOUT_S

    @property
    def spoiled(self) -> bool:
        """Whether an update's outcome stayed unknown: every later one is refused here."""
        return bool(self._spoiled)

    def header(self) -> pb.RequestHeader:
        """This client's request header."""
        return make_header(self.job, self.generation, self.client_id)

    # -- schemas -------------------------------------------------------------------

    async def create_table(self, spec: pb.TableSpec, timeout: float = 60.0) -> int:
        """Create a table, or find it if it exists with the same schema; its id.

        Raises:
            StateRefused: SCHEMA, if it exists with another one.
            RequestRefused: NAME, SHAPE, DTYPE, QUOTA, UNSUPPORTED_OPTIMIZER...
        """
        request = co.CreateTableRequest(request=self.header(), spec=spec)
        response = await self.link.call(
            lambda ch: coordinator_pb2_grpc.CatalogStub(ch).CreateTable(request, timeout=10.0),
            timeout,
            f"creating table {spec.name!r}",
        )
        self.link.set_map(Routes(response.map))
        return int(response.table_id)

    async def describe_table(self, table_id: int, timeout: float = 30.0) -> pb.TableSpec:
        """A table's schema.

        Raises:
            RequestRefused: UNKNOWN_TABLE.
        """
        request = co.DescribeTableRequest(request=self.header(), table_id=table_id)
        response = await self.link.call(
            lambda ch: coordinator_pb2_grpc.CatalogStub(ch).DescribeTable(request, timeout=5.0),
            timeout,
            f"the schema of table {table_id}",
        )
        spec: pb.TableSpec = response.spec
        return spec

    # -- the data plane ------------------------------------------------------------

    def freeze_staged(self, encoded: Encoded, group: int, step: int, attempt: int) -> None:
        """Copy a contribution's bytes into its messages now, on the calling thread.

        For gradients that may change before the IO thread gets to them.
        """
        encoded.messages(self._staged_header(encoded.partition, group, step, attempt))

    def _staged_header(self, partition: int, group: int, step: int, attempt: int) -> ps.PushHeader:
        epoch = self.routes.partition(partition).epoch
        key = ps.StagedKey(group=group, step=step, attempt=attempt)
        return ps.PushHeader(partition=partition, epoch=epoch, staged=key)

    def _preamble(self, records: Sequence[pb.StepRecord]) -> bytes:
        return encode(ps.PushHeader(request=self.header(), committed=records))

    async def push_staged(
        self,
        group: int,
        step: int,
        contributions: Mapping[int, Encoded],
        attempts: Mapping[int, int],
        committed: Sequence[pb.StepRecord] = (),
        timeout: float | None = None,
    ) -> dict[int, ps.PartitionOutcome]:
        """Stage a contribution; returns when every partition holds it.

        Args:
            group: the table group.
            step: the step it is for.
            contributions: partition -> its bytes.
            attempts: partition -> attempt, from 1; missing ones are 1.
            committed: decisions that partitions may lack, oldest first.
            timeout: seconds; None: the job's `push_timeout`.

        Raises:
            PartitionOffline: a server is lost. Timeout: DEADLINE, the outcome is unknown.
            Fenced: CLIENT_FENCED. RequestRefused: the bytes do not fit the table.
        """
        seconds = self.push_timeout if timeout is None else timeout
        self._keep(group, step, contributions, attempts)

        async def send(lane: GrpcLane, mine: list[int], records: list[pb.StepRecord]) -> Answers[ps.PartitionOutcome]:
            def messages() -> Iterable[bytes]:
                yield self._preamble(records)
                for p in mine:
                    head = self._staged_header(p, group, step, attempts.get(p, 1))
                    yield from contributions[p].messages(head)

            return _outcomes(await lane.push(messages(), seconds))

        what = f"step {step} to be staged"
        return await self._deliver(contributions, send, timeout=seconds, what=what, group=group, committed=committed)

    def _keep(self, group: int, step: int, contributions: Mapping[int, Encoded], attempts: Mapping[int, int]) -> None:
        kept = self._kept.get(group)
        if kept is None or kept.step != step:
            kept = self._kept[group] = _Kept(step, {})
        for partition, encoded in contributions.items():
            kept.contributions[partition, attempts.get(partition, 1)] = encoded

    def applied(self, group: int, step: int) -> None:
        """Every partition has answered "applied" for a step: what was staged for it is in every replica."""
        kept = self._kept.get(group)
        if kept is not None and kept.step <= step:
            del self._kept[group]

    async def _restage(
        self, partition: int, group: int, step: int, missing: Sequence[int], records: Sequence[pb.StepRecord]
    ) -> bool:
        kept = self._kept.get(group)
        if self.client_id not in missing or kept is None or kept.step != step:
            return False
        again = {a: encoded for (p, a), encoded in kept.contributions.items() if p == partition}
        for attempt, encoded in sorted(again.items()):  # the decision says which of them counts
            log.info("bringing a new primary what was staged partition=%d step=%d attempt=%d", partition, step, attempt)
            await self._restage_one(group, step, encoded, attempt, records)
        return bool(again)

    async def _restage_one(
        self, group: int, step: int, encoded: Encoded, attempt: int, records: Sequence[pb.StepRecord]
    ) -> None:
        """One try: whoever waits for the partition tries again, and then this does."""
        head = self._staged_header(encoded.partition, group, step, attempt)
        messages = [self._preamble(records), *encoded.messages(head)]
        try:
            node, _ = self.routes.primary(encoded.partition)
            outcomes = _outcomes(await self.lane(node.address).push(messages, self.push_timeout))
        except ParameshError as error:
            outcomes = {encoded.partition: error}
        failed = {p: outcome for p, outcome in outcomes.items() if isinstance(outcome, ParameshError)}
        worst = self._first_to_raise(failed)  # not that it is gone in its turn
        if worst is not None:
            raise worst

    async def push_sequenced(
        self,
        contributions: Mapping[int, Encoded],
        hyper_parameters: Sequence[pb.TableHyperParameters] = (),
        *,
        skip: bool = False,
        grad_scale: float = 1.0,
        timeout: float | None = None,
    ) -> dict[int, ps.PartitionOutcome]:
        """Apply an update exactly once per partition; returns when all have applied it.

        Args:
            contributions: partition -> its bytes.
            hyper_parameters: those that changed since this client's last update.
            skip: apply nothing (an inf under AMP).
            grad_scale: multiplies the gradient.
            timeout: seconds; None: the job's `push_timeout`. When this, a cancellation or an
                error leaves a partition's outcome unknown, the client is `spoiled`: register anew.

        Raises:
            PartitionOffline, Timeout, RequestRefused: as `push_staged`.
            Fenced: CLIENT_FENCED, also if this client is spoiled.
        """
        seconds = self.push_timeout if timeout is None else timeout
        key = ps.SequenceKey(hyper_parameters=hyper_parameters, skip=skip, grad_scale=grad_scale)
        in_doubt: set[int] = set()
        async with contextlib.AsyncExitStack() as stack:
            for p in sorted(contributions):  # one ordered sender per (client, partition)
                await stack.enter_async_context(self._seq_locks.setdefault(p, asyncio.Lock()))
            self._refuse_if_spoiled(contributions)
            send = self._sequenced_sender(contributions, key, seconds, in_doubt)
            try:
                return await self._deliver(contributions, send, timeout=seconds, what="an update to be applied")
            except BaseException as error:
                if in_doubt:
                    self._spoiled = f"of partitions {sorted(in_doubt)}: {error!r:.200}"
                raise

    def _refuse_if_spoiled(self, partitions: Iterable[int]) -> None:
        if self._spoiled:
            for partition in partitions:
                self.routes.primary(partition)  # a lost server is the better story, and no rejoining helps
            raise refuse(
                "CLIENT_FENCED",
                f"client {self.client_id} does not know what became of its last update ({self._spoiled}) and "
                "pushes no other: connect as a new one",
                client=self.client_id,
            )

    def _sequenced_sender(
        self, contributions: Mapping[int, Encoded], key: ps.SequenceKey, timeout: float, in_doubt: set[int]
    ) -> Callable[[GrpcLane, list[int], list[pb.StepRecord]], Awaitable[Answers[ps.PartitionOutcome]]]:
        """What sends updates and counts their numbers; `in_doubt`: sent, and not known to be applied or not."""

        def messages(mine: list[int]) -> Iterable[bytes]:
            yield self._preamble(())
            for p in mine:
                epoch = self.routes.partition(p).epoch
                key.acked_through = self._seq.get(p, 0)
                key.seq = key.acked_through + 1
                yield from contributions[p].messages(ps.PushHeader(partition=p, epoch=epoch, sequenced=key))

        async def send(lane: GrpcLane, mine: list[int], records: list[pb.StepRecord]) -> Answers[ps.PartitionOutcome]:
            before = set(in_doubt)
            in_doubt.update(mine)
            answers = _outcomes(await lane.push(messages(mine), timeout))
            for p, answer in answers.items():
                settled = not isinstance(answer, ParameshError) or answer.reason in CONSUMED
                self._seq[p] = self._seq.get(p, 0) + settled
                # A refusal says nothing of an earlier try that broke: that may still arrive.
                if settled or p not in before:
                    in_doubt.discard(p)
            return answers

        return send

    async def pull(
        self,
        partitions: Sequence[int],
        sink: Sink,
        *,
        group: int = 0,
        step: int | None = None,
        committed: Sequence[pb.StepRecord] = (),
        floors: Mapping[int, tuple[int, int]] | None = None,
        timeout: float = READ_TIMEOUT_S,
    ) -> dict[int, ps.PullHeader]:
        """Stream values into `sink`; the last header of each partition.

        Args:
            partitions: their ids.
            sink: takes (partition, header, payload) of each frame, on the IO thread; after
                a retry it may be given a partition's frames again, from the start.
            group: the table group, with `step`.
            step: values exactly at the start of this step; None: the newest.
            committed: decisions that partitions may lack, oldest first.
            floors: partition -> (epoch, lsn) that the answer must at least reflect.
            timeout: seconds.

        Raises:
            PartitionOffline, Timeout: as `push_staged`.
        """

        async def send(lane: GrpcLane, mine: list[int], records: list[pb.StepRecord]) -> Answers[ps.PullHeader]:
            request = ps.PullRequest(
                request=self.header(),
                partitions=[self._pull_of(p, floors) for p in mine],
                group=group,
                at_step=step is not None,
                step=step or 0,
                committed=records,
                checksum_kind=DEFAULT_CHECKSUM,
            )
            return _checked(await lane.pull(request, sink, timeout))

        what = "values" if step is None else f"values at step {step}"
        return await self._deliver(partitions, send, timeout=timeout, what=what, group=group, committed=committed)

    def _pull_of(self, partition: int, floors: Mapping[int, tuple[int, int]] | None = None) -> ps.PartitionPull:
        epoch = self.routes.partition(partition).epoch
        floor_epoch, floor_lsn = (floors or {}).get(partition, (0, 0))
        return ps.PartitionPull(
            partition=partition,
            epoch=epoch,
            floor_lsn=floor_lsn,
            floor_epoch=floor_epoch,
            acked_through=self._seq.get(partition, 0),
        )

    async def assign(
        self,
        writes: Mapping[int, Sequence[SlotWrite]],
        init_attempt: int = 0,
        timeout: float | None = None,
    ) -> dict[int, ps.PartitionOutcome]:
        """Write values or optimizer state.

        Args:
            writes: partition -> what to write there.
            init_attempt: INIT's attempt when these are first values.
            timeout: seconds; None: the job's `push_timeout`.

        Raises:
            PartitionOffline, Timeout, RequestRefused: as `push_staged`.
        """
        seconds = self.push_timeout if timeout is None else timeout
        self._assign_ids += 1
        assign_id = self._assign_ids

        async def send(lane: GrpcLane, mine: list[int], records: list[pb.StepRecord]) -> Answers[ps.PartitionOutcome]:
            def messages() -> Iterable[bytes]:
                for p in mine:
                    epoch = self.routes.partition(p).epoch
                    base = ps.AssignHeader(
                        request=self.header(),
                        partition=p,
                        epoch=epoch,
                        assign_id=assign_id,
                        init_attempt=init_attempt,
                    )
                    frames = [frame for write in writes[p] for frame in write.messages(base)]
                    for i, (head, parts) in enumerate(frames):
                        head.frame.last = i == len(frames) - 1
                        yield encode(head, parts)

            return _outcomes(await lane.assign(messages(), seconds))

        return await self._deliver(writes, send, timeout=seconds, what="values to be assigned")

    async def snapshot(
        self,
        partitions: Sequence[int],
        *,
        group: int = 0,
        step: int | None = None,
        committed: Sequence[pb.StepRecord] = (),
        timeout: float = READ_TIMEOUT_S,
    ) -> dict[int, Snapshot]:
        """Cuts of values and optimizer state; arguments and errors as `pull`."""

        async def send(lane: GrpcLane, mine: list[int], records: list[pb.StepRecord]) -> Answers[Snapshot]:
            request = ps.SnapshotRequest(
                request=self.header(),
                partitions=[self._pull_of(p) for p in mine],
                group=group,
                at_step=step is not None,
                step=step or 0,
                committed=records,
                checksum_kind=DEFAULT_CHECKSUM,
            )
            done, refused = await lane.snapshot(request, timeout)
            return {**done, **{p: from_detail(h.error) for p, h in refused.items()}}

        return await self._deliver(
            partitions, send, timeout=timeout, what="a snapshot", group=group, committed=committed
        )

    async def norms(
        self,
        partitions: Sequence[int],
        group: int,
        committed: Sequence[pb.StepRecord],
        timeout: float = READ_TIMEOUT_S,
    ) -> dict[int, float]:
        """Squared norms of the averaged gradient of the step that `committed` ends with."""

        async def send(lane: GrpcLane, mine: list[int], records: list[pb.StepRecord]) -> Answers[float]:
            request = ps.NormsRequest(
                request=self.header(), partitions=[self._pull_of(p) for p in mine], committed=records
            )
            response = await lane.run(_await(lane.data.norms(request, timeout=timeout)))
            return {
                n.partition: from_detail(n.error) if n.HasField("error") else float(n.squared_norm)
                for n in response.norms
            }

        return await self._deliver(
            partitions, send, timeout=timeout, what="gradient norms", group=group, committed=committed
        )

    async def inspect(
        self, partitions: Sequence[int], *, state_hash: bool = False, timeout: float = 30.0
    ) -> dict[int, ps.PartitionInfo]:
        """What servers say of partitions; with `state_hash`, at the cost of a pass over them."""

        async def send(lane: GrpcLane, mine: list[int], records: list[pb.StepRecord]) -> Answers[ps.PartitionInfo]:
            request = ps.InspectRequest(request=self.header(), partitions=mine, state_hash=state_hash)
            response = await lane.run(_await(lane.data.inspect(request, timeout=timeout)))
            return {info.partition: info for info in response.partitions}

        return await self._deliver(partitions, send, timeout=timeout, what="an inspection")

    async def deregister(self, timeout: float = 3.0) -> None:
        """Say goodbye to the coordinator; silent if it is away."""
        request = co.DeregisterRequest(request=self.header(), kind=co.NODE_KIND_CLIENT)
        with contextlib.suppress(ParameshError):
            await self.link.call(
                lambda ch: coordinator_pb2_grpc.MembershipStub(ch).Deregister(request, timeout=timeout),
                timeout,
                "saying goodbye",
            )

    async def close(self) -> None:
        """Close every channel; says nothing to anybody."""
        await self.link.close()
        await self.close_lanes()


@dataclass
class _Kept:
    """What was staged for one step: the very bytes, until every partition has applied it."""

    step: int
    contributions: dict[tuple[int, int], Encoded]
    """(partition, attempt) -> bytes."""


async def _await(call: Any) -> Any:
    return await call


def _outcomes(outcomes: Iterable[ps.PartitionOutcome]) -> dict[int, ps.PartitionOutcome | ParameshError]:
    return {o.partition: from_detail(o.error) if o.HasField("error") else o for o in outcomes}


def _checked(headers: Mapping[int, ps.PullHeader]) -> dict[int, ps.PullHeader | ParameshError]:
    return {p: from_detail(h.error) if h.HasField("error") else h for p, h in headers.items()}
