"""Servers that are asked to go, as processes under load: matrix rows 31 and 32, invariant 29.

Every push adds one to a cell, so what is lost or doubled shows.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.cluster import inspection, replication

LEAVES = 40.0
"""Seconds for a server to drain and end: its own limit is 25, and machines are busy."""


def psctl(cluster: Any, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paramesh_coordinator.psctl", "--coordinator", cluster.coordinator_address, *words]
    return subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=60, check=False)


def settle(cluster: Any, pushers: Any) -> None:
    """Stop pushing and count."""
    replication.stop_pushers(cluster, pushers)
    found = replication.account(cluster, pushers)
    print(found)
    found.assert_exact()


def holds(cluster: Any, name: str) -> bool:
    rows = inspection.partition_map(cluster.coordinator_address).partitions
    return any(ref.node == name for row in rows for ref in (row.primary, *row.isr, *row.learners))


@pytest.mark.parametrize("replicas", [1, 2], ids=["one copy", "two copies"])
def test_sigterm_gives_everything_away_under_load(process_cluster, replicas):
    cluster = process_cluster(servers=3, replicas=replicas)
    pushers = replication.start_pushers(cluster)
    replication.wait_until_in_sync(cluster, replicas)
    assert holds(cluster, "server-1")
    cluster.terminate("server-1")
    assert cluster.processes["server-1"].wait(LEAVES) == 0, cluster.processes["server-1"].tail()
    assert not holds(cluster, "server-1")
    settle(cluster, pushers)


@pytest.mark.soak
def test_a_rolling_restart_under_load(process_cluster):
    """Each server in turn: SIGTERM, exit 0, started anew, everything in sync again."""
    cluster = process_cluster(servers=3, replicas=2)
    pushers = replication.start_pushers(cluster)
    for index in range(3):
        replication.wait_until_in_sync(cluster, 2)
        name = f"server-{index}"
        cluster.terminate(name)
        assert cluster.processes[name].wait(LEAVES) == 0, cluster.processes[name].tail()
        cluster.restart(name)
        cluster.wait_until(lambda name=name: name in cluster.live_servers(), 60, f"{name} to be back")
    replication.wait_until_in_sync(cluster, 2)
    cluster.wait_until(lambda: all(holds(cluster, f"server-{i}") for i in range(3)), 60, "every server's share")
    settle(cluster, pushers)


def test_all_servers_asked_at_once_do_not_wait_for_each_other(process_cluster):
    cluster = process_cluster(servers=3)
    replication.start_pushers(cluster)
    replication.wait_until_in_sync(cluster, 1)
    for index in range(3):
        cluster.terminate(f"server-{index}")
    codes = [cluster.processes[f"server-{index}"].wait(15) for index in range(3)]
    assert set(codes) == {0}


@pytest.mark.soak
def test_a_second_sigterm_ends_it_at_once(process_cluster):
    """Nothing can be copied to a server that is stopped: the drain waits, until it is told again."""
    cluster = process_cluster(servers=2, failure_timeout=60, client_timeout=60)
    replication.start_pushers(cluster)
    replication.wait_until_in_sync(cluster, 1)
    cluster.pause("server-0")
    cluster.terminate("server-1")
    process = cluster.processes["server-1"]
    cluster.wait_until(lambda: "draining=waiting" in process.tail(), 20, "the drain to begin")
    assert process.exit_code is None
    process.send(signal.SIGTERM)
    process.wait(10)


@pytest.mark.soak
def test_psctl_drains_moves_and_evens_out(process_cluster):
    cluster = process_cluster(servers=3)
    pushers = replication.start_pushers(cluster)
    replication.wait_until_in_sync(cluster, 1)
    done = psctl(cluster, "drain", "server-0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["held"] == []
    assert not holds(cluster, "server-0")
    refused = psctl(cluster, "move", "1", replication.rows(cluster)[1].primary, "server-0")
    assert refused.returncode == 1
    assert "drains" in refused.stderr
    back = psctl(cluster, "undrain", "server-0")
    assert back.returncode == 0, back.stderr
    moved = psctl(cluster, "move", "1", replication.rows(cluster)[1].primary, "server-0", "--json")
    if moved.returncode == 1:  # the server's share was on its way already, or is there
        said = ("is on its way", "has a replica", "has no replica of partition 1")
        assert any(words in moved.stderr for words in said), moved.stderr
    even = psctl(cluster, "rebalance")
    assert even.returncode == 0, even.stderr
    cluster.wait_until(lambda: holds(cluster, "server-0"), 30, "its share again")
    assert psctl(cluster, "moves").returncode == 0
    settle(cluster, pushers)
