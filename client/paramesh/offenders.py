"""Connections that send what is no request, again and again: answered late, then cut.

A refusal costs a server some 200 microseconds of its one interpreter. A client that asks for
refusals as fast as it can would take it from everybody else, so from the third in a row on an
answer is held back, and a connection that does not learn from it is closed. A well-formed
request in between clears its record.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["OFFENCES", "Offenders", "cut_connection"]

log = logging.getLogger(__name__)

OFFENCES = frozenset({"FORMAT"})
"""Reasons that no client of ours, however old, gives cause for: bytes that are no message, or none."""

FREE = 3
"""Answered at once: who writes a client by hand sees what is wrong."""

HOLD_S = 0.25
"""For how long each further answer is held back: four a second and stream."""

CUT = 12
"""Offences in a row, answered or held back, after which the connection is closed."""

REMEMBERED = 4096
"""Connections with a record; the oldest is forgotten."""

SAY_EVERY_S = 10.0
"""Seconds between two lines of log about it, so that a flood of bytes is none of lines."""


class Offenders:
    """The records of an aio server's connections, by `context.peer()`. Lives on one event loop.

    Args:
        cut: closes a peer's connection; whether it did.

    Attributes:
        offences: counted so far.
        cuts: connections closed so far.
    """

    def __init__(self, cut: Callable[[str], bool] | None = None) -> None:
        self._cut = cut or cut_connection
        self._records: OrderedDict[str, int] = OrderedDict()
        self._said = -SAY_EVERY_S
        self.offences = 0
        self.cuts = 0

    @property
    def watching(self) -> bool:
        """Whether any connection has a record."""
        return bool(self._records)

    def forgive(self, peer: str) -> None:
        """A well-formed request came."""
        self._records.pop(peer, None)

    async def offended(self, peer: str) -> None:
        """Note an offence, and hold the answer to it back as long as is due."""
        self.offences += 1
        count = self._records[peer] = self._records.get(peer, 0) + 1
        self._records.move_to_end(peer)
        if len(self._records) > REMEMBERED:
            self._records.popitem(last=False)
        if count >= CUT:
            self._end(peer)
        elif count > FREE:
            await asyncio.sleep(HOLD_S)

    def _end(self, peer: str) -> None:
        self._records.pop(peer, None)
        self.cuts += self._cut(peer)
        now = time.monotonic()
        if now - self._said >= SAY_EVERY_S:
            self._said = now
            log.warning("connection cut peer=%s offences_in_a_row=%d cut_so_far=%d", peer, CUT, self.cuts)


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
