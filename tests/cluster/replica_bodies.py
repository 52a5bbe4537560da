"""What workers do while servers are lost: training with known bits, and pushes that are counted.

`digits` is the example. `train` has four tables on as many partitions and ends in the same bits however often a server
is replaced. `push` gives one unit to one cell per push, so that the tables *are* the multiset
of applied pushes: one that is lost or applied twice shows as a count.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import runpy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paramesh
import torch
from paramesh import session as sessions
from paramesh.client import Client
from paramesh.encoded import Encoded
from paramesh.errors import ParameshError
from paramesh.io import IoThread
from torch import nn

from tests.cluster.bodies import Numbers, Tally, digest
from tests.cluster.desk import Desk

CELLS = 64
"""Per table; every pusher has `OWN` of them for itself."""

OWN = 16

COUNTERS = "counts-"
"""What the names of tables of counts begin with."""

TICK = 0.02
"""Seconds between two looks of a waiting coroutine: the poll of `waiting.py`, on an event loop."""


def train(desk: Desk) -> None:
    """Classify 8x8 images; every bit of the result follows from the arguments and the number of workers.

    Args on the desk (with defaults): epochs 2, seconds 0 (of computing per step), mode "sync",
    every 2 (mode "local"), half_at (a step whose pull is let through to some partitions only;
    it waits for the gate "go" before the others; `spared` are those that wait), stop_at (a gate: once
    it is open, the loop ends with the epoch), stop_after (steps).
    """
    args = {"epochs": 2, "seconds": 0.0, "mode": "sync", "every": 2, **desk.args}
    layers = [nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 32), nn.Linear(32, 10)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], nn.Tanh(), layers[3])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # not by the global generator, which workers in threads share
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    images, labels = torch.randn(320, 64, generator=draw), torch.randint(0, 10, (320,), generator=draw)
    loader = paramesh.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8, shuffle=True, seed=1)
    extra: dict[str, Any] = {"every": args["every"]} if args["mode"] == "local" else {}
    groups = [{"params": list(layer.parameters())} for layer in layers]
    optimizer = paramesh.DistributedOptimizer(torch.optim.Adam(groups, lr=1e-2), model, mode=args["mode"], **extra)
    if "half_at" in args:
        _pull_in_halves(desk, args["half_at"], set(args["spared"]))
    steps = 0
    for _epoch in paramesh.epochs(args["epochs"]):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            time.sleep(args["seconds"])  # stands for computing
            if steps == args.get("wait_at") and args.get("waiter", desk.index) == desk.index:
                desk.emit("waiting", step=steps)
                desk.gate("go")
            desk.emit("begin", step=steps + 1)
            optimizer.step()
            steps += 1
            desk.emit("step", step=steps)
            if steps == args.get("stop_after"):
                break
        # All or none: a worker that goes on alone would end in other bits.
        if steps == args.get("stop_after") or ("stop_at" in args and agreed(desk.is_open(args["stop_at"]))):
            break
    desk.emit("final", steps=steps, digest=digest(model))


def digits(desk: Desk) -> None:
    """Train `examples/digits.py`, by its own functions, for longer; its bits follow from the number of workers.

    Args on the desk: epochs, seconds (0; of computing per step, beside the real one).
    """
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "digits.py"), run_name="digits")
    torch.manual_seed(0)
    images, labels, test_images, test_labels = example["load_data"](0)
    dataset = torch.utils.data.TensorDataset(images, labels)
    loader = paramesh.DataLoader(dataset, batch_size=32, shuffle=True, seed=0)
    model = example["make_model"]()
    optimizer = paramesh.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=2e-3), model)
    steps = 0

    def made(*_: object) -> None:
        nonlocal steps
        steps += 1
        desk.emit("step", step=steps)
        time.sleep(desk.args.get("seconds", 0.0))  # stands for computing

    optimizer.register_step_post_hook(made)
    for _ in range(desk.args["epochs"]):
        example["train_epoch"](model, loader, optimizer)
    reached = example["accuracy"](model, test_images, test_labels)
    desk.emit("final", steps=steps, digest=digest(model), accuracy=reached)


def agreed(opinion: bool) -> bool:
    """Whether any worker thinks so; the same on all."""
    return float(paramesh.mean(torch.tensor(float(opinion)))) > 0


def _pull_in_halves(desk: Desk, step: int, later: set[int]) -> None:
    """Let the pull after `step` reach all partitions but `later`, and those when the gate opens."""
    session = sessions.current()
    assert session is not None
    client, whole = session.client, session.client.pull

    async def pull(partitions: Any, sink: Any, **how: Any) -> Any:
        first = [p for p in partitions if p not in later]
        if how.get("step") != step + 1 or len(first) == len(list(partitions)):
            return await whole(partitions, sink, **how)
        headers = await whole(first, sink, **how)
        desk.emit("halfway", step=step)
        while not desk.is_open("go"):  # noqa: ASYNC110 - a gate is a file
            await asyncio.sleep(TICK)
        return {**headers, **await whole([p for p in partitions if p in later], sink, **how)}

    client.pull = pull


def torn(desk: Desk) -> None:
    """Count samples twice, in tables of their own on two partitions, on arrival; one push can be torn.

    Args on the desk: length, seconds, tear_at (a step of worker 1's first life whose push reaches
    one partition and waits for the gate "never" before the other).

    Emits: "torn" (samples, partition: that has them), "step" (samples) when one is begun, "final".
    """
    args = desk.args
    both = nn.ModuleList([Tally(args["length"]), Tally(args["length"])])
    loader = paramesh.DataLoader(Numbers(args["length"]), batch_size=4, shuffle=True, seed=3)
    groups = [{"params": list(one.parameters())} for one in both]
    optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(groups, lr=1.0), both, loss_reduction="sum", mode="async")
    for step, batch in enumerate(loader):
        optimizer.zero_grad()
        desk.emit("step", samples=batch.tolist())
        (both[0](batch) + both[1](batch)).backward()
        time.sleep(args["seconds"])  # stands for computing
        if step == args["tear_at"] and desk.index == 1 and desk.incarnation == 0:
            _tear_next_push(desk, batch.tolist())
        optimizer.step()
    desk.emit("final")


def _tear_next_push(desk: Desk, samples: list[int]) -> None:
    """Let this client's next push reach its first partition and no other."""
    session = sessions.current()
    assert session is not None
    client, whole = session.client, session.client.push_sequenced

    async def push(contributions: Mapping[int, Encoded], *more: Any, **how: Any) -> Any:
        first = min(contributions)
        await whole({first: contributions[first]}, *more, **how)
        desk.emit("torn", samples=samples, partition=first)
        while not desk.is_open("never"):  # noqa: ASYNC110 - a gate is a file
            await asyncio.sleep(TICK)

    client.push_sequenced = push


