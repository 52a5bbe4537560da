"""Whether an address can be listened on, asked before gRPC is.

gRPC says only that it cannot, and writes lines of its own to stderr; the system says why.
"""

from __future__ import annotations

import errno
import socket

__all__ = ["why_not_listen"]


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
