"""Two hundred clients wait in a barrier: a waiting worker costs the server no thread."""

from __future__ import annotations

import asyncio

from paramesh.async_client import AsyncClient
from paramesh.io import IoThread
from paramesh.v1 import ledger_pb2 as ledger

from tests.cluster import inspection

CLIENTS = 200


def test_two_hundred_waiting_clients_cost_no_threads_and_little_memory(process_cluster):
    cluster = process_cluster(servers=1, start_workers=CLIENTS, client_timeout=120.0)
    before = server_figures(cluster.coordinator_address)
    counts, waiting = IoThread.get().run(wait_in_a_barrier(cluster.coordinator_address), 100, "the barrier")
    print(f"threads {before[0]} -> {waiting[0]}, memory {before[1] >> 20} -> {waiting[1] >> 20} MiB")
    assert counts == [CLIENTS] * CLIENTS
    assert waiting[0] <= before[0] + 8, "waiting clients cost threads"
    assert waiting[1] - before[1] < 100 << 20, "a waiting client costs more than half a MiB"


def server_figures(address: str) -> tuple[int, int]:
    """(threads, resident bytes) of the only server."""
    (server,) = inspection.inspect(address, state_hash=False).values()
    return server.threads, server.rss_bytes


async def wait_in_a_barrier(address: str) -> tuple[list[int], tuple[int, int]]:
    """All join; all but one wait; look at the server; the last comes."""
    clients = []
    for start in range(0, CLIENTS, 20):
        some = range(start, start + 20)
        clients += await asyncio.gather(*(AsyncClient.connect(address, slot=f"crowd/{i}") for i in some))
    await asyncio.gather(*(c.ledger.join(ledger.JoinRequest(slot=f"crowd/{i}")) for i, c in enumerate(clients)))
    gather = ledger.GatherRequest(name="crowd")
    waiters = [asyncio.ensure_future(c.ledger.gather(ledger.GatherRequest(name="crowd"))) for c in clients[1:]]
    # The ledger answers in order of arrival on each connection: once a later call of every
    # waiter is answered, all of them wait.
    await asyncio.gather(*(c.ledger.ledger_status(ledger.LedgerStatusRequest()) for c in clients[1:]))
    figures = await asyncio.to_thread(server_figures, address)
    assert not any(w.done() for w in waiters)
    answers = [await clients[0].ledger.gather(gather), *await asyncio.gather(*waiters)]
    await asyncio.gather(*(c.close() for c in clients))
    return [a.count for a in answers], figures
