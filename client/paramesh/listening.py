"""Whether an address can be listened on, asked before gRPC is; and whether a peer is on this machine.

gRPC says only that it cannot, and writes lines of its own to stderr; the system says why.
"""

from __future__ import annotations

import errno
import ipaddress
import socket

__all__ = ["ip_of", "is_local_peer", "why_not_listen"]


def why_not_listen(host: str, port: int) -> str:
    """Why nobody can listen there: "Address already in use"; empty if one can.

    Args:
        host: a name or an address; IPv6 in brackets.
        port: 0 for any free one.
    """
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except OSError as error:
        return f"{host} is not known here ({error.strerror})"
    reason = ""
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC does: connections of an earlier process that fade away are no obstacle, a listener is.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
            return ""
        except OSError as error:
            # A name may have an IPv6 address that this machine cannot use; then the other one's reason counts.
            if not reason or error.errno != errno.EAFNOSUPPORT:
                reason = error.strerror or str(error)
    return reason


def ip_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is; None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_local_peer(peer: str) -> bool:
    """Whether who calls is on this machine, by gRPC's name of it.

    One that dials this machine's own outer address looks as if it came from elsewhere.
    """
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return True  # a unix socket or an in-process channel
    ip = ip_of(rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]"))
    mapped = getattr(ip, "ipv4_mapped", None)
    return ip is not None and (mapped or ip).is_loopback
