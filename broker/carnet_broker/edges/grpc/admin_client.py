"""The other side of AdminService: what the command line asks a broker, with the caller's own certificate.

It finds its settings where the SDK does (CARNET_CERT_FILE, CARNET_KEY_FILE, CARNET_CA_FILE, CARNET_BROKER_NAME), and
CARNET_ADMIN says where the broker is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from carnet import settings
from carnet.errors import CarnetError, ConfigError
from carnet.revocations import RevocationKind
from carnet.tls import secure_channel
from carnet.v1 import admin_pb2, admin_pb2_grpc

__all__ = [
    "ADMIN",
    "AdminClient",
    "AdminInputError",
    "AdminRefusedError",
    "AdminUnavailableError",
    "Revoked",
    "SpreadSeen",
    "Status",
    "VerifierSeen",
]

ADMIN: Final = settings.Variable("CARNET_ADMIN", "--admin", "host:port of the broker's admin port")
_WITHIN: Final = 15.0
_KEY_WITHIN: Final = 30.0
"""Seconds; the broker waits for Vault."""

_INPUT: Final = frozenset({grpc.StatusCode.INVALID_ARGUMENT})
_REFUSED: Final = frozenset(
    {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND}
)
_FIELDS: Final = {
    RevocationKind.TOKEN: "token_id",
    RevocationKind.SUBJECT: "subject",
    RevocationKind.BLOCK: "subject",
    RevocationKind.CERTIFICATE: "certificate",
    RevocationKind.ROOT: "root",
    RevocationKind.LIFT: "lift",
}

_Answer = TypeVar("_Answer", bound=Message)


class AdminInputError(CarnetError):
    """The broker says that what it was asked cannot be."""

    code = "INVALID_REQUEST"


class AdminRefusedError(CarnetError):
    """The broker refuses: the caller is no admin, or there is no such key."""

    code = "REFUSED"


class AdminUnavailableError(CarnetError):
    """The broker could not be asked, or could not do it now. Whether it did is not known."""

    code = "UNAVAILABLE"
    retryable = True


@dataclass(frozen=True, slots=True)
class Revoked:
    """What a broker answered to Revoke: it is durable."""

    epoch: int
    version: int
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class VerifierSeen:
    """One verifier, as the broker tells of it."""

    spiffe_id: str
    instance_id: str
    replica_id: str
    generation: int
    revocation_version: int
    acknowledged_ago: timedelta
    lagging: bool


@dataclass(frozen=True, slots=True)
class SpreadSeen:
    """How far a revocation has spread."""

    live: int
    acknowledged: int
    p50: timedelta | None
    p99: timedelta | None
    slowest: timedelta | None
    missing: tuple[VerifierSeen, ...]


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    """One broker, as another one tells of it."""

    replica_id: str
    version: str
    generation: int
    revocation_version: int
    renewed_ago: timedelta
    live: bool


@dataclass(frozen=True, slots=True)
class RolloutTold:
    """The standby key on its way to being the signer."""

    kid: str
    generation: int
    permitted: bool
    deadline: datetime | None
    window_ends: datetime | None
    missing: int


@dataclass(frozen=True, slots=True)
class Status:
    """How brokers, verifiers and rotation stand."""

    epoch: int
    generation: int
    revocation_version: int
    replicas: tuple[ReplicaSeen, ...]
    verifiers: tuple[VerifierSeen, ...]
    live_verifiers: int
    rollout: RolloutTold | None


class AdminClient:
    """Asks one broker. A context manager."""

    def __init__(self, admin: str | None = None) -> None:
        """Read the settings; nothing is connected yet. Raises `ConfigError` that names the variable.

        `admin`: host:port, None for CARNET_ADMIN.
        """
        found = settings.targets(ADMIN, admin)
        if len(found) != 1:
            msg = f"{ADMIN.source(admin)} names {len(found)} brokers: give one, for each speaks for all"
            raise ConfigError(msg)
        identity = settings.identity()
        self._target = str(found[0])
        self._channel = secure_channel(
            self._target,
            identity=identity,
            ca_pem=settings.ca_pem(),
            server_name=settings.broker_name(workload=identity.spiffe_id),
        )
        self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def revoke(self, kind: RevocationKind, value: str, *, ends_at: datetime | None = None, reason: str = "") -> Revoked:
        """Revoke `value`, and return once that is durable. Raises one of the errors of this module."""
        request = admin_pb2.RevokeRequest(block=kind is RevocationKind.BLOCK, reason=reason)
        setattr(request, _FIELDS[kind], value)
        if ends_at is not None:
            request.ends_at.FromDatetime(ends_at)
        answer = self._ask(self._stub.Revoke, request)
        return Revoked(
            answer.epoch,
            answer.revocation_version,
            answer.created_at.ToDatetime(tzinfo=UTC),
            _moment(answer, "expires_at", answer.expires_at),
        )

    def spread(self, revoked: Revoked) -> SpreadSeen:
        """Return how far a revocation has spread. Raises as `revoke` does."""
        answer = self._ask(
            self._stub.GetSpread,
            admin_pb2.GetSpreadRequest(epoch=revoked.epoch, revocation_version=revoked.version),
        )
        p50, p99, slowest = (
            getattr(answer, name).ToTimedelta() if answer.HasField(name) else None for name in ("p50", "p99", "slowest")
        )
        return SpreadSeen(answer.live, answer.acknowledged, p50, p99, slowest, _verifiers(answer.missing))

    def revoke_key(self, kid: str) -> tuple[int, str]:
        """Stop trusting a signing key; return the keyring's generation and the key that signs. Raises as `revoke`."""
        answer = self._ask(self._stub.RevokeKey, admin_pb2.RevokeKeyRequest(key_id=kid), within=_KEY_WITHIN)
        return answer.generation, answer.active_key_id

    def status(self) -> Status:
        """Return how all stands. Raises as `revoke` does."""
        answer = self._ask(self._stub.GetStatus, admin_pb2.GetStatusRequest())
        rollout = None
        if answer.HasField("rollout"):
            told = answer.rollout
            rollout = RolloutTold(
                told.key_id,
                told.generation,
                told.permitted,
                _moment(told, "deadline", told.deadline),
                _moment(told, "poller_window_ends", told.poller_window_ends),
                told.missing,
            )
        replicas = tuple(
            ReplicaSeen(
                one.replica_id,
                one.version,
                one.generation,
                one.revocation_version,
                one.renewed_ago.ToTimedelta(),
                one.live,
            )
            for one in answer.replicas
        )
        position = answer.position
        return Status(
            position.epoch,
            position.generation,
            position.revocation_version,
            replicas,
            _verifiers(answer.verifiers),
            answer.live_verifiers,
            rollout,
        )

    def _ask(self, method: Callable[..., _Answer], request: Message, *, within: float = _WITHIN) -> _Answer:
        try:
            return method(request, timeout=within)
        except grpc.RpcError as error:
            raise self._error(error) from error

    def _error(self, error: grpc.RpcError) -> CarnetError:
        call: Any = error  # What a stub raises is a call as well, which its stubs do not say.
        code, text, reason = call.code(), str(call.details() or ""), _reason(call)
        if code in _INPUT:
            return AdminInputError(text)
        if code in _REFUSED and reason is not None:
            return AdminRefusedError(text)
        if reason is not None:
            return AdminUnavailableError(f"{ADMIN.name} {self._target}: {text} ({reason})")
        hint = "is a broker running there, and does CARNET_CA_FILE vouch for it and its for you?"
        return AdminUnavailableError(f"{ADMIN.name} {self._target}: no answer ({code.name}: {text[:200]}); {hint}")


def _reason(call: Any) -> str | None:  # noqa: ANN401 - see above
    """Return the reason that a broker gave, None where the error is not from one."""
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # Details that contradict the status.
        return None
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info) and info.domain == "carnet":
            return str(info.reason)
    return None


def _moment(message: Message, name: str, value: Timestamp) -> datetime | None:
    return value.ToDatetime(tzinfo=UTC) if message.HasField(name) else None


def _verifiers(told: Sequence[admin_pb2.VerifierStatus]) -> tuple[VerifierSeen, ...]:
    return tuple(
        VerifierSeen(
            one.spiffe_id,
            one.instance_id,
            one.replica_id,
            one.generation,
            one.revocation_version,
            one.acknowledged_ago.ToTimedelta(),
            one.lagging,
        )
        for one in told
    )
