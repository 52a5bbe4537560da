"""Servers lost with replicas left, under async pushes that are counted.

Fault rows 1-3 and 6-10; invariants 1, 2, 4, 5, 9, 13.

Every push adds one to a cell, so the tables are the multiset of what was applied: lost and
doubled pushes show. What a failover takes is measured by `benchmarks failover`; bounds here
only tell a failover from a hang.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import paramesh
import pytest
from paramesh.async_client import AsyncClient
from paramesh.errors import ParameshError
from paramesh.framing import encode
from paramesh.io import IoThread
from paramesh.lanes.grpc_lane import GrpcLane
from paramesh.v1 import parameter_server_pb2 as ps

from tests.cluster import inspection, replication
from tests.cluster.handle import WorkerHandle
from tests.cluster.processes import ProcessCluster
from tests.cluster.replica_bodies import COUNTERS, make_counters, one_unit
from tests.cluster.replication import Row
from tests.faults.proxy import Proxy

BOUND = 15.0
TIMEOUT = 2.0
"""The failure timeout, by default."""

THREE = pytest.param(3, 3, id="three", marks=pytest.mark.soak)  # as with two, but for longer: see make soak
SIZES = pytest.mark.parametrize(("servers", "replicas"), [pytest.param(3, 2, id="two"), THREE])


def pushing(process_cluster, servers: int, replicas: int) -> tuple[ProcessCluster, list[WorkerHandle], dict[int, Row]]:
    """A cluster whose every partition is in sync and pushed to."""
    cluster = process_cluster(servers=servers, replicas=replicas)
    pushers = replication.start_pushers(cluster)
    return cluster, pushers, replication.wait_until_in_sync(cluster, replicas)


def wait_for_recovery(cluster, pushers, before, partitions, what: str, since: float) -> dict[int, float]:
    """Seconds from `since` to the first acknowledgement under a new epoch, by partition; printed."""
    back = cluster.wait_until(lambda: replication.recoveries(pushers, before, partitions, since), BOUND, what)
    took = {p: round(e["t"] - since, 3) for p, e in back.items()}
    print(f"recovered_s={took}")
    return took


def settle(cluster, pushers) -> None:
    """Stop pushing and count."""
    replication.stop_pushers(cluster, pushers)
    found = replication.account(cluster, pushers)
    print(found)
    found.assert_exact()


def kinds(cluster) -> list[str]:
    """Of the audit lines."""
    return [e.kind for e in inspection.events(cluster.coordinator_address)]


@SIZES
def test_a_killed_primary_loses_and_doubles_nothing(process_cluster, servers, replicas):
    """Row 1: every partition acknowledges again, under a primary that was in sync."""
    cluster, pushers, before = pushing(process_cluster, servers, replicas)
    victim = before[0].primary
    led = replication.led_by(before, victim)
    assert led, "the victim leads nothing"

    killed = time.monotonic()
    cluster.kill(victim)
    wait_for_recovery(cluster, pushers, before, led, "its partitions to acknowledge", killed)
    settle(cluster, pushers)
    after = replication.rows(cluster)
    assert all(after[p].primary in before[p].followers for p in led), "promoted from outside the in-sync set"
    assert {"server_dead"} <= set(kinds(cluster)), "no audit line (invariant 30)"


@pytest.mark.soak
@SIZES
def test_three_servers_killed_and_started_again_one_after_the_other(process_cluster, servers, replicas):
    """Each comes back empty and is in sync again before the next dies: nothing is lost in any round."""
    cluster, pushers, before = pushing(process_cluster, servers, replicas)
    for victim in ("server-0", "server-1", "server-2"):
        led = replication.led_by(before, victim)
        killed = time.monotonic()
        cluster.kill(victim)
        wait_for_recovery(cluster, pushers, before, led, f"partitions of {victim}", killed)
        cluster.restart(victim)
        before = replication.wait_until_in_sync(cluster, replicas)
    settle(cluster, pushers)


@pytest.fixture
def own_client() -> Iterator[list[AsyncClient]]:
    """Clients of the test's own process, closed with it."""
    clients: list[AsyncClient] = []
    yield clients
    for client in clients:
        IoThread.get().run(client.close(), 10, "closing")


