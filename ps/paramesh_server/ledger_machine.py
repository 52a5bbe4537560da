"""The ledger as a replicated state machine: its records in a partition's log.

machine = LedgerMachine(config, epoch=1)
machine.append(record)               # the sink of the ledger that serves
machine.replay(record)               # at a follower
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from paramesh.errors import refuse
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from paramesh_server import ledger_log
from paramesh_server.ledger import Ledger
from paramesh_server.ledger_codec import decode_record, encode_record
from paramesh_server.log import Log, Position, Record
from paramesh_server.writes import SlotFrame


class LedgerMachine:
    """Partition 0. Lives on the event loop: its events are microseconds.

    Args:
        config: the job's settings.
        epoch: of the map that names this replica.
    """

    id = 0

    def __init__(self, config: pb.JobConfig, epoch: int) -> None:
        self._config = config
        self.ledger = Ledger(config)
        self.epoch = epoch
        self.log = Log()

    def append(self, record: ledger_log.Record) -> None:
        """Take a record of the ledger into the log."""
        data = encode_record(record) if self.log.replicated else b""
        body = rp.LogRecord(ledger=data) if data else None
        self.log.append(rp.RECORD_KIND_LEDGER, epoch=self.epoch, checksum=zlib.crc32(data), body=body)

    def replay(self, record: Record) -> None:
        """Apply a committed record.

        Raises:
            ParameshError: FORMAT; DIVERGED: a MARK says that the primary's state is another.
            ValueError: it does not follow the last one.
        """
        if record.body.WhichOneof("body") == "ledger":
            self.ledger.replay([decode_record(record.body.ledger)])
        elif record.header.kind == rp.RECORD_KIND_MARK:
            self._check_mark(record)
        self.log.adopt(record)
        self.epoch = max(self.epoch, record.header.epoch)

    def raise_epoch(self, epoch: int) -> None:
        """Begin a new primary's epoch."""
        if epoch > self.epoch:
            self.epoch = epoch
            self.log.append(rp.RECORD_KIND_EPOCH, epoch=epoch)

    def mark(self) -> int:
        """Append a MARK that carries the state's checksum; its lsn."""
        checksum = zlib.crc32(self.ledger.capture())
        return self.log.append(rp.RECORD_KIND_MARK, epoch=self.epoch, checksum=checksum).lsn

    def _check_mark(self, record: Record) -> None:
        mine = zlib.crc32(self.ledger.capture())
        if mine != record.header.checksum:
            raise refuse(
                "DIVERGED",
                f"the ledger at record {record.header.lsn - 1} is {mine:08x} here and "
                f"{record.header.checksum:08x} at the primary",
                partition=0,
            )

    def capture(self) -> rp.ReplicaState:
        """The whole state; there are no tensors."""
        return rp.ReplicaState(lsn=self.log.lsn, epoch=self.log.last.epoch, ledger=self.ledger.capture())

    def restore(self, state: rp.ReplicaState, writes: Sequence[SlotFrame]) -> None:
        """Become what a snapshot says. On a machine that was just made.

        Raises:
            ParameshError: FORMAT.
        """
        self.ledger.install(state.ledger)
        self.log.reset(Position(state.lsn, state.epoch))

    def forget_what_was_volatile(self) -> None:
        """Keep the records' state only: this replica served, and follows from now on.

        Readys, norms and waits of its time as primary must not meet those that come when it
        is promoted again.
        """
        state = self.ledger.capture()
        self.ledger = Ledger(self._config)
        self.ledger.install(state)

    def close(self) -> None:
        """Nothing is held elsewhere."""
