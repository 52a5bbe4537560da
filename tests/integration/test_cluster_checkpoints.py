"""Checkpoints by the cluster: cut while it trains, loaded onto any number of servers, the same bits."""

import contextlib
import errno
import json
import os
import threading
import uuid

import paramesh
import pytest
import safetensors.torch
import torch
from paramesh import files
from paramesh.archive import Archive
from paramesh.errors import ParameshError
from paramesh.exporting import export_checkpoint
from paramesh.testing import Cluster
from paramesh.v1 import checkpoint_pb2 as cp

from tests.cluster.waiting import wait_until

WORKERS = 2
EPOCHS = 3
STEPS = 12
"""Steps of one epoch: 48 samples, two at a time, two workers."""


class Script:
    """A training script, told when to do something in its middle.

    Args:
        at: the step of rank 0 (from 1) after which `then` is called.
        then: called on rank 0's thread.
        mode: of the optimizer.
    """

    def __init__(self, at=0, then=None, mode="sync"):
        self.at, self.then, self.mode = at, then, mode
        self.losses = {}
        self._lock = threading.Lock()

    def __call__(self, rank):
        torch.manual_seed(7 + rank)
        model = torch.nn.Sequential(torch.nn.Linear(8, 90), torch.nn.Tanh(), torch.nn.Linear(90, 1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape))
        data = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
        loader = paramesh.DataLoader(torch.utils.data.TensorDataset(data), batch_size=2, shuffle=True, seed=1)
        inner = torch.optim.Adam(model.parameters(), lr=1e-2)
        optimizer = paramesh.DistributedOptimizer(inner, model, mode=self.mode, partition_bytes=1024)
        each = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        epoch_ends = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        paramesh.state(each=each, epoch_ends=epoch_ends)
        losses = self.losses.setdefault(rank, [])
        for _ in range(EPOCHS):
            for (x,) in loader:
                optimizer.zero_grad()
                loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
                loss.backward()
                optimizer.step()
                each.step()
                losses.append(loss.item())
                if self.then is not None and rank == 0 and len(losses) == self.at:
                    self.then()
            epoch_ends.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])


def custody(cluster):
    return cluster._coordinator._reign._custody


def settled(cluster):
    """Wait until what is under way has ended; its error."""
    wait_until(lambda: custody(cluster).progress is not None and custody(cluster).progress.ended, 60, "it")
    return custody(cluster).progress.error


def checkpoint(cluster, level=0, name=""):
    return cluster.call(custody(cluster).create(level, name))


@contextlib.contextmanager
def trained(root, at, *, mode="sync", level=0, **config):
    """A run that makes a checkpoint in its middle: yields (cluster, name, parameters, losses)."""
    with Cluster(servers=2, workers=WORKERS, checkpoint_dir=str(root), **config) as cluster:
        made = []
        script = Script(at, lambda: made.append(checkpoint(cluster, level)), mode)
        values = cluster.run(script)
        assert settled(cluster) is None
        yield cluster, made[0], values, script.losses


def goes_on(root, name, servers, losses, values, mode="sync", **config):
    script = Script(mode=mode)
    with Cluster(servers=servers, workers=WORKERS, restore=f"{root}/{name}", **config) as cluster:
        again = cluster.run(script)
        assert settled(cluster) is None
    for rank in range(WORKERS):
        tail = script.losses[rank]
        assert 0 < len(tail) < EPOCHS * STEPS
        assert tail == losses[rank][-len(tail) :]
    assert all(torch.equal(a, b) for a, b in zip(again, values, strict=True))


@pytest.mark.parametrize("servers", [1, 2, 5])
def test_the_rest_of_the_run_is_the_same_on_any_number_of_servers(tmp_path, servers):
    with trained(tmp_path, 7) as (_, name, values, losses):
        pass
    goes_on(tmp_path, name, servers, losses, values)


@pytest.mark.parametrize("at", [1, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS])
def test_the_cut_may_be_anywhere_in_an_epoch(tmp_path, at):
    with trained(tmp_path, at) as (_, name, values, losses):
        pass
    goes_on(tmp_path, name, 3, losses, values)


def test_with_replicas_and_back_to_none(tmp_path):
    with trained(tmp_path, 7, replicas=2) as (_, name, values, losses):
        pass
    goes_on(tmp_path, name, 3, losses, values, replicas=2)


def test_an_object_store_will_do():
    root = f"memory://{uuid.uuid4()}/runs"
    with trained(root, 7) as (_, name, values, losses):
        pass
    goes_on(root, name, 2, losses, values)


