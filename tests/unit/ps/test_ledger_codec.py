"""The ledger's records and state as bytes: round trips, equal bytes, and what else comes is FORMAT."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import time
import types
import typing
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh.errors import ParameshError
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import types_pb2 as t
from paramesh_server.ledger import Ledger, Record
from paramesh_server.ledger_codec import (
    RECORD_VERSION,
    STATE_VERSION,
    TAGS,
    LedgerState,
    decode_record,
    decode_state,
    encode_record,
    encode_state,
    shape,
)
from paramesh_server.ledger_coding import INT_LIMIT, Reader, coder_of, write_integer
from paramesh_server.ledger_deal import Deal
from paramesh_server.ledger_log import KINDS, StatePut, StepDecided

from tests.unit.ps.ledger_world import World, setting
from tests.unit.ps.test_ledger_members import refused

# ------------------------------------------------------------------ any value of a declared type

SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_DOUBLE: st.floats(allow_nan=False),
    FieldDescriptor.TYPE_FLOAT: st.floats(allow_nan=False, width=32),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: st.text(max_size=5),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=5),
    FieldDescriptor.TYPE_ENUM: st.integers(0, 3),
}


def messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Any message of a type; at most one field of a oneof."""

    @st.composite
    def draw_message(draw: st.DrawFn) -> Message:
        values: dict[str, Any] = {}
        taken: set[str] = set()
        for field in kind.DESCRIPTOR.fields:
            group = field.containing_oneof
            if not draw(st.booleans()) or (group is not None and group.name in taken):
                continue
            if group is not None:
                taken.add(group.name)
            nested = field.message_type
            one = messages(nested._concrete_class) if nested is not None else SCALARS[field.type]
            values[field.name] = draw(st.lists(one, max_size=3) if field.is_repeated else one)
        return kind(**values)

    return draw_message()


@st.composite
def deals(draw: st.DrawFn) -> Deal:
    begins = sorted(draw(st.sets(st.integers(0, 30), max_size=6)))
    runs = [(4 * begin, 4 * begin + draw(st.integers(1, 3))) for begin in begins]
    deal = Deal(runs, draw(st.integers(1, 4)))
    for position in range(deal.ways):
        deal.take(position, draw(st.integers(0, 9)))
    return deal


PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(0, 2**64),
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=8),
    bytes: st.binary(max_size=8),
    Deal: deals(),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a declared type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind]
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, args))
    if origin is list:
        return st.lists(values(args[0]), max_size=4)
    if origin is set:
        return st.sets(values(args[0]), max_size=4)
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if origin is types.UnionType:
        return st.none() | values(args[0])
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{field.name: values(hints[field.name]) for field in dataclasses.fields(kind)})
    return messages(kind)


records = st.integers(1, 2**64).flatmap(
    lambda lsn: st.sampled_from(sorted(TAGS.values(), key=lambda body: body.__name__)).flatmap(
        lambda body: values(body).map(lambda made: Record(lsn, KINDS[body], made))
    )
)
states = values(LedgerState)


def plain(value: Any) -> Any:
    """As `==` compares it: a Deal by what it holds."""
    if isinstance(value, Deal):
        return (value.runs, value.taken, value.left, value.size, value.ways)
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value), *(plain(getattr(value, field.name)) for field in dataclasses.fields(value))]
    return value


