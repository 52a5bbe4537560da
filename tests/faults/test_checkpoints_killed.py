"""Processes that die at each point of a checkpoint (fault row 33; invariant 23), with real processes.

Periodic checkpoints go on all the time. At each point whoever comes to it ends there, and
what a loader finds then is whole: the checkpoint before, or the new one. Training goes on.
"""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from paramesh.archive import Archive
from paramesh.exporting import export_checkpoint
from paramesh.failpoints import EXIT

from tests.cluster import replication

FILE = ("begun", "half", "written", "synced")

POINTS = (
    *(f"checkpoint.file.{at}/{name}" for name in ("ledger.bin", "partition-1.safetensors") for at in FILE),
    *(f"checkpoint.report.begun/{name}" for name in ("ledger.bin", "partition-1.safetensors")),
    *(f"checkpoint.report.received/{name}" for name in ("ledger.bin", "partition-1.safetensors")),
    *(f"checkpoint.file.{at}/{name}" for name in ("worker-0.bin", "MANIFEST.json") for at in FILE),
    *(f"checkpoint.{at}" for at in ("begun", "marked", "commit.begun", "rename.begun", "rename.done", "commit.done")),
    *(f"checkpoint.remove.{at}" for at in ("begun", "half", "done")),
)
"""Of servers (the first ten) and of the coordinator. At `checkpoint.cut.dropped` all servers would die: two faults."""

QUICK = ("checkpoint.rename.begun",)


def newest(archive: Archive) -> int:
    """The number of the newest checkpoint that holds a model; 0 if there is none."""
    return max((manifest.number for manifest in archive.complete() if manifest.tables), default=0)


def assert_loadable(archive: Archive, at_least: int, scratch) -> None:
    """The newest complete one has every byte that it names, and is not older than one that was there."""
    manifest = archive.complete()[-1]
    assert manifest.number >= at_least
    assert archive.manifest(manifest.name, verify=True).number == manifest.number
    export_checkpoint(f"{archive.root}/{manifest.name}", str(scratch))
    assert all(torch.isfinite(value).all() for value in safetensors.torch.load_file(scratch).values())


def dies_at(cluster, point: str) -> str:
    """Wait until a process has come to a failpoint, and died there; which."""
    nodes = [name for name in cluster.processes if not name.startswith("worker")]
    cluster.fail_at(point, "exit")
    cluster.wait_until(lambda: any(cluster.processes[n].exit_code is not None for n in nodes), 60, f"{point} to come")
    cluster.disarm()
    (node,) = [n for n in nodes if cluster.processes[n].exit_code is not None]
    assert cluster.processes[node].exit_code == EXIT, cluster.processes[node].tail()
    return node


@pytest.mark.parametrize("points", [QUICK, pytest.param(POINTS, marks=[pytest.mark.soak, pytest.mark.timeout(1500)])],
                         ids=["quick", "all"])  # fmt: skip
def test_a_loader_finds_a_complete_checkpoint_wherever_a_process_dies(process_cluster, tmp_path, points):
    archive = Archive(str(tmp_path / "root"))
    cluster = process_cluster(servers=2, replicas=2, start_workers=1, fails=True, checkpoint_dir=archive.root,
                              checkpoint_every="1s", checkpoint_keep=2)  # fmt: skip
    worker = cluster.start_worker(replication.TRAIN, epochs=10_000, seconds=0.02, stop_at="enough")
    cluster.wait_until(lambda: newest(archive), 90, "a checkpoint")
    for point in points:
        replication.wait_until_in_sync(cluster, 2)
        before = newest(archive)
        node = dies_at(cluster, point)
        assert_loadable(archive, before, tmp_path / "net.safetensors")
        steps, found = len(worker.events("step")), newest(archive)
        cluster.restart(node)
        cluster.wait_until(lambda: newest(archive) > found, 60, f"a checkpoint after {node} died at {point}")  # noqa: B023
        cluster.wait_until(lambda: len(worker.events("step")) > steps, 30, "training to go on")  # noqa: B023
        print(f"point={point} died={node} had={before} found={found}")
    assert len(worker.events("hello")) == 1, "the worker was restarted"
    assert len([name for name in archive.names() if name.endswith(".tmp")]) <= 1, "more than what is being written now"
    cluster.stop()
    if points is POINTS:
        restored(process_cluster, archive, tmp_path)


def restored(process_cluster, archive: Archive, tmp_path) -> None:
    """The newest one, loaded by other servers, holds what its export says."""
    location = f"{archive.root}/{archive.complete()[-1].name}"
    export_checkpoint(location, str(tmp_path / "net.safetensors"))
    cluster = process_cluster(servers=1, restore=location)
    cluster.wait_until(lambda: replication.rows(cluster), 60, "the partitions")
    cluster.wait_until(lambda: all(r.online for r in replication.rows(cluster).values()), 60, "the restore")
    held = replication.values(cluster)
    assert held
    for name, value in safetensors.torch.load_file(tmp_path / "net.safetensors").items():
        assert torch.equal(value, held[name]), name
