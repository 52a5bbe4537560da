"""The reference of protocol section 10 (ii), and the runs that are held against it.

A run trains a small model in worker threads of an in-process cluster and records, per step, every worker's
gradients, weight and resulting parameters. The reference takes the recorded gradients, sums them as the
protocol says (rank order, no fma), and lets torch's optimizer step each parameter in one piece.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paramesh
import torch

FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
"""Run with torch's fused kernel; the others with its plain loop. Fixed by the design, not by a server."""

Tensors = list[torch.Tensor | None]


@dataclass(frozen=True)
class Case:
    """One optimizer with settings, and what else happens in the run."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    one_cycle: bool = True
    accumulate: int = 1
    max_grad_norm: float | None = None
    amp_inf_at: int | None = None
    loss_reduction: str = "mean"
    speculate: bool = True
    steps: int = 50

    @property
    def name(self) -> str:
        bits = [f"{k}={v}" for k, v in self.settings.items() if k != "lr"]
        extra = [
            f"accumulate={self.accumulate}" if self.accumulate > 1 else "",
            f"max_grad_norm={self.max_grad_norm}" if self.max_grad_norm else "",
            "amp inf" if self.amp_inf_at is not None else "",
            "sum" if self.loss_reduction == "sum" else "",
        ]
        return " ".join([self.kind, *bits, *filter(None, extra), str(self.dtype).removeprefix("torch.")])

    def make(self, parameters: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(torch.optim, self.kind)(parameters, **self.settings)
        return optimizer

    def reference_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        how = {"fused": True} if self.kind in FUSED else {"foreach": False}
        optimizer: torch.optim.Optimizer = getattr(torch.optim, self.kind)(parameters, **how, **self.settings)
        return optimizer

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
        if not self.one_cycle:
            return None
        cycles = "betas" in optimizer.defaults or "momentum" in optimizer.defaults
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, optimizer.param_groups[0]["lr"] * 2, total_steps=self.steps + 1, cycle_momentum=cycles
        )


class Net(torch.nn.Module):
    """Parameters of several sizes; `sometimes` takes part in three steps of four."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.inner = torch.nn.Linear(6, 70)
        self.sometimes = torch.nn.Parameter(torch.zeros(70))
        self.outer = torch.nn.Linear(70, 3)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.to(dtype)
        generator = torch.Generator().manual_seed(5)  # torch's own is shared by the worker threads
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        hidden = torch.tanh(self.inner(x))
        if step % 4 != 3:
            hidden = hidden + self.sometimes
        out: torch.Tensor = self.outer(hidden) * self.scale
        return out