def mixed(value: Any) -> Any:
    """An equal value whose dicts and sets were filled the other way round."""
    if isinstance(value, dict):
        return {key: mixed(value[key]) for key in reversed(list(value))}
    if isinstance(value, set):
        return set(sorted(value, reverse=True))  # noqa: C414 (the order is the point)
    if isinstance(value, list | tuple):
        return type(value)(mixed(one) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: mixed(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


# ------------------------------------------------------------------ round trips


def test_every_body_has_a_number_and_a_kind() -> None:
    assert set(TAGS.values()) == set(KINDS)
    assert len(set(TAGS.values())) == len(TAGS)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(record=records)
def test_a_record_is_what_it_was(record: Record) -> None:
    data = encode_record(record)
    read = decode_record(data)
    assert read == record
    assert encode_record(read) == data


@settings(max_examples=40, deadline=None, derandomize=True)
@given(state=states)
def test_a_state_is_what_it_was_and_equal_states_are_equal_bytes(state: LedgerState) -> None:
    data = encode_state(state)
    read = decode_state(data)
    assert plain(read) == plain(state)
    assert encode_state(read) == data
    assert encode_state(mixed(state)) == data


def test_numbers_keep_their_bits() -> None:
    odd = struct.unpack("<d", b"\x01\x00\x00\x00\x00\x00\xf8\x7f")[0]  # a NaN with a payload
    coder = coder_of(tuple[float, ...])
    out = bytearray()
    coder.write(out, (odd, -0.0, 5e-324, float("inf")))
    read = coder.read(Reader(bytes(out)))
    assert struct.pack("<4d", *read) == struct.pack("<4d", odd, -0.0, 5e-324, float("inf"))


# ------------------------------------------------------------------ what else comes


@settings(max_examples=500, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200), tag=st.sampled_from([0, 255, *TAGS]))
def test_any_bytes_are_a_record_or_format(data: bytes, tag: int) -> None:
    """Invariant 28: bytes are never more than values, and nothing but the typed error is raised."""
    for raw in (data, bytes((RECORD_VERSION, tag)) + data):
        try:
            record = decode_record(raw)
        except ParameshError as error:
            assert error.reason == "FORMAT"  # noqa: PT017
        else:
            decode_record(encode_record(record))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(state=states, data=st.data())
def test_damaged_states_are_states_or_format(state: LedgerState, data: st.DataObject) -> None:
    raw = bytearray(encode_state(state))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_state(bytes(raw))
    except ParameshError as error:
        assert error.reason == "FORMAT"  # noqa: PT017


@settings(max_examples=50, deadline=None, derandomize=True)
@given(record=records)
def test_a_record_that_is_cut_or_longer_is_format(record: Record) -> None:
    data = encode_record(record)
    for end in range(len(data)):
        with refused("FORMAT"):
            decode_record(data[:end])
    with refused("FORMAT"):
        decode_record(data + b"\x00")


def integer(value: int) -> bytes:
    out = bytearray()
    write_integer(out, value)
    return bytes(out)


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (list[int], integer(INT_LIMIT - 1)),  # a length that nothing follows
        (bytes, integer(1 << 60) + b"x"),
        (tuple[float, ...], integer(3) + bytes(8)),
        (int, b"\x80\x00"),  # not the shortest form
        (int, b"\xff" * 11),
        (bool, b"\x02"),
        (str, b"\x01\xff"),
        (set[int], b"\x02\x05\x05"),
        (dict[int, int], b"\x02\x05\x00\x04\x00"),
        (Deal, b"\x00\x00"),  # no position
        (Deal, b"\x01\x00\x02\x01\x03"),  # three of two chunks taken
        (Deal, b"\x02\x00\x02\x01\x03\x01\x00"),  # runs overlap
        (Deal, b"\x01\x02\x02\x01\x00"),  # an empty run
        (t.StepRecord, b"\x02\x0a\x05"),
    ],
)
def test_what_writing_never_makes_is_format(kind: Any, raw: bytes) -> None:
    with refused("FORMAT"):
        coder_of(kind).read(Reader(raw))


def test_other_versions_are_format() -> None:
    record = bytearray(encode_record(Record(1, KINDS[StatePut], StatePut("k", 1, b"v"))))
    state = bytearray(encode_state(LedgerState()))
    record[0], state[0] = RECORD_VERSION + 1, STATE_VERSION + 1
    with refused("FORMAT"):
        decode_record(bytes(record))
    with refused("FORMAT"):
        decode_state(bytes(state))


