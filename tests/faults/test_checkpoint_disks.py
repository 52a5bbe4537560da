"""Disks that are full, fail or lie, and workers that a restore leaves behind, with real processes.

Fault rows 34, 36 and 40.
"""

from __future__ import annotations

import errno
import os
import resource
import time

import paramesh
import pytest
import safetensors.torch
import torch
from paramesh.archive import Archive
from paramesh.exporting import export_checkpoint

from tests.cluster import checkpoints, inspection, replication
from tests.faults.test_failover_training import assert_as_undisturbed, training

REFUSALS = (
    ("checkpoint.file.half/partition-1.safetensors", errno.ENOSPC),
    ("checkpoint.file.synced/ledger.bin", errno.EIO),
    ("checkpoint.file.begun/worker-0.bin", errno.EROFS),
    ("checkpoint.file.written/MANIFEST.json", errno.ENOSPC),
    ("checkpoint.rename.begun", errno.EIO),
)


def limit_files(cluster, nodes, nbytes: int) -> None:
    """Let processes write no file beyond a size: the kernel's own refusal (EFBIG)."""
    for node in nodes:
        resource.prlimit(cluster.processes[node].pid, resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def kinds(cluster) -> list[str]:
    """What was decided so far."""
    return [event.kind for event in inspection.events(cluster.coordinator_address)]


def trains(cluster, worker) -> None:
    """It makes another step."""
    steps = len(worker.events("step"))
    cluster.wait_until(lambda: len(worker.events("step")) > steps, 60, "another step")


@pytest.mark.soak
def test_a_disk_that_says_no_costs_the_checkpoint_and_nothing_else(process_cluster, tmp_path):
    """Row 34: ENOSPC, EIO and EROFS of each process at each kind of file; and one that the kernel lets nobody write."""
    archive = Archive(str(tmp_path / "root"))
    cluster = process_cluster(servers=2, start_workers=1, fails=True, checkpoint_dir=archive.root)
    worker = cluster.start_worker(replication.TRAIN, epochs=10_000, seconds=0.02, stop_at="enough")
    cluster.wait_until(lambda: worker.events("step"), 90, "training")
    checkpoints.make(cluster, "first")

    def fails(said: str) -> None:
        before = kinds(cluster).count("checkpoint_failed")
        checkpoints.begin(cluster)
        done = checkpoints.ended(cluster)
        assert done.error.reason == "PATH", done
        assert said in done.error.message
        assert kinds(cluster).count("checkpoint_failed") == before + 1, "a clear event"
        assert [manifest.name for manifest in checkpoints.whole(archive)] == ["first"]
        assert archive.names() == ["first"], "what was written is removed"
        trains(cluster, worker)

    for point, code in REFUSALS:
        cluster.fail_at(point, errno.errorcode[code])
        fails(os.strerror(code))
        cluster.disarm()
    servers = ["server-0", "server-1"]
    limit_files(cluster, servers, 16 << 10)
    fails(os.strerror(errno.EFBIG))
    limit_files(cluster, servers, resource.RLIM_INFINITY)
    checkpoints.make(cluster, "second")
    assert len(checkpoints.whole(archive)) == 2
    assert len(worker.events("hello")) == 1, "the worker was restarted"


@pytest.mark.soak
def test_a_full_disk_under_the_coordinator_stops_decisions_and_makes_no_wrong_ones(process_cluster):
    """Row 34, SQLite: nobody is promoted that is not written down; with room again, what is due is decided."""
    cluster, workers, before = training(process_cluster, 3, 2, epochs=4, seconds=0.02)
    limit_files(cluster, ["coordinator"], 1)
    victim = before[1].primary
    cluster.kill(victim)
    killed = time.monotonic()
    cluster.wait_until(lambda: time.monotonic() - killed > 4.0, 15, "two failure timeouts without a decision")
    assert cluster.processes["coordinator"].exit_code is None, cluster.processes["coordinator"].tail()
    during = replication.rows(cluster)
    assert {p: (r.primary, r.epoch, r.isr) for p, r in during.items()} == {
        p: (r.primary, r.epoch, r.isr) for p, r in before.items()
    }, "it acted on what it could not write"
    limit_files(cluster, ["coordinator"], resource.RLIM_INFINITY)
    led = replication.led_by(before, victim, ledger=True)
    after = cluster.wait_until(
        lambda: all((found := replication.rows(cluster))[p].epoch > before[p].epoch for p in led) and found, 30,
        "its partitions to have other primaries",
    )  # fmt: skip
    assert all(after[p].primary in before[p].followers for p in led)
    assert_as_undisturbed(cluster, workers, epochs=4)


@pytest.mark.soak
@pytest.mark.bad_input(58, got="DAMAGED")
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken(process_cluster, tmp_path):
    """Row 36: a bit flipped, a file cut, any file: found before anything is touched; `latest` falls back."""
    archive = Archive(str(tmp_path / "root"))
    cluster = process_cluster(servers=2, start_workers=1, checkpoint_dir=archive.root)
    worker = cluster.start_worker(replication.TRAIN, epochs=10_000, seconds=0.02, stop_at="enough")
    cluster.wait_until(lambda: worker.events("step"), 90, "training")
    for name in ("one", "two"):
        trains(cluster, worker)
        checkpoints.make(cluster, name)
    folder = tmp_path / "root" / "two"
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        for bad in (good[:-1], bytes([*good[: len(good) // 2], good[len(good) // 2] ^ 4, *good[len(good) // 2 + 1 :]])):
            file.write_bytes(bad)
            error = checkpoints.refused(cluster, "two")
            assert error.reason in (("FORMAT", "DAMAGED") if file.suffix == ".json" else ("DAMAGED",)), error
            assert file.suffix == ".json" or file.name in str(error)
        file.write_bytes(good)
    trains(cluster, worker)
    assert inspection.partition_map(cluster.coordinator_address).generation == 1, "a refusal changed something"

    (folder / "partition-2.safetensors").write_bytes(b"")
    checkpoints.restore(cluster, "latest")
    assert checkpoints.task(cluster).name == "one"
    assert "checkpoint_damaged" in kinds(cluster)
    cluster.wait_until(lambda: len(worker.events("hello")) == 2, 60, "the worker to be started anew")
    trains(cluster, worker)


@pytest.mark.soak
def test_who_still_pushes_after_a_restore_changes_nothing(process_cluster, tmp_path):
    """Row 40, invariant 25: every update of the generation before is refused; the values are the checkpoint's."""
    archive = Archive(str(tmp_path / "root"))
    cluster = process_cluster(servers=2, checkpoint_dir=archive.root)
    pushers = replication.start_pushers(cluster)
    checkpoints.make(cluster, "one")
    checkpoints.restore(cluster, "one")
    cluster.wait_until(
        lambda: all({e["partition"] for e in w.events("failed")} >= set(range(1, 7)) for w in pushers), 60,
        "every pusher to hear of it",
    )  # fmt: skip
    assert {e["reason"] for w in pushers for e in w.events("failed")} == {"OLD_GENERATION"}
    with paramesh.connect(cluster.coordinator_address) as client:
        for table in client.tables():
            export_checkpoint(f"{archive.root}/one", str(tmp_path / "net.safetensors"), group=table)
            (value,) = safetensors.torch.load_file(tmp_path / "net.safetensors").values()
            assert torch.equal(client.pull(table)["w"], value), table
            assert value.sum() > 0
