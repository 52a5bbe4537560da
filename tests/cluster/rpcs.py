"""Every RPC that there is, from the descriptors."""

from __future__ import annotations

import functools

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from paramesh.v1 import (
    checkpoint_pb2,
    coordinator_pb2,
    ledger_pb2,
    parameter_server_pb2,
    recovery_pb2,
    replication_pb2,
    types_pb2,
)

FILES = (
    checkpoint_pb2, coordinator_pb2, ledger_pb2, parameter_server_pb2, recovery_pb2, replication_pb2, types_pb2,
    health_pb2, reflection_pb2,
)  # fmt: skip
"""A new file of protos/ is found missing here by `unit/client/test_access.py`."""


@functools.cache
def methods() -> dict[str, MethodDescriptor]:
    """Path -> descriptor."""
    services = [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]
    return {f"/{service.full_name}/{method.name}": method for service in services for method in service.methods}


def kind_of(path: str) -> str:
    """The name of the channel's method for it, such as "unary_stream"."""
    method = methods().get(path)
    if method is None:
        method = descriptor_pool.Default().FindMethodByName(path[1:].replace("/", "."))
    names = {True: "stream", False: "unary"}
    return f"{names[method.client_streaming]}_{names[method.server_streaming]}"
