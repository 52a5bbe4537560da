"""Faults as values: what is done to whom, and how soon the others must go on."""

from __future__ import annotations

import enum
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.processes import ProcessCluster, ProcessWorker


@dataclass(frozen=True)
class _WorkerFault:
    """One way to lose a worker in the middle of a step."""

    inflict: Callable[[ProcessWorker], None]
    bound: float
    """Seconds until the others' next step is complete."""
    comes_back: bool
    """Whether the supervisor starts it again."""


class WorkerFault(enum.Enum):
    """Ways to lose a worker. The bounds are the issue's (F-i2: torchrun takes 6.6-7.1 s and restarts all)."""

    KILLED = _WorkerFault(lambda w: w.signal_training(signal.SIGKILL), bound=0.5, comes_back=True)
    """SIGKILL of the training process: its supervisor reports the exit at once."""

    HOST_LOST = _WorkerFault(lambda w: w.signal_everything(signal.SIGKILL), bound=2.5, comes_back=False)
    """SIGKILL of supervisor and training process at once: only silence tells (2 s)."""

    HOST_STOPPED = _WorkerFault(lambda w: w.signal_everything(signal.SIGSTOP), bound=2.5, comes_back=False)
    """SIGSTOP of both: connections stay open, nothing answers."""

    STOPPED = _WorkerFault(lambda w: w.signal_training(signal.SIGSTOP), bound=3.0, comes_back=False)
    """SIGSTOP of the training process: its supervisor beats on, sees it in /proc and reports it after 2 s."""

    def __call__(self, worker: ProcessWorker) -> None:
        """Do it."""
        self.value.inflict(worker)


class ServerFault(enum.Enum):
    """Ways to lose a server; with one replica each ends the job, by name and within 5 s."""

    KILLED = "SIGKILL"
    STOPPED = "SIGSTOP"

    def __call__(self, cluster: ProcessCluster, node: str) -> None:
        """Do it."""
        if self is ServerFault.KILLED:
            cluster.kill(node)
        else:
            cluster.pause(node)
