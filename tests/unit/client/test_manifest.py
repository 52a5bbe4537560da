"""Manifests and partitions' files are read strictly: whatever the bytes, a typed error or the truth."""

import base64
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh import manifest, partition_file
from paramesh.archive import ClusterManifest, GroupEntry, PartitionEntry, TableRecord
from paramesh.errors import ParameshError
from paramesh.manifest import Entry
from paramesh.partition_file import Part
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

SPEC = pb.TableSpec(
    name="g/0",
    group="g",
    tensors=[pb.TensorSpec(name="w", shape=[4], dtype=pb.DTYPE_FLOAT32)],
    optimizer=pb.OptimizerSpec(class_name="SGD"),
)
HEX = "ab" * 32

GOOD = ClusterManifest(
    name="c",
    number=7,
    level="step",
    job="j",
    generation=2,
    term=3,
    created_at_ms=1,
    periodic=True,
    next_client=5,
    next_table=2,
    next_partition=2,
    tables=(TableRecord(1, "g/0", "g", 1, 1, SPEC.SerializeToString()),),
    partitions=(
        PartitionEntry(0, 0, 0, 0, 1, 9, 0, 0, "ledger.bin"),
        PartitionEntry(1, 1, 0, 256, 1, 4, 3, 1, "partition-1.safetensors"),
    ),
    groups=(GroupEntry(1, "g", True, 3),),
    workers=("paramesh:cut:shared",),
    files={name: Entry(1, HEX) for name in ("ledger.bin", "partition-1.safetensors", "worker-0.bin")},
)


def document():
    listed = {name: {"bytes": e.bytes, "sha256": e.sha256} for name, e in GOOD.files.items()}
    return json.loads(manifest.encode({**GOOD.document(), "files": listed}))


def read(value):
    return ClusterManifest.read(manifest.parse(json.dumps(value).encode(), "here"), "here")


def test_what_was_written_is_read():
    assert read(document()) == GOOD


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "comes twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "out of range"),
        ("[" * 100_000, "deep"),
        ('{"a":' * 300 + "1" + "}" * 300, "deep"),
        ("[1]", "not an object"),
        ("", "Expecting"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("\ufeff{}", "BOM"),
    ],
)
@pytest.mark.bad_input(59, got="FORMAT")
def test_hostile_json_is_refused(text, said):
    with pytest.raises(ParameshError, match=said) as caught:
        manifest.parse(text.encode(), "here")
    assert caught.value.reason == "FORMAT"


@pytest.mark.bad_input(59, got="FORMAT")
def test_no_utf8_and_too_much_are_refused():
    for data in (b"\xff\xfe{}", b" " * (manifest.MAX_BYTES + 1)):
        with pytest.raises(ParameshError) as caught:
            manifest.parse(data, "here")
        assert caught.value.reason == "FORMAT"


def spoil(path, value):
    made = document()
    at = made
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["format"], 2, "VERSION"),
        (["format"], "1", "FORMAT"),
        (["kind"], "other", "FORMAT"),
        (["kind"], ..., "FORMAT"),
        (["number"], True, "FORMAT"),
        (["number"], -1, "FORMAT"),
        (["number"], 1.0, "FORMAT"),
        (["number"], 1 << 70, "FORMAT"),
        (["generation"], 0, "FORMAT"),
        (["level"], "exact", "FORMAT"),
        (["periodic"], 1, "FORMAT"),
        (["extra"], 1, "FORMAT"),
        (["tables", 0, "spec"], "%%", "FORMAT"),
        (["tables", 0, "partition_count"], 2, "FORMAT"),
        (["tables", 0, "partition_count"], 1 << 31, "FORMAT"),
        (["tables"], {}, "FORMAT"),
        (["partitions", 0, "partition"], 1, "FORMAT"),
        (["partitions", 1, "file"], "ledger.bin", "FORMAT"),
        (["partitions", 1, "file"], "../ledger.bin", "FORMAT"),
        (["partitions", 1, "index"], 1, "FORMAT"),
        (["partitions", 1], 3, "FORMAT"),
        (["next_partition"], 1, "FORMAT"),
        (["workers"], ["a", "b"], "FORMAT"),
        (["workers"], [1], "FORMAT"),
        (["files", "ledger.bin"], ..., "FORMAT"),
        (["files", "ledger.bin", "bytes"], -1, "FORMAT"),
        (["files", "ledger.bin", "sha256"], "AB" * 32, "FORMAT"),
        (["files", "a/b"], {"bytes": 1, "sha256": HEX}, "FORMAT"),
        (["files", ".."], {"bytes": 1, "sha256": HEX}, "FORMAT"),
        (["files"], [], "FORMAT"),
    ],
)
@pytest.mark.bad_input(59, got="typed refusal")
def test_what_does_not_fit_is_refused(path, value, reason):
    with pytest.raises(ParameshError) as caught:
        read(spoil(path, value))
    assert caught.value.reason == reason


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused(data):
    path = data.draw(st.sampled_from([p for p in places(document()) if p]))
    spoiled = spoil(list(path), data.draw(JSON))
    try:
        made = read(spoiled)
    except ParameshError:
        return
    assert {p.partition for p in made.partitions} == {0, 1}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
