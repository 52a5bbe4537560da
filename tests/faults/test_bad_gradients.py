"""Rows 10 and 11 of the bad-input matrix: what comes after a NaN that was pushed to a live server, and other policies.

That they are refused and change nothing is in `bad_input_rows.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from paramesh import hyper, testing
from paramesh.client import Client
from paramesh.errors import ParameshError
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

from tests.faults.bad_input_rows import DATA_ROWS, Row, with_one
from tests.faults.bench import GRADIENT, Bench

ROWS = [row for row in DATA_ROWS if row.reason == "NON_FINITE"]


@pytest.fixture(scope="module")
def shared_bench() -> Iterator[Bench]:
    with testing.Cluster(servers=1, client_timeout=600.0, gather=0.0) as cluster:
        yield Bench(cluster)


@pytest.fixture
def bench(shared_bench: Bench) -> Bench:
    shared_bench.new_client()
    return shared_bench


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_a_table_of_the_default_policy_rejects_it_for_good(bench: Bench, row: Row) -> None:
    """The number is used up, a repetition hears the same, and the next update is applied."""
    (lsn, *_), values = bench.state()[bench.partition], bench.values()
    for _ in range(2):
        with pytest.raises(ParameshError) as refused:
            row.send(bench)
        assert refused.value.reason == row.reason
        assert refused.value.metadata.get("segment", "0") == "0"
        assert bench.values() == values
        assert bench.state()[bench.partition][0] == lsn + 1
    assert bench.push(sequenced=ps.SequenceKey(seq=2)).lsn == lsn + 2
    assert bench.values() != values


@pytest.mark.bad_input(10, got="staged")
def test_staging_takes_it(bench: Bench) -> None:
    """What is staged may never count: its worker judges, before it says that it is ready."""
    staged = ps.StagedKey(group=1, step=0, attempt=1)
    values = bench.values()
    assert not bench.push(with_one(math.nan), sequenced=None, staged=staged).duplicate
    assert bench.state()[bench.partition][2] >= len(GRADIENT)
    assert bench.values() == values


def small_table(bench: Bench, name: str, policy: pb.NonFinite.ValueType, dtype: torch.dtype) -> Client:
    """A table of ones, as a client that sets the schema's fields makes it; lr 1."""
    kind = pb.DType.Value(f"DTYPE_{str(dtype).removeprefix('torch.').upper()}")
    optimizer = pb.OptimizerSpec(class_name="SGD", hyper_parameters=hyper.to_protos({"lr": 1.0}))
    spec = pb.TableSpec(
        name=name, group=name, tensors=[pb.TensorSpec(name="w", shape=[3], dtype=kind)], optimizer=optimizer,
        non_finite=policy,
    )  # fmt: skip
    bench.cluster.call(bench.tool._client.create_table(spec))
    bench.tool.assign(name, {"w": torch.ones(3, dtype=dtype)}, first=True)
    return bench.tool


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.bad_input(11, got="NON_FINITE")
def test_what_overflows_in_the_cast_to_the_tables_dtype_is_rejected(bench: Bench, dtype: torch.dtype) -> None:
    """Row 11."""
    name = f"half-{dtype}"
    tool = small_table(bench, name, pb.NON_FINITE_UNSPECIFIED, dtype)
    large = torch.tensor([1.0, torch.finfo(torch.float32).max, 1.0])
    with pytest.raises(ParameshError) as refused:
        tool.push(name, {"w": large.to(dtype)})
    assert refused.value.reason == "NON_FINITE"
    tool.push(name, {"w": torch.ones(3, dtype=dtype)})
    assert tool.pull(name)["w"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.bad_input(10, got="skipped, counted")
def test_a_table_that_skips_goes_on_without_it(bench: Bench) -> None:
    tool = small_table(bench, "skips", pb.NON_FINITE_SKIP, torch.float32)
    for second in (1.0, math.nan, -math.inf, 1.0):
        tool.push("skips", {"w": torch.tensor([1.0, second, 1.0])})
    assert tool.pull("skips")["w"].tolist() == [-1.0, -1.0, -1.0]


@pytest.mark.bad_input(10, got="applied (allow)")
def test_a_table_that_allows_applies_it(bench: Bench) -> None:
    tool = small_table(bench, "allows", pb.NON_FINITE_ALLOW, torch.float32)
    tool.push("allows", {"w": torch.tensor([1.0, math.inf, 1.0])})
    assert tool.pull("allows")["w"].tolist() == [0.0, -math.inf, 0.0]


def test_a_policy_of_another_release_is_refused_at_the_table(bench: Bench) -> None:
    with pytest.raises(ParameshError) as refused:
        bench.create_table(name="newer", non_finite=77)
    assert refused.value.reason == "UNIMPLEMENTED"


def test_a_table_exists_under_one_policy(bench: Bench) -> None:
    small_table(bench, "settled", pb.NON_FINITE_SKIP, torch.float32)
    with pytest.raises(ParameshError, match="non_finite skip there, allow here") as refused:
        small_table(bench, "settled", pb.NON_FINITE_ALLOW, torch.float32)
    assert refused.value.reason == "SCHEMA"
