"""Unit-gradient accounting: 10,000 pushes, none lost, none applied twice (invariants 1, 2, 3).

Each push adds one to two cells in different partitions. The network is unkind: requests
are lost, replies are dropped after the server has done the work, messages arrive twice, at
once or long after. In the end the table *is* the multiset of applied pushes.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from paramesh import testing
from paramesh.async_client import AsyncClient
from paramesh.encoded import Encoded
from paramesh.errors import refuse
from paramesh.lanes.grpc_lane import GrpcLane

CLIENTS, PUSHES = 20, 500
TENSORS, CELLS = 32, 64
PARTITION_BYTES = TENSORS * CELLS * 8 // 4  # four partitions


class UnkindNetwork:
    """Wraps a lane's push: loses, drops, doubles and delays, by a seeded dice."""

    def __init__(self, lane: GrpcLane, dice: random.Random) -> None:
        self._push, self._dice = lane.push, dice
        self.counts: Counter[str] = Counter()
        self.differing_duplicates: list[str] = []
        self._late: list[tuple[list[bytes], list[Any]]] = []
        lane.push = self.push  # type: ignore[method-assign]

    async def push(self, messages: Iterable[bytes], timeout: float) -> list[Any]:
        """One push through the network."""
        sent, roll = list(messages), self._dice.random()
        if roll < 0.03:
            self.counts["request lost"] += 1
            raise refuse("UNREACHABLE", "the request was lost")
        answers = await self._push(sent, timeout)
        if roll < 0.08:
            self.counts["reply dropped"] += 1
            raise refuse("UNREACHABLE", "the reply was dropped")
        if roll < 0.11:
            self.counts["doubled"] += 1
            self._compare(answers, await self._push(sent, timeout))
        elif roll < 0.13:
            self._late.append((sent, answers))
        return answers

    async def deliver_late(self) -> None:
        """What the network had kept arrives now, out of its window for most."""
        for sent, _ in self._late:
            self.counts["late"] += 1
            await self._push(sent, 30.0)

    def _compare(self, first: list[Any], again: list[Any]) -> None:
        """A duplicate's reply equals the first (invariant 3)."""
        by_partition = {o.partition: o for o in again}
        for outcome in first:
            other = by_partition[outcome.partition]
            if not outcome.HasField("error") and (other.lsn != outcome.lsn or not other.duplicate):
                self.differing_duplicates.append(f"{outcome} then {other}")


def cells_of(client: int, push: int) -> list[int]:
    """The two cells that a push adds to, spread evenly and in different quarters of the table."""
    total = TENSORS * CELLS
    first = (client * 7919 + push * 104_729) % total
    return [first, (first + total // 2) % total]


def encode(client: AsyncClient, partitions: range, cells: list[int]) -> dict[int, Encoded]:
    """A push of -1 at each cell (SGD at lr 1 adds one), every other tensor absent."""
    per_partition = TENSORS // len(partitions)
    encoded = {}
    for cell in cells:
        tensor, offset = divmod(cell, CELLS)
        index, segment = divmod(tensor, per_partition)
        gradient = torch.zeros(CELLS, dtype=torch.float64)
        gradient[offset] = -1.0
        presence = bytearray(-(-per_partition // 8))
        presence[segment // 8] |= 1 << segment % 8
        where = partitions[index]
        parts = [(segment * CELLS * 8, gradient.numpy().data.cast("B"))]
        encoded[where] = Encoded.from_parts(where, bytes(presence), parts)
    return encoded


@pytest.mark.parametrize("seed", [20261120])
def test_ten_thousand_pushes_over_an_unkind_network(seed):
    with testing.Cluster(servers=2, client_timeout=120.0) as cluster:
        first = {f"t{i}": torch.zeros(CELLS, dtype=torch.float64) for i in range(TENSORS)}
        tool = cluster.client()
        tool.create_table("cells", first, "SGD", {"lr": 1.0}, partition_bytes=PARTITION_BYTES)
        networks = cluster.call(push_from_all(cluster.address, seed), deadline=120)
        found = torch.cat(list(tool.pull("cells").values()))
        info = tool.inspect("cells")

    wanted = torch.zeros(TENSORS * CELLS, dtype=torch.float64)
    for client in range(CLIENTS):
        for push in range(PUSHES):
            for cell in cells_of(client, push):
                wanted[cell] += 1
    assert wanted.sum() == 2 * CLIENTS * PUSHES
    difference = found - wanted
    lost, doubled = float(-difference.clamp(max=0).sum()), float(difference.clamp(min=0).sum())
    mischief = sum((n.counts for n in networks), Counter())
    print(f"pushes={CLIENTS * PUSHES} seed={seed} {dict(mischief)} lost={lost:.0f} duplicated={doubled:.0f}")
    assert (lost, doubled) == (0, 0)
    assert not [d for n in networks for d in n.differing_duplicates]
    assert min(mischief.values()) > 50, "the network was too kind to show anything"
    assert sum(i.pushes for i in info.values()) == 2 * CLIENTS * PUSHES
    assert sum(i.duplicates for i in info.values()) >= mischief["reply dropped"]


async def push_from_all(address: str, seed: int) -> list[UnkindNetwork]:
    """Push from all clients at once, each through its own unkind network to each server."""
    results = await asyncio.gather(*(push_from_one(address, i, random.Random(f"{seed}/{i}")) for i in range(CLIENTS)))
    return [network for networks in results for network in networks]


async def push_from_one(address: str, index: int, dice: random.Random) -> list[UnkindNetwork]:
    client = await AsyncClient.connect(address, role="tool")
    partitions = client.routes.partitions_of("cells")
    networks = [UnkindNetwork(client.lane(a), dice) for a in client.routes.by_server(partitions)]
    for push in range(PUSHES):
        await client.push_sequenced(encode(client, partitions, cells_of(index, push)))
    for network in networks:
        await network.deliver_late()
    await client.deregister()
    await client.close()
    return networks
