"""Hyper-parameters: what travels, what does not, and what is refused by name."""

import math

import numpy as np
import pytest
import torch
from paramesh.errors import ParameshError
from paramesh.hyper import difference, from_protos, numeric, to_protos
from paramesh.options import SUPPORTED


def group_of(optimizer):
    return numeric(optimizer.param_groups[0], optimizer.defaults)


def parameter():
    return torch.nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.__name__)
def test_every_supported_optimizer_survives_the_round_trip(kind):
    optimizer = kind([parameter()], lr=0.25)
    settings = group_of(optimizer)
    assert settings["lr"] == 0.25
    back = from_protos(to_protos(settings))
    assert back == settings
    made = kind([parameter()], **{k: v for k, v in back.items() if k != "decoupled_weight_decay"})
    assert group_of(made) == settings


def test_flags_of_the_implementation_and_notes_of_schedulers_stay_at_home():
    optimizer = torch.optim.Adam([parameter()], lr=0.1, foreach=True)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    optimizer.param_groups[0]["name"] = "head"
    settings = group_of(optimizer)
    assert not settings.keys() & {"foreach", "fused", "capturable", "differentiable"}
    assert not settings.keys() & {"initial_lr", "max_lr", "name", "params"}
    assert {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"} <= settings.keys()


def test_numbers_hidden_in_tensors_and_numpy_become_numbers():
    optimizer = torch.optim.Adam([parameter()], lr=torch.tensor(0.5))
    optimizer.param_groups[0]["eps"] = np.float32(0.25)
    assert group_of(optimizer)["lr"] == 0.5
    assert group_of(optimizer)["eps"] == 0.25


@pytest.mark.parametrize("value", ["fast", math.inf, math.nan, torch.zeros(2), (0.9, "x"), {"a": 1}], ids=repr)
def test_what_is_not_a_finite_number_is_refused_by_name(value):
    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    optimizer.param_groups[0]["weight_decay"] = value
    with pytest.raises(ParameshError, match="weight_decay") as caught:
        group_of(optimizer)
    assert caught.value.reason == "HYPER_PARAMETER"


def test_difference_has_only_what_changed():
    old = {"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False, "momentum": None}
    assert difference({}, old) == old
    assert difference(old, old) == {}
    assert difference(old, {**old, "betas": (0.8, 0.99)}) == {"betas": (0.8, 0.99)}
    assert difference({"x": 0.0}, {"x": False}) == {"x": False}
    assert difference(old, {**old, "momentum": 0.0}) == {"momentum": 0.0}


def test_a_message_without_a_value_is_refused():
    messages = to_protos({"lr": 0.1})
    messages[0].ClearField("number")
    with pytest.raises(ParameshError, match="lr"):
        from_protos(messages)
