"""The raw limits of this machine: memcpy, TCP over loopback, bare gRPC streams.

    limits = measure()          # a few seconds
    limits.grpc_up              # GB/s, 2 MiB frames, client -> server, grpc.aio

A limit is what a program that does nothing else reaches, so each is measured with as
little code of ours as can be: no protobuf, no copies, one stream, two processes. The far
ends live in their own processes (`spawn`), because a thread would share the GIL.
"""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

MIB = 1 << 20
FRAME = 2 * MIB
"""Bytes of a gRPC message; the size the data plane uses (`paramesh.framing.FRAME_BYTES`)."""
FRAMES = 64
"""Frames per timed stream: 128 MiB, long enough to hide the call's set-up (< 1 ms)."""
REPEATS = 7
"""Timed repeats; the median is kept, because single ones catch the scheduler's bad moments."""
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
]


@dataclass(frozen=True)
class Limits:
    """What the machine does at most, in GB/s (1e9 bytes) unless said otherwise."""

    memcpy: float
    """One core copying 256 MiB."""
    tcp: float
    """One connection over loopback, 4 MiB writes."""
    grpc_up: float
    """grpc.aio, client-streaming, 2 MiB frames."""
    grpc_down: float
    """grpc.aio, server-streaming, 2 MiB frames."""
    grpc_up_threads: float
    """The same with grpcio's threaded API."""
    grpc_down_threads: float
    """The same with grpcio's threaded API."""
    grpc_call_ms: float
    """A unary call with an empty message, grpc.aio, in milliseconds."""

    def as_dict(self) -> dict[str, float]:
        """The limits by name, rounded for reading."""
        return {name: round(value, 3) for name, value in asdict(self).items()}

    def median_with(self, others: list[Limits]) -> Limits:
        """The field-wise median of this measurement and others of the same run."""
        rows = [asdict(x) for x in (self, *others)]
        return Limits(**{name: statistics.median(row[name] for row in rows) for name in rows[0]})


def measure() -> Limits:
    """Measure every limit once. Takes about eight seconds on two cores."""
    up, down, call = measure_grpc_aio()
    up_threads, down_threads = measure_grpc_threads()
    return Limits(
        memcpy=measure_memcpy(),
        tcp=measure_tcp(),
        grpc_up=up,
        grpc_down=down,
        grpc_up_threads=up_threads,
        grpc_down_threads=down_threads,
        grpc_call_ms=call,
    )


def median_seconds(action: Callable[[], object], repeats: int = REPEATS, warm: int = 1) -> float:
    """The median duration of `action` over `repeats` calls after `warm` untimed ones."""
    for _ in range(warm):
        action()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure_memcpy() -> float:
    """GB/s of one core that copies 256 MiB, bytes counted once."""
    import numpy as np

    source, target = np.ones(64 * MIB, np.float32), np.zeros(64 * MIB, np.float32)
    return float(source.nbytes / median_seconds(lambda: np.copyto(target, source), warm=2) / 1e9)


class Peer:
    """A far end in a process of its own, which reports its port and ends with the block."""

    def __init__(self, main: Callable[[Connection], None]) -> None:
        context = mp.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs,), daemon=True)

    def __enter__(self) -> int:
        self._process.start()
        if not self._ours.poll(60):
            raise TimeoutError("the far end of a limit measurement did not start within 60 s")
        return int(self._ours.recv())

    def __exit__(self, *exc: object) -> None:
        self._ours.send("end")
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


TCP_BURST = 256 * MIB
TCP_WRITE = 4 * MIB


