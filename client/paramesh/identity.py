"""Who a process is: job, role and name, as a certificate or a token says it. Pure.

who = Identity.from_uri("spiffe://paramesh/run-7/worker/host-a")
who.covers("host-a/0")          # True: a name under its own
who.owns(client_id)             # whether the coordinator gave it this client id
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from paramesh.errors import refuse

__all__ = ["TRUST_DOMAIN", "Identity", "Role"]

TRUST_DOMAIN = "spiffe://paramesh/"
"""What every name in a certificate begins with; others in it belong to other programs."""

MARK_BITS = 32
"""Low bits of a client id that are its owner's mark. Names come from whoever signs, not from an attacker;
ids stay below 2**63 for two thousand million registrations."""

_SEGMENT = re.compile(r"[A-Za-z0-9._-]{1,200}")
"""What SPIFFE allows between slashes."""

_UNDER = ("-", ".", "/")
"""What may follow an identity's name in a name under it."""


class Role(StrEnum):
    """What a process may be. `paramesh.access` says which calls each may make."""

    WORKER = "worker"
    """Trains, and supervises what trains: `ps-worker`, its processes, `paramesh.connect`."""
    SERVER = "server"
    """`ps-server`."""
    COORDINATOR = "coordinator"
    """`ps-coordinator`."""
    ADMIN = "admin"
    """A person who changes the cluster with `psctl`."""
    OBSERVER = "observer"
    """A person or a program that only looks."""


@dataclass(frozen=True)
class Identity:
    """A process's name and what it may be; `job` is the cluster that it belongs to.

    Raises:
        RequestRefused: NAME, if a part cannot stand in a certificate.
    """

    job: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        for what, part in (("job", self.job), ("name", self.name)):
            if not _SEGMENT.fullmatch(part) or part in (".", ".."):
                raise refuse(
                    "NAME", f"{what} {part[:80]!r} cannot stand in a certificate or token: use [A-Za-z0-9._-]{{1,200}}"
                )

    @classmethod
    def from_uri(cls, uri: str) -> Identity | None:
        """Read `spiffe://paramesh/JOB/ROLE/NAME`; None if it is anything else."""
        if not uri.startswith(TRUST_DOMAIN):
            return None
        parts = uri.removeprefix(TRUST_DOMAIN).split("/")
        if len(parts) != 3 or parts[1] not in set(Role) or not all(map(_SEGMENT.fullmatch, parts)):
            return None
        if {".", ".."} & set(parts):
            return None
        return cls(parts[0], Role(parts[1]), parts[2])

    @property
    def uri(self) -> str:
        """As it stands in a certificate."""
        return f"{TRUST_DOMAIN}{self.job}/{self.role}/{self.name}"

    def covers(self, name: str) -> bool:
        """Whether a node may bear this name: the identity's own, or one under it.

        "paramesh-server" covers "paramesh-server-0" and "paramesh-server/0", so that the replicas of one
        deployment may share a certificate; it does not cover "paramesh-serverless".
        """
        return name == self.name or name.startswith(tuple(self.name + mark for mark in _UNDER))

    @cached_property
    def mark(self) -> int:
        """What client ids of this identity end with, in their lowest 32 bits."""
        return int.from_bytes(hashlib.sha256(f"{self.role}/{self.name}".encode()).digest()[:4], "big")

    def owns(self, client_id: int) -> bool:
        """Whether a client id was given to this identity."""
        return client_id % (1 << MARK_BITS) == self.mark

    def next_id(self, free: int) -> int:
        """The first id of this identity at or above the first free one."""
        above, mark = divmod(free, 1 << MARK_BITS)
        return ((above if mark <= self.mark else above + 1) << MARK_BITS) | self.mark
