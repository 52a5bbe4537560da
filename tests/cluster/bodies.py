"""What workers do in tests: short training scripts, written as a user would write them.

The workhorse is `tally`: one fp64 parameter per sample, whose gradient is one for each
time the sample is trained on. With SGD at lr 1 and summed losses the parameters *are* the
count of each sample over all committed steps, so "every sample of the epoch counted in
exactly one committed step" is one comparison, exact, whatever faults hit on the way.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import paramesh
import torch
from torch import nn

from tests.cluster.desk import Desk


def digest(model: nn.Module) -> str:
    """A short hash over the bits of all parameters."""
    hasher = hashlib.sha256()
    for parameter in model.parameters():
        hasher.update(parameter.detach().contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]


class Tally(nn.Module):
    """One count per sample."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.counts = nn.Parameter(torch.zeros(length, dtype=torch.float64))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """The summed loss of a batch of sample numbers; d(loss)/d(counts[i]) = -1 for each."""
        return -self.counts[index].sum()


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    """The numbers 0 .. length-1."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def tally(desk: Desk) -> None:
    """Count samples over epochs.

    Args on the desk (with defaults): length 64, batch 4, epochs 2, mode "sync",
    staleness 4, every 1, backup_workers 0, num_workers 0, seconds 0 (of computing per step; a number, or one
    per worker), first 0 (more for the first step), wait_at (a step that waits for the gate
    "go", while others go on), waiter (index of the only worker that waits), stop_at (a gate: once
    it is open, the loop ends early), validate (index of the worker that validates after each
    epoch) with validate_seconds.
    """
    args = {"length": 64, "batch": 4, "epochs": 2, "mode": "sync", "num_workers": 0, **desk.args}
    model = Tally(args["length"])
    loader = paramesh.DataLoader(
        Numbers(args["length"]), batch_size=args["batch"], shuffle=True, seed=3,
        num_workers=args["num_workers"], multiprocessing_context="fork" if args["num_workers"] else None,
    )  # fmt: skip
    optimizer = paramesh.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model, loss_reduction="sum", **_mode(args)
    )
    desk.emit("joined", rank=paramesh.rank(), world_size=paramesh.world_size())
    steps = 0
    for epoch in paramesh.epochs(args["epochs"]):
        for batch in loader:
            optimizer.zero_grad()
            model(batch).backward()
            _compute(desk, args, steps)
            desk.emit("begin", step=steps + 1)
            optimizer.step()
            steps += 1
            desk.emit("step", epoch=epoch, step=steps, samples=batch.tolist(), digest=digest(model))
            if "stop_at" in args and desk.is_open(args["stop_at"]):
                return
        if args.get("validate") == desk.index:
            desk.emit("validating", epoch=epoch)
            time.sleep(args.get("validate_seconds", 1.0))  # the user's own validation loop
            desk.emit("validated", epoch=epoch)
    desk.emit("final", counts=model.counts.tolist(), steps=steps, digest=digest(model))


def _mode(args: dict[str, Any]) -> dict[str, Any]:
    names = {"ssp": ["staleness"], "local": ["every"], "sync": ["backup_workers"]}.get(args["mode"], [])
    return {"mode": args["mode"], **{name: args[name] for name in names if name in args}}


def _compute(desk: Desk, args: dict[str, Any], step: int) -> None:
    """What a step's forward and backward would cost, and the gates of the test."""
    seconds = args.get("seconds", 0)
    seconds = seconds[desk.index] if isinstance(seconds, list) else seconds
    if step == 0 and desk.incarnation == 0:
        seconds += args.get("first", 0)
    if step == args.get("wait_at") and args.get("waiter", desk.index) == desk.index and desk.incarnation == 0:
        desk.emit("waiting", step=step)
        desk.gate("go")
    time.sleep(seconds)  # stands for computing


