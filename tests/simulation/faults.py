"""What goes wrong, and when: drawn from the seed, and ended at a moment after which all is well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paramesh.errors import ParameshError
from paramesh.v1 import types_pb2 as pb
from paramesh_server.insync import Ref

from tests.simulation.kernel import Process
from tests.simulation.network import Weather

if TYPE_CHECKING:
    from tests.simulation.server import Server
    from tests.simulation.world import World


class Faults:
    """The hand that breaks things."""

    def __init__(self, world: World) -> None:
        self.world, self.kernel, self.net, self.rng = world, world.kernel, world.net, world.rng
        self.over = False
        self.operator = Process("operator")
        kinds = [
            (self.kill_server, 3), (self.pause_server, 3), (self.cut, 3), (self.isolate, 1), (self.reset, 3),
            (self.storm, 2), (self.restart_coordinator, 1), (self.pause_coordinator, 1), (self.kill_client, 1),
            (self.move, 2), (self.drain, 1),
        ]  # fmt: skip
        # Some kinds only, in each seed: what is rare beside everything else is common alone.
        self.kinds = [(fault, weight) for fault, weight in kinds if self.rng.random() < 0.6] or kinds[:1]

    def start(self, until: float) -> None:
        """Break things until a moment."""
        self.kernel.at(self._gap(), None, self._next)
        self.kernel.at(until - self.kernel.now, None, self.heal)

    def _gap(self) -> float:
        return self.rng.expovariate(self.world.profile.faults_per_s)

    def _next(self) -> None:
        if self.over:
            return
        faults, weights = zip(*self.kinds, strict=True)
        self.rng.choices(faults, weights)[0]()
        self.kernel.at(self._gap(), None, self._next)

    def heal(self) -> None:
        """No more faults; what is stopped goes on, what is cut is whole."""
        self.over = True
        self.kernel.note("faults are over")
        self.net.cuts.clear()
        self.net.weather = Weather()
        for server in list(self.world.servers.values()):
            if server.process.paused:
                self.kernel.resume(server.process)
        if self.world.coordinator.process.paused:
            self.kernel.resume(self.world.coordinator.process)
        if not self.world.coordinator.process.alive:
            self.world.start_coordinator()
        self._stay()

    def decided(self, record: pb.StepRecord) -> None:
        """A step is decided."""

    # --- processes ---

    def _running(self) -> list[Server]:
        return [server for server in self.world.servers.values() if server.process.alive]

    def _expendable(self, server: Server) -> bool:
        """Whether every partition keeps a live member of its in-sync set."""
        alive = {s.ref for s in self._running() if s is not server}
        return all(any(Ref(*ref) in alive for ref in row.isr) for row in self.world.checks.rows.values())

    def kill_server(self) -> None:
        """SIGKILL; another incarnation comes later, empty."""
        self.kill(self.rng.choice(self._running()), told=self.rng.random() < 0.6)

    def kill(self, server: Server, *, told: bool) -> None:
        """This one, if that takes no last copy."""
        if not server.process.alive or not self._expendable(server):
            return
        self.kernel.note(f"KILL {server.ref} {'told at once' if told else 'silent'}")
        self.world.end(server, told=told, back=self.rng.uniform(0.1, 5.0))

    def pause_server(self) -> None:
        """SIGSTOP, then SIGCONT."""
        server = self.rng.choice(self._running())
        if server.process.paused:
            return
        seconds = self.rng.choice([0.3, 1.0, 2.5, 4.0]) * self.rng.uniform(0.7, 1.3)
        self.pause(server, seconds)

    def pause(self, server: Server, seconds: float) -> None:
        """SIGSTOP one for so long."""
        self.kernel.note(f"PAUSE {server.ref} for {seconds:.2f}")
        self.kernel.pause(server.process)
        self.kernel.at(seconds, None, self._go_on, server)

    def _go_on(self, server: Server) -> None:
        if server.process.alive and server.process.paused:
            self.kernel.note(f"CONTINUE {server.ref}")
            self.kernel.resume(server.process)

    def restart_coordinator(self, back: float | None = None) -> None:
        """It dies; another starts on its store."""
        coordinator = self.world.coordinator
        if not coordinator.process.alive:
            return
        self.kernel.note("KILL coordinator")
        self.kernel.kill(coordinator.process)
        self.net.died(coordinator.process)
        self.kernel.at(self.rng.uniform(0.05, 3.0) if back is None else back, None, self._start_coordinator)

    def _start_coordinator(self) -> None:
        if not self.world.coordinator.process.alive:
            self.world.start_coordinator()

    def pause_coordinator(self) -> None:
        """It hears and says nothing for a while."""
        process = self.world.coordinator.process
        if process.alive and not process.paused:
            self.kernel.note("PAUSE coordinator")
            self.kernel.pause(process)
            self.kernel.at(self.rng.choice([self.rng.uniform(0.2, 4.0), 10.0]), None, self._resume, process)

    def _resume(self, process: Process) -> None:
        if process.alive and process.paused:
            self.kernel.note(f"CONTINUE {process.name}")
            self.kernel.resume(process)

    def kill_client(self) -> None:
        """A client ends in the middle; the coordinator hears of it, and fences it."""
        self.world.kill_some_client()

    # --- psctl ---

    def move(self) -> None:
        """One replica goes elsewhere, or only the lead does."""
        row = self.rng.choice(list(self.world.checks.rows.values()))
        self._psctl("move", row.partition, self.rng.choice(row.isr).name, self.rng.choice(self.world.names))

    def drain(self) -> None:
        """A server gives away what it holds, and a while later may have it back."""
        name = self.rng.choice(self.world.names)
        self._psctl("drain", name)
        self.kernel.at(self.rng.uniform(0.5, 5.0), None, self._psctl, "undrain", name)

    def _stay(self) -> None:
        """Nobody drains any more: every partition gets its replicas back."""
        for name in self.world.names:
            self._psctl("undrain", name)

    def _psctl(self, verb: str, *arguments: Any) -> None:
        self.kernel.note(f"psctl {verb} {arguments}")
        self.kernel.spawn(self.operator, self._ask(verb, arguments), verb)

    async def _ask(self, verb: str, arguments: tuple[Any, ...]) -> None:
        try:
            await self.net.call(self.operator, "coordinator", "psctl", (verb, *arguments), 3.0)
        except ParameshError as error:
            self.kernel.note(f"psctl {verb} was refused: {error!r}")
            if verb == "undrain":  # a person would see that, and ask again, also when it is not there just now
                await self.kernel.sleep(1.0)
                self._psctl(verb, *arguments)

    # --- network ---

    def cut(self) -> None:
        """Between two, one way or both."""
        names = [*self.world.names, "coordinator"]
        one, other = self.rng.sample(names, 2)
        pairs = [(one, other)] if self.rng.random() < 0.5 else [(one, other), (other, one)]
        self.cut_off(pairs, self.rng.choice([0.5, 2.0, 4.0]) * self.rng.uniform(0.7, 1.3))

    def isolate(self) -> None:
        """One server from all others, and maybe the coordinator; clients may still reach it."""
        one = self.rng.choice(self.world.names)
        others = [name for name in self.world.names if name != one]
        if self.rng.random() < 0.6:
            others.append("coordinator")
        pairs = [(one, other) for other in others] + [(other, one) for other in others]
        self.cut_off(pairs, self.rng.uniform(0.5, 5.0))

    def cut_off(self, pairs: list[tuple[str, str]], seconds: float) -> None:
        """Nothing passes from the first to the second of each pair."""
        self.kernel.note(f"CUT {pairs} for {seconds:.2f}")
        self.net.cuts.update(dict.fromkeys(pairs))
        self.kernel.at(seconds, None, self.mend, pairs)

    def mend(self, pairs: list[tuple[str, str]]) -> None:
        """Everything passes again."""
        for pair in pairs:
            self.net.cuts.pop(pair, None)

    def reset(self) -> None:
        """A replication stream breaks."""
        self.net.reset()

    def storm(self) -> None:
        """Losses, doubles and delays for a while."""
        rng = self.rng
        self.net.weather = Weather(
            rng.choice([0, 0.02, 0.1]), rng.choice([0, 0.05]), rng.choice([0, 0.05, 0.3]), rng.choice([0.05, 0.5, 2.0])
        )
        self.kernel.note(f"STORM {self.net.weather}")
        self.kernel.at(rng.uniform(0.5, 3.0), None, self._calm)

    def _calm(self) -> None:
        self.net.weather = Weather()
