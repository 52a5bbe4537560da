"""Measures a wire: `probe.py serve` on a host answers datagrams, `probe.py ask ADDRESS N` on another times answers."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

PORT = 9_999


def serve() -> None:
    """Send every datagram back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("", PORT))
        print("ready", flush=True)
        while True:
            data, sender = own.recvfrom(2_000)
            own.sendto(data, sender)


def ask(address: str, count: int) -> None:
    """Send datagrams, a millisecond apart; print the seconds until each answer, in order of their coming."""
    answers: list[tuple[int, float]] = []
    sent: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.connect((address, PORT))
        own.settimeout(1.0)
        hearing = threading.Thread(target=hear, args=(own, sent, answers))
        hearing.start()
        for number in range(count):
            sent.append(time.monotonic())
            own.send(number.to_bytes(4, "big"))
            time.sleep(0.001)  # datagrams of one burst would overflow queues, and that is not measured
        hearing.join()
    print(json.dumps(answers), flush=True)


def hear(own: socket.socket, sent: list[float], answers: list[tuple[int, float]]) -> None:
    """Note answers until none comes for a second."""
    try:
        while True:
            number = int.from_bytes(own.recv(100), "big")
            answers.append((number, time.monotonic() - sent[number]))
    except (TimeoutError, ConnectionError):
        pass


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else ask(sys.argv[2], int(sys.argv[3]))
