"""Between the broker's protocol and the cache: what goes out, what came back, and why nothing came.

Shared by the sync and the async client. No I/O: status codes and messages in, values out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from carnet.cache import Failure, Issued, TokenKey
from carnet.endpoints import Target
from carnet.identity import Identity
from carnet.token import Token
from carnet.v1 import token_pb2

__all__ = ["ERROR_DOMAIN", "Miss", "issue_request", "issued", "miss_of", "no_answer", "refused"]

ERROR_DOMAIN: Final = "carnet"
"""``google.rpc.ErrorInfo.domain`` of an error that a broker of Carnet raised itself."""

_REFUSALS: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)
"""What asking again does not change. All else may be different at another broker, or later."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9_.-]{1,8192}")
_LONGEST_LIFE: Final = timedelta(days=366)
_SHOWN: Final = 300


@dataclass(frozen=True, slots=True)
class Miss:
    """Why one broker gave no token."""

    target: Target
    code: grpc.StatusCode
    text: str
    reason: str | None
    """The reason that the broker gave, None where the error did not come from a broker."""
    retry_after: timedelta | None

    @property
    def is_refusal(self) -> bool:
        """Whether this is the broker's decision, which another broker would repeat."""
        return self.code in _REFUSALS

    @property
    def is_from_broker(self) -> bool:
        """Whether the connection is good, and it was the broker that answered."""
        return self.reason is not None or self.is_refusal


def issue_request(key: TokenKey) -> token_pb2.IssueTokenRequest:
    """Return the request for `key`."""
    request = token_pb2.IssueTokenRequest(audience=key.audience, scopes=key.scopes)
    if key.ttl is not None:
        ttl = duration_pb2.Duration()
        ttl.FromTimedelta(key.ttl)
        request.ttl.CopyFrom(ttl)
    return request


def issued(
    response: token_pb2.IssueTokenResponse, key: TokenKey, target: Target, *, sent_at: datetime
) -> Issued | Miss:
    """Return the token in `response`, or a `Miss` where that makes no sense. `sent_at` is when it was asked for."""
    try:
        expires_in = response.expires_in.ToTimedelta()
        refresh_in = response.refresh_in.ToTimedelta()
    except (ValueError, OverflowError):
        expires_in = refresh_in = timedelta()
    if (
        not _TOKEN.fullmatch(response.token)
        or not timedelta() < expires_in <= _LONGEST_LIFE
        or not set(key.scopes) <= set(response.scopes)
    ):
        return Miss(target, grpc.StatusCode.INTERNAL, "its answer is not that of a broker", None, None)
    token = Token(
        value=response.token,
        audience=key.audience,
        scopes=tuple(sorted(response.scopes)),
        expires_at=sent_at + expires_in,
        identity_thumbprint=key.thumbprint,
    )
    return Issued(token, expires_in, refresh_in)


def miss_of(call: grpc.Call, target: Target) -> Miss:
    """Return what went wrong with `call`, which asked `target` and ended with an error."""
    code = call.code()
    text, reason, retry_after = call.details() or "", None, None
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):  # Details that contradict the status, or that are none: not from a broker.
        status = None
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        try:
            if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                reason = info.reason
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.ToTimedelta()
        except (ValueError, OverflowError, DecodeError):
            continue
    return Miss(target, code, text[:_SHOWN], reason, retry_after)


def refused(miss: Miss, key: TokenKey, identity: Identity, *, now: datetime) -> Failure:
    """Return the failure of a request that a broker refused."""
    reason = miss.reason or miss.code.name
    hint = _hint_of_clock(identity, now)
    message = f"{_what(key)} as {identity.spiffe_id}: {miss.text or 'refused'} ({reason}){hint}"
    return Failure(message, reason=reason, retry_after=miss.retry_after)


def no_answer(misses: Sequence[Miss], key: TokenKey, identity: Identity, *, broker_name: str, now: datetime) -> Failure:
    """Return the failure of a request to which no broker had an answer, with what this side knows about the cause."""
    texts = "; ".join(f"{miss.target}: {miss.text or miss.code.name}" for miss in misses)
    hint = _hint(misses, identity, broker_name, now)
    waits = [miss.retry_after for miss in misses if miss.retry_after is not None]
    message = f"{_what(key)}: no broker answered {f'({texts})' if misses else 'in time'}{hint}"
    # The soonest: one broker that can answer is enough.
    return Failure(message, retry_after=min(waits, default=None) if len(waits) == len(misses) else None)


def _what(key: TokenKey) -> str:
    scopes = f" with scopes {' '.join(key.scopes)}" if key.scopes else ""
    return f"no token for audience {key.audience}{scopes}"


def _hint(misses: Sequence[Miss], identity: Identity, broker_name: str, now: datetime) -> str:
    """Say what to do about it. gRPC shows a certificate that the server refused only as a closed socket."""
    if clock := _hint_of_clock(identity, now):
        return clock
    texts = " ".join(miss.text for miss in misses if not miss.is_from_broker)
    if "CERTIFICATE_VERIFY_FAILED" in texts:
        return ": the broker's certificate has ended or is not from your authorities, check CARNET_CA_FILE"
    if "Hostname Verification" in texts:
        return f": the broker's certificate is not for {broker_name}, check CARNET_BROKER and CARNET_BROKER_NAME"
    if "Socket closed" in texts:
        return ": the broker may not trust your certificate, check CARNET_CERT_FILE and the broker's CA file"
    return ": check CARNET_BROKER, and that a broker runs there" if texts else ""


def _hint_of_clock(identity: Identity, now: datetime) -> str:
    if now >= identity.not_after:
        return f": your certificate ended at {identity.not_after:%Y-%m-%dT%H:%M:%SZ}, renew it"
    if now < identity.not_before:
        return f": your certificate begins at {identity.not_before:%Y-%m-%dT%H:%M:%SZ}, check this host's clock"
    return ""
