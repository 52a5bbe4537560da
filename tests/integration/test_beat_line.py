"""Beats over two connections: which of them counts, however they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from paramesh.channel import grpc
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import coordinator_pb2_grpc
from paramesh_server.beat_line import Identity, Line

Answers = Callable[[int, grpc.aio.ServicerContext], AsyncIterator[co.HeartbeatResponse]]


class Coordinator(coordinator_pb2_grpc.MembershipServicer):
    """Answers the n-th stream as it is told to."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self.streams = 0

    async def Heartbeat(self, requests, context):
        self.streams += 1
        async for answer in self._answers(self.streams, context):
            yield answer


async def said_to(answers: Answers) -> tuple[bool, int]:
    """What a line says of such a coordinator, and how many streams it took."""
    server, coordinator = grpc.aio.server(), Coordinator(answers)
    coordinator_pb2_grpc.add_MembershipServicer_to_server(coordinator, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    identity = Identity(address, "default", 1, "s0", 7, interval=0.05, timeout=2.0)
    try:
        line = Line(identity, lambda beat: beat, lambda: True, lambda: None)
        return await asyncio.wait_for(line.run(address), 20), coordinator.streams
    finally:
        await server.stop(0)


async def never() -> None:
    await asyncio.Event().wait()


def test_unknown_on_the_second_connection_is_the_answer_while_the_first_hangs():
    """The first is given up in the same breath: its end is no cancellation of whoever beats."""

    async def answers(stream, context):
        if stream == 1:
            await never()
        yield co.HeartbeatResponse(nonce=1, unknown=True)

    for _ in range(3):
        assert asyncio.run(said_to(answers)) == (True, 2)


def test_a_second_connection_that_is_refused_ends_nothing_while_the_first_may_answer():
    async def answers(stream, context):
        if stream == 1:
            await third.wait()
            yield co.HeartbeatResponse(nonce=1, unknown=True)
            return
        if stream == 3:
            third.set()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "busy")

    third = asyncio.Event()
    known, streams = asyncio.run(said_to(answers))
    assert (known, streams >= 3) == (True, True)


def test_the_last_connection_that_breaks_says_why():
    async def answers(stream, context):
        await context.abort(grpc.StatusCode.UNAVAILABLE, "busy")
        yield

    with pytest.raises(grpc.RpcError, match="busy"):
        asyncio.run(said_to(answers))


@pytest.mark.parametrize("broken", [False, True])
def test_streams_that_end_together_are_all_looked_at(broken):
    """One that was given up and one that speaks may be done in one turn of the loop, in whatever order."""

    async def test() -> bool | None:
        line = Line(Identity("a:1", "default", 1, "s0", 7, 0.5, 2.0), lambda beat: beat, lambda: True, lambda: None)

        async def end() -> bool:
            if broken:
                raise TimeoutError("broken")
            return True

        given_up = [asyncio.ensure_future(never()) for _ in range(8)]
        spoke = asyncio.ensure_future(end())
        await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        await asyncio.wait([*given_up, spoke])
        assert line._said_by(set(given_up)) is False, "gRPC cancelled it: to be opened anew"
        return line._said_by({*given_up, spoke})

    if broken:
        with pytest.raises(TimeoutError, match="broken"):
            asyncio.run(test())
    else:
        assert asyncio.run(test()) is True
