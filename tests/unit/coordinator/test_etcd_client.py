"""What is told of etcd before it is asked."""

from __future__ import annotations

import pytest
from paramesh.errors import ConfigError
from paramesh_coordinator.store.etcd_client import nested, past
from paramesh_coordinator.store.etcd_target import EtcdTarget
from paramesh_coordinator.store.etcdv3 import etcd_pb2 as pb


@pytest.mark.parametrize(
    ("text", "endpoints", "prefix"),
    [
        ("etcd://h:2379/p", ("h:2379",), "p"),
        ("etcd://a:1,b:2, c:3/paramesh/run-7/", ("a:1", "b:2", "c:3"), "paramesh/run-7"),
    ],
)
def test_a_target_names_members_and_a_prefix(text: str, endpoints: tuple[str, ...], prefix: str) -> None:
    assert EtcdTarget.parse(text) == EtcdTarget(endpoints, prefix)


@pytest.mark.parametrize(
    "text",
    [
        "etcd://", "etcd://h:2379", "etcd://h:2379/", "etcd:///p", "etcd://h/p", "etcd://h:0/p", "etcd://h:70000/p",
        "etcd://a:1,/p", "etcd://me:secret@h:2379/p", "etcd://h:2379/a b", "etcd://h:2379/a//b", "http://h:2379/p",
        "etcd://h:2379/p/rows", "etcd://h:2379/" + "p" * 257,
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="state: ") as caught:
        EtcdTarget.parse(text)
    assert caught.value.metadata["key"] == "state"


def test_past_is_the_first_key_behind_a_prefix() -> None:
    assert past(b"a/") == b"a0"


@pytest.mark.parametrize("count", [0, 1, 128, 129, 4096, 4097, 74_000])
def test_nested_transactions_keep_every_operation_in_order(count: int) -> None:
    ops = [pb.RequestOp(request_put=pb.PutRequest(key=b"%d" % n)) for n in range(count)]

    def flat(some: list[pb.RequestOp], budget: int) -> list[bytes]:
        assert len(some) <= budget, "as etcd's checkTxnRequest counts"
        keys: list[bytes] = []
        for op in some:
            inner = list(op.request_txn.success)
            keys += flat(inner, budget - len(some)) if op.HasField("request_txn") else [op.request_put.key]
        return keys

    assert flat(nested(ops), 128) == [op.request_put.key for op in ops]