def linear(desk: Desk) -> None:
    """A linear regression with Adam: parameters bit-equal on all workers after each step."""
    torch.manual_seed(100 + desk.index)  # first values differ: the lowest rank's must win
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    data = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    dataset = torch.utils.data.TensorDataset(data, data.sum(1, keepdim=True))
    loader = paramesh.DataLoader(dataset, batch_size=desk.args.get("batch", 8), shuffle=True, seed=1)
    optimizer = paramesh.DistributedOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-2), model, mode=desk.args.get("mode", "sync")
    )
    for _epoch in paramesh.epochs(desk.args.get("epochs", 3)):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            desk.emit("step", digest=digest(model), loss=float(loss.detach()))
    desk.emit("final", digest=digest(model), state=_state_digest(optimizer.state_dict()), rank=paramesh.rank())


def _state_digest(state: dict[str, Any]) -> str:
    """A hash of a gathered optimizer state_dict."""
    hasher = hashlib.sha256()
    for index in sorted(state["state"]):
        for name, value in sorted(state["state"][index].items()):
            hasher.update(name.encode())
            hasher.update(torch.as_tensor(value).contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]


def gan(desk: Desk) -> None:
    """Two optimizers, two table groups: the discriminator steps twice per generator step."""
    torch.manual_seed(7)
    generator, critic = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    loader = paramesh.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4, shuffle=True, seed=2)
    g_step = paramesh.DistributedOptimizer(torch.optim.Adam(generator.parameters(), lr=1e-3), generator)
    c_step = paramesh.DistributedOptimizer(torch.optim.SGD(critic.parameters(), lr=1e-2), critic)
    noise = torch.Generator().manual_seed(desk.index)
    batches = 0
    for _epoch in paramesh.epochs(desk.args.get("epochs", 2)):
        for (real,) in loader:
            z = torch.randn(len(real), 2, generator=noise)
            c_step.zero_grad()
            (critic(generator(z).detach()).mean() - critic(real).mean()).backward()
            c_step.step()
            batches += 1
            if batches % 2 == 0:
                g_step.zero_grad()
                (-critic(generator(z)).mean()).backward()
                g_step.step()
            desk.emit("step", critic=digest(critic), generator=digest(generator))
    desk.emit("final", critic=digest(critic), generator=digest(generator), batches=batches)


def scheduled(desk: Desk) -> None:
    """Tally with a learning-rate schedule by epoch, kept in the ledger for who comes back."""
    args = desk.args
    model = Tally(args["length"])
    loader = paramesh.DataLoader(Numbers(args["length"]), batch_size=4, shuffle=True, seed=3)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(inner, step_size=1, gamma=0.5)
    optimizer = paramesh.DistributedOptimizer(inner, model)
    paramesh.state(scheduler=schedule)
    steps = 0
    for epoch in paramesh.epochs(args["epochs"]):
        for batch in loader:
            optimizer.zero_grad()
            model(batch).backward()
            _compute(desk, args, steps)
            steps += 1
            desk.emit("begin", step=steps)
            optimizer.step()
            desk.emit("step", epoch=epoch, lr=optimizer.param_groups[0]["lr"])
        schedule.step()
    desk.emit("final", lr=optimizer.param_groups[0]["lr"])


def until_it_fails(desk: Desk) -> None:
    """Step over 64 MiB of parameters, on all servers, until an error ends it; tell which."""
    model = nn.ParameterList(nn.Parameter(torch.zeros(1 << 20)) for _ in range(16))
    optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    _emit_failure(desk, lambda: _step_for_ever(desk, optimizer))


def _step_for_ever(desk: Desk, optimizer: Any) -> None:
    for step in itertools.count():
        optimizer.step()
        desk.emit("step", step=step)


def _emit_failure(desk: Desk, action: Callable[[], object]) -> None:
    try:
        action()
    except paramesh.errors.ParameshError as error:
        desk.emit("failed", reason=error.reason, message=str(error), metadata=error.metadata)


def wait_alone(desk: Desk) -> None:
    """Wait for a second worker that never comes, in one of the ways a script waits."""
    model = Tally(8)
    optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model)
    loader = paramesh.DataLoader(Numbers(8), batch_size=4)
    paramesh.rank()
    desk.emit("waiting")
    model.counts.grad = torch.ones_like(model.counts)
    ways = {"barrier": paramesh.barrier, "first_step": optimizer.step, "loader": lambda: next(iter(loader))}
    _emit_failure(desk, ways[desk.args["what"]])
