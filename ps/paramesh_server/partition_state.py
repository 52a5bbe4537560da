"""What one partition of a dense table is: values, optimizer, log, memory of clients. Pure.

    state.replay(record)                 # a follower: the same bits as at the primary
    state.capture(), state.cut()         # a snapshot, and
    fresh.restore(captured, writes)      # what it says again

`Partition` adds what a primary is asked for. The state is a function of the log's records:
a primary changes it as it appends one, a follower as it replays one.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from paramesh import hyper
from paramesh.errors import refuse
from paramesh.routing import PartitionLayout
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from paramesh_server.aggregate import Part, Reduction, Workspace, flat_views, sum_parts
from paramesh_server.dedup import Dedup, Entry
from paramesh_server.finite import passes
from paramesh_server.log import Log, Position, Record, RecordHeader
from paramesh_server.optimizer import PartitionOptimizer, Setting
from paramesh_server.records import (
    LOST,
    Made,
    read_assign,
    read_noop,
    read_push,
    read_step,
)
from paramesh_server.requests import Update
from paramesh_server.staging import Budget, Contribution, Staging
from paramesh_server.writes import SlotBytes, SlotFrame, cut_slots, plan_writes, tensor_bytes


class PartitionState:
    """One replica of one partition.

    Attributes:
        id: the partition's number in the job.
        layout: its segments; never changes.
        epoch: written by whoever promotes; requests must name it.
        applied_step: how many steps it reflects, so the next step's number.
        flat: its values, one byte tensor.
    """

    def __init__(
        self,
        partition: int,
        table_id: int,
        layout: PartitionLayout,
        spec: pb.TableSpec,
        *,
        epoch: int,
        budget: Budget,
        workspace: Workspace | None = None,
    ) -> None:
        self.id = partition
        self.table_id = table_id
        self.layout = layout
        self.epoch = epoch
        self.applied_step = 0
        self.flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
        self._views = flat_views(layout, self.flat)
        settings = hyper.from_protos(spec.optimizer.hyper_parameters)
        self.optimizer = PartitionOptimizer(spec.optimizer.class_name, settings, self._views, layout)
        self.log = Log()
        self._workspace = workspace or Workspace()
        self.staging = Staging(budget)
        self.dedup = Dedup()
        self.pushes = 0
        """Sequenced updates applied; for people."""
        self.duplicates = 0
        """Sequenced updates recognised as applied before; for people."""
        self.non_finite = 0
        """Sequenced updates skipped for a NaN or an infinity; for people."""
        self.lost = 0
        """Acknowledged updates that were lost with primaries, as far as their clients told."""
        self.acks_primary = spec.acks == pb.ACKS_PRIMARY
        """Updates are acknowledged before followers have them."""
        self._policy = spec.non_finite
        self._group = 0
        """The ledger's number of the table's group, from the first decision or put."""
        self._init_attempt = 0
        """Attempt of the first values that are held; 0: none, INITIALISING."""
        self._trained = False
        """Training data came: first values are final."""
        self._torn = False
        """An optimizer step broke in its middle: nothing is served any more."""
        self.on_cut: Callable[[Any, str], None] | None = None
        """Takes the cut of a checkpoint when the primary applies the step that carries its id."""
        self._norm: tuple[int, float] | None = None
        """(step, squared norm) of the step that is being clipped: every worker asks."""

    @property
    def initialising(self) -> bool:
        """Whether there are no values yet."""
        return not self._init_attempt

    @property
    def values(self) -> memoryview:
        """The values' bytes, live."""
        return tensor_bytes(self.flat)

    @property
    def group(self) -> int:
        """The ledger's number of the table's group; 0 before the first step."""
        return self._group

    def raise_epoch(self, epoch: int) -> None:
        """Take a higher epoch: requests routed by the older map are refused from now on."""
        if epoch > self.epoch:
            self.epoch = epoch
            self._append(rp.RECORD_KIND_EPOCH)

    def touch(self) -> int:
        """Append a record that changes nothing: who acknowledges it follows this primary still; its lsn."""
        return self._append(rp.RECORD_KIND_NOOP).lsn

    def check_ready(self) -> None:
        """Refuse while there are no values, or none that can be trusted.

        Raises:
            Retryable: INITIALISING.
            InternalError: INTERNAL.
        """
        if self._torn:
            raise refuse(
                "INTERNAL", f"partition {self.id} was left half-written by an error that the server's log tells of"
            )
        if self.initialising:
            raise refuse("INITIALISING", f"partition {self.id} has no first values yet", partition=self.id)

    def _made(self, make: Callable[[], Made]) -> Made | None:
        """A record's body, if anybody follows."""
        return make() if self.log.replicated else None

    def _append(self, kind: int, made: Made | None = None, **fields: int) -> RecordHeader:
        body, payload = made if made is not None else (None, ())
        return self.log.append(kind, epoch=self.epoch, body=body, payload=payload, **fields)

    def _changed(self, changes: Iterable[pb.TableHyperParameters]) -> dict[str, Setting]:
        merged: dict[str, Setting] = {}
        for change in changes:
            if change.table_id == self.table_id:
                merged.update(hyper.from_protos(change.hyper_parameters))
        return merged

    def _train(
        self,
        settings: dict[str, Setting],
        parts: Sequence[Part],
        reduction: Reduction,
        policy: int,
        *,
        keep: bool = False,
    ) -> tuple[list[bool] | None, torch.Tensor | None]:
        """Sum and step; without parts, or if the policy skips the sum, only the settings change.

        Returns:
            Which segments were present (None: nothing was applied), and with `keep` a copy of
            the sum's bytes.
        """
        with self._workspace.borrow(self.layout) as gradient:
            present = sum_parts(self.layout, parts, reduction, gradient)
            if parts and not passes(policy, gradient.views, present):
                self.non_finite += 1
                parts = ()
            # The one copy that replication costs the primary: the sum's memory is used again.
            total = gradient.flat[: self.layout.nbytes].clone() if parts and keep else None
            self._step(settings, gradient.views, present if parts else None)
        return (present if parts else None), total

    def _step(
        self, settings: dict[str, Setting], gradients: Sequence[torch.Tensor], present: Sequence[bool] | None
    ) -> None:
        # Until the step is whole: memory that ran out in its middle leaves no state to serve.
        self._torn = True
        self.optimizer.configure(settings)
        if present is not None:
            self.optimizer.step(gradients, present)
        self._torn = False
        self._trained = True

    def _apply_update(self, update: Update, contribution: Contribution) -> bool:
        """Whether it was applied; if not, it was a skip, or became one."""
        settings = self.optimizer.merged(update.changed)
        parts = [] if update.skip else [Part(contribution, update.scale or 1.0)]
        return self._train(settings, parts, Reduction(), self._policy)[0] is not None

    def _stepped(self, record: pb.StepRecord) -> None:
        self._group, self._norm = record.group, None
        self.applied_step = record.step + 1
        self.staging.drop_through(record.group, record.step)

    def _write(self, writes: Sequence[SlotFrame], init_attempt: int) -> None:
        plan = plan_writes(self.layout, self.optimizer, writes, whole_values=bool(init_attempt))
        if init_attempt:
            self.optimizer.reset()
            self._init_attempt = init_attempt
        plan.apply(self._views, self.optimizer)

    def replay(self, record: Record) -> None:
        """Apply a committed record of the primary: the same bits as there.

        Raises:
            ParameshError: PAYLOAD_SIZE, TENSOR_MISMATCH, HYPER_PARAMETER: the record does not
                fit this state; DIVERGED: a MARK says that the primary's is another.
        """
        header, body = record.header, record.body.WhichOneof("body")
        if body == "push":
            update, contribution = read_push(self.layout, record)
            self._apply_update(update, contribution)
            self.dedup.record(header.client_id, header.seq, Entry(contribution.digest, header.lsn))
            self.pushes += 1
        elif header.kind == rp.RECORD_KIND_MARK:
            self._check_mark(record)
        elif body == "noop" and record.body.noop.reason == LOST:
            self.lost += self.dedup.pass_over(header.client_id, header.seq)
        elif body == "noop":
            self.dedup.record(header.client_id, header.seq, read_noop(record))
        elif body == "decided":
            self._replay_step(record)
        elif body == "assign":
            self._write(*read_assign(record))
            self.dedup.record_assign(header.client_id, header.seq, header.lsn)
        elif header.kind == rp.RECORD_KIND_FENCE:
            self.dedup.fence(header.client_id)
        self.log.adopt(record)
        self.epoch = max(self.epoch, header.epoch)

    def _replay_step(self, record: Record) -> None:
        decided, present, total = read_step(self.layout, record)
        settings = self.optimizer.merged(self._changed(decided.hyper_parameters))
        views = [] if total is None else flat_views(self.layout, total)
        self._step(settings, views, None if total is None else present)
        self._stepped(decided)

    def mark(self) -> int:
        """Append a MARK that carries the state's checksum, for followers to compare theirs with; its lsn.

        crc32 over the tensors: what is looked for is arithmetic that differs or memory that rots,
        not an adversary, and it runs under the partition's lock.
        """
        return self._append(rp.RECORD_KIND_MARK, checksum=self._state_checksum()).lsn

    def _state_checksum(self) -> int:
        # Not `_trained`: staging sets it at the primary alone, and no record carries that.
        value = zlib.crc32(repr((self.table_id, self.applied_step, self._init_attempt)).encode())
        for piece in self.dedup.canonical():
            value = zlib.crc32(piece, value)
        for part in cut_slots(self.layout, self.flat, self.optimizer):
            value = zlib.crc32(part.data, zlib.crc32(f"{part.slot}/{part.segment}/{part.offset}".encode(), value))
        return value

    def _check_mark(self, record: Record) -> None:
        mine = self._state_checksum()
        if mine != record.header.checksum:
            raise refuse(
                "DIVERGED",
                f"the state of partition {self.id} at record {record.header.lsn - 1} is {mine:08x} here and "
                f"{record.header.checksum:08x} at the primary",
                partition=self.id,
            )

    def capture(self) -> rp.ReplicaState:
        """Everything but the tensors, for a snapshot; `cut` has those."""
        state = rp.ReplicaState(
            lsn=self.log.lsn,
            epoch=self.log.last.epoch,
            applied_step=self.applied_step,
            group=self._group,
            init_attempt=self._init_attempt,
            trained=self._trained,
            settings=hyper.to_protos(self.optimizer.settings),
            pushes=self.pushes,
            duplicates=self.duplicates,
            lost=self.lost,
        )
        self.dedup.capture(state)
        return state

    def restore(self, state: rp.ReplicaState, writes: Sequence[SlotFrame]) -> None:
        """Become what a snapshot says. On a partition that was just made.

        Raises:
            TensorMismatch: PAYLOAD_SIZE or TENSOR_MISMATCH.
            RequestRefused: HYPER_PARAMETER.
        """
        self.optimizer.configure(self.optimizer.merged(hyper.from_protos(state.settings)))
        if state.init_attempt:
            self._write(writes, state.init_attempt)
        self.dedup = Dedup.restored(state)
        self.applied_step, self._group, self._trained = state.applied_step, state.group, state.trained
        self.pushes, self.duplicates, self.lost = state.pushes, state.duplicates, state.lost
        self.log.reset(Position(state.lsn, state.epoch))

    def cut(self) -> list[SlotBytes]:
        """Values and optimizer state as they are now, as views of live memory.

        Raises:
            Retryable: INITIALISING.
        """
        self.check_ready()
        return list(cut_slots(self.layout, self.flat, self.optimizer))

    def state_hash(self) -> bytes:
        """sha256 over values, optimizer state and settings, dedup, step and lsn."""
        digest = hashlib.sha256()
        for part in cut_slots(self.layout, self.flat, self.optimizer):
            digest.update(f"{part.slot}/{part.segment}/{part.offset}:".encode())
            digest.update(part.data)
        digest.update(repr(sorted((n, _plain(v)) for n, v in self.optimizer.settings.items())).encode())
        for piece in self.dedup.canonical():
            digest.update(piece)
        digest.update(repr((self.table_id, self.applied_step, self.log.lsn, self._init_attempt)).encode())
        return digest.digest()

    def close(self) -> None:
        """Let go of what is staged."""
        self.staging.clear()


def _plain(value: Setting) -> Setting:
    """A setting as it is after travelling: int and float are one there."""
    if isinstance(value, tuple):
        return tuple(float(number) for number in value)
    return value if value is None or isinstance(value, bool) else float(value)
