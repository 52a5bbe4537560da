"""A coordinator whose store is not its cluster's must not lead; a lost one is made anew from the servers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cluster import inspection, replication
from tests.faults.test_failover_training import assert_as_undisturbed, training


def lose_the_store(cluster) -> None:
    """SIGKILL, and the disk is gone."""
    cluster.kill("coordinator")
    for path in cluster.directory.glob("coordinator.sqlite*"):
        path.unlink()


def rebuild(cluster, servers: list[str], *more: str) -> tuple[int, dict, str]:
    """`psctl meta rebuild`: exit status, document, what it said on stderr."""
    psctl = [sys.executable, "-m", "paramesh_coordinator.psctl", "meta", "rebuild", "--json"]
    command = [
        *psctl,
        f"--to={cluster.directory / 'coordinator.sqlite'}",
        *(f"--server={one}" for one in servers),
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=cluster.env, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def addresses(cluster) -> dict[str, str]:
    """Of each server, the address of its data plane: what an operator knows."""
    return {node.ref.node: node.address for node in inspection.partition_map(cluster.coordinator_address).nodes}


def kinds(cluster) -> list[str]:
    return [e.kind for e in inspection.events(cluster.coordinator_address)]


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
    assert "psctl meta rebuild --to STATE --server 127.0.0.1:" in said
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
    assert not set(kinds(cluster)) & {"server_dead", "partition_offline"}


def test_training_goes_on_with_a_store_made_anew_and_survives_what_comes_after(process_cluster):
    """Nothing is restarted and nothing lost: the same bits, though a primary is killed right after."""
    # Held at step 60 of 80 until all is over: how long psctl takes is the machine's affair.
    cluster, workers, before = training(process_cluster, 3, 2, epochs=4, seconds=0.02, wait_at=60, waiter=1)
    known = addresses(cluster)
    refused, _, said = rebuild(cluster, [known["server-1"]], "--yes")
    assert (refused, "a coordinator answers at" in said) == (1, True)
    lose_the_store(cluster)

    shown, found, said = rebuild(cluster, [known["server-1"]])
    assert (shown, found["stage"], found["problems"]) == (0, "dry-run", []), said
    assert not (cluster.directory / "coordinator.sqlite").exists()
    assert (found["answered"], found["silent"]) == ([f"server-{n}" for n in range(3)], [])
    assert rebuild(cluster, [known["server-1"]], "--yes")[0] == 0
    assert "holds a cluster already" in rebuild(cluster, [known["server-1"]], "--yes")[2]

    cluster.restart("coordinator")
    cluster.wait_until(lambda: len(cluster.live_servers()) == 3, 20, "the cluster to be known again")
    cluster.wait_until(lambda: kinds(cluster).count("host_registered") == 2, 20, "supervisors to come back")
    after = replication.rows(cluster)
    assert {p: (r.primary, r.isr) for p, r in after.items()} == {p: (r.primary, r.isr) for p, r in before.items()}
    assert all(row.epoch > before[p].epoch for p, row in after.items())
    cluster.kill(after[1].primary)
    workers[1].open_gate("go")
    assert_as_undisturbed(cluster, workers, epochs=4)
    assert not [k for k in kinds(cluster) if "evicted" in k]
    assert kinds(cluster).count("server_dead") == 1


@pytest.mark.soak
def test_a_worker_that_dies_after_a_rebuild_is_evicted(process_cluster):
    """Members are known from the ledger, and their supervisors claim them: an exit report still counts."""
    cluster, workers, _ = training(process_cluster, 2, 2, epochs=40, seconds=0.05)
    known = addresses(cluster)
    lose_the_store(cluster)
    assert rebuild(cluster, list(known.values()), "--yes")[0] == 0
    cluster.restart("coordinator")
    cluster.wait_until(lambda: kinds(cluster).count("host_registered") == 2, 30, "supervisors to come back")
    ids = {c.client_id for c in inspection.status(cluster.coordinator_address).clients if c.host}
    assert len(ids) == 2
    workers[1].signal_training(9)
    cluster.wait_until(lambda: len(workers[1].events("hello")) == 2, 60, "the worker to be started again")
    fresh = cluster.wait_until(
        lambda: [c for c in inspection.status(cluster.coordinator_address).clients if c.client_id > max(ids)],
        30, "it to register",
    )  # fmt: skip
    assert fresh[0].client_id > 1_000_000
    assert kinds(cluster).count("client_evicted") == 1
    steps = len(workers[0].events("step"))
    cluster.wait_until(lambda: len(workers[0].events("step")) > steps + 5, 60, "training to go on")


@pytest.mark.soak
def test_a_server_lost_with_the_store_must_be_named_and_its_partitions_go_on(process_cluster):
    """Pushes that were acknowledged before are there; while it is not named, nothing is written."""
    cluster = process_cluster(servers=3, replicas=2)
    pushers = replication.start_pushers(cluster)
    before = replication.wait_until_in_sync(cluster, 2)
    known = addresses(cluster)
    victim = before[1].primary
    led = replication.led_by(before, victim, ledger=True)
    lose_the_store(cluster)
    cluster.kill(victim)
    there = [address for name, address in known.items() if name != victim]
    code, found, said = rebuild(cluster, there, "--yes")
    assert (code, found["silent"], f"say --without {victim}" in said) == (1, [victim], True)
    assert not (cluster.directory / "coordinator.sqlite").exists()
    code, found, said = rebuild(cluster, there, "--yes", f"--without={victim}")
    assert (code, found["promoted"], found["offline"]) == (0, led, []), said
    cluster.restart("coordinator")
    cluster.wait_until(lambda: len(cluster.live_servers()) == 2, 20, "the cluster to be known again")
    replication.wait_until_in_sync(cluster, 2)
    replication.stop_pushers(cluster, pushers)
    replication.account(cluster, pushers).assert_exact()
    cluster.restart(victim)
    cluster.wait_until(lambda: len(cluster.live_servers()) == 3, 30, "its successor to be taken in")


@pytest.mark.soak
def test_pushes_go_on_through_a_rebuild_with_one_copy(process_cluster):
    """Unsupervised clients, that beat for themselves, are known from what the partitions remember of them."""
    cluster = process_cluster(servers=2, replicas=1)
    pushers = replication.start_pushers(cluster)
    known = addresses(cluster)
    lose_the_store(cluster)
    assert rebuild(cluster, [known["server-0"]], "--yes")[0] == 0
    cluster.restart("coordinator")

    def past_the_client_timeout() -> bool:
        return inspection.status(cluster.coordinator_address).uptime_ms > 13_000

    cluster.wait_until(past_the_client_timeout, 40, "whoever does not beat to be evicted")
    replication.stop_pushers(cluster, pushers)
    replication.account(cluster, pushers).assert_exact()
    assert not [w.events("failed") for w in pushers if w.events("failed")]
