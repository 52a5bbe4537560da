"""The in-process cluster under security settings, and calls to it as anybody may make them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
from paramesh import testing
from paramesh.async_client import AsyncClient
from paramesh.config import ClientConfig
from paramesh.errors import ParameshError
from paramesh.identity import Identity, Role
from paramesh.security import Security
from paramesh.status import from_rpc_error
from paramesh.tokens import TokenKeys

from tests.cluster.secure import JOB, Authority, channel

CALL_SECONDS = 5.0


class SecureInProcess(testing.Cluster):
    """One coordinator and one server with certificates, or with keys of tokens, or with both.

    Args:
        folder: for the CA and the keys.
        tls: certificates.
        tokens: callers are known by tokens.
    """

    def __init__(self, folder: Path, *, tls: bool, tokens: bool) -> None:
        self.authority = Authority(folder / "ca")
        self.keys_file = folder / "token.keys"
        self.keys = TokenKeys.fresh()
        self.keys_file.write_text(self.keys.text())
        self.keys_file.chmod(0o600)
        self.tls, self.tokens = tls, tokens
        super().__init__(client_timeout=600.0, **self._node(Role.COORDINATOR, "c"))

    def _node(self, role: Role, name: str) -> dict[str, str]:
        """The security settings of a coordinator or server."""
        keys = {"token_keys": str(self.keys_file)} if self.tokens else {}
        if not self.tls:
            return keys
        own = self.authority.issue(role, name)
        return {"tls_cert": own.cert, "tls_key": own.key, "tls_ca": own.ca, **keys}

    async def _start_server(self, index: int) -> None:
        from paramesh_server.config import ServerConfig
        from paramesh_server.server import ParameterServer

        name = f"server-{index}"
        config = ServerConfig(
            coordinator=self.address, name=name, heartbeat="loop", reflection=True, **self._node(Role.SERVER, name)
        )
        server = ParameterServer(config)
        await server.start()
        self._servers[index] = server

    @property
    def ports(self) -> dict[str, str]:
        """Kind of port -> host:port."""
        server = self._servers[0]
        return {"coordinator": self.address, "data": server.address, "control": server.control_address}

    def credentials(self, role: Role, name: str = "me", job: str = JOB) -> Security:
        """What a caller is given who shall be this one."""
        if not self.tokens:
            return self.authority.issue(role, name, job=job)
        token = self.keys.sign(Identity(job, role, name), time.time() + 3600)
        return Security(ca=str(self.authority.folder / "ca.pem") if self.tls else "", token=token)

    def _worker_config(self, rank: int) -> ClientConfig:
        return ClientConfig(
            coordinators=self.address, slot=f"w/{rank}", rank=rank, security=self.credentials(Role.WORKER, "w")
        )

    def connect(self, name: str) -> AsyncClient:
        """A registered client, of a worker's identity."""
        return self.call(AsyncClient.connect(self.address, security=self.credentials(Role.WORKER, name)))


def ask(address: str, security: Security, path: str, body: bytes = b"", kind: str = "unary_unary") -> str:
    """Call any method with any bytes; "OK", or the reason of the refusal, or gRPC's own code in lower case."""
    try:
        asked(address, security, path, body, kind)
    except ParameshError as error:
        return error.reason
    return "OK"


def asked(address: str, security: Security, path: str, body: bytes = b"", kind: str = "unary_unary") -> Any:
    """The same: the answer as bytes.

    Raises:
        ParameshError: the refusal.
    """
    metadata = [("authorization", f"Bearer {security.token}")] if security.token else []
    with channel(address, security) as open_channel:
        call = getattr(open_channel, kind)(path)
        argument: Any = iter([body]) if kind.startswith("stream") else body
        try:
            answer = call(argument, timeout=CALL_SECONDS, metadata=metadata)
            return next(iter(answer)) if kind.endswith("stream") else answer
        except grpc.RpcError as error:
            raise from_rpc_error(error, address) from None