@pytest.mark.bad_input(59, got="typed refusal")
def test_any_bytes_are_refused_by_type(data):
    for act in (lambda: manifest.parse(data, "x"), lambda: partition_file.read(data, "x")):
        try:
            act()
        except ParameshError:
            pass


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0", "-rf", "ä", "a" * 101, "a b"])
def test_names_that_are_paths_are_refused(name):
    with pytest.raises(ParameshError) as caught:
        manifest.check_name(name)
    assert caught.value.reason == "PATH"


# ---------------------------------------------------------------------- partitions' files


def stored():
    state = rp.ReplicaState(lsn=4, applied_step=3, trained=True, init_attempt=1)
    parts = [
        Part("", 0, False, bytes(range(256))),
        Part("exp_avg", 0, False, b"\1" * 16),
        Part("step", 0, True, b"\0" * 8),
    ]
    return state, parts, b"".join(bytes(c) for c in partition_file.chunks(partition_file.metadata_of(1, state), parts))


def test_a_partition_comes_back_and_others_can_read_it(tmp_path):
    import safetensors.torch

    state, parts, data = stored()
    metadata, back = partition_file.read(data, "x")
    assert partition_file.state_of(metadata, 1, "x") == state
    assert {(p.slot, p.segment, p.scalar, bytes(p.data)) for p in back} == {dataclasses.astuple(p) for p in parts}
    (tmp_path / "p.safetensors").write_bytes(data)
    tensors = safetensors.torch.load_file(tmp_path / "p.safetensors")
    assert tensors.keys() == {"values", "state/0/exp_avg", "scalar/0/step"}
    assert bytes(tensors["values"].numpy()) == bytes(range(256))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255), st.booleans())
@pytest.mark.bad_input(60, got="DAMAGED")
def test_a_spoilt_partition_is_refused_or_still_whole(at, change, cut):
    _, _, data = stored()
    at %= len(data)
    spoilt = data[:at] if cut else data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]
    try:
        metadata, parts = partition_file.read(spoilt, "x")
        partition_file.state_of(metadata, 1, "x")
    except ParameshError as error:
        told = error.reason
    else:
        told = "whole" if sum(not p.slot for p in parts) == 1 else "torn"
    assert told in ("DAMAGED", "VERSION", "whole")


@pytest.mark.parametrize(
    "header",
    [
        {"values": {"dtype": "U8", "shape": [8], "data_offsets": [0, 9]}},
        {"values": {"dtype": "U8", "shape": [4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}},
        {"values": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {
            "values": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "state/0/x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        },
        {"scalar/0/x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}},
        {},
    ],
)
@pytest.mark.bad_input(60, got="DAMAGED")
def test_safetensors_that_lie_are_refused(header):
    header["__metadata__"] = {"paramesh": "1"}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + b"\0" * 8
    with pytest.raises(ParameshError) as caught:
        partition_file.read(data, "x")
    assert caught.value.reason == "DAMAGED"


@pytest.mark.bad_input(60, got="DAMAGED")
def test_a_huge_header_is_refused():
    with pytest.raises(ParameshError) as caught:
        partition_file.read((1 << 63).to_bytes(8, "little") + b"{}", "x")
    assert caught.value.reason == "DAMAGED"


def test_another_partitions_file_is_refused():
    metadata, _ = partition_file.read(stored()[2], "x")
    for spoilt in (
        metadata | {"partition": "2"},
        metadata | {"state": "%"},
        metadata | {"state": base64.b64encode(b"\xff").decode()},
    ):
        with pytest.raises(ParameshError) as caught:
            partition_file.state_of(spoilt, 1, "x")
        assert caught.value.reason == "DAMAGED"