def test_what_a_restored_job_writes_is_as_good(tmp_path):
    """Cut, restore, cut again: the second one's run is still the first one's."""
    with trained(tmp_path, 5) as (_, name, values, losses):
        pass
    with Cluster(servers=2, workers=WORKERS, restore=f"{tmp_path}/{name}", checkpoint_dir=str(tmp_path)) as cluster:
        made = []
        cluster.run(Script(4, lambda: made.append(checkpoint(cluster))))
        assert settled(cluster) is None
    assert made == ["checkpoint-000002"]
    manifests = Archive(str(tmp_path)).complete()
    assert [m.generation for m in manifests] == [1, 2]
    assert manifests[1].groups[0].next_step > manifests[0].groups[0].next_step
    goes_on(tmp_path, made[0], 1, losses, values)


def test_the_files_are_what_the_manifest_says(tmp_path):
    with trained(tmp_path, 7) as (_, name, _, _):
        archive = Archive(str(tmp_path))
        manifest = archive.manifest(name, verify=True)
    assert manifest.level == "step"
    assert manifest.workers == ("paramesh:cut:shared", "paramesh:cut:own:0", "paramesh:cut:own:1")
    dense = [p for p in manifest.partitions if p.partition]
    assert len(dense) > 3
    assert {p.applied_step for p in dense} == {manifest.groups[0].next_step}
    assert sorted(os.listdir(tmp_path / name)) == sorted([*manifest.files, "MANIFEST.json"])
    assert os.listdir(tmp_path) == [name]


@pytest.mark.bad_input(36, got="OLD_GENERATION")
def test_the_old_generation_changes_nothing(tmp_path):
    """Invariant 25: who was there before the restore is refused, whatever it does; then the run goes on."""
    with trained(tmp_path, 7) as (cluster, name, values, losses):
        caught = {}
        reached = threading.Event()

        def endless(rank, optimizer, model):
            while True:
                optimizer.zero_grad()
                model(torch.ones(2, 3)).sum().backward()
                optimizer.step()
                if rank == 0 and not reached.is_set():
                    reached.set()
                    cluster.call(custody(cluster).restore(name))

        def refused(rank):
            model = torch.nn.Linear(3, 1)
            optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, name="other")
            with pytest.raises(ParameshError) as error:
                endless(rank, optimizer, model)
            caught[rank] = error.value

        cluster.run(refused)
        assert {error.reason for error in caught.values()} == {"OLD_GENERATION"}
        assert settled(cluster) is None
        assert cluster._coordinator._driver.state.job.generation == 2
        script = Script()
        again = cluster.run(script)
    assert all(torch.equal(a, b) for a, b in zip(again, values, strict=True))
    assert script.losses[0] == losses[0][-len(script.losses[0]) :]


@pytest.mark.bad_input(58, got="DAMAGED")
def test_damage_is_found_before_anything_is_touched(tmp_path):
    with trained(tmp_path, 7) as (cluster, name, _, _):
        file = tmp_path / name / "partition-2.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(ParameshError, match=r"partition-2\.safetensors") as caught:
            cluster.call(custody(cluster).restore(name))
        assert caught.value.reason == "DAMAGED"
        for bad in ("nothing-here", "../x", name + ".tmp"):
            with pytest.raises(ParameshError) as caught:
                cluster.call(custody(cluster).restore(bad))
            assert caught.value.reason in ("NOT_FOUND", "PATH")
        assert cluster._coordinator._driver.state.job.generation == 1


@pytest.mark.bad_input(62, got="refused")
def test_a_newer_release_and_another_schema_are_refused(tmp_path):
    with trained(tmp_path, 7) as (cluster, name, _, _):
        path = tmp_path / name / "MANIFEST.json"
        good = json.loads(path.read_text())
        for change, reason in (({"format": 2}, "VERSION"), ({"tables": []}, "FORMAT"), ({"kind": "x"}, "FORMAT")):
            path.write_text(json.dumps(good | change))
            with pytest.raises(ParameshError) as caught:
                cluster.call(custody(cluster).restore(name))
            assert caught.value.reason == reason
        for part in good["partitions"]:
            part["nbytes"] += 64 if part["partition"] == 1 else 0
        path.write_text(json.dumps(good))
        with pytest.raises(ParameshError, match="cut into") as caught:
            cluster.call(custody(cluster).restore(name))
        assert caught.value.reason == "SCHEMA"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_costs_the_checkpoint_and_nothing_else(tmp_path, monkeypatch, code):
    real, left = files._put, [2]

    def put(fs, place, chunks):
        left[0] -= 1
        if not left[0]:
            raise OSError(code, os.strerror(code), place)
        return real(fs, place, chunks)

    with Cluster(servers=2, workers=WORKERS) as cluster:
        values = cluster.run(Script())
    with Cluster(servers=2, workers=WORKERS, checkpoint_dir=str(tmp_path)) as cluster:

        def full():
            monkeypatch.setattr(files, "_put", put)
            checkpoint(cluster)

        again = cluster.run(Script(6, full))
        error = settled(cluster)
        assert error is not None
        assert os.strerror(code) in str(error)
        events = cluster._coordinator._driver.store.scan("event/", "", 100)
        assert any(b"checkpoint_failed" in data for _, data in events)
        assert os.listdir(tmp_path) == []
        monkeypatch.undo()
        checkpoint(cluster, cp.CHECKPOINT_LEVEL_PARTITION)
        assert settled(cluster) is None
    assert all(torch.equal(a, b) for a, b in zip(again, values, strict=True))


