"""Lines that are slow, lose, repeat and reorder packets, and damage bytes: rows 25 and 28 of the fault matrix."""

from __future__ import annotations

import time

import pytest

from tests.containers.scenes import longest_stall, pass_time, pushed
from tests.containers.wires import Line

pytestmark = [pytest.mark.hosts, pytest.mark.wires]

BAD = Line(delay=0.05, jitter=0.02, loss=0.05, duplicate=0.01)
"""5 % lost in each direction, 50 ms later, 20 ms more or less, so that packets overtake each other."""


@pytest.mark.parametrize(
    "seconds", [12, pytest.param(120, marks=[pytest.mark.soak, pytest.mark.timeout(400)])], ids=["short", "two minutes"]
)
def test_lost_late_repeated_and_reordered_packets_make_no_failover(cluster_of, say, seconds):
    """Row 25: nobody is held for dead, no epoch rises, and counts are exact."""
    scene = pushed(cluster_of)
    began, before = time.monotonic(), len(scene.deaths())
    scene.cluster.wires.shape(BAD)
    pass_time(scene.cluster, seconds)
    during = sum(len(pusher.events("stall")) for pusher in scene.pushers)
    stall = longest_stall(scene.pushers, began)
    scene.cluster.wires.unshape()
    found = scene.settle()
    say(seconds=seconds, acked=found.acked, lost=found.lost, duplicated=found.duplicated)
    say(longest_stall_s=round(stall, 2), failovers=len(scene.deaths()) - before)
    assert during, "the lines were as good as before"
    assert len(scene.deaths()) == before


def test_damaged_bytes_of_tensors_are_found_and_sent_again(cluster_of, say):
    """Row 28: one packet in a hundred has a bit flipped behind TCP's back, in the zeros of a gradient."""
    scene = pushed(cluster_of)
    scene.cluster.wires.shape(Line(corrupt=0.01))
    pass_time(scene.cluster, 8.0)
    flipped = scene.cluster.wires.unshape()
    found = scene.settle()
    say(acked=found.acked, flipped=flipped)
    assert flipped > 10, "no byte was damaged"


@pytest.mark.long
def test_a_line_of_two_megabits(cluster_of, say):
    """A primary that can send little is slow, and that is all."""
    scene = pushed(cluster_of)
    scene.cluster.wires.rate(scene.leader(), 2_000_000)
    pass_time(scene.cluster, 8.0)
    scene.cluster.wires.rate(scene.leader(), 0)
    found = scene.settle()
    say(acked=found.acked)
    assert not scene.deaths()
