"""A channel that encrypts, carries a token, and takes up new certificates.

gRPC's own channel keeps the certificates that it was made with, through every reconnection. This one looks at each
call whether the files have changed: then calls go over a new channel, and the old one is closed with its last call. A
stream that is under way is not cut; it is on the new channel when it is opened again.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from paramesh.channel import grpc
from paramesh.credentials import Bearer, Followed
from paramesh.security import Security

__all__ = ["SecureChannel"]


class _Inner:
    """One of gRPC's channels, and how many calls are on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.calls = 0
        self.retired = False
        self.closing: asyncio.Future[None] | None = None

    def ended(self, _call: Any) -> None:
        """A call has ended; the last one of a retired channel closes it."""
        self.calls -= 1
        if self.retired and not self.calls:
            with contextlib.suppress(RuntimeError):  # the loop is over, and the channel with it
                self.closing = asyncio.ensure_future(self.channel.close())

    def retire(self) -> None:
        """No call will begin here any more."""
        self.retired = True
        self.calls += 1
        self.ended(None)


class _Callable:
    """A method of a stub: over whichever channel is current, with the token of now."""

    def __init__(self, owner: SecureChannel, kind: str, path: str, options: dict[str, Any]) -> None:
        self._owner = owner
        self._how = (kind, path, options)
        self._of: _Inner | None = None
        self._call: Any = None

    def __call__(self, *arguments: Any, metadata: Any = None, **options: Any) -> Any:
        inner = self._owner.current()
        if inner is not self._of:
            kind, path, settings = self._how
            self._of, self._call = inner, getattr(inner.channel, kind)(path, **settings)
        own = self._owner.bearer.metadata()
        call = self._call(*arguments, metadata=(*(metadata or ()), *own) if own else metadata, **options)
        inner.calls += 1
        call.add_done_callback(inner.ended)
        return call


class SecureChannel(grpc.aio.Channel):  # type: ignore[misc]
    """An asyncio channel to `host:port` under security settings; create it on the loop that uses it.

    Raises:
        ConfigError: a file cannot be used, or a token would go to another machine in the clear.
    """

    def __init__(self, address: str, options: list[tuple[str, int]], security: Security) -> None:
        security.check_dial(address)
        self._address = address
        self._options = options
        self._followed = Followed(security) if security.encrypted else None
        self._version = 0
        self._inner: _Inner | None = None
        self._retired: list[_Inner] = []
        self._closed = False
        self.bearer = Bearer(security)

    def current(self) -> _Inner:
        """The channel for a call that begins now."""
        if self._closed:
            raise grpc.aio.UsageError("the channel is closed")
        followed = self._followed
        if followed is not None:
            followed.material()
        version = 1 if followed is None else followed.version
        if self._inner is None or version != self._version:
            if self._inner is not None:
                self._inner.retire()
                self._retired = [old for old in self._retired if old.closing is None or not old.closing.done()]
                self._retired.append(self._inner)
            self._version = version
            self._inner = _Inner(self._open())
        return self._inner

    def _open(self) -> grpc.aio.Channel:
        if self._followed is None:
            return grpc.aio.insecure_channel(self._address, options=self._options)
        return grpc.aio.secure_channel(self._address, self._followed.channel_credentials(), options=self._options)

    def unary_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """As gRPC's."""
        return self._method("unary_unary", method, arguments, options)

    def unary_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """As gRPC's."""
        return self._method("unary_stream", method, arguments, options)

    def stream_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """As gRPC's."""
        return self._method("stream_unary", method, arguments, options)

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """As gRPC's."""
        return self._method("stream_stream", method, arguments, options)

    def _method(self, kind: str, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> _Callable:
        named = dict(zip(("request_serializer", "response_deserializer"), arguments, strict=False))
        return _Callable(self, kind, method, {**named, **options})

    async def close(self, grace: float | None = None) -> None:
        """Close it, and what is left of older ones."""
        self._closed = True
        inner, self._inner = self._inner, None
        for one in [*self._retired, *([inner] if inner is not None else [])]:
            await one.channel.close(grace)
        self._retired = []

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """As gRPC's, of the current channel."""
        return self.current().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """As gRPC's, of the current channel."""
        await self.current().channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """As gRPC's, of the current channel."""
        await self.current().channel.channel_ready()

    async def __aenter__(self) -> SecureChannel:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