def _tcp_sink(pipe: Connection) -> None:
    """Receive bursts of TCP_BURST bytes and answer each with one byte."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        connection, _ = listener.accept()
        buffer = memoryview(bytearray(TCP_WRITE))
        while True:
            received = 0
            while received < TCP_BURST:
                count = connection.recv_into(buffer)
                if count == 0:
                    return
                received += count
            connection.sendall(b"k")


def measure_tcp() -> float:
    """GB/s of one TCP connection over loopback."""
    with Peer(_tcp_sink) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        buffer = memoryview(bytearray(TCP_WRITE))

        def burst() -> None:
            for _ in range(TCP_BURST // TCP_WRITE):
                connection.sendall(buffer)
            connection.recv(1)

        return TCP_BURST / median_seconds(burst) / 1e9


def _thread_server(pipe: Connection) -> None:
    """Serve Up, Down and Call with grpcio's threaded API, raw bytes."""
    import grpc

    frame = bytes(FRAME)

    def up(requests: Iterator[bytes], _context: Any) -> bytes:
        return str(sum(len(r) for r in requests)).encode()

    def down(_request: bytes, _context: Any) -> Iterator[bytes]:
        for _ in range(FRAMES):
            yield frame

    server = grpc.server(ThreadPoolExecutor(4), options=OPTIONS)
    _serve_handlers(server, up, down, lambda _request, _context: b"")
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    pipe.recv()
    server.stop(0)


def _serve_handlers(server: Any, up: Any, down: Any, call: Any) -> None:
    import grpc

    handlers = {
        "Up": grpc.stream_unary_rpc_method_handler(up),
        "Down": grpc.unary_stream_rpc_method_handler(down),
        "Call": grpc.unary_unary_rpc_method_handler(call),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Limits", handlers),))


def measure_grpc_threads() -> tuple[float, float]:
    """GB/s up and down of one bare stream, grpcio's threaded API."""
    import grpc

    frames = [bytes(FRAME)] * FRAMES
    with (
        Peer(_thread_server) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel,
    ):
        up, down = channel.stream_unary("/Limits/Up"), channel.unary_stream("/Limits/Down")
        up_seconds = median_seconds(lambda: up(iter(frames), timeout=60))
        down_seconds = median_seconds(lambda: [None for _ in down(b"", timeout=60)])
    return FRAME * FRAMES / up_seconds / 1e9, FRAME * FRAMES / down_seconds / 1e9


def _aio_server(pipe: Connection) -> None:
    """Serve Up, Down and Call with grpc.aio, raw bytes."""
    import grpc

    frame = bytes(FRAME)

    async def up(requests: AsyncIterator[bytes], _context: Any) -> bytes:
        received = 0
        async for request in requests:
            received += len(request)
        return str(received).encode()

    async def down(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        for _ in range(FRAMES):
            yield frame

    async def call(_request: bytes, _context: Any) -> bytes:
        return b""

    async def main() -> None:
        server = grpc.aio.server(options=OPTIONS)
        _serve_handlers(server, up, down, call)
        pipe.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await server.stop(0)

    asyncio.run(main())


def measure_grpc_aio() -> tuple[float, float, float]:
    """GB/s up and down of one bare stream and ms of an empty call, grpc.aio."""
    with Peer(_aio_server) as port:
        return asyncio.run(_measure_grpc_aio(port))


async def _measure_grpc_aio(port: int) -> tuple[float, float, float]:
    import grpc

    frame = bytes(FRAME)

    async def frames() -> AsyncIterator[bytes]:
        for _ in range(FRAMES):
            yield frame

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        up, down = channel.stream_unary("/Limits/Up"), channel.unary_stream("/Limits/Down")
        call = channel.unary_unary("/Limits/Call")

        async def drain() -> None:
            async for _ in down(b"", timeout=60):
                pass

        up_seconds = await _median_async(lambda: up(frames(), timeout=60))
        down_seconds = await _median_async(drain)
        call_seconds = await _median_async(lambda: call(b"", timeout=60), repeats=200, warm=20)
    return FRAME * FRAMES / up_seconds / 1e9, FRAME * FRAMES / down_seconds / 1e9, call_seconds * 1e3


async def _median_async(action: Callable[[], Awaitable[object]], repeats: int = REPEATS, warm: int = 1) -> float:
    for _ in range(warm):
        await action()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        await action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
