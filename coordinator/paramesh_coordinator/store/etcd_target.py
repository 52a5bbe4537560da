"""Where in etcd a cluster's rows are, as people write it. Pure.

target = EtcdTarget.parse("etcd://10.0.0.1:2379,10.0.0.2:2379/paramesh/run-7")
"""

from __future__ import annotations

import re
from typing import NamedTuple

from paramesh.errors import ConfigError

__all__ = ["SCHEME", "EtcdTarget"]

SCHEME = "etcd://"

_PREFIX = re.compile(r"[A-Za-z0-9_.:-]+(/[A-Za-z0-9_.:-]+)*")


class EtcdTarget(NamedTuple):
    """Where the cluster's rows are: etcd's members, and the prefix of all keys."""

    endpoints: tuple[str, ...]
    prefix: str

    @classmethod
    def parse(cls, text: str) -> EtcdTarget:
        """Read etcd://host:port[,host:port...]/prefix.

        Raises:
            ConfigError: `state`: it is not that.
        """
        rest = text.removeprefix(SCHEME)
        members, _, prefix = rest.partition("/")
        endpoints = tuple(member.strip() for member in members.split(","))
        prefix = prefix.strip("/")
        if not text.startswith(SCHEME) or not all(_is_endpoint(one) for one in endpoints):
            raise _wrong(f"{text!r} is not etcd://HOST:PORT[,HOST:PORT...]/PREFIX")
        # `rows` is a folder of ours: a job below it would be read as rows of the job above.
        if not _PREFIX.fullmatch(prefix) or len(prefix) > 256 or "rows" in prefix.split("/"):
            raise _wrong(f"{text!r} needs a prefix of its own for this job's keys, such as {SCHEME}{members}/paramesh")
        return cls(endpoints, prefix)

    def __str__(self) -> str:
        return f"{SCHEME}{','.join(self.endpoints)}/{self.prefix}"


def _is_endpoint(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon and port.isdecimal() and 1 <= int(port) <= 65535) and "@" not in host


def _wrong(problem: str) -> ConfigError:
    return ConfigError(f"state: {problem}", metadata={"key": "state"})
