"""How a server says no: a constant text and a code for the caller, the reason for the log.

==========================  =================  ===================
what happened               gRPC code          ErrorInfo.reason
==========================  =================  ===================
no token, or two            UNAUTHENTICATED    NO_TOKEN
bound to another            UNAUTHENTICATED    WRONG_CONFIRMATION
  certificate
any other bad token         UNAUTHENTICATED    INVALID_TOKEN
the token or certificate    UNAUTHENTICATED    TOKEN_ENDED
  of a stream ended,
  or was revoked
a scope is missing          PERMISSION_DENIED  INSUFFICIENT_SCOPE
the method has no rule      PERMISSION_DENIED  NO_RULE
no key set to decide with   UNAVAILABLE        KEY_SET_UNAVAILABLE
==========================  =================  ===================

``WRONG_CONFIRMATION`` is told apart because a caller can cure it: its certificate was renewed, and the token was asked
for with the one before. It is said only of a token whose signature is good.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from carnet.errors import CarnetError, InvalidTokenError, InvalidTokenReason

__all__ = ["Refusal", "RefusedError", "refused_by"]

_DOMAIN: Final = "carnet"


class Refusal(StrEnum):
    """What happened, as ``ErrorInfo.reason`` says it."""

    NO_TOKEN = "NO_TOKEN"  # noqa: S105 - no secret
    INVALID_TOKEN = "INVALID_TOKEN"  # noqa: S105 - no secret
    WRONG_CONFIRMATION = "WRONG_CONFIRMATION"
    TOKEN_ENDED = "TOKEN_ENDED"  # noqa: S105 - no secret
    INSUFFICIENT_SCOPE = "INSUFFICIENT_SCOPE"
    NO_RULE = "NO_RULE"
    KEY_SET_UNAVAILABLE = "KEY_SET_UNAVAILABLE"

    @property
    def status(self) -> grpc.Status:
        """The whole answer; the same for every caller."""
        return _STATUSES[self]


class RefusedError(Exception):
    """A call that must not reach its handler. The text is for the log."""

    def __init__(self, refusal: Refusal, text: str) -> None:
        super().__init__(text)
        self.refusal = refusal


def refused_by(error: CarnetError) -> RefusedError:
    """Return the refusal that an error of a verifier leads to."""
    if not isinstance(error, InvalidTokenError):
        return RefusedError(Refusal.KEY_SET_UNAVAILABLE, str(error))
    wrong_certificate = error.reason is InvalidTokenReason.WRONG_CONFIRMATION
    refusal = Refusal.WRONG_CONFIRMATION if wrong_certificate else Refusal.INVALID_TOKEN
    return RefusedError(refusal, f"{error.reason}: {error}")


def _status(refusal: Refusal, code: grpc.StatusCode, text: str, *, retry_after: timedelta | None = None) -> grpc.Status:
    details: list[Message] = [ErrorInfo(reason=refusal, domain=_DOMAIN)]
    if retry_after is not None:
        delay = Duration()
        delay.FromTimedelta(retry_after)
        details.append(RetryInfo(retry_delay=delay))
    packed = [AnyMessage() for _ in details]
    for envelope, detail in zip(packed, details, strict=True):
        envelope.Pack(detail)
    return rpc_status.to_status(Status(code=code.value[0], message=text, details=packed))


_STATUSES: Final = {
    **{
        refusal: _status(refusal, grpc.StatusCode.UNAUTHENTICATED, "a valid token is required")
        for refusal in (Refusal.NO_TOKEN, Refusal.INVALID_TOKEN, Refusal.WRONG_CONFIRMATION)
    },
    Refusal.TOKEN_ENDED: _status(
        Refusal.TOKEN_ENDED, grpc.StatusCode.UNAUTHENTICATED, "the token or the certificate of this stream ended"
    ),
    Refusal.INSUFFICIENT_SCOPE: _status(
        Refusal.INSUFFICIENT_SCOPE, grpc.StatusCode.PERMISSION_DENIED, "the token does not allow this method"
    ),
    Refusal.NO_RULE: _status(Refusal.NO_RULE, grpc.StatusCode.PERMISSION_DENIED, "this method is open to nobody"),
    Refusal.KEY_SET_UNAVAILABLE: _status(
        Refusal.KEY_SET_UNAVAILABLE,
        grpc.StatusCode.UNAVAILABLE,
        "tokens cannot be verified now",
        retry_after=timedelta(seconds=1),
    ),
}
