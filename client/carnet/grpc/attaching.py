"""What a client interceptor adds to a call, whichever stack it is for; and the error of a call that got no token."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from carnet.errors import ConfigError, RequestDeniedError, TokenError
from carnet.identity import Identity
from carnet.source.options import check_key, token_key

__all__ = ["AUTHORIZATION", "USER_CHANNEL", "CallDetails", "NoTokenError", "Wanted", "time_for_token", "timeout_left"]

AUTHORIZATION: Final = "authorization"

USER_CHANNEL: Final = (
    # These channels lead to services of any kind, not to brokers: gRPC's own limit, and no pings, which a server with
    # gRPC's default settings punishes on a stream that is silent for long.
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 2**31 - 1),
)


class NoTokenError(grpc.aio.AioRpcError):
    """A call was not made, because no token could be had for it. The same class in both stacks.

    It is a `grpc.RpcError`, so whoever handles a call that fails handles this one: `code()` is UNAVAILABLE where the
    broker could not be reached, DEADLINE_EXCEEDED where the call's time ran out meanwhile, and UNAUTHENTICATED where
    the broker refused; ``google.rpc.ErrorInfo`` has its reason. ``__cause__`` is the `TokenError` itself.
    """

    @classmethod
    def of(cls, error: TokenError, *, audience: str, too_late: bool) -> NoTokenError:
        """Return the error of a call that failed by `error`; `too_late` if its deadline is over."""
        code, reason = grpc.StatusCode.UNAVAILABLE, error.code
        if isinstance(error, RequestDeniedError):
            code, reason = grpc.StatusCode.UNAUTHENTICATED, error.reason
        elif too_late:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
        details = str(error)
        if not details.startswith(f"no token for audience {audience}"):  # The client's own errors begin with it.
            details = f"no token for audience {audience}: {details}"
        info = AnyMessage()
        info.Pack(ErrorInfo(reason=reason, domain="carnet"))
        status = rpc_status.to_status(Status(code=code.value[0], message=details, details=[info]))
        return cls(
            code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailing_metadata), details, "the call was not made"
        )


class CallDetails(NamedTuple):
    """The details of one call, as both stacks read them: by attribute."""

    method: Any
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


@dataclass(frozen=True, slots=True)
class Wanted:
    """The token that a channel attaches: one identity's, for one audience."""

    identity: Identity
    audience: str
    scopes: tuple[str, ...]

    @classmethod
    def of(cls, identity: Identity, audience: str, scopes: Iterable[str]) -> Wanted:
        """Return what to ask for. Raises `ConfigError` for what nobody grants, `TypeError` for one text as scopes."""
        key = token_key(identity, audience, scopes, None)
        check_key(key)
        return cls(identity, key.audience, key.scopes)


def time_for_token(details: Any) -> timedelta | None:  # noqa: ANN401 - each stack has its own class of details
    """Return how long a token may be waited for, None for as long as the client says.

    Raises `ConfigError` for a call that brings an ``authorization`` of its own: two would go out, and a server that is
    worth its salt refuses both.
    """
    for key, _ in details.metadata or ():
        if key.lower() == AUTHORIZATION:
            msg = "the call has 'authorization' metadata already: leave it out, this channel attaches its own token"
            raise ConfigError(msg)
    return None if details.timeout is None else timedelta(seconds=details.timeout)


def timeout_left(details: Any, started: float) -> float | None:  # noqa: ANN401 - as above
    """Return the seconds that are left of the call's time; `started` is when it began, monotonic."""
    timeout: float | None = details.timeout
    return None if timeout is None else max(timeout - (time.monotonic() - started), 0.0)
