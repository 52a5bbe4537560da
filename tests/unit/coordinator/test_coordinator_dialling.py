"""Row 44 of the input matrix: addresses that mean another machine to everybody else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
from paramesh.errors import ParameshError
from paramesh_coordinator.dialling import check_address, is_gone, is_local_peer

ELSEWHERE = "ipv4:10.0.0.7:41234"


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8", "[::1]", "169.254.3.4", "[fe80::1]"])
@pytest.mark.parametrize("peer", [ELSEWHERE, "ipv6:%5B2001:db8::7%5D:41234", "ipv6:[2001:db8::7]:41234"])
@pytest.mark.bad_input(44, got="ADDRESS")
def test_another_hosts_loopback_and_link_local_addresses_are_refused(host: str, peer: str, port: int) -> None:
    with pytest.raises(ParameshError) as refused:
        asyncio.run(check_address(f"{host}:{port}", "address", peer))
    assert refused.value.reason == "ADDRESS"
    assert "another machine" in str(refused.value)


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:4", "ipv6:%5B::1%5D:4", "ipv6:%5B::ffff:127.0.0.1%5D:4", "unix:/x"])
def test_neighbours_on_this_host_may_use_loopback(peer: str, port: int) -> None:
    assert is_local_peer(peer)
    asyncio.run(check_address(f"127.0.0.1:{port}", "address", peer))


def test_only_a_refused_dial_says_that_a_process_is_gone(port: int) -> None:
    assert not asyncio.run(is_gone(f"127.0.0.1:{port}"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert asyncio.run(is_gone(f"127.0.0.1:{unused.getsockname()[1]}"))
