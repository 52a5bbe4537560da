"""save, load, export alone: whole or not at all, verified before anything is touched."""

import errno
import json
import os
import pathlib
import uuid

import fsspec
import paramesh
import paramesh.optimizer
import paramesh.small_state
import pytest
import safetensors.torch
import torch
from paramesh import checkpoint, files
from paramesh.errors import ConfigError, ParameshError
from paramesh.registry import Registry
from paramesh.session import using


@pytest.fixture
def alone(monkeypatch):
    """A script of its own: no cluster, and nothing made before."""
    registry = Registry()
    for module in (checkpoint, paramesh.small_state, paramesh.optimizer):
        monkeypatch.setattr(module, "registry", lambda: registry)
    with using(None):
        yield registry


class Net(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = torch.nn.Linear(3, width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.last = torch.nn.Linear(width, 3, bias=False)
        self.last.weight = torch.nn.Parameter(self.first.weight.t().clone())

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def script(steps=3, seed=0, width=4):
    torch.manual_seed(seed)
    model = Net(width)
    optimizer = paramesh.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    paramesh.state(scheduler=scheduler)
    train(model, optimizer, scheduler, steps)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, steps):
    for number in range(steps):
        torch.manual_seed(1000 + number)
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_loaded_script_goes_on_as_if_nothing_had_been(alone, tmp_path, where):
    path = tmp_path / "run" / "1" if where == "local" else f"memory://{uuid.uuid4()}/run/1"
    model, optimizer, scheduler = script()
    paramesh.save(path)
    train(model, optimizer, scheduler, 4)

    alone.objects.clear()
    alone._optimizers.clear()
    again = script(steps=1, seed=5)
    paramesh.load(path)
    train(*again, 4)
    assert equal(model, again[0])
    assert again[2].last_epoch == scheduler.last_epoch == 7
    assert again[1].param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**3)


def test_the_files_are_plain(alone, tmp_path):
    model, optimizer, _ = script()
    paramesh.save(tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "MANIFEST.json").read_text())
    assert sorted(manifest["files"]) == ["model-0.safetensors", "optimizer-0.safetensors", "state.safetensors"]
    values = safetensors.torch.load_file(tmp_path / "c" / "model-0.safetensors")
    plain = Net()
    plain.load_state_dict(values)
    assert equal(plain, model)
    assert optimizer.state_dict()["state"]


def test_saving_again_replaces_and_leaves_nothing_else(alone, tmp_path):
    model, optimizer, scheduler = script()
    paramesh.save(tmp_path / "c")
    train(model, optimizer, scheduler, 2)
    paramesh.save(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    with torch.no_grad():
        kept = model.first.weight.clone()
        model.first.weight.zero_()
    paramesh.load(tmp_path / "c")
    assert torch.equal(model.first.weight, kept)


@pytest.mark.parametrize("victim", ["model-0.safetensors", "optimizer-0.safetensors", "state.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone"])
def test_damage_is_found_before_anything_is_touched(alone, tmp_path, victim, damage):
    model, optimizer, scheduler = script()
    paramesh.save(tmp_path / "c")
    train(model, optimizer, scheduler, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    file = tmp_path / "c" / victim
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(data if damage == "flip" else data[:-1] if damage == "cut" else data + b"\0")
    with pytest.raises(ParameshError) as caught:
        paramesh.load(tmp_path / "c")
    assert caught.value.reason == "DAMAGED"
    assert victim in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert scheduler.last_epoch == 5


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        b'{"files": 3}',
        b'{"files": {}, "format": 99}',
        b'{"files": {}, "format": 1}',
        b'{"files": {"../x": {"bytes": 0, "sha256": ""}}}',
        b'{"files": {"a": {"bytes": "many", "sha256": ""}}}',
    ],
)
def test_a_manifest_that_is_none_is_refused(alone, tmp_path, manifest):
    script()
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "MANIFEST.json").write_bytes(manifest)
    with pytest.raises(ParameshError) as caught:
        paramesh.load(folder)
    assert caught.value.reason == "FORMAT"


def test_no_manifest_is_no_checkpoint(alone, tmp_path):
    script()
    with pytest.raises(ParameshError, match="no complete checkpoint") as caught:
        paramesh.load(tmp_path)
    assert caught.value.reason == "NOT_FOUND"


def test_another_model_is_refused_by_the_first_difference(alone, tmp_path):
    script()
    paramesh.save(tmp_path / "c")
    alone._optimizers.clear()
    other, _, _ = script(width=5)
    before = other.first.weight.clone()
    with pytest.raises(ParameshError, match=r"first\.bias.*\[5\] here and \[4\] in the checkpoint"):
        paramesh.load(tmp_path / "c")
    assert torch.equal(other.first.weight, before)


def test_other_numbers_of_optimizers_are_refused(alone, tmp_path):
    keep = script()
    paramesh.save(tmp_path / "c")
    more = script()
    with pytest.raises(ConfigError, match="1 models and 1 optimizers, this script has 2 and 2"):
        paramesh.load(tmp_path / "c")
    del keep, more


def test_without_an_optimizer_there_is_nothing_to_save(alone, tmp_path):
    for act in (paramesh.save, paramesh.load):
        with pytest.raises(ConfigError, match="DistributedOptimizer"):
            act(tmp_path / "c")


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(alone, tmp_path, monkeypatch, fails_at):
    model, optimizer, scheduler = script()
    paramesh.save(tmp_path / "c")
    kept = model.first.weight.detach().clone()
    train(model, optimizer, scheduler, 1)
    written, real = [], files._put

    def put(fs, place, data):
        if len(written) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device", place)
        written.append(place)
        return real(fs, place, data)

    monkeypatch.setattr(files, "_put", put)
    with pytest.raises(ParameshError, match="No space left") as caught:
        paramesh.save(tmp_path / "c")
    assert caught.value.reason == "PATH"
    assert os.listdir(tmp_path) == ["c"]
    monkeypatch.undo()
    with using(None):
        for module in (checkpoint,):
            monkeypatch.setattr(module, "registry", lambda: alone)
        paramesh.load(tmp_path / "c")
    assert torch.equal(model.first.weight, kept)


def test_export_is_one_file_that_loads_without_us(alone, tmp_path):
    model = Net()
    model.tied = model.first
    for path in (tmp_path / "deep" / "net.safetensors", f"memory://{uuid.uuid4()}/net.safetensors"):
        paramesh.export(path, model)
        with fsspec.open(os.fspath(path), "rb") as file:
            values = safetensors.torch.load(file.read())
        assert values.keys() == model.state_dict().keys()
        assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
    assert os.listdir(tmp_path / "deep") == ["net.safetensors"]


def test_export_where_nothing_can_be_written(alone, tmp_path):
    blocked = pathlib.Path(tmp_path, "file")
    blocked.write_text("not a folder")
    with pytest.raises(ParameshError) as caught:
        paramesh.export(blocked / "net.safetensors", Net())
    assert caught.value.reason == "PATH"
    with pytest.raises(ParameshError) as caught:
        paramesh.export("nosuchscheme://x/y", Net())
    assert caught.value.reason == "PATH"
