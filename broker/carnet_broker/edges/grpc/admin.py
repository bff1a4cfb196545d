"""AdminService: from the wire to `Administration`, and back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from carnet.errors import CarnetError
from carnet.revocations import RevocationKind
from carnet.v1 import admin_pb2, admin_pb2_grpc
from carnet_broker.administration import Administration, RolloutSeen
from carnet_broker.core.rollout import ReplicaLease, VerifierSession
from carnet_broker.core.workload import Workload
from carnet_broker.edges.grpc.calls import caller
from carnet_broker.edges.grpc.trust_messages import position_message
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError

__all__ = ["AdminServicer"]

_MISSING: Final = 100
"""Verifiers that GetSpread names."""
_VERIFIERS: Final = 1000
"""Verifiers that GetStatus lists."""
_KINDS: Final = {
    "token_id": RevocationKind.TOKEN,
    "subject": RevocationKind.SUBJECT,
    "certificate": RevocationKind.CERTIFICATE,
    "root": RevocationKind.ROOT,
    "lift": RevocationKind.LIFT,
}

_Response = TypeVar("_Response")


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Serves AdminService to callers that `calls.AuthenticatedCalls` has let in, and that are admins."""

    def __init__(self, administration: Administration) -> None:
        self._administration = administration

    async def Revoke(  # noqa: N802 - the name in the proto
        self, request: admin_pb2.RevokeRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.RevokeResponse:
        """Make a revocation durable, or raise `RefusedError`."""

        async def serve(workload: Workload) -> admin_pb2.RevokeResponse:
            kind, value = _target(request)
            appended = await self._administration.revoke(
                workload, kind, value, ends_at=_moment(request), reason=request.reason
            )
            entry = appended.standing[-1]
            response = admin_pb2.RevokeResponse(epoch=appended.position.epoch, revocation_version=entry.version)
            response.created_at.FromDatetime(appended.at)
            if entry.expires_at is not None:
                response.expires_at.FromDatetime(entry.expires_at)
            return response

        return await self._answer("Revoke", context, serve)

    async def GetSpread(  # noqa: N802 - as above
        self, request: admin_pb2.GetSpreadRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.GetSpreadResponse:
        """Tell how far a revocation has spread."""

        async def serve(_: Workload) -> admin_pb2.GetSpreadResponse:
            # Versions go on rising from epoch to epoch, so the version says it all.
            spread = await self._administration.spread(request.revocation_version)
            response = admin_pb2.GetSpreadResponse(
                live=spread.live,
                acknowledged=spread.acknowledged,
                missing=[_verifier(session, lagging=True) for session in spread.missing[:_MISSING]],
            )
            for field, share in ((response.p50, 50), (response.p99, 99), (response.slowest, 100)):
                delay = spread.percentile(share)
                if delay is not None:
                    field.FromTimedelta(delay)
            return response

        return await self._answer("GetSpread", context, serve)

    async def RevokeKey(  # noqa: N802 - as above
        self, request: admin_pb2.RevokeKeyRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.RevokeKeyResponse:
        """Stop trusting a signing key, or raise `RefusedError`."""

        async def serve(workload: Workload) -> admin_pb2.RevokeKeyResponse:
            revoked = await self._administration.revoke_key(workload, request.key_id, peer=context.peer())
            return admin_pb2.RevokeKeyResponse(generation=revoked.generation, active_key_id=revoked.active_kid)

        return await self._answer("RevokeKey", context, serve)

    async def GetStatus(  # noqa: N802 - as above
        self, request: admin_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin_pb2.GetStatusResponse:
        """Tell how brokers, verifiers and rotation stand."""
        del request

        async def serve(_: Workload) -> admin_pb2.GetStatusResponse:
            standing = await self._administration.standing()
            now = standing.seen.now
            response = admin_pb2.GetStatusResponse(
                replicas=[_replica(replica, now) for replica in standing.seen.replicas],
                verifiers=[
                    _verifier(session, lagging=lags, now=now) for session, lags in standing.verifiers[:_VERIFIERS]
                ],
                live_verifiers=len(standing.verifiers),
            )
            if standing.position is not None:
                response.position.CopyFrom(position_message(standing.position))
            if standing.rollout is not None:
                response.rollout.CopyFrom(_rollout(standing.rollout))
            return response

        return await self._answer("GetStatus", context, serve)

    async def _answer(
        self,
        method: str,
        context: grpc.aio.ServicerContext[object, object],
        serve: Callable[[Workload], Awaitable[_Response]],
    ) -> _Response:
        """Serve an admin; put on the audit record who is refused, and why."""
        workload, peer = caller(), context.peer()
        try:
            self._administration.admit(workload, peer)
            return await serve(workload)
        except CarnetError as error:
            reason, detail = error.code, str(error)
            if isinstance(error, RefusedError):
                reason, detail = str(error.refusal.reason), str(error.__cause__ or error.refusal.message)
            self._administration.refused(method, reason, detail, workload=workload, peer=peer)
            raise


def _target(request: admin_pb2.RevokeRequest) -> tuple[RevocationKind, str]:
    """Return what is to be revoked. Raises `RefusedError` where that is not said."""
    name = request.WhichOneof("target")
    if name is None:
        msg = "target: say what is to be revoked"
        raise _invalid(msg)
    value: str = getattr(request, name)
    if not request.block:
        return _KINDS[name], value
    if name != "subject":
        msg = "block: goes with a subject only"
        raise _invalid(msg)
    return RevocationKind.BLOCK, value


def _moment(request: admin_pb2.RevokeRequest) -> datetime | None:
    if not request.HasField("ends_at"):
        return None
    message: Timestamp = request.ends_at
    try:
        return message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        msg = "ends_at: this is no moment"
        raise _invalid(msg) from error


def _invalid(message: str) -> RefusedError:
    return RefusedError(Refusal(RefusalReason.INVALID_REQUEST, message))


def _verifier(session: VerifierSession, *, lagging: bool, now: datetime | None = None) -> admin_pb2.VerifierStatus:
    message = admin_pb2.VerifierStatus(
        spiffe_id=session.spiffe_id,
        instance_id=session.instance_id,
        replica_id=session.replica_id,
        generation=session.generation,
        revocation_version=session.revocation_version,
        lagging=lagging,
    )
    if now is not None:
        newest = max(session.generation_at, session.revocation_at)
        message.acknowledged_ago.FromTimedelta(max(now - newest, timedelta(0)))
    return message


def _replica(replica: ReplicaLease, now: datetime) -> admin_pb2.ReplicaStatus:
    message = admin_pb2.ReplicaStatus(
        replica_id=replica.replica_id,
        version=replica.version,
        generation=replica.generation,
        revocation_version=replica.revocation_version,
        live=replica.is_live(now),
    )
    message.renewed_ago.FromTimedelta(max(now - replica.renewed_at, timedelta(0)))
    return message


def _rollout(rollout: RolloutSeen) -> admin_pb2.RolloutStatus:
    message = admin_pb2.RolloutStatus(
        key_id=rollout.kid, generation=rollout.generation, permitted=rollout.permitted, missing=rollout.missing
    )
    if rollout.deadline is not None:
        message.deadline.FromDatetime(rollout.deadline)
    if rollout.window_ends is not None:
        message.poller_window_ends.FromDatetime(rollout.window_ends)
    return message
