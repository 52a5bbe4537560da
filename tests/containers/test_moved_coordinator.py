"""A coordinator that moves to another host, its state on etcd: rows 12 and 14 of the fault matrix."""

from __future__ import annotations

import time

import pytest

from tests.cluster import inspection
from tests.containers.scenes import pushed

pytestmark = [pytest.mark.hosts, pytest.mark.wires]


def test_a_coordinator_moves_to_another_host(cluster_of, say):
    """Its host is lost; one on another host takes up the cluster from etcd, and then replaces a lost primary."""
    scene = pushed(cluster_of, coordinators=2)
    cluster = scene.cluster
    term = inspection.partition_map(cluster.coordinator_address).term
    cluster.lose("coordinator-0")
    moved = time.monotonic()
    cluster.start_coordinator(1)
    leads = lambda: inspection.partition_map(f"{cluster.address('coordinator-1')}:7070").term > term  # noqa: E731
    cluster.wait_until(leads, 30, "the other coordinator to lead")
    away = time.monotonic() - moved
    cluster.wait_until(lambda: len(cluster.live_servers()) == 3, 30, "every server to be heard")
    lost = time.monotonic()
    victim = scene.leader()
    cluster.lose(victim)
    took = scene.recovered(scene.led_by(victim), lost)
    found = scene.settle()
    say(away_s=round(away, 2), recovered_s=round(took, 2), acked=found.acked)
