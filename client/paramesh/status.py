"""The one door between Paramesh errors and gRPC statuses.

Out: `typed_errors()` is an interceptor for aio servers; servicers simply raise. A
`ParameshError` leaves as its status with `google.rpc.ErrorInfo{reason, "paramesh",
metadata}`; anything else leaves as INTERNAL with an opaque id, and its traceback goes to
the log (grpcio would send the exception's text to the client).

In: `from_rpc_error(error)` gives the typed error back.
"""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf.message import DecodeError

from paramesh.channel import grpc
from paramesh.errors import REASONS, ParameshError, refuse
from paramesh.gate import Gate
from paramesh.v1 import types_pb2 as pb

log = logging.getLogger(__name__)

DOMAIN = "paramesh"

_DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_BROKEN = ("Internal error from Core", "Received RST_STREAM", "Stream removed")
"""What grpcio says, with INTERNAL or UNKNOWN, of a connection that was reset under a stream."""

_MESSAGE_LIMIT = 700
"""Characters. Errors stay under 1 KiB: they travel in HTTP/2 trailers."""


def _internal(exc: BaseException, where: str) -> ParameshError:
    error_id = secrets.token_hex(6)
    log.error("internal error id=%s in=%s", error_id, where, exc_info=exc)
    return refuse("INTERNAL", f"internal error {error_id}; the server's log has the whole story", id=error_id)


def _details(error: ParameshError) -> bytes:
    from google.protobuf import any_pb2
    from google.rpc import error_details_pb2, status_pb2

    metadata = {key: value[:200] for key, value in list(error.metadata.items())[:8]}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    status = status_pb2.Status(code=error.code, message=str(error)[:_MESSAGE_LIMIT], details=[detail])
    return bytes(status.SerializeToString())


async def abort(context: grpc.aio.ServicerContext, error: ParameshError) -> None:
    """End a call with a typed error; raises, as gRPC's own abort does."""
    await context.abort(
        _CODES[error.code], str(error)[:_MESSAGE_LIMIT], trailing_metadata=((_DETAILS_KEY, _details(error)),)
    )


