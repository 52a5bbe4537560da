"""A channel whose certificate is replaced: what is under way goes on, what begins is on a new connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from paramesh import credentials
from paramesh.certificates import issue, make_authority
from paramesh.channel import add_port, aio_channel, grpc
from paramesh.identity import Identity, Role
from paramesh.security import Security


def settings(folder: Path, role: Role, name: str) -> Security:
    files = issue(folder, Identity("default", role, name), ["127.0.0.1"], 1)
    return Security(str(files.cert), str(files.key), str(folder / "ca.pem"))


def read(security: Security) -> bytes:
    return Path(security.cert).read_bytes()


class Service:
    """Answers with the caller's certificate."""

    def __init__(self) -> None:
        self.handshakes = 0
        self.go = asyncio.Event()
        self.peers: set[str] = set()

    async def who(self, _request: bytes, context: Any) -> bytes:
        self.peers.add(context.peer())
        return bytes(context.auth_context()["x509_pem_cert"][0])

    async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield await self.who(request, context)
        await self.go.wait()
        yield b"end"

    def shake(self) -> None:
        self.handshakes += 1

    async def start(self, security: Security) -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()
        handlers = {
            "Who": grpc.unary_unary_rpc_method_handler(self.who),
            "Stream": grpc.unary_stream_rpc_method_handler(self.stream),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
        port = add_port(server, "127.0.0.1:0", security, self.shake)
        await server.start()
        return server, f"127.0.0.1:{port}"


async def replace(folder: Path) -> None:
    service = Service()
    server, address = await service.start(settings(folder, Role.SERVER, "s"))
    security = settings(folder, Role.WORKER, "w")
    first = read(security)
    async with aio_channel(address, security) as channel:
        who = channel.unary_unary("/t.T/Who")
        stream = channel.unary_stream("/t.T/Stream")(b"")
        assert await stream.read() == first
        assert await who(b"") == first
        old = channel.current()
        assert (service.handshakes, len(service.peers)) == (1, 1)
        settings(folder, Role.WORKER, "w")
        second = read(security)
        assert await who(b"") == second != first
        assert (service.handshakes, len(service.peers)) == (2, 2)
        assert old.closing is None, "a stream is on it"
        service.go.set()
        assert await stream.read() == b"end"
        assert await stream.read() is grpc.aio.EOF
        ended = asyncio.Event()
        stream.add_done_callback(lambda _call: ended.set())  # after the channel's own, which came first
        await asyncio.wait_for(ended.wait(), 10)
        assert old.closing is not None
        await old.closing
        assert old.channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
        assert await who(b"") == second
    with pytest.raises(grpc.aio.UsageError):
        who(b"")
    await server.stop(None)


def test_a_stream_outlives_the_certificate_that_it_began_with(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(credentials, "LOOK_S", -1.0)
    make_authority(tmp_path, 1)
    asyncio.run(replace(tmp_path))
