"""Too many and too much: rows 37 and 41 of the fault matrix."""

from __future__ import annotations

import time

import paramesh
import pytest
import torch
from paramesh.errors import ParameshError

from tests.containers.scenes import applied, longest_stall, pass_time, pushed

pytestmark = pytest.mark.hosts

MIB = 1 << 20
LIMIT = 1024 * MIB
"""Of a server's memory. One with nothing in it takes about 350 MiB."""


TABLE = 16 * MIB


def test_a_thousand_idle_and_two_hundred_slow_connections(cluster_of, say):
    """Row 41: whoever says nothing, or one byte in a second, disturbs nobody else."""
    scene = pushed(cluster_of)
    victim = scene.leader()
    address = f"{scene.cluster.address(victim)}:7080"
    if scene.cluster.address(victim).startswith("127."):
        rows = scene.cluster.psctl("status", "--json")["servers"]
        address = next(row["address"] for row in rows if row["name"] == victim)
    quiet = acknowledged_within(scene, 5.0)
    crowd = scene.cluster.run_on("crowd-0", "crowd.py", address, "1000", "200")
    assert crowd.stdout.readline().split()[0] == "connected"
    began = time.monotonic()
    crowded = acknowledged_within(scene, 5.0)
    stall = longest_stall(scene.pushers, began)
    crowd.stdin.close()
    held = crowd.stdout.readline().split()[-1]
    found = scene.settle()
    say(share=round(crowded / quiet, 2), held=held, longest_stall_s=round(stall, 2), acked=found.acked)
    assert not scene.deaths()
    assert crowded > 0.5 * quiet


def acknowledged_within(scene, seconds: float) -> int:
    """Records that all partitions applied in so many seconds."""
    before = applied(scene.cluster)
    pass_time(scene.cluster, seconds)
    return applied(scene.cluster) - before


@pytest.mark.wires
def test_a_flood_of_tables_is_refused_and_kills_nobody(cluster_of, say):
    """Row 37: servers with a memory limit say no before the kernel does."""
    cluster = cluster_of(memory_limit=LIMIT)
    made, refusal = 0, None
    with paramesh.connect(cluster.coordinator_address) as client:
        while made < 200 and refusal is None:
            try:
                client.create_table(f"flood-{made}", {"w": torch.zeros(TABLE // 4)}, "SGD", {"lr": 1.0})
                made += 1
            except ParameshError as error:
                refusal = error
    codes = [cluster.exit_code_of(f"server-{index}") for index in range(3)]
    assert codes == [None, None, None], f"a server was killed after {made} tables: {codes}"
    assert refusal is not None, f"{made} tables of {TABLE // MIB} MiB were taken"
    say(tables=made, reason=refusal.reason)
    assert refusal.reason == "QUOTA"
    assert len(cluster.live_servers()) == 3
    with paramesh.connect(cluster.coordinator_address) as client:
        assert client.pull("flood-0")["w"].shape == (TABLE // 4,), "what was taken is served"
