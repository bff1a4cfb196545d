"""The messages of TrustService, made from the values that the rest of the broker knows, and back."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration

from carnet.revocations import Position, Revocation, RevocationKind
from carnet.v1 import trust_pb2
from carnet_broker.core.watching import Change, Hello, check_hello, check_position
from carnet_broker.signing import KeyringView

__all__ = ["change_message", "hello_of", "key_set_message", "position_message", "position_of"]

_KINDS: Final = {
    RevocationKind.TOKEN: trust_pb2.REVOCATION_KIND_TOKEN,
    RevocationKind.SUBJECT: trust_pb2.REVOCATION_KIND_SUBJECT,
    RevocationKind.CERTIFICATE: trust_pb2.REVOCATION_KIND_CERTIFICATE,
    RevocationKind.ROOT: trust_pb2.REVOCATION_KIND_ROOT,
    RevocationKind.BLOCK: trust_pb2.REVOCATION_KIND_BLOCK,
    RevocationKind.LIFT: trust_pb2.REVOCATION_KIND_LIFT,
}
_LONGEST_SECONDS: Final = 10 * 365 * 86_400


def key_set_message(view: KeyringView, *, max_age: timedelta) -> trust_pb2.GetKeySetResponse:
    """Return the published keys of `view`, without their age."""
    message = trust_pb2.GetKeySetResponse(
        issuer=view.keyring.issuer, generation=view.keyring.generation, jwks=view.jwks
    )
    message.max_age.FromTimedelta(max_age)
    return message


def position_message(position: Position) -> trust_pb2.Position:
    """Return a position as it goes over the wire."""
    return trust_pb2.Position(
        epoch=position.epoch,
        generation=position.generation,
        revocation_version=position.revocation_version,
        revocation_digest=position.revocation_digest,
    )


def position_of(message: trust_pb2.Position) -> Position:
    """Return the position in `message`. Raises `HelloError` where it cannot be one."""
    position = Position(message.epoch, message.generation, message.revocation_version, message.revocation_digest)
    check_position(position)
    return position


def change_message(change: Change) -> trust_pb2.RevocationChange:
    """Return one part of a change as it goes over the wire."""
    return trust_pb2.RevocationChange(
        from_version=change.from_version,
        to_version=change.to.version,
        to_digest=change.to.digest,
        snapshot=change.snapshot,
        more=change.more,
        revocations=map(_revocation_message, change.entries),
    )


def hello_of(message: trust_pb2.WatchHello) -> Hello:
    """Return how a verifier introduces itself. Raises `HelloError` where that cannot be."""
    hello = Hello(
        instance_id=message.instance_id,
        audience=message.audience,
        position=position_of(message.position) if message.HasField("position") else None,
        max_staleness=_timedelta(message.max_staleness),
        accepts_stale=message.accepts_stale,
    )
    check_hello(hello)
    return hello


def _revocation_message(entry: Revocation) -> trust_pb2.Revocation:
    message = trust_pb2.Revocation(
        version=entry.version, kind=_KINDS[entry.kind], value=entry.value, before_version=entry.before_version
    )
    if entry.expires_at is not None:
        message.expires_at.FromDatetime(entry.expires_at)
    return message


def _timedelta(message: Duration) -> timedelta:
    """Return a duration; one that is out of all bounds as the longest there is, which is refused like any other."""
    seconds = min(max(message.seconds, -_LONGEST_SECONDS), _LONGEST_SECONDS)
    return timedelta(seconds=seconds, microseconds=message.nanos // 1000)
