"""Frames are protobuf: written without it, read by it, and the other way round.

Also the golden bytes: a hot message's wire form may never change by accident. If one of
these fails, a running cluster cannot be upgraded process by process: add a field with a
new number instead.
"""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh import framing
from paramesh.errors import ParameshError
from paramesh.v1 import coordinator_pb2, ledger_pb2, parameter_server_pb2, types_pb2

REQUEST = types_pb2.RequestHeader(job="job", generation=1, client_id=7, protocol=1)
FRAME = types_pb2.Frame(
    offset=128, length=8, codec=types_pb2.CODEC_NONE, checksum_kind=types_pb2.CHECKSUM_KIND_CRC32C,
    checksum=0xDEADBEEF, last=True,
)  # fmt: skip
RECORD = types_pb2.StepRecord(
    group=1, step=2, loss_reduction=types_pb2.LOSS_REDUCTION_MEAN,
    contributors=[types_pb2.Contributor(client_id=7, rank=0, weight=64.0, attempt=1)],
)  # fmt: skip
PAYLOAD = bytes(range(8))

FRAMED: list[tuple[type[Message], Message]] = [
    (
        parameter_server_pb2.PushRequest,
        parameter_server_pb2.PushHeader(
            request=REQUEST, partition=3, epoch=1, frame=FRAME, presence=b"\x05", committed=[RECORD],
            staged=parameter_server_pb2.StagedKey(group=1, step=2, attempt=1),
        ),
    ),
    (
        parameter_server_pb2.PullResponse,
        parameter_server_pb2.PullHeader(partition=3, epoch=1, lsn=9, applied_step=2, frame=FRAME),
    ),
    (
        parameter_server_pb2.AssignRequest,
        parameter_server_pb2.AssignHeader(
            request=REQUEST, partition=3, epoch=1, frame=FRAME, slot="exp_avg", assign_id=1
        ),
    ),
    (
        parameter_server_pb2.SnapshotResponse,
        parameter_server_pb2.SnapshotHeader(partition=3, epoch=1, lsn=9, frame=FRAME, slot="exp_avg"),
    ),
]  # fmt: skip
FRAMED_IDS = [message.__name__ for message, _ in FRAMED]


