"""Orders of the coordinator: terms, fences, evictions; and following the map."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from paramesh.channel import header
from paramesh.errors import ParameshError, refuse
from paramesh.headroom import Headroom
from paramesh.retry import Backoff
from paramesh.routing import Routes, cut
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb
from paramesh_server import placement
from paramesh_server.control import ServerControl
from paramesh_server.counters import Counters
from paramesh_server.insync import Ref
from paramesh_server.ledger_host import LedgerHost
from paramesh_server.placement import Placement
from paramesh_server.process import fingerprint
from paramesh_server.room import Room
from paramesh_server.servicer import DataPlane, PlaneLimits
from paramesh_server.shards import Shards
from paramesh_server.staging import Budget
from ps_building import random_gradients, stage, table, value_writes

ME = pb.ReplicaRef(node="me", incarnation=11)
OTHER_ME = pb.ReplicaRef(node="me", incarnation=10)
THEM = pb.ReplicaRef(node="them", incarnation=1)
CONTEXT: Any = None


@pytest.fixture(scope="module", autouse=True)
def _torch_is_warm() -> None:
    """The first optimizer of a process imports for seconds; a server pays for that before it serves."""
    fingerprint()


class FakeLink:
    """Answers what the coordinator would: schemas and the map."""

    def __init__(self, spec: pb.TableSpec) -> None:
        self.spec = spec
        self.newest: Routes | None = None
        self.listeners: list[Callable[[Routes], None]] = []
        self.described = 0

    async def call(self, make: Callable[[Any], Awaitable[Any]], timeout: float, what: str) -> Any:
        if what == "the map":
            assert self.newest is not None
            return co.GetMapResponse(map=self.newest.map)
        self.described += 1
        return co.DescribeTableResponse(spec=self.spec)

    def set_map(self, routes: Routes) -> None:
        for listener in self.listeners:
            listener(routes)


class Node:
    """A server without a wire."""

    def __init__(self, spec: pb.TableSpec) -> None:
        self.link = FakeLink(spec)
        self.ledger = LedgerHost("job", Ref.of(ME), ThreadPoolExecutor(1))
        self.shards = Shards(ThreadPoolExecutor(1), lambda p: self.placement.mine(p), lambda: self.placement.refresh())
        self.placement = Placement(ME, "job", self.link, self.shards, self.ledger, Budget(1 << 30))  # type: ignore[arg-type]
        self.link.listeners.append(self.placement.on_map)
        self.plane = DataPlane(
            "job", lambda: 1, self.shards, Counters(), PlaneLimits(1 << 30, 1024, 1 << 28), Room(Headroom(0.0))
        )
        self.control = ServerControl("job", lambda: 1, self.plane, self.ledger)

    async def follow(self, routes: Routes) -> None:
        self.link.newest = routes
        await self.placement.refresh()

    @property
    def held(self) -> list[int]:
        return sorted(self.shards.held)


def routes(version: int, owners: list[pb.ReplicaRef], generation: int = 1, epoch: int = 1) -> Routes:
    """A map: partition i is owned by owners[i]; 0 is the ledger."""
    rows = [
        pb.Partition(
            id=i, table_id=int(i > 0), index=max(0, i - 1), epoch=epoch, primary=owner, state=pb.PARTITION_STATE_ONLINE
        )
        for i, owner in enumerate(owners)
    ]
    nodes = [pb.Node(ref=ref, address=f"{ref.node}:1", state=pb.NODE_STATE_LIVE) for ref in (ME, THEM)]
    config = pb.JobConfig(start_workers=1, gather_ms=100)
    return Routes(pb.PartitionMap(version=version, generation=generation, nodes=nodes, partitions=rows, config=config))


def on_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


SPEC = table([300], partition_bytes=512)


async def reason(call: Awaitable[Any]) -> str:
    with pytest.raises(ParameshError) as caught:
        await call
    return caught.value.reason


def test_the_map_is_followed_and_repeating_it_changes_nothing() -> None:
    async def test() -> None:
        node = Node(SPEC)
        first = routes(1, [THEM, ME, THEM, ME])
        await node.follow(first)
        assert node.held == [1, 3]
        assert node.shards.held[3].partition.layout == cut(SPEC)[2]
        kept = node.shards.held[1]
        await node.follow(routes(2, [THEM, ME, THEM, ME]))
        assert node.shards.held[1] is kept
        assert node.link.described == 1
        await node.follow(routes(3, [THEM, THEM, ME, ME], epoch=2))
        assert node.held == [2, 3]
        assert node.shards.held[3].partition.epoch == 2

    on_loop(test)


def test_another_incarnation_of_me_is_not_me() -> None:
    async def test() -> None:
        node = Node(SPEC)
        await node.follow(routes(1, [OTHER_ME, OTHER_ME, ME]))
        assert node.held == [2]
        assert not node.placement.mine(1)
        assert await reason(node.control.Evict(evict(1), CONTEXT)) == "PARTITION_OFFLINE"

    on_loop(test)


def test_an_offline_partition_is_kept() -> None:
    """Its memory is the only copy: the coordinator may find this process alive again."""

    async def test() -> None:
        node = Node(SPEC)
        await node.follow(routes(1, [ME, ME]))
        kept, ledger = node.shards.held[1], await node.ledger.service()
        lost = routes(2, [ME, ME])
        for row in lost.map.partitions:
            row.state = pb.PARTITION_STATE_OFFLINE
        await node.follow(Routes(lost.map))
        await node.follow(routes(3, [ME, ME], epoch=2))
        assert node.shards.held[1] is kept
        assert await node.ledger.service() is ledger


def test_an_offline_partition_that_is_not_here_is_not_made() -> None:
    """Nothing here could be its values: a new process of this name is another incarnation."""

    async def test() -> None:
        node = Node(SPEC)
        lost = routes(1, [ME, ME])
        for row in lost.map.partitions:
            row.state = pb.PARTITION_STATE_OFFLINE
        await node.follow(Routes(lost.map))
        assert node.held == []
        assert await reason(node.control.Evict(evict(1), CONTEXT)) == "PARTITION_OFFLINE"

    on_loop(test)


def test_a_coordinator_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schema could not be fetched at first: the partition is made all the same, later."""

    async def test() -> None:
        node = Node(SPEC)
        monkeypatch.setattr(placement, "Backoff", lambda: Backoff(first=0.001))
        answers = iter([refuse("UNREACHABLE", "no coordinator answered"), refuse("UNREACHABLE", "still not")])
        plain = node.link.call

        async def flaky(make: Callable[[Any], Awaitable[Any]], timeout: float, what: str) -> Any:
            if what != "the map" and (error := next(answers, None)):
                raise error
            return await plain(make, timeout, what)

        monkeypatch.setattr(node.link, "call", flaky)
        await node.follow(routes(1, [THEM, ME]))
        assert node.held == [1]

    on_loop(test)


