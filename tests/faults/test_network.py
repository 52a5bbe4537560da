"""Connections that break, stall or lie (fault rows 26, 28), through a TCP proxy before a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import paramesh
import pytest
import torch
from paramesh import session as sessions
from paramesh import testing
from paramesh.async_client import AsyncClient
from paramesh.encoded import Encoded

from tests.cluster.waiting import wait_until
from tests.faults.proxy import Proxy

CELLS = 64


@pytest.fixture
def cluster() -> Iterator[testing.Cluster]:
    with testing.Cluster(client_timeout=120.0) as cluster:
        yield cluster


def behind(client: AsyncClient, proxy: Proxy) -> AsyncClient:
    """Send this client's data calls through the proxy; its map stays as it is."""
    direct = client.lane

    def lane(address: str):
        return direct(proxy.address)

    client.lane = lane  # type: ignore[method-assign]
    return client


def add_one(partition: int, cell: int) -> dict[int, Encoded]:
    gradient = torch.zeros(CELLS, dtype=torch.float64)
    gradient[cell] = -1.0
    return {partition: Encoded.from_parts(partition, b"", [(0, gradient.numpy().data.cast("B"))])}


def make_table(cluster: testing.Cluster) -> tuple[int, str]:
    """A table of counts; its partition and its server's address."""
    tool = cluster.client()
    tool.create_table("t", {"w": torch.zeros(CELLS, dtype=torch.float64)}, "SGD", {"lr": 1.0})
    (partition,) = tool.inspect("t")
    node, _ = tool._client.routes.primary(partition)
    return partition, node.address


def test_resets_lose_and_double_nothing(cluster):
    """Every connection is reset again and again while four clients push: each push counts once (row 26)."""
    partition, address = make_table(cluster)
    with Proxy(address) as proxy:
        done = threading.Event()
        thread = threading.Thread(target=cut_until, args=(proxy, done), name="cutter")
        thread.start()
        try:
            cluster.call(push_from_four(cluster.address, proxy, partition), deadline=120)
        finally:
            done.set()
            thread.join()
        cuts = proxy.cuts
    print(f"connections reset: {cuts}")
    assert cuts >= 10, "the network was too kind to show anything"
    assert cluster.client().pull("t")["w"].tolist() == [4.0 * 10] * CELLS


def cut_until(proxy: Proxy, done: threading.Event) -> None:
    """Reset all connections every 150 ms."""
    while not done.wait(0.15):
        proxy.cut()


async def push_from_four(address: str, proxy: Proxy, partition: int) -> None:
    async def one() -> None:
        client = behind(await AsyncClient.connect(address, role="tool"), proxy)
        for push in range(10 * CELLS):
            await client.push_sequenced(add_one(partition, push % CELLS))
        await client.close()

    await asyncio.gather(*(one() for _ in range(4)))


def test_a_reply_held_back_is_repeated_by_the_network_not_by_the_server(cluster):
    """Requests pass and replies stall, then the connection dies: the retry is known as a duplicate (row 27)."""
    partition, address = make_table(cluster)
    tool = cluster.client()
    with Proxy(address) as proxy:
        client = behind(cluster.call(AsyncClient.connect(cluster.address, role="tool")), proxy)
        cluster.call(client.push_sequenced(add_one(partition, 0)))
        proxy.silence(down=True)
        push = asyncio.run_coroutine_threadsafe(client.push_sequenced(add_one(partition, 1)), cluster._io.loop)
        wait_until(lambda: tool.pull("t")["w"][1] == 1.0, 10, "the push to be applied")
        assert not push.done()
        proxy.silence()
        proxy.cut()
        (outcome,) = push.result(20).values()
        cluster.call(client.close())
    assert tool.pull("t")["w"].tolist() == [1.0, 1.0] + [0.0] * (CELLS - 2)
    assert outcome.partition == partition
    assert tool.inspect("t")[partition].pushes == 2


def train(proxies: list[Proxy]) -> Callable[[int], list[float]]:
    """A short sync training; with proxies, all calls to servers and ledger go through them."""

    def work(rank: int) -> list[float]:
        session = sessions.current()
        assert session is not None
        if proxies:
            behind(session.client, proxies[0])
        model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        # Not torch.manual_seed: workers are threads here and would draw from one generator in turn.
        first = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=first) * 0.2)
        data = torch.randn(160, 16, generator=torch.Generator().manual_seed(0))
        loader = paramesh.DataLoader(torch.utils.data.TensorDataset(data), batch_size=2, shuffle=True, seed=1)
        optimizer = paramesh.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model)
        for _epoch in range(3):
            for (x,) in loader:
                optimizer.zero_grad()
                (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
                optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()

    return work


def test_resets_under_sync_training_change_no_bit():
    """Invariant 15: the same steps with every connection reset each 150 ms end in the same parameters."""
    with testing.Cluster(workers=2, client_timeout=120.0) as calm:
        wanted = calm.run(train([]))
    with testing.Cluster(workers=2, client_timeout=120.0) as cluster:
        address = cluster.client()._client.routes.map.nodes[0].address
        with Proxy(address) as proxy:
            done = threading.Event()
            thread = threading.Thread(target=cut_until, args=(proxy, done), name="cutter")
            thread.start()
            try:
                found = cluster.run(train([proxy]), deadline=120)
            finally:
                done.set()
                thread.join()
            print(f"connections reset: {proxy.cuts}")
            assert proxy.cuts >= 5, "the network was too kind to show anything"
    assert wanted[0] == wanted[1]
    assert found == wanted
