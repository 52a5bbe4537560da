"""The log: contiguous numbers, bounded memory."""

from __future__ import annotations

from paramesh.v1 import replication_pb2 as rp
from paramesh_server.log import Log


def test_numbers_are_contiguous_and_the_ring_keeps_the_newest() -> None:
    log = Log(keep=3)
    assert log.lsn == 0
    for seq in range(1, 6):
        header = log.append(rp.RECORD_KIND_PUSH, epoch=1, client_id=9, seq=seq)
        assert header.lsn == log.lsn == seq
    assert [header.lsn for header in log.tail()] == [3, 4, 5]
    assert [header.seq for header in log.tail(after=4)] == [5]
