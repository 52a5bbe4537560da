"""One worker of the moves benchmark: pushes until it is told to stop; one JSON line per acknowledged write.

Values count what was applied: each push, or step, adds exactly one to every element.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from paramesh.async_client import AsyncClient
from paramesh.config import ClientConfig
from paramesh.encoded import Encoded
from paramesh.heart import beat

TABLE = "moved"
PAUSE_S = 0.02
"""Between two pushes to one partition: how long one takes is measured, not how much a machine can do."""


async def push(address: str, stopped: Callable[[], bool], out: IO[str]) -> None:
    """Async load: one ordered sender per partition, each with a full gradient of -1."""
    client = await AsyncClient.connect(address, role="tool")
    heart = asyncio.ensure_future(beat(client, ClientConfig(coordinators=address)))

    async def one(partition: int, elements: int) -> None:
        pushes = 0
        while not stopped():
            gradient = torch.full((elements,), -1.0)
            encoded = Encoded.from_parts(partition, b"", [(0, gradient.numpy().data.cast("B"))])
            began = time.monotonic()
            await client.push_sequenced({partition: encoded})
            pushes += 1
            out.write(json.dumps({"p": partition, "began": began, "t": time.monotonic()}) + "\n")
            await asyncio.sleep(PAUSE_S)
        out.write(json.dumps({"p": partition, "pushes": pushes}) + "\n")

    spec = await client.describe_table(client.routes.table(TABLE).table_id)
    sizes = [int(tensor.shape[0]) for tensor in spec.tensors]
    partitions = client.routes.partitions_of(TABLE)
    assert len(sizes) == len(partitions), "a partition is a tensor"
    await asyncio.gather(*(one(p, size) for p, size in zip(partitions, sizes, strict=True)))
    heart.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await heart
    await client.deregister()
    await client.close()


def train(plan: dict[str, Any], stopped: Callable[[], bool], out: IO[str]) -> None:
    """Sync load: steps of which each adds one."""
    import paramesh

    from benchmarks.pulse import Pulse

    pulse = Pulse()
    pulse.listen()
    model = torch.nn.ParameterList(torch.zeros(plan["elements"]) for _ in range(plan["partitions"]))
    momentum = plan.get("momentum", 0.0)
    inner = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    optimizer = paramesh.DistributedOptimizer(inner, model, partition_bytes=plan["elements"] * 4)
    for parameter in model:
        parameter.grad = torch.full_like(parameter, -1.0)
    steps = 0
    # The workers agree on when to stop: one that left alone would leave the other one step ahead.
    while not (steps % 16 == 0 and paramesh.mean(float(stopped())) > 0):
        began = time.monotonic()
        optimizer.step()
        steps += 1
        if momentum == 1.0 and steps == 1:  # it keeps the first gradient for ever: every step still adds one
            for parameter in model:
                parameter.grad = torch.zeros_like(parameter)
        out.write(json.dumps({"p": -1, "began": began, "t": time.monotonic()}) + "\n")
    right = all(bool((parameter == float(steps)).all()) for parameter in model)
    out.write(json.dumps({"p": -1, "pushes": steps, "right": right, "stills": pulse.stills}) + "\n")
    paramesh.shutdown()


def main() -> None:
    """Do what the plan in argv[1] says; lines go to the file argv[2]; stop when the file argv[3] is there."""
    plan, stop = json.loads(sys.argv[1]), Path(sys.argv[3])
    torch.set_num_threads(1)
    with open(sys.argv[2], "a", buffering=1) as out:
        if plan["load"] == "async":
            asyncio.run(push(os.environ["PARAMESH_COORDINATOR"], stop.exists, out))
        else:
            train(plan, stop.exists, out)


if __name__ == "__main__":
    main()
