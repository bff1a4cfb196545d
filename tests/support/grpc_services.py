"""A service for tests of the gRPC adapters: one method of each kind, on each of the stacks, over real mutual TLS."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from typing import Any, Final

import grpc
import grpc.aio

from carnet.caller import current
from carnet.grpc import AsyncServerInterceptor, Rule, ServerInterceptor
from carnet.testing.ca import CertificateAuthority
from carnet.trust import AsyncVerifier, Verifier

__all__ = ["KINDS", "OWN", "PAYMENTS_ID", "SILENT", "STACKS", "TICKING", "call", "call_async", "method", "serve"]

PAYMENTS_ID: Final = "spiffe://prod.example/ns/shop/sa/payments"
KINDS: Final = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
STACKS: Final = ("threads", "asyncio", "asyncio with plain functions")

OWN: Final = "x-own"
"""Metadata of the caller's own; its value is added to the answers."""
SILENT: Final = b"silent"
"""A message that makes a stream go silent for `LONG`, after it was answered."""
TICKING: Final = b"ticking"
"""A message that makes a stream of answers go on for `LONG`."""
LONG: Final = 15.0
_TICK: Final = 0.05


def method(kind: str) -> str:
    """Return the name of the method of this kind."""
    return f"/shop.Payments/{kind}"


def _answer(message: bytes, context: Any) -> bytes:  # noqa: ANN401 - the context of either stack
    own = "".join(str(value) for key, value in context.invocation_metadata() if key == OWN)
    return b"%s from %s%s" % (message, str(current().subject).encode(), own.encode())


def _unary_unary(message: bytes, context: grpc.ServicerContext) -> bytes:
    return _answer(message, context)


def _unary_stream(message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield _answer(message, context)
    yield _answer(message, context)
    if message == SILENT:
        time.sleep(LONG)
    for _tick in range(int(LONG / _TICK) if message == TICKING else 0):
        time.sleep(_TICK)
        yield _answer(message, context)


def _stream_unary(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    return b"; ".join(_answer(message, context) for message in messages)


def _stream_stream(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    return (_answer(message, context) for message in messages)


async def _async_unary_unary(message: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    await asyncio.sleep(0)
    return _answer(message, context)


async def _async_unary_stream(message: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
    yield _answer(message, context)
    yield _answer(message, context)
    if message == SILENT:
        await asyncio.sleep(LONG)
    for _tick in range(int(LONG / _TICK) if message == TICKING else 0):
        await asyncio.sleep(_TICK)
        yield _answer(message, context)


async def _async_stream_unary(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return b"; ".join([_answer(message, context) async for message in messages])


async def _async_stream_stream(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
    # The other way to answer: written, not yielded.
    async for message in messages:
        await context.write(_answer(message, context))


_BLOCKING: Final[dict[str, Any]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler(_unary_unary),
    "unary_stream": grpc.unary_stream_rpc_method_handler(_unary_stream),
    "stream_unary": grpc.stream_unary_rpc_method_handler(_stream_unary),
    "stream_stream": grpc.stream_stream_rpc_method_handler(_stream_stream),
}
_ASYNC: Final[dict[str, Any]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler(_async_unary_unary),
    "unary_stream": grpc.unary_stream_rpc_method_handler(_async_unary_stream),
    "stream_unary": grpc.stream_unary_rpc_method_handler(_async_stream_unary),
    "stream_stream": grpc.stream_stream_rpc_method_handler(_async_stream_stream),
}


@contextmanager
def serve(
    stack: str,
    ca: CertificateAuthority,
    rules: Mapping[str, Rule],
    verifier: Mapping[str, Any],
    *,
    stream: str = "token",
    plain: bool = False,
    unary_stream: Callable[..., Any] | None = None,
) -> Iterator[str]:
    """Serve all four methods on a free port, and give its address. `plain` is without TLS.

    `unary_stream` takes the place of the handler of that kind.
    """
    issued = ca.issue_server(PAYMENTS_ID)
    credentials = grpc.ssl_server_credentials(
        [(issued.private_key_pem, issued.certificate_pem)], root_certificates=ca.root_pem, require_client_auth=True
    )

    def listen(server: grpc.Server | grpc.aio.Server, handlers: dict[str, Any]) -> str:
        if unary_stream is not None:
            handlers = {**handlers, "unary_stream": grpc.unary_stream_rpc_method_handler(unary_stream)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("shop.Payments", handlers)])
        address = "127.0.0.1:0"
        port = server.add_insecure_port(address) if plain else server.add_secure_port(address, credentials)
        return f"127.0.0.1:{port}"

    if stack == "threads":
        with Verifier(**verifier) as blocking:
            interceptor = ServerInterceptor(blocking, rules, stream=stream)
            server = grpc.server(futures.ThreadPoolExecutor(16), interceptors=[interceptor])
            target = listen(server, _BLOCKING)
            server.start()
            try:
                yield target
            finally:
                server.stop(grace=None).wait(5)
        return

    async def run(started: futures.Future[str], stopped: asyncio.Event) -> None:
        async with AsyncVerifier(**verifier) as waiting:
            aio_interceptor = AsyncServerInterceptor(waiting, rules, stream=stream)
            server = grpc.aio.server(futures.ThreadPoolExecutor(16), interceptors=[aio_interceptor])
            target = listen(server, _ASYNC if stack == "asyncio" else _BLOCKING)
            await server.start()
            started.set_result(target)
            await stopped.wait()
            await server.stop(grace=None)

    loop, stopped, started = asyncio.new_event_loop(), asyncio.Event(), futures.Future[str]()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run(started, stopped)))
    thread.start()
    try:
        yield started.result(10)
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(10)
        loop.close()


def call(channel: grpc.Channel, kind: str, messages: Iterable[bytes], **how: Any) -> list[bytes]:  # noqa: ANN401
    """Make one call of this kind and return the answers. Of `messages` a unary call sends the first."""
    make: Callable[..., Any] = getattr(channel, kind)(method(kind))
    sent = iter(messages)
    answer = make(sent if kind.startswith("stream") else next(sent), timeout=30, **how)
    return list(answer) if kind.endswith("stream") else [answer]


async def call_async(
    channel: grpc.aio.Channel,
    kind: str,
    messages: Iterable[bytes],
    **how: Any,  # noqa: ANN401
) -> list[bytes]:
    """Do what `call` does."""
    make: Callable[..., Any] = getattr(channel, kind)(method(kind))
    sent = iter(messages)
    answer = make(sent if kind.startswith("stream") else next(sent), timeout=30, **how)
    return [message async for message in answer] if kind.endswith("stream") else [await answer]
