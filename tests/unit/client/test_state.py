"""Small state: packed without pickle, agreed with the others at the join step, kept seldom."""

import collections
import math
import struct

import numpy as np
import paramesh
import pytest
import torch
from paramesh import small_state
from paramesh.errors import ConfigError, ParameshError
from paramesh.plain import pack, unpack
from paramesh.session import using
from pure_cluster import PureCluster, Trainer


class Numbers(torch.utils.data.Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor(index)


def made(session, kind=torch.optim.lr_scheduler.ExponentialLR, **arguments):
    """A trainer whose param group is a real optimizer's, with a scheduler over it."""
    weight = torch.nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    trainer = Trainer(session)
    trainer.param_groups = inner.param_groups
    scheduler = kind(inner, **(arguments or {"gamma": 0.9}))
    inner.step()  # torch warns about a scheduler whose optimizer never stepped
    return trainer, scheduler, inner


# ---------------------------------------------------------------------- agreeing


def test_a_restarted_worker_agrees_from_its_first_step_on():
    cluster = PureCluster(start_workers=2)
    seen = {}

    def run(session, batches, stop=None):
        trainer, scheduler, inner = made(session)
        paramesh.state(scheduler=scheduler)
        loader = paramesh.DataLoader(Numbers(batches), 1)
        mine = seen.setdefault(session.client.client_id, {})
        for _ in range(2):
            for _ in loader:
                trainer.step()
                scheduler.step()
                mine[trainer.position] = (scheduler.last_epoch, inner.param_groups[0]["lr"])
                if stop and len(mine) == stop:
                    return None
        return session.client.client_id

    def work(session):
        if session.rank == 0:
            return run(session, 60)
        run(session, 60, stop=7)
        cluster.evict(session)  # the process dies here ...
        again = cluster.session("pure/1", 1)  # ... and is started anew
        with using(again):
            done = run(again, 60)
            again.leave()
        session.leave(gracefully=False)
        return done

    survivor, restarted = cluster.run(work, 2)
    common = sorted(seen[survivor].keys() & seen[restarted].keys())
    assert len(common) > 5
    for step in common:
        assert seen[restarted][step] == seen[survivor][step], f"after step {step}"
    for step, (calls, rate) in seen[survivor].items():
        assert calls == step
        assert math.isclose(rate, 0.9**step)


def test_a_worker_that_missed_steps_catches_up_with_the_others():
    cluster = PureCluster(start_workers=2)

    def work(session):
        trainer, scheduler, _ = made(session)
        paramesh.state(scheduler=scheduler)
        for _ in range(3):
            for _ in paramesh.DataLoader(Numbers(5), 1, name="data"):  # three batches for one, two for the other
                trainer.step()
                scheduler.step()
                assert scheduler.last_epoch == trainer.position
        return scheduler.last_epoch

    results = cluster.run(work, 2)
    assert max(results) == 9


class Counter:
    """Stands for an average of the parameters: it changes in every step."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_state_of_an_epochs_end_does_not_undo_what_the_script_did_after_it(monkeypatch):
    monkeypatch.setattr(small_state, "EVERY", 0.0)
    monkeypatch.setattr(small_state, "SHARE", 1e9)
    cluster = PureCluster(start_workers=2)

    def work(session):
        trainer, scheduler, inner = made(session)
        average = Counter()
        paramesh.state(scheduler=scheduler, average=average)
        loader = paramesh.DataLoader(Numbers(5), 1)
        for epoch in range(4):
            for _ in loader:  # three batches for one, two for the other, which misses a step
                assert scheduler.last_epoch == epoch
                assert inner.param_groups[0]["lr"] == pytest.approx(0.9**epoch)
                average.count += 1
                trainer.step()
                if session.small_state._put is not None:
                    session.small_state._put.result(10)
            paramesh.barrier()
            scheduler.step()
            paramesh.barrier()
        return scheduler.last_epoch

    assert cluster.run(work, 2) == [4, 4]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("every", [0.0, 1e9])
def test_all_restarted_go_on_from_what_was_kept(monkeypatch, live, every):
    monkeypatch.setattr(small_state, "EVERY", every)  # 1e9: the first step's state is all there is
    monkeypatch.setattr(small_state, "SHARE", 1e9)
    cluster = PureCluster()

    def script(session, epochs):
        trainer, scheduler, inner = made(session, torch.optim.lr_scheduler.MultiStepLR, milestones=[2, 3])
        paramesh.state(scheduler=scheduler)
        loader = paramesh.DataLoader(Numbers(6), 2)
        rates = []
        for _ in paramesh.epochs(epochs) if live else range(epochs):
            for _ in loader:
                trainer.step()
                if session.small_state._put is not None:
                    session.small_state._put.result(10)
                rates.append(inner.param_groups[0]["lr"])
            scheduler.step()
        return rates, scheduler.last_epoch

    first, _ = cluster.run(lambda s: script(s, 2))[0]
    second, last = cluster.run(lambda s: script(s, 4))[0]
    assert first == [1.0] * 6
    assert second == pytest.approx([0.1] * 3 + [0.01] * 3)
    assert last == 4


def test_a_returning_worker_does_not_go_back_to_older_state():
    cluster = PureCluster()
    session = cluster.session()
    with using(session):
        trainer, scheduler, _ = made(session)
        paramesh.state(scheduler=scheduler)
        for _ in range(4):
            trainer.step()
            scheduler.step()
        with paramesh.pause():
            pass
        trainer.step()
        assert scheduler.last_epoch == 4


def test_rounds_of_means_go_on_where_the_others_are():
    cluster = PureCluster(start_workers=1, gather_ms=0)
    one = cluster.session("pure/0", 0)
    with using(one):
        trainer, _, _ = made(one)
        for value in range(5):
            trainer.step()
            assert paramesh.mean(value) == value
        one.small_state._keep(force=True)
        one.small_state._put.result(10)
    two = cluster.session("pure/1", 1)
    with using(two):
        made(two)
        two.ensure_active()
        assert two.rounds == {"mean:": 5}


# ---------------------------------------------------------------------- keeping


def test_keeping_is_seldom_and_silent_when_nothing_changed(monkeypatch):
    monkeypatch.setattr(small_state, "EVERY", 0.0)
    cluster = PureCluster()
    session = cluster.session()
    with using(session):
        trainer = Trainer(session)
        for _ in range(20):
            trainer.step()
    assert [m for _, m in cluster.calls].count("put_state") == 1
    monkeypatch.setattr(small_state, "EVERY", 1e9)
    with using(cluster.session("pure/1")) as other:
        trainer, scheduler, _ = made(other)
        paramesh.state(scheduler=scheduler)


@pytest.mark.parametrize("thing", [object(), 3, None])
def test_things_without_state_are_refused_alone_too(thing):
    with using(None), pytest.raises(ConfigError, match="odd"):
        paramesh.state(odd=thing)


class Holder:
    def __init__(self, content):
        self.content = content

    def state_dict(self):
        return self.content

    def load_state_dict(self, content):
        self.content = content


def test_what_cannot_be_kept_is_named_by_its_path():
    with using(None), pytest.raises(ParameshError, match=r"odd\.hook\.1 is a .*function") as caught:
        paramesh.state(odd=Holder({"hook": [1, len]}))
    assert caught.value.reason == "FORMAT"


def test_too_large_state_is_named():
    with using(None), pytest.raises(ParameshError, match="largest is 'big'") as caught:
        paramesh.state(small=Holder({}), big=Holder({"x": torch.zeros(3 << 19)}))
    assert caught.value.reason == "STATE_TOO_LARGE"


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5]),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: torch.optim.lr_scheduler.LinearLR(o),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[3],
        ),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.amp.GradScaler("cpu"),
        lambda o: torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2)),
    ],
)
def test_everything_torch_has_survives_the_way(make):
    def optimizer():
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)

    thing = make(optimizer())
    for _ in range(4):
        if isinstance(thing, torch.optim.lr_scheduler.LRScheduler):
            thing.step(*([1.0] if isinstance(thing, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
    state = thing.state_dict()
    again = unpack(pack(state))
    assert same(again, state)
    fresh = make(optimizer())
    fresh.load_state_dict(again)
    assert same(fresh.state_dict(), state)


# ---------------------------------------------------------------------- bytes


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b


VALUES = {
    "numbers": [0, -1, 2**80, 1.5, -0.0, math.inf, -math.inf, math.nan, True, None],
    "nested": ({"a": [(), ("x", (1,))], 1: {None: 2.5, (1, "k"): False}},),
    "collections": [collections.Counter({3: 2}), collections.OrderedDict(z=1, a=2), {1, 2}, frozenset({"f"})],
    "tensors": [torch.arange(6).reshape(2, 3).t(), torch.tensor(2.5), torch.empty(0), torch.tensor([True])],
    "small floats": [torch.ones(3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16)],
    "complex": torch.complex(torch.ones(2), torch.zeros(2)),
    "numpy": [np.arange(3.0), np.float32(1.5), np.zeros((0, 2))],
    "bytes and size": [b"\x00\xff", torch.Size([2, 3])],
    "a key of ours": {"~": "tensor", "v": "0:value"},
    "strings": ["", "é\n\x00", "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace")],
}


@pytest.mark.parametrize("name", VALUES)
def test_values_survive_packing(name):
    assert same(unpack(pack(VALUES[name])), VALUES[name])


def test_packing_shared_or_strided_tensors_copies_them():
    base = torch.arange(10.0)
    kept = unpack(pack({"a": base[::2], "b": base}))
    base += 1
    assert torch.equal(kept["a"], torch.arange(0, 10.0, 2))


def test_a_cycle_is_refused():
    cycle = []
    cycle.append(cycle)
    with pytest.raises(ParameshError, match="deeper than 64"):
        pack(cycle)


@pytest.mark.parametrize("value", [{torch.tensor(1): 2}, torch.zeros(2).to_sparse(), np.array(["a"], object)])
def test_what_is_not_allowed_is_refused(value):
    with pytest.raises(ParameshError) as caught:
        pack(value)
    assert caught.value.reason == "FORMAT"


def _with(document, tail=b""):
    return struct.pack("<Q", len(document)) + document + tail


GOOD = pack({"a": torch.arange(4)})

BAD = {
    "empty": b"",
    "short": GOOD[:7],
    "cut": GOOD[:-1],
    "long": GOOD + b"\x00",
    "length": struct.pack("<Q", 2**63) + b"{}",
    "no json": _with(b"os.system"),
    "no utf-8": _with(b'"\xff"'),
    "unknown form": _with(b'{"~": "__import__", "v": ["os"]}'),
    "no body": _with(b'{"~": "tuple"}'),
    "no such tensor": _with(b'{"~": "tensor", "v": "x"}'),
    "form is a list": _with(b'{"~": [], "v": 1}'),
    "deep": _with(b"[" * 100_000 + b"]" * 100_000),
    "unhashable key": _with(b'{"~": "dict", "v": [[[], 1]]}'),
    "not pairs": _with(b'{"~": "dict", "v": [1]}'),
    "not base64": _with(b'{"~": "bytes", "v": "!"}'),
    "not a float": _with(b'{"~": "float", "v": "x"}'),
    "real as complex": pack({"a": torch.arange(4.0)}).replace(b'"complex":false', b'"complex":true '),
}


@pytest.mark.parametrize("name", BAD)
def test_bytes_that_are_not_ours_are_refused(name):
    with pytest.raises(ParameshError) as caught:
        unpack(BAD[name])
    assert caught.value.reason == "FORMAT"
