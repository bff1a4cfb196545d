"""What happens around every call: authenticate the peer, read its request, answer errors with a status.

No method is served without it, health included: services are added through `AuthenticatedCalls.on`, which wraps each
handler once. (gRPC's interceptors see metadata and not the peer.) The certificate is judged on each call: an open
connection outlives a certificate, a CA and a revocation.

A unary method is served as a stream of requests of which one is read. On the wire the two are the same; but so the
caller is authenticated before a byte of its request is read, and one that sends its request slowly, or never, is ended
by us: gRPC's own unary handler would wait without end.

A call that streams is judged again whenever it is about to send something, and has a count of its own: long streams do
not take the place of calls. It is ended like any other call, with a status.

Nothing ends a call whose answer its caller never takes, other than the age of its connection. So what a workload may
have is a number of calls that are not over; with all of them stuck it stands in nobody's way but its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError

from carnet.errors import CarnetError
from carnet_broker.core.workload import UnauthenticatedError, Workload
from carnet_broker.edges.grpc.status import (
    NoSuchMethodError,
    SlowReaderError,
    SlowRequestError,
    status_of_error,
)
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError

__all__ = ["AuthContext", "AuthenticatedCalls", "CallEvents", "CallLimits", "LongCall", "caller", "takes_long_call"]

AuthContext = Mapping[str, Sequence[bytes]]
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # Quoted: only the stubs know its parameters.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

Method = TypeVar("Method")
_CALLER: Final[ContextVar[Workload]] = ContextVar("carnet_broker_caller")
_CALL_AGAIN_AFTER: Final = timedelta(milliseconds=250)
_ABORT_WITHIN: Final = 1.0
"""Seconds; a status waits behind what the caller does not take, and is on its way whether we wait for it or not."""


def caller() -> Workload:
    """Return the workload behind the call that is being served. Raises `LookupError` outside of one."""
    return _CALLER.get()


def takes_long_call(method: Method) -> Method:
    """Mark a method of a service with a stream both ways: it is given a `LongCall` in place of its requests."""
    method.takes_long_call = True  # type: ignore[attr-defined] # a function has room for it
    return method


class CallEvents(Protocol):
    """Who wants to hear of calls: logs and metrics."""

    def answered(self, method: str, seconds: float) -> None:
        """Tell that a call was answered well, and how long that took."""

    def refused(self, method: str, error: CarnetError, workload: Workload | None) -> None:
        """Tell that a call was answered with an error that was meant."""

    def failed(self, method: str, error: Exception) -> None:
        """Tell that a call ended in an error that nobody meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """The bounds of the calls of one SPIFFE ID, on one listener."""

    read_within: timedelta
    """How long a caller may take to send its request, or the first of a stream."""
    write_within: timedelta
    """How long a caller of a stream may take no answer."""
    calls_in_flight: int
    streams: int


class LongCall:
    """A stream of requests and responses, as its service sees it. All messages are bytes."""

    def __init__(
        self,
        context: Context,
        authenticate: Callable[[], Workload],
        *,
        read_within: float,
        write_within: float,
    ) -> None:
        self._context = context
        self._authenticate = authenticate
        self._read_within = read_within
        self._write_within = write_within

    def workload(self) -> Workload:
        """Return who calls, judged anew. Raises `UnauthenticatedError`."""
        return self._authenticate()

    async def first(self) -> bytes:
        """Return the first request. Raises `SlowRequestError`."""
        try:
            async with asyncio.timeout(self._read_within):
                request = await self.next()
        except TimeoutError as error:
            msg = f"the request did not come within {self._read_within} s"
            raise SlowRequestError(msg) from error
        if request is None:
            msg = "the call ended before its request"
            raise SlowRequestError(msg)
        return request

    async def next(self) -> bytes | None:
        """Return the next request, None where the caller sends no more."""
        request = await self._context.read()
        return None if request is grpc.aio.EOF else cast("bytes", request)

    async def write(self, response: bytes) -> None:
        """Send `response`. Raises `SlowReaderError` where the caller does not take what was sent."""
        try:
            async with asyncio.timeout(self._write_within):
                await self._context.write(response)
        except TimeoutError as error:
            msg = f"the caller has taken nothing for {self._write_within} s"
            raise SlowReaderError(msg) from error


