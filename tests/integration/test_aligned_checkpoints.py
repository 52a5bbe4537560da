"""Level `aligned`: a cut of async and ssp training in which no update is half applied."""

import threading

import paramesh
import pytest
import torch
from paramesh.archive import Archive
from paramesh.errors import ParameshError
from paramesh.exporting import export_checkpoint
from paramesh.testing import Cluster
from paramesh.v1 import checkpoint_pb2 as cp
from safetensors.torch import load_file

from tests.cluster.waiting import wait_until
from tests.integration.test_cluster_checkpoints import Script, checkpoint, custody, settled

ALIGNED = cp.CHECKPOINT_LEVEL_ALIGNED


def counting(cluster, mode, made, rounds):
    """Each step adds one to every cell of every partition: in a cut without a torn update all are equal."""

    def script(rank):
        model = torch.nn.Linear(64, 40, bias=True, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        extra = {"staleness": 2} if mode == "ssp" else {}
        optimizer = paramesh.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), model, mode=mode, partition_bytes=512, **extra
        )
        steps = 0
        while len(made) < rounds:
            for parameter in model.parameters():
                parameter.grad = -torch.ones_like(parameter)
            optimizer.step()
            steps += 1
            if rank == 0 and (custody(cluster).progress is None or custody(cluster).progress.ended):
                assert custody(cluster).progress is None or custody(cluster).progress.error is None
                made.append(checkpoint(cluster, ALIGNED))
        return steps

    return script


@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_no_update_is_torn_in_a_cut_under_load(tmp_path, mode):
    """Twenty partitions on two servers, three workers that never wait for each other: every cell counts the same."""
    made = []
    with Cluster(servers=2, workers=3, checkpoint_dir=str(tmp_path)) as cluster:
        cluster.run(counting(cluster, mode, made, 4))
        assert settled(cluster) is None
    archive = Archive(str(tmp_path))
    counts = []
    for name in made:
        manifest = archive.manifest(name, verify=True)
        assert (manifest.level, manifest.torn) == ("aligned", ())
        assert len(manifest.partitions) > 15
        export_checkpoint(f"{tmp_path}/{name}", str(tmp_path / "net.safetensors"))
        (count,) = {
            cell for value in load_file(tmp_path / "net.safetensors").values() for cell in value.unique().tolist()
        }
        counts.append(count)
    assert counts == sorted(counts)
    assert counts[-1] > 0


def test_the_rest_of_a_lone_workers_run_is_the_same(tmp_path):
    """Invariant 24: values, optimizer, schedulers, samples, random generators, clocks."""
    with Cluster(servers=2, workers=1, checkpoint_dir=str(tmp_path)) as cluster:
        made = []
        script = Script(7, lambda: made.append(checkpoint(cluster, ALIGNED)), "async")
        (values,) = cluster.run(script)
        assert settled(cluster) is None
    assert Archive(str(tmp_path)).manifest(made[0]).workers == ("paramesh:cut:shared", "paramesh:cut:own:0")
    again = Script(mode="async")
    with Cluster(servers=3, workers=1, restore=f"{tmp_path}/{made[0]}") as cluster:
        (restored,) = cluster.run(again)
    tail = again.losses[0]
    assert 0 < len(tail) < len(script.losses[0])
    assert tail == script.losses[0][-len(tail) :]
    assert torch.equal(restored, values)


def test_a_worker_that_does_not_come_costs_the_checkpoint_and_a_pause(tmp_path, monkeypatch):
    """It computes for longer than anybody waits: the others go on, and the reason names its rank."""
    monkeypatch.setattr("paramesh_coordinator.checkpoints.PAUSE_S", 0.5)
    done, begun = threading.Event(), threading.Event()
    with Cluster(servers=2, workers=2, checkpoint_dir=str(tmp_path)) as cluster:

        def script(rank):
            model = torch.nn.Linear(3, 1)
            optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, mode="async")
            for step in range(200):
                model(torch.ones(2, 3)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                if rank == 1 and step == 3:
                    begun.set()
                    assert done.wait(60)
                if rank == 0 and step == 100:
                    assert begun.wait(60)
                    checkpoint(cluster, ALIGNED)
            if rank == 0:
                assert settled(cluster) is not None
                done.set()

        cluster.run(script)
        error = custody(cluster).progress.error
        assert error.reason == "DEADLINE"
        assert "ranks 1 did not finish" in str(error)
    assert Archive(str(tmp_path)).complete() == []


def test_training_in_steps_has_an_exact_level(tmp_path):
    with Cluster(servers=1, workers=1, checkpoint_dir=str(tmp_path)) as cluster:
        refused = []

        def ask():
            with pytest.raises(ParameshError) as caught:
                checkpoint(cluster, ALIGNED)
            refused.append(caught.value.reason)

        cluster.run(Script(3, ask))
        wait_until(lambda: refused, 10, "the refusal")
    assert refused == ["SCHEMA"]
