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
from carnet_broker.keyring_loop import UnknownKeyError

__all__ = [
    "CODES",
    "DOMAIN",
    "BehindError",
    "DrainingError",
    "NoSuchMethodError",
    "ReplacedError",
    "SilentError",
    "SlowReaderError",
    "SlowRequestError",
    "StaleError",
    "UnavailableError",
    "rich_status",
    "status_of_error",
]

DOMAIN: Final = "carnet"
_INTERNAL_TEXT: Final = "internal error"

CODES: Final[Mapping[RefusalReason, grpc.StatusCode]] = {
    RefusalReason.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalReason.NOT_GRANTED: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.SCOPE_NOT_GRANTED: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.BLOCKED: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.CERTIFICATE_ENDING: grpc.StatusCode.FAILED_PRECONDITION,
    RefusalReason.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RefusalReason.NO_SIGNING_KEY: grpc.StatusCode.UNAVAILABLE,
    RefusalReason.KEY_STORE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    RefusalReason.STORE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    RefusalReason.CLOCK_IS_OFF: grpc.StatusCode.UNAVAILABLE,
    RefusalReason.AUDIT_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}


class UnavailableError(CarnetError):
    """The trust service cannot answer now."""

    code = "KEY_SET_UNAVAILABLE"
    retryable = True


class StaleError(CarnetError):
    """What this replica knows of keys or revocations is too old to be told on."""

    code = "STALE"
    retryable = True


class BehindError(CarnetError):
    """The verifier knows more than this replica: another one has to serve it."""

    code = "BEHIND"
    retryable = True


class DrainingError(CarnetError):
    """The replica is shutting down: connect again, and reach another one."""

    code = "DRAINING"
    retryable = True


class ReplacedError(CarnetError):
    """A newer stream of the same verifier took the place of this one."""

    code = "REPLACED"


class SilentError(CarnetError):
    """The verifier did not answer for longer than its own knowledge may be old."""

    code = "SILENT"


class SlowReaderError(CarnetError):
    """The caller of a stream does not take what it is sent."""

    code = "SLOW_READER"


class SlowRequestError(CarnetError):
    """The caller did not send its request in time."""

    code = "SLOW_REQUEST"


class NoSuchMethodError(CarnetError):
    """The protocol has this method, and this server has not."""

    code = "UNIMPLEMENTED"


_TOLD: Final[Mapping[type[CarnetError], tuple[grpc.StatusCode, str, timedelta | None]]] = {
    UnauthenticatedError: (
        grpc.StatusCode.UNAUTHENTICATED,
        "the certificate of this connection does not authenticate a workload",
        None,
    ),
    UnavailableError: (grpc.StatusCode.UNAVAILABLE, "the broker has no key set now", timedelta(seconds=1)),
    StaleError: (
        grpc.StatusCode.UNAVAILABLE,
        "the broker has not read keyring or revocations lately",
        timedelta(seconds=1),
    ),
    BehindError: (grpc.StatusCode.UNAVAILABLE, "the broker is behind what the verifier knows", timedelta(seconds=1)),
    DrainingError: (
        grpc.StatusCode.UNAVAILABLE,
        "the broker is shutting down: connect again",
        timedelta(milliseconds=100),
    ),
    ReplacedError: (
        grpc.StatusCode.ABORTED,
        "another stream of this verifier has begun: give each verifier an instance_id of its own",
        None,
    ),
    SilentError: (grpc.StatusCode.DEADLINE_EXCEEDED, "the verifier did not answer in time", None),
    SlowReaderError: (grpc.StatusCode.DEADLINE_EXCEEDED, "the caller does not take what it is sent", None),
    SlowRequestError: (grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not come in time", None),
    UnknownKeyError: (grpc.StatusCode.NOT_FOUND, "the keyring has no such key: see carnet-broker keys status", None),
    NoSuchMethodError: (grpc.StatusCode.UNIMPLEMENTED, "there is no such method", None),
}
"""What the caller is told of the errors that have no refusal."""


def status_of_error(error: BaseException) -> grpc.Status:
    """Return what the caller is told of `error`."""
    match error:
        case RefusedError(refusal=refusal):
            return rich_status(CODES[refusal.reason], str(refusal.reason), refusal.message, refusal.retry_after)
        case CarnetError() if type(error) in _TOLD:
            code, text, retry_after = _TOLD[type(error)]
            return rich_status(code, error.code, text, retry_after)
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
