"""The contract of the ports of the shared store: one suite for the fake, SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from carnet.errors import InvalidRevocationError
from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind, next_digest
from carnet_broker.core.lost_entries import is_behind
from carnet_broker.core.mirror import MirrorSignature
from carnet_broker.core.rollout import Permit, live_sessions, served_since
from carnet_broker.ports import (
    Acknowledged,
    Joined,
    Left,
    LogPosition,
    NewRevocation,
    RevocationPage,
    SessionOutcome,
    WaitingFor,
)
from support.store_places import (
    ALICE,
    BOB,
    StorePlace,
    joined,
    report,
    revoked,
)

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)


@pytest.fixture(name="place")
def _place(store_place: StorePlace) -> StorePlace:
    """An empty store of each kind."""
    return store_place


def chain(digest: bytes, entries: Sequence[Revocation]) -> bytes:
    """The digest after `entries`."""
    for entry in entries:
        digest = next_digest(digest, entry)
    return digest


# The log of revocations


def test_new_store_has_an_epoch_and_no_entries(place: StorePlace):
    """The first epoch is the moment at which the store was made, in milliseconds; the log begins at 0."""
    before = place.clock.now()
    page = place.open().revocations.read(None)
    assert (0, GENESIS_DIGEST, True, ()) == (page.position.version, page.position.digest, page.snapshot, page.entries)
    assert abs(page.position.epoch - before.timestamp() * 1000) < 60_000
    assert page.position == place.open().revocations.read(None).position


def test_entries_get_the_next_versions_in_their_order(place: StorePlace):
    """Versions begin at 1 and grow by one; SUBJECT, BLOCK and LIFT name their own version, the others none."""
    kinds = [RevocationKind.SUBJECT, RevocationKind.BLOCK, RevocationKind.LIFT]
    news = [revoked(place, kind=kind, lasts=None if kind is RevocationKind.BLOCK else HOUR) for kind in kinds]
    news.append(revoked(place, "A" * 22, RevocationKind.TOKEN))
    store = place.open()
    start = store.revocations.read(None).position
    first, rest = store.revocations.append(news[:1]), store.revocations.append(news[1:])
    entries = (*first.entries, *rest.entries)
    assert [1, 2, 3, 4] == [entry.version for entry in entries]
    assert [1, 2, 3, 0] == [entry.before_version for entry in entries]
    assert [(new.kind, new.value, new.expires_at) for new in news] == [
        (entry.kind, entry.value, entry.expires_at) for entry in entries
    ]
    assert LogPosition(start.epoch, 4, chain(GENESIS_DIGEST, entries)) == rest.position
    assert abs(rest.at - place.clock.now()) < 5 * SECOND


def test_before_version_that_is_given_is_kept(place: StorePlace):
    """An entry that is carried over keeps the version that it was made for."""
    new = NewRevocation(
        kind=RevocationKind.SUBJECT, value=ALICE, expires_at=revoked(place).expires_at, before_version=77
    )
    assert 77 == place.open().revocations.append([new]).entries[0].before_version


def test_appending_nothing_changes_nothing(place: StorePlace):
    """An empty list is no entry, and no error."""
    store = place.open()
    position = store.revocations.append([revoked(place)]).position
    appended = store.revocations.append([])
    assert ((), position) == (appended.entries, appended.position)


@pytest.mark.parametrize(
    "wrong",
    [
        {"value": "not a SPIFFE ID"},
        {"value": ""},
        {"kind": RevocationKind.CERTIFICATE},
        {"expires_at": None},
        {"expires_at": datetime(2030, 1, 1, 0, 0, 0, 1, tzinfo=UTC)},
        {"before_version": 0},
        {"reason": "line\nbreak"},
        {"reason": "x" * 1025},
        {"by": "nul\0"},
    ],
    ids=str,
)
def test_entry_that_cannot_be_is_refused_and_none_is_entered(place: StorePlace, wrong: dict[str, Any]):
    """One wrong entry refuses all of its call, and takes no version."""
    right: dict[str, Any] = {"kind": RevocationKind.SUBJECT, "value": ALICE, "expires_at": revoked(place).expires_at}
    store = place.open()
    before = store.revocations.read(None).position
    with pytest.raises(InvalidRevocationError):
        store.revocations.append([NewRevocation(**right), NewRevocation(**(right | wrong))])
    assert before == store.revocations.read(None).position
    assert 1 == store.revocations.append([NewRevocation(**right)]).entries[0].version


def test_read_gives_what_came_after(place: StorePlace):
    """From a position of before a reader gets just the later entries, in order, and a digest that they lead to."""
    store, other = place.open(), place.open()
    positions = [store.revocations.read(None).position]
    entries: list[Revocation] = []
    for _ in range(5):
        appended = store.revocations.append([revoked(place)])
        entries.extend(appended.entries)
        positions.append(appended.position)
    for version, position in enumerate(positions):
        page = other.revocations.read(position)
        assert (False, tuple(entries[version:]), positions[-1]) == (page.snapshot, page.entries, page.position)
        assert page.position.digest == chain(position.digest, page.entries)
        assert abs(page.read_at - place.clock.now()) < 5 * SECOND
    assert (True, tuple(entries)) == (other.revocations.read(None).snapshot, other.revocations.read(None).entries)


def test_reader_of_another_epoch_or_digest_gets_a_snapshot(place: StorePlace):
    """Who does not come from where the log comes from gets all that is in force."""
    store = place.open()
    first = store.revocations.append([revoked(place)]).position
    last = store.revocations.append([revoked(place)]).position
    for after in (
        LogPosition(first.epoch - 1, first.version, first.digest),
        LogPosition(first.epoch + 1, first.version, first.digest),
        LogPosition(first.epoch, first.version, b"x" * 32),
        LogPosition(last.epoch, last.version, first.digest),
    ):
        page = store.revocations.read(after)
        assert (True, 2, last) == (page.snapshot, len(page.entries), page.position)


def test_reader_who_is_ahead_sees_the_lower_position(place: StorePlace):
    """A store that is behind its reader says so."""
    store = place.open()
    last = store.revocations.append([revoked(place)]).position
    page = store.revocations.read(LogPosition(last.epoch, 9, b"x" * 32))
    assert (True, last) == (page.snapshot, page.position)


def test_what_is_revoked_already_is_not_written_again(place: StorePlace):
    """Another broker revokes the same token: it gets the version that holds already, and the log stays as it is."""
    store, other = place.open(), place.open()
    once = revoked(place, "A" * 22, RevocationKind.TOKEN)
    (first,) = store.revocations.append([once]).entries
    before = store.revocations.read(None).position
    again = other.revocations.append([once])
    assert ((), (first,), before) == (again.entries, again.standing, again.position)
    assert before == store.revocations.read(None).position
    # Beside one that is new, which gets the next version; and twice in one call.
    new = revoked(place, "B" * 22, RevocationKind.TOKEN)
    mixed = other.revocations.append([once, new, new])
    assert [2] == [entry.version for entry in mixed.entries]
    assert [1, 2, 2] == [entry.version for entry in mixed.standing]
    page = store.revocations.read(before)
    assert (mixed.entries, mixed.position) == (page.entries, page.position)
    assert mixed.position.digest == chain(GENESIS_DIGEST, (first, *mixed.entries))


@pytest.mark.parametrize(
    ("held", "asked", "is_written"),
    [
        ((RevocationKind.TOKEN, 2 * HOUR), (RevocationKind.TOKEN, HOUR), False),
        ((RevocationKind.TOKEN, HOUR), (RevocationKind.TOKEN, 2 * HOUR), True),
        ((RevocationKind.ROOT, HOUR), (RevocationKind.TOKEN, HOUR), False),
        ((RevocationKind.TOKEN, HOUR), (RevocationKind.ROOT, HOUR), True),
        ((RevocationKind.SUBJECT, 2 * HOUR), (RevocationKind.SUBJECT, HOUR), True),
        ((RevocationKind.BLOCK, None), (RevocationKind.BLOCK, None), True),
        ((RevocationKind.LIFT, HOUR), (RevocationKind.LIFT, HOUR), True),
    ],
    ids=str,
)
def test_only_what_lasts_as_long_and_reaches_as_far_stands_for_another(
    place: StorePlace,
    held: tuple[RevocationKind, timedelta | None],
    asked: tuple[RevocationKind, timedelta | None],
    is_written: bool,
):
    """A shorter one, one of fewer tokens, and one that says by its version what it means do not."""
    store = place.open()
    value = "A" * 22 if held[0] in {RevocationKind.TOKEN, RevocationKind.ROOT} else ALICE
    second = timedelta(seconds=1)
    now = place.clock.now()
    earlier, later = (
        replace(one, expires_at=None if kind[1] is None else (now + kind[1] + second).replace(microsecond=0))
        for kind, one in ((kind, revoked(place, value, kind[0], lasts=kind[1])) for kind in (held, asked))
    )
    store.revocations.append([earlier])
    appended = store.revocations.append([later])
    assert is_written == bool(appended.entries)
    assert [2 if is_written else 1] == [entry.version for entry in appended.standing]


def test_many_at_once_that_are_there_already_are_found(place: StorePlace):
    """More than one statement can name."""
    store = place.open()
    news = [revoked(place, f"token-{number:016}", RevocationKind.TOKEN) for number in range(700)]
    store.revocations.append(news)
    appended = store.revocations.append([*news, revoked(place, "A" * 22, RevocationKind.TOKEN)])
    assert [701] == [entry.version for entry in appended.entries]
    assert list(range(1, 702)) == [entry.version for entry in appended.standing]


# Epochs


def restored(place: StorePlace, *, lost: int, since: int = 0) -> tuple[RevocationPage, LogPosition]:
    """A store that was restored to two entries, where there had been `lost` more, and that got `since` new ones.

    Returns what a broker knew before, and where the store is now.
    """
    store = place.open()
    store.revocations.append([revoked(place), revoked(place, BOB)])
    place.close()
    restore = place.backup()
    store = place.open()
    for number in range(lost):
        store.revocations.append([revoked(place, f"lost-{number:016}", RevocationKind.TOKEN)])
    known = store.revocations.read(None)
    place.close()
    restore()
    store = place.open()
    for number in range(since):
        store.revocations.append([revoked(place, f"since-{number:016}", RevocationKind.TOKEN)])
    return known, store.revocations.read(None).position


@pytest.mark.parametrize("since", [0, 1, 2, 3])
def test_restored_store_begins_an_epoch_far_above(place: StorePlace, since: int):
    """The epoch is higher, versions go on a million above all that was seen, and what was lost is entered anew.

    Also where the restored store was written to, and has as many entries as were seen, or more: others than those.
    """
    known, now_at = restored(place, lost=2, since=since)
    store = place.open()
    position = store.revocations.begin_epoch(seen=known.position, carry=known.entries, now=place.clock.now())
    page = store.revocations.read(None)
    assert position == page.position
    assert position.epoch > known.position.epoch
    highest = max(known.position.version, now_at.version)
    assert [highest + 1_000_001, highest + 1_000_002] == [entry.version for entry in page.entries[-2:]]
    lost, entered = (
        {(entry.kind, entry.value, entry.before_version, entry.expires_at) for entry in entries[-2:]}
        for entries in (known.entries, page.entries)
    )
    assert lost == entered
    assert chain(GENESIS_DIGEST, page.entries[-2:]) == position.digest
    assert 2 + since + 2 == len(page.entries)
    assert position.version + 1 == store.revocations.append([revoked(place)]).entries[0].version


def test_only_the_first_begins_the_epoch(place: StorePlace):
    """Who comes later finds the store in a higher epoch, and does nothing."""
    known, _ = restored(place, lost=1)
    first, second = place.open(), place.open()
    position = first.revocations.begin_epoch(seen=known.position, carry=known.entries, now=place.clock.now())
    assert position == second.revocations.begin_epoch(seen=known.position, carry=known.entries, now=place.clock.now())
    assert position == second.revocations.read(None).position


def test_store_that_is_not_behind_stays_in_its_epoch(place: StorePlace):
    """A position that the store has passed, or is at, begins nothing."""
    store = place.open()
    first = store.revocations.append([revoked(place)]).position
    last = store.revocations.append([revoked(place)]).position
    for seen in (first, last):
        assert last == store.revocations.begin_epoch(seen=seen, carry=(), now=place.clock.now())
    assert last == store.revocations.read(None).position


def test_store_that_was_emptied_begins_an_epoch_above_what_was_seen(place: StorePlace):
    """Its epoch is a later one, but its versions begin anew: the `rv` of tokens would be above all of them."""
    store = place.open()
    made = store.revocations.append([revoked(place)]).position
    seen = LogPosition(made.epoch - 9, 70, b"x" * 32)
    assert is_behind(made, seen), "whoever reads it finds that out"
    block = Revocation(66, RevocationKind.BLOCK, BOB, 66, None)
    begun = store.revocations.begin_epoch(seen=seen, carry=[block], now=place.clock.now())
    assert begun.epoch > made.epoch
    # What is carried over, and what was revoked since with a version that tokens were beyond.
    entries = store.revocations.read(None).entries
    assert [(BOB, 1_000_071, 66), (ALICE, 1_000_072, 1_000_072)] == [
        (entry.value, entry.version, entry.before_version) for entry in entries[-2:]
    ]
    assert begun.version == entries[-1].version
    # A life that began after what was seen is above it, and stays.
    assert begun == store.revocations.begin_epoch(seen=seen, carry=[block], now=place.clock.now())


def test_epoch_is_higher_than_any_seen_however_the_clock_stands(place: StorePlace):
    """With a clock that is far behind the epoch is one more than the one before."""
    store = place.open()
    position = store.revocations.read(None).position
    seen = LogPosition(position.epoch + 5, 3, b"x" * 32)
    begun = store.revocations.begin_epoch(seen=seen, carry=(), now=datetime(1970, 1, 2, tzinfo=UTC))
    assert (seen.epoch + 1, 1_000_003, GENESIS_DIGEST) == (begun.epoch, begun.version, begun.digest)


def test_only_what_is_in_force_and_lacking_is_carried_over(place: StorePlace):
    """An ended entry, one that the store has, and one that it has a stronger one for are not entered again."""
    store = place.open()
    held = store.revocations.append([revoked(place, lasts=2 * HOUR)]).entries[0]
    now = place.clock.now()
    ends = (now + HOUR).replace(microsecond=0)
    ended = Revocation(5, RevocationKind.SUBJECT, BOB, 5, (now - SECOND).replace(microsecond=0))
    weaker = Revocation(1, RevocationKind.SUBJECT, ALICE, 1, ends)
    stronger = Revocation(7, RevocationKind.SUBJECT, ALICE, 7, ends)
    block = Revocation(6, RevocationKind.BLOCK, BOB, 6, None)
    seen = LogPosition(store.revocations.read(None).position.epoch, 9, b"x" * 32)
    store.revocations.begin_epoch(seen=seen, carry=[stronger, held, ended, weaker, block], now=now)
    entries = store.revocations.read(None).entries
    assert [(RevocationKind.SUBJECT, 1), (RevocationKind.BLOCK, 6), (RevocationKind.SUBJECT, 7)] == [
        (entry.kind, entry.before_version) for entry in entries
    ]


def test_block_is_carried_over_although_the_store_holds_a_lift(place: StorePlace):
    """Versions of a restored store may have been given twice: they do not say that the lift came later.

    For the same reason the lift names tokens anew, and ends no block by it.
    """
    store = place.open()
    lift = revoked(place, kind=RevocationKind.LIFT)
    store.revocations.append([lift])
    block = Revocation(1, RevocationKind.BLOCK, ALICE, 1, None)
    seen = LogPosition(store.revocations.read(None).position.epoch, 9, b"x" * 32)
    store.revocations.begin_epoch(seen=seen, carry=[block], now=place.clock.now())
    kinds = [entry.kind for entry in store.revocations.read(None).entries]
    assert [RevocationKind.LIFT, RevocationKind.BLOCK, RevocationKind.SUBJECT] == kinds


# Verifiers


def test_verifier_joins_with_the_stores_times(place: StorePlace):
    """Who has what the rollout asks for is counted, and the store sets the times."""
    store = place.open()
    store.rollout.raise_to(3, "k3")
    assert [SessionOutcome(live=True)] == list(store.sessions.write([joined(generation=3)]))
    (session,) = place.open().sessions.all()
    assert (ALICE, "one", "payments", "broker-1", 3, 7) == (
        session.spiffe_id,
        session.instance_id,
        session.audience,
        session.replica_id,
        session.generation,
        session.revocation_version,
    )
    assert (timedelta(minutes=5), False, False) == (session.max_staleness, session.polls, session.lagging)
    assert abs(session.generation_at - place.clock.now()) < 5 * SECOND
    assert abs(session.revocation_at - place.clock.now()) < 5 * SECOND


def test_verifier_with_an_older_generation_is_told_which_it_needs(place: StorePlace):
    """It is not counted before it has loaded what may become the signer."""
    store = place.open()
    store.rollout.raise_to(3, "k3")
    outcome = store.sessions.write([joined(generation=2), joined("two", generation=4)])
    assert [SessionOutcome(live=False, required_generation=3), SessionOutcome(live=True)] == list(outcome)
    assert ["two"] == [session.instance_id for session in store.sessions.all()]


def test_acknowledgements_only_go_up(place: StorePlace):
    """Each part of what was acknowledged grows, with the time at which it was said; nothing goes back."""
    store = place.open()
    store.sessions.write([joined()])

    def acknowledge(generation: int, version: int, ago: timedelta) -> None:
        change = Acknowledged(ALICE, "one", "stream-1", generation, version, ago)
        assert [SessionOutcome(live=True)] == list(store.sessions.write([change]))

    acknowledge(5, 3, 30 * SECOND)
    (session,) = store.sessions.all()
    assert (5, 7) == (session.generation, session.revocation_version)
    assert abs(session.generation_at - (place.clock.now() - 30 * SECOND)) < 5 * SECOND
    acknowledge(4, 9, -30 * SECOND)
    (later,) = store.sessions.all()
    assert (5, 9, session.generation_at) == (later.generation, later.revocation_version, later.generation_at)
    assert later.revocation_at <= place.clock.now()


def test_acknowledgements_of_many_at_once_count_each_for_its_verifier(place: StorePlace):
    """As after each revocation. In one batch: two of one verifier, one of an older stream, one of nobody known."""
    store = place.open()
    store.sessions.write([joined("one"), joined("two", stream="new"), joined("three")])
    before = {session.instance_id: session for session in store.sessions.all()}
    said = [
        ("two", "old", 9, 9),
        ("one", "stream-1", 2, 8),
        ("nobody", "stream-1", 9, 9),
        ("one", "stream-1", 1, 10),
        ("three", "stream-1", 1, 7),
    ]
    changes = [Acknowledged(ALICE, name, stream, g, v, timedelta()) for name, stream, g, v in said]
    assert [False, True, False, True, True] == [outcome.live for outcome in store.sessions.write(changes)]
    after = {session.instance_id: session for session in store.sessions.all()}
    assert (2, 10) == (after["one"].generation, after["one"].revocation_version)
    assert (before["two"], before["three"]) == (after["two"], after["three"])


def test_change_of_an_older_stream_is_ignored(place: StorePlace):
    """What comes late from the replica that a verifier has left neither counts nor takes it out."""
    store = place.open()
    store.sessions.write([joined(stream="old"), joined(stream="new", replica="broker-2")])
    late = [Acknowledged(ALICE, "one", "old", 9, 9, timedelta()), Left(ALICE, "one", "old")]
    assert [False, False] == [outcome.live for outcome in store.sessions.write(late)]
    (session,) = store.sessions.all()
    assert (1, "broker-2") == (session.generation, session.replica_id)


def test_verifier_that_is_not_known_is_told_to_join(place: StorePlace):
    """An acknowledgement of nobody is no session, and the outcome is never that of one too many."""
    store = place.open()
    (outcome,) = store.sessions.write([Acknowledged(ALICE, "one", "stream-1", 1, 1, timedelta())])
    assert (False, True) == (outcome.live, outcome.required_generation > 0)
    assert () == tuple(store.sessions.all())


def test_verifier_that_left_is_gone(place: StorePlace):
    """Goodbye takes it out, and only it; the outcomes come in the order of the changes."""
    store = place.open()
    changes = [joined("two"), joined("one"), Left(ALICE, "two", "stream-1"), joined("three", spiffe_id=BOB)]
    assert [True, True, False, True] == [outcome.live for outcome in store.sessions.write(changes)]
    assert [(ALICE, "one"), (BOB, "three")] == [(s.spiffe_id, s.instance_id) for s in store.sessions.all()]
    assert () == tuple(store.sessions.write([]))


def test_identity_has_a_number_of_verifiers(place: StorePlace):
    """One too many is refused with no generation to load; one that joins again, and other identities, are not."""
    store = place.open(sessions_per_identity=2)
    store.replicas.renew(report())
    changes: list[Joined] = [joined("one"), joined("two"), joined("three"), joined("two"), joined("x", spiffe_id=BOB)]
    outcomes = [store.sessions.write([change])[0] for change in changes]
    assert [True, True, False, True, True] == [outcome.live for outcome in outcomes]
    assert 0 == outcomes[2].required_generation


def test_verifiers_that_nobody_serves_any_more_do_not_fill_the_number(place: StorePlace):
    """When the broker of its sessions is gone, and their max_staleness is over, an identity may have new ones."""
    store = place.open(sessions_per_identity=1)
    store.replicas.renew(report())
    store.sessions.write([joined("one")])
    place.clock.let_pass(timedelta(minutes=5))
    assert [False] == [outcome.live for outcome in store.sessions.write([joined("two", replica="broker-2")])]
    place.clock.let_pass(timedelta(minutes=1))
    assert [True] == [outcome.live for outcome in store.sessions.write([joined("two", replica="broker-2")])]


# The rollout


def test_rollout_begins_at_nothing_and_never_goes_down(place: StorePlace):
    """It is at the highest generation that it was raised to."""
    store = place.open()
    state = store.rollout.state()
    assert (0, "", None, None) == (state.generation, state.kid, state.raised_at, state.permit)
    store.rollout.raise_to(4, "k4")
    place.open().rollout.raise_to(3, "k3")
    state = store.rollout.state()
    assert (4, "k4", None) == (state.generation, state.kid, state.permit)
    assert state.raised_at is not None
    assert abs(state.raised_at - place.clock.now()) < 5 * SECOND


def test_permit_waits_for_every_live_verifier(place: StorePlace):
    """It names who has not acknowledged; it is given when all have, and given once it is given again."""
    store = place.open()
    store.replicas.renew(report())
    store.sessions.write([joined("one"), joined("two"), joined("polls", polls=True)])
    store.rollout.raise_to(2, "k2")
    store.sessions.write([Acknowledged(ALICE, "one", "stream-1", 2, 7, timedelta())])
    waiting = store.rollout.permit(2, "k2", overdue=False)
    assert isinstance(waiting, WaitingFor)
    assert ["two"] == [session.instance_id for session in waiting.laggards]
    assert store.rollout.state().permit is None
    store.sessions.write([Acknowledged(ALICE, "two", "stream-1", 2, 7, timedelta())])
    permit = store.rollout.permit(2, "k2", overdue=False)
    assert isinstance(permit, Permit)
    assert (2, "k2", False) == (permit.generation, permit.kid, permit.overdue)
    assert permit == store.rollout.state().permit
    assert permit == place.open().rollout.permit(2, "k2", overdue=True)


def test_next_generation_needs_its_own_permit(place: StorePlace):
    """Raising ends the permit of before."""
    store = place.open()
    store.rollout.permit(1, "k1", overdue=False)
    assert store.rollout.state().permit is not None
    store.rollout.raise_to(2, "k2")
    assert store.rollout.state().permit is None


def test_one_generation_permits_one_key(place: StorePlace):
    """When a generation has its permit, no other key gets one for it, and the row keeps its name."""
    store = place.open()
    permit = store.rollout.permit(1, "k1", overdue=False)
    store.rollout.raise_to(1, "other")
    assert WaitingFor(laggards=()) == store.rollout.permit(1, "other", overdue=True)
    assert permit == store.rollout.state().permit


def test_permit_for_a_generation_that_nobody_raised_to_raises(place: StorePlace):
    """So nobody joins with less after the count."""
    store = place.open()
    store.rollout.permit(5, "k5", overdue=False)
    assert 5 == store.rollout.state().generation
    assert [SessionOutcome(live=False, required_generation=5)] == list(store.sessions.write([joined(generation=4)]))


def test_permit_for_a_published_key_is_given_though_a_later_one_was_announced(place: StorePlace):
    """A broker that died before it published what it raised to holds up nothing; the permit is not for its key."""
    store = place.open()
    store.rollout.raise_to(2, "k2")
    store.rollout.raise_to(3, "never published")
    permit = store.rollout.permit(2, "k2", overdue=False)
    assert isinstance(permit, Permit)
    assert permit == store.rollout.permit(2, "k2", overdue=False)
    assert (3, None) == (store.rollout.state().generation, store.rollout.state().permit)


def test_deadline_marks_those_that_lag(place: StorePlace):
    """They hold up no further rotation until they acknowledge the newest generation; from then on they count again."""
    store = place.open()
    store.replicas.renew(report())
    store.sessions.write([joined("slow"), joined("good")])
    store.rollout.raise_to(2, "k2")
    store.sessions.write([Acknowledged(ALICE, "good", "stream-1", 2, 7, timedelta())])
    permit = store.rollout.permit(2, "k2", overdue=True)
    assert isinstance(permit, Permit)
    assert permit.overdue
    assert {"slow": True, "good": False} == {s.instance_id: s.lagging for s in store.sessions.all()}
    store.rollout.raise_to(3, "k3")
    store.sessions.write(
        [Acknowledged(ALICE, name, "stream-1", 3 if name == "good" else 2, 7, timedelta()) for name in ("good", "slow")]
    )
    assert {"slow": True, "good": False} == {s.instance_id: s.lagging for s in store.sessions.all()}
    assert isinstance(store.rollout.permit(3, "k3", overdue=False), Permit)
    store.sessions.write([Acknowledged(ALICE, "slow", "stream-1", 3, 7, timedelta())])
    store.rollout.raise_to(4, "k4")
    waiting = store.rollout.permit(4, "k4", overdue=False)
    assert isinstance(waiting, WaitingFor)
    assert {"slow", "good"} == {session.instance_id for session in waiting.laggards}


def test_overdue_permit_that_nobody_missed_says_so(place: StorePlace):
    """The deadline may be over without anybody being late."""
    permit = place.open().rollout.permit(1, "k1", overdue=True)
    assert isinstance(permit, Permit)
    assert not permit.overdue


def test_a_permit_is_news_to_who_gives_it_and_to_nobody_else(place: StorePlace):
    """Whoever asks later is told that it was given before, so that one broker says who was left behind."""
    store, other = place.open(), place.open()
    store.replicas.renew(report())
    store.sessions.write([joined()])
    permits = [broker.rollout.permit(2, "k2", overdue=True) for broker in (store, other, store)]
    assert [False, True, True] == [isinstance(one, Permit) and one.repeated for one in permits]
    assert permits[0] == permits[1] == permits[2] == store.rollout.state().permit


def test_verifiers_of_a_broker_that_is_gone_count_until_their_staleness(place: StorePlace):
    """When the lease ends they are live for max_staleness longer; then the rotation goes on without them."""
    store = place.open()
    store.replicas.renew(report())
    store.sessions.write([joined()])
    store.rollout.raise_to(2, "k2")
    for passed in (timedelta(), timedelta(seconds=14), timedelta(minutes=5)):
        place.clock.let_pass(passed)
        assert isinstance(store.rollout.permit(2, "k2", overdue=False), WaitingFor)
    place.clock.let_pass(2 * SECOND)
    permit = store.rollout.permit(2, "k2", overdue=False)
    assert isinstance(permit, Permit)
    assert not permit.overdue


# Brokers


def test_lease_is_renewed_and_ends(place: StorePlace):
    """Every broker sees all, by the store's clock; one that does not renew is not live any more."""
    first, second = place.open(), place.open()
    first.replicas.renew(report("a", generation=4))
    place.clock.let_pass(10 * SECOND)
    seen = second.replicas.renew(report("b", generation=5))
    assert [("a", 4, True), ("b", 5, True)] == [
        (lease.replica_id, lease.generation, lease.is_live(seen.now)) for lease in seen.replicas
    ]
    assert abs(seen.now - place.clock.now()) < 5 * SECOND
    assert ("0.1.0", 3, timedelta(seconds=15)) == (
        seen.replicas[0].version,
        seen.replicas[0].revocation_version,
        seen.replicas[0].lease,
    )
    place.clock.let_pass(10 * SECOND)
    seen = second.replicas.renew(report("b", generation=5))
    assert [False, True] == [lease.is_live(seen.now) for lease in seen.replicas]
    assert seen.replicas[1].generation_at == served_since(seen.replicas, 5, seen.now)


