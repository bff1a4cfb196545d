"""The messages of TrustService: what goes over the wire, and what a verifier may say of itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from carnet.revocations import Position, Revocation, RevocationKind
from carnet.v1 import trust_pb2
from carnet_broker.core.watching import Change, Hello, HelloError
from carnet_broker.edges.grpc.trust_messages import change_message, hello_of, position_message, position_of
from carnet_broker.ports import LogPosition

DIGEST = b"d" * 32
HERE = Position(7, 3, 9, DIGEST)
ENDS = datetime(2026, 11, 24, 12, tzinfo=UTC)


def hello(**changes: object) -> trust_pb2.WatchHello:
    """A good hello, but for `changes`."""
    message = trust_pb2.WatchHello(**{"instance_id": "one", "audience": "payments", **changes})
    if "max_staleness" not in changes:
        message.max_staleness.FromTimedelta(timedelta(minutes=5))
    return message


def test_a_position_survives_the_wire():
    """All four numbers of it."""
    assert HERE == position_of(position_message(HERE))


@pytest.mark.parametrize(
    "message",
    [trust_pb2.Position(epoch=2**53, revocation_digest=DIGEST), trust_pb2.Position(epoch=1, revocation_digest=b"d")],
    ids=["too large", "short digest"],
)
def test_a_position_that_cannot_be_is_refused(message):
    """The message names the field."""
    with pytest.raises(HelloError, match="position"):
        position_of(message)


@pytest.mark.parametrize("kind", list(RevocationKind))
def test_each_kind_of_revocation_has_its_name_on_the_wire(kind):
    """By the same word; one without an end has none there either."""
    ends = None if kind is RevocationKind.BLOCK else ENDS
    change = Change(
        8,
        LogPosition(7, 9, DIGEST),
        snapshot=False,
        more=True,
        entries=(Revocation(9, kind, "value", 9, ends),),
    )
    message = change_message(change)
    (entry,) = message.revocations
    assert f"REVOCATION_KIND_{kind.name}" == trust_pb2.RevocationKind.Name(entry.kind)
    assert (9, "value", 9) == (entry.version, entry.value, entry.before_version)
    assert ends == (entry.expires_at.ToDatetime(tzinfo=UTC) if entry.HasField("expires_at") else None)
    assert (8, 9, DIGEST, False, True) == (
        message.from_version,
        message.to_version,
        message.to_digest,
        message.snapshot,
        message.more,
    )


@pytest.mark.parametrize("position", [None, HERE])
def test_a_hello_is_what_the_verifier_said(position):
    """With where it is, or without: then it has loaded nothing."""
    said = {} if position is None else {"position": position_message(position)}
    expected = Hello("one", "payments", position, timedelta(minutes=5), accepts_stale=True)
    assert expected == hello_of(hello(accepts_stale=True, **said))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"instance_id": "a b"}, "instance_id"),
        ({"audience": ""}, "audience"),
        ({"max_staleness": {"seconds": 2**62}}, "max_staleness"),
        ({"max_staleness": {"seconds": -(2**62)}}, "max_staleness"),
        ({"max_staleness": {"nanos": 1}}, "max_staleness"),
        ({"position": trust_pb2.Position(epoch=1)}, "position"),
    ],
)
def test_a_hello_that_cannot_be_is_refused_by_the_name_of_its_field(changes, names):
    """Also a duration that is longer than any that Python has."""
    with pytest.raises(HelloError, match=f"^{names}: "):
        hello_of(hello(**changes))
