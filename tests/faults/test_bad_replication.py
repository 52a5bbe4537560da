"""Wrong appends, snapshots and handovers, to the follower of a replicated partition (rows 37, 38, 54, 55).

Two real servers. Requests are built as the partition's primary would, but for what a row changes: a
follower must not lean on its primary being right, nor on who calls being its primary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import torch
from paramesh import framing
from paramesh.channel import CHANNEL_OPTIONS
from paramesh.errors import REASONS, ParameshError
from paramesh.status import from_detail, from_rpc_error
from paramesh.v1 import recovery_pb2, recovery_pb2_grpc
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import replication_pb2_grpc as rp_grpc
from paramesh.v1 import types_pb2 as pb

from tests.cluster import inspection, replication
from tests.cluster.processes import ProcessCluster
from tests.cluster.waiting import wait_until
from tests.faults.bench import GRADIENT
from tests.faults.process_bench import ProcessBench

CALL_S = 10.0


class Pair(ProcessBench):
    """A partition with a primary and a follower."""

    def __init__(self, processes: ProcessCluster) -> None:
        super().__init__(processes)
        replication.wait_until_in_sync(processes, 2, 30)
        self.tool.push("t", {"w": torch.ones(3, 4), "b": torch.ones(5)})
        mine = self.map()
        self.row = next(row for row in mine.partitions if row.id == self.partition)
        (self.follower,) = (ref for ref in self.row.isr if ref != self.row.primary)
        (node,) = (node for node in mine.nodes if node.ref == self.follower)
        self.at = node.control_address
        self.lsn = self.state()[self.partition][0]
        wait_until(lambda: self.replica()[1] == self.lsn, 10, "the follower to have it all")

    def map(self) -> pb.PartitionMap:
        """The map."""
        return inspection.partition_map(self.cluster.address)

    def replica(self) -> tuple[int, int, int]:
        """What the follower says of itself: promised epoch, its last record."""
        request = recovery_pb2.TestifyRequest(request=self.request(client_id=0))
        stub = recovery_pb2_grpc.RecoveryStub
        (report,) = (
            r for r in self._unary(self.at, stub, "Testify", request).replicas if r.partition == self.partition
        )
        return report.promised, report.last_lsn, report.last_epoch

    def greeting(self, kind: Callable[..., Any], **changes: Any) -> Any:
        """A right first header, with changes."""
        fields: dict[str, Any] = {
            "request": self.request(client_id=0), "primary": self.row.primary, "follower": self.follower,
            "partition": self.partition, "epoch": self.row.epoch,
        }  # fmt: skip
        return kind(**{**fields, **changes})

    def append(self, *messages: bytes, first: rp.AppendHeader | None = None) -> None:
        """Send a stream of appends; raises what the follower says."""
        hello = framing.encode(first or self.greeting(rp.AppendHeader))
        for answer in self._stream("Append", [hello, *messages]):
            if answer.HasField("error"):
                raise from_detail(answer.error)

    def install(self, *messages: bytes, first: rp.InstallHeader | None = None) -> None:
        """Send a snapshot."""
        state = rp.ReplicaState(lsn=self.lsn, epoch=self.row.epoch, init_attempt=1)
        hello = framing.encode(first or self.greeting(rp.InstallHeader, state=state))
        self._stream("Install", [hello, *messages])

    def _stream(self, method: str, messages: list[bytes]) -> list[Any]:
        path = f"/paramesh.v1.Replication/{method}"
        with grpc.insecure_channel(self.at, options=CHANNEL_OPTIONS) as channel:
            try:
                if method == "Append":
                    read = rp.AppendResponse.FromString
                    return list(channel.stream_stream(path, bytes, read)(iter(messages), timeout=CALL_S))
                return [channel.stream_unary(path, bytes)(iter(messages), timeout=CALL_S)]
            except grpc.RpcError as error:
                raise from_rpc_error(error, self.at) from None

    def record(self, payload: bytes = GRADIENT, frame: dict[str, Any] | None = None, **changes: Any) -> bytes:
        """The next record of the log, as its primary would send it, with changes to it and to its frame."""
        fields: dict[str, Any] = {
            "partition": self.partition, "epoch": self.row.epoch, "lsn": self.lsn + 1, "kind": rp.RECORD_KIND_PUSH,
            "client_id": 1, "seq": 1, "payload_bytes": len(payload),
        }  # fmt: skip
        changed = {**fields, **changes}
        head = rp.AppendHeader(
            partition=self.partition, epoch=self.row.epoch, previous_lsn=changed["lsn"] - 1,
            previous_epoch=self.row.epoch, record=rp.LogRecord(**changed), frame=self.frame(payload, **(frame or {})),
        )  # fmt: skip
        return framing.encode(head, [payload])

    def piece(self, payload: bytes = GRADIENT, *, last: bool = False, **changes: Any) -> bytes:
        """A frame of a snapshot's values, with changes to it."""
        fields = {"slot": changes.pop("slot", ""), "segment": changes.pop("segment", 0)}
        header = rp.InstallHeader(frame=self.frame(payload, last=last, **changes), **fields)
        return framing.encode(header, [payload] if payload else [])

    def end(self) -> bytes:
        """The message with which a snapshot says that it is whole."""
        return self.piece(b"", last=True)