def one_table(cluster, clients: list[AsyncClient], proxy_of=None) -> tuple[AsyncClient, int]:
    """A client with one table of counts, and its partition."""
    with paramesh.connect(cluster.coordinator_address) as tool:
        make_counters(tool, 1)
        (partition,) = tool._client.routes.partitions_of(f"{COUNTERS}0")
    client = IoThread.get().run(AsyncClient.connect(cluster.coordinator_address, role="tool"), 30, "a client")
    clients.append(client)
    return client, partition


def counts(cluster) -> list[float]:
    """The table's cells."""
    with paramesh.connect(cluster.coordinator_address) as tool:
        return tool.pull(f"{COUNTERS}0")["w"].tolist()


@SIZES
def test_a_primary_killed_before_its_reply_arrives_has_the_push_known_as_a_duplicate(
    process_cluster, own_client, servers, replicas
):
    """Row 2: applied everywhere, reply lost with the primary; the retry gets the first answer from the new one."""
    cluster = process_cluster(servers=servers, replicas=replicas, client_timeout=120)  # its clients do not beat
    client, partition = one_table(cluster, own_client)
    before = replication.wait_until_in_sync(cluster, replicas)[partition]
    io = IoThread.get()
    with Proxy(inspection.primary_address(cluster.coordinator_address, partition)) as proxy:
        old, direct = proxy.target, client.lane
        client.lane = lambda address: direct(proxy.address if address == old else address)  # type: ignore[method-assign]
        io.run(client.push_sequenced(one_unit(partition, 0)), 20, "the first push")
        proxy.silence(down=True)
        push = io.submit(client.push_sequenced(one_unit(partition, 1)))
        cluster.wait_until(lambda: counts(cluster)[1] == 1.0, BOUND, "the push to be committed")
        assert not push.done(), "its reply came through"
        cluster.kill(before.primary)
        proxy.cut()  # as the kernel of a killed process does; the reply stays lost
        (outcome,) = push.result(20).values()
    assert outcome.duplicate
    assert outcome.epoch > before.epoch
    assert counts(cluster)[:3] == [1.0, 1.0, 0.0]


@pytest.mark.soak
@SIZES
def test_a_primary_killed_before_its_followers_acknowledge_counts_the_push_once(
    process_cluster, own_client, servers, replicas
):
    """Row 3: appended and applied by the primary alone; whether a follower has it or not, it counts once."""
    cluster = process_cluster(servers=servers, replicas=replicas, client_timeout=120)
    client, partition = one_table(cluster, own_client)
    before = replication.wait_until_in_sync(cluster, replicas)[partition]
    io = IoThread.get()
    io.run(client.push_sequenced(one_unit(partition, 0)), 20, "the first push")
    for follower in before.followers:
        cluster.pause(follower)
    push = io.submit(client.push_sequenced(one_unit(partition, 1)))
    address = inspection.primary_address(cluster.coordinator_address, partition)
    cluster.wait_until(lambda: applied_at(address, partition) == 2, BOUND, "the primary to have applied it")
    assert not push.done(), "acknowledged although no follower could have it (invariant 11)"
    cluster.kill(before.primary)
    for follower in before.followers:
        cluster.resume(follower)
    (outcome,) = push.result(30).values()
    print(f"replicas={replicas} duplicate={outcome.duplicate}")
    assert outcome.epoch > before.epoch
    assert counts(cluster)[:3] == [1.0, 1.0, 0.0]


def applied_at(address: str, partition: int) -> int:
    """Pushes that one server says it has applied, committed or not."""
    found = inspection.inspect_at(address)
    return next(p.pushes for p in found.partitions if p.partition == partition)


@pytest.mark.soak
@SIZES
def test_a_killed_follower_costs_a_stall_at_most(process_cluster, servers, replicas):
    """Row 6: partitions that it only follows go on under the same epoch; it leaves every in-sync set."""
    cluster, pushers, before = pushing(process_cluster, servers, replicas)
    victim = before[0].primary
    followed = [p for p, row in before.items() if p and victim in row.followers]
    assert followed
    killed = time.monotonic()
    cluster.kill(victim)
    cluster.wait_until(
        lambda: all(victim not in row.isr for row in replication.rows(cluster).values()), BOUND, "it to leave the sets"
    )
    shrunk = time.monotonic() - killed
    # Somebody else takes its place where there is a third server to do so.
    replication.wait_until_in_sync(cluster, 2)
    settle(cluster, pushers)
    stalls = [e["gap"] for w in pushers for e in w.events("stall") if e["partition"] in followed and e["t"] > killed]
    print(f"replicas={replicas} shrunk_after_s={shrunk:.3f} longest_stall_s={max(stalls, default=0.0):.3f}")
    assert max(stalls, default=0.0) < TIMEOUT + 3.0
    after = replication.rows(cluster)
    assert all(after[p].epoch == before[p].epoch for p in followed)