def test_generation_keeps_its_time_while_it_is_the_same(place: StorePlace):
    """`generation_at` says since when a broker serves what it serves."""
    store = place.open()
    since = store.replicas.renew(report()).replicas[0].generation_at
    place.clock.let_pass(SECOND)
    assert since == store.replicas.renew(report()).replicas[0].generation_at
    place.clock.let_pass(SECOND)
    assert since + 2 * SECOND <= store.replicas.renew(report(generation=2)).replicas[0].generation_at


def test_broker_that_drains_is_not_waited_for_but_its_verifiers_are(place: StorePlace):
    """Leaving ends the lease at once, for good; its sessions live on for their max_staleness from then on."""
    store = place.open()
    store.replicas.renew(report("a"))
    store.sessions.write([joined(replica="a")])
    store.replicas.leave("a")
    store.replicas.leave("nobody")
    seen = store.replicas.renew(report("b", lease=HOUR))
    leases = {lease.replica_id: lease for lease in seen.replicas}
    assert {"a": False, "b": True} == {name: lease.is_live(seen.now) for name, lease in leases.items()}
    assert 1 == len(live_sessions(store.sessions.all(), leases, seen.now))
    place.clock.let_pass(timedelta(minutes=4))
    store.replicas.leave("a")
    place.clock.let_pass(timedelta(minutes=2))
    seen = store.replicas.renew(report("b", lease=HOUR))
    leases = {lease.replica_id: lease for lease in seen.replicas}
    assert [] == live_sessions(store.sessions.all(), leases, seen.now)