def test_whichever_act_on_the_disk_fails_the_older_checkpoint_stays(tmp_path, monkeypatch):
    """Invariant 23 over a real cluster: every file, sync and rename of coordinator and servers in turn."""
    with trained(tmp_path, 7) as (cluster, name, _, _):
        acts, fail_at, real = [0], [0], {}

        def wrapped(kind):
            def act(*arguments):
                acts[0] += 1
                if acts[0] == fail_at[0]:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return real[kind](*arguments)

            return act

        for kind in ("_put", "_sync_file", "_sync_folder", "_rename"):
            real[kind] = getattr(files, kind)
            monkeypatch.setattr(files, kind, wrapped(kind))
        checkpoint(cluster, cp.CHECKPOINT_LEVEL_PARTITION, "whole")
        assert settled(cluster) is None
        archive = Archive(str(tmp_path))
        archive.remove("whole")
        for at in range(1, acts[0] + 1):
            acts[0], fail_at[0] = 0, at
            checkpoint(cluster, cp.CHECKPOINT_LEVEL_PARTITION, f"try-{at}")
            error = settled(cluster)
            fail_at[0] = 0
            complete = [m.name for m in archive.complete()]
            assert complete[0] == name
            # The sync after the rename leaves it in doubt: it is there, and said to have failed.
            assert (error is None) or complete == [name] or at == acts[0]
            assert not [left for left in os.listdir(tmp_path) if left.endswith(".tmp")]
            assert archive.manifest(complete[-1], verify=True)


def test_a_lost_primary_costs_the_checkpoint_and_the_next_one_is_made(tmp_path, monkeypatch):
    """Its cut is gone with it: the checkpoint is given up, cleaned away, and said."""
    with Cluster(servers=3, workers=WORKERS, replicas=2, checkpoint_dir=str(tmp_path), failure_timeout=1.0,
                 heartbeat_interval=0.1) as cluster:  # fmt: skip
        lost, real = [], files._put

        def put(fs, place, chunks):
            if "partition" in place and not lost:
                row = cluster._coordinator._driver.state.partition(3)
                lost.append(row.server)
                threading.Thread(target=cluster.kill_server, args=(int(row.server.split("-")[1]),)).start()
                wait_until(lambda: cluster._coordinator._driver.state.partition(3).primary != row.primary, 20, "it")
            return real(fs, place, chunks)

        def begin():
            monkeypatch.setattr(files, "_put", put)
            checkpoint(cluster)

        script = Script(6, begin)
        cluster.run(script)
        assert settled(cluster) is not None or Archive(str(tmp_path)).complete()
        monkeypatch.undo()
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
        again = checkpoint(cluster, cp.CHECKPOINT_LEVEL_PARTITION)
        assert settled(cluster) is None
        assert Archive(str(tmp_path)).manifest(again, verify=True)


def test_a_coordinator_that_dies_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """And a restore that it had begun goes on when it is back."""
    with trained(tmp_path, 7) as (cluster, name, values, _):
        (tmp_path / "checkpoint-000009.tmp").mkdir()
        assert [m.name for m in Archive(str(tmp_path)).complete()] == [name]
        for index in list(cluster._servers):
            cluster.kill_server(index)
        cluster.call(custody(cluster).restore(name))
        wait_until(lambda: custody(cluster).progress.phase == "waiting for servers", 20, "it")
        cluster.restart_coordinator()
        assert cluster._coordinator._driver.state.job.restoring
        for index in (10, 11):
            cluster.call(cluster._start_server(index))
        assert settled(cluster) is None
        again = cluster.run(Script())
        assert all(torch.equal(a, b) for a, b in zip(again, values, strict=True))
        checkpoint(cluster, cp.CHECKPOINT_LEVEL_PARTITION)
        assert settled(cluster) is None
        assert not (tmp_path / "checkpoint-000009.tmp").exists()


