"""Security settings as gRPC takes them, taken up anew when the files change.

    port = server.add_secure_port(bind, server_credentials(security))
    followed = Followed(security)
    followed.version                       # raised when the files have changed
    followed.channel_credentials()
    bearer = Bearer(security)              # the metadata of a call, with the token of now

Files are looked at once a second, when something asks: a server at each handshake, a channel at each call. Half of a
rotation (a new certificate beside the old key) is not taken up; the old ones hold until the pair fits.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from paramesh.channel import grpc
from paramesh.errors import ConfigError
from paramesh.security import Security
from paramesh.tokens import TokenKeys

__all__ = ["Bearer", "Followed", "FollowedKeys", "server_credentials"]

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks at the files. A look is three calls of stat(), some 5 us; once a second they cost nothing."""

TOKEN_S = 3600.0
"""Life of a token that a server or coordinator signs for itself; renewed after half of it."""

Stamp = tuple[tuple[int, int, int], ...]
"""Of each file: inode, time of change, length. A secret that Kubernetes swaps by a symlink changes the inode."""


class _Files:
    """Whether files have changed since they were last read whole."""

    def __init__(self, *paths: str) -> None:
        self._paths = [path for path in paths if path]
        self._looked = time.monotonic()
        self.stamp = self.look()

    def look(self) -> Stamp:
        """What stat() says of each; of one that is not there nothing."""
        found = []
        for path in self._paths:
            try:
                status = os.stat(path)
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)

    def due(self) -> bool:
        """Whether it is time for a look."""
        now = time.monotonic()
        if now < self._looked + LOOK_S:
            return False
        self._looked = now
        return True


class Followed:
    """Certificate, key and CA as they are now.

    Args:
        security: with at least a CA.
        level: at which a change is logged; a process has one port or two, and a channel to each peer.

    Raises:
        ConfigError: they cannot be used.
    """

    def __init__(self, security: Security, level: int = logging.DEBUG) -> None:
        self._security = security
        self._level = level
        self._lock = threading.Lock()
        """Handshakes ask from gRPC's threads."""
        self._files = _Files(security.cert, security.key, security.ca)
        self.version = 1
        """Of what `material` gives; raised at each change."""
        self._material = security.read_files()
        self._refused: Stamp = ()

    def material(self) -> tuple[bytes, bytes, bytes]:
        """Certificate, key, CA; newer ones if the files have changed and fit together."""
        with self._lock:
            if self._files.due():
                self._take_up(self._files.look())
            return self._material

    def _take_up(self, stamp: Stamp) -> None:
        if stamp in (self._files.stamp, self._refused):
            return
        from paramesh.certificates import check_pair

        try:
            material = self._security.read_files()
            check_pair(*material)
        except (ConfigError, ValueError) as error:
            # Said once for each state of the files: the second half of a rotation may come at any moment.
            self._refused = stamp
            log.warning("certificates=kept the new files are not used yet: %s", error)
            return
        self._files.stamp, self._material = stamp, material
        self.version += 1
        log.log(self._level, "certificates=renewed version=%d file=%s", self.version, self._security.cert)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel made now: gRPC's channels keep what they were made with."""
        cert, key, ca = self.material()
        return grpc.ssl_channel_credentials(ca, key or None, cert or None)


def server_credentials(security: Security, on_handshake: Callable[[], None] = lambda: None) -> grpc.ServerCredentials:
    """Credentials of a port; every handshake uses the files of now.

    Args:
        security: certificate, key and CA.
        on_handshake: called at the beginning of each, from one of gRPC's threads.
    """
    followed = Followed(security, logging.INFO)
    last = followed.version

    def configuration() -> grpc.ServerCertificateConfiguration:
        cert, key, ca = followed.material()
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal last
        on_handshake()
        followed.material()
        if followed.version == last:
            return None
        last = followed.version
        return configuration()

    # With tokens callers have no certificate: gRPC asks all for one, or none.
    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, not security.token_keys)


class FollowedKeys:
    """The keys of tokens as they are now.

    Args:
        security: with `token_keys`.
    """

    def __init__(self, security: Security) -> None:
        self._security = security
        self._files = _Files(security.token_keys)
        self._keys = security.read_keys()
        self.version = 1
        """Raised at each change."""

    def now(self) -> TokenKeys:
        """The keys; the old ones while the new file is not right."""
        if self._files.due() and (stamp := self._files.look()) != self._files.stamp:
            self._files.stamp = stamp
            try:
                self._keys = self._security.read_keys()
            except ConfigError as error:
                log.warning("token_keys=kept the new file is not used: %s", error)
            else:
                self.version += 1
                log.info("token_keys=renewed keys=%s", ",".join(self._keys.keys))
        return self._keys


class Bearer:
    """The metadata that carries a token; empty without one."""

    def __init__(self, security: Security) -> None:
        self._security = security
        self._files = _Files(security.token_file)
        self._keys = FollowedKeys(security) if security.signs_as is not None and security.token_keys else None
        self._signed_until = 0.0
        self._signed_with = 0
        self._metadata: tuple[tuple[str, str], ...] = ()
        if self._keys is None and security.bears_token:
            self._metadata = _authorization(security.read_token())

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of a call that begins now."""
        if self._keys is not None:
            self._sign(self._keys)
        elif self._security.token_file and self._files.due() and (stamp := self._files.look()) != self._files.stamp:
            try:
                self._metadata = _authorization(self._security.read_token())
                self._files.stamp = stamp
            except ConfigError as error:
                log.warning("token=kept the new file is not used: %s", error)
        return self._metadata

    def _sign(self, followed: FollowedKeys) -> None:
        """A server or coordinator has the keys, and needs nobody to issue it a token."""
        keys, now = followed.now(), time.time()
        if now < self._signed_until and followed.version == self._signed_with:
            return
        assert self._security.signs_as is not None
        self._metadata = _authorization(keys.sign(self._security.signs_as, now + TOKEN_S))
        self._signed_until, self._signed_with = now + TOKEN_S / 2, followed.version


def _authorization(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)
