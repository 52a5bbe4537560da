"""Heartbeats: as a task on the server's loop, or as a helper process beside it.

    python -m paramesh_server.beat --parent PID ...        # started by the server itself

The helper needs nothing of the server's interpreter, so a long sum or a held GIL is no
silence. It beats for exactly as long as the server could answer: it follows the server by a
pidfd, stops beating while the server is stopped (SIGSTOP), and reports its death at once.
It imports no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paramesh.channel import aio_channel, grpc, header
from paramesh.identity import Identity as Identified
from paramesh.identity import Role
from paramesh.retry import Backoff
from paramesh.rotation import CAP_S, NEXT_S, Rotation
from paramesh.security import Security
from paramesh.status import from_rpc_error
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1.coordinator_pb2_grpc import MembershipStub

from paramesh_server.beat_line import Identity, Line

__all__ = ["Figures", "Identity", "beat"]

log = logging.getLogger(__name__)

PAGE = struct.Struct("<IId")
"""How the shared page begins: length and CRC-32 of what follows, and when it was written (monotonic seconds)."""

PAGE_BYTES = 16 << 20
"""More than any server's figures take."""

STALE_BEATS = 3
"""Beats that the page may be old: the server's loop writes it every beat, or does nothing at all."""

SECURITY_FLAGS = ("cert", "key", "ca", "token_keys")
"""Fields of `Security` that the helper is told: paths, no secrets."""

REPORT_S = 5.0
"""How long a death is reported for; after that silence has told it."""

UNKNOWN_EXIT = 256
"""Reported when the server's parent reaped it before we could look: then the kernel knows its code no more.
Above what any process can exit with, so that the coordinator tells it from a code."""


@dataclass(frozen=True)
class Figures:
    """What a beat carries, for people, the balancer and the judgement on who makes no progress."""

    applied_lsn: int = 0
    queue_depth: int = 0
    value_bytes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    rss_bytes: int = 0
    stalled_ms: int = 0
    """For how long a piece of work that needs nobody else has been running."""
    stalled_at: str = ""
    loads: tuple[tuple[int, int], ...] = ()
    """(partition, requests since it was made) of those that are led here."""
    memory_tight: bool = False
    """It is above its memory watermark: nothing new, please."""

    def put(self, beat: co.HeartbeatRequest) -> co.HeartbeatRequest:
        """The beat, with these figures."""
        for field in dataclasses.fields(self):
            if field.name != "loads":
                setattr(beat, field.name, getattr(self, field.name))
        for partition, requests in self.loads:
            beat.loads.add(partition=partition, requests=requests)
        return beat


class Page:
    """The shared page: what the server wrote last, and how long ago.

    Args:
        fd: of the memory that both processes have open.
        interval: seconds between two writes.
    """

    def __init__(self, fd: int, interval: float) -> None:
        self._fd = fd
        self._interval = interval
        self._last = Figures()
        self._written = time.monotonic()

    def write(self, figures: Figures) -> None:
        """What the next beats carry."""
        data = figures.put(co.HeartbeatRequest()).SerializeToString()
        os.pwrite(self._fd, PAGE.pack(len(data), zlib.crc32(data), time.monotonic()) + data, 0)

    def read(self) -> Figures:
        """The newest figures that were read whole; a loop that has stopped writing them is itself the news."""
        page = os.pread(self._fd, PAGE_BYTES, 0)
        if len(page) >= PAGE.size:
            length, checksum, written = PAGE.unpack_from(page)
            data = page[PAGE.size : PAGE.size + length]
            if zlib.crc32(data) == checksum:  # else the server was writing it
                self._last, self._written = _figures(co.HeartbeatRequest.FromString(data)), written
        age = time.monotonic() - self._written
        if age > STALE_BEATS * self._interval and age * 1000 > self._last.stalled_ms:
            return dataclasses.replace(self._last, stalled_ms=int(age * 1000), stalled_at="the event loop")
        return self._last


def _figures(beat: co.HeartbeatRequest) -> Figures:
    values = {f.name: getattr(beat, f.name) for f in dataclasses.fields(Figures) if f.name != "loads"}
    return Figures(**values, loads=tuple((load.partition, load.requests) for load in beat.loads))


