"""What a store does once it was restored from a backup: sessions are forgotten, so no permit is given for a while."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from carnet.revocations import RevocationKind
from carnet_broker.core.rollout import RECOUNT_FOR, Permit
from carnet_broker.ports import ReplicasSeen, WaitingFor
from support.store_places import ALICE, BOB, StorePlace, joined, report, revoked

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
NOBODY = WaitingFor(laggards=())


@pytest.fixture(name="place")
def _place(store_place: StorePlace) -> StorePlace:
    """An empty store of each kind."""
    return store_place


def restored(place: StorePlace) -> ReplicasSeen:
    """A store that has forgotten a verifier and the renewal of a lease, which is what is returned."""
    store = place.open()
    store.replicas.renew(report())
    store.rollout.raise_to(2, "k2")
    store.close()
    put_back = place.backup()
    store = place.open()
    place.clock.let_pass(SECOND)
    seen = store.replicas.renew(report())
    store.sessions.write([joined("one", generation=2)])
    place.clock.let_pass(SECOND)
    store.close()
    put_back()
    return seen


def test_store_that_was_not_restored_says_so(place: StorePlace):
    """A broker that tells of its renewal before, or of none, hears of no restoration; the permit is given."""
    store = place.open()
    seen = store.replicas.renew(report())
    place.clock.let_pass(SECOND)
    seen = store.replicas.renew(replace(report(), renewed_at=seen.now))
    assert not seen.restored
    store.rollout.raise_to(2, "k2")
    assert isinstance(store.rollout.permit(2, "k2", overdue=False, seen=seen.replicas), Permit)


@pytest.mark.parametrize("overdue", [False, True])
def test_broker_that_has_seen_a_later_lease_gets_no_permit(place: StorePlace, overdue: bool):
    """Whoever was counted is forgotten, so that nobody is named, and nobody has found out yet."""
    seen = restored(place)
    store = place.open()
    assert NOBODY == store.rollout.permit(2, "k2", overdue=overdue, seen=seen.replicas)
    assert store.rollout.state().permit is None


@pytest.mark.parametrize("overdue", [False, True])
def test_no_permit_before_the_verifiers_are_counted_again(place: StorePlace, overdue: bool):
    """The first broker that renews its lease finds out; from then on it takes the max_staleness and a lease."""
    seen = restored(place)
    store = place.open()
    found = store.replicas.renew(replace(report(), renewed_at=seen.now))
    assert found.restored
    assert not store.replicas.renew(replace(report(), renewed_at=found.now)).restored
    place.clock.let_pass(RECOUNT_FOR)
    assert NOBODY == store.rollout.permit(2, "k2", overdue=overdue)
    place.clock.let_pass(report().lease + SECOND)
    assert isinstance(store.rollout.permit(2, "k2", overdue=overdue), Permit)


def test_verifiers_that_are_patient_for_longer_are_waited_for(place: StorePlace):
    """Those that are known tell how long those can be that are not."""
    seen = restored(place)
    store = place.open()
    store.replicas.renew(replace(report(), renewed_at=seen.now))
    patient = joined("patient", generation=2)
    store.sessions.write([replace(patient, session=replace(patient.session, max_staleness=3 * RECOUNT_FOR))])
    place.clock.let_pass(3 * RECOUNT_FOR)
    store.replicas.renew(report())
    assert NOBODY == store.rollout.permit(2, "k2", overdue=True)
    place.clock.let_pass(report().lease + SECOND)
    assert isinstance(store.rollout.permit(2, "k2", overdue=True), Permit)


def test_new_epoch_counts_the_verifiers_again(place: StorePlace):
    """However it was found out that the store was restored."""
    store = place.open()
    store.replicas.renew(report())
    position = store.revocations.read(None).position
    store.rollout.raise_to(2, "k2")
    ahead = replace(position, version=position.version + 1)
    assert store.revocations.begin_epoch(seen=ahead, carry=(), now=place.clock.now()).epoch > position.epoch
    assert NOBODY == store.rollout.permit(2, "k2", overdue=True)


def test_lease_that_was_cleaned_up_is_no_restoration(place: StorePlace):
    """A broker that was cut off for long is not in the store any more; one that was just there has to be."""
    store = place.open()
    now = store.replicas.renew(report("other")).now
    assert not store.replicas.renew(replace(report(), renewed_at=now - 11 * MINUTE)).restored
    assert store.replicas.renew(replace(report("third"), renewed_at=now - MINUTE)).restored


@pytest.mark.parametrize("kind", [RevocationKind.SUBJECT, RevocationKind.LIFT])
def test_what_was_revoked_between_restoration_and_discovery_is_raised_above_all(
    place: StorePlace, kind: RevocationKind
):
    """It got a version that was given before, and misses tokens; what was known before is entered at no new version."""
    store = place.open()
    store.revocations.append([revoked(place, ALICE)])
    store.close()
    put_back = place.backup()
    store = place.open()
    store.revocations.append([revoked(place, letter * 22, RevocationKind.TOKEN) for letter in "BCD"])
    known = store.revocations.read(None)
    store.close()
    put_back()
    store = place.open()
    entry = store.revocations.append([revoked(place, BOB, kind)]).entries[0]
    assert entry.before_version < known.position.version
    store.revocations.begin_epoch(seen=known.position, carry=known.entries, now=place.clock.now())
    page = store.revocations.read(None)
    last = page.entries[-1]
    assert (RevocationKind.SUBJECT, BOB, entry.expires_at) == (last.kind, last.value, last.expires_at)
    assert known.position.version + 1_000_000 < last.before_version == last.version == page.position.version
    assert [1] == [entry.before_version for entry in page.entries if entry.value == ALICE]
    assert page.position == store.revocations.read(page.position).position
