"""One worker of the dense benchmark: started by `benchmarks.dense`, writes one JSON line per size.

Phases are timed inside `step()` by wrapping the client's own calls, so that what is
measured is what a user's step does, and pull alone is measured by pulling again what is
already applied: the same bytes, without waiting for others or for the sum.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import paramesh
import torch
from paramesh import session as sessions
from paramesh.routing import PartitionLayout, cut

from benchmarks.workload import LR, Flat, expected_value, steps_off

if TYPE_CHECKING:
    from paramesh.membership import Session
    from paramesh.v1.parameter_server_pb2 import PullHeader

WARM_STEPS = 3
"""Untimed: first values, connections, and buffers that are allocated once."""


class Stopwatch:
    """Collects the durations of an async method of an object, from now on."""

    def __init__(self, target: Any, name: str) -> None:
        self.seconds: list[float] = []
        original = getattr(target, name)

        async def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return await original(*args, **kwargs)
            finally:
                self.seconds.append(time.perf_counter() - began)

        setattr(target, name, timed)


def durations(action: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return seconds


class Puller:
    """Pulls every partition of one table into one buffer, as `step()` does with its own."""

    def __init__(self, session: Session, table: str, elements: int) -> None:
        self._session = session
        self._partitions = list(session.client.routes.partitions_of(table))
        self.values = torch.empty(elements)
        flat = memoryview(self.values.numpy()).cast("B")
        self._views: dict[int, memoryview] = {}
        at = 0
        for layout, partition in zip(self._layouts(table), self._partitions, strict=True):
            self._views[partition] = flat[at : at + layout.nbytes]
            at += layout.nbytes

    def _layouts(self, table: str) -> tuple[PartitionLayout, ...]:
        entry = self._session.client.routes.table(table)
        described = self._session.call(self._session.client.describe_table(entry.table_id), "the table", 30)
        return cut(described)

    def _sink(self, partition: int, header: PullHeader, payload: memoryview) -> None:
        start = header.frame.offset
        self._views[partition][start : start + len(payload)] = payload

    def pull(self) -> None:
        """Pull the newest values."""
        self._session.call(self._session.client.pull(self._partitions, self._sink), "a pull", 120)


def measure(name: str, elements: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Train one size for WARM_STEPS + steps, then pull as often; check the parameters."""
    session = sessions.current()
    assert session is not None, "the benchmark's workers need a cluster"
    mode, steps = plan["mode"], plan["steps"][name]
    model = Flat(elements)
    optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=LR), model, mode=mode)
    model.set_gradients(session.rank)
    for _ in range(WARM_STEPS):
        optimizer.step()
    paramesh.barrier()
    pushing = Stopwatch(session.client, "push_staged" if mode in ("sync", "local") else "push_sequenced")
    pulling = Stopwatch(session.client, "pull")
    step_seconds = durations(optimizer.step, steps)
    in_step_pull = list(pulling.seconds)
    assert len(pushing.seconds) == len(in_step_pull) == steps, "a step is one push and one pull"
    paramesh.barrier()
    table = max(session.client.routes.map.tables, key=lambda t: t.table_id).name  # this size's, the newest
    puller = Puller(session, table, elements)
    puller.pull()
    paramesh.barrier()
    pull_seconds = durations(puller.pull, steps)
    expected = expected_value(mode, WARM_STEPS + steps, plan["workers"])
    # In sync mode each worker's own copy must be right too; in the others it lags by design.
    values = [puller.values, *(p.detach() for p in model.parameters() if mode == "sync")]
    result = {
        "size": name,
        "rank": session.rank,
        "step_s": step_seconds,
        "push_s": pushing.seconds,
        "apply_and_pull_s": in_step_pull,
        "pull_s": pull_seconds,
        "steps_off": steps_off(values, expected, mode, plan["workers"]),
    }
    paramesh.barrier()
    return result


def main() -> None:
    """Run every size of the plan in argv[1]; append results to the file argv[2]."""
    plan = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    with open(sys.argv[2], "a", buffering=1) as out:
        for name, elements in plan["sizes"].items():
            out.write(json.dumps(measure(name, elements, plan)) + "\n")
    paramesh.shutdown()


if __name__ == "__main__":
    main()
