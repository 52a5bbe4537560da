"""A worker that does not know what became of its push joins as a new client, and its old self goes at once."""

from __future__ import annotations

import torch
from paramesh import testing
from paramesh.config import ClientConfig
from paramesh.membership import Session
from paramesh.v1 import ledger_pb2 as lg

from tests.cluster.waiting import wait_until
from tests.integration.test_cut_streams import CELLS, push_into_the_dark


def lease(session: Session) -> list[tuple[int, int]]:
    request = lg.LeaseRequest(dataset="d", length=4, chunk=2, want=2)
    answer = session.call(session.client.ledger.lease(request), "a lease")
    return [(r.begin, r.end) for r in answer.leases]


def test_a_spoiled_client_leaves_before_its_successor_joins() -> None:
    """Nobody else would end it: it beats for itself and was evicted by nobody."""
    with testing.Cluster(client_timeout=600.0, push_timeout=1.0) as cluster:
        tool = cluster.client()
        tool.create_table("t", {"w": torch.zeros(CELLS, dtype=torch.float64)}, "SGD", {"lr": 1.0})
        (partition,) = tool.inspect("t")
        node, _ = tool._client.routes.primary(partition)
        session = Session.join(ClientConfig(coordinators=cluster.address, slot="here/0", rank=0))
        leased = lease(session)
        assert leased
        old = session.client
        assert cluster.call(push_into_the_dark(old, partition, node.address, "cancelled")) == "cancelled"
        assert old.spoiled
        session.rejoin()
        assert session.rank == 0
        status = session.call(session.client.ledger.ledger_status(lg.LedgerStatusRequest()), "the ledger")
        assert [m.client_id for m in status.members] == [session.client.client_id]
        assert status.evictions == 0
        assert lease(session) == leased  # its samples came back with it
        state = cluster._coordinator._driver.state
        assert state.client(old.client_id).state == "left"
        held = cluster._servers[0]._shards.held[partition]
        wait_until(lambda: held.partition.dedup.fenced(old.client_id), 10, "its late pushes to be refused")
        session.leave()
