"""Two hundred clients wait in a barrier: a waiting worker costs the server no thread."""

from __future__ import annotations

import asyncio
from pathlib import Path

from paramesh.async_client import AsyncClient
from paramesh.io import IoThread
from paramesh.v1 import ledger_pb2 as ledger

CLIENTS = 200


def test_two_hundred_waiting_clients_cost_no_threads_and_little_memory(process_cluster):
    cluster = process_cluster(servers=1, start_workers=CLIENTS, client_timeout=120.0)
    server = cluster.processes["server-0"].pid
    before = process_figures(server)
    barrier = wait_in_a_barrier(cluster.coordinator_address, server)
    counts, waiting = IoThread.get().run(barrier, 100, "the barrier")
    print(f"threads {before[0]} -> {waiting[0]}, memory {before[1] >> 20} -> {waiting[1] >> 20} MiB")
    assert counts == [CLIENTS] * CLIENTS
    assert waiting[0] <= before[0] + 8, "waiting clients cost threads"
    assert waiting[1] - before[1] < 100 << 20, "a waiting client costs more than half a MiB"


def process_figures(pid: int) -> tuple[int, int]:
    """(threads, resident bytes) of a process as the kernel counts them, gRPC's own threads included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["Threads"]), int(fields["VmRSS"].split()[0]) << 10


async def wait_in_a_barrier(address: str, server: int) -> tuple[list[int], tuple[int, int]]:
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
    figures = process_figures(server)
    assert not any(w.done() for w in waiters)
    answers = [await clients[0].ledger.gather(gather), *await asyncio.gather(*waiters)]
    await asyncio.gather(*(c.close() for c in clients))
    return [a.count for a in answers], figures