@dataclass(frozen=True)
class Row:
    """One wrong request."""

    number: int
    what: str
    reason: str
    send: Callable[[Pair], Any]

    @property
    def id(self) -> str:
        """For pytest."""
        return f"{self.number:02}-{self.what.replace(' ', '-')}"


def _handover(p: Pair, *messages: bytes, **changes: Any) -> None:
    fields = {"request": p.request(client_id=0), "source": p.row.primary, "target": p.follower,
              "partition": p.partition, "epoch": p.row.epoch}  # fmt: skip
    first = framing.encode(rp.HandoverHeader(**{**fields, **changes}))
    p._stream("Handover", [first, *messages])


def _promote(p: Pair) -> None:
    request = rp.BecomePrimaryRequest(request=p.request(client_id=0), term=99, partition=p.partition, epoch=9)
    p._unary(p.at, rp_grpc.ServerControlStub, "BecomePrimary", request)


def _other(ref: pb.ReplicaRef) -> pb.ReplicaRef:
    return pb.ReplicaRef(node=ref.node, incarnation=ref.incarnation + 1)


ROWS = [
    Row(38, "an order to lead: the map is the order", "UNIMPLEMENTED", _promote),
    Row(38, "a handover for another process", "UNKNOWN_NODE", lambda p: _handover(p, target=_other(p.follower))),
    Row(38, "a handover of an unknown partition", "NOT_READY", lambda p: _handover(p, partition=77)),
    Row(38, "a handover without a first message", "MISSING_FIELD", lambda p: p._stream("Handover", [])),
    Row(54, "a gap", "LOG_GAP", lambda p: p.append(p.record(lsn=p.lsn + 5))),
    Row(54, "an older epoch", "STALE_EPOCH", lambda p: p.append(first=p.greeting(rp.AppendHeader, epoch=0))),
    Row(54, "a damaged record", "CRC", lambda p: p.append(p.record(frame={"checksum": 1}))),
    Row(54, "an unknown checksum", "CODEC", lambda p: p.append(p.record(frame={"checksum_kind": 9}))),
    Row(54, "a record of another partition", "WRONG_PARTITION", lambda p: p.append(p.record(partition=77))),
    Row(54, "an unknown partition", "NOT_READY", lambda p: p.append(first=p.greeting(rp.AppendHeader, partition=77))),
    Row(54, "for another process", "UNKNOWN_NODE",
        lambda p: p.append(first=p.greeting(rp.AppendHeader, follower=_other(p.follower)))),
    Row(54, "a record that declares 2^40 bytes", "PAYLOAD_SIZE", lambda p: p.append(p.record(payload_bytes=1 << 40))),
    Row(54, "a record that brings more", "PAYLOAD_SIZE", lambda p: p.append(p.record(payload_bytes=8))),
    Row(54, "a record that brings less", "PAYLOAD_SIZE", lambda p: p.append(p.record(payload_bytes=4096))),
    Row(54, "another record under an applied number", "DIVERGED", lambda p: p.append(p.record(lsn=1, epoch=99))),
    Row(54, "a newer row than the map here", "NOT_READY",
        lambda p: p.append(first=p.greeting(rp.AppendHeader, row_version=1 << 40))),
    Row(54, "another job", "WRONG_CLUSTER",
        lambda p: p.append(first=p.greeting(rp.AppendHeader, request=p.request(job="other")))),
    Row(54, "no first message", "MISSING_FIELD", lambda p: [from_detail_of(a) for a in p._stream("Append", [])]),
    Row(55, "a snapshot that breaks off", "MISSING_FIELD", lambda p: p.install(p.piece())),
    Row(55, "a snapshot without values", "PAYLOAD_SIZE", lambda p: p.install(p.end())),
    Row(55, "a chunk that is missing", "PAYLOAD_SIZE", lambda p: p.install(p.piece(GRADIENT[:48]), p.end())),
    Row(55, "a chunk that is repeated", "PAYLOAD_SIZE", lambda p: p.install(p.piece(), p.piece(), p.end())),
    Row(55, "a chunk off its place", "PAYLOAD_SIZE", lambda p: p.install(p.piece(offset=1 << 40), p.end())),
    Row(55, "a damaged chunk", "CRC", lambda p: p.install(p.piece(checksum=1), p.end())),
    Row(55, "a part of the optimizer's state", "TENSOR_MISMATCH",
        lambda p: p.install(p.piece(), p.piece(GRADIENT[:16], slot="exp_avg"), p.end())),
    Row(55, "a state that no optimizer keeps", "TENSOR_MISMATCH",
        lambda p: p.install(p.piece(), p.piece(GRADIENT[:48], slot="momentum"), p.end())),
    Row(55, "a snapshot that never ends", "PAYLOAD_SIZE", lambda p: p.install(*[p.piece()] * 1000)),
    Row(55, "for another process", "UNKNOWN_NODE",
        lambda p: p.install(first=p.greeting(rp.InstallHeader, follower=_other(p.follower)))),
    Row(55, "of an older epoch", "STALE_EPOCH",
        lambda p: p.install(p.piece(), p.end(), first=p.greeting(rp.InstallHeader, epoch=0))),
    Row(55, "no first message", "MISSING_FIELD", lambda p: p._stream("Install", [])),
]  # fmt: skip


def from_detail_of(answer: rp.AppendResponse) -> None:
    """Raise what an answer says."""
    raise from_detail(answer.error)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with ProcessCluster(servers=2, replicas=2, client_timeout=600.0) as cluster:
        pair = Pair(cluster)
        yield pair
        pair.close()


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_a_follower_refuses_it_and_keeps_what_it_has(pair: Pair, row: Row, record_property) -> None:
    before = (pair.replica(), pair.state(), pair.values())
    with pytest.raises(ParameshError) as refused:
        row.send(pair)
    record_property("got", refused.value.reason)
    assert refused.value.reason == row.reason, str(refused.value)
    assert refused.value.code == REASONS[row.reason].code
    assert (pair.replica(), pair.state(), pair.values()) == before


def test_the_follower_still_follows_and_is_in_sync(pair: Pair) -> None:
    """After all of it: whatever stream was broken off has been taken up again."""
    pair.tool.push("t", {"w": torch.ones(3, 4), "b": torch.ones(5)})
    lsn = pair.state()[pair.partition][0]
    wait_until(lambda: pair.replica()[1] >= lsn, 10, "the follower to have the newest record")
    row = next(row for row in pair.map().partitions if row.id == pair.partition)
    assert pair.follower in row.isr
