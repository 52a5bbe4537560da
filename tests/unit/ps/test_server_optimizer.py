"""Every optimizer of the fixed list: torch's own semantics, whatever the cuts."""

from __future__ import annotations

import itertools

import pytest
import torch
from paramesh.errors import ParameshError, UnsupportedOptimizer
from paramesh.routing import cut
from paramesh_server.aggregate import flat_views
from paramesh_server.optimizer import FUSED, LOOP, REFUSED, PartitionOptimizer, check_settings, slot_kinds
from ps_building import DTYPES, random_gradients, raw, table

SETTINGS: dict[str, dict[str, object]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "betas": (0.8, 0.95), "maximize": True},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 0.01},
    "Adadelta": {"lr": 0.5, "rho": 0.8},
    "Adamax": {"lr": 0.02},
    "NAdam": {"lr": 0.01, "momentum_decay": 0.01},
    "RAdam": {"lr": 0.01, "weight_decay": 0.01},
    "ASGD": {"lr": 0.01, "t0": 2.0},
}
LENGTHS = [1000, 64, 3, 700, 129]
STEPS = 6


def gradient_of(step: int) -> list[torch.Tensor]:
    """Whole-tensor gradients of one step; tensor 1 is absent in step 0, tensor 3 in step 2."""
    whole = cut(table(LENGTHS, partition_bytes=1 << 30))[0]
    return random_gradients(whole, 100 + step)


def is_present(tensor: int, step: int) -> bool:
    return (tensor, step) not in ((1, 0), (3, 2))


def run(name: str, partition_bytes: int, dtype: int = DTYPES["fp32"], lr_change: bool = True) -> list[bytes]:
    """Train the table cut in this way; each tensor's final bytes."""
    spec = table(LENGTHS, name, SETTINGS[name], dtype, partition_bytes)  # type: ignore[arg-type]
    finals: list[bytearray] = [bytearray() for _ in LENGTHS]
    start = random_gradients(cut(table(LENGTHS, partition_bytes=1 << 30))[0], 5)
    for layout in cut(spec):
        flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
        views = flat_views(layout, flat)
        optimizer = PartitionOptimizer(name, SETTINGS[name], views, layout)  # type: ignore[arg-type]
        for segment, view in zip(layout.segments, views, strict=True):
            view.copy_(start[segment.tensor][segment.start : segment.start + segment.length])
        for step in range(STEPS):
            if lr_change and step == 3:
                optimizer.configure(optimizer.merged({"lr": 0.003}))
            whole = gradient_of(step)
            gradients = [
                whole[s.tensor][s.start : s.start + s.length].to(view.dtype)
                for s, view in zip(layout.segments, views, strict=True)
            ]
            optimizer.step(gradients, [is_present(s.tensor, step) for s in layout.segments])
        for segment, view in zip(layout.segments, views, strict=True):
            finals[segment.tensor] += raw(view)
    return [bytes(final) for final in finals]


@pytest.mark.parametrize("name", [*FUSED, *LOOP])
def test_cuts_change_no_bit(name: str) -> None:
    """Invariant 8: the number of partitions is not seen in the values."""
    whole = run(name, 1 << 30)
    assert [len(cut(table(LENGTHS, partition_bytes=size))) for size in (1 << 30, 4096, 512)] == [1, 2, 15]
    assert run(name, 4096) == whole
    assert run(name, 512) == whole


@pytest.mark.parametrize("name", [*FUSED, *LOOP])
def test_equals_torch_on_whole_tensors(name: str) -> None:
    """Invariant 15: the user's own optimizer, stepped in one process, ends at the same bits."""
    how = {"fused": True} if name in FUSED else {"foreach": False}
    finals = []
    for tensor in range(len(LENGTHS)):  # one optimizer each: fused SGD cannot mix absent and present
        start = random_gradients(cut(table(LENGTHS, partition_bytes=1 << 30))[0], 5)[tensor]
        parameter = torch.nn.Parameter(start.clone())
        optimizer = getattr(torch.optim, name)([parameter], **SETTINGS[name], **how)
        for step in range(STEPS):
            if step == 3:
                optimizer.param_groups[0]["lr"] = 0.003
            parameter.grad = gradient_of(step)[tensor] if is_present(tensor, step) else None
            optimizer.step()
        finals.append(raw(parameter))
    assert run(name, 512) == finals


