"""The messages of `TrustService` as values of `carnet.trust_state`, and back. Strict: what cannot be is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration

from carnet.errors import InvalidKeySetError
from carnet.jwk import KeySet
from carnet.revocations import Position, Revocation, RevocationKind
from carnet.trust_messages import Answer, Change, Goodbye, Hello, PushedKeys, RefusedResponseError, Response
from carnet.v1 import trust_pb2

__all__ = ["polled_response", "position_message", "read_position", "request_message", "watch_response"]

_KINDS: Final = {
    trust_pb2.REVOCATION_KIND_TOKEN: RevocationKind.TOKEN,
    trust_pb2.REVOCATION_KIND_SUBJECT: RevocationKind.SUBJECT,
    trust_pb2.REVOCATION_KIND_CERTIFICATE: RevocationKind.CERTIFICATE,
    trust_pb2.REVOCATION_KIND_ROOT: RevocationKind.ROOT,
    trust_pb2.REVOCATION_KIND_BLOCK: RevocationKind.BLOCK,
    trust_pb2.REVOCATION_KIND_LIFT: RevocationKind.LIFT,
}


def watch_response(message: trust_pb2.WatchResponse) -> Response:
    """Return what `message` says. Raises `RefusedResponseError`."""
    return Response(
        position=read_position(message.position),
        age=_duration(message.age),
        answered=message.answered,
        heartbeat=_duration(message.heartbeat),
        keys=_keys(message.key_set) if message.HasField("key_set") else None,
        change=_change(message.change) if message.HasField("change") else None,
        live=message.live,
        size=message.ByteSize(),
    )


def polled_response(message: trust_pb2.GetRevocationsResponse) -> Response:
    """Return what one part of the answer to a poll says. Raises `RefusedResponseError`."""
    return Response(
        position=read_position(message.position),
        age=_duration(message.age),
        change=_change(message.change) if message.HasField("change") else None,
        size=message.ByteSize(),
    )


def request_message(said: Hello | Answer | Goodbye) -> trust_pb2.WatchRequest:
    """Return the message of what is said."""
    match said:
        case Hello():
            max_staleness = Duration()
            max_staleness.FromTimedelta(said.max_staleness)
            hello = trust_pb2.WatchHello(
                instance_id=said.instance_id,
                audience=said.audience,
                position=position_message(said.position),
                max_staleness=max_staleness,
                accepts_stale=said.accepts_stale,
            )
            return trust_pb2.WatchRequest(hello=hello)
        case Answer():
            answer = trust_pb2.WatchAnswer(number=said.number, position=position_message(said.position))
            return trust_pb2.WatchRequest(answer=answer)
    return trust_pb2.WatchRequest(goodbye=trust_pb2.WatchGoodbye())


def position_message(position: Position | None) -> trust_pb2.Position | None:
    """Return the message of `position`, None where there is none."""
    if position is None:
        return None
    return trust_pb2.Position(
        epoch=position.epoch,
        generation=position.generation,
        revocation_version=position.revocation_version,
        revocation_digest=position.revocation_digest,
    )


def read_position(message: trust_pb2.Position) -> Position:
    """Return the position that `message` is."""
    return Position(message.epoch, message.generation, message.revocation_version, message.revocation_digest)


def _keys(message: trust_pb2.GetKeySetResponse) -> PushedKeys:
    try:
        keys = KeySet.parse(message.jwks)
    except InvalidKeySetError as error:
        msg = f"its key set: {error}"
        raise RefusedResponseError(msg) from error
    return PushedKeys(message.issuer, message.generation, keys, _duration(message.max_age))


def _change(message: trust_pb2.RevocationChange) -> Change:
    return Change(
        from_version=message.from_version,
        to_version=message.to_version,
        to_digest=message.to_digest,
        snapshot=message.snapshot,
        more=message.more,
        entries=tuple(map(_revocation, message.revocations)),
    )


def _revocation(message: trust_pb2.Revocation) -> Revocation:
    kind = _KINDS.get(message.kind)
    if kind is None:
        msg = f"revocation {message.version} is of a kind that this version of the SDK does not know ({message.kind})"
        raise RefusedResponseError(msg)
    ends = None
    if message.HasField("expires_at"):
        if message.expires_at.nanos:
            msg = f"revocation {message.version} does not end at a whole second"
            raise RefusedResponseError(msg)
        try:
            ends = datetime.fromtimestamp(message.expires_at.seconds, UTC)
        except (OverflowError, OSError, ValueError) as error:
            msg = f"revocation {message.version} ends at a time that cannot be"
            raise RefusedResponseError(msg) from error
    return Revocation(message.version, kind, message.value, message.before_version, ends)


def _duration(message: Duration) -> timedelta:
    try:
        return message.ToTimedelta()
    except (ValueError, OverflowError) as error:
        msg = "its times are out of range"
        raise RefusedResponseError(msg) from error
