"""The thinnest whole: two workers, two servers, sync, on both kinds of cluster."""

from __future__ import annotations

from tests.cluster import inspection


def test_two_workers_on_two_servers_end_with_equal_bits(cluster_factory):
    """Parameters are bit-equal on both workers after every single step, and so is the gathered state."""
    cluster = cluster_factory(servers=2, start_workers=2)
    first, second = cluster.start_workers(2, "tests.cluster.bodies:linear", epochs=3)
    cluster.wait_for_workers(90)
    digests = [[e["digest"] for e in w.events("step")] for w in (first, second)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 3 * 12 // 2  # 12 batches of 8 in 96 samples, dealt to two workers
    assert len(set(digests[0])) == len(digests[0]), "some step did not change the parameters"
    assert first.last("final")["state"] == second.last("final")["state"]
    assert {w.last("final")["rank"] for w in (first, second)} == {0, 1}


def test_the_cluster_says_what_happened(inprocess_cluster):
    """Status, ledger and audit table after a run: samples, members, placement over both servers."""
    cluster = inprocess_cluster(servers=2, start_workers=2)
    cluster.start_workers(2, "tests.cluster.bodies:tally", length=40, batch=4, epochs=1)
    cluster.wait_for_workers(90)
    ledger = inspection.ledger_status(cluster.coordinator_address)
    assert [(e.length, e.consumed) for e in ledger.epochs if e.epoch == 0] == [(40, 40)]
    assert [g.next_step for g in ledger.groups] == [5]
    assert not ledger.members, "workers that ended must have left"
    assert ledger.evictions == 0
    status = inspection.status(cluster.coordinator_address)
    assert {s.node.ref.node for s in status.servers} == {"server-0", "server-1"}
    assert {c.state for c in status.clients if c.role == "worker"} == {"left"}
    kinds = [e.kind for e in inspection.events(cluster.coordinator_address)]
    assert kinds.count("server_registered") == 2
