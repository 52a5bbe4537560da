"""What a run looks like, computed from a series of observations; pure.

    tracker = ProgressTracker(started=0.0)
    view = tracker.observe(Observation(at=1.5, ...))      # what the display shows
    summary = tracker.summary(at=60.0)                    # what is said at the end

Members that leave take their counters with them, so the tracker keeps the last it saw of each.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

__all__ = ["EpochView", "Group", "Observation", "ProgressTracker", "Server", "Summary", "View", "Worker"]

WINDOW_S = 5.0
"""Rates are over that long: shorter jumps with every poll, longer hides a stall."""


@dataclass(frozen=True)
class Worker:
    """A member of the ledger."""

    client_id: int
    rank: int
    slot: str
    activity: str
    """ "active", "between" or "idle"."""
    clock: int
    samples: int


@dataclass(frozen=True)
class Server:
    """A parameter server as the coordinator knows it; bytes are since its start."""

    name: str
    live: bool
    value_bytes: int
    bytes_in: int
    bytes_out: int
    in_per_s: float = 0.0
    out_per_s: float = 0.0


@dataclass(frozen=True)
class Group:
    """A table group: its mode and where it stands."""

    name: str
    mode: str
    """ "sync", "ssp", "async" or "local"."""
    next_step: int
    min_clock: int
    max_clock: int
    widest_gap: int
    staleness: int
    skipped: int
    waiting_for: tuple[int, ...]

    @property
    def clocked(self) -> bool:
        """Whether workers step by their own clocks rather than together."""
        return self.mode in ("ssp", "async")

    @property
    def gap(self) -> int:
        """How many steps the fastest worker's started clock is ahead of the slowest worker.

        The clocks count finished steps: in ssp a worker that has finished one more than the bound allows to
        start is held, so the step after it is not started.
        """
        ahead = max(0, self.max_clock - self.min_clock)
        return min(ahead, self.staleness) if self.mode == "ssp" else ahead


@dataclass(frozen=True)
class EpochView:
    """How much of an epoch is consumed."""

    dataset: str
    epoch: int
    length: int
    consumed: int


@dataclass(frozen=True)
class Observation:
    """One look at the cluster; parts that could not be asked are None."""

    at: float
    """Monotonic seconds."""
    phase: str | None = None
    workers: tuple[Worker, ...] | None = None
    groups: tuple[Group, ...] | None = None
    epochs: tuple[EpochView, ...] | None = None
    figures: tuple[tuple[str, float], ...] | None = None
    evictions: int | None = None
    servers: tuple[Server, ...] | None = None


@dataclass(frozen=True)
class View:
    """Everything that a display shows."""

    elapsed_s: float = 0.0
    phase: str = ""
    steps: int = 0
    """Steps decided; in ssp and async the clock of the fastest worker."""
    steps_per_s: float = 0.0
    samples: int = 0
    samples_per_s: float = 0.0
    workers: tuple[Worker, ...] = ()
    groups: tuple[Group, ...] = ()
    epochs: tuple[EpochView, ...] = ()
    figures: tuple[tuple[str, float], ...] = ()
    servers: tuple[Server, ...] = ()
    evictions: int = 0
    restarts: int = 0
    coordinator_away: bool = False
    """The coordinator does not answer; training goes on without it."""


@dataclass(frozen=True)
class Summary:
    """What a run came to."""

    wall_s: float
    steps: int
    """As in `View`."""
    steps_per_s: float
    """Over the time in which steps were made; 0 if that is unknown."""
    samples: int
    figures: tuple[tuple[str, float], ...]
    epochs: tuple[EpochView, ...]
    evictions: int
    restarts: int
    skipped: int
    server_bytes: int
    clocked: bool = False
    """Whether the steps are those of the fastest worker."""
    widest_gap: int = 0
    """With clocks: the widest that the workers were apart."""


@dataclass
class ProgressTracker:
    """Turns observations into views; see the module."""

    started: float
    """When the run began, in the observations' time."""
    view: View = field(default_factory=View)
    """The latest view; written by `observe` only."""
    restarts: int = 0
    """Restarts of workers; written by the launcher when the supervisor tells of one."""
    _seen: dict[int, Worker] = field(default_factory=dict)
    """The last that was seen of each member, present or not, by client id."""
    _epochs: dict[tuple[str, int], EpochView] = field(default_factory=dict)
    """The last that was seen of each epoch, by loader and number; those in between filled in."""
    _marks: deque[tuple[float, int, int]] = field(default_factory=deque)
    """(time, steps, samples) within the window, oldest first."""
    _traffic: deque[tuple[float, dict[str, tuple[int, int]]]] = field(default_factory=deque)
    """(time, bytes in and out by server) within the window."""
    _first: tuple[float, int] | None = None
    """(time, steps) just before the first progress."""
    _last: tuple[float, int] | None = None
    """(time, steps) at the last progress."""

    def observe(self, seen: Observation) -> View:
        """Take one look, return the new view; what the look lacks stays as it was."""
        old = self.view
        for worker in seen.workers or ():
            self._seen[worker.client_id] = worker
        view = replace(
            old,
            elapsed_s=seen.at - self.started,
            phase=old.phase if seen.phase is None else seen.phase,
            workers=old.workers if seen.workers is None else tuple(sorted(seen.workers, key=lambda w: w.rank)),
            groups=seen.groups or old.groups,
            epochs=self._all_epochs(seen.epochs or ()),
            figures=seen.figures or old.figures,
            evictions=old.evictions if seen.evictions is None else seen.evictions,
            restarts=self.restarts,
            coordinator_away=seen.servers is None,
        )
        steps = max(old.steps, self._steps(view.groups))
        samples = max(old.samples, self._samples(view.epochs))
        step_rate, sample_rate = self._rates(seen.at, steps, samples)
        self.view = replace(
            view,
            steps=steps,
            steps_per_s=step_rate,
            samples=samples,
            samples_per_s=sample_rate,
            servers=old.servers if seen.servers is None else self._with_traffic(seen.at, seen.servers),
        )
        return self.view

    def wait(self, at: float, phase: str | None = None) -> View:
        """Let time pass without a look, and perhaps name a new phase; return the new view."""
        self.view = replace(self.view, elapsed_s=at - self.started, phase=self.view.phase if phase is None else phase)
        return self.view

    def summary(self, at: float) -> Summary:
        """Sum the run up at time `at`."""
        rate = 0.0
        if self._first and self._last and self._last[0] > self._first[0]:
            rate = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        view = self.view
        return Summary(
            wall_s=at - self.started,
            steps=view.steps,
            steps_per_s=rate,
            samples=view.samples,
            figures=view.figures,
            epochs=view.epochs,
            evictions=view.evictions,
            restarts=self.restarts,
            skipped=sum(group.skipped for group in view.groups),
            server_bytes=sum(server.value_bytes for server in view.servers),
            clocked=any(group.clocked for group in view.groups),
            widest_gap=max((group.widest_gap for group in view.groups), default=0),
        )

    def _all_epochs(self, seen: tuple[EpochView, ...]) -> tuple[EpochView, ...]:
        """Add what is seen to the epochs known. The ledger forgets those that are over, and short ones begin
        and end between two looks: all before the latest of a loader are complete.
        """
        for epoch in seen:
            self._epochs[epoch.dataset, epoch.epoch] = epoch
        for latest in seen:
            for number in range(latest.epoch):
                known = self._epochs.get((latest.dataset, number), latest)
                self._epochs[latest.dataset, number] = replace(known, epoch=number, consumed=known.length)
        return tuple(self._epochs[key] for key in sorted(self._epochs))

    def _steps(self, groups: tuple[Group, ...]) -> int:
        """Steps of the group that is ahead: a GAN's two go hand in hand, their sum means nothing.

        With clocks, those of the fastest worker: a worker that comes or comes back starts at the slowest
        one's clock, so that the sum of clocks is not the number of steps either.
        """
        clock = max((worker.clock for worker in self._seen.values()), default=0)
        return max((clock if group.clocked else group.next_step for group in groups), default=0)

    def _samples(self, epochs: tuple[EpochView, ...]) -> int:
        """Samples consumed, as the epochs say; they outlive the members that did it."""
        return max(sum(epoch.consumed for epoch in epochs), sum(worker.samples for worker in self._seen.values()))

    def _rates(self, at: float, steps: int, samples: int) -> tuple[float, float]:
        if self._marks and steps > self._marks[-1][1]:
            self._first = self._first or self._marks[-1][:2]
            self._last = (at, steps)
        self._marks.append((at, steps, samples))
        # One mark older than the window stays, so that the rates are over the whole of it.
        while len(self._marks) > 2 and self._marks[1][0] <= at - WINDOW_S:
            self._marks.popleft()
        since, old_steps, old_samples = self._marks[0]
        passed = at - since
        if passed <= 0:
            return 0.0, 0.0
        return (steps - old_steps) / passed, (samples - old_samples) / passed

    def _with_traffic(self, at: float, servers: tuple[Server, ...]) -> tuple[Server, ...]:
        self._traffic.append((at, {each.name: (each.bytes_in, each.bytes_out) for each in servers}))
        while len(self._traffic) > 2 and self._traffic[1][0] <= at - WINDOW_S:
            self._traffic.popleft()
        since, then = self._traffic[0]
        passed = at - since
        if passed <= 0:
            return servers
        rated = []
        for each in servers:
            old_in, old_out = then.get(each.name, (each.bytes_in, each.bytes_out))
            rated.append(
                replace(
                    each,
                    in_per_s=max(0, each.bytes_in - old_in) / passed,
                    out_per_s=max(0, each.bytes_out - old_out) / passed,
                )
            )
        return tuple(rated)
