"""What happens around every call: authenticate the peer, read its request, answer errors with a status.

No method is served without it, health included: services are added through `AuthenticatedCalls.on`, which wraps each
handler once. (gRPC's interceptors see metadata and not the peer.) The certificate is judged on each call: an open
connection outlives a certificate, a CA and a revocation.

A unary method is served as a stream of requests of which one is read. On the wire the two are the same; but so the
caller is authenticated before a byte of its request is read, and one that sends its request slowly, or never, is ended
by us: gRPC's own unary handler would wait without end.

Nothing ends a call whose answer its caller never takes, other than the age of its connection. So what a workload may
have is a number of calls that are not over; with all of them stuck it stands in nobody's way but its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from time import perf_counter
from typing import Any, Final, Protocol, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError

from carnet.errors import CarnetError
from carnet_broker.core.workload import Workload
from carnet_broker.edges.grpc.status import NoSuchMethodError, SlowRequestError, status_of_error
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError

__all__ = ["AuthContext", "AuthenticatedCalls", "CallEvents", "caller"]

AuthContext = Mapping[str, Sequence[bytes]]
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # Quoted: only the stubs know its parameters.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_CALLER: Final[ContextVar[Workload]] = ContextVar("carnet_broker_caller")
_CALL_AGAIN_AFTER: Final = timedelta(milliseconds=250)


def caller() -> Workload:
    """Return the workload behind the call that is being served. Raises `LookupError` outside of one."""
    return _CALLER.get()


class CallEvents(Protocol):
    """Who wants to hear of calls: logs and metrics."""

    def answered(self, method: str, seconds: float) -> None:
        """Tell that a call was answered well, and how long that took."""

    def refused(self, method: str, error: CarnetError, workload: Workload | None) -> None:
        """Tell that a call was answered with an error that was meant."""

    def failed(self, method: str, error: Exception) -> None:
        """Tell that a call ended in an error that nobody meant."""


class AuthenticatedCalls:
    """Wraps every unary method; a method of another kind is not served."""

    def __init__(
        self,
        authenticate: Callable[[AuthContext], Workload],
        events: CallEvents,
        *,
        read_within: timedelta,
        calls_in_flight: int,
        record: Callable[[CarnetError, Workload | None, str], None],
    ) -> None:
        """Wire the parts. `authenticate` raises `UnauthenticatedError`; `calls_in_flight` is for each SPIFFE ID.

        `record` puts a call that is refused here on the audit record, with the peer's address. What a service refuses,
        it records itself: it knows what was asked for.
        """
        self._authenticate = authenticate
        self._record = record
        self._events = events
        self._read_within = read_within.total_seconds()
        self._calls_in_flight = calls_in_flight
        self._in_flight: Counter[str] = Counter()

    def on(self, server: grpc.aio.Server) -> grpc.aio.Server:
        """Return what the generated ``add_..._to_server`` take for a server: it wraps, and adds to `server`."""
        return cast("grpc.aio.Server", _Registration(self, server))

    def wrap(self, method: str, handler: Handler) -> Handler:
        """Return the handler of a unary method, wrapped."""
        # The stubs know the form of the synchronous server only.
        serve = cast("Callable[[Any, Context], Awaitable[Any]]", handler.unary_unary)
        parse = cast("Callable[[bytes], Any]", handler.request_deserializer)

        async def answer(_: object, context: Context) -> Any:  # noqa: ANN401 - a message of any method
            started = perf_counter()
            is_served = False
            try:
                workload = self._authenticate(cast("AuthContext", context.auth_context()))
                _CALLER.set(workload)
                self._begin(str(workload.spiffe_id), context)
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

    def _begin(self, identity: str, context: Context) -> None:
        """Count the call until it is over: its answer taken, or its connection gone. Raises `RefusedError`."""
        if self._in_flight[identity] >= self._calls_in_flight:
            message = f"the workload has {self._calls_in_flight} calls that are not over"
            raise RefusedError(Refusal(RefusalReason.TOO_MANY_REQUESTS, message, _CALL_AGAIN_AFTER))
        self._in_flight[identity] += 1
        context.add_done_callback(lambda _: self._end(identity))  # type: ignore[arg-type] # the stubs want a class

    def _end(self, identity: str) -> None:
        self._in_flight[identity] -= 1
        if not self._in_flight[identity]:
            del self._in_flight[identity]

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
        try:
            return parse(request)
        except DecodeError as error:
            refusal = Refusal(RefusalReason.INVALID_REQUEST, "the request is not a message of this method")
            raise RefusedError(refusal) from error

    def _status(self, method: str, error: Exception) -> grpc.Status:
        """Report `error`, and return what the caller is told."""
        if isinstance(error, NotImplementedError):  # As generated code says that a method was left out.
            error = NoSuchMethodError(f"{method} is not served here")
        if isinstance(error, CarnetError):
            self._events.refused(method, error, _CALLER.get(None))
        else:
            self._events.failed(method, error)
        return status_of_error(error)


class _Registration:
    """Takes services in the place of a server."""

    def __init__(self, calls: AuthenticatedCalls, server: grpc.aio.Server) -> None:
        self._calls = calls
        self._server = server

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Add the unary methods of a service, each by its name."""
        wrapped = {
            name: self._calls.wrap(f"/{service}/{name}", handler)
            for name, handler in handlers.items()
            if handler.unary_unary is not None
        }
        self._server.add_registered_method_handlers(service, wrapped)

    def add_generic_rpc_handlers(self, handlers: Sequence[object]) -> None:
        """Add nothing: generated code offers the same methods a second time, for versions that cannot register."""
