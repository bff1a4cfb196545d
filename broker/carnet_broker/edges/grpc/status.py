"""What an error is to the caller: one table from reasons to gRPC codes.

The caller gets a code, a constant text, ``google.rpc.ErrorInfo`` (reason, domain ``carnet``), and
``google.rpc.RetryInfo`` where waiting helps. The cause goes to the log, and never over the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from carnet.errors import CarnetError
from carnet_broker.core.workload import UnauthenticatedError
from carnet_broker.issuance import RefusalReason, RefusedError

__all__ = [
    "CODES",
    "DOMAIN",
    "NoSuchMethodError",
    "SlowRequestError",
    "UnavailableError",
    "rich_status",
    "status_of_error",
]

DOMAIN: Final = "carnet"
_UNAVAILABLE_TEXT: Final = "the broker has no key set now"
_UNAUTHENTICATED_TEXT: Final = "the certificate of this connection does not authenticate a workload"
_INTERNAL_TEXT: Final = "internal error"

CODES: Final[Mapping[RefusalReason, grpc.StatusCode]] = {
    RefusalReason.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalReason.NOT_GRANTED: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.SCOPE_NOT_GRANTED: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.CERTIFICATE_ENDING: grpc.StatusCode.FAILED_PRECONDITION,
    RefusalReason.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RefusalReason.NO_SIGNING_KEY: grpc.StatusCode.UNAVAILABLE,
    RefusalReason.KEY_STORE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    RefusalReason.AUDIT_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}


class UnavailableError(CarnetError):
    """The trust service cannot answer now."""

    code = "KEY_SET_UNAVAILABLE"
    retryable = True


class SlowRequestError(CarnetError):
    """The caller did not send its request in time."""

    code = "SLOW_REQUEST"


class NoSuchMethodError(CarnetError):
    """The protocol has this method, and this server has not."""

    code = "UNIMPLEMENTED"


def status_of_error(error: BaseException) -> grpc.Status:
    """Return what the caller is told of `error`."""
    match error:
        case RefusedError(refusal=refusal):
            return rich_status(CODES[refusal.reason], str(refusal.reason), refusal.message, refusal.retry_after)
        case UnauthenticatedError():
            return rich_status(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", _UNAUTHENTICATED_TEXT)
        case UnavailableError():
            return rich_status(grpc.StatusCode.UNAVAILABLE, error.code, _UNAVAILABLE_TEXT, timedelta(seconds=1))
        case SlowRequestError():
            return rich_status(grpc.StatusCode.DEADLINE_EXCEEDED, error.code, "the request did not come in time")
        case NoSuchMethodError():
            return rich_status(grpc.StatusCode.UNIMPLEMENTED, error.code, "there is no such method")
    return rich_status(grpc.StatusCode.INTERNAL, "INTERNAL", _INTERNAL_TEXT)


def rich_status(code: grpc.StatusCode, reason: str, message: str, retry_after: timedelta | None = None) -> grpc.Status:
    """Return a gRPC status with its details (google.rpc.Status, AIP-193)."""
    status = status_pb2.Status(code=code.value[0], message=message)
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    status.details.append(info)
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromTimedelta(retry_after)
        retry = any_pb2.Any()
        retry.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        status.details.append(retry)
    return rpc_status.to_status(status)