def test_a_new_generation_drops_everything() -> None:
    """Invariant 25: nothing of the old generation is left to be read or changed."""

    async def test() -> None:
        node = Node(SPEC)
        await node.follow(routes(1, [ME, ME]))
        partition, ledger = node.shards.held[1].partition, await node.ledger.service()
        partition.assign(1, 1, value_writes(partition.layout, random_gradients(partition.layout, 1)), 1)
        stage(partition, 1, list(random_gradients(partition.layout, 2)))
        await node.follow(routes(2, [ME, ME], generation=2))
        assert node.shards.held[1].partition.initialising
        assert partition.staging.nbytes == 0
        assert await node.ledger.service() is not ledger

    on_loop(test)


def test_a_table_that_cannot_be_made_says_why() -> None:
    async def test() -> None:
        node = Node(table([64], "Muon"))
        await node.follow(routes(1, [THEM, ME]))
        assert await reason(node.plane.find(1, 1)) == "UNSUPPORTED_OPTIMIZER"

    on_loop(test)


def fence(term: int, *clients: int) -> rp.FenceRequest:
    return rp.FenceRequest(request=header("job", 1), term=term, client_ids=clients)


def evict(term: int, client: int = 5) -> rp.EvictRequest:
    return rp.EvictRequest(request=header("job", 1), term=term, client_id=client, why="test")