def test_a_type_outside_the_list_has_no_coding() -> None:
    for kind in (object, complex, dict, list[object], int | str):
        with pytest.raises(TypeError):
            coder_of(kind)
    with pytest.raises(ValueError, match="not a count"):
        write_integer(bytearray(), -1)


def test_what_is_written_changes_only_with_a_new_version() -> None:
    """If this fails: raise RECORD_VERSION or STATE_VERSION with the change, then put the new hash here."""
    known = {(1, 1): "350cad725813d9e3"}
    assert known[RECORD_VERSION, STATE_VERSION] == hashlib.sha256(shape().encode()).hexdigest()[:16]


# ------------------------------------------------------------------ size and speed


def big_step() -> Record:
    clients = range(1, 65)
    record = t.StepRecord(
        group=1,
        step=100_000,
        contributors=[t.Contributor(client_id=c, rank=c - 1, weight=64.0, attempt=1) for c in clients],
        loss_reduction=t.LOSS_REDUCTION_MEAN,
    )
    ranges = [(c, (t.SampleRange(dataset="d", epoch=3, begin=64 * c, end=64 * c + 64),)) for c in clients]
    body = StepDecided(record, tuple(ranges), ((1, (setting("lr", 0.1),)),), False, 99_936)
    return Record(1_000_000, KINDS[StepDecided], body)


def test_a_step_of_64_contributors_is_small() -> None:
    """40 bytes for each: what it names, and its samples."""
    assert len(encode_record(big_step())) < 64 * 40


@pytest.mark.soak
def test_a_step_of_64_contributors_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what it takes; well under a millisecond on anything current."""
    record = big_step()
    data = encode_record(record)
    for what, act in (("encode", lambda: encode_record(record)), ("decode", lambda: decode_record(data))):
        start = time.perf_counter()
        for _ in range(1000):
            act()
        with capsys.disabled():
            print(f"{what} {len(data)} bytes: {(time.perf_counter() - start) * 1000:.0f} us")


# ------------------------------------------------------------------ capture, install


def busy_world() -> World:
    """A ledger that has something of everything."""
    world = World()
    world.workers(2, max_grad_norm=1.0)
    world.await_init(1)
    world.commit_init(1, 1)
    leases = [world.leased(client, call=1) for client in (1, 2)]
    world.waits(1, 0, samples=leases[0], hyper_parameters=[setting("lr", 0.1)])
    world.decided(2, 0, samples=leases[1], hyper_parameters=[setting("lr", 0.2)])
    world.clip(1, 0, {1: 2.0, 2: 3.0})
    world.leased(1, call=2, delivered=leases[0])
    world.gather(1, 0, [1.0])
    world.gather(2, 0, [2.0])
    put = lg.PutStateRequest(request=t.RequestHeader(client_id=1), key="k", version=3, value=b"v")
    world.do(lambda now: world.ledger.put_state(put, now))
    world.evict(2)
    return world


def test_an_installed_ledger_is_the_captured_one() -> None:
    world = busy_world()
    fresh = Ledger(t.JobConfig())
    fresh.install(world.ledger.capture())
    assert fresh.following
    assert fresh.lsn == world.ledger.lsn
    assert fresh.state_digest() == world.ledger.state_digest()
    assert fresh.capture() == world.ledger.capture()


def test_an_installed_ledger_shares_nothing_with_the_captured_one() -> None:
    world = busy_world()
    fresh = Ledger(t.JobConfig())
    fresh.install(world.ledger.capture())
    before = fresh.state_digest()
    world.decided(1, 1)
    world.leased(1, call=3)
    world.evict(1)
    assert fresh.state_digest() == before


def test_a_state_is_installed_on_a_fresh_ledger_only_and_whole_or_not_at_all() -> None:
    world = busy_world()
    with pytest.raises(ValueError, match="fresh"):
        world.ledger.install(world.ledger.capture())
    fresh = Ledger(t.JobConfig())
    empty = fresh.state_digest()
    with refused("FORMAT"):
        fresh.install(world.ledger.capture()[:-1])
    assert (fresh.lsn, fresh.state_digest()) == (0, empty)
