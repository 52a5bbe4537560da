"""Whether wires do what scenarios think that they do: else an undisturbed cluster would pass every scenario."""

from __future__ import annotations

import json

import pytest

from tests.containers.wires import Line

pytestmark = [pytest.mark.hosts, pytest.mark.wires]

COUNT = 400


@pytest.fixture
def ask(cluster_of):
    """Two hosts, and a function that sends COUNT datagrams from one to the other and gives (number, seconds) back."""
    cluster = cluster_of(servers=1, replicas=1)
    server = cluster.run_on("crowd-1", "probe.py", "serve")
    assert server.stdout.readline().strip() == "ready"

    def answers() -> list[list[float]]:
        asking = cluster.run_on("crowd-0", "probe.py", "ask", cluster.address("crowd-1"), str(COUNT))
        return json.loads(asking.communicate(timeout=60)[0])

    answers.cluster = cluster
    return answers


def test_wires_cut_slow_lose_repeat_and_reorder(ask, say):
    wires = ask.cluster.wires
    assert len(ask()) == COUNT
    wires.cut(["crowd-0"], ["crowd-1"])
    assert ask() == []
    wires.heal()
    wires.cut(["crowd-1"], ["crowd-0"], one_way=True)
    assert ask() == []
    wires.heal()
    assert len(ask()) == COUNT
    wires.shape(Line(delay=0.05, jitter=0.02, loss=0.1))
    late = ask()
    numbers, seconds = [number for number, _ in late], sorted(took for _, took in late)
    say(answered=len(late), of=COUNT, median_s=round(seconds[len(seconds) // 2], 3))
    assert COUNT * 0.6 < len(late) < COUNT * 0.95
    assert seconds[0] > 0.05
    assert numbers != sorted(numbers), "nothing was overtaken"
    wires.shape(Line(duplicate=0.5))
    assert len(ask()) > COUNT * 1.5
    wires.unshape()
    assert len(ask()) == COUNT
