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
from paramesh_server.replica import Role

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
    drawn: bool = True
    """By seeds; else only by who names it."""


class Scenario(Faults):
    """Draws from one scenario's faults."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        kind = SCENARIOS[world.profile.scenario]
        self._busy: set[int] = set()
        """Partitions in the middle of such a story."""
        self._deaths = "kill_contributor" in kind.faults
        self.kinds = [(getattr(self, name), 1) for name in kind.faults]

    def _row(self) -> PartitionRow:
        return self.rng.choice([row for _, row in sorted(self.world.checks.rows.items())])

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

    def kill_ledger(self) -> None:
        """Whoever leads partition 0; told at once, or silent."""
        server = self._server(self.world.checks.rows[0].primary)
        if server is not None:
            self.kill(server, told=self.rng.random() < 0.7)

    def move_ledger(self) -> None:
        """It is led by another one, who lives, or one more replica is made."""
        row = self.world.checks.rows[0]
        self._psctl("move", 0, self.rng.choice(row.isr).name, self.rng.choice(self.world.names))

    def silence_ledger(self) -> None:
        """Its primary and the coordinator hear nothing of each other: followers and clients still reach it."""
        name = self.world.checks.rows[0].primary.name
        self.cut_off([(name, "coordinator"), ("coordinator", name)], self.rng.uniform(2.0, 4.0))

    def kill_primary_beside_a_stopped_follower(self) -> None:
        """Whoever takes over waits for that follower, and meets learners meanwhile."""
        row = self._row()
        followers = [server for ref in row.isr if ref != row.primary and (server := self._server(ref))]
        primary = self._server(row.primary)
        if primary is None or len(followers) < 2:
            return
        self.pause(self.rng.choice(followers), self.rng.uniform(0.5, 1.9))
        self._later(self.rng.uniform(0.0, 0.1), self.kill, primary, told=True)

    def _when(self, condition: Callable[[], Any], then: Callable[[], None], patience: float) -> None:
        """Look every few milliseconds; give up after so many seconds."""
        until = self.kernel.now + patience

        def look() -> None:
            if self.over or self.kernel.now > until:
                return
            if condition():
                then()
            else:
                self.kernel.at(0.004, None, look)

        look()

    def depose_and_bring_back(self) -> None:
        """A primary with a learner is silent until another one leads; that one dies, and the first leads again.

        It hears of the one in between by its followers, and never by a map.
        """
        row = self._row()
        primary = self._server(row.primary)
        if primary is None or len(row.isr) < 3 or self._busy:
            return
        number, name, rows = row.partition, row.primary.name, self.world.checks.rows
        third = self._server(row.isr[-1] if row.isr[-1] != row.primary else row.isr[0])

        def has_learner() -> bool:
            slot = primary.held.get(number)
            return slot is not None and bool(slot.replica.insync.learners)

        def silence() -> None:
            self.cut_off([(name, "coordinator"), ("coordinator", name)], 3.2)
            self._when(lambda: _deposed(primary, number), lambda: self._kill_leader(number, row.primary), 3.0)

        if third is not None:
            self._busy.add(number)
            self.kernel.at(8.0, None, self._busy.discard, number)
            self.kill(third, told=True)
            self._when(lambda: rows[number].primary == row.primary and has_learner(), silence, 5.0)

    def _kill_leader(self, number: int, before: Any) -> None:
        row = self.world.checks.rows[number]
        server = self._server(row.primary)
        if row.primary != before and server is not None and any(Ref(*before) == Ref(*ref) for ref in row.isr):
            self.kernel.note(f"KILL {server.ref}, who leads p{number} since a moment ago")
            self.world.end(server, back=self.rng.uniform(0.1, 5.0))

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


def _deposed(server: Server, number: int) -> bool:
    slot = server.held.get(number)
    return slot is not None and slot.replica.role is Role.FOLLOWER


SCENARIOS: dict[str, Kind] = {
    "followers fall silent": Kind(("kill_server", "cut_followers", "reset"), {"late_wishes": 0.8, "think_s": 0.1}),
    "primaries die": Kind(("kill_primary",), {"latency": 0.1, "think_s": 0.1, "pushers": 2}),
    "primaries die beside stopped followers": Kind(
        ("kill_primary_beside_a_stopped_follower", "kill_server"), {"latency": 0.1, "kept_records": 256}, 3
    ),
    "deposed and back": Kind(
        ("depose_and_bring_back",), {"servers": 5, "latency": 0.1, "late_wishes": 0.9, "think_s": 0.1, "pushers": 2}, 3
    ),
    "contributors die": Kind(("kill_contributor",), {"idle": 1.0, "workers": 3, "latency": 0.03}),
    "the coordinator is stopped": Kind(("pause_coordinator", "kill_server")),
    "the ledger moves": Kind(
        ("kill_ledger", "move_ledger", "silence_ledger", "kill_client"), {"workers": 3, "latency": 0.03, "steps": 20}
    ),
    "old maps": Kind(
        ("isolate",), {"readers": 2, "pushers": 2, "late_maps": 1.0, "think_s": 0.1, "faulty_s": 15.0}, drawn=False
    ),
    "zombies": Kind(("kill_client", "kill_primary"), {"workers": 3, "pushers": 0, "idle": 1.0}, drawn=False),
    "moves": Kind(("move", "drain", "kill_client"), {"workers": 3}),
}
"""Name -> what comes together."""
