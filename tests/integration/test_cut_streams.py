"""Streams cut off in their middle: nothing of an unfinished push counts, its whole repetition does (invariants 1, 27).

grpc.aio may end the server's request iterator *normally* when the caller is gone, and cancel the handler
only after that: an iterator's end alone never says that the sender had finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from paramesh import testing
from paramesh.async_client import AsyncClient
from paramesh.channel import grpc
from paramesh.encoded import Encoded
from paramesh.errors import Fenced, ParameshError, refuse
from paramesh.io import IoThread
from paramesh.lanes.grpc_lane import GrpcLane
from paramesh.v1 import parameter_server_pb2 as ps

from tests.cluster.waiting import wait_until

CELLS = 64
FRAME_BYTES = 128  # four frames


@pytest.fixture
def cluster() -> Iterator[testing.Cluster]:
    with testing.Cluster(client_timeout=120.0) as cluster:
        yield cluster


def minus_ones(partition: int) -> Encoded:
    """A gradient that adds one to every cell, in several frames."""
    return _constant(partition, -1.0)


def twos(partition: int) -> Encoded:
    """A gradient that adds two to every cell."""
    return _constant(partition, -2.0)


def _constant(partition: int, value: float) -> Encoded:
    data = torch.full((CELLS,), value, dtype=torch.float64).numpy().data.cast("B")
    return Encoded.from_parts(partition, b"", [(0, data)], frame_bytes=FRAME_BYTES)


def messages_of(client: AsyncClient, partition: int) -> list[bytes]:
    """The first sequenced push of a client: a preamble and four frames."""
    _, epoch = client.routes.primary(partition)
    head = ps.PushHeader(partition=partition, epoch=epoch, sequenced=ps.SequenceKey(seq=1, grad_scale=1.0))
    return [client._preamble(()), *minus_ones(partition).messages(head)]


async def broken_push(address: str, messages: list[bytes], seen: Callable[[], bool], how: str) -> None:
    """Send all but the last message, wait until the server has them, and break off."""

    async def most() -> AsyncIterator[bytes]:
        for message in messages[:-1]:
            yield message
        await asyncio.Event().wait()

    lane = GrpcLane(address)
    call: Any = lane.data.push(most(), timeout=0.5 if how == "deadline" else 30)
    task = asyncio.ensure_future(_answer(call))
    while not (seen() or task.done()):  # noqa: ASYNC110 - nothing tells what a server holds
        await asyncio.sleep(0.005)
    assert not task.done(), "the server never held the frames"
    if how == "cancel":
        call.cancel()
    elif how == "close":
        await lane.close()
    with pytest.raises((grpc.RpcError, asyncio.CancelledError)):
        await task
    await lane.close()


async def _answer(call: Any) -> Any:
    return await call


@pytest.mark.parametrize("how", ["cancel", "deadline", "close"])
@pytest.mark.bad_input(70, got="counts once")
def test_a_push_cut_off_in_its_middle_does_not_use_up_its_number(cluster: testing.Cluster, how: str) -> None:
    tool = cluster.client()
    tool.create_table("t", {"w": torch.zeros(CELLS, dtype=torch.float64)}, "SGD", {"lr": 1.0})
    (partition,) = tool.inspect("t")
    node, _ = tool._client.routes.primary(partition)
    counters = cluster._servers[0].counters
    before = tool.inspect("t")[partition]

    client = cluster.call(AsyncClient.connect(cluster.address, role="tool"))
    held = 3 * FRAME_BYTES
    cluster.call(broken_push(node.address, messages_of(client, partition), lambda: counters.in_flight == held, how))
    wait_until(lambda: counters.in_flight == 0, 10, "the server to let go of the frames")
    after = tool.inspect("t")[partition]
    assert (after.lsn, after.state_hash) == (before.lsn, before.state_hash), "a push that never came whole left a trace"

    cluster.call(client.push_sequenced({partition: minus_ones(partition)}))  # the retry: same seq, whole bytes
    assert tool.pull("t")["w"].tolist() == [1.0] * CELLS
    cluster.call(client.close())


class Dropping:
    """A lane whose replies are lost, after the server has done the work, from a moment on."""

    def __init__(self, lane: GrpcLane) -> None:
        self._push, self.delivered = lane.push, asyncio.Event()
        lane.push = self.push  # type: ignore[method-assign]

    async def push(self, messages: Iterable[bytes], timeout: float) -> Any:
        await self._push(messages, timeout)
        self.delivered.set()
        raise refuse("UNREACHABLE", "the reply was lost")


async def push_into_the_dark(client: AsyncClient, partition: int, address: str, how: str) -> str:
    """A push whose replies are lost until the caller has had enough; the reason it ended with."""
    dropping = Dropping(client.lane(address))
    timeout = None if how == "the job's deadline" else 30.0
    pushing = asyncio.ensure_future(client.push_sequenced({partition: minus_ones(partition)}, timeout=timeout))
    await dropping.delivered.wait()
    if how == "cancelled":
        pushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pushing
        return "cancelled"
    with pytest.raises(ParameshError) as caught:
        await asyncio.wait_for(pushing, 20)
    return caught.value.reason


@pytest.mark.parametrize(("how", "reason"), [("the job's deadline", "DEADLINE"), ("cancelled", "cancelled")])
def test_a_client_that_does_not_know_what_became_of_an_update_pushes_no_other(how: str, reason: str) -> None:
    """Its number is neither free nor taken: the next update would be SEQ_REUSED for ever. A new client goes on."""
    with testing.Cluster(client_timeout=120.0, push_timeout=1.0) as cluster:
        tool = cluster.client()
        tool.create_table("t", {"w": torch.zeros(CELLS, dtype=torch.float64)}, "SGD", {"lr": 1.0})
        (partition,) = tool.inspect("t")
        node, _ = tool._client.routes.primary(partition)
        client = cluster.call(AsyncClient.connect(cluster.address, role="tool"))
        assert client.push_timeout == 1.0
        assert cluster.call(push_into_the_dark(client, partition, node.address, how)) == reason
        assert client.spoiled
        with pytest.raises(Fenced) as caught:
            cluster.call(client.push_sequenced({partition: twos(partition)}))
        assert str(partition) in str(caught.value)
        again = cluster.call(AsyncClient.connect(cluster.address, role="tool"))
        cluster.call(again.push_sequenced({partition: twos(partition)}))
        assert tool.pull("t")["w"].tolist() == [3.0] * CELLS
        cluster.call(client.close())
        cluster.call(again.close())


def test_a_push_that_was_refused_or_never_sent_spoils_nothing(cluster: testing.Cluster) -> None:
    tool = cluster.client()
    tool.create_table("t", {"w": torch.zeros(CELLS, dtype=torch.float64)}, "SGD", {"lr": 1.0})
    (partition,) = tool.inspect("t")
    client = cluster.call(AsyncClient.connect(cluster.address, role="tool"))
    short = Encoded.from_parts(partition, b"", [(0, bytes(64))])
    for wrong, reason in [({partition: short}, "PAYLOAD_SIZE"), ({partition: minus_ones(partition)}, "WEIGHT")]:
        scale = float("nan") if reason == "WEIGHT" else 1.0
        with pytest.raises(ParameshError) as caught:
            cluster.call(client.push_sequenced(wrong, grad_scale=scale))
        assert (caught.value.reason, client.spoiled) == (reason, False)
    with pytest.raises(ParameshError):
        cluster.call(client.push_sequenced({99: minus_ones(99)}, timeout=0.1))
    assert not client.spoiled
    cluster.call(client.push_sequenced({partition: minus_ones(partition)}))
    assert tool.pull("t")["w"].tolist() == [1.0] * CELLS
    cluster.call(client.close())


async def call_that_grpc_cancels(address: str) -> str:
    """The reason of a call that ends cancelled although nobody cancelled its task."""

    async def broken() -> None:
        raise asyncio.CancelledError

    lane = GrpcLane(address)
    try:
        await lane.run(broken())
    except ParameshError as error:
        return error.reason
    finally:
        await lane.close()
    return ""


def test_a_call_that_grpc_cancels_is_unreachable_and_repeated() -> None:
    """gRPC cancels a call whose connection is reset while it writes; a caller would take that for Ctrl-C."""
    assert IoThread.get().run(call_that_grpc_cancels("127.0.0.1:1"), 10, "a broken call") == "UNREACHABLE"
