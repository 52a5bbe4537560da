"""Clients that mean harm, for `benchmarks.flood`: started by it, writes what it did as one line of JSON.

    python -m benchmarks.hostile ADDRESS --clients 64 --idle 1000 --seconds 30

HTTP/2 by hand: no gRPC client would send these. Each client sends one wrong call after the other as
fast as it is answered, and connects again when it is cut. Runs at the lowest priority: the machine's
processor time is not what is attacked here, the server's is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import resource
import time
from collections import Counter

from tests.faults.http2 import GOAWAY, HEADERS, RESET, SETTINGS, call, frame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS)
DATA, END_STREAM = 0, 1
ANSWER_S = 5.0
"""Longer than an offender is held back."""

JOIN = "/paramesh.v1.Ledger/Join"


def message(payload: bytes, declared: int | None = None) -> bytes:
    """A gRPC message, of whatever length it says."""
    return b"\0" + (len(payload) if declared is None else declared).to_bytes(4, "big") + payload


KINDS = {
    "garbage push": lambda stream: call(stream) + frame(DATA, message(b"\xff" * 64), END_STREAM, stream),
    "garbage call": lambda stream: call(stream, JOIN) + frame(DATA, message(b"\xff" * 64), END_STREAM, stream),
    "declares 1 GiB": lambda stream: call(stream) + frame(DATA, message(b"x" * 512, 1 << 30), 0, stream),
    "cut short": lambda stream: call(stream) + frame(DATA, message(b"x" * 64, 128), END_STREAM, stream),
    "no HTTP/2": lambda stream: os.urandom(256),
}  # fmt: skip


async def _answered(reader: asyncio.StreamReader, stream: int) -> bool:
    """Wait for the end of a call; whether the connection still stands."""
    while True:
        head = await reader.readexactly(9)
        await reader.readexactly(int.from_bytes(head[:3], "big"))
        if head[3] == GOAWAY:
            return False
        if head[3] in (HEADERS, RESET) and int.from_bytes(head[5:], "big") == stream:
            return True


async def _connection(host: str, port: int, kinds: itertools.cycle[str], done: Counter[str]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(PREFACE)
        for stream in itertools.count(1, 2):
            kind = next(kinds)
            writer.write(KINDS[kind](stream))
            await writer.drain()
            done[kind] += 1
            async with asyncio.timeout(ANSWER_S):
                if not await _answered(reader, stream):
                    return
    finally:
        writer.close()


async def _hostile(host: str, port: int, number: int, end: float, done: Counter[str]) -> None:
    kinds = itertools.cycle([*list(KINDS)[number % len(KINDS) :], *list(KINDS)[: number % len(KINDS)]])
    while time.monotonic() < end:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(max(0.1, end - time.monotonic())):
                await _connection(host, port, kinds, done)
        done["connections that ended"] += 1


async def _idle(host: str, port: int, count: int) -> list[asyncio.StreamWriter]:
    """Connections that greet and then say nothing."""
    opened = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            writer.write(PREFACE)
            opened.append(writer)
    return opened


async def _main(address: str, clients: int, idle: int, seconds: float) -> dict[str, int]:
    host, _, port = address.rpartition(":")
    opened = await _idle(host, int(port), idle)
    done: Counter[str] = Counter(idle=len(opened))
    end = time.monotonic() + seconds
    print(json.dumps({"ready": len(opened)}), flush=True)
    await asyncio.gather(*(_hostile(host, int(port), number, end, done) for number in range(clients)))
    done["idle at the end"] = sum(not writer.transport.is_closing() for writer in opened)
    for writer in opened:
        writer.close()
    return dict(done)


def main() -> None:
    """Flood one address."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    os.nice(19)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    done = asyncio.run(_main(arguments.address, arguments.clients, arguments.idle, arguments.seconds))
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