def one_unit(partition: int, cell: int) -> dict[int, Encoded]:
    """The gradient that adds one to a cell, with SGD at lr 1."""
    gradient = torch.zeros(CELLS, dtype=torch.float64)
    gradient[cell] = -1.0
    return {partition: Encoded.from_parts(partition, b"", [(0, gradient.numpy().data.cast("B"))])}


def make_counters(client: Client, tables: int, acks: str = "isr") -> None:
    """Tables of counts, one partition each."""
    for number in range(tables):
        first = {"w": torch.zeros(CELLS, dtype=torch.float64)}
        client.create_table(f"{COUNTERS}{number}", first, "SGD", {"lr": 1.0}, acks=acks)


def counters(client: Client) -> list[str]:
    """The tables that `make_counters` made; beside them a job may train."""
    return [name for name in client.tables() if name.startswith(COUNTERS)]


def push(desk: Desk) -> None:
    """Push one unit after the other to every table, one pusher and one reader per partition, until "stop".

    Args on the desk: pace 0.005 (seconds between a partition's pushes), deadline 600 (seconds).

    Emits: "running" when every partition has acknowledged; "epoch" at the first acknowledgement
    under each epoch (partition, epoch, began, gap: seconds since the one before); "stall" for
    every other gap above 0.25 s; "below" for a read that lacks what was acknowledged to this
    client; "failed"; at the end "acked", the counts by partition.
    """
    address = os.environ["PARAMESH_COORDINATOR"]
    with contextlib.ExitStack() as stack:
        tool = stack.enter_context(paramesh.connect(address))
        partitions = [tool._client.routes.partitions_of(name)[0] for name in counters(tool)]
        # One client each: an update of unknown outcome ends a client, and one partition's loss is not the others'.
        pushers = {p: _Pusher(desk, stack.enter_context(paramesh.connect(address)), p) for p in partitions}
        IoThread.get().run(_push_all(desk, pushers), desk.args.get("deadline", 600), "the pushers")
        desk.emit("acked", acked={p: one.acked for p, one in pushers.items()},
                  duplicates=sum(one.duplicates for one in pushers.values()))  # fmt: skip


