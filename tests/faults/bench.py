"""A live cluster of one server with one table, and a way to send it anything.

Requests are built raw, field by field, as a broken or hostile client might; answers come
back as the typed error they carry, wherever they carry it (status or outcome).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from paramesh import framing, testing
from paramesh.async_client import AsyncClient
from paramesh.channel import CHANNEL_OPTIONS, DataPlaneStub, aio_channel, grpc
from paramesh.client import Client
from paramesh.status import from_detail, from_rpc_error
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import coordinator_pb2_grpc, ledger_pb2_grpc, replication_pb2, replication_pb2_grpc
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator.rows import encode

from tests.cluster.waiting import wait_until

TENSORS = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}
"""Lies in one partition: w at bytes 0..48, b at 64..84."""

GRADIENT = torch.ones(21).numpy().tobytes()
"""84 bytes: w, the padding behind it, and b."""

CALL_SECONDS = 10.0


class Bench:
    """The cluster, its only table's partition, and a fresh client for each row."""

    def __init__(self, cluster: testing.Cluster) -> None:
        self.cluster = cluster
        self.tool: Client = cluster.client()
        self.tool.create_table("t", TENSORS, "Adam", {"lr": 0.01})
        (self.partition,) = self.tool.inspect("t")
        self.routes = self.tool._client.routes
        self.server = self.routes.primary(self.partition)[0].address
        self.control = self.routes.primary(self.partition)[0].control_address
        self.client: AsyncClient = self.tool._client
        self._pool = ThreadPoolExecutor(2)

    def new_client(self) -> AsyncClient:
        """Register a client that has sent nothing yet, and make it the sender."""
        if self.client.client_id != self.tool.client_id:
            self.ledger("Leave", lg.LeaveRequest())  # steps and epochs wait for members
            self.cluster.call(self.client.close())
        self.client = self.cluster.call(AsyncClient.connect(self.cluster.address))
        return self.client

    def connect(self) -> AsyncClient:
        """A further client beside the present one, and make it the sender."""
        self.client = self.cluster.call(AsyncClient.connect(self.cluster.address))
        return self.client

    def soon(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call something of this bench without waiting."""
        return self._pool.submit(call, *arguments)

    def waits(self, kind: str) -> bool:
        """Whether a call of the ledger sleeps on a key of a kind, such as "step"."""
        (server,) = self.cluster._servers.values()
        return any(key[0] == kind for key in server._ledger._service._waits._sleeping)

    def state(self) -> dict[int, Any]:
        """Partition -> (lsn, state hash, staged bytes), of the table."""
        info = self.tool.inspect("t")
        return {p: (i.lsn, i.state_hash, i.staged_bytes) for p, i in info.items()}

    def ledger_state(self) -> str:
        """A hash of everything that replicas of the ledger agree on."""
        return self.cluster.call(self._ledger_state())

    async def _ledger_state(self) -> str:
        servers = self.cluster._servers.values()
        (ledger,) = (s._ledger._service.ledger for s in servers if s._ledger._service is not None)
        return ledger.state_digest()

    def decisions(self) -> bytes:
        """The coordinator's job row, which every decision raises."""
        return encode(self.cluster._coordinator._driver.state.job)

    def settle(self) -> None:
        """Wait until the coordinator has nothing pending."""
        driver = self.cluster._coordinator._driver
        wait_until(lambda: not driver.state.operations(), 10, "evictions to be confirmed")

    def snapshot(self) -> None:
        """Note the state of tables, ledger and coordinator: what comes next must not change it."""
        self.before = (self.state(), self.values(), self.ledger_state(), self.decisions())

    def check_unchanged(self, *, noop: bool = False) -> None:
        """Nothing changed since the snapshot; `noop`: but for a seq that was consumed."""
        state, values, ledger, decisions = self.before
        assert self.values() == values
        assert noop or self.state() == state
        assert self.ledger_state() == ledger
        assert self.decisions() == decisions

    def values(self) -> list[float]:
        """The table's values."""
        return torch.cat([v.flatten() for v in self.tool.pull("t").values()]).tolist()

    # ------------------------------------------------------------------ building

    def frame(self, payload: bytes = GRADIENT, **changes: Any) -> pb.Frame:
        """A right frame header for a payload, with changes."""
        fields = {
            "offset": 0, "length": len(payload), "codec": pb.CODEC_NONE, "last": True,
            "checksum_kind": framing.DEFAULT_CHECKSUM, "checksum": framing.checksum([payload]),
        }  # fmt: skip
        return pb.Frame(**{**fields, **changes})

    def header(self, payload: bytes = GRADIENT, frame: pb.Frame | None = None, **changes: Any) -> ps.PushHeader:
        """A right push header (sequenced, seq 1), with changes; None takes a field out."""
        fields: dict[str, Any] = {
            "request": self.client.header(), "partition": self.partition, "epoch": 1,
            "frame": frame or self.frame(payload), "sequenced": ps.SequenceKey(seq=1),
        }  # fmt: skip
        fields = {k: v for k, v in {**fields, **changes}.items() if v is not None}
        return ps.PushHeader(**fields)

    def request(self, **changes: Any) -> pb.RequestHeader:
        """This client's request header, with changes."""
        header = self.client.header()
        for name, value in changes.items():
            setattr(header, name, value)
        return header

    # ------------------------------------------------------------------ sending

    def push(self, payload: bytes = GRADIENT, **changes: Any) -> ps.PartitionOutcome:
        """Send one push frame; raises the typed error of whole call or outcome."""
        return self.push_messages([framing.encode(self.header(payload, **changes), [payload])])

    def push_messages(self, messages: Sequence[bytes]) -> ps.PartitionOutcome:
        """Send a stream of encoded push messages; the outcome of the table's partition."""
        response = self.raw("push", messages)
        for outcome in response.outcomes:
            if outcome.HasField("error"):
                raise from_detail(outcome.error)
        return response.outcomes[0]

    def pull(self, seconds: float = CALL_SECONDS, **changes: Any) -> list[Any]:
        """Pull the partition, with changes to the request."""
        fields: dict[str, Any] = {
            "request": self.client.header(),
            "partitions": [ps.PartitionPull(partition=self.partition, epoch=1)],
        }
        return self.frames("pull", ps.PullRequest(**{**fields, **changes}), seconds)

    def norms(self, request: ps.NormsRequest) -> None:
        """Ask for norms; raises the first error."""
        for norm in self.cluster.call(self._norms(request)).norms:
            if norm.HasField("error"):
                raise from_detail(norm.error)

    async def _norms(self, request: ps.NormsRequest) -> Any:
        async with aio_channel(self.server) as channel:
            try:
                return await DataPlaneStub(channel).norms(request, timeout=CALL_SECONDS)
            except grpc.RpcError as error:
                raise from_rpc_error(error, self.server) from None

    def frames(self, method: str, request: Any, seconds: float = CALL_SECONDS) -> list[Any]:
        """Collect a streamed answer; raises the first error in it."""
        return self.cluster.call(self._frames(method, request, seconds))

    async def _frames(self, method: str, request: Any, seconds: float) -> list[Any]:
        async with aio_channel(self.server) as channel:
            try:
                frames = [f async for f in getattr(DataPlaneStub(channel), method)(request, timeout=seconds)]
            except grpc.RpcError as error:
                raise from_rpc_error(error, self.server) from None
        for frame in frames:
            if frame.header.HasField("error"):
                raise from_detail(frame.header.error)
        return frames

    def raw(self, method: str, messages: Sequence[bytes]) -> Any:
        """A client-streaming data call with any bytes as messages."""
        return self.cluster.call(self._raw(method, messages))

    async def _raw(self, method: str, messages: Sequence[bytes]) -> Any:
        async def stream() -> Any:
            for message in messages:
                yield message

        async with aio_channel(self.server) as channel:
            try:
                return await getattr(DataPlaneStub(channel), method)(stream(), timeout=CALL_SECONDS)
            except grpc.RpcError as error:
                raise from_rpc_error(error, self.server) from None

    def coordinator(self, service: str, method: str, request: Any) -> Any:
        """Call the coordinator."""
        return self._unary(self.cluster.address, getattr(coordinator_pb2_grpc, f"{service}Stub"), method, request)

    def ledger(self, method: str, request: Any, header: pb.RequestHeader | None = None) -> Any:
        """Call the ledger, under this client's header or another."""
        request.request.CopyFrom(header or self.client.header())
        return self._unary(self.server, ledger_pb2_grpc.LedgerStub, method, request)

    def _unary(self, address: str, stub: Any, method: str, request: Any) -> Any:
        with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            try:
                return getattr(stub(channel), method)(request, timeout=CALL_SECONDS)
            except grpc.RpcError as error:
                raise from_rpc_error(error, address) from None

    def call_bytes(self, path: str, body: bytes, kind: str = "unary_unary", **options: Any) -> grpc.StatusCode:
        """Send raw bytes to any method path of the server; the status code of the answer."""
        with grpc.insecure_channel(self.server, options=CHANNEL_OPTIONS) as channel:
            call = getattr(channel, kind)(path)
            argument = iter([body]) if kind.startswith("stream") else body
            try:
                answer = call(argument, timeout=CALL_SECONDS, **options)
                if kind.endswith("stream"):
                    list(answer)
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    def table_spec(self, **changes: Any) -> pb.TableSpec:
        """A right schema under a new name, with changes."""
        fields: dict[str, Any] = {
            "name": "new", "group": "new",
            "tensors": [pb.TensorSpec(name="w", shape=[3, 4], dtype=pb.DTYPE_FLOAT32)],
            "optimizer": pb.OptimizerSpec(class_name="SGD", hyper_parameters=[number("lr", 0.1)]),
        }  # fmt: skip
        return pb.TableSpec(**{**fields, **changes})

    def create_table(self, **changes: Any) -> Any:
        """Ask for a table."""
        request = co.CreateTableRequest(request=self.client.header(), spec=self.table_spec(**changes))
        return self.coordinator("Catalog", "CreateTable", request)

    def fence(self, client_id: int) -> None:
        """Forbid a client, as the coordinator does when it evicts one."""
        fence = replication_pb2.FenceRequest(term=self.client.routes.map.term, client_ids=[client_id])
        fence.request.CopyFrom(self.request(client_id=0))
        self._unary(self.control, replication_pb2_grpc.ServerControlStub, "Fence", fence)

    def register_server(self, **changes: Any) -> Any:
        """Register a server as a process might that the coordinator does not know."""
        fields: dict[str, Any] = {
            "request": pb.RequestHeader(job="default", protocol=1), "name": "server-9", "incarnation": 99,
            "address": self.server, "control_address": self.control, "host_id": "h", "version": "0",
        }  # fmt: skip
        return self.coordinator("Membership", "RegisterServer", co.RegisterServerRequest(**{**fields, **changes}))


def number(name: str, value: float) -> pb.HyperParameter:
    """A numeric hyper-parameter."""
    return pb.HyperParameter(name=name, number=value)