# The mirror


def test_mirror_never_goes_back(place: StorePlace):
    """The latest generation is kept, and whoever saves an older one changes nothing."""
    store, other = place.open(), place.open()
    assert store.mirror.load() is None
    content: dict[str, Any] = {"keys": [{"a": [1, None, True]}], "text": "\u00e9\n\"'"}
    first, second = MirrorSignature("one", bytes(range(64))), MirrorSignature("two", b"\xff" * 64)
    store.mirror.save(4, content, first)
    other.mirror.save(3, {"older": True}, second)
    mirrored = other.mirror.load()
    assert mirrored is not None
    assert (4, content, first) == (mirrored.generation, mirrored.content, mirrored.signature)
    assert mirrored.saved_at <= mirrored.read_at
    store.mirror.save(4, content, first)
    again = other.mirror.load()
    assert again is not None
    assert mirrored.saved_at == again.saved_at
    store.mirror.save(4, {"the same": "generation"}, first)
    other.mirror.save(5, {"later": True}, None)
    mirrored = store.mirror.load()
    assert mirrored is not None
    assert (5, {"later": True}, None) == (mirrored.generation, mirrored.content, mirrored.signature)


def test_mirror_of_the_same_generation_and_text_can_be_signed_anew(place: StorePlace):
    """What was written unsigned, or by whom nobody believes, is put right."""
    store = place.open()
    for signature in (None, MirrorSignature("one", bytes(64)), MirrorSignature("two", b"\x01" * 64)):
        store.mirror.save(4, {"same": "text"}, signature)
        mirrored = place.open().mirror.load()
        assert mirrored is not None
        assert signature == mirrored.signature
