"""What scenarios have in common: load that is counted, and how it is looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.cluster import inspection, replication
from tests.cluster.handle import WorkerHandle
from tests.cluster.replication import Account, Row
from tests.containers.hosts import HostCluster

BOUND = 20.0
"""Seconds that tell a failover from a hang, on a busy machine."""

UNDER_WAY = 0.5
"""Seconds in which an answer that was on its way when wires were cut may still be counted."""


@dataclass
class Scene:
    """A cluster whose every partition is pushed to, and is in sync."""

    cluster: HostCluster
    pushers: list[WorkerHandle]
    before: dict[int, Row]

    def led_by(self, server: str) -> list[int]:
        """Partitions of counts that a server leads."""
        return replication.led_by(self.before, server)

    def leader(self) -> str:
        """A server that leads counts."""
        return self.before[1].primary

    def recovered(self, partitions: list[int], since: float, pushers: list[WorkerHandle] | None = None) -> float:
        """Wait for acknowledgements under another primary; seconds until the last partition had one."""
        who = self.pushers if pushers is None else pushers
        back = self.cluster.wait_until(
            lambda: replication.recoveries(who, self.before, partitions, since), BOUND, "another primary to acknowledge"
        )
        return max(event["t"] for event in back.values()) - since

    def settle(self) -> Account:
        """Everything in sync, pushing stopped, counts exact."""
        replication.wait_until_in_sync(self.cluster, 2)
        replication.stop_pushers(self.cluster, self.pushers)
        found = replication.account(self.cluster, self.pushers)
        failed = [event for pusher in self.pushers for event in pusher.events("failed")]
        assert not failed, failed
        found.assert_exact()
        return found

    def kinds(self) -> list[str]:
        """Of the audit lines."""
        return [event.kind for event in inspection.events(self.cluster.coordinator_address)]

    def deaths(self) -> list[str]:
        """Audit lines of servers held for dead."""
        return [kind for kind in self.kinds() if kind == "server_dead"]


def pushed(cluster_of: Callable[..., HostCluster], pushers: int = 2, tables: int = 4, **config: Any) -> Scene:
    """A cluster under the load of so many workers.

    Its clients may be away for a minute (default: 10 s): that they are evicted is another scenario's matter.
    """
    cluster = cluster_of(**{"client_timeout": 60, **config})
    workers = replication.start_pushers(cluster, pushers, tables)
    return Scene(cluster, workers, replication.wait_until_in_sync(cluster, 2))


def pass_time(cluster: HostCluster, seconds: float) -> None:
    """Let time pass while others work."""
    end = time.monotonic() + seconds
    cluster.wait_until(lambda: time.monotonic() >= end, seconds + 5, "time to pass")


def applied(cluster: HostCluster) -> int:
    """Records that all servers have applied, copies too."""
    return sum(row["applied_lsn"] for row in cluster.psctl("status", "--json")["servers"])


def last_acknowledged(pusher: WorkerHandle, partition: int, healed: float) -> float:
    """When a partition last acknowledged before a gap that ended after `healed`; 0 while it is not over."""
    for event in pusher.events():
        if event["kind"] in ("epoch", "stall") and event["partition"] == partition and event["t"] > healed:
            return float(event["t"] - event["gap"])
    return 0.0


def longest_stall(pushers: list[WorkerHandle], since: float) -> float:
    """The longest time between two acknowledgements that ended after `since`."""
    gaps = [e["gap"] for w in pushers for e in w.events() if e["kind"] in ("epoch", "stall") and e["t"] > since]
    return max(gaps, default=0.0)
