"""Connections that send what is no request, again and again: answered late, then cut.

A refusal costs a server some 200 microseconds of its one interpreter. A client that asks for
refusals as fast as it can would take it from everybody else, so from the fourth in a row on an
answer is held back, and a connection that does not learn from it is closed. A well-formed
request in between clears its record.

A new connection would clear it too. So a host is remembered as well: once much has come from it,
its connections that offend are answered later and closed sooner, and those that have brought
nothing else from the first time on. Its others, which may be workers behind the same address,
notice nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["OFFENCES", "Offenders", "cut_connection"]

log = logging.getLogger(__name__)

T = TypeVar("T")

OFFENCES = frozenset({"FORMAT"})
"""Reasons that no client of ours, however old, gives cause for: bytes that are no message, or none."""

FREE = 3
"""Answered at once: who writes a client by hand sees what is wrong."""

HOLD_S = 0.25
"""For how long each further answer is held back: four a second and stream."""

CUT = 12
"""Offences in a row, answered or held back, after which the connection is closed."""

HOT = 50.0
"""Offences of a host, those of long ago counting less, above which it is hot."""

HOT_HOLD_S = 2.0
"""`HOLD_S` of a hot host: one answer in two seconds for each connection, which asks again at once if it may."""

HOT_CUT = 3
"""`CUT` of a hot host, counted from the first offence that is not free."""

COOLS_S = 10.0
"""In so many seconds a host's offences come to count half."""

HELD = 1024
"""Answers held back at a time; beyond it connections are closed instead."""

REMEMBERED = 4096
"""Connections, and hosts, with a record; the oldest is forgotten."""

SAY_EVERY_S = 10.0
"""Seconds between two lines of log about it, so that a flood of bytes is none of lines."""


class Offenders:
    """The records of an aio server's connections, by `context.peer()`. Lives on one event loop.

    Args:
        cut: closes a peer's connection; whether it did.
        clock: seconds, for tests.
        sleep: for tests.

    Attributes:
        offences: counted so far.
        cuts: connections closed so far.
    """

    def __init__(
        self,
        cut: Callable[[str], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._cut = cut or cut_connection
        self._clock = clock
        self._sleep = sleep
        self._records: OrderedDict[str, int] = OrderedDict()
        self._hosts: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By host: what its offences come to, and when that was."""
        self._good: OrderedDict[str, None] = OrderedDict()
        """Connections that well-formed requests came on while somebody was watched."""
        self._held = 0
        self._said = -math.inf
        self.offences = 0
        self.cuts = 0

    @property
    def watching(self) -> bool:
        """Whether any connection has a record."""
        return bool(self._records)

    def forgive(self, peer: str) -> None:
        """A well-formed request came."""
        self._records.pop(peer, None)
        _keep(self._good, peer, None)

    async def offended(self, peer: str) -> None:
        """Note an offence, and hold the answer to it back as long as is due."""
        self.offences += 1
        count = self._records.get(peer, 0) + 1
        _keep(self._records, peer, count)
        hot = self._heat(peer.rpartition(":")[0]) > HOT
        free = FREE if not hot or peer in self._good else 0
        if count >= (free + HOT_CUT if hot else CUT) or self._held >= HELD:
            self._end(peer, count)
        elif count > free:
            self._held += 1
            try:
                await self._sleep(HOT_HOLD_S if hot else HOLD_S)
            finally:
                self._held -= 1

    def _heat(self, host: str) -> float:
        """What this host's offences come to, with one more."""
        now = self._clock()
        heat, at = self._hosts.get(host, (0.0, now))
        heat = heat * math.exp2((at - now) / COOLS_S) + 1.0
        _keep(self._hosts, host, (heat, now))
        return heat

    def _end(self, peer: str, count: int) -> None:
        self._records.pop(peer, None)
        self._good.pop(peer, None)
        self.cuts += self._cut(peer)
        now = self._clock()
        if now - self._said >= SAY_EVERY_S:
            self._said = now
            log.warning("connection cut peer=%s offences_in_a_row=%d cut_so_far=%d", peer, count, self.cuts)


def _keep(records: OrderedDict[str, T], key: str, value: T) -> None:
    """Set, as the newest; forget the oldest of too many."""
    records[key] = value
    records.move_to_end(key)
    if len(records) > REMEMBERED:
        records.popitem(last=False)


def cut_connection(peer: str) -> bool:
    """Shut down the TCP connection of a gRPC peer, such as `ipv4:10.0.0.7:41234`; whether it was found.

    gRPC has no call for this. Its socket is one of this process's descriptors, so it is found by its
    other end and shut down through a duplicate; gRPC sees what it would see if the peer had gone. The
    duplicate holds the socket, so that no other can have taken its number in between.
    """
    wanted = _address(peer)
    if wanted is None:
        return False
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as other:
                if other.family in (socket.AF_INET, socket.AF_INET6) and _plain(other.getpeername()) == wanted:
                    other.shutdown(socket.SHUT_RDWR)
                    return True
    return False


def _address(peer: str) -> tuple[str, int] | None:
    """Host and port of `ipv4:1.2.3.4:5` or `ipv6:[::1]:5` (its brackets may be escaped)."""
    kind, _, rest = peer.partition(":")
    host, _, port = rest.replace("%5B", "[").replace("%5D", "]").rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return None
    return host.strip("[]").removeprefix("::ffff:"), int(port)


def _plain(address: tuple[object, ...]) -> tuple[str, int]:
    """An address without the mapping that a socket of both families shows."""
    return str(address[0]).removeprefix("::ffff:"), int(str(address[1]))