class AuthenticatedCalls:
    """Wraps methods that are unary, that answer with a stream, or that have a stream both ways."""

    def __init__(
        self,
        authenticate: Callable[[AuthContext], Workload],
        events: CallEvents,
        *,
        limits: CallLimits,
        record: Callable[[CarnetError, Workload | None, str], None],
    ) -> None:
        """Wire the parts. `authenticate` raises `UnauthenticatedError`.

        `record` puts a call that is refused here on the audit record, with the peer's address. What a service refuses,
        it records itself: it knows what was asked for. A stream is recorded here also when it is ended later.
        """
        self._authenticate = authenticate
        self._record = record
        self._events = events
        self._limits = limits
        self._read_within = limits.read_within.total_seconds()
        self._in_flight: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()

    def on(self, server: grpc.aio.Server) -> grpc.aio.Server:
        """Return what the generated ``add_..._to_server`` take for a server: it wraps, and adds to `server`."""
        return cast("grpc.aio.Server", _Registration(self, server))

    def wrap(self, method: str, handler: Handler) -> Handler | None:
        """Return the handler of a method, wrapped; None for one of a kind that is not served."""
        # The stubs know the form of the synchronous server only.
        if handler.unary_unary is not None:
            return self._unary(method, handler, cast("Callable[[Any, Context], Awaitable[Any]]", handler.unary_unary))
        if inspect.isasyncgenfunction(handler.unary_stream):
            serve = cast("Callable[[Any, Context], AsyncIterator[Any]]", handler.unary_stream)
            return self._stream(method, self._answering(handler, serve))
        if getattr(handler.stream_stream, "takes_long_call", False):
            return self._stream(method, cast("Callable[[LongCall, Context], Awaitable[None]]", handler.stream_stream))
        return None

    def _unary(self, method: str, handler: Handler, serve: Callable[[Any, Context], Awaitable[Any]]) -> Handler:
        parse = cast("Callable[[bytes], Any]", handler.request_deserializer)

        async def answer(_: object, context: Context) -> Any:  # noqa: ANN401 - a message of any method
            started = perf_counter()
            is_served = False
            try:
                workload = self._authenticate(cast("AuthContext", context.auth_context()))
                _CALLER.set(workload)
                self._begin(self._in_flight, self._limits.calls_in_flight, str(workload.spiffe_id), context)
                request = await self._read(context, parse)
                is_served = True
                response = await serve(request, context)
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status and no detail
                if isinstance(error, CarnetError) and not is_served:
                    self._record(error, _CALLER.get(None), context.peer())
                status = self._status(method, error)
            else:
                self._events.answered(method, perf_counter() - started)
                return response
            return await context.abort(status.code, status.details, status.trailing_metadata)  # which raises

        return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)

    def _stream(self, method: str, serve: Callable[[LongCall, Context], Awaitable[None]]) -> Handler:
        async def answer(_: object, context: Context) -> None:
            def authenticate() -> Workload:
                return self._authenticate(cast("AuthContext", context.auth_context()))

            started = perf_counter()
            try:
                workload = authenticate()
                _CALLER.set(workload)
                self._begin(self._streams, self._limits.streams, str(workload.spiffe_id), context)
                call = LongCall(
                    context,
                    authenticate,
                    read_within=self._read_within,
                    write_within=self._limits.write_within.total_seconds(),
                )
                await serve(call, context)
            except Exception as error:  # noqa: BLE001 - as above
                if isinstance(error, (UnauthenticatedError, RefusedError)):
                    self._record(error, _CALLER.get(None), context.peer())
                status = self._status(method, error)
            else:
                self._events.answered(method, perf_counter() - started)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ABORT_WITHIN):
                    await context.abort(status.code, status.details, status.trailing_metadata)  # which raises

        # The stubs know the form of the synchronous server only.
        return grpc.stream_stream_rpc_method_handler(cast("Any", answer), None, None)

    def _answering(
        self, handler: Handler, serve: Callable[[Any, Context], AsyncIterator[Any]]
    ) -> Callable[[LongCall, Context], Awaitable[None]]:
        """Return what serves a method that has one request and a stream of responses, which it may give as bytes."""
        parse = cast("Callable[[bytes], Any]", handler.request_deserializer)
        encode = cast("Callable[[Any], bytes]", handler.response_serializer)

        async def answer(call: LongCall, context: Context) -> None:
            request = _parsed(await call.first(), parse)
            async for response in serve(request, context):
                call.workload()
                await call.write(response if isinstance(response, bytes) else encode(response))

        return answer

    def _begin(self, counted: Counter[str], at_most: int, identity: str, context: Context) -> None:
        """Count the call until it is over: its answer taken, or its connection gone. Raises `RefusedError`."""
        if counted[identity] >= at_most:
            message = f"the workload has {at_most} calls that are not over"
            raise RefusedError(Refusal(RefusalReason.TOO_MANY_REQUESTS, message, _CALL_AGAIN_AFTER))
        counted[identity] += 1
        context.add_done_callback(lambda _: _end(counted, identity))  # type: ignore[arg-type] # the stubs want a class

    async def _read(self, context: Context, parse: Callable[[bytes], Any]) -> Any:  # noqa: ANN401 - as above
        """Return the request. Raises `SlowRequestError`, or `RefusedError` where it is no message."""
        try:
            async with asyncio.timeout(self._read_within):
                request = await context.read()
        except TimeoutError as error:
            msg = f"the request did not come within {self._read_within} s"
            raise SlowRequestError(msg) from error
        if request is grpc.aio.EOF:
            msg = "the call ended before its request"
            raise SlowRequestError(msg)
        return _parsed(request, parse)

    def _status(self, method: str, error: Exception) -> grpc.Status:
        """Report `error`, and return what the caller is told."""
        if isinstance(error, NotImplementedError):  # As generated code says that a method was left out.
            error = NoSuchMethodError(f"{method} is not served here")
        if isinstance(error, CarnetError):
            self._events.refused(method, error, _CALLER.get(None))
        else:
            self._events.failed(method, error)
        return status_of_error(error)


def _end(counted: Counter[str], identity: str) -> None:
    counted[identity] -= 1
    if not counted[identity]:
        del counted[identity]


def _parsed(request: bytes, parse: Callable[[bytes], Any]) -> Any:  # noqa: ANN401 - a message of any method
    """Return the message in `request`. Raises `RefusedError` where there is none."""
    try:
        return parse(request)
    except DecodeError as error:
        refusal = Refusal(RefusalReason.INVALID_REQUEST, "the request is not a message of this method")
        raise RefusedError(refusal) from error


class _Registration:
    """Takes services in the place of a server."""

    def __init__(self, calls: AuthenticatedCalls, server: grpc.aio.Server) -> None:
        self._calls = calls
        self._server = server

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Add the methods of a service that are served, each by its name."""
        wrapped = {name: self._calls.wrap(f"/{service}/{name}", handler) for name, handler in handlers.items()}
        served = {name: handler for name, handler in wrapped.items() if handler is not None}
        self._server.add_registered_method_handlers(service, served)

    def add_generic_rpc_handlers(self, handlers: Sequence[object]) -> None:
        """Add nothing: generated code offers the same methods a second time, for versions that cannot register."""
