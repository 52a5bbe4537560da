"""The wires between hosts that are network namespaces: cut, slowed, made to lose, repeat and reorder.

Everything is done at the receiving end, inside the host's own network namespace, so it works alike for a container and
for a namespace of `ip netns`, takes effect at once, and leaves the rest of the machine alone. Cuts are nft rules; delay
and its kin are the work of `shaper.py`, in user space, the same on every kernel (not all have `tc netem`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

SHAPER = Path(__file__).with_name("shaper.py")
CUT_TABLE = "inet paramesh_cut"


@dataclass(frozen=True)
class Line:
    """How packets travel towards a host. Seconds, and shares from 0 to 1."""

    delay: float = 0.0
    jitter: float = 0.0
    """Each packet is late by up to so much more or less: packets overtake each other."""
    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    """Packets with a tensor in them have a bit of it flipped, and a checksum that agrees."""


@dataclass(frozen=True)
class End:
    """A host's end of the wire."""

    name: str
    netns: str
    """Path of its network namespace."""
    address: str
    device: str = "eth0"


def missing() -> str:
    """Why this process cannot touch wires; empty if it can."""
    if os.geteuid() != 0:
        return "other network namespaces need root"
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nft", "nftables"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"the program {program} is missing (apt-get install {package})"
    return ""


class Wires:
    """All the wires of one cluster."""

    def __init__(self) -> None:
        self._ends: dict[str, End] = {}
        self._deaf: dict[str, dict[str, str]] = {}
        """Whom each host does not hear, and what its kernel does about it."""
        self._shaper: subprocess.Popen[bytes] | None = None
        self._limited: set[str] = set()

    def plug(self, end: End) -> None:
        """A host is there, or there again in another namespace; cuts that it was part of stay."""
        self._ends[end.name] = end
        if self._deaf.get(end.name):
            self._apply(end.name)

    def unplug(self, name: str) -> None:
        """A host is gone."""
        self._ends.pop(name, None)

    def cut(self, some: Iterable[str], others: Iterable[str], *, one_way: bool = False, how: str = "drop") -> None:
        """Nothing passes between two groups of hosts.

        Args:
            some: names of hosts.
            others: names of hosts.
            one_way: only what `some` send is lost; what they are sent arrives.
            how: "drop" (silence), or "reset" (the kernel answers TCP with a reset).
        """
        some, others = list(some), list(others)
        for name in others:
            self._deaf.setdefault(name, {}).update(dict.fromkeys(some, how))
        if not one_way:
            for name in some:
                self._deaf.setdefault(name, {}).update(dict.fromkeys(others, how))
        for name in {*some, *others} if not one_way else others:
            self._apply(name)

    def heal(self) -> None:
        """Every cut is mended."""
        cut, self._deaf = list(self._deaf), {}
        for name in cut:
            self._apply(name)

    def _apply(self, name: str) -> None:
        if name not in self._ends:
            return
        verdicts = {"drop": "drop", "reset": "reject with tcp reset"}
        rules = "\n".join(
            f"ip saddr {self._ends[other].address} {'meta l4proto tcp ' if how == 'reset' else ''}{verdicts[how]}"
            for other, how in self._deaf.get(name, {}).items()
            if other in self._ends
        )
        self._nft(
            name,
            f"table {CUT_TABLE}\ndelete table {CUT_TABLE}\n"
            f"table {CUT_TABLE} {{\nchain in {{\ntype filter hook input priority -10\n{rules}\n}}\n}}\n",
        )

    def shape(self, line: Line, hosts: Iterable[str] | None = None) -> None:
        """From now on packets towards these hosts (default: all of this cluster) travel so."""
        self.unshape()
        ends = [asdict(end) for name, end in self._ends.items() if hosts is None or name in set(hosts)]
        command = [sys.executable, str(SHAPER), json.dumps({"line": asdict(line), "ends": ends})]
        self._shaper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._shaper.stdout is not None
        if self._shaper.stdout.readline().strip() != b"ready":
            raise RuntimeError(f"the shaper ended with {self._shaper.wait(10)}")

    def unshape(self) -> int:
        """Lines are as they were; how many packets had been damaged."""
        if self._shaper is None:
            return 0
        shaper, self._shaper = self._shaper, None
        assert shaper.stdin is not None
        assert shaper.stdout is not None
        shaper.stdin.close()  # it takes its rules away and ends
        last = shaper.stdout.read().split()
        shaper.stdout.close()
        shaper.wait(20)
        return int(last[-1]) if last else 0

    def rate(self, name: str, bits_per_second: int) -> None:
        """Bound what a host sends; 0: no bound."""
        end = self._ends[name]
        self._in(end, ["tc", "qdisc", "del", "dev", end.device, "root"], check=name in self._limited)
        self._limited.discard(name)
        if bits_per_second:
            self._in(end, ["tc", "qdisc", "add", "dev", end.device, "root", "tbf", "rate", f"{bits_per_second}bit",
                           "burst", "32kb", "latency", "400ms"])  # fmt: skip
            self._limited.add(name)

    def close(self) -> None:
        """End what runs here; namespaces take their rules with them."""
        self.unshape()

    def _nft(self, name: str, script: str) -> None:
        self._in(self._ends[name], ["nft", "-f", "-"], script)

    def _in(self, end: End, command: list[str], text: str = "", check: bool = True) -> None:
        done = subprocess.run(["nsenter", f"--net={end.netns}", *command], input=text.encode(), capture_output=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} in {end.name}: {done.stderr.decode()}")
