"""Copies leave at the rate that they are given, all together, two at a time."""

from __future__ import annotations

import asyncio

import pytest
from paramesh_server.pace import COPIES, Pace


class Time:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


async def _drain(pace: Pace, sizes: list[int]) -> list[int]:
    return [len(message) async for message in pace.spaced([bytes(size) for size in sizes])]


def test_messages_are_spaced_by_their_bytes() -> None:
    time = Time()
    pace = Pace(100, time.clock, time.sleep)
    assert asyncio.run(_drain(pace, [50, 100, 25, 25])) == [50, 100, 25, 25]
    assert time.slept == pytest.approx([0.5, 1.0, 0.25])  # the first goes at once


def test_copies_share_the_rate_and_idle_time_is_not_saved_up() -> None:
    time = Time()
    pace = Pace(100, time.clock, time.sleep)
    asyncio.run(_drain(pace, [100]))
    asyncio.run(_drain(pace, [100, 100]))
    assert time.now == pytest.approx(2.0)
    time.now += 60.0
    time.slept.clear()
    asyncio.run(_drain(pace, [100, 100]))
    assert time.slept == pytest.approx([1.0])


def test_no_rate_waits_for_nothing() -> None:
    time = Time()
    pace = Pace(0, time.clock, time.sleep)
    assert asyncio.run(_drain(pace, [1 << 20] * 3)) == [1 << 20] * 3
    assert time.slept == []
    assert pace.seconds(1 << 30) == 0.0


def test_a_deadline_leaves_room_for_the_copies_beside_it() -> None:
    assert Pace(1 << 20).seconds(10 << 20) == pytest.approx(10.0 * COPIES)


def test_so_many_copies_at_a_time() -> None:
    async def test() -> None:
        pace, under_way, seen = Pace(), 0, list[int]()
        full = asyncio.Event()

        async def copy() -> None:
            nonlocal under_way
            async with pace.turn():
                under_way += 1
                seen.append(under_way)
                if under_way == COPIES:
                    full.set()
                await full.wait()
                under_way -= 1

        async with asyncio.timeout(5):
            await asyncio.gather(*(copy() for _ in range(5)))
        assert max(seen) == COPIES
        assert len(seen) == 5

    asyncio.run(test())
