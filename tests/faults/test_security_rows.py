"""Who may not: rows 40 and 63-67 of the input matrix, against a live coordinator and server."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import paramesh
import pytest
import torch
import trustme
from grpc_health.v1 import health_pb2
from paramesh import framing
from paramesh.access import TABLE, roles_of
from paramesh.channel import header
from paramesh.errors import ParameshError
from paramesh.identity import Identity, Role
from paramesh.security import PLAIN, Security
from paramesh.tokens import TokenKeys
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import ledger_pb2 as lg
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import replication_pb2 as rp
from paramesh.v1 import types_pb2 as pb

from tests.cluster.rpcs import kind_of
from tests.cluster.secure import Authority, channel
from tests.cluster.secure_inprocess import SecureInProcess, ask, asked
from tests.cluster.waiting import wait_until

PORT_OF = {
    **dict.fromkeys(["Membership", "MapService", "Catalog", "Replicas", "Admin", "Checkpoints"], "coordinator"),
    **dict.fromkeys(["ParameterServer", "Ledger", "Recovery", "Health", "ServerReflection"], "data"),
    **dict.fromkeys(["Replication", "ServerControl", "CheckpointControl"], "control"),
}
"""Service -> where it is served."""

KINDS = {"certificates": (True, False), "tokens": (False, True), "tokens over TLS": (True, True)}


@pytest.fixture(scope="module", params=KINDS)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureInProcess]:
    tls, tokens = KINDS[request.param]
    with SecureInProcess(tmp_path_factory.mktemp("secure"), tls=tls, tokens=tokens) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureInProcess]:
    with SecureInProcess(tmp_path_factory.mktemp("certified"), tls=True, tokens=False) as cluster:
        yield cluster
        assert lives(cluster)


@pytest.fixture(scope="module")
def tokened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureInProcess]:
    with SecureInProcess(tmp_path_factory.mktemp("tokened"), tls=False, tokens=True) as cluster:
        yield cluster


STATUS = "/paramesh.v1.Admin/GetStatus"
STATUS_BODY = co.GetStatusRequest(request=header("default")).SerializeToString()


def lives(cluster: SecureInProcess) -> bool:
    """Whether the coordinator answers whoever may ask."""
    return ask(cluster.address, cluster.credentials(Role.OBSERVER), STATUS, STATUS_BODY) == "OK"


# ---------------------------------------------------------------------- row 64: roles


@pytest.mark.bad_input(64, got="PERMISSION_DENIED")
@pytest.mark.parametrize("role", list(Role))
def test_every_call_is_for_the_roles_of_the_table_only(cluster: SecureInProcess, role: Role) -> None:
    """An empty request of everybody to everything: refused as the table says, or further on for what it lacks."""
    me = cluster.credentials(role)
    for service, methods in TABLE.items():
        address = cluster.ports[PORT_OF[service.rpartition(".")[2]]]
        for method in methods:
            path = f"/{service}/{method}"
            try:
                asked(address, me, path, kind=kind_of(path))
                got = ""
            except ParameshError as error:
                got = f"{error.reason}: {error}"
            if got.startswith("UNIMPLEMENTED"):
                continue  # in the protos, and served by nobody
            # An empty name is nobody's own: that too is denied, but not for the role.
            denied = got.startswith(f"PERMISSION_DENIED: {path} is for ")
            assert denied != (role in roles_of(path)), f"{role} got {got!r} from {path}"
            assert not got.startswith("UNAUTHENTICATED")


def test_training_goes_on_in_its_own_name(cluster: SecureInProcess) -> None:
    def train(rank: int) -> list[float]:
        model = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        return model.weight.detach().flatten().tolist()

    assert cluster.run(train) == [[-1.0, -1.0]]


# ---------------------------------------------------------------------- row 40: somebody else's name


def foreign(request: pb.RequestHeader) -> dict[str, tuple[str, Role, bytes]]:
    """Path -> (port, role, request in another's name)."""
    other = pb.ReplicaRef(node="server-0", incarnation=7)
    host, kind = {"name": "other", "incarnation": 7}, {"request": request}
    push = framing.encode(ps.PushHeader(request=request, partition=1), [b""])
    messages = {
        "ParameterServer/Push": ("data", Role.WORKER, push),
        "ParameterServer/Pull": ("data", Role.WORKER, ps.PullRequest(**kind)),
        "ParameterServer/Assign": ("data", Role.WORKER, framing.encode(ps.AssignHeader(request=request), [b""])),
        "Ledger/Join": ("data", Role.WORKER, lg.JoinRequest(**kind)),
        "Ledger/Ready": ("data", Role.WORKER, lg.ReadyRequest(**kind)),
        "Ledger/Leave": ("data", Role.WORKER, lg.LeaveRequest(**kind)),
        "Membership/Heartbeat": (
            "coordinator", Role.WORKER, co.HeartbeatRequest(kind=co.NODE_KIND_CLIENT, **kind),
        ),
        "Membership/Deregister": (
            "coordinator", Role.WORKER, co.DeregisterRequest(kind=co.NODE_KIND_CLIENT, **kind),
        ),
        "Membership/RegisterHost": (
            "coordinator", Role.WORKER, co.RegisterHostRequest(request=header("default"), **host),
        ),
        "Membership/RegisterClient": (
            "coordinator", Role.WORKER,
            co.RegisterClientRequest(request=header("default"), incarnation=7, host="other", slot="other/0"),
        ),
        "Membership/ReportExit": (
            "coordinator", Role.WORKER,
            co.ReportExitRequest(request=header("default"), kind=co.NODE_KIND_HOST, **host),
        ),
        "Membership/RegisterServer": (
            "coordinator", Role.SERVER,
            co.RegisterServerRequest(request=header("default"), name="server-0", incarnation=7, replace=True),
        ),
        "Replicas/ChangeIsr": (
            "coordinator", Role.SERVER, co.ChangeIsrRequest(request=header("default"), primary=other),
        ),
        "Replicas/ReportLoss": (
            "coordinator", Role.SERVER, co.ReportLossRequest(request=header("default"), primary=other),
        ),
        "Admin/Drain": ("coordinator", Role.SERVER, co.DrainRequest(request=header("default", 1), server="server-0")),
        "Replication/Append": (
            "control", Role.SERVER,
            rp.AppendRequest(header=rp.AppendHeader(request=header("default", 1), primary=other)),
        ),
        "Replication/Install": (
            "control", Role.SERVER,
            rp.InstallRequest(header=rp.InstallHeader(request=header("default", 1), primary=other)),
        ),
        "Replication/Handover": (
            "control", Role.SERVER,
            rp.HandoverRequest(header=rp.HandoverHeader(request=header("default", 1), source=other)),
        ),
    }  # fmt: skip
    return {
        f"/paramesh.v1.{path}": (port, role, body if isinstance(body, bytes) else body.SerializeToString())
        for path, (port, role, body) in messages.items()
    }


@pytest.mark.bad_input(40, got="PERMISSION_DENIED")
def test_nobody_speaks_in_anothers_name(cluster: SecureInProcess) -> None:
    victim = cluster.connect("victim")
    for path, (port, role, body) in foreign(victim.header()).items():
        me = cluster.credentials(role, "mallory")
        assert ask(cluster.ports[port], me, path, body, kind_of(path)) == "PERMISSION_DENIED", path
    status = co.GetStatusResponse()
    observer = cluster.credentials(Role.OBSERVER)
    with channel(cluster.address, observer) as open_channel:
        metadata = [("authorization", f"Bearer {observer.token}")] if observer.token else []
        status.ParseFromString(open_channel.unary_unary(STATUS)(STATUS_BODY, timeout=5, metadata=metadata))
    assert victim.client_id in [row.client_id for row in status.clients if row.state == "live"]
    assert [(s.node.ref.node, s.node.state) for s in status.servers] == [("server-0", pb.NODE_STATE_LIVE)]
    cluster.call(victim.close())


def test_a_server_does_not_beat_for_a_host_nor_a_worker_for_a_server(cluster: SecureInProcess) -> None:
    for role, kind in ((Role.SERVER, co.NODE_KIND_HOST), (Role.WORKER, co.NODE_KIND_SERVER)):
        beat = co.HeartbeatRequest(request=header("default"), kind=kind, name="me", incarnation=7)
        path = "/paramesh.v1.Membership/Heartbeat"
        got = ask(cluster.address, cluster.credentials(role, "me"), path, beat.SerializeToString(), "stream_stream")
        assert got == "PERMISSION_DENIED"


@pytest.mark.bad_input(63, got="PERMISSION_DENIED (another job's)")
def test_another_jobs_identity_is_refused(cluster: SecureInProcess) -> None:
    """Row 63, the last part; by certificate too."""
    me = cluster.credentials(Role.OBSERVER, job="another")
    assert ask(cluster.address, me, STATUS, STATUS_BODY) == "PERMISSION_DENIED"


# ---------------------------------------------------------------------- row 63: tokens


@pytest.mark.bad_input(63, got="UNAUTHENTICATED")
def test_wrong_tokens(tokened: SecureInProcess) -> None:
    now, who = time.time(), Identity("default", Role.OBSERVER, "me")
    good = tokened.keys.sign(who, now + 60)
    wrong = {
        "none": "",
        "malformed": "pm1.nonsense",
        "signed with another key": TokenKeys.fresh().sign(who, now + 60),
        "expired": tokened.keys.sign(who, now - 1),
        "for longer than a day": tokened.keys.sign(who, now + 25 * 3600),
        "of another role, under the old signature": tokened.keys.sign(
            dataclasses.replace(who, role=Role.ADMIN), now + 60
        ).rpartition(".")[0] + "." + good.rpartition(".")[2],
    }  # fmt: skip
    for what, token in wrong.items():
        assert ask(tokened.address, Security(token=token), STATUS, STATUS_BODY) == "UNAUTHENTICATED", what
    assert ask(tokened.address, Security(token=good), STATUS, STATUS_BODY) == "OK"


def test_keys_are_rotated_without_a_restart(tmp_path) -> None:
    """Tokens of the key before stay good; those of the one before that do not."""
    with SecureInProcess(tmp_path, tls=False, tokens=True) as cluster:
        first = cluster.credentials(Role.OBSERVER)
        for expected in ("OK", "UNAUTHENTICATED"):
            cluster.keys = TokenKeys.fresh(cluster.keys)
            cluster.keys_file.write_text(cluster.keys.text())
            newest = cluster.credentials(Role.OBSERVER)

            def taken_up(newest: Security = newest) -> bool:
                return ask(cluster.address, newest, STATUS, STATUS_BODY) == "OK"

            wait_until(taken_up, 10, "the new key")
            assert ask(cluster.address, first, STATUS, STATUS_BODY) == expected


def test_a_probe_needs_no_token(tokened: SecureInProcess) -> None:
    for address in tokened.ports.values():
        body = health_pb2.HealthCheckRequest().SerializeToString()
        assert ask(address, PLAIN, "/grpc.health.v1.Health/Check", body) == "OK"


# ---------------------------------------------------------------------- row 65: certificates


@pytest.mark.bad_input(65, got="no connection")
def test_wrong_certificates(certified: SecureInProcess, tmp_path) -> None:
    """No handshake without a certificate of this CA that is valid now; whose it is does not matter before that."""
    good = certified.credentials(Role.OBSERVER, "good")
    foreign_ca = Authority(tmp_path / "ca")
    stranger = foreign_ca.issue(Role.OBSERVER, "me")
    wrong = {
        "none": Security(ca=good.ca),
        "expired": certified.authority.issue(Role.OBSERVER, "late", days=0),
        "of an unknown CA": dataclasses.replace(stranger, ca=good.ca),
        "believing another CA": dataclasses.replace(good, ca=stranger.ca),
    }
    for what, security in wrong.items():
        for address in certified.ports.values():
            assert ask(address, security, STATUS, STATUS_BODY) == "UNREACHABLE", what
    assert ask(certified.address, good, STATUS, STATUS_BODY) == "OK"
    assert certified._servers[0].counters.tls_handshakes >= 2 * len(wrong)


def nameless_certificate(cluster: SecureInProcess, folder: Path) -> Security:
    """Issued by the cluster's CA for a program that is none of ours."""
    ca = trustme.CA.from_pem(*(cluster.authority.folder.joinpath(name).read_bytes() for name in ("ca.pem", "ca.key")))
    leaf = ca.issue_cert("other.example")
    cert, key = folder / "other.pem", folder / "other.key"
    leaf.cert_chain_pems[0].write_to_path(str(cert))
    leaf.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    return Security(str(cert), str(key), str(cluster.authority.folder / "ca.pem"))


@pytest.mark.bad_input(65, got="UNAUTHENTICATED (names nobody)")
def test_a_certificate_that_names_nobody(certified: SecureInProcess, tmp_path) -> None:
    """gRPC has no hook in the handshake for names: it comes about, and every call is refused but a probe."""
    nameless = nameless_certificate(certified, tmp_path)
    for port, address in certified.ports.items():
        path = STATUS if port == "coordinator" else "/paramesh.v1.ParameterServer/Inspect"
        if port != "control":
            assert ask(address, nameless, path, b"") == "UNAUTHENTICATED"
        assert ask(address, nameless, "/grpc.health.v1.Health/Check", b"") == "OK"


def test_a_worker_cannot_stand_for_a_server(certified: SecureInProcess) -> None:
    """A worker's certificate with the right address is not believed by who dials: it is for clients only."""
    from concurrent import futures

    impostor = certified.authority.issue(Role.WORKER, "impostor", ["127.0.0.1"])
    cert, key, ca = impostor.read_files()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, cert)], ca, True))
    server.start()
    try:
        assert ask(f"127.0.0.1:{port}", certified.credentials(Role.WORKER), STATUS, b"") == "UNREACHABLE"
    finally:
        server.stop(None)


# ---------------------------------------------------------------------- row 66: other protocols


HELLOS = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "random bytes": os.urandom(4096),
    "half a TLS hello": b"\x16\x03\x01\x02\x00\x01",
    "HTTP/2 in the clear": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.bad_input(66, got="closed")
@pytest.mark.parametrize("hello", HELLOS)
def test_other_protocols_on_a_tls_port(certified: SecureInProcess, hello: str) -> None:
    for address in certified.ports.values():
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(HELLOS[hello])
            connection.shutdown(socket.SHUT_WR)
            try:
                while connection.recv(65536):
                    pass
            except ConnectionResetError:
                pass
    assert lives(certified)


@pytest.mark.bad_input(66, got="closed")
def test_plaintext_to_a_tls_port_and_tls_to_a_plaintext_one(certified, tokened) -> None:
    for address in certified.ports.values():
        assert ask(address, PLAIN, STATUS, STATUS_BODY) == "UNREACHABLE"
    for address in tokened.ports.values():
        assert ask(address, certified.credentials(Role.OBSERVER), STATUS, STATUS_BODY) == "UNREACHABLE"
    assert lives(certified)
    assert lives(tokened)