@pytest.mark.parametrize(("name", "dtype"), list(itertools.product([*FUSED, *LOOP], ["fp64", "bf16", "fp16"])))
def test_cuts_change_no_bit_in_other_dtypes(name: str, dtype: str) -> None:
    """Invariant 8 for every storage dtype."""
    assert run(name, 512, DTYPES[dtype]) == run(name, 1 << 30, DTYPES[dtype])


@pytest.mark.parametrize("name", [*REFUSED, "Lion", "os.system", "Optimizer"])
def test_what_is_not_on_the_list_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedOptimizer, match=name) as caught:
        check_settings(name, {"lr": 0.1})
    assert caught.value.reason == "UNSUPPORTED_OPTIMIZER"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("SGD", {"lr": -1.0}, "Invalid learning rate"),
        ("SGD", {"lr": float("nan")}, "lr=nan"),
        ("SGD", {"lr": 0.1, "momentum": float("nan")}, "momentum=nan"),
        ("SGD", {"lr": 0.1, "nesterov": True}, "Nesterov"),
        ("SGD", {"lr": 0.1, "beta": 0.9}, "no hyper-parameter 'beta'"),
        ("SGD", {"lr": None}, "lr=None"),
        ("SGD", {"lr": 0.1, "nesterov": 1.0}, "nesterov=1.0"),
        ("SGD", {"lr": True}, "lr=True"),
        ("Adam", {"betas": (0.9, 1.0)}, "Invalid beta"),
        ("Adam", {"betas": (0.9,)}, "betas"),
        ("Adam", {"eps": -1e-8}, "Invalid epsilon"),
        ("RMSprop", {"alpha": -0.1}, "Invalid alpha"),
        ("Adagrad", {"lr": 0.1, "params": 3.0}, "no hyper-parameter 'params'"),
    ],
)
def test_hyper_parameters_are_judged_by_torch(name: str, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ParameshError, match=words) as caught:
        check_settings(name, settings)  # type: ignore[arg-type]
    assert caught.value.reason == "HYPER_PARAMETER"


def test_how_torch_computes_and_what_schedulers_note_is_ignored() -> None:
    wanted = check_settings("AdamW", {"lr": 0.1})
    sent = {
        "lr": 0.1,
        "foreach": True,
        "fused": None,
        "capturable": True,
        "initial_lr": 0.5,
        "decoupled_weight_decay": True,
    }
    assert check_settings("AdamW", sent) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*FUSED, *LOOP])
def test_state_moves_from_one_partition_to_another(name: str) -> None:
    """Snapshot and assign carry every state: training goes on bit for bit (invariant 8)."""
    layout = cut(table([200, 64]))[0]
    one, two = (torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(2))
    settings = SETTINGS[name]
    first = PartitionOptimizer(name, settings, flat_views(layout, one), layout)  # type: ignore[arg-type]
    second = PartitionOptimizer(name, settings, flat_views(layout, two), layout)  # type: ignore[arg-type]
    for step in range(3):
        first.step(random_gradients(layout, step), [True, step > 0])
    two.copy_(one)
    for slot in first.slots():
        second.slot(slot.segment, slot.name).copy_(slot.value)
    for step in range(3, 6):
        for optimizer in (first, second):
            optimizer.step(random_gradients(layout, step), [True, True])
    assert torch.equal(one, two)
    kinds = slot_kinds(name, first.settings, torch.float32)
    assert {slot.name for slot in first.slots()} == set(kinds)
    assert all((slot.value.dim() == 0) == kinds[slot.name].scalar for slot in first.slots())


def test_an_absent_segment_keeps_its_state() -> None:
    layout = cut(table([64, 64], "Adam"))[0]
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    optimizer = PartitionOptimizer("Adam", {"lr": 0.1}, flat_views(layout, flat), layout)
    gradients = random_gradients(layout, 1)
    optimizer.step(gradients, [True, True])
    before = raw(flat[256:512])
    optimizer.step(gradients, [True, False])
    assert raw(flat[256:512]) == before
    steps = {slot.segment: float(slot.value) for slot in optimizer.slots() if slot.name == "step"}
    assert steps == {0: 2.0, 1: 1.0}
