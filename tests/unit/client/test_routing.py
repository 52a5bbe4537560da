"""Cuts: deterministic, even by bytes, aligned, complete; refusals name the field."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh.errors import ParameshError, PartitionOffline
from paramesh.routing import ALIGN, ALIGN_BYTES, DTYPE_SIZE, Routes, cut, schema_digest, storage_elements, validate_spec
from paramesh.v1 import types_pb2 as pb


def spec(*tensors: tuple[list[int], int], partition_bytes: int = 0, name: str = "t") -> pb.TableSpec:
    return pb.TableSpec(
        name=name,
        group="g",
        tensors=[pb.TensorSpec(name=f"w{i}", shape=s, dtype=d) for i, (s, d) in enumerate(tensors)],
        optimizer=pb.OptimizerSpec(class_name="SGD"),
        partition_bytes=partition_bytes,
    )


dtypes = st.sampled_from([pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT64, pb.DTYPE_BFLOAT16, pb.DTYPE_COMPLEX64])
tensors = st.lists(st.tuples(st.lists(st.integers(1, 40), max_size=3), dtypes), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(tensors, st.integers(512, 40_000))
def test_every_element_lies_in_exactly_one_segment(shapes, partition_bytes):
    table = spec(*shapes, partition_bytes=partition_bytes)
    layouts = cut(table)
    covered: dict[int, int] = {}
    for index, layout in enumerate(layouts):
        assert layout.index == index
        end = 0
        for segment in layout.segments:
            assert segment.offset % ALIGN_BYTES == 0
            assert segment.offset >= end, "segments overlap"
            assert segment.start % ALIGN == 0, "cuts fall on multiples of 64 elements"
            assert segment.start == covered.get(segment.tensor, 0), "in order, without holes"
            covered[segment.tensor] = segment.start + segment.length
            end = segment.offset + segment.length * DTYPE_SIZE[segment.dtype]
        assert end <= layout.nbytes
    assert covered == {i: storage_elements(t) for i, t in enumerate(table.tensors)}


@settings(max_examples=200, deadline=None)
@given(tensors, st.integers(4096, 40_000))
def test_partitions_are_even_by_bytes(shapes, partition_bytes):
    layouts = cut(spec(*shapes, partition_bytes=partition_bytes))
    sizes = [sum(s.length * DTYPE_SIZE[s.dtype] for s in x.segments) for x in layouts]
    slack = 2 * ALIGN * 8  # a cut moves to the next multiple of 64 elements
    assert all(size <= partition_bytes + slack for size in sizes)
    assert max(sizes) - min(sizes[:-1] or sizes) <= slack


def test_one_huge_tensor_spans_partitions_and_tiny_ones_share_one():
    assert len(cut(spec(([16 << 20], pb.DTYPE_FLOAT32)))) == 2  # 64 MiB at 32 MiB each
    assert len(cut(spec(*[([3], pb.DTYPE_FLOAT32)] * 100))) == 1


def test_complex_counts_as_real_pairs():
    assert storage_elements(pb.TensorSpec(name="z", shape=[3], dtype=pb.DTYPE_COMPLEX64)) == 6


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (spec(([2], pb.DTYPE_FLOAT32), name="a\nb"), "NAME"),
        (spec(([2], pb.DTYPE_FLOAT32), name="../etc"), "NAME"),
        (spec(([2], pb.DTYPE_FLOAT32), name="x" * 257), "NAME"),
        (spec(([2], pb.DTYPE_FLOAT32), name="émoji"), "NAME"),
        (spec(([-1], pb.DTYPE_FLOAT32)), "SHAPE"),
        (spec(([0, 3], pb.DTYPE_FLOAT32)), "SHAPE"),
        (spec(([2**62, 2**62], pb.DTYPE_FLOAT32)), "SHAPE"),
        (spec(([2], 0)), "DTYPE"),
        (spec(([2], 99)), "DTYPE"),
        (spec(), "MISSING_FIELD"),
        (spec(([2], pb.DTYPE_FLOAT32), partition_bytes=1), "QUOTA"),
    ],
)
def test_bad_schemas_are_refused_by_reason(table, reason):
    with pytest.raises(ParameshError) as caught:
        validate_spec(table)
    assert caught.value.reason == reason


def test_digest_depends_on_what_must_be_equal_and_on_nothing_else():
    a, b = spec(([2], pb.DTYPE_FLOAT32)), spec(([2], pb.DTYPE_FLOAT32))
    b.replicas = 3
    b.optimizer.hyper_parameters.add(name="lr", number=0.5)
    assert schema_digest(a) == schema_digest(b)
    b.tensors[0].shape[0] = 3
    assert schema_digest(a) != schema_digest(b)


def test_the_policy_for_nan_is_in_the_digest_and_its_default_keeps_older_ones():
    a, b = spec(([2], pb.DTYPE_FLOAT32)), spec(([2], pb.DTYPE_FLOAT32))
    assert schema_digest(a).hex() == "98904bbc873242b6f39830c40f80e0f8206f7d3f88bc20be653cb5d7b1a1b0c2"
    digests = set()
    for policy in pb.NonFinite.values():
        b.non_finite = policy
        validate_spec(b)
        digests.add(schema_digest(b))
    assert len(digests) == 3
    assert schema_digest(a) in digests


def test_an_unknown_policy_for_nan_is_refused():
    unknown = spec(([2], pb.DTYPE_FLOAT32))
    unknown.MergeFromString(b"\x38\x4d")  # non_finite = 77
    with pytest.raises(ParameshError) as caught:
        validate_spec(unknown)
    assert caught.value.reason == "UNIMPLEMENTED"


def test_a_lost_server_is_named_with_the_remedy():
    ref = pb.ReplicaRef(node="ps-1", incarnation=7)
    routes = Routes(
        pb.PartitionMap(
            version=3,
            nodes=[pb.Node(ref=ref, address="h:1", state=pb.NODE_STATE_DEAD, reason="exited with code -9")],
            tables=[pb.TableEntry(table_id=1, name="g0/0", first_partition=1, partition_count=1)],
            partitions=[pb.Partition(id=1, table_id=1, epoch=1, primary=ref, state=pb.PARTITION_STATE_OFFLINE)],
        )
    )
    with pytest.raises(PartitionOffline, match=r"'ps-1' is lost \(exited with code -9\).*checkpoint"):
        routes.primary(1)
