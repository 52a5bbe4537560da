"""A coordinator whose store is not its cluster's must not lead: rows would be made anew over data that lives."""

from __future__ import annotations

from tests.cluster import inspection, replication


def test_a_coordinator_on_an_empty_store_gives_way_to_servers_that_hold_partitions(process_cluster):
    """It says what to do and ends; servers and workers go on, and the right store is taken up again."""
    cluster = process_cluster(servers=2, replicas=2)
    pushers = replication.start_pushers(cluster)
    before = replication.wait_until_in_sync(cluster, 2)
    cluster.kill("coordinator")
    store = cluster.directory / "coordinator.sqlite"
    aside = cluster.directory / "aside"
    aside.mkdir()
    for path in cluster.directory.glob("coordinator.sqlite*"):
        path.rename(aside / path.name)

    cluster.restart("coordinator")
    coordinator = cluster.processes["coordinator"]
    assert coordinator.wait(30) == 2
    said = coordinator.tail()
    assert "--state: it was empty, but server" in said
    assert "Give --state the store that the cluster was started with" in said
    assert [cluster.processes[f"server-{n}"].exit_code for n in (0, 1)] == [None, None]

    for path in cluster.directory.glob("coordinator.sqlite*"):
        path.unlink()
    for path in aside.iterdir():
        path.rename(store.with_name(path.name))
    cluster.restart("coordinator")
    cluster.wait_until(lambda: len(cluster.live_servers()) == 2, 20, "the cluster to be known again")
    after = replication.rows(cluster)
    assert {p: row.primary for p, row in after.items()} == {p: row.primary for p, row in before.items()}
    replication.stop_pushers(cluster, pushers)
    replication.account(cluster, pushers).assert_exact()
    kinds = {e.kind for e in inspection.events(cluster.coordinator_address)}
    assert not kinds & {"server_dead", "partition_offline"}
