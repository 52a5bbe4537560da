"""A partition that is offline may come back: how long a client waits before it says that a server is lost."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from paramesh import delivery
from paramesh.async_client import AsyncClient
from paramesh.coordinator_link import CoordinatorLink
from paramesh.delivery import Delivery
from paramesh.encoded import Encoded
from paramesh.errors import PartitionOffline
from paramesh.routing import Routes
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb


def routes(version: int, online: bool, live: tuple[str, ...] = ()) -> Routes:
    """A map with the ledger at server a, in sync at a and b; `live` are the servers that are."""
    refs = [pb.ReplicaRef(node=name, incarnation=1) for name in "ab"]
    dead, alive = pb.NODE_STATE_DEAD, pb.NODE_STATE_LIVE
    nodes = [pb.Node(ref=r, address=f"{r.node}:1", state=alive if r.node in live else dead) for r in refs]
    state = pb.PARTITION_STATE_ONLINE if online else pb.PARTITION_STATE_OFFLINE
    row = pb.Partition(id=0, primary=refs[0], isr=refs, epoch=version, state=state)
    return Routes(pb.PartitionMap(version=version, generation=1, nodes=nodes, partitions=[row]))


def client(first: Routes) -> Delivery:
    """What delivers, without a coordinator: maps are given to it."""
    made = AsyncClient(CoordinatorLink("127.0.0.1:1", "default"), co.RegisterClientResponse(client_id=1))
    made.link.set_map(first)
    return made


def test_a_server_that_is_heard_again_soon_was_not_lost():
    """Two servers on a machine that stood still for 2 s ended the training, though both were there again at once."""

    async def main() -> int:
        one = client(routes(1, online=False))
        waiting = asyncio.ensure_future(one.primary(0, time.monotonic() + 30))
        await asyncio.sleep(0)
        assert not waiting.done()
        one.link.set_map(routes(2, online=True, live=("a",)))
        _, epoch = await waiting
        return epoch

    assert asyncio.run(main()) == 2


def test_a_partition_that_is_being_restored_is_waited_for():
    """A pull beside a restore ended in NOT_READY, "is being loaded", though nothing else was wrong."""

    async def main() -> int:
        restoring = routes(1, online=True, live=("a",)).map
        restoring.partitions[0].state = pb.PARTITION_STATE_RESTORING
        one = client(Routes(restoring))
        waiting = asyncio.ensure_future(one.primary(0, time.monotonic() + 30))
        await asyncio.sleep(0)
        assert not waiting.done()
        one.link.set_map(routes(2, online=True, live=("a",)))
        _, epoch = await waiting
        return epoch

    assert asyncio.run(main()) == 2


def test_a_partition_that_is_held_back_is_waited_for(monkeypatch):
    """While a live server has a complete copy, the coordinator gives it the partition in the end."""
    monkeypatch.setattr(delivery, "OFFLINE_S", 0.0)

    async def main() -> None:
        one = client(routes(1, online=False, live=("b",)))
        waiting = asyncio.ensure_future(one.primary(0, time.monotonic() + 30))
        await asyncio.sleep(0)
        assert not waiting.done()
        one.link.set_map(routes(2, online=False))
        with pytest.raises(PartitionOffline):
            await waiting

    asyncio.run(main())


def test_the_wait_counts_from_the_first_time_and_ends_when_it_is_back(monkeypatch):
    monkeypatch.setattr(delivery, "OFFLINE_S", 0.05)

    async def main() -> None:
        one = client(routes(1, online=False))
        began = time.monotonic()
        with pytest.raises(PartitionOffline):
            await one.primary(0, began + 30)
        with pytest.raises(PartitionOffline):  # at once: a user's retries do not wait anew
            await asyncio.wait_for(one.primary(0, began + 30), 10)
        one.link.set_map(routes(2, online=True, live=("a",)))
        assert (await one.primary(0, began + 30))[1] == 2
        assert not one._offline

    asyncio.run(main())


@pytest.mark.parametrize("state", [pb.PARTITION_STATE_ONLINE, pb.PARTITION_STATE_OFFLINE])
def test_a_new_primary_that_goes_too_while_it_is_brought_what_was_staged_ends_nothing(state):
    """Killed in its turn: the step is tried again at the next one. It came out as UNREACHABLE from `step()`."""

    async def main() -> bool:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = f"127.0.0.1:{closed.getsockname()[1]}"
        ref = pb.ReplicaRef(node="a", incarnation=1)
        row = pb.Partition(id=1, primary=ref, isr=[ref], epoch=2, state=state)
        node = pb.Node(ref=ref, address=address, state=pb.NODE_STATE_LIVE)
        found = pb.PartitionMap(version=1, generation=1, nodes=[node], partitions=[row])
        link = CoordinatorLink("127.0.0.1:1", "default")
        one = AsyncClient(link, co.RegisterClientResponse(client_id=7, generation=1, map=found))
        try:
            one._keep(0, 5, {1: Encoded.from_parts(1, b"", [(0, memoryview(bytes(64)))])}, {1: 1})
            return await one._restage(1, 0, 5, [7], [])
        finally:
            await one.close()

    assert asyncio.run(main())