async def beat(
    identity: Identity,
    figures: Callable[[], Figures],
    on_unknown: Callable[[], None],
    may_beat: Callable[[], bool] = lambda: True,
    on_heard: Callable[[], None] = lambda: None,
) -> None:
    """Beat until cancelled, over the coordinators in turn.

    Args:
        identity: who beats.
        figures: what the next beat carries.
        on_unknown: called when the coordinator does not know this server (any more).
        may_beat: asked before each beat; while false there is silence.
        on_heard: called at each first answer of a stream.
    """
    turns, backoff = Rotation(identity.coordinators), Backoff(cap=CAP_S)
    while True:
        address, wait = turns.address, None
        line = Line(identity, lambda beat: figures().put(beat), may_beat, on_heard)
        try:
            if await line.run(address):
                on_unknown()
        except (grpc.RpcError, TimeoutError) as error:
            log.debug("heartbeat=broken coordinator=%s: %r", address, error)
            if line.answered:
                turns.succeeded()
            wait = turns.failed(from_rpc_error(error, address) if isinstance(error, grpc.RpcError) else None)
        if line.answered:
            backoff = Backoff(cap=CAP_S)
        await asyncio.sleep(backoff.next() if wait is None else max(wait, NEXT_S))


def process_state(pid: int) -> tuple[str, int | None]:
    """State letter of a process and, once it has ended, its exit code as Python's returncode.

    Returns:
        `("X", None)` if the kernel knows the process no more.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "X", None
    fields = text.rpartition(")")[2].split()
    if fields[0] != "Z":
        return fields[0], None
    status = int(fields[-1])
    signal = status & 0x7F
    return "Z", -signal if signal else status >> 8


async def _report(identity: Identity, exit_code: int) -> None:
    """Tell the coordinator that the server ended; it need not wait for silence then."""
    request = co.ReportExitRequest(
        request=header(identity.job, identity.generation),
        kind=co.NODE_KIND_SERVER,
        name=identity.name,
        incarnation=identity.incarnation,
        exit_code=exit_code,
    )
    backoff = Backoff(cap=0.5)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REPORT_S):
            while True:
                for address in identity.coordinators.split(","):
                    with contextlib.suppress(grpc.RpcError):
                        async with aio_channel(address.strip(), identity.security, heartbeat=True) as channel:
                            await MembershipStub(channel).ReportExit(request, timeout=1.0)
                            return
                await asyncio.sleep(backoff.next())


async def _follow(identity: Identity, parent: int, figures_fd: int) -> None:
    """Beat for a parent process until it ends or says goodbye."""
    loop = asyncio.get_running_loop()
    gone, bye = asyncio.Event(), asyncio.Event()
    parent_fd = os.pidfd_open(parent)
    loop.add_reader(parent_fd, gone.set)
    # The parent closes our stdin after "bye" when it stops in order.
    loop.add_reader(0, lambda: bye.set() if os.read(0, 16) == b"bye" else loop.remove_reader(0))
    beating = asyncio.ensure_future(
        beat(
            identity,
            Page(figures_fd, identity.interval).read,
            lambda: _say(b"unknown\n"),
            lambda: not gone.is_set() and process_state(parent)[0] not in ("T", "t"),
            lambda: _say(b"heard\n"),
        )
    )
    waits = [asyncio.ensure_future(gone.wait()), asyncio.ensure_future(bye.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    loop.remove_reader(parent_fd)
    beating.cancel()
    if gone.is_set() and not bye.is_set():
        code = process_state(parent)[1]
        await _report(identity, UNKNOWN_EXIT if code is None else code)
    for wait in waits:
        wait.cancel()


def _say(line: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(1, line)


def _security(flags: argparse.Namespace) -> Security:
    """As the parent's; with keys of tokens the helper signs the parent's name."""
    signs_as = flags.token_keys and Identified(flags.job, Role.SERVER, flags.name)
    return Security(flags.cert, flags.key, flags.ca, token_keys=flags.token_keys, signs_as=signs_as or None)


def main() -> None:
    """The helper's entry point."""
    parser = argparse.ArgumentParser(prog="paramesh_server.beat", description=__doc__)
    for flag in ("coordinators", "job", "name"):
        parser.add_argument(f"--{flag}", required=True)
    for flag in SECURITY_FLAGS:
        parser.add_argument(f"--{flag.replace('_', '-')}", default="")
    for flag in ("generation", "incarnation", "parent", "figures-fd"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    for flag in ("interval", "timeout"):
        parser.add_argument(f"--{flag}", type=float, required=True)
    flags = parser.parse_args()
    identity = Identity(
        flags.coordinators,
        flags.job,
        flags.generation,
        flags.name,
        flags.incarnation,
        flags.interval,
        flags.timeout,
        _security(flags),
    )
    try:
        asyncio.run(_follow(identity, flags.parent, flags.figures_fd))
    except ProcessLookupError:  # the parent was gone before we could look
        asyncio.run(_report(identity, UNKNOWN_EXIT))
    sys.exit(0)


if __name__ == "__main__":
    main()