def test_a_restore_that_fails_can_be_replaced_and_happens_once(tmp_path):
    """Files that go between the check and the load; a wrong path; a coordinator started again with the same flags."""
    with trained(tmp_path, 7) as (_, name, values, losses):
        pass
    state = tmp_path / "state"
    state.mkdir()
    with pytest.raises(ParameshError, match="restore: no complete checkpoint"):
        Cluster(workers=WORKERS, directory=state, restore=f"{tmp_path}/nothing").start()
    config = {"restore": f"{tmp_path}/{name}", "checkpoint_dir": str(tmp_path), "directory": state}
    with Cluster(servers=2, workers=WORKERS, **config) as cluster:
        assert settled(cluster) is None
        generation = cluster._coordinator._driver.state.job.generation
        cluster.restart_coordinator()
        assert cluster._coordinator._driver.state.job.generation == generation
        assert custody(cluster).progress is None
        hidden = tmp_path / name / "ledger.bin"
        content = hidden.read_bytes()
        begin = custody(cluster)._begin

        async def losing(location):
            done = await begin(location)
            hidden.unlink()
            return done

        custody(cluster)._begin = losing
        cluster.call(custody(cluster).restore(name))
        error = settled(cluster)
        assert error is not None
        assert error.reason == "DAMAGED"
        custody(cluster)._begin = begin
        hidden.write_bytes(content)
        cluster.call(custody(cluster).restore(name))
        assert settled(cluster) is None
        script = Script()
        again = cluster.run(script)
    assert all(torch.equal(a, b) for a, b in zip(again, values, strict=True))
    assert script.losses[0] == losses[0][-len(script.losses[0]) :]


def test_async_training_is_written_partition_by_partition(tmp_path):
    with trained(tmp_path, 7, mode="async") as (cluster, name, _, _):
        assert Archive(str(tmp_path)).manifest(name, verify=True).level == "partition"
        with pytest.raises(ParameshError) as caught:
            checkpoint(cluster, cp.CHECKPOINT_LEVEL_STEP)
        assert caught.value.reason == "SCHEMA"
    with Cluster(servers=3, workers=WORKERS, restore=f"{tmp_path}/{name}") as cluster:
        values = cluster.run(Script(mode="async"))
    assert all(torch.isfinite(v).all() for v in values)


def test_level_partition_of_sync_training_can_be_loaded(tmp_path):
    with trained(tmp_path, 7, level=cp.CHECKPOINT_LEVEL_PARTITION) as (_, name, _, _):
        pass
    script = Script()
    with Cluster(servers=1, workers=WORKERS, restore=f"{tmp_path}/{name}") as cluster:
        cluster.run(script)
    assert 0 < len(script.losses[0]) < EPOCHS * STEPS


@pytest.mark.parametrize("every", [{"checkpoint_steps": 4}, {"checkpoint_seconds": 0.2}])
def test_periodic_ones_are_made_and_the_old_ones_go(tmp_path, every):
    archive = Archive(str(tmp_path))
    config = {"checkpoint_dir": str(tmp_path), "checkpoint_keep": 2, **every}
    with Cluster(servers=2, workers=1, **config) as cluster:

        def endless(rank):
            model = torch.nn.Linear(3, 1)
            optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
            seen = set()
            while max(seen, default=0) < 4:
                optimizer.zero_grad()
                model(torch.ones(2, 3)).sum().backward()
                optimizer.step()
                seen.update(m.number for m in archive.complete())
            return seen

        cluster.run(endless)
        wait_until(lambda: custody(cluster).progress.ended, 30, "the last one to end")
    assert 1 <= len(archive.complete()) <= 3  # the newest may be one more than was asked, while it is made
    assert archive.next_number() >= 5


def test_one_thing_at_a_time(tmp_path):
    with Cluster(servers=2, workers=WORKERS, checkpoint_dir=str(tmp_path)) as cluster:
        refused = []

        def twice():
            checkpoint(cluster)
            with pytest.raises(ParameshError) as caught:
                checkpoint(cluster)
            refused.append(caught.value.reason)

        cluster.run(Script(5, twice))
        assert refused == ["NOT_READY"]
        assert settled(cluster) is None
        with pytest.raises(ParameshError, match="choose another name"):
            checkpoint(cluster, name="checkpoint-000001")


def test_export_is_a_plain_state_dict_and_comes_back(tmp_path):
    with trained(tmp_path, 7) as (_, name, _, _):
        made = export_checkpoint(f"{tmp_path}/{name}", str(tmp_path / "net.safetensors"))
    plain = torch.nn.Sequential(torch.nn.Linear(8, 90), torch.nn.Tanh(), torch.nn.Linear(90, 1))
    values = safetensors.torch.load_file(tmp_path / "net.safetensors")
    assert values.keys() == made.keys() == plain.state_dict().keys()
    plain.load_state_dict(values)

    def back(rank):
        model = torch.nn.Sequential(torch.nn.Linear(8, 90), torch.nn.Tanh(), torch.nn.Linear(90, 1))
        optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model)
        model.load_state_dict(values)
        paramesh.assign(model)
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    with Cluster(servers=2, workers=1) as cluster:
        (again,) = cluster.run(back)
    assert all(torch.equal(a, b) for a, b in zip(again, plain.parameters(), strict=True))