def test_a_partition_whose_two_servers_are_killed_is_offline_within_5_seconds(process_cluster):
    """Row 7: nothing wrong is served; clients and audit say which partition, which servers and what to do."""
    cluster, pushers, before = pushing(process_cluster, 3, 2)
    lost = set(before[1].isr)
    gone = [p for p, row in before.items() if p and set(row.isr) <= lost]
    killed = time.monotonic()
    for name in sorted(lost):
        cluster.kill(name)
    cluster.wait_until(
        lambda: all(len([e for e in w.events("failed") if e["partition"] in gone]) == len(gone) for w in pushers),
        BOUND,
        "every pusher to be told",
    )
    failed = [e for w in pushers for e in w.events("failed")]
    print(f"offline={gone} told_after_s={max(e['t'] for e in failed) - killed:.3f} message={failed[0]['message']!r}")
    assert {e["partition"] for e in failed} == set(gone), "a partition with a live replica failed its client"
    assert {e["reason"] for e in failed} == {"PARTITION_OFFLINE"}
    assert max(e["t"] for e in failed) - killed < 5.0
    offline = [e for e in inspection.events(cluster.coordinator_address) if e.kind == "partition_offline"]
    assert offline
    found = replication.rows(cluster)
    assert {p for p, row in found.items() if p and not row.online} == set(gone)
    for pusher in pushers:
        pusher.open_gate("stop")
    cluster.wait_until(lambda: all(w.events("acked") for w in pushers), 60, "the pushers to stop")
    replication.compare_where_online(cluster, pushers, found)


def wait_seconds(cluster, seconds: float) -> None:
    """Let time pass while others work."""
    end = time.monotonic() + seconds
    cluster.wait_until(lambda: time.monotonic() >= end, seconds + 5, "time to pass")


@pytest.mark.soak
@SIZES
def test_a_primary_stopped_for_half_a_timeout_stays_primary(process_cluster, servers, replicas):
    """Row 8: no failover, nobody leaves a set, pushes go on when it does."""
    cluster, pushers, before = pushing(process_cluster, servers, replicas)
    victim = before[0].primary
    cluster.pause(victim)
    wait_seconds(cluster, 0.5 * TIMEOUT)
    cluster.resume(victim)
    resumed = time.monotonic()
    led = replication.led_by(before, victim)
    cluster.wait_until(
        lambda: all({e["partition"] for e in w.events("stall") if e["t"] > resumed} >= set(led) for w in pushers),
        BOUND,
        "its partitions to acknowledge again",
    )
    after = replication.rows(cluster)
    assert {p: (r.primary, r.epoch) for p, r in after.items()} == {p: (r.primary, r.epoch) for p, r in before.items()}
    assert not [k for k in kinds(cluster) if "dead" in k or "shrunk" in k]
    settle(cluster, pushers)


@SIZES
def test_a_zombie_primary_acknowledges_nothing(process_cluster, own_client, servers, replicas):
    """Row 9: stopped for five timeouts and continued, with clients that still push to it."""
    cluster, pushers, before = pushing(process_cluster, servers, replicas)
    victim = before[0].primary
    led = replication.led_by(before, victim)
    stale = IoThread.get().run(AsyncClient.connect(cluster.coordinator_address, role="tool"), 30, "a stale client")
    own_client.append(stale)
    stale.link.listeners.clear()
    old = dict(zip(led, [inspection.primary_address(cluster.coordinator_address, p) for p in led], strict=True))
    pinned = stale.routes
    stopped = time.monotonic()
    cluster.pause(victim)
    wait_for_recovery(cluster, pushers, before, led, "another primary", stopped)
    late = [IoThread.get().submit(push_as_of(stale, pinned, p, old[p])) for p in led]
    wait_seconds(cluster, max(0.0, 5 * TIMEOUT - (time.monotonic() - stopped)))
    cluster.resume(victim)
    answers = [push.result(60) for push in late]
    answers += [IoThread.get().run(push_as_of(stale, pinned, p, old[p]), 60, "a push to the zombie") for p in led]
    print(f"the zombie answered: {answers}")
    assert not [a for a in answers if a == "ok"], "a deposed primary acknowledged a push"
    replication.wait_until_in_sync(cluster, replicas)
    settle(cluster, pushers)
    assert no_older_epoch(pushers)


