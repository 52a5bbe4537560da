"""What ties an optimizer to a session: its table groups, and the order of things at each step.

    attachment = Attachment(session, inner, model, options)
    attachment.on_active(positions)       # iter(loader), or the first step: first values, pull
    attachment.step(weight, amp)          # all groups of the optimizer, one after the other

An optimizer has one table group to begin with. Each `add_param_group` after training began adds
one (a group's tables are fixed once it is open), and so does `sync_buffers="mean"`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from paramesh.amp import AmpState
from paramesh.buffers import BufferExchange
from paramesh.encoded import SlotWrite
from paramesh.errors import ConfigError, Fenced, ParameshError
from paramesh.exchange import Contribution, Exchange, GroupSettings, Resumed, Table
from paramesh.exchange_async import AsyncExchange
from paramesh.exchange_local import LocalExchange
from paramesh.exchange_sync import SyncExchange
from paramesh.gradients import Judge, contribution_of, gradients_of, with_gradient
from paramesh.hyper import Value, to_protos
from paramesh.optimizer_state import State, first_values_with, state_of
from paramesh.options import ACKS, NON_FINITE, Options, check_settings, outer_optimizer, settings_of
from paramesh.overlap import Overlap
from paramesh.profiling import phase
from paramesh.runtime import barrier, is_chief
from paramesh.tensors import TablePlan, named_parameters
from paramesh.v1 import ledger_pb2, types_pb2

if TYPE_CHECKING:
    from paramesh.membership import Session

log = logging.getLogger(__name__)


class Attachment:
    """One optimizer at one session.

    Args:
        session: The membership.
        inner: The user's optimizer.
        model: What names its parameters, and whose buffers may be averaged.
        options: How it trains.
        run_inner: Makes one plain step of `inner`, for local mode.
    """

    def __init__(
        self,
        session: Session,
        inner: torch.optim.Optimizer,
        model: torch.nn.Module,
        options: Options,
        run_inner: Callable[[], None],
    ):
        self.session = session
        self._run_inner = run_inner
        self._local_steps = 0
        """Local mode: steps since the last exchange."""
        self._left: list[tuple[Exchange, Contribution]] = []
        """Groups that the last step did not come to, as an error cut it off before: the others have stepped them."""
        self._unsettled: Sequence[types_pb2.SampleRange] = ()
        """Samples of the last step, if an error cut it off after the ledger was told."""
        self.inner = inner
        self.model = model
        self.options = options
        self._judge = Judge(options.non_finite)
        self.name = options.name or session.next_optimizer_name()
        self.main: list[Exchange] = [self._exchange(self.name, range(len(inner.param_groups)))]
        """Exchanges of parameters, the first one's groups first."""
        self._loaded: State = {}
        """Optimizer state that was loaded before the first step; first values carry it."""
        self._overlap: Overlap | None = None
        if options.overlap_pull and options.mode == "sync":
            self._overlap = Overlap(model, [e for e in self.main if isinstance(e, SyncExchange)])
            self._overlap.watch()
        self.buffers: BufferExchange | None = None
        if options.sync_buffers == "mean":
            self.buffers = BufferExchange.of(session, f"{self.name}/buffers", model)

    @property
    def exchanges(self) -> list[Exchange]:
        """All, in the order in which every worker steps them."""
        return [*self.main, *([self.buffers] if self.buffers is not None else [])]

    # ------------------------------------------------------------------ tables

    def _exchange(self, name: str, groups: Sequence[int]) -> Exchange:
        o = self.options
        settings = GroupSettings(
            name,
            o.mode,
            o.staleness,
            o.every,
            o.backup_workers,
            o.loss_reduction,
            o.max_grad_norm,
            speculate=o.speculate and o.mode == "sync",
        )
        named = named_parameters(self.model, self.inner.param_groups)
        tables = [self._table(f"{self.name}/{i}", name, named[i], i) for i in groups]
        kept = [table for table in tables if table.plan.parameters]
        if not kept:
            raise ConfigError("the optimizer has no parameter with an element in it")
        if o.mode == "local":
            return LocalExchange(self.session, settings, kept)
        if o.mode == "sync":
            return SyncExchange(self.session, settings, kept)
        return AsyncExchange(self.session, settings, kept)

    def _table(self, name: str, group: str, named: Sequence[tuple[str, torch.nn.Parameter]], index: int) -> Table:
        class_name, settings = type(self.inner).__name__, self._settings_of(index)
        if self.options.mode == "local":
            class_name, outer = outer_optimizer(self.options.outer)
            settings = lambda: outer  # noqa: E731 - fixed, where the other reads what schedulers change
        check_settings(class_name, settings())  # torch looks at the defaults only, not at what a group has itself
        spec = types_pb2.OptimizerSpec(class_name=class_name, hyper_parameters=to_protos(settings()))
        plan = TablePlan(name, group, named, spec, self.options.partition_bytes)
        plan.spec.non_finite = NON_FINITE[self.options.non_finite]
        plan.spec.acks = ACKS[self.options.acks]
        return Table(plan, settings)

    def _settings_of(self, index: int) -> Callable[[], Mapping[str, Value]]:
        return lambda: settings_of(self.inner, index)

    def add_group(self, index: int) -> None:
        """A param group was added: it becomes a table, in a group of its own once training began."""
        if not any(exchange.open for exchange in self.main):
            self.main = [self._exchange(self.name, range(index + 1))]
            self.take_loaded(self._loaded)
            if self._overlap is not None:
                self._overlap.exchanges = [e for e in self.main if isinstance(e, SyncExchange)]
            return
        if self.options.max_grad_norm is not None:
            raise ConfigError(
                "add_param_group after the first step cannot be combined with max_grad_norm: one norm over "
                "both would need one table group, and a group's tables are fixed. Add it before the first step"
            )
        added = self._exchange(f"{self.name}/{index}", [index])
        self.main.append(added)
        if self._overlap is not None and isinstance(added, SyncExchange):
            self._overlap.exchanges.append(added)

    # ------------------------------------------------------------------ where the group stands

    def on_active(self, positions: Mapping[int, ledger_pb2.GroupPosition]) -> None:
        """Makes all parameters those of the step from which this worker is required."""
        for exchange in self.exchanges:
            exchange.catch_up(positions.get(exchange.group) if exchange.open else None)

    def on_rejoined(self) -> None:
        """The membership is a new one."""
        self._local_steps, self._left = 0, []  # they are dropped, as their samples go back
        for exchange in self.exchanges:
            exchange.forget_membership()

    def _become_active(self) -> bool:
        """Makes steps wait for this worker; pulls if a group is elsewhere than its parameters.

        Returns:
            Whether it turned out to be evicted, and has joined anew: gradients and samples are gone.
        """
        try:
            self.session.ensure_active()
            self._open_all()
        except Fenced:
            self._rejoin()
            return True
        return False

    def _open_all(self) -> None:
        """Groups that were made after this worker became active (an added param group) open now."""
        for exchange in self.exchanges:
            if not exchange.open:
                exchange.catch_up(None)

    def _finish(self) -> None:
        """Steps that were cut off end, values that are still arriving arrive; the evicted rejoins."""
        try:
            for exchange in self.exchanges:
                # Later groups' steps are other workers' past: there, what was given stays.
                self._resumed(exchange.resume(may_replace=exchange is self.main[0]))
                exchange.finish()
            while self._left:
                exchange, contribution = self._left[0]
                if not contribution.told:
                    exchange.step(contribution)
                    exchange.finish()
                self._left.pop(0)
        except Fenced:
            self._rejoin()

    def _resumed(self, what: Resumed) -> None:
        if what is Resumed.OPEN:  # the next try is for all groups and samples again
            self._left = []
            self.session.deliveries.restore(self._unsettled, self.name)
        elif what is Resumed.ENDED:
            self._local_steps = 0  # exchanged by now

    def drain(self) -> None:
        """Returns when everything pushed is applied and everything pulled is in place."""
        for exchange in self.exchanges:
            exchange.finish()

    def _rejoin(self) -> None:
        """This worker was evicted: it joins anew and pulls; what it computed is dropped."""
        self.session.rejoin()
        self.session.ensure_active()
        self._open_all()

    # ------------------------------------------------------------------ the step

    def step(self, weight: float | None, amp: AmpState) -> bool:
        """One step of all groups.

        Args:
            weight: Of this contribution; None: samples delivered since the last step, else 1.
            amp: What a GradScaler set.

        Returns:
            Whether the step was skipped (an inf on some worker).
        """
        before = {exchange: exchange.position for exchange in self.main}
        self._finish()
        for exchange in self.main:
            exchange.edits.check()
        rejoined = self._become_active()
        rejoined = self.session.deliveries.lost(self.name) or rejoined
        if self.options.mode == "local" and not rejoined:
            return self._local_step(weight, amp)
        ranges, counted = self.session.deliveries.take(self.name)
        if rejoined or not self._still_counts(before, ranges):
            self._give_back(ranges)
            return False
        try:
            contributions = self._contributions(amp)
        except ParameshError:
            self.session.deliveries.restore(ranges, self.name)  # nobody was told: they are the next step's
            raise
        return self._give(contributions, ranges, counted if weight is None else weight)

    def _still_counts(self, before: Mapping[Exchange, int | None], ranges: Sequence[types_pb2.SampleRange]) -> bool:
        """Whether a gradient counts although its parameters may just have been replaced by newer ones.

        At step 0 it does: all workers begin there. A joiner's does not: it belongs to first values of its
        own. A member's counts in the asynchronous modes, and when samples hang on it (an epoch's remainder,
        stepped after its loader ended): they count in exactly one step, and a gradient a few steps old
        beats none.
        """
        moved = [e for e in self.main if e.position != before[e] and (before[e] is not None or e.position)]
        if not moved:
            return True
        joined = any(before[exchange] is None for exchange in moved)
        counts = not joined and (bool(ranges) or self.options.mode != "sync")
        log.info("moved group=%s step=%s gradient_counts=%s", self.name, self.main[0].position, counts)
        return counts

    def _local_step(self, weight: float | None, amp: AmpState) -> bool:
        """A step of the user's optimizer on this worker, and after `every` of them an exchange."""
        inf = amp.inf
        if not inf:
            having = with_gradient(self.inner)
            amp.unscale([p.grad for p in having if p.grad is not None])
            # Before this worker's optimizer takes it in: momentum that is NaN would outlive every exchange.
            local = [Contribution(gradients_of(exchange)) for exchange in self.main]
            inf = self._judge.skips(self.main, local, amp=amp.found_inf is not None, stored=False)
        if not inf:
            if self.options.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(having, self.options.max_grad_norm)
            self._run_inner()
        self._local_steps += 1
        if self._local_steps >= self.options.every:
            deltas = self._deltas()
            ranges, counted = self.session.deliveries.take(self.name)
            self._give(deltas, ranges, counted if weight is None else weight)
            self._local_steps = 0
        return inf

    def _deltas(self) -> list[Contribution]:
        """What local steps changed. If that is refused they are undone here, so that the next ones may count."""
        local = [exchange for exchange in self.main if isinstance(exchange, LocalExchange)]
        deltas = [Contribution(exchange.deltas()) for exchange in local]
        try:
            skip = self._judge.skips(local, deltas, of="the change by local steps of")
        except ParameshError:
            self._local_steps = 0
            for exchange in local:
                exchange.undo_local_steps()
            raise
        for contribution in deltas:
            contribution.skip = skip
        return deltas

    def _give(
        self, contributions: Sequence[Contribution], ranges: Sequence[types_pb2.SampleRange], weight: float
    ) -> bool:
        """Steps every group with its contribution; an evicted worker's counts nowhere, and it rejoins."""
        contributions[0].samples = ranges
        buffers = Contribution([])
        for contribution in [*contributions, buffers]:
            contribution.weight = weight
        skipped = False
        try:
            for exchange, contribution in zip(self.main, contributions, strict=True):
                if self._overlap is not None and isinstance(exchange, SyncExchange):
                    exchange.overlap = self._overlap.active
                outcome = exchange.step(contribution)
                skipped = skipped or outcome.skipped
                if exchange is self.main[0]:
                    contribution.told = True  # the ranges count
                    self.session.after_step(exchange.group, outcome.step, outcome.record)
            if self._overlap is not None:
                self._overlap.stepped()
            if self.buffers is not None:
                self.buffers.step(buffers)
        except Fenced as error:
            log.warning("evicted during a step group=%s why=%s", self.name, error)
            self._rejoin()
        except BaseException:
            if not contributions[0].told:
                self.session.deliveries.restore(ranges, self.name)
            elif self.options.mode in ("sync", "local"):
                given = zip(self.exchanges, [*contributions, buffers], strict=False)
                self._left, self._unsettled = [(e, c) for e, c in given if not c.told], ranges
            raise
        return skipped

    def _contributions(self, amp: AmpState) -> list[Contribution]:
        """All groups' gradients. Unscaled in one go: the scale is used up by it."""
        inf = amp.inf
        contributions = [contribution_of(exchange, inf) for exchange in self.main]
        if not inf:
            with phase("unscale"):
                amp.unscale([g for c in contributions for row in c.gradients for g in row if g is not None])
            if self._judge.skips(self.main, contributions, amp=amp.found_inf is not None):
                for contribution in contributions:
                    contribution.skip = True
        return contributions

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients only accumulate meanwhile: count them, do not push."""
        watching = [s for e in self.main if isinstance(e, SyncExchange) and (s := e.speculation) is not None]
        for speculation in watching:
            speculation.paused = True
        try:
            yield
        finally:
            for speculation in watching:
                speculation.paused = False

    def _give_back(self, ranges: Sequence[types_pb2.SampleRange]) -> None:
        """Returns the samples of a gradient that counts nowhere: others train on them."""
        for dataset, epoch in sorted({(r.dataset, r.epoch) for r in ranges}):
            leases = [r for r in ranges if (r.dataset, r.epoch) == (dataset, epoch)]
            request = ledger_pb2.ReturnLeasesRequest(dataset=dataset, epoch=epoch, leases=leases)
            try:
                self.session.call(self.session.client.ledger.return_leases(request), "leases to return", 10.0)
            except ParameshError as error:  # they return at the latest when this membership ends
                log.warning("leases not returned dataset=%s why=%s", dataset, error)

    # ------------------------------------------------------------------ values and state

    def snapshot(self, exchange: Exchange) -> State:
        """Returns optimizer state per parameter at one committed step; empty before the first one.

        A worker that is not ACTIVE becomes so meanwhile: else steps of the others would tear the cut.
        """
        if exchange.position is None:
            return {}
        self._finish()
        was_active = self.session.active
        if self.options.mode == "sync":
            self._become_active()
        try:
            cuts = self.session.call(exchange.snapshot_on_loop(), "the optimizer's state")
        finally:
            if not was_active:
                self.session.set_between()
        return state_of(exchange, cuts)

    def take_loaded(self, state: State) -> None:
        """Keeps loaded optimizer state until this worker turns out to own first values."""
        self._loaded = state
        for exchange in self.main:
            if state and exchange.position is None:
                exchange.initialise = first_values_with(exchange, state)

    def assign(self, exchange: Exchange, writes: Mapping[int, Sequence[SlotWrite]]) -> None:
        """The chief writes to the servers, all wait for it and pull. Every worker must call it."""
        if is_chief() and writes:
            self.session.call(self.session.client.assign(writes), "values to be assigned")
        barrier(f"assign/{exchange.settings.name}")
        exchange.take_assigned()
