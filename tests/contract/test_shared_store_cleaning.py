"""What the shared store cleans up, and what it keeps however the clocks jump."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from carnet.revocations import RevocationKind
from carnet_broker.edges.store.cleaning import KEPT, SETTLED, SlowClock
from support.store_places import ALICE, BOB, SqlitePlace, Store, StorePlace, joined, report, revoked

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)


@pytest.fixture(name="place")
def _place(store_place: StorePlace) -> StorePlace:
    """An empty store of each kind."""
    return store_place


def settled(place: StorePlace) -> Store:
    """A broker that has followed the clocks for long enough to clean."""
    store = place.open()
    assert 0 == store.replicas.clean()
    place.clock.let_pass(SETTLED)
    assert 0 == store.replicas.clean()
    return store


def test_what_has_ended_is_deleted_a_while_later(place: StorePlace):
    """A revocation stays ten minutes beyond its end; what lasts stays; the version goes on."""
    store = settled(place)
    store.revocations.append([revoked(place), revoked(place, BOB, lasts=3 * HOUR)])
    store.revocations.append([revoked(place, BOB, RevocationKind.BLOCK, lasts=None)])
    place.clock.let_pass(HOUR + KEPT - MINUTE)
    assert 0 == store.replicas.clean()
    place.clock.let_pass(2 * MINUTE)
    assert 1 == store.replicas.clean()
    page = store.revocations.read(None)
    assert ([2, 3], 3) == ([entry.version for entry in page.entries], page.position.version)
    assert [4] == [entry.version for entry in store.revocations.append([revoked(place)]).entries]


def test_reader_from_before_what_was_cleaned_up_gets_a_snapshot(place: StorePlace):
    """A delta with a gap would not lead to the digest; one from after the gap is given."""
    store = settled(place)
    start = store.revocations.read(None).position
    first = store.revocations.append([revoked(place)]).position
    second = store.revocations.append([revoked(place, BOB, lasts=9 * HOUR)]).position
    place.clock.let_pass(2 * HOUR)
    assert 1 == store.replicas.clean()
    assert store.revocations.read(start).snapshot
    page = store.revocations.read(first)
    assert (False, [2], second) == (page.snapshot, [entry.version for entry in page.entries], page.position)
    # And it does not look as if the store had been restored.
    assert second == store.revocations.begin_epoch(seen=start, carry=(), now=place.clock.now())


def test_block_goes_with_its_lift(place: StorePlace):
    """The lift ends, and the block that it ended is not in force again; one that came after the lift stays."""
    store = settled(place)
    store.revocations.append(
        [
            revoked(place, ALICE, RevocationKind.BLOCK, lasts=None),
            revoked(place, ALICE, RevocationKind.LIFT),
            revoked(place, ALICE, RevocationKind.BLOCK, lasts=None),
            revoked(place, BOB, RevocationKind.BLOCK, lasts=None),
            revoked(place, BOB, RevocationKind.LIFT, lasts=9 * HOUR),
        ]
    )
    place.clock.let_pass(2 * HOUR)
    assert 2 == store.replicas.clean()
    assert [3, 4, 5] == [entry.version for entry in store.revocations.read(None).entries]


def test_brokers_and_verifiers_that_are_gone_are_deleted(place: StorePlace):
    """First the sessions, after their max_staleness, then the broker that served them; those of live ones stay."""
    store = settled(place)
    store.replicas.renew(report("gone"))
    store.sessions.write([joined("one", replica="gone"), joined("patient", replica="gone", max_staleness=5 * HOUR)])
    store.sessions.write([joined("two", replica="here")])
    place.clock.let_pass(HOUR)
    store.replicas.renew(report("here"))
    assert 1 == store.replicas.clean()
    assert ["patient", "two"] == [session.instance_id for session in store.sessions.all()]
    place.clock.let_pass(5 * HOUR)
    seen = store.replicas.renew(report("here"))
    assert ["gone", "here"] == [lease.replica_id for lease in seen.replicas]
    assert 2 == store.replicas.clean()
    assert ["two"] == [session.instance_id for session in store.sessions.all()]
    assert ["here"] == [lease.replica_id for lease in store.replicas.renew(report("here")).replicas]


@pytest.mark.parametrize("hours", [2, 24 * 365])
def test_clock_that_jumps_ahead_deletes_nothing_that_is_in_force(place: StorePlace, hours: int):
    """However far it is ahead, for however long, and however often it is cleaned meanwhile; nor when it is back."""
    store = settled(place)
    store.replicas.renew(report())
    store.sessions.write([joined()])
    store.revocations.append([revoked(place, lasts=4 * HOUR)])
    place.clock.jump(hours * HOUR)
    for _ in range(6):
        assert 0 == store.replicas.clean()
        place.clock.let_pass(MINUTE)
        store.replicas.renew(report())
    place.clock.let_pass(2 * HOUR)
    assert 0 == store.replicas.clean()
    place.clock.jump(-hours * HOUR)
    store.replicas.renew(report())
    assert 0 == store.replicas.clean()
    assert (1, 1) == (len(store.revocations.read(None).entries), len(store.sessions.all()))
    place.clock.let_pass(3 * HOUR)
    store.replicas.renew(report())
    assert 1 == store.replicas.clean()


def test_process_that_starts_during_a_jump_deletes_nothing_for_an_hour_and_learns_when_it_ends(place: StorePlace):
    """It did not see the clock before the jump. When the clock is put right, the time from then on counts."""
    place.open().revocations.append([revoked(place, lasts=4 * HOUR)])
    place.clock.jump(24 * HOUR)
    started = place.open()
    assert 0 == started.replicas.clean()
    place.clock.let_pass(59 * MINUTE)
    assert 0 == started.replicas.clean()
    place.clock.jump(-24 * HOUR)
    assert 0 == started.replicas.clean()
    place.clock.let_pass(HOUR)
    place.clock.jump(24 * HOUR)
    assert 0 == started.replicas.clean()
    assert 1 == len(started.revocations.read(None).entries)


def test_clock_that_is_behind_only_delays(place: StorePlace):
    """An entry that has ended stays longer, and is deleted by the time that passes."""
    store = settled(place)
    store.revocations.append([revoked(place)])
    place.clock.jump(-5 * HOUR)
    place.clock.let_pass(2 * HOUR)
    assert 0 == store.replicas.clean()
    place.clock.let_pass(5 * HOUR)
    assert 1 == store.replicas.clean()


def test_slow_clock_believes_the_slowest():
    """Of several clocks, and of all that they said, the one that was furthest behind counts, and time that passes."""
    clock, noon = SlowClock(HOUR), datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert clock.time(noon, noon + HOUR, elapsed=timedelta()) is None
    assert clock.time(noon + 9 * HOUR, noon + 9 * HOUR, elapsed=HOUR - MINUTE) is None
    assert noon + HOUR == clock.time(noon + 9 * HOUR, noon + 9 * HOUR, elapsed=HOUR)
    assert noon == clock.time(noon, noon + 9 * HOUR, elapsed=HOUR)
    assert noon + HOUR == clock.time(noon + 9 * HOUR, elapsed=2 * HOUR)


def test_one_of_two_clocks_that_jumps_deletes_nothing(tmp_path):
    """Broker and database are on two machines: it takes both to be wrong. A host's clock that is right suffices."""
    place = SqlitePlace(tmp_path)
    store = settled(place)
    store.revocations.append([revoked(place)])
    right = place.clock.now()
    cleaning = store.replicas._cleaning
    cleaning._now = lambda: right
    cleaning._clock = SlowClock(timedelta())
    place.clock.jump(24 * HOUR)
    assert 0 == store.replicas.clean()
    place.close()
