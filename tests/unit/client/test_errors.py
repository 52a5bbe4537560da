"""The tables of reasons and of repeatable calls are complete, and the door works both ways."""

import asyncio

import pytest
from paramesh.channel import grpc
from paramesh.errors import REASONS, InternalError, ParameshError, TensorMismatch, refuse
from paramesh.retry import REPEATABLE, Backoff
from paramesh.status import error_detail, from_detail, from_rpc_error, typed_errors
from paramesh.v1 import coordinator_pb2, errors_pb2, ledger_pb2, parameter_server_pb2, recovery_pb2, replication_pb2
from paramesh.v1 import ledger_pb2_grpc as lg

LOCAL_ONLY = {"CONFIG", "UNREACHABLE", "FORKED"}


def test_reasons_and_the_contract_agree():
    wire = {name.removeprefix("REASON_") for name in errors_pb2.Reason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert set(REASONS) - LOCAL_ONLY == wire


def test_every_reason_makes_its_typed_error_with_a_known_status():
    codes = {code.value[0] for code in grpc.StatusCode}
    for reason, row in REASONS.items():
        error = refuse(reason, "x", field=1)
        assert type(error) is row.error
        assert error.code in codes - {0}
        assert error.metadata == {"field": "1"}


def test_every_call_of_the_contract_is_declared_repeatable_with_a_reason():
    declared = set()
    for module in (parameter_server_pb2, ledger_pb2, coordinator_pb2, replication_pb2, recovery_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            declared |= {f"{service.name}.{method.name}" for method in service.methods}
    assert declared == set(REPEATABLE)


def test_detail_round_trip():
    error = from_detail(error_detail(refuse("SHAPE", "bad", tensor="w")))
    assert isinstance(error, TensorMismatch)
    assert (str(error), error.metadata) == ("bad", {"tensor": "w"})


def test_backoff_doubles_to_its_cap():
    backoff = Backoff(first=0.1, cap=0.4)
    waits = [backoff.next() for _ in range(6)]
    bounds = [0.1, 0.2, 0.4, 0.4, 0.4, 0.4]
    assert all(b / 2 <= w <= b for w, b in zip(waits, bounds, strict=True))


class Broken(lg.LedgerServicer):
    async def Join(self, request, context):
        raise refuse("EVICTED", "gone\nand injected", client=7, long="x" * 5000)

    async def Leave(self, request, context):
        raise ValueError("secret text of an exception")


async def _errors() -> list[ParameshError]:
    seen: list[str] = []
    server = grpc.aio.server(interceptors=[typed_errors(seen.append)])
    lg.add_LedgerServicer_to_server(Broken(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = lg.LedgerStub(channel)
        got = []
        calls = [
            lambda: stub.Join(ledger_pb2.JoinRequest()),
            lambda: stub.Leave(ledger_pb2.LeaveRequest()),
            lambda: channel.unary_unary("/paramesh.v1.Ledger/NoSuchMethod")(b""),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                await call()
            got.append(from_rpc_error(caught.value, "peer"))
    await server.stop(0)
    assert seen == ["EVICTED", "INTERNAL"]
    return got


def test_typed_errors_cross_the_wire_and_others_leave_as_an_opaque_id(caplog):
    evicted, internal, missing = asyncio.run(_errors())
    assert (evicted.reason, evicted.metadata["client"]) == ("EVICTED", "7")
    assert len(evicted.metadata["long"]) < 1000, "errors stay under 1 KiB"
    assert isinstance(internal, InternalError)
    assert "secret" not in str(internal)
    assert internal.metadata["id"] in caplog.text, "the id finds the traceback in the log"
    assert "secret text" in caplog.text
    assert missing.reason == "UNIMPLEMENTED"
