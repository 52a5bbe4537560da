"""Paramesh: the parameter server that PyTorch lacks, in three changed lines.

    import paramesh                                                              # 1
    loader = paramesh.DataLoader(dataset, batch_size=64, shuffle=True, seed=0)   # 2
    optimizer = paramesh.DistributedOptimizer(optimizer, model)                  # 3

The training loop stays as it is. `python train.py` runs alone, with nothing started;
`ps-run --servers 2 --workers 2 train.py` runs a cluster on this machine; on a fleet, start
`ps-coordinator`, `ps-server` and `ps-worker train.py`. A worker may die at any time: the
others go on, and it comes back at the step where they are.

Everything else is optional: `rank`, `world_size`, `is_chief`, `device`, `barrier`, `mean`,
`report`, `progress`, `epochs`, `pause`, `state`, `save`, `load`, `assign`, `broadcast`,
`export`, `profile`; `init` and `shutdown` join and leave by hand; `connect` gives tools a
`Client`; `errors` is the table of what can go wrong; `testing` is a cluster in one process.

`import paramesh` imports neither torch nor gRPC: names are loaded when first used.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paramesh import errors, testing
    from paramesh.checkpoint import export, load, save
    from paramesh.client import Client, connect
    from paramesh.data import DataLoader
    from paramesh.model_values import assign, broadcast
    from paramesh.optimizer import DistributedOptimizer
    from paramesh.profiling import profile
    from paramesh.progress_line import progress
    from paramesh.runtime import barrier, device, epochs, is_chief, mean, pause, rank, report, world_size
    from paramesh.session import init, shutdown
    from paramesh.small_state import state

# Read from the package's metadata when asked for. Declared out here: pdoc looks no deeper.
__version__: str

__all__ = [
    "Client",
    "DataLoader",
    "DistributedOptimizer",
    "__version__",
    "assign",
    "barrier",
    "broadcast",
    "connect",
    "device",
    "epochs",
    "errors",
    "export",
    "init",
    "is_chief",
    "load",
    "mean",
    "pause",
    "profile",
    "progress",
    "rank",
    "report",
    "save",
    "shutdown",
    "state",
    "testing",
    "world_size",
]

_HOMES = {
    "checkpoint": ("export", "load", "save"),
    "client": ("Client", "connect"),
    "data": ("DataLoader",),
    "model_values": ("assign", "broadcast"),
    "optimizer": ("DistributedOptimizer",),
    "profiling": ("profile",),
    "progress_line": ("progress",),
    "runtime": ("barrier", "device", "epochs", "is_chief", "mean", "pause", "rank", "report", "world_size"),
    "session": ("init", "shutdown"),
    "small_state": ("state",),
}
"""Module -> public names that live there. No module may be called like a public function:
importing it would put the module in the function's place."""

_MODULES = ("errors", "testing")


if _path := os.environ.get("PARAMESH_ERROR_FILE"):  # set by a supervisor, which is to hear what ended us
    importlib.import_module("paramesh.last_words").install(_path)


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "__version__":
        try:
            return version("paramesh")
        except PackageNotFoundError:  # run from a source tree that nobody installed
            return "0+unknown"
    if name in _MODULES:
        return importlib.import_module(f"paramesh.{name}")
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"paramesh.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'paramesh' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
