"""Seeds in several processes; apart from `__main__`, which spawned processes do not import."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from tests.simulation.broken import BROKEN
from tests.simulation.world import Failure, simulate

Job = tuple[int, int, str, str]
"""Seed, replicas (0: drawn), scenario ("drawn": by the seed), broken rule ("": none)."""


def _one(job: Job) -> tuple[int, str, str]:
    """Seed, what became of it, its story if it fails."""
    seed, replicas, scenario, broken = job
    with BROKEN[broken]() if broken else nullcontext():
        try:
            return seed, simulate(seed, replicas, scenario).how, ""
        except Failure as failure:
            return seed, "FAILED", str(failure)


def _begin() -> None:
    """In each process of the pool; torch's own function does not survive the way there."""
    torch.set_num_threads(1)


def results(jobs: list[Job], workers: int) -> Iterator[tuple[int, str, str]]:
    """What became of each job, in order."""
    torch.set_num_threads(1)
    if workers < 2 or len(jobs) < 2:
        yield from map(_one, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _begin) as pool:
        yield from pool.imap(_one, jobs, chunksize=4)
