"""DistributedOptimizer with no cluster: it is the inner optimizer, for everything that looks at it."""

import copy
import inspect
import pickle
import threading
import warnings

import paramesh
import pytest
import torch
from paramesh.errors import ConfigError, ParameshError
from paramesh.options import SUPPORTED
from torch.optim.optimizer import register_optimizer_step_pre_hook

PUBLIC = {
    "OptimizerPostHook",
    "OptimizerPreHook",
    "add_param_group",
    "load_state_dict",
    "profile_hook_step",
    "register_load_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_state_dict_pre_hook",
    "register_step_post_hook",
    "register_step_pre_hook",
    "state_dict",
    "step",
    "zero_grad",
}


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(dtype)


def pair(kind=torch.optim.Adam, **settings):
    """(model, distributed), (model, plain) with equal values."""
    plain, wrapped = net(), net()
    settings.setdefault("lr", 0.05)
    return (
        (wrapped, paramesh.DistributedOptimizer(kind(wrapped.parameters(), **settings), wrapped)),
        (plain, kind(plain.parameters(), **settings)),
    )


def backward(model, seed, scale=1.0):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    (model(x).pow(2).mean() * scale).backward()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_every_public_attribute_of_torch_optimizers_is_there():
    assert {name for name in dir(torch.optim.Optimizer) if not name.startswith("_")} == PUBLIC
    (_, wrapped), (_, plain) = pair()
    for name in PUBLIC | {"param_groups", "state", "defaults"}:
        assert hasattr(wrapped, name), name
        assert callable(getattr(wrapped, name)) == callable(getattr(plain, name)), name
    assert isinstance(wrapped, torch.optim.Optimizer)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"OptimizerPostHook", "OptimizerPreHook"}))
def test_methods_take_what_torch_takes(name):
    theirs = inspect.signature(getattr(torch.optim.Optimizer, name)).parameters
    ours = inspect.signature(getattr(paramesh.DistributedOptimizer, name)).parameters
    assert [*ours][: len(theirs)] == [*theirs]


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.__name__)
def test_steps_are_the_inner_optimizers(kind):
    (m1, wrapped), (m2, plain) = pair(kind)
    for step in range(5):
        for model, optimizer in ((m1, wrapped), (m2, plain)):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    assert equal(m1, m2)
    assert wrapped.state is wrapped.inner.state
    assert wrapped.param_groups is wrapped.inner.param_groups


def test_no_thread_and_no_port():
    before = threading.active_count()
    (model, wrapped), _ = pair()
    backward(model, 0)
    wrapped.step()
    wrapped.state_dict()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    ],
)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_schedulers_drive_the_inner_optimizer_and_do_not_complain(kind, scheduler):
    (m1, wrapped), (m2, plain) = pair(kind, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules = [scheduler(wrapped), scheduler(plain)]
        for step in range(10):
            for model, optimizer, schedule in zip((m1, m2), (wrapped, plain), schedules, strict=True):
                optimizer.zero_grad()
                backward(model, step)
                optimizer.step()
                schedule.step()
    assert equal(m1, m2)
    assert wrapped.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_a_scheduler_of_the_inner_optimizer_does_not_complain_either():
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1)
    wrapped = paramesh.DistributedOptimizer(inner, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model, 0)
        wrapped.step()
        schedule.step()
    assert wrapped.param_groups[0]["lr"] == pytest.approx(0.01)


def test_hooks_run_once_wherever_they_were_registered():
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    inner.register_step_pre_hook(lambda *_: seen.append("inner pre"))
    wrapped = paramesh.DistributedOptimizer(inner, model)
    wrapped.register_step_pre_hook(lambda optimizer, *_: seen.append(("pre", optimizer is wrapped)))
    wrapped.register_step_post_hook(lambda *_: seen.append("post"))
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("global"))
    try:
        backward(model, 0)
        wrapped.step()
    finally:
        handle.remove()
    assert sorted(map(str, seen)) == sorted(["inner pre", "('pre', True)", "post", "global"])


def test_state_dict_hooks_run():
    (model, wrapped), _ = pair()
    backward(model, 0)
    wrapped.step()
    wrapped.register_state_dict_post_hook(lambda _, state: {**state, "mark": 1})
    loaded = []
    wrapped.register_load_state_dict_post_hook(lambda *_: loaded.append(1))
    state = wrapped.state_dict()
    assert state["mark"] == 1
    wrapped.load_state_dict(state)
    assert loaded == [1]


def test_state_dict_goes_to_the_plain_optimizer_and_back():
    (m1, wrapped), (m2, plain) = pair()
    backward(m1, 0)
    wrapped.step()
    plain.load_state_dict(copy.deepcopy(wrapped.state_dict()))  # torch itself shares tensors
    m2.load_state_dict(m1.state_dict())
    wrapped.load_state_dict(copy.deepcopy(plain.state_dict()))
    for model, optimizer in ((m1, wrapped), (m2, plain)):
        optimizer.zero_grad()
        backward(model, 1)
        optimizer.step()
    assert equal(m1, m2)
    local = wrapped.state_dict(local=True)
    assert local["state"] == {}
    assert local["param_groups"] == plain.state_dict()["param_groups"]


