"""The environment of a training process: what it reads to find its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Place", "child_environment", "wants_one_thread"]


@dataclass(frozen=True)
class Place:
    """Where a training process stands; constant over the supervisor's life but for `restart`."""

    coordinator: str
    """host:port[,host:port] of the coordinator."""
    job: str
    host: str
    """The supervisor's name in the cluster."""
    host_incarnation: int
    """Random per supervisor start, so that a restarted supervisor is another one."""
    local_rank: int
    """Index of the process on this host, 0 <= local_rank < nproc."""
    restart: int = 0
    """How often this slot was started before."""
    error_file: str = ""
    """Where the process writes which exception ended it; empty: nowhere."""

    @property
    def slot(self) -> str:
        """The place's name in the cluster, kept over restarts: "host-a/0"."""
        return f"{self.host}/{self.local_rank}"


def wants_one_thread(inherited: Mapping[str, str], nproc: int) -> bool:
    """Whether OMP_NUM_THREADS is set to 1 for the children, as torchrun does: several processes that
    each take all cores are slower than one thread each.
    """
    return nproc > 1 and "OMP_NUM_THREADS" not in inherited


def child_environment(inherited: Mapping[str, str], place: Place, nproc: int) -> dict[str, str]:
    """Compose a training process's environment.

    Args:
        inherited: the supervisor's own environment; all of it is passed on.
        place: where the process stands.
        nproc: how many processes the supervisor runs.
    """
    env = dict(inherited)
    env.update(
        PARAMESH_COORDINATOR=place.coordinator,
        PARAMESH_JOB=place.job,
        PARAMESH_SLOT=place.slot,
        PARAMESH_HOST=place.host,
        PARAMESH_HOST_INCARNATION=str(place.host_incarnation),
        PARAMESH_LOCAL_RANK=str(place.local_rank),
        PARAMESH_RESTART=str(place.restart),
    )
    if place.error_file:
        env["PARAMESH_ERROR_FILE"] = place.error_file
    # The supervisor's PARAMESH_RANK is the preferred rank of its first process.
    if inherited.get("PARAMESH_RANK", "").isdecimal():
        env["PARAMESH_RANK"] = str(int(inherited["PARAMESH_RANK"]) + place.local_rank)
    if wants_one_thread(inherited, nproc):
        env["OMP_NUM_THREADS"] = "1"
    # Its output is a pipe, which Python would buffer by 8 KiB: people want to see lines as they come.
    env.setdefault("PYTHONUNBUFFERED", "1")
    return env
