"""What a slot releases, and when: answers belong to the reign in which they were formed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from paramesh.errors import ParameshError
from paramesh.v1 import types_pb2 as pb
from paramesh_server.insync import Ref
from paramesh_server.reads import Reads
from paramesh_server.replica import Replica, Role
from paramesh_server.sending import encode_values
from paramesh_server.shards import Held
from ps_building import fresh, random_gradients, table, value_writes

ME, OTHER = Ref("a", 1), Ref("b", 1)
SPEC = table([100, 64], "SGD", {"lr": 0.5})


def row(version: int, epoch: int, *isr: Ref) -> pb.Partition:
    return pb.Partition(id=1, version=version, epoch=epoch, isr=[ref.proto() for ref in isr])


def leading(*isr: Ref) -> Held:
    held = Held(Replica(fresh(SPEC), ME), ThreadPoolExecutor(1))
    held.replica.lead(row(1, 1, *isr), 0.0)
    return held


def on_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


async def reason(waiting: Awaitable[None]) -> str:
    with pytest.raises(ParameshError) as caught:
        await waiting
    return caught.value.reason


def test_an_answer_waits_for_every_replica_that_may_be_in_sync() -> None:
    async def test() -> None:
        held = leading(ME, OTHER)
        values = value_writes(held.partition.layout, random_gradients(held.partition.layout, 1))
        outcome = await held.lead(lambda: held.partition.assign(5, 1, values, 1))
        waiting = asyncio.ensure_future(held.released(outcome.lsn, held.replica.reign))
        done, _ = await asyncio.wait({waiting}, timeout=0.05)
        assert not done
        held.replica.insync.acked(OTHER, outcome.lsn, 0.0)
        held.stir()
        await waiting

    on_loop(test)


def test_a_write_is_not_acknowledged_by_fewer_than_min_isr_though_it_was_appended_with_enough() -> None:
    """Its follower left between append and acknowledgement: readers need not wait for another, the writer does."""

    async def test() -> None:
        held = leading(ME, OTHER)
        held.min_isr = 2
        lsn = await held.lead(held.partition.mark)
        reign = held.replica.reign
        waiting = asyncio.ensure_future(held.released(lsn, reign, kept=True))
        held.replica.lead(row(2, 1, ME), 0.0)
        held.stir()
        await held.released(lsn, reign)
        done, _ = await asyncio.wait({waiting}, timeout=0.05)
        assert not done
        held.replica.lead(row(3, 1, ME, OTHER), 0.0)
        held.replica.insync.acked(OTHER, lsn, 0.0)
        held.stir()
        await waiting

    on_loop(test)


def test_a_deposed_primary_releases_nothing() -> None:
    async def test() -> None:
        held = leading(ME, OTHER)
        lsn = await held.lead(held.partition.mark)
        waiting = asyncio.ensure_future(held.released(lsn, held.replica.reign))
        await asyncio.sleep(0)
        held.replica.heed(2)
        held.stir()
        assert await reason(waiting) == "NOT_PRIMARY"
        assert await reason(held.lead(held.partition.mark)) == "NOT_PRIMARY"  # type: ignore[arg-type]

    on_loop(test)


def test_an_answer_of_an_earlier_reign_is_not_released_in_the_next() -> None:
    """The record of that number may be another one by then: what was pushed is not in it."""

    async def test() -> None:
        held = leading(ME, OTHER)
        lsn = await held.lead(held.partition.mark)
        waiting = asyncio.ensure_future(held.released(lsn, held.replica.reign))
        await asyncio.sleep(0)
        held.replica.heed(2)
        held.replica.promise(3)
        held.replica.take_over(3)
        held.replica.lead(row(2, 3, ME), 0.0)
        assert held.replica.insync.commit >= lsn
        held.stir()
        assert await reason(waiting) == "NOT_PRIMARY"

    on_loop(test)


def test_values_encoded_before_a_snapshot_are_not_served_after_it() -> None:
    """Equal numbers, another epoch: the cache must not take the one record for the other."""

    async def test() -> None:
        held = leading(ME)
        layout = held.partition.layout
        values = value_writes(layout, random_gradients(layout, 1))
        await held.lead(lambda: held.partition.assign(5, 1, values, 1))
        held.encoded[1] = encode_values(held.partition, pb.CHECKSUM_KIND_CRC32)
        held.replica.heed(2)
        other = fresh(SPEC)
        other.raise_epoch(2)
        assert other.log.lsn == held.partition.log.lsn
        held.replica.install(other)
        assert held.replica.role is Role.FOLLOWER
        reads: Reads = Reads.__new__(Reads)
        assert reads._fresh(held, 1) is None

    on_loop(test)
