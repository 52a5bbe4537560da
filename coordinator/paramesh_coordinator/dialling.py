"""Whether an address that a server gives can be reached, before anybody is told of it."""

from __future__ import annotations

import asyncio

from paramesh.errors import refuse
from paramesh.listening import ip_of, is_local_peer

__all__ = ["check_address", "is_gone"]

DIAL_SECONDS = 2.0
"""A connection across a data centre takes milliseconds; a dropped SYN is repeated after 1 s."""


async def check_address(address: str, what: str, peer: str) -> None:
    """Refuse an address that others could not dial.

    Args:
        address: host:port as advertised.
        what: the field, for the message.
        peer: gRPC's name of who asks, such as "ipv4:10.0.0.7:41234".

    Raises:
        RequestRefused: ADDRESS.
    """
    host, port = _split(address, what)
    if not is_local_peer(peer) and _only_local(host):
        raise refuse(
            "ADDRESS", f"{what} {address!r} means another machine to everybody else; advertise one that others can dial"
        )
    if _unspecified(host):
        raise refuse("ADDRESS", f"{what} {address!r} is no address to dial; advertise a host name or a real address")
    try:
        await _dial(host, port)
    except (OSError, TimeoutError) as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or type(error).__name__
        raise refuse("ADDRESS", f"{what} {address!r} cannot be dialled from the coordinator: {why}") from error


async def is_gone(address: str) -> bool:
    """Whether a dial is refused: then no process listens there any more.

    No answer at all is not that: the machine may be slow, or stopped, and silence decides.
    """
    host, port = _split(address, "address")
    try:
        await _dial(host, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    return False


async def _dial(host: str, port: int) -> None:
    _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), DIAL_SECONDS)
    writer.close()


def _split(address: str, what: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise refuse("ADDRESS", f"{what} {address[:80]!r} is not host:port with a port in 1..65535")
    return host.strip("[]"), int(port)


def _unspecified(host: str) -> bool:
    ip = ip_of(host)
    return ip is not None and ip.is_unspecified


def _only_local(host: str) -> bool:
    ip = ip_of(host)
    return host == "localhost" if ip is None else ip.is_loopback or ip.is_link_local
