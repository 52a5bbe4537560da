"""How a worker becomes a member: registration at the coordinator, then Join at the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paramesh.config import ClientConfig
from paramesh.v1 import ledger_pb2 as lg

if TYPE_CHECKING:
    from paramesh.async_client import AsyncClient

__all__ = ["CONNECT_S", "GRACE_S", "connect_and_join", "set_local_device"]

CONNECT_S = 60.0
"""Seconds at most until a coordinator answers: time enough to start one in the next shell, short
enough that a wrong address is not taken for a slow cluster. Waiting for servers may take longer."""

GRACE_S = 10.0
"""Seconds more for those who wait from outside, so that the error that says more comes first."""


async def connect_and_join(
    client_type: type[AsyncClient], config: ClientConfig, rank: int | None, *, connect_s: float | None = None
) -> tuple[AsyncClient, lg.JoinResponse]:
    """Register a client of the configured slot and make it a member.

    Args:
        client_type: whose `connect` is called.
        config: where, as whom, and how long to try.
        rank: the rank asked for; None: any.
        connect_s: seconds until a coordinator must answer; None: `config.join_timeout`.
    """
    client = await client_type.connect(
        config.coordinators,
        job=config.job,
        slot=config.place,
        host=config.host,
        host_incarnation=config.host_incarnation,
        role="worker",
        security=config.security,
        timeout=config.join_timeout if connect_s is None else min(connect_s, config.join_timeout),
    )
    try:
        request = lg.JoinRequest(slot=config.place, preferred_rank=rank or 0, has_preferred_rank=rank is not None)
        return client, await client.ledger.join(request, timeout=config.join_timeout)
    except BaseException:
        await client.close()
        raise


async def say_goodbye(client: AsyncClient, seconds: float = 3.0) -> None:
    """Leave the ledger, then the coordinator: rank and leases are free at once.

    Args:
        client: who leaves.
        seconds: for each of the two.

    Raises:
        ParameshError: the ledger did not hear of it; the coordinator was told all the same.
    """
    try:
        await client.ledger.leave(lg.LeaveRequest(), timeout=seconds)
    finally:
        await client.deregister(timeout=seconds)


def set_local_device(config: ClientConfig) -> None:
    """On a GPU machine, make the GPU of the local rank torch's current device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(config.local_rank % torch.cuda.device_count())
