"""How a process proves who it is, and whom it believes: the settings, checked once.

    security = Security(cert="s0.pem", key="s0.key", ca="ca.pem")
    security.check()                              # typed errors that name what is missing or wrong
    channel = aio_channel(address, security)      # every channel and server is given it

With nothing set traffic is plain, for loopback and for networks that are trusted. `paramesh.credentials` turns
the settings into what gRPC takes, and follows the files when they change.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from paramesh.errors import ConfigError, ParameshError
from paramesh.identity import Identity, Role

if TYPE_CHECKING:
    from paramesh.tokens import TokenKeys

__all__ = ["PLAIN", "VARIABLES", "Security", "is_loopback", "read_secret"]

VARIABLES = {
    "cert": "PARAMESH_TLS_CERT",
    "key": "PARAMESH_TLS_KEY",
    "ca": "PARAMESH_TLS_CA",
    "token": "PARAMESH_TOKEN",
    "token_file": "PARAMESH_TOKEN_FILE",
}
"""Field -> the variable that training processes and clients read it from."""

_KEYS = {"cert": "tls_cert", "key": "tls_key", "ca": "tls_ca"}
"""Field -> the key that messages begin with, which is the flag's name."""

_LARGEST = 1 << 20
"""Bytes of a certificate, key or token file; chains have some thousands."""


@dataclass(frozen=True)
class Security:
    """Paths of certificate, key, CA and tokens. Nothing set: plain."""

    cert: str = ""
    key: str = ""
    ca: str = ""
    """PEM file of the certificates that this process believes."""
    token: str = field(default="", repr=False)
    """The token itself, from the environment only."""
    token_file: str = ""
    token_keys: str = ""
    """For coordinator and servers: callers are known by tokens, signed with these keys, not by certificates."""
    signs_as: Identity | None = None
    """With `token_keys`: who this process is when it calls others; it signs its own tokens."""

    @property
    def encrypted(self) -> bool:
        """Whether channels and ports are TLS."""
        return bool(self.ca)

    @property
    def bears_token(self) -> bool:
        """Whether calls carry a token."""
        return bool(self.token or self.token_file or self.token_keys)

    @property
    def authenticates(self) -> bool:
        """Whether this process asks its callers who they are."""
        return bool(self.token_keys) or self.encrypted

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Security:
        """What training processes and clients are given."""
        cert, key, ca, token, token_file = (environ.get(variable, "").strip() for variable in VARIABLES.values())
        return cls(cert, key, ca, token, token_file)

    def environment(self) -> dict[str, str]:
        """The same, for a process that this one starts; a token in the environment is inherited."""
        files = {"cert": self.cert, "key": self.key, "ca": self.ca, "token_file": self.token_file}
        return {VARIABLES[name]: os.path.abspath(path) for name, path in files.items() if path}

    def check(self, role: Role | None = None, job: str = "") -> Identity | None:
        """Check everything that can be without a connection.

        Args:
            role: what the process is; None: a client, which may be of any role.
            job: the cluster that it belongs to.

        Returns:
            Who this process is; None if nothing says so.

        Raises:
            ConfigError: tls_cert, tls_key, tls_ca, token_file or token_keys: what is wrong, and what to do.
        """
        serves = role in (Role.SERVER, Role.COORDINATOR)
        self._check_complete(serves)
        keys = self.read_keys() if self.token_keys else None
        if keys is not None and not serves:
            raise _wrong("token_keys", "is for ps-coordinator and ps-server, which verify; others have a token")
        who = None if not self.cert else self._check_certificate()
        if self.token or self.token_file:
            who = self._check_token()
        if who is not None:
            _check_identity(who, role, job, "tls_cert" if not self.bears_token else "token_file")
        if self.encrypted and not self.cert and not self.bears_token:
            raise _missing("cert")
        return who

    def _check_complete(self, serves: bool) -> None:
        if self.token and self.token_file:
            raise _wrong("token_file", f"and {VARIABLES['token']} exclude each other")
        given = {name for name in ("cert", "key", "ca") if getattr(self, name)}
        alone = given == {"ca"} and self.bears_token and not serves
        if given and not alone:
            for name in ("cert", "key", "ca"):
                if name not in given:
                    raise _missing(name)

    def _check_certificate(self) -> Identity | None:
        from paramesh.certificates import check_pair, read_certificate

        cert, key, ca = self.read_files()
        try:
            said = read_certificate(cert)
            check_pair(cert, key, ca)
        except ValueError as error:
            raise _wrong("tls_cert", f"{self.cert} with {self.key} and {self.ca}: {error}") from None
        if said.expired:
            raise _wrong("tls_cert", f"{self.cert} expired at {said.not_after:%Y-%m-%d %H:%M} UTC; issue another")
        if said.identity is None and not self.bears_token:
            raise _wrong(
                "tls_cert",
                f"{self.cert} must have exactly one URI spiffe://paramesh/JOB/ROLE/NAME in its subject alternative "
                "names; psctl certs issue makes such",
            )
        return said.identity

    def _check_token(self) -> Identity:
        from paramesh.tokens import claimed

        try:
            return claimed(self.read_token())
        except ParameshError as error:
            raise _wrong("token_file", f"{error} ({self.token_file or VARIABLES['token']})") from None

    def read_files(self) -> tuple[bytes, bytes, bytes]:
        """Certificate, key and CA; empty where none is named.

        Raises:
            ConfigError: one cannot be read, or others may read the key.
        """
        read = dict.fromkeys(_KEYS, b"")
        for name, key in _KEYS.items():
            path = getattr(self, name)
            if path:
                read[name] = read_secret(path, key, private=name == "key")
        return read["cert"], read["key"], read["ca"]

    def read_token(self) -> str:
        """The token of now.

        Raises:
            ConfigError: token_file: it cannot be read, or others may read it.
        """
        if not self.token_file:
            return self.token
        data = read_secret(self.token_file, "token_file", private=True)
        return data.decode("ascii", "replace").strip()

    def read_keys(self) -> TokenKeys:
        """The keys of tokens.

        Raises:
            ConfigError: token_keys: they cannot be read, others may read them, or they are none.
        """
        from paramesh.tokens import TokenKeys

        return TokenKeys.parse(read_secret(self.token_keys, "token_keys", private=True).decode("utf-8", "replace"))

    def check_dial(self, address: str) -> None:
        """Refuse to send a token in the clear to another machine.

        Raises:
            ConfigError: token_file.
        """
        if self.bears_token and not self.encrypted and not is_loopback(address.rpartition(":")[0]):
            raise _wrong(
                "token_file",
                f"a token would go to {address} unencrypted, where everybody on the way reads it; add --tls-ca "
                "(PARAMESH_TLS_CA)",
            )

    def check_bind(self, key: str, bind: str, insecure: bool) -> None:
        """Refuse a port that other machines reach without encryption.

        Args:
            key: the setting, for the message.
            bind: host:port.
            insecure: whether the person says that the network is trusted.

        Raises:
            ConfigError: `key`, or token_keys, which no network is trusted with.
        """
        if self.encrypted or is_loopback(bind.rpartition(":")[0]):
            return
        if self.token_keys:
            raise _wrong(
                "token_keys", f"tokens would come to {bind} unencrypted; add --tls-cert, --tls-key and --tls-ca"
            )
        if not insecure:
            raise _wrong(
                key,
                f"{bind!r} can be reached from other machines and traffic is not encrypted; give --tls-cert, --tls-key "
                "and --tls-ca (psctl certs makes them), bind to 127.0.0.1, or pass --insecure inside a network that "
                "you trust",
            )


