"""What a follower acknowledges: what it has of this primary's log, and nothing of an older one's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from paramesh.channel import header
from paramesh.framing import Framed
from paramesh.v1 import replication_pb2 as rp
from paramesh_server.counters import Counters
from paramesh_server.inbound import Inbound
from paramesh_server.insync import Ref
from paramesh_server.log import START, Position, Record, record_of
from paramesh_server.replica import Replica
from paramesh_server.shards import Held
from ps_building import fresh, table

ME, PRIMARY = Ref("a", 1), Ref("b", 1)
PARTITION = 1
SPEC = table([4], "SGD", {"lr": 0.5})


def fence(lsn: int, epoch: int) -> Record:
    return record_of(
        rp.LogRecord(partition=PARTITION, epoch=epoch, lsn=lsn, kind=rp.RECORD_KIND_FENCE, client_id=lsn), ()
    )


async def stream(*headers: rp.AppendHeader) -> AsyncIterator[Framed[rp.AppendHeader]]:
    for one in headers:
        yield Framed(one, memoryview(b""))


def test_an_older_primarys_records_are_not_acknowledged_to_the_next() -> None:
    """It has records 2 and 3 of epoch 1; the new primary has another record 2, and sends from the start."""

    async def test() -> None:
        held = Held(Replica(fresh(SPEC), ME), ThreadPoolExecutor(1))
        for lsn in (1, 2, 3):
            held.replica.offer(1, Position(lsn - 1, int(lsn > 1)), fence(lsn, 1))

        async def find(_: int) -> Held:
            return held

        nobody: Any = None
        inbound = Inbound("job", lambda: 1, ME, find, nobody, Counters())
        first = rp.AppendHeader(
            request=header("job", 1), primary=PRIMARY.proto(), follower=ME.proto(), partition=1, epoch=2
        )
        sent = [rp.AppendHeader(partition=1, epoch=2, record=fence(lsn, epoch).body) for lsn, epoch in ((1, 1), (2, 2))]
        sent[0].previous_lsn, sent[0].previous_epoch = START
        sent[1].previous_lsn, sent[1].previous_epoch = 1, 1
        answers = [answer async for answer in inbound.Append(stream(first, *sent), nobody)]
        assert [answer.acked_lsn for answer in answers[1:]] == [1, 2]
        assert (answers[0].acked_lsn, answers[0].acked_epoch) == (3, 1)  # where it is, for a start in common

    asyncio.run(asyncio.wait_for(test(), 20))
