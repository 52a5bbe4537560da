"""Opens connections to a server and does nothing with them: `crowd.py HOST:PORT IDLE SLOW`.

IDLE connections say nothing at all; SLOW ones send HTTP/2's preface and then a header block, one byte in a second. Says
"connected N" when all are there, and at the end of its input "held N": how many the server had not closed.
"""

from __future__ import annotations

import resource
import select
import socket
import struct
import sys

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
HEADERS = struct.pack(">I", 16_000)[1:] + b"\1\4\0\0\0\1"
"""The head of a frame of headers whose 16,000 bytes come slowly."""


def main() -> None:
    """Connect, wait, tell."""
    host, _, port = sys.argv[1].rpartition(":")
    idle, slow = int(sys.argv[2]), int(sys.argv[3])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    own = []
    for number in range(idle + slow):
        one = socket.create_connection((host, int(port)), 30)
        if number >= idle:
            one.sendall(PREFACE + HEADERS)
        one.setblocking(False)
        own.append(one)
    print("connected", len(own), flush=True)
    slowly = own[idle:]
    while not select.select([sys.stdin], [], [], 1.0)[0]:
        for one in slowly:
            try:
                one.send(b"\0")
            except OSError:
                pass
    print("held", sum(alive(one) for one in own), flush=True)


def alive(one: socket.socket) -> bool:
    """Whether the other side has not closed it."""
    try:
        while True:
            if not one.recv(65_536):
                return False
    except BlockingIOError:
        return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
