"""Some seeds of the simulation, with two and with three replicas; the rest is `make sim`."""

from __future__ import annotations

import pytest

from tests.simulation.world import World, simulate

SEEDS = 25
"""Per kind, in the suite."""


@pytest.mark.parametrize("replicas", [2, 3])
def test_every_promise_is_kept(replicas: int) -> None:
    """Invariants 1-5, 7-9, 11, 13-15, 17 and 22, through crashes, pauses, cuts and restarts."""
    done = [simulate(seed, replicas).how for seed in range(SEEDS)]
    assert done.count("done") >= SEEDS * 0.9


def test_a_seed_is_the_same_story_every_time() -> None:
    def story(world: World) -> tuple[object, ...]:
        return world.kernel.steps, world.kernel.now, list(world.kernel.trace), sorted(world.checks.acked)

    assert story(simulate(3).world) == story(simulate(3).world)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_thousand_seeds() -> None:
    for seed in range(10_000, 12_000):
        simulate(seed)
