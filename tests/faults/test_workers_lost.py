"""Workers that die, hang or come back from the dead (fault rows 16, 18, 20; invariants 14, 17, 20)."""

from __future__ import annotations

import signal
import time

import pytest

from tests.cluster import inspection
from tests.faults.faults import WorkerFault

TALLY = "tests.cluster.bodies:tally"


def assert_exact(cluster, epochs: int) -> None:
    """Every sample was counted once per epoch, by the servers' word."""
    counts = cluster.table_values()["counts"].tolist()
    wrong = {i: c for i, c in enumerate(counts) if c != epochs}
    assert not wrong, f"sample -> count, where it is not {epochs}: {wrong}"


@pytest.mark.parametrize("fault", list(WorkerFault), ids=lambda f: f.name.lower())
def test_a_worker_lost_in_mid_step_holds_nobody_up(process_cluster, fault):
    """The others are Ready and wait for it when it goes; they finish that step within the bound."""
    cluster = process_cluster(servers=2, start_workers=3)
    # Later the survivors wait for one who comes back: it takes seconds to import torch.
    later = {"wait_at": 8} if fault.value.comes_back else {}
    survivors = cluster.start_workers(2, TALLY, length=120, epochs=2, seconds=0.02, **later)
    victim = cluster.start_worker(TALLY, length=120, epochs=2, seconds=0.02, wait_at=5, waiter=2)
    cluster.wait_until(lambda: victim.events("waiting"), 60, "the victim to be in mid-step")
    cluster.wait_until(
        lambda: all(w.last("begin")["step"] == 6 for w in survivors), 10, "the others to wait for the victim"
    )
    (group,) = inspection.ledger_status(cluster.coordinator_address).groups
    assert group.next_step == 5, "the step must be undecided when the fault hits"

    began = time.monotonic()
    fault(victim)
    cluster.wait_until(lambda: all(len(w.events("step")) >= 6 for w in survivors), 10, "the others' next step")
    took = max(w.events("step")[5]["t"] for w in survivors) - began
    print(f"fault={fault.name} others_next_step_s={took:.3f} bound_s={fault.value.bound}")

    finishers = [*survivors, victim] if fault.value.comes_back else survivors
    if fault.value.comes_back:
        wait_until_back_in_a_step(cluster, victim)
        for worker in survivors:
            worker.open_gate("go")
    cluster.wait_until(lambda: all(w.events("final") for w in finishers), 90, "the workers to finish")
    assert_exact(cluster, epochs=2)
    assert took <= fault.value.bound
    if fault.value.comes_back:
        assert_rejoined_at_a_step_boundary(victim, survivors)
    kinds = [e.kind for e in inspection.events(cluster.coordinator_address)]
    assert any("evicted" in kind for kind in kinds), f"no audit line of the eviction (invariant 30): {kinds}"


def wait_until_back_in_a_step(cluster, victim) -> None:
    """Wait until the restarted worker has a gradient for a step of the others."""

    def back() -> bool:
        restarts = [e["t"] for e in victim.events("hello") if e["incarnation"] == 1]
        return bool(restarts) and victim.last("begin")["t"] > restarts[0]

    cluster.wait_until(back, 60, "the restarted worker to be in a step")


def assert_rejoined_at_a_step_boundary(victim, survivors) -> None:
    """The restarted worker's every step ends with bits that the others had after some step."""
    assert [e["incarnation"] for e in victim.events("hello")] == [0, 1]
    (restart,) = (e["t"] for e in victim.events("hello") if e["incarnation"] == 1)
    seen = {e["digest"] for w in survivors for e in w.events("step")}
    after = [e["digest"] for e in victim.events("step") if e["t"] > restart]
    # Its last steps may be alone, when the others' loops were over already.
    common = [d for d in after if d in seen]
    assert common, "the restarted worker never stepped together with the others"


@pytest.mark.parametrize("who", ["signal_everything", "signal_training"])
def test_a_zombie_changes_nothing(process_cluster, who):
    """Stopped in mid-step, evicted, continued: what it had staged counts for nothing; it rejoins as new.

    Stopped with its supervisor it is silent; stopped alone, its supervisor beats on and must tell.
    """
    cluster = process_cluster(servers=1, start_workers=2)
    survivor = cluster.start_worker(TALLY, length=80, epochs=2, seconds=0.02, wait_at=10, waiter=0)
    zombie = cluster.start_worker(TALLY, length=80, epochs=2, seconds=0.02, wait_at=5, waiter=1)
    cluster.wait_until(lambda: zombie.events("waiting"), 60, "the zombie to be in mid-step")
    getattr(zombie, who)(signal.SIGSTOP)
    zombie.open_gate("go")
    cluster.wait_until(lambda: survivor.events("waiting"), 30, "the survivor to go on alone")
    tables = inspection.state_hashes(cluster.coordinator_address)
    assert inspection.ledger_status(cluster.coordinator_address).evictions == 1

    getattr(zombie, who)(signal.SIGCONT)
    cluster.wait_until(
        lambda: len(inspection.ledger_status(cluster.coordinator_address).members) == 2, 30, "the zombie to rejoin"
    )
    after = inspection.state_hashes(cluster.coordinator_address)
    assert {p: h for p, h in after.items() if p} == {p: h for p, h in tables.items() if p}
    survivor.open_gate("go")
    cluster.wait_until(lambda: survivor.events("final") and zombie.events("final"), 90, "both to finish")
    assert_exact(cluster, epochs=2)
    clients = inspection.status(cluster.coordinator_address).clients
    slots = [c.slot for c in clients if c.role == "worker"]
    assert len(set(slots)) == 2
    assert len(slots) == 3, "the zombie must have come back as a new client of the same slot"


def test_half_the_workers_die_and_come_back(process_cluster):
    """Two of four killed at once: nobody else restarts, samples stay exact (row 20)."""
    cluster = process_cluster(servers=1, start_workers=4)
    workers = cluster.start_workers(4, TALLY, length=240, epochs=2, seconds=0.03)
    cluster.wait_until(lambda: all(len(w.events("step")) >= 4 for w in workers), 90, "all to train")
    for victim in workers[2:]:
        victim.signal_training(signal.SIGKILL)
    cluster.wait_until(lambda: all(w.events("final") for w in workers), 120, "all to finish")
    assert_exact(cluster, epochs=2)
    assert [len(w.events("hello")) for w in workers] == [1, 1, 2, 2]


def test_scheduler_and_epoch_come_back_with_a_restarted_worker(process_cluster):
    """Killed in the second epoch, it goes on in the second epoch with the others' learning rate."""
    cluster = process_cluster(servers=1, start_workers=2)
    body = "tests.cluster.bodies:scheduled"
    survivor, victim = cluster.start_workers(2, body, length=80, epochs=4, seconds=0.03, wait_at=22, waiter=0)
    cluster.wait_until(lambda: victim.events("step") and victim.last("step")["epoch"] == 1, 60, "the second epoch")
    victim.signal_training(signal.SIGKILL)
    wait_until_back_in_a_step(cluster, victim)
    survivor.open_gate("go")
    cluster.wait_until(lambda: survivor.events("final") and victim.events("final"), 90, "both to finish")
    (restart,) = (e["t"] for e in victim.events("hello") if e["incarnation"] == 1)
    back = [e for e in victim.events("step") if e["t"] > restart]
    assert back, "the restarted worker came too late to train"
    assert min(e["epoch"] for e in back) >= 1, "it went through a finished epoch again"
    rates = {e["epoch"]: e["lr"] for e in survivor.events("step")}
    assert all(e["lr"] == rates[e["epoch"]] for e in back)
