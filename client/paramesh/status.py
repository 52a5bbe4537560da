"""The one door between Paramesh errors and gRPC statuses.

Out: `typed_errors()` is an interceptor for aio servers; servicers simply raise. A
`ParameshError` leaves as its status with `google.rpc.ErrorInfo{reason, "paramesh",
metadata}`; anything else leaves as INTERNAL with an opaque id, and its traceback goes to
the log (grpcio would send the exception's text to the client).

In: `from_rpc_error(error)` gives the typed error back.

The same interceptor is where calls are let in (`admission`), and where connections that send what
is no request are held back (`offenders`): it alone sees every call before its request is read.
"""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf.message import DecodeError

from paramesh.admission import Admission, Call, key_of
from paramesh.channel import grpc
from paramesh.errors import REASONS, ParameshError, refuse
from paramesh.gate import Gate
from paramesh.offenders import OFFENCES
from paramesh.v1 import types_pb2 as pb

log = logging.getLogger(__name__)

DOMAIN = "paramesh"

_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""How gRPC itself spells when to repeat; for clients that are not ours."""

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
    trailing: tuple[tuple[str, str | bytes], ...] = ((_DETAILS_KEY, _details(error)),)
    if "retry_after_ms" in error.metadata:
        trailing += ((_PUSHBACK_KEY, error.metadata["retry_after_ms"]),)
    await context.abort(_CODES[error.code], str(error)[:_MESSAGE_LIMIT], trailing_metadata=trailing)


_Check = Callable[[Any], None]
"""Refuses a message by raising."""

_Read = Callable[[Any, Any, Call, _Check], Awaitable[Any]]
"""(raw request or requests, context, call, check) -> the handler's first argument."""


def _anything(_message: Any) -> None:
    """Without a gate every message may come."""


class _TypedErrors(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every coroutine or async-generator handler; others pass through."""

    def __init__(self, on_error: Callable[[str], None] | None, gate: Gate | None, admission: Admission | None):
        self._on_error = on_error
        self._gate = gate
        self._admission = admission

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        if not (inspect.isasyncgenfunction(behaviour) or inspect.iscoroutinefunction(behaviour)):
            return handler
        # Served as a stream even if it is a single request: grpcio would read that one by itself, for ever and
        # before anybody is asked. On the wire they are the same.
        gated = self._admission is not None and bool(key_of(details.method))
        streamed = handler.request_streaming or gated
        make = _MAKERS[bool(streamed), bool(handler.response_streaming)]
        # Decoded here and not by grpcio, which answers undecodable bytes of a single request with
        # UNKNOWN and the exception's text.
        read = self._reader(handler.request_deserializer, handler.request_streaming, streamed)
        return make(self._wrap(behaviour, details.method, read), None, handler.response_serializer)

    def _wrap(self, behaviour: Any, method: str, read: _Read) -> Any:
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
                call = Call("")
                try:
                    check, call = self._known(method, context), self._enter(method)
                    async for response in behaviour(await read(request, context, call, check), context):
                        yield response
                except Exception as exc:
                    await self._leave(exc, context, method, call)
                finally:
                    self._left(call)

            return stream

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
            call = Call("")
            try:
                check, call = self._known(method, context), self._enter(method)
                return await behaviour(await read(request, context, call, check), context)
            except Exception as exc:
                await self._leave(exc, context, method, call)
            finally:
                self._left(call)

        return unary

    def _known(self, method: str, context: grpc.aio.ServicerContext) -> _Check:
        """Who calls may do so; what looks at each message, which must be in the caller's own name."""
        gate = self._gate
        if gate is None:
            return _anything
        identity = gate.enter(method, context)
        return lambda message: gate.check(identity, method, message, context)

    def _enter(self, method: str) -> Call:
        return Call("") if self._admission is None else self._admission.enter(method)

    def _left(self, call: Call) -> None:
        if self._admission is not None:
            self._admission.leave(call)

    async def _leave(self, exc: Exception, context: grpc.aio.ServicerContext, method: str, call: Call) -> None:
        if isinstance(exc, grpc.aio.AbortError | grpc.aio.UsageError):
            raise exc
        error = exc if isinstance(exc, ParameshError) else _internal(exc, method)
        if self._on_error is not None:
            self._on_error(error.reason)
        self._left(call)  # whoever is held back holds nobody up
        if self._admission is not None and error.reason in OFFENCES:
            await self._admission.offenders.offended(context.peer())
        await abort(context, error)

    def _reader(self, deserialize: Callable[[bytes], Any] | None, streaming: bool, streamed: bool) -> _Read:
        """Turns raw requests into messages, one or a stream of them; FORMAT if they are none."""

        async def one(data: Any, context: Any, call: Call, check: _Check) -> Any:
            request = _decoded(deserialize, data, check)
            self._well_formed(context)
            return request

        async def single(requests: AsyncIterator[bytes], context: Any, call: Call, check: _Check) -> Any:
            request = _decoded(deserialize, await self._first(requests, call), check)
            self._well_formed(context)
            assert self._admission is not None
            self._admission.was_read(call)
            return request

        async def many(requests: AsyncIterator[bytes], context: Any, call: Call, check: _Check) -> Any:
            return self._messages(requests, deserialize, context, call, check)

        if streaming:
            return many
        return single if streamed else one

    async def _first(self, requests: AsyncIterator[bytes], call: Call) -> bytes:
        assert self._admission is not None
        try:
            data: bytes = await self._admission.read(call, aiter(requests))
        except StopAsyncIteration:
            # None was sent, or gRPC has refused one that is too large and says so itself.
            raise refuse("FORMAT", "the call brought no message") from None
        return data

    async def _messages(
        self,
        requests: AsyncIterator[bytes],
        deserialize: Callable[[bytes], Any] | None,
        context: Any,
        call: Call,
        check: _Check,
    ) -> AsyncIterator[Any]:
        stream, known = aiter(requests), False
        while True:
            try:
                data = await anext(stream) if self._admission is None else await self._admission.read(call, stream)
            except StopAsyncIteration:
                break
            message = _decoded(deserialize, data, check)
            if not known:
                known = True
                self._well_formed(context)
            yield message
        if call.service and not known:
            raise refuse("FORMAT", "the call brought no message")
        if self._admission is not None:
            self._admission.was_read(call)

    def _well_formed(self, context: Any) -> None:
        if self._admission is not None and self._admission.offenders.watching:
            self._admission.offenders.forgive(context.peer())


_MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""(request is a stream, response is a stream) -> what makes the handler."""


def _decoded(deserialize: Callable[[bytes], Any] | None, data: bytes, check: _Check) -> Any:
    if deserialize is None:
        message: Any = data
    else:
        try:
            message = deserialize(data)
        except DecodeError as exc:
            raise refuse("FORMAT", f"{len(data)} bytes that are no such message: {exc}") from None
    check(message)
    return message


def typed_errors(
    on_error: Callable[[str], None] | None = None, gate: Gate | None = None, admission: Admission | None = None
) -> grpc.aio.ServerInterceptor:
    """The interceptor for aio servers.

    Args:
        on_error: called with the reason of every refused call, for metrics.
        gate: decides who may call what; None: everybody may.
        admission: counts what is under way; None: there is no bound.
    """
    return _TypedErrors(on_error, gate, admission)


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
