"""How a worker becomes a member: registration at the coordinator, then Join at the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paramesh.config import ClientConfig
from paramesh.v1 import ledger_pb2 as lg

if TYPE_CHECKING:
    from paramesh.async_client import AsyncClient

__all__ = ["connect_and_join", "set_local_device"]


async def connect_and_join(
    client_type: type[AsyncClient], config: ClientConfig, rank: int | None
) -> tuple[AsyncClient, lg.JoinResponse]:
    """Register a client of the configured slot and make it a member.

    Args:
        client_type: whose `connect` is called.
        config: where, as whom, and how long to try.
        rank: the rank asked for; None: any.
    """
    client = await client_type.connect(
        config.coordinators,
        job=config.job,
        slot=config.place,
        host=config.host,
        host_incarnation=config.host_incarnation,
        role="worker",
        timeout=config.join_timeout,
    )
    try:
        request = lg.JoinRequest(slot=config.place, preferred_rank=rank or 0, has_preferred_rank=rank is not None)
        return client, await client.ledger.join(request, timeout=config.join_timeout)
    except BaseException:
        await client.close()
        raise


def set_local_device(config: ClientConfig) -> None:
    """On a GPU machine, make the GPU of the local rank torch's current device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(config.local_rank % torch.cuda.device_count())
