"""The bad-input matrix (design 4, section 2): the coordinator's and the servers' control plane."""

from __future__ import annotations

import math
from typing import Any

from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import replication_pb2, replication_pb2_grpc
from paramesh.v1 import types_pb2 as pb

from tests.faults.bad_input_rows import NAMES, Row
from tests.faults.bench import Bench, number

FOREIGN = pb.RequestHeader(job="other", protocol=1, generation=1)
NEWER = pb.RequestHeader(job="default", protocol=2, generation=1)
PLAIN = pb.RequestHeader(job="default", protocol=1, generation=1)


def _control(b: Bench, method: str, request: Any, header: pb.RequestHeader = PLAIN) -> Any:
    request.request.CopyFrom(header)
    return b._unary(b.control, replication_pb2_grpc.ServerControlStub, method, request)


def _membership(b: Bench, method: str, message: Any, header: pb.RequestHeader = PLAIN) -> Any:
    message.request.CopyFrom(header)
    return b.coordinator("Membership", method, message)


def _client(b: Bench, header: pb.RequestHeader = PLAIN, **changes: Any) -> Any:
    fields = {"incarnation": 5, "slot": "x/0", "role": "worker"}
    return _membership(b, "RegisterClient", co.RegisterClientRequest(**{**fields, **changes}), header)


def _host(b: Bench, header: pb.RequestHeader = PLAIN, **changes: Any) -> Any:
    request = co.RegisterHostRequest(**{"name": "host-9", "incarnation": 5, "slots": 1, **changes})
    return _membership(b, "RegisterHost", request, header)


def _second_host(b: Bench) -> Any:
    """Another process under a live supervisor's name."""
    name = f"host-{b.client.client_id}"
    _host(b, name=name)
    b.snapshot()
    return _host(b, name=name, incarnation=6)


def _fence(b: Bench, term: int = 99, header: pb.RequestHeader = PLAIN, clients: tuple[int, ...] = (12345,)) -> Any:
    return _control(b, "Fence", replication_pb2.FenceRequest(term=term, client_ids=clients), header)


def _evict(b: Bench, term: int = 99, client: int = 12345, header: pb.RequestHeader = PLAIN) -> Any:
    return _control(b, "Evict", replication_pb2.EvictRequest(term=term, client_id=client), header)


def _tensors(*shapes: list[int], dtype: int = pb.DTYPE_FLOAT32) -> list[pb.TensorSpec]:
    return [pb.TensorSpec(name=f"w{i}", shape=s, dtype=dtype) for i, s in enumerate(shapes)]


def _optimizer(name: str, *settings: pb.HyperParameter) -> pb.OptimizerSpec:
    return pb.OptimizerSpec(class_name=name, hyper_parameters=settings or [number("lr", 0.1)])


def _table(b: Bench, header: pb.RequestHeader) -> Any:
    request = co.CreateTableRequest(request=header, spec=b.table_spec())
    return b.coordinator("Catalog", "CreateTable", request)


def _evicted(b: Bench) -> Any:
    """A client that the coordinator itself has evicted."""
    host = f"host-{b.client.client_id}"
    _host(b, name=host)
    client = _client(b, slot=f"{host}/0", host=host, host_incarnation=5, incarnation=77).client_id
    report = co.ReportExitRequest(
        kind=co.NODE_KIND_CLIENT, name=host, incarnation=5, slot=f"{host}/0", exit_code=-9
    )  # fmt: skip
    _membership(b, "ReportExit", report)
    b.settle()
    b.snapshot()
    return _table(b, pb.RequestHeader(job="default", protocol=1, generation=1, client_id=client))