def batch(case: Case, step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A worker's batch; sizes differ by rank, so that weights matter."""
    generator = torch.Generator().manual_seed(((step * 7 + micro) * 31 + rank) * 17 + 3)
    x = torch.randn(5 + 2 * rank, 6, generator=generator, dtype=torch.float64)
    y = torch.stack([x.sum(1), x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
    return x.to(case.dtype), y.to(case.dtype)


def loss_of(model: Net, case: Case, step: int, micro: int, rank: int) -> torch.Tensor:
    x, y = batch(case, step, micro, rank)
    return torch.nn.functional.mse_loss(model(x, step), y, reduction=case.loss_reduction) / case.accumulate


@dataclass
class Trace:
    """What one worker saw."""

    gradients: list[Tensors] = field(default_factory=list)
    """Per step, unscaled, as given to the cluster."""
    weights: list[float] = field(default_factory=list)
    infs: list[bool] = field(default_factory=list)
    values: list[list[torch.Tensor]] = field(default_factory=list)
    """Per step, after it."""
    settings: list[dict[str, Any]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    """state_dict() at the end."""


def train(case: Case, rank: int, after_step: Callable[[int], None] = lambda step: None) -> Trace:
    """One worker's loop, as a user would write it, with recording."""
    model = Net(case.dtype)
    optimizer = paramesh.DistributedOptimizer(
        case.make(model.parameters()),
        model,
        partition_bytes=768,
        max_grad_norm=case.max_grad_norm,
        loss_reduction=case.loss_reduction,
        speculate=case.speculate,
    )
    schedule = case.schedule(optimizer)
    amp = case.amp_inf_at is not None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7, enabled=amp)
    trace = Trace()
    for step in range(case.steps):
        optimizer.zero_grad()
        for micro in range(case.accumulate):
            scaler.scale(loss_of(model, case, step, micro, rank)).backward()
        if amp and step == case.amp_inf_at and rank == 0:
            model.inner.weight.grad[0, 0] = torch.inf
        record(trace, case, model, optimizer, scaler, rank)
        if amp:
            scaler.step(optimizer, weight=trace.weights[-1])
            scaler.update()
        else:
            optimizer.step(weight=trace.weights[-1])
        if schedule is not None:
            schedule.step()
        trace.values.append([p.detach().clone() for p in model.parameters()])
        trace.scales.append(scaler.get_scale())
        after_step(step)
    trace.state = optimizer.state_dict()
    return trace


def record(trace: Trace, case: Case, model: Net, optimizer: Any, scaler: torch.amp.GradScaler, rank: int) -> None:
    gradients: Tensors = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    if case.amp_inf_at is not None:
        inverse = scaler._scale.double().reciprocal().float()
        torch._amp_foreach_non_finite_check_and_unscale_(
            [g for g in gradients if g is not None], torch.zeros(()), inverse
        )
    trace.infs.append(any(g is not None and not bool(torch.isfinite(g).all()) for g in gradients))
    trace.gradients.append(gradients)
    trace.weights.append(float(5 + 2 * rank))
    trace.settings.append({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})


# ---------------------------------------------------------------------- the reference


def combined(case: Case, gradients: list[Tensors], weights: list[float]) -> Tensors:
    """Protocol section 10 (ii): sums in rank order, fp32 (fp64 for fp64), multiply then add, no fma."""
    result: Tensors = []
    total = torch.tensor(0.0, dtype=torch.float64)
    for weight in weights:
        total += weight
    for index in range(len(gradients[0])):
        accumulated = None
        for gradient, weight in zip((g[index] for g in gradients), weights, strict=True):
            if gradient is None:
                continue
            part = gradient.clone()
            if case.loss_reduction == "mean":
                part.mul_(weight)
            accumulated = part if accumulated is None else accumulated.add_(part)
        if accumulated is not None and case.loss_reduction == "mean":
            accumulated.div_(float(total))
        result.append(accumulated)
    return result


def clip(case: Case, gradients: Tensors) -> None:
    """The global norm in fp64, one factor in fp32."""
    if case.max_grad_norm is None:
        return
    squared = sum(float(g.double().pow(2).sum()) for g in gradients if g is not None)
    factor = torch.tensor(min(1.0, case.max_grad_norm / (squared**0.5 + 1e-6)), dtype=torch.float32)
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(float(factor))


def reference(case: Case, traces: list[Trace]) -> tuple[list[list[torch.Tensor]], dict[str, Any]]:
    """Returns the parameters after each step, and the state_dict at the end."""
    model = Net(case.dtype)
    optimizer = case.reference_optimizer(model.parameters())
    values = []
    for step in range(case.steps):
        optimizer.param_groups[0].update(
            {k: v for k, v in traces[0].settings[step].items() if k not in ("fused", "foreach")}
        )
        if not any(trace.infs[step] for trace in traces):
            gradients = combined(case, [t.gradients[step] for t in traces], [t.weights[step] for t in traces])
            clip(case, gradients)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        values.append([p.detach().clone() for p in model.parameters()])
    return values, optimizer.state_dict()


def one_process(case: Case, workers: int) -> list[torch.Tensor]:
    """Plain torch on the concatenated batches; returns the final parameters."""
    model = Net(case.dtype)
    optimizer = case.make(model.parameters())
    schedule = case.schedule(optimizer)
    for step in range(case.steps):
        optimizer.zero_grad()
        for micro in range(case.accumulate):
            parts = [batch(case, step, micro, rank) for rank in range(workers)]
            x, y = (torch.cat(side) for side in zip(*parts, strict=True))
            loss = torch.nn.functional.mse_loss(model(x, step), y, reduction=case.loss_reduction)
            (loss / case.accumulate).backward()
        if step != case.amp_inf_at:
            if case.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), case.max_grad_norm)
            optimizer.step()
        if schedule is not None:
            schedule.step()
    return [p.detach().clone() for p in model.parameters()]


# ---------------------------------------------------------------------- comparing


def first_difference(case: Case, traces: list[Trace]) -> str | None:
    """Where workers or reference differ in a bit; None: nowhere."""
    names = [name for name, _ in Net(case.dtype).named_parameters()]
    expected, state = reference(case, traces)
    for step, wanted in enumerate(expected):
        for rank, trace in enumerate(traces):
            for name, want, got in zip(names, wanted, trace.values[step], strict=True):
                if not same_bits(want, got):
                    off = int((want != got).sum())
                    return f"{case.name}: step {step} rank {rank} {name}: {off} of {want.numel()} elements"
    for rank, trace in enumerate(traces):
        where = state_difference(state, trace.state)
        if where:
            return f"{case.name}: state_dict of rank {rank}: {where}"
    return None


def state_difference(expected: dict[str, Any], got: dict[str, Any]) -> str | None:
    for index, slots in expected["state"].items():
        for slot, value in slots.items():
            if isinstance(value, torch.Tensor):
                found = got["state"].get(index, {}).get(slot)
                if found is None or found.dtype != value.dtype or not same_bits(value, found):
                    return f"{index} {slot}: {found} instead of {value}"
    return None


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()


def deviation(case: Case, traces: list[Trace]) -> float:
    """The largest difference to one process, relative to the scale of the parameter."""
    worst = 0.0
    for want, got in zip(one_process(case, len(traces)), traces[0].values[-1], strict=True):
        scale = max(float(want.abs().max()), 1e-12)
        worst = max(worst, float((want - got).abs().max()) / scale)
    return worst


def tolerance(case: Case) -> float:
    if case.dtype == torch.float64:
        return 1e-9 if case.max_grad_norm is None else 1e-6  # the one factor is fp32 by protocol
    return 1e-6 if case.kind == "SGD" else 1e-4


def variants() -> list[Case]:
    """Every supported optimizer, with the settings that change its arithmetic."""
    cases = [
        Case("SGD", {"lr": 0.01}),
        Case("SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
        Case("SGD", {"lr": 0.01, "momentum": 0.8, "dampening": 0.2, "maximize": False}),
        Case("Adam", {"lr": 0.002}),
        Case("Adam", {"lr": 0.002, "weight_decay": 0.01, "amsgrad": True}),
        Case("AdamW", {"lr": 0.002, "amsgrad": True}),
        Case("AdamW", {"lr": 0.002, "weight_decay": 0.1}),
        Case("Adagrad", {"lr": 0.01, "lr_decay": 0.01, "weight_decay": 0.01}),
        Case("RMSprop", {"lr": 0.001, "momentum": 0.9, "centered": True, "weight_decay": 0.01}),
        Case("RMSprop", {"lr": 0.001}),
        Case("Rprop", {"lr": 0.001}),
        Case("Adadelta", {"lr": 0.5, "weight_decay": 0.01}),
        Case("Adamax", {"lr": 0.002, "weight_decay": 0.01}),
        Case("NAdam", {"lr": 0.002, "weight_decay": 0.01}),
        Case("RAdam", {"lr": 0.002, "weight_decay": 0.01}),
        Case("ASGD", {"lr": 0.01, "weight_decay": 0.01, "t0": 20}),
    ]
    return cases


def with_dtype(case: Case, dtype: torch.dtype) -> Case:
    changed = copy.copy(case)
    object.__setattr__(changed, "dtype", dtype)
    return changed
