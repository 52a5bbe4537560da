"""Streams cut off in their middle: nothing of an unfinished push counts, its whole repetition does (invariants 1, 27).

grpc.aio may end the server's request iterator *normally* when the caller is gone, and cancel the handler
only after that: an iterator's end alone never says that the sender had finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from paramesh import testing
from paramesh.async_client import AsyncClient
from paramesh.channel import grpc
from paramesh.encoded import Encoded
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
    data = torch.full((CELLS,), -1.0, dtype=torch.float64).numpy().data.cast("B")
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
