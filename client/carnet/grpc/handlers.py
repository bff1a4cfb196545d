"""Handlers that look at the caller first: the wrapping for code that blocks.

It wraps the handlers of a synchronous server, and those of an asyncio server that are plain functions, which gRPC runs
in threads. Both look the same from here but for two things, which are given: how to admit a caller, and who cuts off a
stream that is silent.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, NoReturn, TypeAlias, cast

import grpc

from carnet.caller import CALLER
from carnet.grpc.guard import Admitted
from carnet.grpc.refusals import Refusal

# What passes through has the types of the service, which an interceptor does not know.
# ruff: noqa: ANN401

__all__ = ["Admit", "StreamEnder", "refuse", "wrap_blocking", "wrapped_like"]

_log: Final = logging.getLogger("carnet.grpc")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Admit: TypeAlias = Callable[[grpc.ServicerContext], Admitted]
"""Returns the admitted caller, or refuses, which raises."""

_MAKERS: Final = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_END: Final = object()
_EVERY: Final = 1.0
"""Seconds between two looks at the streams that are open."""


def refuse(context: grpc.ServicerContext, refusal: Refusal) -> NoReturn:
    """End the call. Does what `abort_with_status` does, which the context of an asyncio server's thread lacks."""
    status = refusal.status
    context.set_trailing_metadata(status.trailing_metadata)
    context.abort(status.code, status.details)


def wrapped_like(handler: Handler, behavior: Callable[..., Any]) -> Handler:
    """Return `handler` with `behavior` in the place of its own."""
    make: Callable[..., Handler] = _MAKERS[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(behavior, handler.request_deserializer, handler.response_serializer)


def behavior_of(handler: Handler) -> Callable[..., Any]:
    """Return the function that `handler` calls."""
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return next(cast("Callable[..., Any]", behavior) for behavior in kinds if behavior is not None)


def wrap_blocking(handler: Handler, *, admit: Admit, ender: StreamEnder | None) -> Handler:
    """Return `handler`, called for admitted callers only, with `carnet.current()` set, and ended when their right ends.

    A stream ends at the first message, in or out, that would pass after the end, with the status TOKEN_ENDED. One on
    which nothing passes is cut off by `ender` within a second, which the caller sees as CANCELLED; the handler's thread
    goes on until it next looks at the stream.
    """
    behavior = behavior_of(handler)
    streaming = bool(handler.request_streaming or handler.response_streaming)

    def start(argument: Any, context: grpc.ServicerContext) -> tuple[Admitted, contextvars.Context, Any]:
        admitted = admit(context)
        # One context for the whole call: gRPC may take the steps of a stream in more than one thread.
        own = contextvars.copy_context()
        own.run(CALLER.set, admitted.claims)
        if streaming and ender is not None:
            ender.watch(admitted, context)
        if handler.request_streaming:
            argument = _received(argument, admitted, context)
        return admitted, own, own.run(behavior, argument, context)

    def answer(argument: Any, context: grpc.ServicerContext) -> Any:
        admitted, _, message = start(argument, context)
        if streaming:
            _check_right(admitted, context)
        return message

    def answers(argument: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        # A generator: an asyncio server makes it in the event loop, and must not be held up there.
        admitted, own, messages = start(argument, context)
        yield from _sent(messages, admitted, context, own)

    return wrapped_like(handler, answers if handler.response_streaming else answer)


def _received(messages: Iterator[Any], admitted: Admitted, context: grpc.ServicerContext) -> Iterator[Any]:
    """Yield the messages of the caller until its right ends."""
    for message in messages:
        _check_right(admitted, context)
        yield message


def _sent(
    messages: Iterable[Any], admitted: Admitted, context: grpc.ServicerContext, own: contextvars.Context
) -> Iterator[Any]:
    """Yield the messages of the handler, each made inside of `own`, until the caller's right ends."""
    steps = own.run(iter, messages)
    try:
        while (message := own.run(next, steps, _END)) is not _END:
            _check_right(admitted, context)
            yield message
    finally:
        # The handler hears that its caller went away, as it would without us.
        close = getattr(steps, "close", None)
        if close is not None:
            own.run(close)


def _check_right(admitted: Admitted, context: grpc.ServicerContext) -> None:
    if admitted.is_over(datetime.now(UTC)):
        refuse(context, Refusal.TOKEN_ENDED)


class StreamEnder:
    """Cuts off streams whose right has ended, or was revoked, while nothing passes on them.

    Has one daemon thread, once needed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: dict[int, tuple[Admitted, Callable[[], object]]] = {}
        self._next = 0
        self._thread: threading.Thread | None = None

    def watch(self, admitted: Admitted, context: grpc.ServicerContext) -> None:
        """Cut the call off once it is over, unless it ends before."""
        if admitted.ends_at is None:
            return
        with self._changed:
            self._next += 1
            key = self._next
            self._open[key] = admitted, context.cancel
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="carnet-stream-end", daemon=True)
                self._thread.start()
            self._changed.notify()
        if not context.add_callback(lambda: self._forget(key)):  # The call has ended already.
            self._forget(key)

    def _forget(self, key: int) -> None:
        with self._changed:
            self._open.pop(key, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._open:
                    self._changed.wait()
                now = datetime.now(UTC)
                over = [key for key, (admitted, _) in self._open.items() if admitted.is_over(now)]
                cuts = [self._open.pop(key)[1] for key in over]
            for cut in cuts:
                try:
                    cut()
                # One call that cannot be cut must not end this thread: the others would go on for ever.
                except Exception:  # noqa: BLE001
                    _log.exception("a stream whose right ended could not be cut off")
            # A pause, and not a timer set to the next end: a timer stands still while a laptop sleeps.
            time.sleep(_EVERY)
