"""No answer of a primary leaves before what it reflects is committed: values, snapshots, norms, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from paramesh.channel import header
from paramesh.framing import decode
from paramesh.headroom import Headroom
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb
from paramesh_server.counters import Counters
from paramesh_server.insync import Ref
from paramesh_server.outbound import Outbound
from paramesh_server.pace import Pace
from paramesh_server.reads import Reads
from paramesh_server.replica import Role
from paramesh_server.room import Room
from paramesh_server.servicer import DataPlane, PlaneLimits
from paramesh_server.shards import Held, Shards
from ps_building import random_gradients, ready, record, stage, table

ME, OTHER = Ref("a", 1), Ref("b", 1)
SPEC = table([100, 64], "SGD", {"lr": 0.5})


class Context:
    def time_remaining(self) -> float:
        return 5.0


class World:
    """A primary whose follower answers when the test says so, one step applied and not committed."""

    def __init__(self) -> None:
        self.shards = Shards(ThreadPoolExecutor(1), lambda _: True, lambda: asyncio.sleep(0))
        self.plane = DataPlane(
            "job", lambda: 1, self.shards, Counters(), PlaneLimits(1 << 30, 1024, 1 << 28), Room(Headroom(0.0))
        )
        self.reads = Reads(self.plane, Counters())
        self.held: Held = self.shards.add(ready(SPEC), ME)
        row = pb.Partition(id=1, version=1, epoch=1, isr=[ME.proto(), OTHER.proto()])
        self.held.replica.lead(row, 0.0)
        partition = self.held.partition
        self.commit()
        stage(partition, 1, list(random_gradients(partition.layout, 1)))
        partition.commit([record(0, [(1, 1.0)])])
        self.held.replica.appended(0.0)

    def commit(self) -> None:
        self.held.replica.insync.acked(OTHER, self.held.partition.log.lsn, 0.0)
        self.held.stir()

    async def snapshot(self) -> str:
        request = ps.SnapshotRequest(request=header("job", 1, 5), partitions=[self.asked()])
        messages = [m async for m in self.reads.Snapshot(request, Context())]
        return str(decode(messages[-1], ps.SnapshotHeader).header.error.reason)

    async def pull(self, step: int) -> str:
        request = ps.PullRequest(request=header("job", 1, 5), partitions=[self.asked()], at_step=True, step=step)
        messages = [m async for m in self.reads.Pull(request, Context())]
        return str(decode(messages[-1], ps.PullHeader).header.error.reason)

    async def norm(self) -> str:
        request = ps.NormsRequest(
            request=header("job", 1, 5), partitions=[self.asked()], committed=[record(0, [(1, 1.0)])]
        )
        return str((await self.plane.Norms(request, Context())).norms[0].error.reason)  # type: ignore[arg-type]

    @staticmethod
    def asked() -> ps.PartitionPull:
        return ps.PartitionPull(partition=1, epoch=1)


def on_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


async def _waits(answer: asyncio.Future[Any]) -> bool:
    done, _ = await asyncio.wait({answer}, timeout=0.05)
    return not done


def held_back(ask: Callable[[World], Awaitable[str]], reason: str) -> None:
    """The answer waits for the follower; deposed instead, the primary says so and nothing else."""

    async def test() -> None:
        world = World()
        answer = asyncio.ensure_future(ask(world))
        assert await _waits(answer)
        world.commit()
        assert await answer == reason
        deposed = World()
        answer = asyncio.ensure_future(ask(deposed))
        assert await _waits(answer)
        deposed.held.replica.heed(2)
        deposed.held.stir()
        assert await answer == "NOT_PRIMARY"

    on_loop(test)


def test_a_snapshot_waits_for_what_it_shows() -> None:
    held_back(lambda world: world.snapshot(), "")


def test_no_read_makes_a_step_while_too_few_are_in_sync() -> None:
    """min_isr is about records, whoever brings the decision: a pull of the newest values and a snapshot may, too."""

    async def test() -> None:
        world = World()
        world.commit()
        stage(world.held.partition, 1, list(random_gradients(world.held.partition.layout, 2)), step=1)
        world.held.min_isr = 3
        before = world.held.partition.log.lsn
        decided = [record(0, [(1, 1.0)]), record(1, [(1, 1.0)]), record(2, [(1, 1.0)])]
        newest = ps.PullRequest(request=header("job", 1, 5), partitions=[world.asked()], committed=decided)
        [message] = [m async for m in world.reads.Pull(newest, Context())]  # type: ignore[arg-type]
        assert decode(message, ps.PullHeader).header.error.reason == "NOT_ENOUGH_REPLICAS"
        whole = ps.SnapshotRequest(request=header("job", 1, 5), partitions=[world.asked()], committed=decided)
        [message] = [m async for m in world.reads.Snapshot(whole, Context())]  # type: ignore[arg-type]
        assert decode(message, ps.SnapshotHeader).header.error.reason == "NOT_ENOUGH_REPLICAS"
        norms = ps.NormsRequest(request=header("job", 1, 5), partitions=[world.asked()], committed=decided)
        answer = await world.plane.Norms(norms, Context())  # type: ignore[arg-type]
        assert answer.norms[0].error.reason == "NOT_ENOUGH_REPLICAS"
        assert world.held.partition.log.lsn == before

    on_loop(test)


def test_a_read_without_a_floor_waits_for_a_word_of_silent_followers() -> None:
    """All is committed, but a primary that nobody answers may have been replaced: what it shows may be the past."""

    async def test() -> None:
        for floor, silent in ((1, False), (0, True)):
            world = World()
            world.commit()
            asked = ps.PartitionPull(partition=1, epoch=1, floor_epoch=1 if floor else 0, floor_lsn=floor)
            request = ps.PullRequest(request=header("job", 1, 5), partitions=[asked])
            answer = asyncio.ensure_future(anext(world.reads.Pull(request, Context())))  # type: ignore[arg-type,var-annotated]
            assert await _waits(answer) is silent
            world.commit()
            assert decode(await answer, ps.PullHeader).header.error.reason == ""
        deposed = World()
        deposed.commit()
        answer = asyncio.ensure_future(anext(deposed.reads.Pull(request, Context())))  # type: ignore[arg-type]
        assert await _waits(answer)
        deposed.held.replica.heed(2)
        deposed.held.stir()
        assert decode(await answer, ps.PullHeader).header.error.reason == "NOT_PRIMARY"

    on_loop(test)


def test_a_pull_waits_for_what_it_shows() -> None:
    held_back(lambda world: world.pull(1), "")


def test_that_a_step_is_gone_waits_for_the_step_that_overtook_it() -> None:
    """Told too early, a worker would go on from a step that a failover takes back."""
    held_back(lambda world: world.pull(0), "STEP_OUT_OF_RANGE")
    held_back(lambda world: world.norm(), "STEP_OUT_OF_RANGE")


def test_an_answer_begun_in_one_reign_is_not_given_in_the_next() -> None:
    async def test() -> None:
        world = World()
        answer = asyncio.ensure_future(world.pull(1))
        assert await _waits(answer)
        replica = world.held.replica
        replica.heed(2)
        replica.promise(3)
        replica.take_over(3)
        replica.lead(pb.Partition(id=1, version=2, epoch=3, isr=[ME.proto()]), 0.0)
        assert replica.role is Role.PRIMARY
        world.held.stir()
        assert await answer == "NOT_PRIMARY"

    on_loop(test)


def test_a_follower_that_cannot_be_reached_keeps_no_records_here() -> None:
    async def test() -> None:
        world = World()
        replica = world.held.replica
        replica.pins[OTHER] = 0  # a snapshot that was begun for it
        out = Outbound("job", lambda: 1, ME, lambda: None, Pace())
        out.sync(world.held)
        await world.held.stirred(5.0)
        assert not replica.pins
        await out.close()

    on_loop(test)
