"""The table of who may call what lists every RPC, and binds each to its caller's own name."""

from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from paramesh import access
from paramesh.access import HEALTH, TABLE, check_call, check_message, roles_of
from paramesh.channel import header
from paramesh.errors import AccessDenied
from paramesh.framing import Framed
from paramesh.identity import Identity, Role
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from tests.cluster.rpcs import FILES, methods

LISTED = {f"/{service}/{method}" for service, found in TABLE.items() for method in found}
PROTOS = Path(__file__).parents[3] / "protos" / "paramesh" / "v1"


def test_every_rpc_of_every_descriptor_is_listed_and_no_other() -> None:
    assert set(methods()) == LISTED


def test_no_file_of_protos_is_left_out() -> None:
    known = {file.DESCRIPTOR.name.rpartition("/")[2] for file in FILES}
    assert {path.name for path in PROTOS.glob("*.proto")} - {"errors.proto"} <= known


def test_what_is_not_listed_nobody_may_call() -> None:
    assert roles_of("/paramesh.v1.Admin/Explode") == frozenset()
    for role in Role:
        with pytest.raises(AccessDenied):
            check_call(Identity("default", role, "me"), "/paramesh.v1.Admin/Explode")


def test_replication_and_control_are_between_nodes() -> None:
    for service in ("Replication", "ServerControl", "CheckpointControl", "Replicas"):
        for roles in TABLE[f"paramesh.v1.{service}"].values():
            assert roles <= {Role.SERVER, Role.COORDINATOR}


def test_observers_only_look() -> None:
    changing = ("Create", "Restore", "Move", "Drain", "Rebalance", "Promote", "Register", "Push", "Assign", "Put")
    for path in LISTED:
        if path.rpartition("/")[2].startswith(changing):
            assert Role.OBSERVER not in roles_of(path)


def test_health_is_all_that_needs_no_identity() -> None:
    assert {path for path in methods() if "grpc.health" in path} == HEALTH


def test_every_request_that_names_a_sender_is_bound() -> None:
    """A request with a node's name or a replica that sends must have a check of its own."""
    naming = set()
    for path, method in methods().items():
        fields = {f.name: f for f in method.input_type.fields}
        if "header" in fields and fields["header"].type == FieldDescriptor.TYPE_MESSAGE:
            fields = {f.name: f for f in fields["header"].message_type.fields}
        own = {"incarnation", "primary", "source"} & fields.keys()
        senders = {n for n in own if n == "incarnation" or fields[n].type == FieldDescriptor.TYPE_MESSAGE}
        if senders:
            naming.add(path)
    assert naming == set(access._BOUND)


ME = Identity("default", Role.WORKER, "me")
SERVER = Identity("default", Role.SERVER, "ps")
PUSH, APPEND = "/paramesh.v1.ParameterServer/Push", "/paramesh.v1.Replication/Append"


def framed(message: object) -> Framed:
    return Framed(message, memoryview(b""))


def test_a_request_under_the_callers_own_id_passes() -> None:
    mine = header("default", 1, ME.next_id(1))
    check_message(ME, PUSH, framed(ps.PushHeader(request=mine)))
    check_message(ME, PUSH, framed(ps.PushHeader()))  # a later frame has no header
    check_message(ME, "/paramesh.v1.ParameterServer/Pull", ps.PullRequest(request=mine))
    check_message(SERVER, APPEND, framed(rp.AppendHeader(primary=pb.ReplicaRef(node="ps-1"), request=mine.__class__())))
    check_message(ME, PUSH, b"bytes that a standby does not read")


@pytest.mark.parametrize(
    ("who", "path", "message"),
    [
        (ME, PUSH, framed(ps.PushHeader(request=header("default", 1, ME.next_id(1) + 1)))),
        (ME, PUSH, framed(ps.PushHeader(request=header("default", 1, 7)))),
        (ME, PUSH, framed(ps.PushHeader(request=header("other")))),
        (SERVER, PUSH, framed(ps.PushHeader(request=header("default", 1, ME.next_id(1))))),
        (SERVER, APPEND, framed(rp.AppendHeader(primary=pb.ReplicaRef(node="other")))),
        (SERVER, APPEND, framed(rp.AppendHeader(request=header("default")))),
        (SERVER, "/paramesh.v1.Membership/RegisterServer", co.RegisterServerRequest(name="psx")),
        (ME, "/paramesh.v1.Membership/RegisterClient", co.RegisterClientRequest(host="me", slot="other/0")),
        (ME, "/paramesh.v1.Membership/RegisterClient", co.RegisterClientRequest(host="other", slot="me/0")),
        (ME, "/paramesh.v1.Membership/Heartbeat", co.HeartbeatRequest(kind=co.NODE_KIND_SERVER, name="me")),
        (ME, "/paramesh.v1.Membership/Heartbeat", co.HeartbeatRequest(kind=co.NODE_KIND_HOST)),
        (SERVER, "/paramesh.v1.Admin/Drain", co.DrainRequest(server="other")),
    ],
)
def test_a_request_in_anothers_name_is_refused(who: Identity, path: str, message: object) -> None:
    with pytest.raises(AccessDenied) as refused:
        check_message(who, path, message)
    assert refused.value.reason == "PERMISSION_DENIED"


def test_an_admin_drains_any_server() -> None:
    check_message(Identity("default", Role.ADMIN, "alice"), "/paramesh.v1.Admin/Drain", co.DrainRequest(server="other"))
