"""Decisions that come with one request for several partitions: each partition's thread has its own."""

from __future__ import annotations

import threading

import pytest
import torch
from paramesh import testing
from paramesh_server.partition import Partition
from paramesh_server.shards import INLINE_BYTES

ELEMENTS = INLINE_BYTES  # times 4 bytes: worked on in the pool


@pytest.mark.parametrize("clip", [None, 1.0], ids=["pull", "norms"])
def test_no_two_partitions_are_given_the_same_record(monkeypatch, clip):
    """protobuf's objects are not made for two threads, not even to read: a server was killed by SIGSEGV."""
    taken: dict[int, dict[int, object]] = {}
    lock, commit, norm = threading.Lock(), Partition.commit, Partition.norm

    def note(partition: int, records) -> None:
        with lock:
            # Held here, so that no identity is given twice.
            taken.setdefault(partition, {}).update({id(record): record for record in records})

    def noted_commit(self, records):
        records = list(records)
        note(self.id, records)
        return commit(self, records)

    def noted_norm(self, records):
        note(self.id, records)
        return norm(self, records)

    monkeypatch.setattr(Partition, "commit", noted_commit)
    monkeypatch.setattr(Partition, "norm", noted_norm)
    with testing.Cluster() as cluster:
        cluster.run(lambda rank: train(rank, clip))
    partitions = [p for p, records in taken.items() if records]
    assert len(partitions) == 3, partitions
    seen = [identity for records in taken.values() for identity in records]
    assert len(seen) == len(set(seen))


def train(_rank: int, clip: float | None) -> None:
    import paramesh

    model = torch.nn.ParameterList(torch.zeros(ELEMENTS) for _ in range(3))
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = paramesh.DistributedOptimizer(inner, model, partition_bytes=ELEMENTS * 4, max_grad_norm=clip)
    for _ in range(3):
        for parameter in model:
            parameter.grad = torch.full_like(parameter, -1.0)
        optimizer.step()
