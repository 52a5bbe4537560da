"""What this process is: its host, its memory, the fingerprint of its arithmetic."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

from paramesh.headroom import Headroom

OWN_BYTES = 384 << 20
"""What a server takes before it holds anything: Python and torch, 330 MiB measured."""

SHARE_OF_VALUES = 4
"""Of the rest a fourth: Adam keeps twice as much beside the values, and what waits and travels needs the last one."""

LEAST_VALUES = 16 << 20
"""However small the memory is: toys must fit."""


def rss_bytes() -> int:
    """Resident memory of this process; 0 where /proc does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_bytes() -> int:
    """What this process may use: its container's limit, else the machine's memory."""
    return Headroom(0.0).limit


def room_for_values(memory: int) -> int:
    """How many bytes of values fit into so much memory, with what comes with them."""
    return max(LEAST_VALUES, (memory - OWN_BYTES) // SHARE_OF_VALUES)


def host_id() -> str:
    """What tells this host's boot from another's: name and boot id."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()}:{boot}"


def fingerprint() -> bytes:
    """Hash of a fixed computation: servers that differ here may differ in a bit.

    Also the first optimizer step of the process, which pays torch's lazy imports before a
    worker waits for them.
    """
    import torch

    digest = hashlib.sha256()
    for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
        parameter = torch.nn.Parameter(torch.arange(1000, dtype=torch.float32) / 7)
        parameter.grad = torch.arange(1000, dtype=torch.float32) / 3
        optimizer = make([parameter], lr=0.1, fused=True)
        optimizer.step()
        optimizer.step()
        digest.update(parameter.detach().numpy().data)
    return digest.digest()
