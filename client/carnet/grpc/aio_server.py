"""`AsyncServerInterceptor`: callers are verified before a handler of an asyncio server runs."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn, TypeAlias, cast

import grpc
import grpc.aio

from carnet.caller import CALLER
from carnet.errors import InvalidTokenError, KeySetUnavailableError
from carnet.grpc.guard import Admitted, AuthContext, Guard, StreamEnd, describe_peer
from carnet.grpc.handlers import Handler, behavior_of, refuse, wrap_blocking, wrapped_like
from carnet.grpc.refusal_log import RefusalLog
from carnet.grpc.refusals import Refusal, RefusedError, refused_by
from carnet.grpc.rules import Rule
from carnet.trust import AsyncVerifier

__all__ = ["AsyncServerInterceptor"]

_GRACE: Final = 1.0
"""Seconds after which a stream that could not be ended in good order, because its caller does not read, is cut off."""

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_END: Final = object()


class AsyncServerInterceptor(grpc.aio.ServerInterceptor):
    """Does what `ServerInterceptor` does, for ``grpc.aio.server``, with an `AsyncVerifier` of the same event loop.

    Handlers that are plain functions, which gRPC runs in threads, are looked after too; but a stream of theirs ends at
    the first message after its end, and not before.
    """

    def __init__(
        self, verifier: AsyncVerifier, rules: Mapping[str, Rule], *, stream: StreamEnd | str = StreamEnd.TOKEN
    ) -> None:
        self._verifier = verifier
        self._guard = Guard(rules, stream=stream)
        if self._guard.accepts_stale:
            verifier.will_accept_stale()
        self._refusals = RefusalLog()
        # Held until they are done: the event loop itself does not hold its tasks.
        self._ending: set[asyncio.Task[None]] = set()
        self._streams: set[_Stream] = set()
        verifier.on_revocation(self._look_again)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler: an interceptor itself is not told who the peer is. Called by gRPC."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not self._guard.asks_for_token(method):
            return handler
        behavior = behavior_of(handler)
        if inspect.isasyncgenfunction(behavior):
            return wrapped_like(handler, self._generate(behavior, method))
        if inspect.iscoroutinefunction(behavior):
            streaming = bool(handler.request_streaming or handler.response_streaming)
            return wrapped_like(handler, self._answer(behavior, method, streaming=streaming))
        return self._block(handler, method)

    def _answer(self, behavior: Callable[..., Awaitable[Any]], method: str, *, streaming: bool) -> Callable[..., Any]:
        """Return the handler for one that is awaited: it returns its answer, or writes answers itself."""

        async def respond(argument: Any, context: _Context) -> Any:  # noqa: ANN401 - what the service speaks
            admitted = await self._admit_or_abort(method, context)
            CALLER.set(admitted.claims)  # The task of the call has a context of its own.
            if not streaming:
                return await behavior(argument, context)
            with self._open(admitted, context) as stream:
                return await stream.until_end(behavior(argument, context))

        return respond

    def _generate(self, behavior: Callable[..., AsyncGenerator[Any, None]], method: str) -> Callable[..., Any]:
        """Return the handler for one that yields its answers."""

        async def respond(argument: Any, context: _Context) -> AsyncIterator[Any]:  # noqa: ANN401 - as above
            admitted = await self._admit_or_abort(method, context)
            CALLER.set(admitted.claims)
            messages = behavior(argument, context)
            with self._open(admitted, context) as stream:
                async with contextlib.aclosing(messages):
                    while (message := await stream.until_end(anext(messages, _END))) is not _END:
                        yield message

        return respond

    def _block(self, handler: Handler, method: str) -> Handler:
        """Return the handler for one that runs in a thread."""
        loop = asyncio.get_running_loop()

        def admit(context: grpc.ServicerContext) -> Admitted:
            # The verifier lives in the event loop, which is not this thread.
            admitted = asyncio.run_coroutine_threadsafe(self._admit(method, context), loop).result()
            if isinstance(admitted, Refusal):
                refuse(context, admitted)
            return admitted

        # No ender: from outside of the handler gRPC ends such a call badly. Its streams end at their next message.
        return wrap_blocking(handler, admit=admit, ender=None)

    async def _admit_or_abort(self, method: str, context: _Context) -> Admitted:
        admitted = await self._admit(method, context)
        if isinstance(admitted, Refusal):
            await _abort(context, admitted)
        return admitted

    async def _admit(self, method: str, context: _Context | grpc.ServicerContext) -> Admitted | Refusal:
        peer = cast("AuthContext", context.auth_context())
        try:
            metadata = cast("Sequence[tuple[str, str | bytes]]", context.invocation_metadata())
            presented = self._guard.presented(metadata, peer, now=datetime.now(UTC))
            try:
                claims = await self._verifier.verify(
                    presented.token, peer_certificate=presented.certificate, on_stale=self._guard.on_stale(method)
                )
            except (InvalidTokenError, KeySetUnavailableError) as error:
                raise refused_by(error) from error
            return self._guard.admit(method, claims, presented, self._verifier)
        except RefusedError as refused:
            self._refusals.refused(method, describe_peer(peer), refused)
            return refused.refusal

    @contextlib.contextmanager
    def _open(self, admitted: Admitted, context: _Context) -> Iterator[_Stream]:
        """Look after a stream while it is open."""
        stream = _Stream(admitted, context, self._ending)
        self._streams.add(stream)
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            stream.closed()

    def _look_again(self) -> None:
        """End the streams whose right was revoked. Called by the verifier after each change, in the event loop."""
        for stream in list(self._streams):
            stream.look_again()


class _Stream:
    """A call that is looked after: it ends when the right of its caller does, whatever it is waiting for."""

    def __init__(self, admitted: Admitted, context: _Context, ending: set[asyncio.Task[None]]) -> None:
        self._admitted = admitted
        self._context = context
        self._ending = ending
        self._loop = asyncio.get_running_loop()
        self._call = cast("asyncio.Task[Any]", asyncio.current_task())
        self._limit: asyncio.Timeout | None = None
        left = admitted.seconds_left(datetime.now(UTC))
        # Cut off shortly after the end, should the call still be there: writing, and nobody reads.
        self._timer = None if left is None else self._loop.call_later(left + _GRACE, self._cut_off)

    async def until_end(self, step: Awaitable[Any]) -> Any:  # noqa: ANN401 - what the service speaks
        """Return what `step` returns; end the call when the caller's right ends first."""
        try:
            async with asyncio.timeout(self._admitted.seconds_left(datetime.now(UTC))) as limit:
                self._limit = limit
                result = await step
        except TimeoutError:
            if not limit.expired():  # The handler's own.
                raise
            await _abort(self._context, Refusal.TOKEN_ENDED)
        finally:
            self._limit = None
        if self._admitted.is_over(datetime.now(UTC)):  # Timers stand still while a laptop sleeps.
            await _abort(self._context, Refusal.TOKEN_ENDED)
        return result

    def look_again(self) -> None:
        """End the call if its right was revoked."""
        if self._timer is None or not self._admitted.revoked():  # No timer: open by choice.
            return
        self._timer.cancel()
        self._timer = self._loop.call_later(_GRACE, self._cut_off)
        if self._limit is not None:
            self._limit.reschedule(self._loop.time())

    def closed(self) -> None:
        """Stop looking after it."""
        if self._timer is not None:
            self._timer.cancel()

    def _cut_off(self) -> None:
        # From a task of its own: a call that is cancelled sends no status, and this one waits for the reader.
        self._ending.add(ending := self._loop.create_task(_send(self._context, Refusal.TOKEN_ENDED)))
        ending.add_done_callback(self._ending.discard)
        self._loop.call_soon(self._call.cancel)


async def _send(context: _Context, refusal: Refusal) -> None:
    with contextlib.suppress(grpc.aio.AbortError):
        await context.abort_with_status(refusal.status)


async def _abort(context: _Context, refusal: Refusal) -> NoReturn:
    await context.abort_with_status(refusal.status)
    raise AssertionError  # abort_with_status does not return; its type does not say so.