def test_a_state_dict_that_does_not_fit_is_torchs_own_error():
    (_, wrapped), _ = pair()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        wrapped.load_state_dict({"state": {}, "param_groups": []})


def test_copies_by_deepcopy_and_pickle_train_on_their_own():
    (model, wrapped), _ = pair()
    backward(model, 0)
    wrapped.step()
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):  # noqa: S301 - our own bytes
        assert twin.param_groups[0]["params"][0] is not wrapped.param_groups[0]["params"][0]
        before = model[0].weight.detach().clone()
        for group in twin.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        twin.step()
        assert torch.equal(model[0].weight, before)
        assert not torch.equal(twin.param_groups[0]["params"][0], before)


def test_a_closure_runs_once_and_its_loss_is_returned():
    (model, wrapped), _ = pair()
    calls = []

    def closure():
        wrapped.zero_grad()
        loss = model(torch.ones(1, 4)).sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    assert float(wrapped.step(closure).detach()) == calls[0]
    assert len(calls) == 1


def test_zero_grad_add_param_group_and_repr():
    (model, wrapped), _ = pair()
    backward(model, 0)
    wrapped.zero_grad(set_to_none=False)
    assert float(model[0].weight.grad.abs().sum()) == 0
    wrapped.zero_grad()
    assert model[0].weight.grad is None
    extra = torch.nn.Parameter(torch.ones(3))
    wrapped.add_param_group({"params": [extra], "lr": 1.0})
    extra.grad = torch.ones(3)
    wrapped.step()
    assert not torch.equal(extra.detach(), torch.ones(3))
    assert "Adam" in repr(wrapped)
    assert "alone" in repr(wrapped)


def test_max_grad_norm_clips_alone_as_torch_does():
    m1, m2 = net(), net()
    o1 = paramesh.DistributedOptimizer(torch.optim.SGD(m1.parameters(), lr=1.0), m1, max_grad_norm=0.1)
    o2 = torch.optim.SGD(m2.parameters(), lr=1.0)
    for model in (m1, m2):
        backward(model, 0)
    torch.nn.utils.clip_grad_norm_(m2.parameters(), 0.1)
    o1.step()
    o2.step()
    assert equal(m1, m2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_amp_skips_infs_and_goes_on(fused, by_hand):
    (m1, wrapped), (m2, plain) = pair(torch.optim.Adam, fused=fused)
    for model, optimizer in ((m1, wrapped), (m2, plain)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scales = []
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step, scaler.scale(torch.ones(())))
            if step == 1:
                model[0].weight.grad[0, 0] = torch.inf
            if by_hand:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales == [8.0, 4.0, 4.0, 4.0]
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    assert equal(m1, m2)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.SparseAdam(p),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.Muon(p),
        lambda p: type("MyAdam", (torch.optim.Adam,), {})(p),
    ],
)
def test_unsupported_optimizers_are_refused_by_name_with_what_works(make):
    model = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(ParameshError, match="AdamW, Adagrad") as caught:
        paramesh.DistributedOptimizer(make(model.parameters()), model)
    assert caught.value.reason == "UNSUPPORTED_OPTIMIZER"
    assert caught.value.metadata["optimizer"] in str(caught.value)


def test_local_mode_takes_any_optimizer_but_lbfgs():
    model = torch.nn.Linear(4, 4, bias=False)
    paramesh.DistributedOptimizer(torch.optim.Adafactor(model.parameters()), model, mode="local")
    with pytest.raises(ParameshError, match="LBFGS"):
        paramesh.DistributedOptimizer(torch.optim.LBFGS(model.parameters()), model, mode="local")


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "bsp"},
        {"mode": "ssp", "staleness": -1},
        {"mode": "local", "every": 0},
        {"outer": "average"},
        {"mode": "async", "backup_workers": 1},
        {"loss_reduction": "max"},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": float("nan")},
        {"sync_buffers": "sum"},
        {"partition_bytes": 1},
        {"staleness": True},
        {"non_finite": "ignore"},
        {"non_finite": None},
        {"non_finite": 2},
    ],
    ids=str,
)
def test_wrong_options_are_named(options):
    model = net()
    with pytest.raises(ConfigError) as caught:
        paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)
    assert [*options][-1] in str(caught.value)


@pytest.mark.parametrize("non_finite", ["reject", "skip", "allow"])
def test_alone_a_gradient_that_is_not_finite_is_torchs_affair(non_finite):
    model, plain = net(), net()
    optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, non_finite=non_finite)
    for each, stepped in ((model, optimizer), (plain, torch.optim.SGD(plain.parameters(), lr=0.1))):
        for p in each.parameters():
            p.grad = torch.full_like(p, float("nan"))
        stepped.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.isnan(p).all()
        assert torch.isnan(q).all()


def test_wrong_arguments_are_named():
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = paramesh.DistributedOptimizer(inner, model)
    for wrong in ((wrapped, model), (model, model), (inner, list(model.parameters()))):
        with pytest.raises(ConfigError):
            paramesh.DistributedOptimizer(*wrong)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ParameshError) as caught:
            wrapped.step(weight=weight)
        assert caught.value.reason == "WEIGHT"