PLAIN = Security()
"""No encryption and no identities."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_secret(path: str, key: str, *, private: bool) -> bytes:
    """Read a small file; a private one only if others cannot.

    As PostgreSQL has it: 0600, or root's own and readable for our group (0640), as Kubernetes mounts secrets.

    Raises:
        ConfigError: `key`: it is missing, too large, or too open.
    """
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise _wrong(key, f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise _wrong(key, f"{path} is larger than 1 MiB")
    mode = stat.S_IMODE(status.st_mode)
    open_bits = 0o037 if status.st_uid == 0 and os.geteuid() != 0 else 0o077
    if private and mode & open_bits:
        raise _wrong(key, f"{path} has mode {mode:04o}: others can read it; chmod 600 {path}")
    return data


def _check_identity(who: Identity, role: Role | None, job: str, key: str) -> None:
    if role is not None and who.role is not role:
        raise _wrong(key, f"is of a {who.role} ({who.uri}); this process is a {role}")
    if job and who.job != job:
        raise _wrong(key, f"is of job {who.job!r} ({who.uri}), and this process of job {job!r}; is --job right?")


def _missing(name: str) -> ConfigError:
    return _wrong(
        _KEYS[name],
        f"is missing (--{_KEYS[name].replace('_', '-')} or {VARIABLES[name]}): certificate, key and CA belong together",
    )


def _wrong(key: str, problem: str) -> ConfigError:
    return ConfigError(f"{key}: {problem}", metadata={"key": key})