CONTROL_ROWS = [
    Row(37, "fence of a lower term", "STALE_TERM", lambda b: _fence(b, term=1)),
    Row(37, "evict of a lower term", "STALE_TERM", lambda b: _evict(b, term=1)),
    Row(30, "fence without a term", "MISSING_FIELD", lambda b: _fence(b, term=0)),
    Row(30, "evict without a term", "MISSING_FIELD", lambda b: _evict(b, term=0)),
    Row(30, "fence of somebody and of nobody", "MISSING_FIELD",
        lambda b: _fence(b, term=b.client.routes.map.term, clients=(7_000_001, 0))),
    Row(30, "evict of nobody", "MISSING_FIELD", lambda b: _evict(b, term=2, client=0)),
    Row(35, "fence for another job", "WRONG_CLUSTER", lambda b: _fence(b, header=FOREIGN)),
    Row(35, "evict for another job", "WRONG_CLUSTER", lambda b: _evict(b, header=FOREIGN)),
    Row(43, "a live server's name", "NODE_NAME", lambda b: b.register_server(name="server-0", address=b.control)),
    Row(43, "a live supervisor's name", "NODE_NAME", _second_host),
    Row(30, "incarnation 0", "INCARNATION", lambda b: b.register_server(incarnation=0)),
    Row(30, "a client with incarnation 0", "INCARNATION", lambda b: _client(b, incarnation=0)),
    Row(30, "a supervisor with incarnation 0", "INCARNATION", lambda b: _host(b, incarnation=0)),
    Row(30, "an exit report of no kind", "MISSING_FIELD",
        lambda b: _membership(b, "ReportExit", co.ReportExitRequest(name="server-0", incarnation=1))),
    Row(30, "a goodbye of no kind", "MISSING_FIELD", lambda b: _membership(b, "Deregister", co.DeregisterRequest())),
    Row(44, "an address nobody listens on", "ADDRESS", lambda b: b.register_server(address="127.0.0.1:1")),
    Row(44, "an address that is none", "ADDRESS", lambda b: b.register_server(address="nowhere")),
    Row(44, "port 0", "ADDRESS", lambda b: b.register_server(address="127.0.0.1:0")),
    Row(44, "port 70000", "ADDRESS", lambda b: b.register_server(control_address="127.0.0.1:70000")),
    Row(44, "an address of any interface", "ADDRESS", lambda b: b.register_server(address="0.0.0.0:7071")),
    Row(45, "a server of another protocol", "VERSION", lambda b: b.register_server(request=NEWER)),
    Row(45, "a supervisor of another protocol", "VERSION", lambda b: _host(b, NEWER)),
    Row(45, "a client of another protocol", "VERSION", lambda b: _client(b, NEWER)),
    Row(35, "a server of another job", "WRONG_CLUSTER", lambda b: b.register_server(request=FOREIGN)),
    Row(35, "a supervisor of another job", "WRONG_CLUSTER", lambda b: _host(b, FOREIGN)),
    Row(35, "a client of another job", "WRONG_CLUSTER", lambda b: _client(b, FOREIGN)),
    Row(35, "a table of another job", "WRONG_CLUSTER", lambda b: _table(b, FOREIGN)),
    Row(36, "a table of generation 0", "OLD_GENERATION",
        lambda b: _table(b, pb.RequestHeader(job="default", protocol=1))),
    Row(41, "a table by an evicted client", "CLIENT_FENCED", _evicted),
    Row(42, "a client of an unknown supervisor", "UNKNOWN_NODE",
        lambda b: _client(b, host="nobody", host_incarnation=4)),
    Row(46, "the same table with another schema", "SCHEMA", lambda b: b.create_table(name="t")),
    Row(47, "10^18 elements", "QUOTA", lambda b: b.create_table(tensors=_tensors([10**12, 10**6]))),
    Row(47, "more bytes than the job's limit", "QUOTA",
        lambda b: b.create_table(tensors=_tensors([1 << 39], [1 << 39]))),
    Row(47, "more partitions than the job's limit", "QUOTA",
        lambda b: b.create_table(tensors=_tensors([1 << 30]), partition_bytes=512)),
    Row(47, "partitions of a byte", "QUOTA", lambda b: b.create_table(partition_bytes=1)),
    Row(8, "a negative dimension", "SHAPE", lambda b: b.create_table(tensors=_tensors([3, -4]))),
    Row(8, "a dimension of 2^63 - 1", "SHAPE", lambda b: b.create_table(tensors=_tensors([2**63 - 1, 2]))),
    Row(8, "dimensions that overflow", "SHAPE", lambda b: b.create_table(tensors=_tensors([2**62, 8]))),
    Row(8, "dimensions that overflow to 0", "SHAPE", lambda b: b.create_table(tensors=_tensors([2**32, 2**32]))),
    Row(9, "an empty tensor", "SHAPE", lambda b: b.create_table(tensors=_tensors([0, 5]))),
    Row(9, "a table without tensors", "MISSING_FIELD", lambda b: b.create_table(tensors=[])),
    Row(4, "dtype 0", "DTYPE", lambda b: b.create_table(tensors=_tensors([4], dtype=pb.DTYPE_UNSPECIFIED))),
    Row(4, "unknown dtype", "DTYPE", lambda b: b.create_table(tensors=_tensors([4], dtype=77))),
    Row(48, "an unknown optimizer", "UNSUPPORTED_OPTIMIZER",
        lambda b: b.create_table(optimizer=_optimizer("Adafactor"))),
    Row(48, "no optimizer", "MISSING_FIELD", lambda b: b.create_table(optimizer=_optimizer(""))),
    Row(49, "an optimizer by path", "UNSUPPORTED_OPTIMIZER",
        lambda b: b.create_table(optimizer=_optimizer("os.system"))),
    *[Row(31, f"table name {i}", "NAME", lambda b, name=name: b.create_table(name=name))
      for i, name in enumerate(NAMES)],
    *[Row(31, f"table group {i}", "NAME", lambda b, name=name: b.create_table(group=name))
      for i, name in enumerate(NAMES)],
    *[Row(31, f"server name {i}", "NAME", lambda b, name=name: b.register_server(name=name))
      for i, name in enumerate(NAMES)],
    *[Row(31, f"supervisor name {i}", "NAME", lambda b, name=name: _host(b, name=name))
      for i, name in enumerate(NAMES)],
    *[Row(31, f"slot {i}", "NAME", lambda b, name=name: _client(b, slot=name)) for i, name in enumerate(NAMES)],
    Row(31, "tensor name with a newline", "NAME",
        lambda b: b.create_table(tensors=[pb.TensorSpec(name="a\nb", shape=[1], dtype=pb.DTYPE_FLOAT32)])),
    Row(31, "two tensors of one name", "NAME",
        lambda b: b.create_table(tensors=[pb.TensorSpec(name="a", shape=[1], dtype=pb.DTYPE_FLOAT32)] * 2)),
]  # fmt: skip

SETTINGS = [
    ("SGD", {"lr": -1.0}), ("SGD", {"lr": math.nan}), ("SGD", {"lr": 0.1, "no_such_setting": 1.0}),
    ("SGD", {"lr": 0.1, "momentum": -0.5}), ("Adam", {"lr": 0.1, "eps": -1.0}),
    ("Adam", {"lr": 0.1, "weight_decay": -1.0}),
]  # fmt: skip
"""Row 48: settings of an optimizer that torch itself refuses. `lr=0` it takes, so servers do."""
