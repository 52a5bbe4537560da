"""Primaries that die just after a follower attached (fault row 1b; invariants 1, 9).

Redis Cluster elects such a follower although it is empty, and every acknowledged write of the test
is gone (6 of 12 runs). Here it is not electable before it has everything: somebody else takes
over, or the partition is OFFLINE and says so.
"""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from tests.cluster import replication
from tests.cluster.replication import Row

BOUND = 15.0


@pytest.mark.parametrize("after", [pytest.param("as a learner", marks=pytest.mark.soak), "in sync"])
def test_a_primary_killed_just_after_a_follower_attached_loses_nothing_silently(process_cluster, after):
    """Row 1b: Redis elected such a follower empty and lost all. Here: the old data, or OFFLINE."""
    cluster = process_cluster(servers=2, replicas=2)
    pushers = replication.start_pushers(cluster)
    replication.wait_until_in_sync(cluster, 2)
    cluster.kill("server-1")
    cluster.wait_until(
        lambda: all(row.primary == "server-0" and row.online for row in replication.rows(cluster).values()),
        BOUND,
        "the other server to lead everything",
    )
    led = list(replication.rows(cluster))
    cluster.restart("server-1")

    def attached() -> bool:
        found = [
            row.learners if after == "as a learner" else row.followers for row in replication.rows(cluster).values()
        ]
        return any("server-1" in names for names in found)

    cluster.wait_until(attached, 60, f"the new follower {after}")
    cluster.kill("server-0")
    cluster.wait_until(lambda: all(decided(row) for row in replication.rows(cluster).values()), BOUND, "the verdict")
    after_rows = replication.rows(cluster)
    offline = [p for p in led if not after_rows[p].online]
    print(f"after={after!r} offline={offline} of={led}")
    for pusher in pushers:
        pusher.open_gate("stop")
    cluster.wait_until(lambda: all(w.exit_code is not None or w.events("acked") for w in pushers), 60, "the pushers")
    replication.compare_where_online(cluster, pushers, after_rows)


def decided(row: Row) -> bool:
    """Whether a partition has another primary than the one that was killed, or is offline."""
    return not row.online or row.primary != "server-0"


ROUNDS = 50


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_fifty_primaries_killed_within_half_a_second_of_an_attachment_lose_nothing(process_cluster):
    """With a second follower in sync somebody always may take over: it is never the new one while it lacks anything."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed={seed}")
    draw, stood = random.Random(seed), Counter[str]()
    cluster = process_cluster(servers=3, replicas=3)
    pushers = replication.start_pushers(cluster, pace=0.02, deadline=1800)
    for _ in range(ROUNDS):
        before = replication.wait_until_in_sync(cluster, 3)
        row = before[draw.choice([p for p in before if p])]
        newcomer = draw.choice(row.followers)
        cluster.kill(newcomer)
        cluster.wait_until(lambda n=newcomer: not serves(cluster, n), BOUND, f"{newcomer} to be nobody's copy")
        cluster.restart(newcomer)
        cluster.wait_until(lambda n=newcomer, p=row.id: attached(cluster, n, p), 60, f"{newcomer} to attach")
        due = time.monotonic() + draw.uniform(0, 0.5)
        cluster.wait_until(lambda d=due: time.monotonic() >= d, 5, "half a second at most")
        before = replication.rows(cluster)
        victim = before[row.id].primary
        stood["in sync" if newcomer in before[row.id].isr else "a learner"] += 1
        led, killed = replication.led_by(before, victim), time.monotonic()
        cluster.kill(victim)
        cluster.wait_until(
            lambda b=before, of=led, at=killed: replication.recoveries(pushers, b, of, at), BOUND, "its partitions"
        )
        cluster.restart(victim)
    replication.stop_pushers(cluster, pushers)
    found = replication.account(cluster, pushers)
    print(f"rounds={ROUNDS} the newcomer stood={dict(stood)} {found}")
    found.assert_exact()


def serves(cluster, name: str) -> bool:
    """Whether a server has a copy of anything."""
    return any(name in (row.primary, *row.isr, *row.learners) for row in replication.rows(cluster).values())


def attached(cluster, name: str, partition: int) -> bool:
    """Whether a server has begun to follow a partition."""
    row = replication.rows(cluster)[partition]
    return name in row.learners or name in row.isr