def test_orders_of_an_older_term_are_refused() -> None:
    """Bad-input row 37: a coordinator that was replaced while paused commands nobody."""

    async def test() -> None:
        node = Node(SPEC)
        await node.follow(routes(1, [ME, ME]))
        assert (await node.control.Fence(fence(4, 9), CONTEXT)).partitions == 1
        assert (await node.control.Fence(fence(4, 9), CONTEXT)).partitions == 1  # repeatable
        for order in (node.control.Fence(fence(3, 8), CONTEXT), node.control.Evict(evict(3), CONTEXT)):
            assert await reason(order) == "STALE_TERM"
        assert not node.shards.held[1].partition.dedup.fenced(8)
        assert await reason(node.control.Fence(fence(0, 8), CONTEXT)) == "MISSING_FIELD"
        assert await reason(node.control.Evict(evict(4, client=0), CONTEXT)) == "MISSING_FIELD"
        node.control.saw(6)
        assert await reason(node.control.Evict(evict(5), CONTEXT)) == "STALE_TERM"

    on_loop(test)


def test_evict_reaches_the_ledger_that_is_here() -> None:
    async def test() -> None:
        node = Node(SPEC)
        assert await reason(node.control.Evict(evict(1), CONTEXT)) == "NOT_READY"
        await node.follow(routes(1, [ME]))
        assert not (await node.control.Evict(evict(1), CONTEXT)).was_member
        await node.follow(routes(2, [THEM]))
        assert await reason(node.control.Evict(evict(1), CONTEXT)) == "NOT_PRIMARY"

    on_loop(test)


def test_clients_that_died_are_fenced_in_partitions_made_later_too() -> None:
    """The coordinator repeats its fences; a partition made after one must hear of it."""

    async def test() -> None:
        node = Node(SPEC)
        await node.follow(routes(1, [ME]))
        await node.control.Fence(fence(1, 9), CONTEXT)
        await node.follow(routes(2, [ME, ME]))
        assert node.shards.held[1].partition.dedup.fenced(9)

    on_loop(test)


def test_a_ledger_promoted_again_before_a_map_deposed_it_has_one_service() -> None:
    """A follower's refusal deposed it: its old service must not go on beside the new one."""

    async def test() -> None:
        node = Node(SPEC)
        await node.follow(routes(1, [ME]))
        before = await node.ledger.service()
        assert node.ledger.slot is not None
        node.ledger.slot.replica.heed(2)
        await node.follow(routes(2, [ME], epoch=3))
        after = await node.ledger.service()
        assert after is not before
        request = lg.LedgerStatusRequest(request=header("job", 1))
        assert await reason(before.LedgerStatus(request, CONTEXT)) == "NOT_PRIMARY"
        await after.LedgerStatus(request, CONTEXT)

    on_loop(test)


def test_a_ledger_that_a_follower_deposed_ends_before_any_map_says_so() -> None:
    """Its coordinator is out of reach; whoever asks it must look for the next one, not wait for a poll to end."""

    async def test() -> None:
        node = Node(SPEC)
        await node.follow(routes(1, [ME]))
        before = await node.ledger.service()
        assert node.ledger.slot is not None
        node.ledger.slot.replica.heed(2)
        assert await reason(node.ledger.service()) == "NOT_PRIMARY"
        request = lg.LedgerStatusRequest(request=header("job", 1))
        assert await reason(before.LedgerStatus(request, CONTEXT)) == "NOT_PRIMARY"

    on_loop(test)


def test_what_the_ledger_has_written_is_not_acknowledged_with_too_few_in_sync() -> None:
    """Invariant 10, as for tables: the follower went after the record was appended, and before the answer left."""

    async def test() -> None:
        node, maps = Node(SPEC), [routes(1, [ME]), routes(2, [ME])]
        for newest, in_sync in zip(maps, ([ME, THEM], [ME]), strict=True):
            newest.map.config.min_isr = 2
            newest.map.partitions[0].version = newest.version
            newest.map.partitions[0].isr.extend(in_sync)
        await node.follow(maps[0])
        assert node.ledger.slot is not None
        log = node.ledger.slot.replica.machine.log
        joining = asyncio.ensure_future(
            node.ledger._forward("Join")(lg.JoinRequest(request=header("job", 1, 7)), CONTEXT)
        )
        while not log.lsn:  # noqa: ASYNC110 (there is nothing to set an event)
            await asyncio.sleep(0)
        await node.follow(Routes(maps[1].map))
        assert await reason(joining) == "NOT_ENOUGH_REPLICAS"
        steps = lg.GetStepsRequest(request=header("job", 1, 7), group=1)
        assert await reason(node.ledger._forward("GetSteps")(steps, CONTEXT)) == "UNKNOWN_GROUP", "reads go on"

    on_loop(test)
