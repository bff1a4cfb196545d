"""`secure_channel`: a channel that shows one identity and attaches that identity's tokens to every call."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import grpc

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
from carnet.source import Client

__all__ = ["secure_channel"]


def secure_channel(
    target: Target | str,
    *,
    client: Client,
    audience: str,
    scopes: Iterable[str] = (),
    server_name: str,
    ca_file: StrPath | None = None,
    options: Iterable[tls.ChannelOption] = (),
) -> grpc.Channel:
    """Return a channel to a service, with a token for `audience` and `scopes` on each call.

    Connection and tokens are of one identity, the one that `client` has now: a token is bound to its certificate, so
    it is good on this connection and on no other. `server_name` is the DNS name that the service's certificate must
    carry (`carnet.spiffe.server_dns_name`). The service is checked by the authorities in `ca_file`, by default those
    that `client` checks the broker by. `options` are gRPC's channel arguments.

    A call for which no token can be had fails with `carnet.grpc.NoTokenError`, a `grpc.RpcError`. A call that brings
    ``authorization`` metadata of its own raises `ConfigError`. Closing the channel leaves the client open.
    """
    wanted = Wanted.of(client.identity, audience, scopes)
    channel = tls.secure_channel(
        target,
        identity=wanted.identity,
        ca_pem=client.ca_pem if ca_file is None else load_ca_file(ca_file),
        server_name=server_name,
        options=(*USER_CHANNEL, *options),
    )
    return grpc.intercept_channel(channel, _Attaching(client, wanted))


# What passes through an interceptor has the types of the service, which it does not know.
# ruff: noqa: ANN401


class _Attaching(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Attaches a token to each call. One object for all four kinds."""

    def __init__(self, client: Client, wanted: Wanted) -> None:
        self._client = client
        self._wanted = wanted

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._attach(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._attach(client_call_details), request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(self._attach(client_call_details), request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(self._attach(client_call_details), request_iterator)

    def _attach(self, details: Any) -> CallDetails:
        started = time.monotonic()
        wanted = self._wanted
        wait = time_for_token(details)
        try:
            token = self._client.get_token(
                wanted.audience, scopes=wanted.scopes, identity=wanted.identity, timeout=wait
            )
        except TokenError as error:
            too_late = timeout_left(details, started) == 0
            raise NoTokenError.of(error, audience=wanted.audience, too_late=too_late) from error
        return CallDetails(
            details.method,
            timeout_left(details, started),
            (*(details.metadata or ()), (AUTHORIZATION, f"Bearer {token.value}")),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
