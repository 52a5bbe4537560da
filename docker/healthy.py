"""Whether the gRPC server at an address serves: `healthy.py HOST:PORT`, exit status 0 if it does.

Without TLS, as `grpc.health.v1` of any client. With PARAMESH_TLS_CA, PARAMESH_TLS_CERT and PARAMESH_TLS_KEY in the
environment it asks as the node itself; PARAMESH_HEALTH_NAME is then the name in the server's certificate, if it is not
the host's.
"""

import os
import socket
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

DEADLINE_S = 2.5


def channel(address: str) -> grpc.Channel:
    """A channel as this node would open it."""
    files = [os.environ.get(f"PARAMESH_TLS_{name}", "") for name in ("CA", "KEY", "CERT")]
    if not all(files):
        return grpc.insecure_channel(address)
    name = os.environ.get("PARAMESH_HEALTH_NAME") or socket.gethostname()
    credentials = grpc.ssl_channel_credentials(*(Path(file).read_bytes() for file in files))
    return grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", name)])


def main() -> int:
    """Ask once."""
    with channel(sys.argv[1]) as opened:
        try:
            answer = health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        except grpc.RpcError as error:
            print(f"{sys.argv[1]}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
