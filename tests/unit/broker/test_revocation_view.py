"""What a replica holds of the revocations: it takes what leads on, and goes back never."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind, next_digest
from carnet_broker.ports import Appended, LogPosition, RevocationPage
from carnet_broker.revocation_view import RevocationHolder

T0 = datetime(2026, 11, 24, 12, tzinfo=UTC)
END = T0 + timedelta(hours=1)
SUBJECT = "spiffe://prod.example/ns/shop/sa/orders"


def entry(version: int) -> Revocation:
    """An entry of the log."""
    return Revocation(version, RevocationKind.TOKEN, f"token-number-{version:06}", 0, END)


def position(version: int, epoch: int = 1) -> LogPosition:
    """The place after that many of these entries."""
    digest = GENESIS_DIGEST
    for number in range(1, version + 1):
        digest = next_digest(digest, entry(number))
    return LogPosition(epoch, version, digest)


def page(version: int, *entries: Revocation, snapshot: bool = False, epoch: int = 1) -> RevocationPage:
    """What the store gives."""
    return RevocationPage(position(version, epoch), snapshot=snapshot, entries=entries, read_at=T0)


def holder_at(version: int) -> RevocationHolder:
    """A replica that has read a snapshot."""
    holder = RevocationHolder()
    holder.take(page(version, *map(entry, range(1, version + 1)), snapshot=True), now=T0, mono=0.0)
    return holder


def test_before_the_first_reading_there_is_nothing_to_tell():
    """No view, version 0, and no snapshot."""
    holder = RevocationHolder()
    assert (None, 0) == (holder.view, holder.version)
    with pytest.raises(LookupError):
        holder.snapshot()
    assert not holder.extend(Appended((entry(1),), position(1), T0))


def test_a_delta_leads_on_and_is_in_force():
    """The set has it before the position says so, and the tail leads there."""
    holder = holder_at(1)
    assert holder.take(page(3, entry(2), entry(3)), now=T0 + timedelta(seconds=1), mono=1.0)
    assert position(3) == holder.view.position
    assert (entry(1), entry(2), entry(3)) == holder.snapshot()[1]
    assert (entry(2), entry(3)) == holder.view.tail.since(1, position(1).digest)


def test_what_is_there_already_changes_only_the_time_of_the_reading():
    """Two that read race; nothing is entered twice."""
    holder = holder_at(3)
    assert not holder.take(page(3), now=T0 + timedelta(seconds=5), mono=5.0)
    assert not holder.take(page(3, entry(2), entry(3)), now=T0 + timedelta(seconds=6), mono=6.0)
    assert timedelta(seconds=1) == holder.view.age(T0 + timedelta(seconds=7), 7.0)
    assert position(3) == holder.view.position


def test_a_page_that_begins_before_what_was_appended_meanwhile_gives_only_the_rest():
    """The replica appended version 2 while it was being read."""
    holder = holder_at(1)
    assert holder.extend(Appended((entry(2),), position(2), T0))
    assert holder.take(page(3, entry(2), entry(3)), now=T0, mono=0.0)
    assert position(3) == holder.view.position


def test_a_gap_is_not_bridged():
    """Neither by what was read nor by what was appended after others."""
    holder = holder_at(1)
    assert not holder.take(page(3, entry(3)), now=T0, mono=0.0)
    assert not holder.extend(Appended((entry(3),), position(3), T0))
    assert not holder.extend(Appended((entry(2),), position(2, epoch=2), T0))
    assert position(1) == holder.view.position


def test_within_an_epoch_a_snapshot_does_not_lead_back():
    """A later one does lead on, and so does one of a later epoch."""
    holder = holder_at(3)
    assert not holder.take(page(2, entry(1), entry(2), snapshot=True), now=T0, mono=0.0)
    assert position(3) == holder.view.position
    assert holder.take(page(4, entry(4), snapshot=True), now=T0, mono=0.0)
    assert holder.take(page(0, snapshot=True, epoch=2), now=T0, mono=0.0)
    assert not holder.take(page(9, snapshot=True, epoch=1), now=T0, mono=0.0)
    assert position(0, epoch=2) == holder.view.position


def test_a_snapshot_is_united_with_what_is_in_force_here():
    """A store that was restored does not bring a revoked token back; a LIFT ends an older BLOCK of ours."""
    block = Revocation(2, RevocationKind.BLOCK, SUBJECT, 2, None)
    lift = Revocation(1_000_004, RevocationKind.LIFT, SUBJECT, 1_000_004, END)
    holder = RevocationHolder()
    holder.take(page(2, entry(1), block, snapshot=True), now=T0, mono=0.0)
    holder.take(page(4, lift, snapshot=True, epoch=2), now=T0, mono=0.0)
    assert (entry(1), lift) == holder.snapshot()[1]


def test_a_snapshot_is_made_once_for_each_position():
    """However many ask for it."""
    holder = holder_at(2)
    first = holder.snapshot()
    assert holder.snapshot() is first
    holder.extend(Appended((entry(3),), position(3), T0))
    assert position(3) == holder.snapshot()[0]


def test_what_has_ended_is_dropped():
    """From the set and from snapshots; who holds an older snapshot holds more."""
    holder = holder_at(2)
    holder.extend(Appended((replace(entry(3), expires_at=END + timedelta(hours=1)),), position(3), T0))
    later = holder_at(2)
    assert 0 == later.expire(END - timedelta(seconds=1))
    assert 2 == later.expire(END)
    assert () == later.snapshot()[1]


def test_the_age_is_that_of_the_clock_that_says_more():
    """The wall may be set back, and the other clock stands still in a suspend."""
    view = holder_at(1).view
    assert timedelta(seconds=9) == view.age(T0 + timedelta(seconds=9), 1.0)
    assert timedelta(seconds=9) == view.age(T0 - timedelta(hours=1), 9.0)