async def push_as_of(client: AsyncClient, routes, partition: int, address: str) -> str:
    """Push by an old map to an old primary's address, once; what came of it."""
    _, epoch = routes.primary(partition)
    head = ps.PushHeader(partition=partition, epoch=epoch, sequenced=ps.SequenceKey(seq=1))
    preamble = encode(ps.PushHeader(request=client.header()))
    messages = [preamble, *one_unit(partition, 63)[partition].messages(head)]
    lane = GrpcLane(address)
    try:
        (outcome,) = await lane.push(messages, 30.0)
    except ParameshError as error:
        return error.reason
    finally:
        await lane.close()
    return outcome.error.reason if outcome.HasField("error") else "ok"


def no_older_epoch(pushers) -> bool:
    """Whether acknowledgements of each partition came under epochs that only rose (invariant 4)."""
    for pusher in pushers:
        seen: dict[int, int] = {}
        for event in pusher.events("epoch"):
            if event["epoch"] < seen.get(event["partition"], 0):
                return False
            seen[event["partition"]] = event["epoch"]
    return True


@pytest.mark.soak
@SIZES
def test_a_stopped_follower_leaves_and_rejoins(process_cluster, servers, replicas):
    """Row 10: sets shrink without it, it catches up when it goes on, and is then as good as any."""
    cluster, pushers, before = pushing(process_cluster, servers, replicas)
    victim = before[0].primary
    followed = [p for p, row in before.items() if p and victim in row.followers]
    stopped = time.monotonic()
    cluster.pause(victim)
    cluster.wait_until(
        lambda: all(victim not in row.isr for row in replication.rows(cluster).values()), BOUND, "the sets to shrink"
    )
    shrunk = time.monotonic() - stopped
    cluster.resume(victim)
    after = replication.wait_until_in_sync(cluster, replicas)
    stalls = [e["gap"] for w in pushers for e in w.events("stall") if e["partition"] in followed]
    print(f"replicas={replicas} shrunk_after_s={shrunk:.3f} longest_stall_s={max(stalls, default=0.0):.3f}")
    if replicas == 3:  # everybody must be back: the one who was stopped too
        assert all(victim in row.isr for row in after.values())
        other = next(name for name in ("server-0", "server-1", "server-2") if name != victim)
        killed = time.monotonic()
        cluster.kill(other)
        led = replication.led_by(after, other)
        wait_for_recovery(cluster, pushers, after, led, "partitions of another one", killed)
    settle(cluster, pushers)


@pytest.mark.soak
def test_two_suspicions_in_a_row_interrupt_nobody(process_cluster):
    """Both servers fall silent one after the other and are there again: offline for a while, and no error.

    The second failover for silence within 30 s is held back, although a live server has everything.
    """
    cluster, pushers, before = pushing(process_cluster, 2, 2)
    first = before[1].primary
    second = next(name for name in ("server-0", "server-1") if name != first)
    cluster.pause(first)
    cluster.wait_until(
        lambda: all(row.primary == second and row.online for row in replication.rows(cluster).values()),
        BOUND,
        "the other server to lead everything",
    )
    cluster.resume(first)
    replication.wait_until_in_sync(cluster, 2)
    # What moved back meanwhile (the balancer) is not held back; something else is.
    cluster.pause(second)
    cluster.wait_until(
        lambda: any(not row.online for row in replication.rows(cluster).values()), BOUND, "a partition to be offline"
    )
    cluster.resume(second)
    cluster.wait_until(lambda: all(row.online for row in replication.rows(cluster).values()), 60, "all to be back")
    assert not [e for w in pushers for e in w.events("failed")], "a partition that came back failed its client"
    settle(cluster, pushers)
