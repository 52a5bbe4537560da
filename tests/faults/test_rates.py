"""Requests are evened out after bytes, by real servers that count them (design 2, section 6)."""

from __future__ import annotations

import time

import paramesh
import pytest

from tests.cluster import inspection, replication
from tests.cluster.replica_bodies import make_counters

READ = "tests.cluster.replica_bodies:read"
TABLES = 12
HOT = 6
"""Tables of one size on two servers: bytes are even, and stay so."""
SUSTAINED = 120.0
"""Seconds: uneven for 30, means of 10 to 20 before that, and a move or an exchange after it."""


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_what_is_read_most_does_not_stay_on_one_server(process_cluster):
    """Six partitions of one server get all requests; half of them go, in exchange for cold ones."""
    cluster = process_cluster(servers=2, min_workers=1)
    with paramesh.connect(cluster.coordinator_address) as client:
        make_counters(client, TABLES)
    before = replication.wait_until_in_sync(cluster, 1)
    hot = [p for p, row in before.items() if p and row.primary == "server-0"][:HOT]
    assert len(hot) == HOT, before
    readers = [cluster.start_worker(READ, supervised=False, partitions=hot) for _ in range(2)]
    cluster.wait_until(lambda: all(w.events("running") for w in readers), 60, "the first reads")
    began = time.monotonic()

    def spread() -> dict[str, int] | None:
        rows = replication.rows(cluster)
        led = {name: sum(rows[p].primary == name for p in hot) for name in ("server-0", "server-1")}
        return led if min(led.values()) >= HOT // 2 - 1 else None

    led = cluster.wait_until(spread, SUSTAINED, "the hot partitions to be spread")
    took = time.monotonic() - began
    for reader in readers:
        reader.open_gate("stop")
    cluster.wait_until(lambda: all(w.events("read") for w in readers), 30, "the readers to end")
    reads = sum(w.last("read")["count"] for w in readers)
    rows = replication.rows(cluster).values()
    share = [sum(row.primary == name for row in rows if row.id) for name in ("server-0", "server-1")]
    print(f"hot={led} all={share} after_s={took:.1f} reads_per_s={reads / (time.monotonic() - began):.0f}")
    assert abs(share[0] - share[1]) <= 2, "bytes are uneven now"
    planned = [e for e in inspection.events(cluster.coordinator_address) if e.kind == "moves_planned"]
    assert any("requests" in e.subject for e in planned), planned
