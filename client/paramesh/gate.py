"""The door of a server: who calls, and whether they may.

    gate = Gate.of(security)                     # None: plain, everybody may
    server = grpc.aio.server(interceptors=[typed_errors(gate=gate)])
    caller()                                     # in a handler: the Identity, or None

`paramesh.status` asks at the beginning of each call and at each message of it; what may be done stands in
`paramesh.access`. An identity is read for each call: a connection's is 10 us away, and a cache by peer address would
outlive the connection that it belongs to.
"""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from typing import Any

from paramesh.access import HEALTH, check_call, check_message
from paramesh.credentials import FollowedKeys
from paramesh.errors import AccessDenied, ParameshError, refuse
from paramesh.identity import Identity
from paramesh.listening import is_local_peer
from paramesh.security import Security

__all__ = ["Gate", "caller"]

log = logging.getLogger(__name__)

SAY_S = 1.0
"""Between two lines about refused callers: a flood of them must not become a flood of lines."""

KNOWN = 4096
"""Tokens or names whose identity is remembered, a few hundred bytes each; then it begins anew."""

_caller: ContextVar[Identity | None] = ContextVar("paramesh_caller", default=None)


def caller() -> Identity | None:
    """Who makes the call that is being handled; None without security."""
    return _caller.get()


class Gate:
    """Knows callers by certificate, or by token if the settings have keys.

    Args:
        security: settings that authenticate.
    """

    def __init__(self, security: Security) -> None:
        self._encrypted = security.encrypted
        self._keys = FollowedKeys(security) if security.token_keys else None
        self._keys_version = 0
        self._by_token: dict[str, tuple[Identity, float]] = {}
        self._by_names: dict[tuple[bytes, ...], Identity | None] = {}
        self._said = 0.0
        self._unsaid = 0

    @classmethod
    def of(cls, security: Security) -> Gate | None:
        """The gate of these settings; None if everybody may."""
        return cls(security) if security.authenticates else None

    def enter(self, path: str, context: Any) -> Identity | None:
        """Let a call in; None: it needs no identity.

        Raises:
            AccessDenied: UNAUTHENTICATED or PERMISSION_DENIED.
        """
        if path in HEALTH:
            return None
        try:
            identity = self._by_certificate(context) if self._keys is None else self._from_token(self._keys, context)
            check_call(identity, path)
        except AccessDenied as error:
            self._say(error, path, context)
            raise
        _caller.set(identity)
        return identity

    def check(self, identity: Identity | None, path: str, message: Any, context: Any) -> None:
        """Look at one request of a call.

        Raises:
            AccessDenied: PERMISSION_DENIED, it is in somebody else's name.
        """
        if identity is None:
            return
        try:
            check_message(identity, path, message)
        except AccessDenied as error:
            self._say(error, path, context)
            raise

    def _by_certificate(self, context: Any) -> Identity:
        names = tuple(context.auth_context().get("peer_uri", ()))
        if names not in self._by_names:
            if len(self._by_names) >= KNOWN:
                self._by_names.clear()
            found = [Identity.from_uri(name.decode("utf-8", "replace")) for name in names]
            own = [who for who in found if who is not None]
            self._by_names[names] = own[0] if len(own) == 1 else None
        identity = self._by_names[names]
        if identity is None:
            raise refuse(
                "UNAUTHENTICATED",
                "the certificate must have exactly one URI spiffe://paramesh/JOB/ROLE/NAME in its subject alternative "
                "names",
            )
        return identity

    def _from_token(self, followed: FollowedKeys, context: Any) -> Identity:
        if not self._encrypted and not is_local_peer(context.peer()):
            raise refuse("UNAUTHENTICATED", "a token over an unencrypted connection from another machine is not taken")
        given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str) or not given[0].startswith("Bearer "):
            raise refuse("UNAUTHENTICATED", "there is no token; give one in PARAMESH_TOKEN_FILE or --token-file")
        token, now, keys = given[0][len("Bearer ") :], time.time(), followed.now()
        if followed.version != self._keys_version:  # what an older key signed may be over
            self._keys_version = followed.version
            self._by_token.clear()
        identity, until = self._by_token.get(token, (None, 0.0))
        if identity is None or until <= now:
            identity, until = keys.verify(token, now)
            if len(self._by_token) >= KNOWN:
                self._by_token.clear()
            self._by_token[token] = identity, until
        return identity

    def _say(self, error: ParameshError, path: str, context: Any) -> None:
        """One line a second, with how many were left out; no token is in it."""
        now = time.monotonic()
        if now < self._said + SAY_S:
            self._unsaid += 1
            return
        log.warning(
            "access=refused reason=%s method=%s peer=%s before=%d: %s",
            error.reason, path, context.peer(), self._unsaid, ascii(str(error)),
        )  # fmt: skip
        self._said, self._unsaid = now, 0
