"""Signed, expiring tokens: the light alternative to certificates.

    keys = TokenKeys.read("token.keys")
    token = keys.sign(Identity("run-7", Role.WORKER, "host-a"), expires=time.time() + 3600)
    keys.verify(token, time.time())          # the Identity, or UNAUTHENTICATED

A token is `pm1.PAYLOAD.SIGNATURE`: base64url of the JSON {exp, job, kid, name, role}, and of its HMAC-SHA256.
Whoever verifies can sign: the keys are for coordinator, servers and the person who issues.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paramesh.errors import ConfigError, ParameshError, refuse
from paramesh.identity import Identity, Role

__all__ = ["LONGEST_S", "TokenKeys", "claimed"]

LONGEST_S = 24 * 3600
"""No token lives longer: there is no list of revoked ones, so a stolen one must end by itself."""

SKEW_S = 60
"""How far the clock of whoever signed may be ahead of the verifier's."""

LONGEST_TOKEN = 2048
"""Characters; a longer one is not decoded. Ours have some 250."""

KEY_BYTES = 32
"""As long as SHA-256's output; shorter ones weaken it, longer ones add nothing."""

PREFIX = "pm1"
"""The format; another one gets another prefix."""

_KID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FIELDS = {"exp": int, "job": str, "kid": str, "name": str, "role": str}


@dataclass(frozen=True)
class TokenKeys:
    """One or two signing keys by their ids; the first signs, both verify.

    Raises:
        ConfigError: token_keys: none, more than two, a short one or a strange id.
    """

    keys: Mapping[str, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= 2:
            raise _wrong_keys(f"holds {len(self.keys)} keys; give one, or two while they are rotated")
        for kid, key in self.keys.items():
            if not _KID.fullmatch(kid) or len(key) < KEY_BYTES:
                raise _wrong_keys(f"key {kid[:64]!r} needs an id of [A-Za-z0-9._-] and at least {KEY_BYTES} bytes")

    @classmethod
    def parse(cls, text: str) -> TokenKeys:
        """Read lines of `KID KEY`, the key in base64; lines of # are comments.

        Raises:
            ConfigError: token_keys: what is wrong, in which line; never the key itself.
        """
        keys: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or words[0] in keys:
                raise _wrong_keys(f"line {number} is not 'KID KEY' with an id of its own")
            try:
                keys[words[0]] = base64.b64decode(words[1], validate=True)
            except (binascii.Error, ValueError):
                raise _wrong_keys(f"the key in line {number} is not base64") from None
        return cls(keys)

    @classmethod
    def fresh(cls, older: TokenKeys | None = None) -> TokenKeys:
        """A new key in front, and the newest of the older ones behind it."""
        kept = list(older.keys.items())[:1] if older else []
        return cls(dict([(secrets.token_hex(4), secrets.token_bytes(KEY_BYTES)), *kept]))

    def text(self) -> str:
        """As `parse` reads it."""
        return "".join(f"{kid} {base64.b64encode(key).decode()}\n" for kid, key in self.keys.items())

    def sign(self, identity: Identity, expires: float) -> str:
        """A token for an identity, under the first key."""
        kid, key = next(iter(self.keys.items()))
        said = {"exp": int(expires), "job": identity.job, "kid": kid, "name": identity.name, "role": identity.role}
        payload = _encode(json.dumps(said, separators=(",", ":"), sort_keys=True).encode())
        return f"{PREFIX}.{payload}.{_encode(_mac(key, payload))}"

    def verify(self, token: str, now: float) -> tuple[Identity, float]:
        """Whose token it is, and until when.

        Raises:
            AccessDenied: UNAUTHENTICATED: malformed, signed with another key, expired, or too long-lived.
        """
        payload, signature, said = _parts(token)
        key = self.keys.get(said["kid"])
        # An unknown key costs the same as a wrong signature.
        right = hmac.compare_digest(_mac(key or b"\0" * KEY_BYTES, payload), signature)
        if key is None or not right:
            raise refuse("UNAUTHENTICATED", "the token is not signed with a key that is known here")
        if said["exp"] <= now:
            raise refuse("UNAUTHENTICATED", f"the token of {said['name'][:80]!r} has expired; issue another")
        if said["exp"] > now + LONGEST_S + SKEW_S:
            raise refuse("UNAUTHENTICATED", f"the token of {said['name'][:80]!r} is valid for more than 24 hours")
        return _identity(said), float(said["exp"])


def claimed(token: str) -> Identity:
    """Whose a token says it is; not verified: for a process that reads its own.

    Raises:
        AccessDenied: UNAUTHENTICATED: it is no token.
    """
    return _identity(_parts(token)[2])


def _parts(token: str) -> tuple[str, bytes, dict[str, Any]]:
    """Payload, signature and what the payload says."""
    words = token.split(".") if len(token) <= LONGEST_TOKEN else []
    if len(words) != 3 or words[0] != PREFIX:
        raise _malformed()
    try:
        said = json.loads(_decode(words[1]))
        signature = _decode(words[2])
    except (ValueError, RecursionError):
        raise _malformed() from None
    if not isinstance(said, dict) or said.keys() != _FIELDS.keys():
        raise _malformed()
    if any(type(said[name]) is not kind for name, kind in _FIELDS.items()):
        raise _malformed()
    return words[1], signature, said


def _identity(said: dict[str, Any]) -> Identity:
    if said["role"] not in set(Role):
        raise _malformed()
    try:
        return Identity(said["job"], Role(said["role"]), said["name"])
    except ParameshError:
        raise _malformed() from None


def _mac(key: bytes, payload: str) -> bytes:
    return hmac.digest(key, f"{PREFIX}.{payload}".encode(), hashlib.sha256)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """Canonical base64url only: one token has one spelling."""
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _encode(data) != text:
        raise ValueError("not canonical")
    return data


def _malformed() -> ParameshError:
    return refuse("UNAUTHENTICATED", "that is no token: it is pm1.PAYLOAD.SIGNATURE, as psctl tokens issue prints it")


def _wrong_keys(why: str) -> ConfigError:
    return ConfigError(f"token_keys: {why}", metadata={"key": "token_keys"})
