"""A worker that registers before its supervisor has registered again: it waits, within its join timeout."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from paramesh import testing
from paramesh.async_client import AsyncClient
from paramesh.channel import aio_channel, header
from paramesh.errors import ParameshError
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import coordinator_pb2_grpc

INCARNATION = 4


async def register_host(address: str) -> None:
    async with aio_channel(address) as channel:
        request = co.RegisterHostRequest(
            request=header("default"), name="h", incarnation=INCARNATION, slots=1, host_id="h"
        )
        await coordinator_pb2_grpc.MembershipStub(channel).RegisterHost(request, timeout=10)


async def connect(address: str, timeout: float) -> AsyncClient:
    where: dict[str, Any] = {"slot": "h/0", "host": "h", "host_incarnation": INCARNATION}
    return await AsyncClient.connect(address, **where, timeout=timeout)


async def quicker_than_its_supervisor(cluster: testing.Cluster) -> AsyncClient:
    """Connects first; the supervisor follows once the coordinator has refused the worker."""
    assert cluster._coordinator is not None
    membership = cluster._coordinator._driver
    refused = asyncio.Event()
    decide = membership.decide

    async def noting(make: Any) -> Any:
        try:
            return await decide(make)
        except ParameshError as error:
            if error.reason == "UNKNOWN_NODE":
                refused.set()
            raise

    membership.decide = noting  # type: ignore[method-assign]
    connecting = asyncio.ensure_future(connect(cluster.address, 20))
    await asyncio.wait_for(refused.wait(), 10)
    assert not connecting.done()
    await register_host(cluster.address)
    return await connecting


def test_a_worker_quicker_than_its_supervisor_waits_for_it() -> None:
    with testing.Cluster() as cluster:
        client = cluster.call(quicker_than_its_supervisor(cluster))
        assert client.client_id > 0
        cluster.call(client.close())


def test_a_supervisor_that_never_comes_is_named() -> None:
    with testing.Cluster() as cluster:
        began = time.monotonic()
        with pytest.raises(ParameshError) as caught:
            cluster.call(connect(cluster.address, 0.5))
        assert time.monotonic() - began < 10
        assert (caught.value.reason, caught.value.metadata["last"]) == ("DEADLINE", "UNKNOWN_NODE")
        assert "supervisor 'h'" in str(caught.value)
