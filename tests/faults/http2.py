"""HTTP/2 by hand, as far as floods need it: what no gRPC client would send.

with Raw(address) as raw:
    raw.request(1)
    raw.reset(1)
    raw.until(GOAWAY)
"""

from __future__ import annotations

import socket
import struct
import types
from typing import NamedTuple, Self

HEADERS, RESET, SETTINGS, PING, GOAWAY = 1, 3, 4, 6, 7

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


_CALL = b"".join(
    _literal(name, value)
    for name, value in [
        (":method", "POST"), (":scheme", "http"), (":path", "/paramesh.v1.ParameterServer/Push"),
        (":authority", "x"), ("te", "trailers"), ("content-type", "application/grpc"),
    ]
)  # fmt: skip


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


def call(stream: int) -> bytes:
    """The begin of a Push that never says more."""
    return frame(HEADERS, _CALL, _END_HEADERS, stream)


def reset(stream: int) -> bytes:
    """The end of it."""
    return frame(RESET, (8).to_bytes(4, "big"), stream=stream)
