"""One table group of one optimizer at one session: tables, first values, position, pulls.

    exchange = SyncExchange(session, settings, tables)
    exchange.catch_up(position)        # before a gradient is computed: open, first values, pull
    exchange.step(contribution)        # after: push, decide, pull

The modes differ in `step` only: `exchange_sync`, `exchange_async` (ssp too), `exchange_local`. All methods
run on the training thread; coroutines named `_..._on_loop` are handed to the IO thread, where nothing
but buffers is touched.
"""

from __future__ import annotations

import enum
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paramesh.edits import Edits, partition_bytes
from paramesh.encoded import Encoded, SlotWrite, Snapshot
from paramesh.errors import ParameshError
from paramesh.hyper import Value, difference, to_protos
from paramesh.mismatch import first_difference
from paramesh.options import check_settings
from paramesh.routing import schema_digest
from paramesh.tensors import HostCopies, Scatter, TablePlan
from paramesh.v1 import ledger_pb2, types_pb2

if TYPE_CHECKING:
    import torch

    from paramesh.client import AsyncClient
    from paramesh.membership import Session
    from paramesh.v1.parameter_server_pb2 import PullHeader

log = logging.getLogger(__name__)

MODES: dict[str, ledger_pb2.Mode.ValueType] = {
    "sync": ledger_pb2.MODE_SYNC,
    "ssp": ledger_pb2.MODE_SSP,
    "async": ledger_pb2.MODE_ASYNC,
    "local": ledger_pb2.MODE_LOCAL,
}

REDUCTIONS: dict[str, types_pb2.LossReduction.ValueType] = {
    "mean": types_pb2.LOSS_REDUCTION_MEAN,
    "sum": types_pb2.LOSS_REDUCTION_SUM,
}

PULL_TRIES = 20
"""Pulls at a position that steps of others overtake; only a worker that is not ACTIVE can be overtaken."""


@dataclass(frozen=True)
class GroupSettings:
    """How a table group trains; equal on every worker."""

    name: str
    """Unique in the job."""
    mode: str = "sync"
    """A key of `MODES`."""
    staleness: int = 4
    """Bound on the drift of clocks, ssp only."""
    every: int = 1
    """Local steps between exchanges, local only."""
    backup_workers: int = 0
    """A step takes the first N minus this many contributions."""
    loss_reduction: str = "mean"
    """A key of `REDUCTIONS`."""
    max_grad_norm: float | None = None
    """Bound on the global gradient's norm; None: no clipping."""
    speculate: bool = False
    """Push gradients during backward; sync only."""


@dataclass
class Table:
    """One table of the group."""

    plan: TablePlan
    settings: Callable[[], Mapping[str, Value]]
    """The hyper-parameters that hold now."""
    sent: dict[str, Value] = field(default_factory=dict)
    """Those that this membership has sent; what differs goes with the next step."""


@dataclass
class Contribution:
    """What one worker brings to one step."""

    gradients: Sequence[Sequence[torch.Tensor | None]]
    """Per table and parameter; None: absent."""
    weight: float = 1.0
    """Finite and above 0."""
    samples: Sequence[types_pb2.SampleRange] = ()
    """Ranges that the step consumes."""
    skip: bool = False
    """An inf was found under AMP: nothing is applied anywhere."""
    told: bool = False
    """Set once the ledger was told: what becomes of `samples` is its decision, whatever happens here."""


@dataclass
class Outcome:
    """What became of a step."""

    step: int
    """The step or clock that was finished."""
    skipped: bool = False
    """Nothing was applied: somebody found an inf."""
    record: types_pb2.StepRecord | None = None
    """The ledger's decision, in sync and local."""


class Resumed(enum.Enum):
    """What became of a step that an error had cut off."""

    NOTHING = enum.auto()
    """There was none."""
    OPEN = enum.auto()
    """It is undecided: the next contribution is for it, and replaces what was given."""
    ENDED = enum.auto()
    """It is over, and its values are here."""