class _TypedErrors(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every coroutine or async-generator handler; others pass through."""

    def __init__(self, on_error: Callable[[str], None] | None, gate: Gate | None):
        self._on_error = on_error
        self._gate = gate

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        if handler.unary_unary:
            make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        elif handler.unary_stream:
            make, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        elif handler.stream_unary:
            make, behaviour = grpc.stream_unary_rpc_method_handler, handler.stream_unary
        else:
            make, behaviour = grpc.stream_stream_rpc_method_handler, handler.stream_stream
        # Decoded here and not by grpcio, which answers undecodable bytes of a single request with
        # UNKNOWN and the exception's text.
        read = _reader(handler.request_deserializer, handler.request_streaming)
        wrapped = self._wrap(behaviour, details.method, self._guarded(read, details.method))
        return make(wrapped, None, handler.response_serializer)

    def _guarded(self, read: Callable[[Any, _Check], Any], method: str) -> Callable[[Any, Any], Any]:
        """Reads requests of callers that may make this call, in their own name."""
        gate = self._gate
        if gate is None:
            return lambda request, context: read(request, _anything)

        def enter(request: Any, context: grpc.aio.ServicerContext) -> Any:
            identity = gate.enter(method, context)
            return read(request, lambda message: gate.check(identity, method, message, context))

        return enter

    def _wrap(self, behaviour: Any, method: str, read: Callable[[Any, Any], Any]) -> Any:
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
                try:
                    async for response in behaviour(read(request, context), context):
                        yield response
                except Exception as exc:
                    await self._leave(exc, context, method)

            return stream
        if inspect.iscoroutinefunction(behaviour):

            async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
                try:
                    return await behaviour(read(request, context), context)
                except Exception as exc:
                    await self._leave(exc, context, method)

            return unary

        def other(request: Any, context: grpc.aio.ServicerContext) -> Any:
            return behaviour(read(request, context), context)

        return other

    async def _leave(self, exc: Exception, context: grpc.aio.ServicerContext, method: str) -> None:
        if isinstance(exc, grpc.aio.AbortError | grpc.aio.UsageError):
            raise exc
        error = exc if isinstance(exc, ParameshError) else _internal(exc, method)
        if self._on_error is not None:
            self._on_error(error.reason)
        await abort(context, error)


_Check = Callable[[Any], None]
"""Refuses a message by raising."""


def _anything(_message: Any) -> None:
    """Without a gate every message may come."""


def _reader(deserialize: Callable[[bytes], Any] | None, streaming: bool) -> Callable[[Any, _Check], Any]:
    """Turns raw requests into messages that were looked at, one or a stream of them; FORMAT if they are none."""

    def one(data: bytes, check: _Check) -> Any:
        if deserialize is None:
            message: Any = data
        else:
            try:
                message = deserialize(data)
            except DecodeError as exc:
                raise refuse("FORMAT", f"{len(data)} bytes that are no such message: {exc}") from None
        check(message)
        return message

    async def many(requests: AsyncIterator[bytes], check: _Check) -> AsyncIterator[Any]:
        async for data in requests:
            yield one(data, check)

    return many if streaming else one


def typed_errors(on_error: Callable[[str], None] | None = None, gate: Gate | None = None) -> grpc.aio.ServerInterceptor:
    """The interceptor for aio servers.

    Args:
        on_error: called with the reason of every refused call, for metrics.
        gate: decides who may call what; None: everybody may.
    """
    return _TypedErrors(on_error, gate)


def from_rpc_error(exc: grpc.RpcError, peer: str = "") -> ParameshError:
    """The typed error that a failed call carries.

    A status without our ErrorInfo comes from gRPC itself: UNAVAILABLE becomes UNREACHABLE,
    DEADLINE_EXCEEDED becomes DEADLINE, a method that is not there UNIMPLEMENTED, the rest
    INTERNAL.
    """
    from google.rpc import error_details_pb2, status_pb2

    trailing = exc.trailing_metadata() or ()
    for key, value in trailing:
        if key != _DETAILS_KEY:
            continue
        status = status_pb2.Status.FromString(value)
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == DOMAIN and info.reason in REASONS:
                return refuse(info.reason, status.message, **dict(info.metadata))
    return _from_library(exc.code(), exc.details() or "", peer)


def _from_library(code: grpc.StatusCode, details: str, peer: str) -> ParameshError:
    where = f" at {peer}" if peer else ""
    broken = code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and details.startswith(_BROKEN)
    if broken or code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return refuse("UNREACHABLE", f"no answer{where}: {details[:300]}", peer=peer)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return refuse("DEADLINE", f"no answer{where} within the deadline", peer=peer)
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return refuse("UNIMPLEMENTED", f"the process{where} does not serve this call: {details[:200]}", peer=peer)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return refuse("QUOTA", f"refused{where}: {details[:300]}", peer=peer)
    return refuse("INTERNAL", f"{code.name}{where}: {details[:300]}", peer=peer, code=code.name)


def error_detail(error: ParameshError) -> pb.ErrorDetail:
    """The error inside an answer that covers several partitions."""
    return pb.ErrorDetail(
        code=error.code, reason=error.reason, message=str(error)[:_MESSAGE_LIMIT], metadata=error.metadata
    )


def detail_of(exc: Exception, where: str) -> pb.ErrorDetail:
    """As `error_detail`, for any exception: an unexpected one is logged under an id."""
    return error_detail(exc if isinstance(exc, ParameshError) else _internal(exc, where))


def from_detail(detail: pb.ErrorDetail) -> ParameshError:
    """The typed error of a partition's refusal."""
    reason = detail.reason if detail.reason in REASONS else "INTERNAL"
    return refuse(reason, detail.message, **dict(detail.metadata))
