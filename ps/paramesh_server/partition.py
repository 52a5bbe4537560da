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

import zlib
from collections.abc import Iterable, Sequence
from functools import partial

from paramesh.errors import ParameshError, refuse
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from paramesh_server.aggregate import squared_norm
from paramesh_server.decisions import check_record, gather
from paramesh_server.dedup import Digest, Entry, Verdict, fold
from paramesh_server.finite import APPLY_ALL
from paramesh_server.partition_state import PartitionState
from paramesh_server.records import (
    LOST,
    assign_body,
    noop_body,
    push_body,
    step_body,
)
from paramesh_server.requests import Outcome, StagedAt, Update
from paramesh_server.staging import Contribution, StagedKey
from paramesh_server.writes import SlotFrame


class Partition(PartitionState):
    """One partition, with what its primary is asked for."""

    # What every request goes through.

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
        lost = self.take_loss(client, min(update.acked, update.seq - 1))
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
        return Outcome(header.lsn, lost=lost)

    def take_loss(self, client: int, acked: int) -> int:
        """Hear from a client what it knows to be acknowledged; what is not here was lost with a primary.

        Only updates that a primary acknowledged by itself can be (`acks_primary`). Their numbers are used up, in
        every replica, so that those that follow fit.

        Returns:
            How many were found lost now.
        """
        if not self.acks_primary or acked <= self.dedup.last(client) or self.dedup.fenced(client):
            return 0
        made = self._made(partial(noop_body, b"", LOST, ""))
        self._append(rp.RECORD_KIND_NOOP, made, client_id=client, seq=acked)
        lost = self.dedup.pass_over(client, acked)
        self.lost += lost
        return lost

    def _again(self, client: int, seq: int) -> Outcome:
        self.duplicates += 1
        entry = self.dedup.entry(client, seq)
        error = entry.error()
        if error is not None:
            raise error
        return Outcome(entry.lsn, duplicate=True)

    # Writes from outside, fences.

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

    def fence(self, client: int) -> bool:
        """Forbid a client for ever; staged contributions stay. True if it was not yet."""
        fresh = self.dedup.fence(client)
        if fresh:
            self._append(rp.RECORD_KIND_FENCE, client_id=client)
        return fresh
