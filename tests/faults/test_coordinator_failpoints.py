"""The coordinator ends at a named place, before or after a commit or a call (fault row 13; invariants 4, 6, 22).

What was committed is carried out by the next one, what was not is decided anew; within 5 s of its
start nothing is pending, and every acknowledged push counts once.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import paramesh
import pytest

from tests.cluster import inspection, replication

CONVERGED = 5.0
"""Seconds from the restarted coordinator's first answer, of which one failure timeout is its grace."""

QUICK = {"before.server_dead", "after.isr_grown"}
"""The rest is in the soak ring."""


def lose_a_primary(cluster, before) -> None:
    cluster.kill(before[1].primary)


def lose_a_follower(cluster, before) -> None:
    """A follower's silence: its primary asks to drop it, before anybody is declared dead."""
    cluster.pause(before[1].followers[0])


def a_server_comes(cluster, before) -> None:
    cluster._launch("server-9", cluster._server_command(9))


def a_move(cluster, before) -> None:
    row = before[1]
    target = next(f"server-{n}" for n in range(3) if f"server-{n}" not in row.isr)
    coordinator = cluster.processes["coordinator"]

    def asked() -> bool:
        """Refused while another move of the partition is under way."""
        return psctl(cluster, "move", "1", row.primary, target, "--no-wait") == 0 or coordinator.exit_code is not None

    cluster.wait_until(asked, 60, "a move to be taken on")


def a_client_ends(cluster, before) -> None:
    """An exit without a goodbye, reported by its supervisor: EVICT, then FENCE."""
    worker = cluster.start_worker(replication.TRAIN, epochs=50, seconds=0.05)
    cluster.wait_until(lambda: worker.events("step"), 60, "a worker to train")
    worker.signal_training(signal.SIGKILL)


def a_table(cluster, before) -> None:
    script = ("import paramesh, sys, torch; c = paramesh.connect(sys.argv[1]); "
              "c.create_table('late', {'w': torch.zeros(8)}, 'SGD', {'lr': 1.0})")  # fmt: skip
    cluster.start_command("late", [sys.executable, "-c", script, cluster.coordinator_address])


def psctl(cluster, *arguments: str) -> int:
    """Ask; the exit status. The coordinator may be ended before it can answer."""
    command = [sys.executable, "-m", "paramesh_coordinator.psctl", "--coordinator", cluster.coordinator_address]
    return subprocess.run(
        [*command, *arguments], env=cluster.env, timeout=60, check=False, capture_output=True
    ).returncode


def a_checkpoint(cluster, before) -> None:
    arguments = ["--coordinator", cluster.coordinator_address, "checkpoint", "--level", "partition", "--name", "one"]
    cluster.start_command("checkpoint", [sys.executable, "-m", "paramesh_coordinator.psctl", *arguments])


PLACES: list[tuple[str, Callable]] = [
    ("before.server_dead", lose_a_primary),
    ("after.server_dead", lose_a_primary),
    ("before.isr_shrunk", lose_a_follower),
    ("after.isr_shrunk", lose_a_follower),
    ("before.isr_grown", lose_a_primary),
    ("after.isr_grown", lose_a_primary),
    ("before.learner_added", lose_a_primary),
    ("after.learner_added", lose_a_primary),
    ("before.move_copying", a_move),
    ("after.move_copying", a_move),
    ("before.replica_moved", a_move),
    ("after.replica_moved", a_move),
    ("before.server_registered", a_server_comes),
    ("after.server_registered", a_server_comes),
    ("before.client_evicted", a_client_ends),
    ("after.client_evicted", a_client_ends),
    ("before.evict", a_client_ends),
    ("after.evict", a_client_ends),
    ("before.fence", a_client_ends),
    ("after.fence", a_client_ends),
    ("before.table_created", a_table),
    ("after.table_created", a_table),
    ("before.manifest", a_checkpoint),
    ("after.manifest", a_checkpoint),
]


def settled(cluster) -> bool:
    """Nothing is pending, every partition has two copies in sync, and nothing moves."""
    status = inspection.status(cluster.coordinator_address)
    rows = replication.rows(cluster).values()
    return not status.pending and all(row.online and len(row.isr) == 2 and not row.learners for row in rows)


@pytest.mark.parametrize(
    ("place", "happens"),
    [pytest.param(*one, id=one[0], marks=[] if one[0] in QUICK else pytest.mark.soak) for one in PLACES],
)
def test_a_coordinator_that_ends_anywhere_is_taken_up_where_it_was(process_cluster, tmp_path, place, happens):
    cluster = process_cluster(servers=3, replicas=2, min_workers=1, fails=True, checkpoint_dir=str(tmp_path))
    pushers = replication.start_pushers(cluster)
    before = replication.wait_until_in_sync(cluster, 2)
    term = inspection.partition_map(cluster.coordinator_address).term
    coordinator = cluster.processes["coordinator"]
    hook = cluster.arm(place, "kill", "coordinator")
    happens(cluster, before)
    cluster.wait_until(lambda: coordinator.exit_code is not None, 60, f"the coordinator to end at {place}")
    assert (coordinator.exit_code, hook.exists()) == (-signal.SIGKILL, False)
    cluster.restart("coordinator")
    cluster.wait_until(lambda: inspection.partition_map(cluster.coordinator_address).term > term, 30, "the next one")
    began = time.monotonic()
    if happens is lose_a_follower:
        cluster.resume(before[1].followers[0])
    cluster.wait_until(
        lambda: came_about(cluster, before, happens) and settled(cluster), 60, "what was pending to be done"
    )
    print(f"place={place} converged_s={time.monotonic() - began:.2f} bound_s={CONVERGED:.0f}")
    assert_once(cluster, before, happens)
    replication.stop_pushers(cluster, pushers)
    replication.account(cluster, pushers).assert_exact()


def came_about(cluster, before, happens: Callable) -> bool:
    """What was to happen did."""
    after = replication.rows(cluster)
    kinds = [e.kind for e in inspection.events(cluster.coordinator_address)]
    if happens is lose_a_primary:
        return "server_dead" in kinds and before[1].primary not in {n for r in after.values() for n in r.isr}
    if happens is a_move:
        return before[1].primary not in after[1].isr
    if happens is a_server_comes:
        return "server-9" in cluster.live_servers()
    if happens is a_client_ends:
        return kinds.count("client_evicted") == 1
    if happens is a_table:
        return cluster.processes["late"].exit_code == 0
    return True


def assert_once(cluster, before, happens: Callable) -> None:
    """And nothing twice: epochs only rose, and what was decided before the end was not decided again."""
    after = replication.rows(cluster)
    assert all(after[p].epoch >= row.epoch for p, row in before.items())
    events = inspection.events(cluster.coordinator_address)
    if happens is lose_a_primary:
        assert [e.subject for e in events if e.kind == "server_dead"].count(before[1].primary) == 1
    assert [e.kind for e in events].count("client_evicted") == (happens is a_client_ends)
    if happens is a_table:
        with paramesh.connect(cluster.coordinator_address) as client:
            assert list(client.tables()).count("late") == 1
