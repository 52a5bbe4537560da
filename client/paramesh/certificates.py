"""Certificates: reading those that a process is given, and a development CA.

    make_authority(folder, days=365)
    files = issue(folder, Identity("run-7", Role.SERVER, "s0"), ["10.0.0.2", "s0.example"], days=90)
    said = read_certificate(files.cert.read_bytes())      # who, until when

The CA here is for development and small clusters: its key is a file. In production any issuer will do
(cert-manager, Vault, step-ca) that puts `spiffe://paramesh/JOB/ROLE/NAME` into the subject alternative names.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from paramesh.errors import ConfigError
from paramesh.identity import Identity, Role

__all__ = ["AUTHORITY", "Certificate", "Files", "check_pair", "issue", "make_authority", "read_certificate", "write"]

AUTHORITY = "ca.pem"
"""The CA's certificate in its folder; `ca.key` beside it signs."""

BACKDATED = datetime.timedelta(minutes=5)
"""A certificate is valid a little before it was made: other machines' clocks may be behind."""

SERVES = frozenset({Role.SERVER, Role.COORDINATOR})
"""Only these may be dialled: a worker's certificate cannot stand for a server's at its host."""


@dataclass(frozen=True)
class Certificate:
    """What a certificate says."""

    identity: Identity | None
    """None: it names no, or more than one, process of Paramesh."""
    not_after: datetime.datetime

    @property
    def expired(self) -> bool:
        """Whether it is over."""
        return self.not_after <= datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Files:
    """Where a certificate and its key were written."""

    cert: Path
    key: Path


def read_certificate(pem: bytes) -> Certificate:
    """Read the first certificate of a PEM file.

    Raises:
        ValueError: it is none.
    """
    cert = x509.load_pem_x509_certificates(pem)[0]
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    found = [who for who in map(Identity.from_uri, uris) if who is not None]
    return Certificate(found[0] if len(found) == 1 else None, cert.not_valid_after_utc)


def check_pair(cert: bytes, key: bytes, ca: bytes) -> None:
    """Check that three PEM files belong together as far as that can be told without a handshake.

    Raises:
        ValueError: one is no PEM of its kind, or the key is of another certificate.
    """
    if not x509.load_pem_x509_certificates(ca):
        raise ValueError("the CA file holds no certificate")
    if not key and not cert:
        return
    public = x509.load_pem_x509_certificates(cert)[0].public_key()
    if _public(public) != _public(_load_key(key).public_key()):
        raise ValueError("the key is not the certificate's")


def _load_key(pem: bytes) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, None)
    except TypeError:
        raise ValueError("the key is encrypted; give one without a passphrase, mode 0600") from None
    except UnsupportedAlgorithm as error:
        raise ValueError(f"the key is of an unknown kind: {error}") from None


def _public(key: object) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_bytes(serialization.Encoding.DER, form))  # type: ignore[attr-defined]


def make_authority(folder: Path, days: int) -> Files:
    """Make a CA in a folder, 0700.

    Raises:
        ConfigError: there is one, or the folder cannot be written.
    """
    files = Files(folder / AUTHORITY, folder / "ca.key")
    if files.key.exists() or files.cert.exists():
        raise _wrong("dir", f"{folder} holds a CA; what it issued would be worthless with another one")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Paramesh development CA")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    cert = (
        _unsigned(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _save(files, cert, key)
    return files


def issue(folder: Path, identity: Identity, hosts: Sequence[str], days: float) -> Files:
    """Issue a certificate from the CA in a folder, into it: ROLE-NAME.pem and ROLE-NAME.key.

    Args:
        folder: of `make_authority`.
        identity: whose.
        hosts: names and addresses at which it is dialled; needed by servers and coordinators.
        days: how long it is valid; fractions too.

    Raises:
        ConfigError: dir: there is no CA; host: one is missing or impossible.
    """
    if identity.role in SERVES and not hosts:
        raise _wrong("host", f"is needed for a {identity.role}: the name or address at which others dial it")
    authority, signer = _authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name[:64])])
    names = [x509.UniformResourceIdentifier(identity.uri), *map(_host, hosts)]
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if identity.role in SERVES:
        uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
    cert = (
        _unsigned(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    stem = f"{identity.role}-{identity.name}"
    files = Files(folder / f"{stem}.pem", folder / f"{stem}.key")
    _save(files, cert, key)
    return files


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        cert = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
        key = _load_key((folder / "ca.key").read_bytes())
    except (OSError, ValueError) as error:
        raise _wrong("dir", f"{folder} holds no CA ({error}); make one: psctl certs init {folder}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _wrong("dir", f"the CA in {folder} was not made by psctl certs init")
    return cert, key


def _unsigned(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    try:
        end = now + datetime.timedelta(days=days)
        builder = x509.CertificateBuilder().not_valid_before(min(now - BACKDATED, end - BACKDATED))
        builder = builder.not_valid_after(end)
    except (ValueError, OverflowError) as error:
        raise _wrong("days", f"{days} days are impossible: {error}") from None
    builder = builder.subject_name(subject).issuer_name(issuer).public_key(public)
    return builder.serial_number(x509.random_serial_number())


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise _wrong("host", f"{host[:80]!r} is neither an address nor a name in ASCII") from None


def _save(files: Files, cert: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write(files.key, private)
    write(files.cert, cert.public_bytes(serialization.Encoding.PEM), mode=0o644)


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file in one step, so that whoever reads it sees the old or the new one.

    Raises:
        ConfigError: dir: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(name, mode)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise _wrong("dir", f"{path} cannot be written: {error.strerror or error}") from error


def _wrong(key: str, problem: str) -> ConfigError:
    return ConfigError(f"{key}: {problem}", metadata={"key": key})
