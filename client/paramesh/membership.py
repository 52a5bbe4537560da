"""A worker's membership in the cluster, and the door from synchronous code to its loop.

    positions = session.ensure_active()      # steps wait for me from here on
    record = session.call(session.client.ledger.ready(request), what="step 7")
    session.after_step("g0", 7, record)

Parts of the library that hold state per membership register themselves
(`session.register`) and are told when the worker becomes active, is evicted and rejoined,
or leaves. Which session a piece of code belongs to is asked of `paramesh.session`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from paramesh.config import ClientConfig
from paramesh.deliveries import Deliveries
from paramesh.departure import Departure
from paramesh.errors import ConfigError, Fenced, ParameshError, refuse
from paramesh.joining import CONNECT_S, GRACE_S, connect_and_join, say_goodbye
from paramesh.positions import Positions
from paramesh.registry import Registry
from paramesh.reporter import Reporter
from paramesh.roster import Roster
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1.types_pb2 import JobConfig, StepRecord
from paramesh.waiting import describe, wait

if TYPE_CHECKING:
    import concurrent.futures

    from paramesh.client import AsyncClient
    from paramesh.io import IoThread
    from paramesh.small_state import SmallState

__all__ = ["Participant", "Session"]

log = logging.getLogger(__name__)

T = TypeVar("T")

LEAVE_TIMEOUT = 5.0
"""Seconds that a clean exit spends on saying goodbye; a lost cluster must not hold it."""

REJOIN_GOODBYE_S = 1.5
"""Seconds for each half of the goodbye of a client in doubt; without it the timeout ends it."""


class Participant(Protocol):
    """What a `DistributedOptimizer` (or a test) registers at the session.

    Hooks run on the training thread. A participant without one of them is skipped there.
    """

    def on_active(self, positions: Mapping[int, lg.GroupPosition]) -> None:
        """The worker is ACTIVE: pull `next_step` of your group if you stand elsewhere."""

    def on_rejoined(self) -> None:
        """The membership was lost and renewed: what was staged or leased is gone."""

    def drain(self) -> None:
        """The worker leaves: return when everything pushed is applied."""


class Session:
    """One worker's membership. Made by `Session.join`, by tests with a client of their own.

    Attributes:
        config: the settings it joined with.
        client: the connection; replaced when the worker rejoins.
        job: what the whole cluster agreed on at its start.
        rank: this worker's; kept over restarts by the supervisor's slot.
        world_size: members as the ledger last told; `paramesh.world_size()` asks anew.
        membership: counts joins of this session, from 1; leases of an earlier one are gone.
        positions: for each group, where it stood when this worker last became ACTIVE.
        departure: `with session.departure.undisturbed()` brackets what SIGTERM must not cut.
        deliveries: samples that reached the loop and wait for a step.
        data: which epoch each loader's next loop is.
        steps: steps that this worker finished, over all groups.
    """

    def __init__(self, config: ClientConfig, io: IoThread, client: AsyncClient, joined: lg.JoinResponse):
        self.pid = os.getpid()
        self.config = config
        self.client = client
        self.deliveries = Deliveries()
        self.membership = 0
        self.steps = 0
        self.closed = False
        self._leaving = False
        self.departure = Departure()
        self._io = io
        self._participants: list[weakref.ref[Any]] = []
        """Registered objects, oldest first; dead ones are dropped when seen."""
        self._background: list[concurrent.futures.Future[Any]] = []
        """Tasks of this membership on the loop (the heart); cancelled when it ends."""
        self.rounds: dict[str, int] = {}
        """Next round of each named barrier or mean."""
        self._optimizers_made = 0
        """Optimizers without a name so far; only rises, so that the k-th is the same on every worker."""
        self.data = Positions(self)
        self.roster = Roster(self)
        self.reporter = Reporter(self)
        self.registry = Registry()
        self._open: set[object] = set()
        """Training loops being iterated; while there is one, this worker is not between."""
        self._small_state: SmallState | None = None
        self._adopt(joined)

    def _adopt(self, joined: lg.JoinResponse) -> None:
        self.rank: int = joined.rank
        self.world_size: int = joined.world_size
        self.job: JobConfig = joined.config
        self.positions: dict[int, lg.GroupPosition] = {p.group: p for p in joined.groups}
        self.membership += 1
        self._activity: int = lg.ACTIVITY_BETWEEN

    # ------------------------------------------------------------------ joining, leaving

    @classmethod
    def join(cls, config: ClientConfig) -> Session:
        """Connect, register as a client and join the ledger.

        Raises:
            ConfigError: the configuration names no cluster.
            Timeout: coordinator or ledger did not answer within `config.join_timeout`.
        """
        if config.alone:
            raise ConfigError("PARAMESH_COORDINATOR is not set; it names the coordinator as host:port")
        from paramesh.client import AsyncClient
        from paramesh.io import IoThread

        io = IoThread.get()
        client, joined = io.run(
            connect_and_join(AsyncClient, config, config.rank, connect_s=CONNECT_S),
            config.join_timeout + GRACE_S,
            f"the coordinator at {config.coordinators} and the ledger of job {config.job!r}",
        )
        session = cls(config, io, client, joined)
        session._start_heart()
        log.info("joined job=%s rank=%d world=%d", config.job, session.rank, session.world_size)
        return session

    def _start_heart(self) -> None:
        if self.config.supervised:
            return
        from paramesh.heart import beat

        self._background.append(self._io.submit(beat(self.client, self.config)))

    def _stop_background(self) -> None:
        for task in self._background:
            task.cancel()
        self._background.clear()

    def rejoin(self) -> None:
        """Join anew under a new client id; the slot asks for its old rank.

        After an eviction, or when the outcome of a push is unknown; then the old client leaves first.

        Leases, undelivered batches and staged contributions of the old membership are gone:
        participants hear `on_rejoined`, and loaders lease again.
        """
        self._check_pid()
        old = self.client
        log.warning(
            "%s client_id=%d rank=%d: rejoining", "in doubt" if old.spoiled else "evicted", old.client_id, self.rank
        )
        self._stop_background()
        if old.spoiled:  # nobody evicted it: its rank and its samples would be free only after its timeout
            with contextlib.suppress(ParameshError):
                self.call(say_goodbye(old, REJOIN_GOODBYE_S), "the old membership to end", LEAVE_TIMEOUT)
        self.client, joined = self.call(
            connect_and_join(type(old), self.config, self.rank),
            "the ledger to take this worker back",
            self.config.join_timeout + GRACE_S,
        )
        self.submit(old.close())
        self.deliveries.clear()
        self.data.look_again()
        self._adopt(joined)
        self._start_heart()
        self.small_state.on_rejoined()
        for participant in self.participants():
            _tell(participant, "on_rejoined")

    def leave(self, *, gracefully: bool = True) -> None:
        """End the membership; harmless when ended already or in a forked child.

        Args:
            gracefully: drain, return leases and deregister. False (a crash): only close, so
                that supervisor or heartbeat tell the coordinator what happened.
        """
        if self.closed or self._leaving or self.pid != os.getpid():
            return
        self._leaving = True
        try:
            if gracefully:
                if self._small_state is not None:
                    self._small_state.cut.between_steps()
                for participant in self.participants():
                    _tell(participant, "drain")
                self._io.run(say_goodbye(self.client), LEAVE_TIMEOUT, "the cluster to take note of leaving")
        except ParameshError as error:
            log.warning("left without goodbye reason=%s: %s", error.reason, error)
        finally:
            self.closed = True
            self._stop_background()
            with contextlib.suppress(ParameshError):
                self._io.run(self.client.close(), LEAVE_TIMEOUT, "channels to close")

    # ------------------------------------------------------------------ calling the loop

    def _check_pid(self) -> None:
        if self.pid != os.getpid():
            raise refuse(
                "FORKED",
                f"this session belongs to process {self.pid}; a forked child (a DataLoader worker, for "
                "example) cannot use it: call Paramesh in the training process only",
                pid=self.pid,
            )
        if self.closed:
            raise refuse("NOT_MEMBER", "this worker has left the cluster; paramesh.init() joins again")

    def submit(self, coro: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop without waiting for it."""
        try:
            self._check_pid()
        except ParameshError:
            coro.close()
            raise
        return self._io.submit(coro)

    def call(self, coro: Coroutine[Any, Any, T], what: str, timeout: float | None = None) -> T:
        """Run a coroutine on the loop and wait; Ctrl-C cancels it.

        Args:
            coro: the coroutine, with deadlines of its own where it needs them.
            what: what is waited for, such as "step 7": for the log and the error.
            timeout: seconds; None: as long as it takes, naming every 30 s who is missing.

        Raises:
            Timeout: DEADLINE, after `timeout`.
            StateRefused: FORKED in a forked child; NOT_MEMBER after `leave`.
        """
        return self.wait(self.submit(coro), what, timeout)

    def wait(self, future: concurrent.futures.Future[T], what: str, timeout: float | None = None) -> T:
        """Wait for what `submit` started, as `call` does."""
        return wait(future, what, timeout, self._who)

    def request(self, make: Callable[[], Coroutine[Any, Any, T]], what: str, timeout: float | None = None) -> T:
        """As `call`, and when this worker turns out to be evicted, rejoin and ask once more."""
        try:
            return self.call(make(), what, timeout)
        except Fenced:
            self.rejoin()
            return self.call(make(), what, timeout)

    def _who(self) -> str:
        """Who holds everybody up, from the ledger; never raises."""
        try:
            status = self.client.ledger.ledger_status(lg.LedgerStatusRequest())
            return describe(self._io.run(status, 2.0, "the ledger's status"))
        except Exception as error:
            return f"unknown, the ledger does not answer: {error}"

    # ------------------------------------------------------------------ activity

    @property
    def active(self) -> bool:
        """Whether steps wait for this worker."""
        return self._activity == lg.ACTIVITY_ACTIVE

    def ensure_active(self) -> dict[int, lg.GroupPosition]:
        """Make steps wait for this worker; called by `iter(loader)` and by the first `step()`.

        When that is a change, every participant's `on_active` runs before it returns, so that
        parameters are those of `next_step` before a gradient is computed.

        Returns:
            For each group number, where it stood when this worker became ACTIVE.
        """
        if not self.active:
            self._set_activity(lg.ACTIVITY_ACTIVE)
            try:
                for participant in self.participants():
                    _tell(participant, "on_active", self.positions)
                self.small_state.on_active(self.positions)
            except BaseException:
                self._activity = lg.ACTIVITY_UNSPECIFIED  # tell the ledger again next time
                raise
        self.small_state.cut.between_steps()
        return self.positions

    def set_between(self) -> None:
        """Say that this worker is between two loaders: a step waits for it once, briefly."""
        if self._activity != lg.ACTIVITY_BETWEEN:
            self._set_activity(lg.ACTIVITY_BETWEEN)

    def set_idle(self) -> None:
        """Say that no step is to wait for this worker until it is active again."""
        if self._activity != lg.ACTIVITY_IDLE:
            self._set_activity(lg.ACTIVITY_IDLE)

    def end_pause(self) -> None:
        """If this worker is idle, be between: it asks for data again."""
        if self._activity == lg.ACTIVITY_IDLE:
            self._set_activity(lg.ACTIVITY_BETWEEN)

    def forget_activity(self) -> None:
        """Note that the ledger may have made this worker BETWEEN (it waited in a lease)."""
        if self.active:
            self._activity = lg.ACTIVITY_UNSPECIFIED

    def opened(self, loop: object, *, training: bool) -> None:
        """A loop over a loader begins; steps wait for one that evaluates but briefly."""
        if training:
            self._open.add(loop)
        else:
            self.set_between()

    def ended(self, loop: object) -> None:
        """A loop over a loader ended; after the last one, this worker is between."""
        self._open.discard(loop)
        if self.closed or self._open:
            return
        try:
            self.set_between()
        except ParameshError as error:  # runs in `finally`: the loop's own error comes first
            log.warning("end of a loop not noted reason=%s: %s", error.reason, error)

    def catch_up(self) -> None:
        """Bring parameters to where the others' last steps left them, at the end of an epoch.

        Loops end together, but the last step may have been another worker's alone: without
        this, workers would evaluate different models.
        """
        if not (self.closed or self._open):
            for participant in self.participants():
                _tell(participant, "on_active", {})

    def _set_activity(self, activity: int) -> None:
        value = lg.Activity.ValueType(activity)
        response = self.request(
            lambda: self.client.ledger.set_activity(lg.SetActivityRequest(activity=value)),
            "the ledger to note this worker's activity",
        )
        self._activity = activity
        self.world_size = response.world_size or self.world_size
        self.positions = {position.group: position for position in response.groups}

    # ------------------------------------------------------------------ hooks

    def register(self, participant: object) -> None:
        """Tell an object about this membership from now on; held weakly."""
        self._participants.append(weakref.ref(participant))
        if hasattr(participant, "param_groups"):
            self.registry.remember(participant)

    def participants(self) -> list[Any]:
        """The registered objects that still live, oldest first."""
        alive = [(ref, ref()) for ref in self._participants]
        self._participants = [ref for ref, target in alive if target is not None]
        return [target for _, target in alive if target is not None]

    @property
    def optimizers(self) -> list[Any]:
        """The `DistributedOptimizer`s that still live, oldest first."""
        return self.registry.optimizers

    def after_step(self, group: int, step: int, record: StepRecord | None = None) -> None:
        """Called by the optimizer at the end of `step()`, with all parameters in place.

        Args:
            group: the table group's number at the ledger.
            step: the step (sync, local) or clock (async, ssp) that it finished, from 0.
            record: the ledger's decision; None in async and ssp.
        """
        self.steps += 1
        if record is not None and record.contributors:
            self.world_size = max(1, len(record.contributors))
        self.small_state.after_step(group, step, record)

    def next_optimizer_name(self) -> str:
        """The name of the next optimizer that was given none: by order of construction."""
        self._optimizers_made += 1
        return f"optimizer{self._optimizers_made - 1}"

    def next_round(self, name: str) -> int:
        """The next round of a named barrier or mean, from 0."""
        number = self.rounds.get(name, 0)
        self.rounds[name] = number + 1
        return number

    def skip_rounds(self, rounds: Mapping[str, int]) -> None:
        """Go on where the others are in barriers and means; never back."""
        for name, number in rounds.items():
            self.rounds[name] = max(number, self.rounds.get(name, 0))

    @property
    def small_state(self) -> SmallState:
        """The keeper of schedulers and the like; imports torch."""
        if self._small_state is None:
            from paramesh.small_state import SmallState

            self._small_state = SmallState(self)
        return self._small_state


def _tell(participant: object, event: str, *arguments: object) -> None:
    hook = getattr(participant, event, None)
    if hook is not None:
        hook(*arguments)
