"""What verifiers say while the store is away: what is kept of it, in which order, and what is told to whom."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from carnet_broker import session_changes
from carnet_broker.core.rollout import VerifierSession
from carnet_broker.ports import Acknowledged, Joined, Left, SessionChange, SessionOutcome
from carnet_broker.session_changes import ENDED_STREAMS, Said, SessionChanges

T0 = datetime(2026, 11, 24, 12, tzinfo=UTC)
PAYMENTS = "spiffe://prod.example/ns/shop/sa/payments"


class Outage:
    """Changes that nobody writes, and what is told of them."""

    def __init__(self) -> None:
        self.changes = SessionChanges()
        self.told: list[tuple[SessionChange, SessionOutcome]] = []
        self.mono = 0.0

    def say(self, *changes: SessionChange) -> None:
        """Say them, a second apart."""
        for change in changes:
            self.mono += 1
            self.changes.add(Said(change, self.mono, lambda outcome, of=change: self.told.append((of, outcome))))

    def kept(self) -> list[SessionChange]:
        """Take out all that is kept."""
        return [said.change for said in self.changes.take(10**6)]


@pytest.fixture(name="outage")
def _outage() -> Outage:
    return Outage()


def joined(stream: str, instance: str = "v1") -> Joined:
    """A verifier joins."""
    session = VerifierSession(
        spiffe_id=PAYMENTS,
        instance_id=instance,
        audience="payments",
        replica_id="one",
        generation=1,
        generation_at=T0,
        revocation_version=0,
        revocation_at=T0,
        max_staleness=timedelta(minutes=5),
    )
    return Joined(session, stream)


def heard(stream: str, version: int, instance: str = "v1") -> Acknowledged:
    """A verifier has loaded a revocation."""
    return Acknowledged(PAYMENTS, instance, stream, 1, version, timedelta(0))


def left(stream: str, instance: str = "v1") -> Left:
    """A verifier leaves."""
    return Left(PAYMENTS, instance, stream)


def test_of_one_stream_the_newest_acknowledgement_is_kept_with_the_time_at_which_it_was_said(outage):
    """However many there are; that of another verifier stays."""
    outage.say(joined("s1"), heard("s2", 1, "v2"), *(heard("s1", version) for version in range(1, 1000)))
    taken = outage.changes.take(10)
    assert [joined("s1"), heard("s1", 999), heard("s2", 1, "v2")] == [said.change for said in taken]
    assert timedelta(seconds=3) == taken[1].aged(outage.mono + 3).ago
    assert timedelta(0) == taken[1].aged(outage.mono - 3).ago
    assert joined("s1") == taken[0].aged(outage.mono)


def test_one_that_comes_again_and_again_is_kept_once_and_the_others_hear_that_they_are_not_counted(outage):
    """The end of the stream that the store may know stays before it."""
    outage.say(left("s0"), joined("s1"), heard("s1", 1), joined("s2"))
    assert [left("s0"), joined("s2")] == outage.kept()
    assert [(joined("s1"), False), (heard("s1", 1), False)] == [(of, outcome.live) for of, outcome in outage.told]


def test_a_stream_that_ends_is_not_joined_any_more_but_its_end_is_told(outage):
    """The store may know it after all: an answer of it can have been lost."""
    outage.say(joined("s1"), heard("s1", 1), left("s1"))
    assert [left("s1")] == outage.kept()


def test_of_one_verifier_only_the_newest_ends_are_kept(outage):
    """Its streams break off all the time, and the store is away for long."""
    for number in range(100):
        outage.say(joined(f"s{number}"), left(f"s{number}"))
    outage.say(joined("last"))
    assert [*(left(f"s{number}") for number in range(100 - ENDED_STREAMS, 100)), joined("last")] == outage.kept()


def test_more_verifiers_than_there_can_be_are_not_counted_until_there_is_room(outage, monkeypatch):
    """Those that are there may go on; one that is turned away may try again."""
    monkeypatch.setattr(session_changes, "VERIFIERS", 3)
    outage.say(*(joined(f"s{number}", f"v{number}") for number in range(4)))
    assert [(joined("s3", "v3"), SessionOutcome(live=False))] == outage.told
    outage.say(heard("s0", 1, "v0"), left("s9", "v9"), joined("again", "v1"))
    outage.say(joined("s3", "v3"))
    assert 3 == len(outage.told)
    assert 5 == len(outage.kept())
    outage.say(joined("s3", "v3"))
    assert [joined("s3", "v3")] == outage.kept()


def test_what_could_not_be_written_comes_before_what_was_said_since_and_is_outdone_by_it(outage):
    """As if nobody had tried."""
    outage.say(joined("s1"), heard("s1", 1), left("s2", "v2"))
    taken = outage.changes.take(10)
    outage.say(heard("s3", 1, "v3"), heard("s1", 2), joined("s4", "v2"))
    outage.changes.put_back(taken)
    assert [joined("s1"), heard("s1", 2), left("s2", "v2"), joined("s4", "v2"), heard("s3", 1, "v3")] == outage.kept()
    assert [heard("s1", 1)] == [of for of, _ in outage.told]


def test_changes_of_one_verifier_are_taken_together(outage):
    """Else another batch could be put back after them."""
    outage.say(joined("s1"), joined("s2", "v2"), heard("s1", 1))
    assert [joined("s1"), heard("s1", 1)] == [said.change for said in outage.changes.take(1)]
    assert [joined("s2", "v2")] == [said.change for said in outage.changes.take(1)]
    assert [] == outage.changes.take(1)


def test_nobody_has_to_be_told():
    """An acknowledgement has nobody who waits for its outcome."""
    changes = SessionChanges()
    for version in (1, 2):
        changes.add(Said(heard("s1", version), 0.0, None))
    (said,) = changes.take(1)
    said.tell(SessionOutcome(live=True))
    assert heard("s1", 2) == said.change