class Exchange(ABC):
    """Base of all modes.

    Args:
        session: The membership; its client may be replaced by a rejoin at any step boundary.
        settings: How the group trains.
        tables: Its tables, in the same order on every worker.
    """

    def __init__(self, session: Session, settings: GroupSettings, tables: Sequence[Table]):
        self.session = session
        self.settings = settings
        self.tables = list(tables)
        self.group = 0
        """The ledger's number of the group."""
        self.position: int | None = None
        """The step that the parameters stand at the start of; None before the first pull."""
        self.open = False
        """Whether this membership has declared the group."""
        self.initialise: Callable[[int], Mapping[int, Sequence[SlotWrite]]] = self.values_to_assign
        """Given the init attempt, what the owner of first values writes; replaced to add loaded state."""
        plans = [table.plan for table in self.tables]
        self.host = HostCopies()
        self.scatter = Scatter(plans)
        self.edits = Edits(plans)

    # ------------------------------------------------------------------ what modes implement

    @abstractmethod
    def step(self, contribution: Contribution) -> Outcome:
        """Gives a contribution, returns with the parameters of the next step in place."""

    @abstractmethod
    async def snapshot_on_loop(self) -> dict[int, Snapshot]:
        """Returns cuts of all partitions at this worker's position."""

    @abstractmethod
    def pull_now(self, position: ledger_pb2.GroupPosition) -> None:
        """Pulls the parameters that a worker needs that stands at a group's position."""

    def take_assigned(self) -> None:
        """Pulls what the chief has assigned, once it is done."""
        self.edits.forget()
        self.pull_now(self.reopen())

    # ------------------------------------------------------------------ joining a group

    @property
    def client(self) -> AsyncClient:
        """The session's connection of now."""
        return self.session.client

    @property
    def partitions(self) -> list[int]:
        """Ids of all partitions of the group."""
        return [partition for table in self.tables for partition in table.plan.partitions]

    def catch_up(self, position: ledger_pb2.GroupPosition | None) -> None:
        """Makes the parameters those of the group's position.

        Args:
            position: Where the group stands, None if the ledger has not told (it was not open then).

        Raises:
            TensorMismatch: This worker's model differs from the group's; names the first difference.
        """
        if not self.open:
            position = self.session.call(self._open_on_loop(), f"group {self.settings.name!r} to open")
            self.open = True
            self.opened()
        if position is None:
            position = self.reopen()
        if self.needs_pull(position):
            self.edits.check()  # the pull would undo them silently
            self.pull_now(position)

    def opened(self) -> None:  # noqa: B027 - a hook that most modes have no use for
        """Called when the group is open and its tables are placed."""

    def resume(self, may_replace: bool) -> Resumed:
        """Ends a step that an error cut off after the ledger was told.

        Args:
            may_replace: If it is undecided still, leave it open for another contribution.
        """
        return Resumed.NOTHING

    def refused(self) -> None:  # noqa: B027 - only sync pushes before `step`
        """A contribution is not given: what backward has pushed of it is nobody's."""

    def finish(self) -> None:  # noqa: B027 - only an overlapped pull outlives its step
        """Returns when all values are in place."""

    def needs_pull(self, position: ledger_pb2.GroupPosition) -> bool:
        """Whether a worker that is required from a group's position on must pull first."""
        return self.position is None or self.position != position.next_step

    def forget_membership(self) -> None:
        """The membership ended: what this worker told the ledger is gone."""
        self.open = False
        self.position = None
        for table in self.tables:
            table.sent = {}

    def reopen(self) -> ledger_pb2.GroupPosition:
        """Asks the ledger where the group stands."""
        request = ledger_pb2.OpenGroupRequest(spec=self.spec())
        return self.session.call(self.client.ledger.open_group(request), "the group's position").position

    def spec(self) -> ledger_pb2.GroupSpec:
        """Returns what the ledger knows of the group; tables must have been placed."""
        s = self.settings
        return ledger_pb2.GroupSpec(
            name=s.name,
            mode=MODES[s.mode],
            staleness=s.staleness,
            every=s.every,
            backup_workers=s.backup_workers,
            loss_reduction=REDUCTIONS[s.loss_reduction],
            max_grad_norm=s.max_grad_norm or 0.0,
            structure_digest=structure_digest([table.plan for table in self.tables]),
            tensor_names=[name for table in self.tables for name in table.plan.names],
            partitions=self.partitions,
        )

    async def _open_on_loop(self) -> ledger_pb2.GroupPosition:
        for table in self.tables:
            await self._place_on_loop(table.plan)
        self.scatter = Scatter([table.plan for table in self.tables])
        ledger = self.client.ledger
        opened = await ledger.open_group(ledger_pb2.OpenGroupRequest(spec=self.spec()))
        self.group = opened.group
        if opened.initialised:
            return opened.position
        await self._first_values_on_loop()
        return (await ledger.open_group(ledger_pb2.OpenGroupRequest(spec=self.spec()))).position

    async def _place_on_loop(self, plan: TablePlan) -> None:
        """Creates the table, or finds the one that another worker created, and notes its numbers."""
        try:
            table_id = await self.client.create_table(plan.spec)
        except ParameshError as error:
            if error.reason != "SCHEMA":
                raise
            raise await self._mismatch_on_loop(plan, error) from error
        entry = self.client.routes.table(plan.spec.name)
        plan.place(table_id, entry.first_partition)

    async def _mismatch_on_loop(self, plan: TablePlan, error: ParameshError) -> ParameshError:
        """Turns "another schema" into the first tensor that differs."""
        entry = self.client.routes.table(plan.spec.name)
        theirs = await self.client.describe_table(entry.table_id)
        return first_difference(plan.spec, theirs) or error

    async def _first_values_on_loop(self) -> None:
        """Waits until first values are there, or writes them when this worker is their owner."""
        ledger = self.client.ledger
        while True:
            answer = await ledger.await_init(ledger_pb2.AwaitInitRequest(group=self.group))
            if answer.initialised:
                return
            if not answer.owner:
                continue
            writes = self.initialise(answer.init_attempt)
            await self.client.assign(writes, init_attempt=answer.init_attempt)
            await ledger.commit_init(ledger_pb2.CommitInitRequest(group=self.group, init_attempt=answer.init_attempt))
            log.info("first values group=%s owner_rank=%d", self.settings.name, self.session.rank)
            return

    # ------------------------------------------------------------------ values

    def values_to_assign(self, init_attempt: int = 0) -> dict[int, list[SlotWrite]]:
        """Returns this worker's parameters as writes, per partition."""
        writes: dict[int, list[SlotWrite]] = {}
        for table in self.tables:
            flats = HostCopies().flats(table.plan.parameters)
            for partition in table.plan.partitions:
                writes[partition] = [SlotWrite(partition_bytes(table.plan, partition, flats).data)]
        return writes

    def sink(self, partition: int, header: PullHeader, payload: memoryview) -> None:
        """Takes one pulled frame; runs on the IO thread."""
        self.scatter.write(partition, header.frame.offset, payload)
        self.edits.note(partition, header.frame)

    def before_pull(self) -> None:
        """Looks where parameters lie, on the training thread."""
        self.edits.begin()
        self.scatter.prepare()

    def after_pull(self) -> None:
        """Makes pulled values visible and takes note of them, on the training thread."""
        self.scatter.finish()
        self.edits.remember()

    # ------------------------------------------------------------------ hyper-parameters

    def changed_settings(self) -> list[tuple[Table, dict[str, Value], dict[str, Value]]]:
        """Returns (table, all settings, those changed since last sent), for tables with a change.

        Raises:
            ParameshError: HYPER_PARAMETER, torch does not take them: no server could apply the step.
        """
        found = []
        for table in self.tables:
            current = dict(table.settings())
            changed = difference(table.sent, current)
            if changed:
                check_settings(table.plan.spec.optimizer.class_name, current)
                found.append((table, current, changed))
        return found


