"""Delay, jitter, loss and repetition of what arrives at hosts, in user space: for kernels without `tc netem`.

    shaper.py '{"line": {"delay": 0.05, ...}, "ends": [{"netns": "/run/netns/a", "device": "eth0", ...}, ...]}'

In each network namespace an nft rule hands IPv4 packets that arrive on the device to a TAP instead. They are read from
it, kept for a while or dropped, and written back, so that they arrive from the TAP. Says "ready", and works until its
input is closed; then the rules go first, and packets travel as before. At the end it says how many packets it damaged.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI = 0x0002 | 0x1000
TAP = "paramesh-tap"
TABLE = "netdev paramesh_shape"
FRAME = 65_535
BATCH = 64
"""Frames read from one TAP before the others have a turn."""
CLONE_NEWNET = 0x40000000
ZEROS = bytes(64)
"""What is damaged: the inside of a gradient of zeros, not the frames of HTTP/2 around it."""

_libc = ctypes.CDLL(None, use_errno=True)


def enter(path: str) -> None:
    """Move this thread into a network namespace."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if _libc.setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(fd)


def attach(end: dict[str, Any]) -> int:
    """Make the TAP of one host and have its packets come to us; we are in its namespace. The TAP's descriptor."""
    device = end["device"]
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", TAP.encode(), IFF_TAP_NO_PI))
    # `ip` asks the kernel of this namespace; /sys would show that of the mount.
    (link,) = json.loads(subprocess.check_output(["ip", "-j", "link", "show", "dev", device]))
    # The same address: what comes back is then for this host, not for another one.
    run("ip", "link", "set", TAP, "address", link["address"], "mtu", str(link["mtu"]), "txqueuelen", "10000", "up")
    for name in ("all", TAP):  # packets from the TAP answer to a route by the device
        Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0")
    rule = (
        f"table {TABLE} {{\nchain in {{\ntype filter hook ingress device {device} priority 0\n"
        f"meta protocol ip fwd to {TAP}\n}}\n}}\n"
    )
    subprocess.run(["nft", "-f", "-"], input=rule.encode(), check=True)
    return fd


def detach() -> None:
    """Packets travel as before; we are in the namespace."""
    subprocess.run(["nft", "delete", "table", *TABLE.split()], check=False, stderr=subprocess.DEVNULL)


def run(*command: str) -> None:
    """One command that must succeed."""
    subprocess.run(command, check=True)


def carry(line: dict[str, float], taps: list[int]) -> int:
    """Move frames until standard input ends; how many were damaged."""
    late: list[tuple[float, int, int, bytes]] = []
    order = damaged = 0
    poll = select.epoll()
    for fd in [*taps, 0]:
        poll.register(fd, select.EPOLLIN)
    while True:
        wait = max(0.0, late[0][0] - time.monotonic()) if late else -1
        for fd, _ in poll.poll(wait):
            if fd == 0:
                return damaged
            for frame in read(fd):
                if line["corrupt"] and random.random() < line["corrupt"]:
                    frame, hit = damage(frame)
                    damaged += hit
                for _ in range(copies(line)):
                    order += 1
                    due = time.monotonic() + line["delay"] + line["jitter"] * (2 * random.random() - 1)
                    heapq.heappush(late, (due, order, fd, frame))
        while late and late[0][0] <= time.monotonic():
            *_, fd, frame = heapq.heappop(late)
            try:
                os.write(fd, frame)
            except OSError:
                pass  # the queue is full or the host is gone: lost, as on a wire


def copies(line: dict[str, float]) -> int:
    """How often a packet arrives."""
    draw = random.random()
    if draw < line["loss"]:
        return 0
    return 2 if draw < line["loss"] + line["duplicate"] else 1


def damage(frame: bytes) -> tuple[bytes, bool]:
    """Flip a bit of a tensor and make TCP's checksum right again; whether there was one."""
    head = 14 + 4 * (frame[14] & 15)
    at = frame.find(ZEROS, head + 20)
    if frame[23] != 6 or at < 0:
        return frame, False
    # The lower byte of a 16-bit word of TCP's sum: the bit is worth 0x40 there.
    at += 32 + (at - head) % 2 + 1
    hurt = bytearray(frame)
    hurt[at] ^= 0x40
    total = struct.unpack_from("!H", hurt, head + 16)[0]
    # One's complement: what the sum grows by, its complement shrinks by.
    total = (total - 0x40) if total >= 0x40 else (total - 0x40 + 0xFFFF)
    struct.pack_into("!H", hurt, head + 16, total)
    return bytes(hurt), True


def read(fd: int) -> list[bytes]:
    """Frames of IPv4 that wait at a TAP; what its own kernel says on it (IPv6) is left."""
    frames = []
    for _ in range(BATCH):
        try:
            frame = os.read(fd, FRAME)
        except OSError:
            break
        if frame[12:14] == b"\x08\x00":
            frames.append(frame)
    return frames


def main() -> None:
    """Attach to all hosts, carry, detach."""
    plan = json.loads(sys.argv[1])
    os.nice(-15)  # wires do not wait for a turn on a busy machine
    taps = []
    try:
        for end in plan["ends"]:
            enter(end["netns"])
            taps.append(attach(end))
        print("ready", flush=True)
        damaged = carry(plan["line"], taps)
        print("damaged", damaged, flush=True)
    finally:
        for end in plan["ends"]:
            try:
                enter(end["netns"])
            except OSError:
                continue  # the host has gone
            detach()


if __name__ == "__main__":
    main()
