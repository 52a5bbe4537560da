"""Faults that come together: what happens once in a thousand seeds by itself, several times in one.

simulate(seed, replicas=3, scenario="deposed and back")

A scenario is a list of such faults, drawn from as `Faults` draws from its own, and what it needs
of the world. Seeds draw scenarios too, so `make sim` goes through all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paramesh.v1 import types_pb2 as pb
from paramesh_coordinator.rows import PartitionRow
from paramesh_server.insync import Ref

from tests.simulation.faults import Faults

if TYPE_CHECKING:
    from tests.simulation.server import Server
    from tests.simulation.world import World


DRAWN = "drawn"
"""The seed draws its scenario, or none."""


@dataclass(frozen=True)
class Kind:
    """One scenario."""

    faults: tuple[str, ...]
    """Methods of `Scenario`, equally likely."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """What it sets in the seed's profile."""
    replicas: int = 2
    """At least."""


class Scenario(Faults):
    """Draws from one scenario's faults."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        kind = SCENARIOS[world.profile.scenario]
        self._deaths = "kill_contributor" in kind.faults
        self.kinds = [(getattr(self, name), 1) for name in kind.faults]

    def _row(self) -> PartitionRow:
        return self.rng.choice([row for number, row in sorted(self.world.checks.rows.items()) if number])

    def _server(self, ref: Any) -> Server | None:
        server = self.world.servers.get(Ref(*ref))
        return server if server is not None and server.process.alive and not server.process.paused else None

    def _later(self, seconds: float, call: Callable[..., None], *arguments: Any, **named: Any) -> None:
        def now() -> None:
            if not self.over:
                call(*arguments, **named)

        self.kernel.at(seconds, None, now)

    def kill_primary(self) -> None:
        """Told at once."""
        server = self._server(self._row().primary)
        if server is not None:
            self.kill(server, told=True)

    def kill_primary_beside_a_stopped_follower(self) -> None:
        """Whoever takes over waits for that follower, and meets learners meanwhile."""
        row = self._row()
        followers = [server for ref in row.isr if ref != row.primary and (server := self._server(ref))]
        primary = self._server(row.primary)
        if primary is None or len(followers) < 2:
            return
        self.pause(self.rng.choice(followers), self.rng.uniform(0.5, 1.9))
        self._later(self.rng.uniform(0.0, 0.1), self.kill, primary, told=True)

    def depose_and_bring_back(self) -> None:
        """The primary is silent until another one leads; that one dies, and the first leads again.

        It hears of the one in between by followers, and never by a map.
        """
        row = self._row()
        primary = self._server(row.primary)
        if primary is None or len(row.isr) < 3:
            return
        name = row.primary.name
        self.cut_off([(name, "coordinator"), ("coordinator", name)], 3.2)
        self._later(self.rng.uniform(2.7, 3.1), self._kill_leader, row.partition, row.primary)

    def _kill_leader(self, number: int, before: Any) -> None:
        row = self.world.checks.rows[number]
        server = self._server(row.primary)
        if row.primary != before and server is not None:
            self.kill(server, told=True)

    def drop_behind_its_back(self) -> None:
        """A follower leaves the set and comes back as a learner, and its primary hears only of the latter."""
        row = self._row()
        followers = [ref for ref in row.isr if ref != row.primary and self._server(ref)]
        if self._server(row.primary) is None or not followers:
            return
        primary, other = row.primary.name, self.rng.choice(followers).name
        self.cut_off([(primary, other), (other, primary)], self.rng.uniform(2.3, 6.5))
        for moment in (1.9, 3.5, 5.1):  # short ones: a server that hears nothing for two seconds is dead
            self._later(moment, self.cut_off, [("coordinator", primary)], self.rng.uniform(0.8, 1.4))

    def cut_followers(self) -> None:
        """A learner or follower hears nothing of its primary for a while."""
        row = self._row()
        others = [ref.name for ref in (*row.learners, *row.isr) if ref != row.primary]
        if others:
            name = self.rng.choice(others)
            both = [(row.primary.name, name), (name, row.primary.name)]
            self.cut_off(both, self.rng.uniform(0.5, 3.0))

    def kill_contributor(self) -> None:
        """By `decided`."""

    def decided(self, record: pb.StepRecord) -> None:
        """One of those who are named ends before anybody has pulled, and is fenced."""
        if self._deaths and not self.over and self.rng.random() < 0.4:
            ids = [named.client_id for named in record.contributors]
            self.world.end_client(self.rng.choice(ids), self.rng.uniform(0.0, 0.3))


SCENARIOS: dict[str, Kind] = {
    "followers fall silent": Kind(("kill_server", "cut_followers", "reset"), {"late_wishes": 0.8, "think_s": 0.1}),
    "primaries die": Kind(("kill_primary",), {"latency": 0.1, "think_s": 0.1, "pushers": 2}),
    "primaries die beside stopped followers": Kind(
        ("kill_primary_beside_a_stopped_follower", "kill_server"), {"latency": 0.1, "kept_records": 256}, 3
    ),
    "deposed and back": Kind(("depose_and_bring_back",), {"late_maps": 0.0}, 3),
    "dropped behind its back": Kind(("drop_behind_its_back",), {"kept_records": 256, "latency": 0.1}),
    "contributors die": Kind(("kill_contributor",), {"idle": 1.0, "workers": 3, "latency": 0.03}),
    "moves": Kind(("move", "drain", "kill_client"), {"workers": 3}),
}
"""Name -> what comes together."""