@pytest.mark.parametrize(("message_type", "header"), FRAMED, ids=FRAMED_IDS)
class TestFramesAreProtobuf:
    def test_a_standard_parser_reads_our_bytes(self, message_type, header):
        parsed = message_type.FromString(framing.encode(header, [PAYLOAD[:3], memoryview(PAYLOAD)[3:]]))
        assert parsed.header == header
        assert parsed.payload == PAYLOAD

    def test_we_read_a_standard_serialisers_bytes(self, message_type, header):
        framed = framing.decode(message_type(header=header, payload=PAYLOAD).SerializeToString(), type(header))
        assert framed.header == header
        assert framed.payload == PAYLOAD

    def test_our_bytes_are_the_standard_serialisers(self, message_type, header):
        assert framing.encode(header, [PAYLOAD]) == message_type(header=header, payload=PAYLOAD).SerializeToString()

    def test_the_payload_is_read_without_a_copy(self, message_type, header):
        data = framing.encode(header, [PAYLOAD])
        assert framing.decode(data, type(header)).payload.obj is data

    def test_unknown_fields_of_a_newer_sender_are_skipped(self, message_type, header):
        unknown = b"\x10\x96\x01" + b"\x1a\x03abc" + b"\x25\x01\x02\x03\x04" + b"\x31" + bytes(8)
        framed = framing.decode(framing.encode(header, [PAYLOAD]) + unknown, type(header))
        assert framed.header == header
        assert framed.payload == PAYLOAD

    def test_payload_before_header_is_read_too(self, message_type, header):
        data = message_type(payload=PAYLOAD).SerializeToString() + message_type(header=header).SerializeToString()
        framed = framing.decode(data, type(header))
        assert (framed.header, framed.payload) == (header, PAYLOAD)

    def test_every_cut_is_either_refused_or_shorter(self, message_type, header):
        data = framing.encode(header, [PAYLOAD])
        for length in range(len(data)):
            try:
                framed = framing.decode(data[:length], type(header))
            except DecodeError:
                continue
            assert bytes(framed.payload) == b"", f"cut at {length} was read as a whole message"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused_or_read_but_never_crashes(data):
    """Any bytes: DecodeError or a frame, never another exception."""
    try:
        framing.decode(data, parameter_server_pb2.PushHeader)
    except DecodeError:
        pass


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100), st.data())
def test_agrees_with_the_standard_parser_on_mutated_messages(payload, data):
    """Whatever one bit flip makes of a frame, we never read another payload than protobuf does."""
    wire = bytearray(framing.encode(FRAMED[1][1], [payload]))
    bit = data.draw(st.integers(0, len(wire) * 8 - 1))
    wire[bit // 8] ^= 1 << (bit % 8)
    try:
        ours = framing.decode(bytes(wire), parameter_server_pb2.PullHeader)
        theirs = parameter_server_pb2.PullResponse.FromString(bytes(wire))
    except DecodeError:
        return
    assert ours.payload == theirs.payload
    assert ours.header == theirs.header


@pytest.mark.parametrize("kind", [framing.DEFAULT_CHECKSUM, types_pb2.CHECKSUM_KIND_CRC32])
def test_checksums_of_parts_and_whole_agree(kind):
    data = bytes(range(256)) * 5
    whole = framing.checksum([data], kind)
    assert framing.checksum([memoryview(data)[:7], data[7:700], bytearray(data[700:])], kind) == whole
    frame = types_pb2.Frame(checksum_kind=kind, checksum=whole)
    framing.verify(frame, memoryview(data))
    with pytest.raises(ParameshError) as refused:
        framing.verify(frame, memoryview(data[:-1] + b"\x00"))
    assert refused.value.reason == "CRC"


def test_crc32c_is_castagnoli():
    """The check value of RFC 3720's polynomial; any implementation must agree."""
    assert framing.checksum([b"123456789"], types_pb2.CHECKSUM_KIND_CRC32C) == 0xE3069283


def test_an_empty_payload_has_a_checksum():
    assert framing.checksum([memoryview(b"")]) == framing.checksum([b""]) == framing.checksum([]) == 0


GOLDEN: dict[str, tuple[Message, str]] = {
    "push": (
        parameter_server_pb2.PushRequest(header=FRAMED[0][1], payload=PAYLOAD),
        "0a450a0b0a036a6f621001180720011003180122100880011008180120012defbeadde30012a06080110021801"
        "3a01054215080110021a0d0807190000000000005040200130017a080001020304050607",
    ),
    "push_sequenced": (
        parameter_server_pb2.PushRequest(
            header=parameter_server_pb2.PushHeader(
                request=REQUEST,
                partition=3,
                epoch=1,
                frame=FRAME,
                sequenced=parameter_server_pb2.SequenceKey(seq=4, skip=True, grad_scale=0.5),
            ),
            payload=PAYLOAD,
        ),
        "0a2e0a0b0a036a6f621001180720011003180122100880011008180120012defbeadde30013209080418012500"
        "00003f7a080001020304050607",
    ),
    "push_response": (
        parameter_server_pb2.PushResponse(
            outcomes=[
                parameter_server_pb2.PartitionOutcome(partition=3, epoch=1, lsn=9, duplicate=True, applied_step=2)
            ]
        ),
        "0a0a08031001180920012802",
    ),
    "pull": (
        parameter_server_pb2.PullRequest(
            request=REQUEST,
            partitions=[parameter_server_pb2.PartitionPull(partition=3, epoch=1, floor_lsn=9, floor_epoch=1)],
            group=1,
            at_step=True,
            step=3,
            committed=[RECORD],
            checksum_kind=types_pb2.CHECKSUM_KIND_CRC32,
        ),
        "0a0b0a036a6f62100118072001120808031001180920011801200128033215080110021a0d0807190000000000005040200130014002",
    ),
    "pull_response": (
        parameter_server_pb2.PullResponse(header=FRAMED[1][1], payload=PAYLOAD),
        "0a1a08031001180920022a100880011008180120012defbeadde30017a080001020304050607",
    ),
    "assign": (
        parameter_server_pb2.AssignRequest(header=FRAMED[2][1], payload=PAYLOAD),
        "0a2e0a0b0a036a6f621001180720011003180122100880011008180120012defbeadde30012a076578705f6176"
        "6740017a080001020304050607",
    ),
    "snapshot_response": (
        parameter_server_pb2.SnapshotResponse(header=FRAMED[3][1], payload=PAYLOAD),
        "0a210803100118092a100880011008180120012defbeadde300132076578705f6176677a080001020304050607",
    ),
    "ready": (
        ledger_pb2.ReadyRequest(
            request=REQUEST,
            group=1,
            step=2,
            attempt=1,
            weight=64.0,
            samples=[types_pb2.SampleRange(epoch=1, begin=0, end=64)],
            applied_through=1,
        ),
        "0a0b0a036a6f621001180720011001180220013100000000000050404204100120405001",
    ),
    "ready_response": (
        ledger_pb2.ReadyResponse(record=RECORD, included=True),
        "0a15080110021a0d0807190000000000005040200130011001",
    ),
    "clock": (
        ledger_pb2.ClockRequest(
            request=REQUEST, group=1, finished=5, floors=[ledger_pb2.Floor(partition=3, epoch=1, lsn=9)]
        ),
        "0a0b0a036a6f62100118072001100118052206080310011809",
    ),
    "lease": (
        ledger_pb2.LeaseRequest(request=REQUEST, epoch=1, length=1797, chunk=64, want=4, seed=3, wait=True),
        "0a0b0a036a6f62100118072001180120850e2840300448035001",
    ),
    "lease_response": (
        ledger_pb2.LeaseResponse(
            leases=[types_pb2.SampleRange(epoch=1, begin=0, end=64)], finished=True, lease_epoch=2
        ),
        "0a041001204010011802",
    ),
    "heartbeat": (
        coordinator_pb2.HeartbeatRequest(
            request=REQUEST,
            kind=coordinator_pb2.NODE_KIND_SERVER,
            name="server-0",
            incarnation=5,
            echo=6,
            applied_lsn=9,
        ),
        "0a0b0a036a6f6210011807200110011a087365727665722d30200528063009",
    ),
    "heartbeat_response": (
        coordinator_pb2.HeartbeatResponse(nonce=6, term=2, map_version=4, unknown=True),
        "0806100218042001",
    ),
    "step_record_with_clip": (
        types_pb2.StepRecord(
            group=1,
            step=2,
            skip=True,
            clip_factor=0.25,
            needs_clip=True,
            has_clip_factor=True,
            hyper_parameters=[
                types_pb2.TableHyperParameters(
                    table_id=1,
                    hyper_parameters=[
                        types_pb2.HyperParameter(name="lr", number=0.5),
                        types_pb2.HyperParameter(name="betas", numbers=types_pb2.NumberList(numbers=[0.9, 0.99])),
                        types_pb2.HyperParameter(name="amsgrad", flag=True),
                        types_pb2.HyperParameter(name="foreach", none=True),
                    ],
                )
            ],
        ),
        "0801100220012a480801120d0a026c7211000000000000e03f121b0a05626574617322120a10cdccccccccccec"
        "3fae47e17a14aeef3f120b0a07616d73677261641801120b0a07666f726561636828013d0000803e40014801",
    ),
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_bytes(name):
    message, golden = GOLDEN[name]
    assert message.SerializeToString(deterministic=True).hex() == golden
    assert type(message).FromString(bytes.fromhex(golden)) == message
