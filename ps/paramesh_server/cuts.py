"""Cuts of partitions for checkpoints: copies in memory, until they are on disk.

    cuts.take(partition, "checkpoint-000007")        # under the partition's lock: a copy
    cuts.get("checkpoint-000007", 3)                 # later, from any thread

Training waits for the copy, never for the disk. One checkpoint's cuts are held at a time,
and none for ever: a coordinator that went away must not cost a server its memory.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from paramesh.partition_file import Part
from paramesh.v1 import replication_pb2 as rp

from paramesh_server.partition import Partition

log = logging.getLogger(__name__)

KEEP_S = 600.0
"""Seconds after which cuts that nobody fetched go."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One partition at one record."""

    state: rp.ReplicaState
    parts: list[Part]
    group: int


def cut_of(partition: Partition) -> Cut:
    """A copy of a partition's whole state; called under its lock.

    Raises:
        Retryable: INITIALISING.
    """
    parts = [Part(slot.slot, slot.segment, slot.scalar, bytearray(slot.data)) for slot in partition.cut()]
    return Cut(partition.capture(), parts, partition.group)


class Cuts:
    """The newest checkpoint's cuts in this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._checkpoint = ""
        self._cuts: dict[int, Cut] = {}
        self._at = 0.0
        """Seconds, monotonic, of the last cut."""

    def take(self, partition: Partition, checkpoint: str) -> None:
        """Copy a partition; never fails the step that it is part of."""
        try:
            cut = cut_of(partition)
        except Exception:  # memory, mostly: the checkpoint is given up, training is not
            log.exception("partition=%d could not be cut for checkpoint=%s", partition.id, checkpoint)
            return
        self.put(checkpoint, partition.id, cut)

    def put(self, checkpoint: str, partition: int, cut: Cut) -> None:
        """Hold a cut; those of other checkpoints go."""
        with self._lock:
            if checkpoint != self._checkpoint:
                self._checkpoint, self._cuts = checkpoint, {}
            self._cuts[partition] = cut
            self._at = time.monotonic()

    def get(self, checkpoint: str, partition: int) -> Cut | None:
        """The cut, if it is held."""
        with self._lock:
            return self._cuts.get(partition) if checkpoint == self._checkpoint else None

    def done(self, checkpoint: str, partition: int) -> None:
        """A cut is on disk: its memory is free."""
        with self._lock:
            if checkpoint == self._checkpoint:
                self._cuts.pop(partition, None)

    def drop(self, checkpoint: str) -> None:
        """Forget a checkpoint's cuts."""
        with self._lock:
            if checkpoint == self._checkpoint:
                self._cuts = {}

    def sweep(self) -> None:
        """Forget what nobody fetched."""
        with self._lock:
            if self._cuts and time.monotonic() - self._at > KEEP_S:
                log.warning("cuts of checkpoint=%s dropped: nobody fetched them", self._checkpoint)
                self._cuts = {}
