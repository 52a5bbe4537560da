"""What kind of world a seed is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tests.simulation.scenarios import DRAWN, SCENARIOS, Kind


@dataclass
class Profile:
    """What kind of world a seed is."""

    replicas: int = 2
    servers: int = 3
    latency: float = 0.003
    pooled: float = 0.0
    pool_s: float = 0.01
    late_maps: float = 0.0
    late_maps_s: float = 3.0
    late_wishes: float = 0.0
    slow_commits: float = 0.0
    failing_commits: float = 0.0
    min_isr: int = 1
    think_s: float = 0.1
    faults_per_s: float = 1.0
    faulty_s: float = 8.0
    kept_records: int = 256
    pushers: int = 2
    readers: int = 0
    workers: int = 0
    steps: int = 12
    step_s: float = 0.5
    idle: float = 0.3
    """Of the steps after which a worker takes its time before it pulls."""
    pauses: float = 0.0
    """Of the steps before which a worker is between two loaders."""
    scenario: str = ""
    """`scenarios.SCENARIOS`: faults that come together; empty: any, one by one."""

    @classmethod
    def drawn(cls, rng: random.Random, replicas: int = 0, scenario: str = DRAWN, **changes: Any) -> Profile:
        """As a seed draws it; changes are set after that, and what their scenario needs."""
        drawn = rng.choice(
            [
                "",
                "",
                *(name for name, kind in SCENARIOS.items() if kind.drawn and (kind.replicas == 2 or replicas != 2)),
            ]
        )
        scenario = drawn if scenario == DRAWN else scenario
        kind = SCENARIOS.get(scenario, Kind(()))
        replicas = max(replicas or rng.choice([2, 2, 3]), kind.replicas)
        pushers = rng.choice([0, 1, 2, 2])
        profile = cls(
            replicas=replicas,
            min_isr=rng.choice([1, 2]) if replicas == 3 else 1,
            failing_commits=rng.choice([0.0, 0.0, 0.0, 0.2]),
            readers=rng.choice([0, 0, 1]) if pushers else 0,
            servers=replicas + rng.choice([0, 1, 1, 2]),
            latency=rng.choice([0.003, 0.003, 0.03, 0.1]),
            pooled=rng.choice([0.0, 0.0, 0.3]),
            pool_s=rng.choice([0.005, 0.05]),
            late_maps=rng.choice([0.0, 0.0, 0.3]),
            late_wishes=rng.choice([0.0, 0.0, 0.3]),
            slow_commits=rng.choice([0.0, 0.0, 0.2]),
            think_s=rng.choice([0.1, 0.3, 0.6]),
            faults_per_s=rng.choice([0.5, 1.0, 2.0, 4.0]),
            faulty_s=rng.choice([5.0, 10.0, 15.0]),
            kept_records=rng.choice([0, 4, 256]),
            pushers=pushers,
            workers=rng.choice([0, 1, 2, 3]) if pushers else 2,
            steps=rng.choice([6, 12, 20]),
            step_s=rng.choice([0.3, 1.0]),
            pauses=rng.choice([0.0, 0.0, 0.1]),
        )
        for name, value in {**kind.profile, **changes, "scenario": scenario}.items():
            setattr(profile, name, value)
        return profile
