"""HTTP/2 by hand, as far as floods need it: what no gRPC client would send.

with Raw(address) as raw:
    raw.request(1)
    raw.reset(1)
    raw.until(GOAWAY)
"""

from __future__ import annotations

import socket
import struct
import time
import types
from typing import NamedTuple, Self

HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 1, 3, 4, 6, 7, 8

ENHANCE_YOUR_CALM = 11
MAX_CONCURRENT_STREAMS = 3
"""The identifier of a setting."""

_ACK = 1
_END_HEADERS, _END_STREAM = 4, 1


class Frame(NamedTuple):
    """One frame."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def _literal(name: str, value: str) -> bytes:
    """A header field that is not indexed and not compressed; both parts below 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


PUSH = "/paramesh.v1.ParameterServer/Push"


def _headers(path: str) -> bytes:
    fields = [
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]  # fmt: skip
    return b"".join(_literal(name, value) for name, value in fields)


class Raw:
    """A connection that speaks frames. Every wait is bounded by `seconds`."""

    def __init__(self, address: str, seconds: float = 10.0) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=seconds)
        self._buffer = b""
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.send(SETTINGS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> None:
        """Send one frame."""
        self._socket.sendall(frame(kind, payload, flags, stream))

    def send_all(self, frames: bytes) -> bool:
        """Send many; false if the server has closed the connection meanwhile."""
        try:
            self._socket.sendall(frames)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def read(self) -> Frame | None:
        """The next frame; None at the connection's end.

        Raises:
            TimeoutError: nothing came.
        """
        head = self._exactly(9)
        if head is None:
            return None
        length = int.from_bytes(head[:3], "big")
        payload = self._exactly(length)
        return None if payload is None else Frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)

    def read_soon(self, seconds: float) -> Frame | None:
        """The next frame, if it begins within so long; None also at the connection's end."""
        if not self._buffer:
            patience = self._socket.gettimeout()
            self._socket.settimeout(seconds)
            try:
                self._buffer = self._socket.recv(65536)
            except (TimeoutError, ConnectionResetError):
                return None
            finally:
                self._socket.settimeout(patience)
        return self.read() if self._buffer else None

    def _exactly(self, count: int) -> bytes | None:
        while len(self._buffer) < count:
            try:
                more = self._socket.recv(65536)
            except ConnectionResetError:
                return None
            if not more:
                return None
            self._buffer += more
        got, self._buffer = self._buffer[:count], self._buffer[count:]
        return got

    def until(self, kind: int) -> Frame | None:
        """The next frame of a kind; None if the connection ends before."""
        while (frame := self.read()) is not None and frame.kind != kind:
            pass
        return frame

    def settings(self) -> dict[int, int]:
        """What the server allows."""
        frame = self.until(SETTINGS)
        assert frame is not None
        return dict(struct.unpack(">HI", frame.payload[at : at + 6]) for at in range(0, len(frame.payload), 6))


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """One frame's bytes."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def call(stream: int, path: str = PUSH) -> bytes:
    """The begin of a call that never says more."""
    return frame(HEADERS, _headers(path), _END_HEADERS, stream)


def reset(stream: int) -> bytes:
    """The end of it."""
    return frame(RESET, (8).to_bytes(4, "big"), stream=stream)


ROUND = 64
"""Frames of 16 KiB that each stream may send between two looks at what the server says."""


class Slow:
    """A connection whose streams each begin a message and never end it, as far as the server lets them.

    Args:
        address: of the server.
        path: of the method.
        streams: how many.
        nbytes: that each message declares.
    """

    def __init__(self, address: str, path: str, streams: int, nbytes: int) -> None:
        self._raw = Raw(address)
        self._window = self._raw.settings().get(4, 65535)
        self._raw.send(SETTINGS, flags=_ACK)
        self._left = 65535
        """What the connection may send."""
        self.open = {2 * number + 1: self._window for number in range(streams)}
        """Stream -> what it may send."""
        self._rest = dict.fromkeys(self.open, nbytes - 1)
        self.sent = 0
        head = b"\0" + nbytes.to_bytes(4, "big")
        self._raw.send_all(b"".join(call(number, path) for number in self.open))
        for number in list(self.open):
            self._put(number, head)

    def _put(self, number: int, payload: bytes) -> None:
        self._raw.send(0, payload, stream=number)
        self.open[number] -= len(payload)
        self._left -= len(payload)
        self.sent += len(payload)

    def press(self, seconds: float) -> None:
        """Send whatever may be sent for so long, or until nothing more may be."""
        end, idle = time.monotonic() + seconds, 0
        while time.monotonic() < end and idle < 10:
            before = self.sent
            for number in [number for number in self.open for _ in range(ROUND)]:
                count = min(16384, self.open[number], self._rest[number], self._left)
                if count > 0:
                    self._put(number, bytes(count))
                    self._rest[number] -= count
            idle = 0 if self._hear() or self.sent > before else idle + 1

    def _hear(self) -> bool:
        """Take in what the server says; whether it said anything."""
        heard = False
        while (frame := self._raw.read_soon(0.05)) is not None:
            heard = True
            self._take(frame)
        return heard

    def _take(self, frame: Frame) -> None:
        if frame.kind == WINDOW_UPDATE and not frame.stream:
            self._left += int.from_bytes(frame.payload, "big")
        elif frame.kind == WINDOW_UPDATE and frame.stream in self.open:
            self.open[frame.stream] += int.from_bytes(frame.payload, "big")
        elif frame.kind in (RESET, HEADERS) and frame.stream in self.open:
            del self.open[frame.stream]  # refused: whatever it held is let go
        elif frame.kind == PING and not frame.flags & _ACK:
            self._raw.send(PING, frame.payload, _ACK)
        elif frame.kind == SETTINGS and not frame.flags & _ACK:
            self._raw.send(SETTINGS, flags=_ACK)

    def close(self) -> None:
        """End the connection."""
        self._raw.__exit__(None, None, None)
