"""save, load, export and small state over a real in-process cluster."""

import errno
import os

import paramesh
import paramesh.optimizer
import paramesh.registry
import paramesh.small_state
import pytest
import safetensors.torch
import torch
from paramesh import checkpoint, files
from paramesh.errors import ParameshError
from paramesh.session import using

WORKERS = 2


class Lines(torch.utils.data.Dataset):
    """y = sum of x."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return x, x.sum().reshape(1)


def made(mode="sync"):
    torch.manual_seed(paramesh.rank())  # first values differ: the lowest rank's are taken
    model = torch.nn.Sequential(torch.nn.Linear(6, 70), torch.nn.Tanh(), torch.nn.Linear(70, 1))
    inner = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = paramesh.DataLoader(Lines(), batch_size=4, shuffle=True, seed=3, name=f"lines-{mode}")
    optimizer = paramesh.DistributedOptimizer(inner, model, mode=mode)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    paramesh.state(scheduler=scheduler)
    return model, optimizer, scheduler, loader


def train(model, optimizer, scheduler, loader, epochs=1):
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            scheduler.step()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def test_a_loaded_cluster_is_where_it_was_saved(tmp_path):
    def work(rank):
        parts = made()
        train(*parts)
        model, optimizer, scheduler, _ = parts
        saved, calls = flat(model), scheduler.last_epoch
        paramesh.save(tmp_path / "c")
        state = optimizer.state_dict()
        train(*parts)
        assert not torch.equal(flat(model), saved)
        paramesh.load(tmp_path / "c")
        assert torch.equal(flat(model), saved)
        assert scheduler.last_epoch == calls == 6
        again = optimizer.state_dict()
        for index, slots in state["state"].items():
            for name, value in slots.items():
                assert torch.equal(again["state"][index][name], value), (index, name)
        train(*parts)
        return saved, flat(model)

    with paramesh.testing.Cluster(servers=2, workers=WORKERS) as cluster:
        results = cluster.run(work)
    assert all(torch.equal(results[0][0], saved) for saved, _ in results)
    assert all(torch.equal(results[0][1], after) for _, after in results)
    assert os.listdir(tmp_path) == ["c"]

    # What a fresh cluster makes of it is what the old one went on to: same epoch order, same state.
    def fresh(rank):
        parts = made()
        paramesh.load(tmp_path / "c")
        for _ in range(2):  # epochs 0 and 1 of the loader, of which the first cluster had trained two
            next(iter(parts[3]), None)
        return flat(parts[0])

    with paramesh.testing.Cluster(servers=1, workers=1) as cluster:
        (values,) = cluster.run(fresh)
    assert torch.equal(values, results[0][0])


def test_a_checkpoint_of_a_cluster_loads_alone_and_continues_the_same(tmp_path):
    def work(rank):
        parts = made()
        train(*parts)
        paramesh.save(tmp_path / "c")
        paramesh.export(tmp_path / "net.safetensors", parts[0])
        train(*parts)
        return flat(parts[0])

    with paramesh.testing.Cluster(servers=2, workers=1) as cluster:
        (expected,) = cluster.run(work)
    registry = paramesh.registry.Registry()
    with using(None), pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint, paramesh.small_state, paramesh.optimizer):
            patch.setattr(module, "registry", lambda: registry)
        parts = made()
        paramesh.load(tmp_path / "c")
        next(iter(parts[3]))  # epoch 0 was trained on before the checkpoint
        train(*parts)
    # The servers' segments and the plain optimizer's tensors differ in kernels' block order only.
    torch.testing.assert_close(flat(parts[0]), expected, rtol=1e-4, atol=1e-6)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 70), torch.nn.Tanh(), torch.nn.Linear(70, 1))
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "net.safetensors"))


def test_the_chiefs_failure_is_everybodys(tmp_path, monkeypatch):
    def put(fs, place, data):
        raise OSError(errno.ENOSPC, "No space left on device", place)

    monkeypatch.setattr(files, "_put", put)

    def work(rank):
        parts = made()
        train(*parts)
        with pytest.raises(ParameshError) as caught:
            paramesh.save(tmp_path / "c")
        train(*parts)
        return caught.value.reason, str(caught.value)

    with paramesh.testing.Cluster(servers=1, workers=WORKERS) as cluster:
        results = cluster.run(work)
    assert [reason for reason, _ in results] == ["PATH", "PATH"]
    assert "No space left" in results[0][1]
    assert "its own error says why" in results[1][1]
    assert os.listdir(tmp_path) == []


def test_damage_is_everybodys_and_changes_nothing(tmp_path):
    def work(rank):
        parts = made()
        train(*parts)
        paramesh.save(tmp_path / "c")
        if rank == 0:
            with open(tmp_path / "c" / "model-0.safetensors", "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")
        paramesh.barrier("damaged")
        train(*parts)
        before = flat(parts[0])
        with pytest.raises(ParameshError, match=r"damaged|another worker") as caught:
            paramesh.load(tmp_path / "c")
        assert caught.value.reason in ("DAMAGED", "FORMAT")
        train(*parts)  # PARAMETERS_CHANGED if anything had been touched
        return not torch.equal(before, flat(parts[0]))

    with paramesh.testing.Cluster(servers=1, workers=WORKERS) as cluster:
        assert cluster.run(work) == [True, True]


@pytest.mark.parametrize("mode", ["async", "ssp", "local"])
def test_the_other_modes_save_and_load(tmp_path, mode):
    def work(rank):
        parts = made(mode)
        train(*parts)
        paramesh.barrier("trained")
        paramesh.save(tmp_path / "c")
        paramesh.load(tmp_path / "c")
        paramesh.barrier("loaded")
        return flat(parts[0])

    with paramesh.testing.Cluster(servers=2, workers=WORKERS) as cluster:
        results = cluster.run(work)
    assert torch.equal(results[0], results[1])


def test_only_the_chief_may_save_by_itself(tmp_path):
    def work(rank):
        parts = made()
        train(*parts)
        if paramesh.is_chief():
            paramesh.save(tmp_path / "c", wait=False)
        train(*parts)
        return flat(parts[0])

    with paramesh.testing.Cluster(servers=1, workers=WORKERS) as cluster:
        results = cluster.run(work)
    assert torch.equal(results[0], results[1])
    assert os.path.exists(tmp_path / "c" / "MANIFEST.json")