def gathered(
    tables: Sequence[Table], contribution: Contribution, host: HostCopies
) -> Iterator[tuple[int, bytes, list[tuple[int, memoryview]]]]:
    """Yields (partition, presence, bytes); with `skip` nothing is present, and no bytes travel."""
    flats = host.flats([] if contribution.skip else _as_parameters(tables, contribution.gradients))
    first = 0
    for table in tables:
        count = len(table.plan.parameters)
        mine = [None] * count if contribution.skip else flats[first : first + count]
        first += count
        for partition in table.plan.partitions:
            yield partition, *table.plan.gather(partition, mine)


def _as_parameters(
    tables: Sequence[Table], gradients: Sequence[Sequence[torch.Tensor | None]]
) -> list[torch.Tensor | None]:
    """Returns gradients in their parameters' dtype, one after the other."""
    return [
        gradient if gradient is None or gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)
        for table, row in zip(tables, gradients, strict=True)
        for parameter, gradient in zip(table.plan.parameters, row, strict=True)
    ]


def encode(tables: Sequence[Table], contribution: Contribution, host: HostCopies) -> dict[int, Encoded]:
    """Returns a contribution per partition; copies nothing yet."""
    return {
        partition: Encoded.from_parts(partition, presence, parts)
        for partition, presence, parts in gathered(tables, contribution, host)
    }


def as_messages(
    changes: Sequence[tuple[Table, dict[str, Value], dict[str, Value]]],
) -> list[types_pb2.TableHyperParameters]:
    """Returns changed settings as a Ready or a push carries them."""
    return [
        types_pb2.TableHyperParameters(table_id=table.plan.table_id, hyper_parameters=to_protos(changed))
        for table, _, changed in changes
    ]


def structure_digest(plans: Sequence[TablePlan]) -> bytes:
    """Returns sha256 over the schemas: names, shapes, dtypes, optimizer classes, in order."""
    digest = hashlib.sha256()
    for plan in plans:
        digest.update(schema_digest(plan.spec))
    return digest.digest()
