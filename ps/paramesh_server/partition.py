"""One partition as a state machine: requests in, records applied, answers out. Pure.

    partition = Partition(id, table_id, layout, spec, epoch=1, budget=Budget(1 << 30))
    partition.assign(client, assign_id=1, writes, init_attempt=1)       # first values
    partition.stage(client, StagedAt(group=1, step=0, attempt=1), contribution)
    partition.commit([record_of_step_0])                                 # sums, applies
    partition.values                                                     # flat bytes

No sockets, threads or clocks: the caller holds a lock around each call. Everything that
changes state is one record in the log, and the state is a function of the records: what is
refused (all but the NOOP of a refused push) changes nothing.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from paramesh import hyper
from paramesh.errors import ParameshError, refuse
from paramesh.routing import PartitionLayout
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from paramesh_server.aggregate import Part, Reduction, Workspace, flat_views, squared_norm, sum_parts
from paramesh_server.decisions import check_record, gather
from paramesh_server.dedup import Dedup, Digest, Entry, Verdict, fold
from paramesh_server.finite import APPLY_ALL, passes
from paramesh_server.log import Log, Position, Record, RecordHeader
from paramesh_server.optimizer import PartitionOptimizer, Setting
from paramesh_server.records import (
    Made,
    assign_body,
    noop_body,
    push_body,
    read_assign,
    read_noop,
    read_push,
    read_step,
    step_body,
)
from paramesh_server.requests import Outcome, StagedAt, Update
from paramesh_server.staging import Budget, Contribution, StagedKey, Staging
from paramesh_server.writes import SlotBytes, SlotFrame, cut_slots, plan_writes, tensor_bytes


class Partition:
    """The primary replica of one partition of a dense table.

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
        self._policy = spec.non_finite
        self._group = 0
        """The ledger's number of the table's group, from the first decision or put."""
        self._init_attempt = 0
        """Attempt of the first values that are held; 0: none, INITIALISING."""
        self._trained = False
        """Training data came: first values are final."""
        self._torn = False
        """An optimizer step broke in its middle: nothing is served any more."""
        self.on_cut: Callable[[Partition, str], None] | None = None
        """Takes the cut of a checkpoint when the primary applies the step that carries its id."""
        self._norm: tuple[int, float] | None = None
        """(step, squared norm) of the step that is being clipped: every worker asks."""

    # What every request goes through.

    @property
    def initialising(self) -> bool:
        """Whether there are no values yet."""
        return not self._init_attempt

    @property
    def values(self) -> memoryview:
        """The values' bytes, live."""
        return tensor_bytes(self.flat)

    def check_epoch(self, epoch: int) -> None:
        """Refuse a request that was routed by another map.

        Raises:
            Retryable: STALE_EPOCH, UNKNOWN_EPOCH.
            RequestRefused: MISSING_FIELD.
        """
        if epoch == self.epoch:
            return
        if not epoch:
            raise refuse("MISSING_FIELD", "epoch counts from 1", field="epoch")
        if epoch < self.epoch:
            raise refuse("STALE_EPOCH", f"partition {self.id} is at epoch {self.epoch}", epoch=self.epoch)
        raise refuse("UNKNOWN_EPOCH", f"partition {self.id} is at epoch {self.epoch} here, asked for {epoch}")

    def raise_epoch(self, epoch: int) -> None:
        """Take a higher epoch: requests routed by the older map are refused from now on."""
        if epoch > self.epoch:
            self.epoch = epoch
            self._append(rp.RECORD_KIND_EPOCH)

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

    def _check_group(self, group: int) -> None:
        if self._group and group != self._group:
            raise refuse("UNKNOWN_GROUP", f"partition {self.id} is of group {self._group}, not {group}")

    # Synchronous steps.

    def stage(
        self, client: int, at: StagedAt, contribution: Contribution, committed: Sequence[pb.StepRecord] = ()
    ) -> Outcome:
        """Hold a contribution for its step, first applying the decisions before it.

        A decision of the step itself is tried after it: a fenced client that the record
        names delivers what is missing that way.

        Raises:
            ParameshError: INITIALISING, CLIENT_FENCED, UNKNOWN_GROUP, NEED_STEPS, NOT_STAGED,
                SEQ_REUSED, QUOTA, HYPER_PARAMETER.
        """
        self.check_ready()
        named = any(r.step == at.step and any(c.client_id == client for c in r.contributors) for r in committed)
        if not named:
            self.dedup.check_client(client)
        self._check_group(at.group)
        self.commit(r for r in committed if r.step < at.step)
        if at.step < self.applied_step:
            return Outcome(self.log.lsn, duplicate=True)
        if at.step > self.applied_step:
            raise self._need_steps(at.step)
        fresh = self.staging.put(at.group, at.step, client, at.attempt, contribution)
        self._group, self._trained = at.group, True
        try:
            self.commit(r for r in committed if r.step == at.step)
        except ParameshError as error:
            if error.reason not in ("NOT_STAGED", "NEED_STEPS"):
                raise
        return Outcome(0, duplicate=not fresh)

    def take_staged(self, key: StagedKey, contribution: Contribution) -> bool:
        """Hold what an earlier primary had admitted and staged; false if it is not needed.

        Whoever was fenced since stays out of later steps, and not out of this one.

        Raises:
            ParameshError: SEQ_REUSED, QUOTA, MISSING_FIELD; UNKNOWN_GROUP.
        """
        group, step, client, attempt = key
        self._check_group(group)
        if self.initialising or step < self.applied_step:
            return False
        fresh = self.staging.put(group, step, client, attempt, contribution)
        self._group, self._trained = group, True
        return fresh

    def _need_steps(self, wanted: int) -> ParameshError:
        return refuse(
            "NEED_STEPS",
            f"partition {self.id} has applied {self.applied_step} steps and needs the decisions up to {wanted}",
            partition=self.id,
            applied_step=self.applied_step,
        )

    def commit(self, committed: Iterable[pb.StepRecord]) -> None:
        """Apply decisions in order; those that are applied already are passed over.

        Raises:
            ParameshError: NEED_STEPS (a gap, or no clip factor yet), NOT_STAGED,
                UNKNOWN_GROUP, WEIGHT, HYPER_PARAMETER.
        """
        for record in committed:
            if record.step < self.applied_step:
                continue
            self.check_ready()
            self._check_group(record.group)
            if record.step > self.applied_step or (
                record.needs_clip and not record.has_clip_factor and not record.skip
            ):
                raise self._need_steps(record.step)
            self._apply_step(record)

    def _apply_step(self, record: pb.StepRecord) -> None:
        check_record(record)
        settings = self.optimizer.merged(self._changed(record.hyper_parameters))
        decided = gather(record, self.id, self.staging)  # from here on nothing refuses
        summed = self._train(settings, decided.parts, decided.reduction, APPLY_ALL, keep=self.log.replicated)
        checksum = zlib.crc32(record.SerializeToString(deterministic=True))
        made = self._made(lambda: step_body(record, *summed, without=decided.without))
        self._append(rp.RECORD_KIND_STEP, made, step=record.step, checksum=checksum)
        self._stepped(record)
        if record.checkpoint and self.on_cut is not None:
            self.on_cut(self, record.checkpoint)

    def _stepped(self, record: pb.StepRecord) -> None:
        self._group, self._norm = record.group, None
        self.applied_step = record.step + 1
        self.staging.drop_through(record.group, record.step)

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

    @property
    def group(self) -> int:
        """The ledger's number of the table's group; 0 before the first step."""
        return self._group

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

    def _changed(self, changes: Iterable[pb.TableHyperParameters]) -> dict[str, Setting]:
        merged: dict[str, Setting] = {}
        for change in changes:
            if change.table_id == self.table_id:
                merged.update(hyper.from_protos(change.hyper_parameters))
        return merged

    def norm(self, committed: Sequence[pb.StepRecord]) -> float:
        """The squared norm of the last decision's averaged gradient, in fp64.

        Raises:
            ParameshError: as `commit`; STEP_OUT_OF_RANGE, if it is applied already.
        """
        if not committed:
            raise refuse("MISSING_FIELD", "norms are of a decided step; no record came", field="committed")
        record = committed[-1]
        self.commit(committed[:-1])
        self.check_ready()
        self._check_group(record.group)
        if record.step < self.applied_step:
            raise refuse("STEP_OUT_OF_RANGE", f"step {record.step} is applied", applied_step=self.applied_step)
        if record.step > self.applied_step:
            raise self._need_steps(record.step)
        if self._norm is None or self._norm[0] != record.step:
            check_record(record)
            decided = gather(record, self.id, self.staging)
            value = squared_norm(self.layout, decided.parts, decided.reduction, self._views)
            self._norm = (record.step, value)
        return self._norm[1]

    def check_step(self, step: int) -> None:
        """Refuse a read that does not find the values of exactly this step.

        Raises:
            ParameshError: INITIALISING, NEED_STEPS, STEP_OUT_OF_RANGE.
        """
        self.check_ready()
        if step > self.applied_step:
            raise self._need_steps(step)
        if step < self.applied_step:
            raise refuse(
                "STEP_OUT_OF_RANGE",
                f"partition {self.id} is at step {self.applied_step}; the values of step {step} are gone",
                applied_step=self.applied_step,
            )

    # Sequenced pushes.

    def push(self, client: int, update: Update, contribution: Contribution | ParameshError) -> Outcome:
        """Apply an update exactly once.

        Args:
            client: whose sequence it is in.
            update: its place and options.
            contribution: the gradient, or why it does not fit, which consumes the seq.

        Raises:
            ParameshError: INITIALISING, the SEQ_ reasons, CLIENT_FENCED, and what is wrong
                with the payload (then a NOOP has taken its place).
        """
        self.check_ready()
        digest: Digest = (
            fold(contribution.reason, str(contribution))
            if isinstance(contribution, ParameshError)
            else contribution.digest
        )
        verdict = self.dedup.admit(client, update.seq, digest)
        if verdict is Verdict.HOLD:
            return Outcome(0, held=True)
        if verdict is Verdict.DUPLICATE:
            return self._again(client, update.seq)
        try:
            if isinstance(contribution, ParameshError):
                raise contribution
            applied = self._apply_update(update, contribution)
        except ParameshError as error:
            made = self._made(partial(noop_body, digest, error.reason, str(error)))
            header = self._append(rp.RECORD_KIND_NOOP, made, client_id=client, seq=update.seq)
            self.dedup.record(client, update.seq, Entry(digest, header.lsn, (error.reason, str(error))))
            raise
        done = contribution
        header = self._append(
            rp.RECORD_KIND_PUSH if applied else rp.RECORD_KIND_NOOP,
            self._made(lambda: push_body(update, done)),
            client_id=client,
            seq=update.seq,
            checksum=zlib.crc32(digest),
        )
        self.dedup.record(client, update.seq, Entry(digest, header.lsn))
        self.pushes += 1
        return Outcome(header.lsn)

    def _made(self, make: Callable[[], Made]) -> Made | None:
        """A record's body, if anybody follows."""
        return make() if self.log.replicated else None

    def _append(self, kind: int, made: Made | None = None, **fields: int) -> RecordHeader:
        body, payload = made if made is not None else (None, ())
        return self.log.append(kind, epoch=self.epoch, body=body, payload=payload, **fields)

    def _again(self, client: int, seq: int) -> Outcome:
        self.duplicates += 1
        entry = self.dedup.entry(client, seq)
        error = entry.error()
        if error is not None:
            raise error
        return Outcome(entry.lsn, duplicate=True)

    def _apply_update(self, update: Update, contribution: Contribution) -> bool:
        """Whether it was applied; if not, it was a skip, or became one."""
        settings = self.optimizer.merged(update.changed)
        parts = [] if update.skip else [Part(contribution, update.scale or 1.0)]
        return self._train(settings, parts, Reduction(), self._policy)[0] is not None

    # Writes from outside, fences, cuts.

    def assign(self, client: int, assign_id: int, writes: Sequence[SlotFrame], init_attempt: int = 0) -> Outcome:
        """Write values or optimizer state, all or nothing, once.

        Args:
            client: who writes.
            assign_id: makes it repeatable.
            writes: frames, checksums verified.
            init_attempt: set for first values.

        Raises:
            ParameshError: INITIALISING, TOO_LATE (first values under an older attempt, or after
                training began), CLIENT_FENCED, SEQ_TOO_OLD, PAYLOAD_SIZE, TENSOR_MISMATCH.
        """
        done = self.dedup.assigned(client, assign_id)
        if done:
            return Outcome(done, duplicate=True)
        if init_attempt:
            self._check_init(init_attempt)
        else:
            self.check_ready()
        self._write(writes, init_attempt)
        made = self._made(lambda: assign_body(writes, init_attempt))
        header = self._append(rp.RECORD_KIND_ASSIGN, made, client_id=client, seq=assign_id)
        self.dedup.record_assign(client, assign_id, header.lsn)
        return Outcome(header.lsn)

    def _check_init(self, attempt: int) -> None:
        if self._trained or attempt < self._init_attempt:
            raise refuse(
                "TOO_LATE",
                f"first values of attempt {attempt} come after "
                + ("training began" if self._trained else f"those of attempt {self._init_attempt}"),
                partition=self.id,
            )

    def _write(self, writes: Sequence[SlotFrame], init_attempt: int) -> None:
        plan = plan_writes(self.layout, self.optimizer, writes, whole_values=bool(init_attempt))
        if init_attempt:
            self.optimizer.reset()
            self._init_attempt = init_attempt
        plan.apply(self._views, self.optimizer)

    def fence(self, client: int) -> bool:
        """Forbid a client for ever; staged contributions stay. True if it was not yet."""
        fresh = self.dedup.fence(client)
        if fresh:
            self._append(rp.RECORD_KIND_FENCE, client_id=client)
        return fresh

    # What a follower does.

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

    def _replay_step(self, record: Record) -> None:
        decided, present, total = read_step(self.layout, record)
        settings = self.optimizer.merged(self._changed(decided.hyper_parameters))
        views = [] if total is None else flat_views(self.layout, total)
        self._step(settings, views, None if total is None else present)
        self._stepped(decided)

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
        self.pushes, self.duplicates = state.pushes, state.duplicates
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
