"""An unsupervised worker beats for itself, survives the coordinator's absence, and hears of its eviction."""

import asyncio
import contextlib
import time

import pytest
from paramesh import heart
from paramesh.channel import SERVER_OPTIONS, grpc, header
from paramesh.config import ClientConfig
from paramesh.coordinator_link import CoordinatorLink
from paramesh.io import IoThread
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import coordinator_pb2_grpc


class Membership(coordinator_pb2_grpc.MembershipServicer):
    """Answers beats, and notes them."""

    def __init__(self):
        self.echoes = []
        self.ids = set()
        self.unknown = False
        self.mute = False

    async def Heartbeat(self, requests, context):
        nonce = 100
        async for beat in requests:
            self.echoes.append(beat.echo)
            self.ids.add((beat.request.client_id, beat.kind))
            if self.mute:
                await asyncio.sleep(3600)
            nonce += 1
            yield co.HeartbeatResponse(nonce=nonce, unknown=self.unknown)


class Client:
    """What of `AsyncClient` the heart uses."""

    client_id = 7
    heartbeat_interval = 0.01
    link = CoordinatorLink("127.0.0.1:1", "default")
    """Never asked anything: the heart dials by itself, as securely."""

    def header(self):
        return header("default", 1, self.client_id)


@contextlib.contextmanager
def coordinator(port=0):
    servicer, io = Membership(), IoThread.get()

    async def start():
        server = grpc.aio.server(options=SERVER_OPTIONS)
        coordinator_pb2_grpc.add_MembershipServicer_to_server(servicer, server)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        return server, bound

    server, bound = io.run(start(), 10, "the coordinator")
    try:
        yield servicer, bound
    finally:
        io.run(server.stop(0), 10, "the coordinator's end")


@contextlib.contextmanager
def beating(*ports):
    config = ClientConfig(coordinators=",".join(f"127.0.0.1:{port}" for port in ports))
    task = IoThread.get().submit(heart.beat(Client(), config))
    try:
        yield task
    finally:
        task.cancel()


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_beats_echo_the_last_answer():
    with coordinator() as (servicer, port), beating(port):
        until(lambda: len(servicer.echoes) >= 5)
    assert servicer.echoes[:5] == [0, 101, 102, 103, 104]
    assert servicer.ids == {(7, co.NODE_KIND_CLIENT)}


def test_it_goes_on_when_the_coordinator_was_away():
    with contextlib.ExitStack() as stack:
        first, port = stack.enter_context(coordinator())
        with beating(port) as task:
            until(lambda: len(first.echoes) >= 2)
            stack.close()
            before = len(first.echoes)
            with coordinator(port) as (second, _):
                until(lambda: len(second.echoes) >= 2)
            assert not task.done()
            assert len(first.echoes) == before
    assert second.echoes[:2] == [0, 101]


def test_a_mute_coordinator_is_left_for_the_next(monkeypatch):
    monkeypatch.setattr(heart, "SILENCE", 0.1)
    with coordinator() as (mute, one), coordinator() as (alive, two):
        mute.mute = True
        with beating(one, two):
            until(lambda: len(alive.echoes) >= 2)
    assert mute.echoes[0] == 0


@pytest.mark.parametrize("after", [0, 2])
def test_an_unknown_client_stops_beating(after):
    with coordinator() as (servicer, port), beating(port) as task:
        until(lambda: len(servicer.echoes) >= after)
        servicer.unknown = True
        until(task.done)
        assert task.exception() is None
