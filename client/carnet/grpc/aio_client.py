"""`secure_aio_channel`: what `secure_channel` is, for asyncio."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc.aio

from carnet import tls
from carnet.endpoints import Target
from carnet.errors import TokenError
from carnet.grpc.attaching import (
    AUTHORIZATION,
    USER_CHANNEL,
    CallDetails,
    NoTokenError,
    Wanted,
    time_for_token,
    timeout_left,
)
from carnet.identity import StrPath, load_ca_file
from carnet.source import AsyncClient

__all__ = ["secure_aio_channel"]


def secure_aio_channel(
    target: Target | str,
    *,
    client: AsyncClient,
    audience: str,
    scopes: Iterable[str] = (),
    server_name: str,
    ca_file: StrPath | None = None,
    options: Iterable[tls.ChannelOption] = (),
) -> grpc.aio.Channel:
    """Return a channel to a service, with a token for `audience` and `scopes` on each call.

    What `carnet.grpc.secure_channel` says holds here too. Make it in the event loop that uses it.
    """
    wanted = Wanted.of(client.identity, audience, scopes)
    attaching = _Attaching(client, wanted)
    return tls.secure_aio_channel(
        target,
        identity=wanted.identity,
        ca_pem=client.ca_pem if ca_file is None else load_ca_file(ca_file),
        server_name=server_name,
        options=(*USER_CHANNEL, *options),
        interceptors=[kind(attaching) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)],
    )


# What passes through an interceptor has the types of the service, which it does not know.
# ruff: noqa: ANN401


class _Attaching:
    """Attaches a token to each call."""

    def __init__(self, client: AsyncClient, wanted: Wanted) -> None:
        self._client = client
        self._wanted = wanted

    async def call(self, continuation: Callable[[Any, Any], Awaitable[Any]], details: Any, request: Any) -> Any:
        """Make the call with a token."""
        started = time.monotonic()
        wanted = self._wanted
        wait = time_for_token(details)
        try:
            token = await self._client.get_token(
                wanted.audience, scopes=wanted.scopes, identity=wanted.identity, timeout=wait
            )
        except TokenError as error:
            too_late = timeout_left(details, started) == 0
            raise NoTokenError.of(error, audience=wanted.audience, too_late=too_late) from error
        with_token = CallDetails(
            details.method,
            timeout_left(details, started),
            # A copy: the one at hand may be the caller's own.
            grpc.aio.Metadata(*(details.metadata or ()), (AUTHORIZATION, f"Bearer {token.value}")),
            details.credentials,
            details.wait_for_ready,
            None,  # The asyncio stack has put the compression into the metadata already.
        )
        return await continuation(with_token, request)


# One class for each kind of call: gRPC's asyncio channel uses an interceptor of several kinds for the first one only.


class _OneKind:
    def __init__(self, attaching: _Attaching) -> None:
        self._attaching = attaching


class _UnaryUnary(_OneKind, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._attaching.call(continuation, client_call_details, request)


class _UnaryStream(_OneKind, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._attaching.call(continuation, client_call_details, request)


class _StreamUnary(_OneKind, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._attaching.call(continuation, client_call_details, request_iterator)


class _StreamStream(_OneKind, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._attaching.call(continuation, client_call_details, request_iterator)
