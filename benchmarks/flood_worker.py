"""One worker of the flood benchmark: trains for ever, and writes how many steps it has made."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import paramesh
import torch
from paramesh import session as sessions

from benchmarks.workload import LR, Flat


def main() -> None:
    """Train until the process is ended."""
    elements, path = int(sys.argv[1]), Path(sys.argv[2])
    model = Flat(elements)
    optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    session = sessions.current()
    assert session is not None, "the benchmark's workers need a cluster"
    model.set_gradients(session.rank)
    steps, written = 0, path.with_suffix(".new")
    while True:
        optimizer.step()
        steps += 1
        written.write_text(str(steps))
        os.replace(written, path)


if __name__ == "__main__":
    main()
