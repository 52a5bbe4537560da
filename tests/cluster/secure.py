"""A cluster of processes under `psctl certs`: encrypted, each role with its own certificate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import grpc
from paramesh.certificates import AUTHORITY, issue, make_authority, write
from paramesh.channel import CHANNEL_OPTIONS, header
from paramesh.identity import Identity, Role
from paramesh.security import Security
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.coordinator_pb2_grpc import MapServiceStub

from tests.cluster.processes import Process, ProcessCluster

JOB = "default"


class Authority:
    """A CA in a folder, and the files that it has issued.

    Args:
        folder: where; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_authority(folder, 30)

    @property
    def certificate(self) -> bytes:
        """What is believed by whoever believes in it."""
        return (self.folder / AUTHORITY).read_bytes()

    def issue(
        self, role: Role, name: str, hosts: Sequence[str] = ("127.0.0.1",), *, job: str = JOB, days: float = 1.0
    ) -> Security:
        """A certificate, valid from now; of the same name again: it replaces the one before."""
        files = issue(self.folder, Identity(job, role, name), hosts, days)
        return Security(str(files.cert), str(files.key), str(self.folder / "ca.pem"))


def channel(address: str, security: Security) -> grpc.Channel:
    """A channel of gRPC's own, with what is in the files now."""
    if not security.encrypted:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    cert, key, ca = security.read_files()
    credentials = grpc.ssl_channel_credentials(ca, key or None, cert or None)
    return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


class SecureCluster(ProcessCluster):
    """As `ProcessCluster`; certificates are given to each process in its environment."""

    @functools.cached_property
    def authority(self) -> Authority:
        """Who issues; another one may be put in its place."""
        return Authority(self.directory / "ca")

    @functools.cached_property
    def believed(self) -> Path:
        """The file that every process has as --tls-ca."""
        path = self.directory / "certs" / "ca.pem"
        write(path, self.authority.certificate, 0o644)
        return path

    def give(self, role: Role, name: str) -> Security:
        """Write a certificate of now where a process has it; the key comes first, as a careless script would."""
        issued = self.authority.issue(role, name)
        given = dataclasses.replace(
            issued, cert=str(self.believed.parent / Path(issued.cert).name),
            key=str(self.believed.parent / Path(issued.key).name), ca=str(self.believed),
        )  # fmt: skip
        write(Path(given.key), Path(issued.key).read_bytes())
        write(Path(given.cert), Path(issued.cert).read_bytes())
        return given

    @functools.cached_property
    def admin(self) -> Security:
        """What `psctl` is given."""
        return self.give(Role.ADMIN, "alice")

    @functools.cached_property
    def worker(self) -> Security:
        """What all workers have: "host" covers host-0, host-1, ..."""
        return self.give(Role.WORKER, "host")

    def reissue(self) -> None:
        """Replace every certificate and key that was given."""
        for cert in self.believed.parent.glob("*-*.pem"):
            role, _, name = cert.stem.partition("-")
            self.give(Role(role), name)

    def believe(self, *authorities: Authority) -> None:
        """Have every process believe these."""
        write(self.believed, b"".join(one.certificate for one in authorities), 0o644)

    def _security(self, node: str) -> Security:
        if node.startswith("server-"):
            return self.give(Role.SERVER, node)
        return self.give(Role.COORDINATOR, node) if node.startswith("coordinator") else self.worker

    def _launch(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> Process:
        return super()._launch(name, command, self._security(name).environment() | (env or self.env))

    def partition_map(self) -> pb.PartitionMap:
        """The map, as the admin sees it."""
        with channel(self.coordinator_address, self.admin) as open_channel:
            request = co.GetMapRequest(request=header(JOB))
            answer: co.GetMapResponse = MapServiceStub(open_channel).GetMap(request, timeout=5.0)
        return answer.map

    def live_servers(self) -> list[str]:
        try:
            nodes = self.partition_map().nodes
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return []
        return [node.ref.node for node in nodes if node.state == pb.NODE_STATE_LIVE]