async def _push_all(desk: Desk, pushers: Mapping[int, _Pusher]) -> None:
    tasks = [asyncio.ensure_future(one.run()) for one in pushers.values()]
    tasks += [asyncio.ensure_future(one.read()) for one in pushers.values()]
    while not all(one.total or one.failed for one in pushers.values()):  # noqa: ASYNC110
        await asyncio.sleep(TICK)
    desk.emit("running", partitions=list(pushers))
    while not desk.is_open("stop"):  # noqa: ASYNC110 - a gate is a file
        await asyncio.sleep(TICK)
    for one in pushers.values():
        one.stopping = True
    await asyncio.gather(*tasks)


def read(desk: Desk) -> None:
    """Read some partitions over and over, several reads at a time, until "stop".

    Args on the desk: partitions (their numbers), at_a_time 8 (reads).

    Emits: "running" after the first read; "read" at the end (count: of partitions that were read).
    """
    with paramesh.connect(os.environ["PARAMESH_COORDINATOR"]) as tool:
        IoThread.get().run(_read_all(desk, tool), 600, "the reads")


async def _read_all(desk: Desk, tool: Client) -> None:
    partitions, count = desk.args["partitions"], 0

    async def one() -> None:
        nonlocal count
        while not desk.is_open("stop"):
            await tool._client.pull(partitions, lambda *_: None)
            count += len(partitions)

    await tool._client.pull(partitions, lambda *_: None)
    desk.emit("running")
    await asyncio.gather(*(one() for _ in range(desk.args.get("at_a_time", 8))))
    desk.emit("read", count=count)


class _Pusher:
    """Pushes to one partition and reads it."""

    def __init__(self, desk: Desk, client: Client, partition: int) -> None:
        self._desk = desk
        self._client = client._client
        self._partition = partition
        self._floor = (0, 0)
        self.acked = [0] * OWN
        self.total = 0
        self.duplicates = 0
        self.failed = False
        self.stopping = False

    async def run(self) -> None:
        """Push until told to stop, or until an error."""
        last, epoch, pace = time.monotonic(), 0, self._desk.args.get("pace", 0.005)
        while not self.stopping and not self.failed:
            cell = self.total % OWN
            began = time.monotonic()
            try:
                answer = await self._client.push_sequenced(one_unit(self._partition, self._desk.index * OWN + cell))
            except ParameshError as error:
                self._fail(error, last)
                return
            outcome, now = answer[self._partition], time.monotonic()
            self.acked[cell] += 1
            self.total += 1
            self.duplicates += outcome.duplicate
            self._floor = max(self._floor, (outcome.epoch, outcome.lsn))
            if outcome.epoch != epoch:
                self._emit("epoch", epoch=outcome.epoch, before=epoch, began=began, gap=now - last)
            elif now - last > 0.25:
                self._emit("stall", epoch=epoch, began=began, gap=now - last)
            last, epoch = now, outcome.epoch
            await asyncio.sleep(pace)

    def _fail(self, error: ParameshError, last: float) -> None:
        self.failed = True
        gap = time.monotonic() - last
        self._emit("failed", reason=error.reason, message=str(error), metadata=error.metadata, gap=gap)

    def _emit(self, kind: str, **data: Any) -> None:
        self._desk.emit(kind, partition=self._partition, **data)

    async def read(self) -> None:
        """Read again and again: never less than what was acknowledged to this client before (invariant 13)."""
        own = slice(self._desk.index * OWN, (self._desk.index + 1) * OWN)
        while not self.stopping and not self.failed:
            values = bytearray(CELLS * 8)
            floor, acked = self._floor, list(self.acked)

            def sink(_partition: int, head: Any, payload: memoryview, into: bytearray = values) -> None:
                into[head.frame.offset : head.frame.offset + head.frame.length] = payload

            try:
                headers = await self._client.pull([self._partition], sink, floors={self._partition: floor})
            except ParameshError as error:
                self._emit("read_failed", reason=error.reason, message=str(error))
                return
            header, seen = headers[self._partition], torch.frombuffer(values, dtype=torch.float64)[own].tolist()
            if (header.epoch, header.lsn) < floor or any(s < a for s, a in zip(seen, acked, strict=True)):
                self._emit("below", floor=floor, at=(header.epoch, header.lsn), seen=seen, acked=acked)
            self._floor = max(self._floor, (header.epoch, header.lsn))
            await asyncio.sleep(0.05)
