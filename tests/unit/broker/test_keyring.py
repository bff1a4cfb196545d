"""The keyring: its table of moves, and the plan at every boundary."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from carnet_broker.core.keyring import (
    MAX_PUBLISHED_KEYS,
    TRANSITIONS,
    ActivateKey,
    CreateKey,
    DestroyKey,
    Gate,
    Hold,
    Keyring,
    KeyringRegressionError,
    KeyState,
    PermitKey,
    PublishKey,
    RemoveKey,
    RevokeKey,
    Timing,
    Wait,
    Wish,
    check_succession,
    plan,
)
from support.keyrings import ISSUER, SECOND, T0, TIMING, jwk, running

NOTHING = Wish()
SERVED = T0 + TIMING.replica_lag
READY = SERVED + TIMING.poller_window
ASKED = Wish(rotate_since=T0)
OPEN = Gate(raised_at=T0, served_since=SERVED)
"""The store answers, and every live replica serves the standby."""
PERMITTED = replace(OPEN, permitted=True)
AWAITING = replace(OPEN, awaiting=True)
DEADLINE = T0 + TIMING.acknowledge_within


def planned(keyring, now, wish=NOTHING, gate=OPEN):
    """Plan with the test's timing."""
    return plan(keyring, now=now, timing=TIMING, gate=gate, wish=wish)


def test_an_empty_keyring_gets_a_key_that_is_published_and_activated_at_once():
    """Where nothing signs, no window is waited for."""
    keyring = Keyring(issuer=ISSUER)
    assert planned(keyring, T0, gate=Gate()) == CreateKey()
    keyring = keyring.with_created(jwk(0), None, T0)
    assert planned(keyring, T0, gate=Gate()) == PublishKey(jwk(0).kid)
    keyring = keyring.with_published(jwk(0).kid, T0)
    assert planned(keyring, T0, gate=Gate()) == ActivateKey(jwk(0).kid)
    keyring = keyring.with_activated(jwk(0).kid, T0, TIMING)
    assert planned(keyring, T0, gate=Gate()) == CreateKey()


def test_a_standby_is_kept_published_next_to_the_active_key():
    """One ACTIVE and one STANDBY is the state of rest."""
    keyring = running()
    assert [KeyState.ACTIVE, KeyState.STANDBY] == [key.state for key in keyring.keys]
    assert {jwk(0).kid, jwk(1).kid} == set(keyring.key_set().keys)
    assert keyring.keys == keyring.live
    assert planned(keyring, T0) == Wait(T0 + TIMING.rotate_every, None, READY)


@pytest.mark.parametrize(("offset", "expected"), [(-1, "wait"), (0, "permit"), (1, "permit")])
def test_a_requested_rotation_waits_for_the_poller_window(offset, expected):
    """The permit is asked for from the exact end of the window, and not a second sooner."""
    step = planned(running(), READY + offset * SECOND, ASKED)
    assert step == (Wait(READY, Hold.POLLERS, READY) if expected == "wait" else PermitKey(jwk(1).kid, overdue=False))


@pytest.mark.parametrize(("offset", "expected"), [(-1, "wait"), (0, "permit"), (1, "permit")])
def test_a_rotation_is_due_by_age_with_no_request(offset, expected):
    """`rotate_every` after its activation a key is replaced. Before, nothing is held up: nothing is due."""
    due = T0 + TIMING.rotate_every
    step = planned(running(), due + offset * SECOND)
    assert step == (Wait(due, None, READY) if expected == "wait" else PermitKey(jwk(1).kid, overdue=False))


def test_a_request_makes_it_due_when_it_was_made_and_at_once_if_its_clock_is_ahead():
    """The time of a request is another machine's. A key that is due by age is not put off by a later request."""
    soon = READY + 5 * SECOND
    assert planned(running(), READY, Wish(rotate_since=soon)) == PermitKey(jwk(1).kid, overdue=False)
    late = T0 + TIMING.rotate_every + TIMING.acknowledge_within
    assert planned(running(), late, Wish(rotate_since=late)) == PermitKey(jwk(1).kid, overdue=True)


def test_only_the_permit_activates():
    """When it is there it is used, also if nobody asks any more."""
    assert planned(running(), T0, gate=PERMITTED) == ActivateKey(jwk(1).kid)
    assert planned(running(), READY, ASKED, gate=PERMITTED) == ActivateKey(jwk(1).kid)


@pytest.mark.parametrize(("offset", "overdue"), [(-1, False), (0, True), (1, True)])
def test_the_deadline_counts_from_when_the_rotation_was_due(offset, overdue):
    """From then on the permit is asked for without those that lag."""
    since = READY - TIMING.acknowledge_within + 20 * SECOND
    now = since + TIMING.acknowledge_within + offset * SECOND
    assert planned(running(), now, Wish(rotate_since=since)) == PermitKey(jwk(1).kid, overdue=overdue)


@pytest.mark.parametrize(("offset", "overdue"), [(-1, False), (0, True)])
def test_the_deadline_counts_from_when_the_key_was_there_to_be_loaded(offset, overdue):
    """A key that was published long after the rotation was due has its own time."""
    raised = READY - TIMING.acknowledge_within + 20 * SECOND
    now = raised + TIMING.acknowledge_within + offset * SECOND
    step = planned(running(), now, ASKED, gate=replace(OPEN, raised_at=raised))
    assert step == PermitKey(jwk(1).kid, overdue=overdue)


def test_who_was_asked_is_waited_for_until_the_deadline():
    """A round asks once. What must be tidied meanwhile is tidied."""
    assert READY < DEADLINE
    assert planned(running(), READY, ASKED, gate=AWAITING) == Wait(DEADLINE, Hold.VERIFIERS, DEADLINE)
    assert planned(running(), DEADLINE, ASKED, gate=AWAITING) == Wait(None, Hold.VERIFIERS, DEADLINE)
    revoked = running().with_revoked(jwk(1).kid, T0, TIMING).with_created(jwk(2), None, T0)
    revoked = revoked.with_published(jwk(2).kid, T0)
    assert planned(revoked, READY, ASKED, gate=AWAITING) == DestroyKey(jwk(1).kid)


@pytest.mark.parametrize("unknown", [{"raised_at": None}, {"served_since": None}], ids=["to the store", "to a replica"])
def test_no_rotation_while_the_standby_is_unknown(unknown):
    """Without the word of the store and of every live replica only breakglass activates."""
    late = T0 + 10 * TIMING.rotate_every
    gate = replace(OPEN, **unknown)
    assert planned(running(), late, ASKED, gate) == Wait(None, Hold.REPLICAS)
    assert planned(running(), T0, gate=gate) == Wait(None, None)  # Nothing is due, so nothing is held up.
    assert planned(running(), late, Wish(rotate_now=True), gate) == ActivateKey(jwk(1).kid)


def test_no_store_no_step():
    """No key is made, published or permitted while the store does not answer."""
    late = T0 + 10 * TIMING.rotate_every
    empty = Keyring(issuer=ISSUER)
    pending = empty.with_created(jwk(0), None, T0)
    for keyring in (empty, pending, running()):
        assert planned(keyring, late, ASKED, gate=None) == Wait(None, Hold.STORE)
    alone = running().with_revoked(jwk(0).kid, T0, TIMING).with_destroyed(jwk(0).kid, T0)
    assert planned(alone, late, Wish(rotate_now=True), gate=None) == Wait(None, Hold.STORE)


def test_what_takes_trust_away_needs_no_store():
    """Revoking, removing, destroying; and what breakglass asks for at once."""
    keyring = running()
    assert planned(keyring, T0, Wish(revoke=(jwk(0).kid,)), gate=None) == RevokeKey(jwk(0).kid)
    assert planned(keyring, T0, Wish(rotate_now=True), gate=None) == ActivateKey(jwk(1).kid)
    published = Keyring(issuer=ISSUER).with_created(jwk(0), None, T0).with_published(jwk(0).kid, T0)
    assert planned(published, T0, gate=None) == ActivateKey(jwk(0).kid)
    rotated = keyring.with_activated(jwk(1).kid, T0, TIMING)
    end = T0 + TIMING.keep_retired
    assert planned(rotated, T0, gate=None) == Wait(end, Hold.STORE)
    assert planned(rotated, end, gate=None) == RemoveKey(jwk(0).kid)
    assert planned(rotated.with_removed(jwk(0).kid, end), end, gate=None) == DestroyKey(jwk(0).kid)


def test_rotate_now_does_not_wait():
    """Breakglass accepts that a poller may have to fetch the key."""
    assert planned(running(), T0, Wish(rotate_now=True)) == ActivateKey(jwk(1).kid)


def test_the_old_key_retires_and_stays_published_until_its_last_token_is_over():
    """island + longest life + leeway + skew after the activation, to the second."""
    keyring = running().with_activated(jwk(1).kid, READY, TIMING, answers=["r1"])
    old, new = keyring.get(jwk(0).kid), keyring.get(jwk(1).kid)
    assert (KeyState.RETIRED, READY) == (old.state, old.retired_at)
    assert READY + 95 * SECOND == old.keep_until
    assert (KeyState.ACTIVE, ("r1",), READY + TIMING.sign_for) == (new.state, new.answers, new.sign_until)
    assert jwk(0).kid in keyring.key_set().keys
    keyring = keyring.with_created(jwk(2), None, READY).with_published(jwk(2).kid, READY)
    served = replace(OPEN, served_since=READY + TIMING.replica_lag)
    assert planned(keyring, old.keep_until - SECOND, gate=served) == Wait(
        old.keep_until, None, served.served_since + TIMING.poller_window
    )
    assert planned(keyring, old.keep_until, gate=served) == RemoveKey(jwk(0).kid)
    removed = keyring.with_removed(jwk(0).kid, old.keep_until)
    assert jwk(0).kid not in removed.key_set().keys
    assert planned(removed, old.keep_until, gate=served) == DestroyKey(jwk(0).kid)
    assert removed.with_destroyed(jwk(0).kid, old.keep_until).get(jwk(0).kid) is None


def test_revoking_the_active_key_promotes_the_standby_in_the_same_generation():
    """No moment is without a signer, and none has two."""
    keyring = running()
    assert planned(keyring, T0, Wish(revoke=(jwk(0).kid,))) == RevokeKey(jwk(0).kid)
    changed = keyring.with_revoked(jwk(0).kid, T0, TIMING)
    assert keyring.generation + 1 == changed.generation
    assert jwk(1).kid == changed.active.kid
    assert (KeyState.REVOKED, T0) == (changed.get(jwk(0).kid).state, changed.get(jwk(0).kid).ended_at)
    assert jwk(0).kid not in changed.key_set().keys


def test_revoking_another_key_leaves_the_signer():
    """A stolen standby or retired key does not disturb the signer."""
    changed = running().with_revoked(jwk(1).kid, T0, TIMING)
    assert jwk(0).kid == changed.active.kid
    assert planned(changed, T0) == CreateKey()


def test_revoking_the_only_key_makes_the_next_one_sign_at_once():
    """With no standby the key that comes next is activated without a window."""
    only = Keyring(issuer=ISSUER).with_created(jwk(0), None, T0).with_published(jwk(0).kid, T0)
    changed = only.with_activated(jwk(0).kid, T0, TIMING).with_revoked(jwk(0).kid, T0, TIMING)
    assert changed.active is None
    assert planned(changed, T0, gate=Gate()) == CreateKey()
    changed = changed.with_created(jwk(1), None, T0).with_published(jwk(1).kid, T0)
    assert planned(changed, T0, gate=Gate()) == ActivateKey(jwk(1).kid)


def test_a_revoked_key_leaves_its_tombstone():
    """Destroyed, it is still known as revoked, and is destroyed only once."""
    keyring = running().with_revoked(jwk(1).kid, T0, TIMING).with_created(jwk(2), None, T0)
    keyring = keyring.with_published(jwk(2).kid, T0)
    assert planned(keyring, T0) == DestroyKey(jwk(1).kid)
    destroyed = keyring.with_destroyed(jwk(1).kid, T0)
    assert (KeyState.REVOKED, T0) == (destroyed.get(jwk(1).kid).state, destroyed.get(jwk(1).kid).destroyed_at)
    assert isinstance(planned(destroyed, T0), Wait)
    assert isinstance(planned(destroyed, T0, Wish(revoke=(jwk(1).kid, "unknown"))), Wait)


def test_a_full_keyring_waits_rather_than_publish_more():
    """Every verifier has to hold all published keys; the cap is for rotations, not for the first signer."""
    keyring = running()
    for number in range(1, MAX_PUBLISHED_KEYS):
        keyring = keyring.with_activated(jwk(number).kid, T0, TIMING)
        if number + 1 < MAX_PUBLISHED_KEYS:
            keyring = keyring.with_created(jwk(number + 1), None, T0).with_published(jwk(number + 1).kid, T0)
    assert MAX_PUBLISHED_KEYS == len(keyring.published)
    assert keyring.standby is None
    assert planned(keyring, T0, Wish(rotate_since=T0, rotate_now=True)) == Wait(T0 + TIMING.keep_retired)


@pytest.mark.parametrize("source", KeyState)
@pytest.mark.parametrize("target", KeyState)
def test_the_table_is_the_only_way_to_move(source, target):
    """Every pair of states that is not in the table is refused."""
    record = replace(running().keys[0], state=source)
    if target in TRANSITIONS[source]:
        assert target is record.moved(target).state
    else:
        with pytest.raises(ValueError, match="cannot go from"):
            record.moved(target)


def test_unknown_and_doubled_keys_are_refused():
    """A change of a key that is not there, or a second key of one name, is a programming error."""
    keyring = running()
    with pytest.raises(ValueError, match="not in the keyring"):
        keyring.with_published("nobody", T0)
    with pytest.raises(ValueError, match="in the keyring already"):
        keyring.with_created(jwk(0), None, T0)
    with pytest.raises(ValueError, match="no published key"):
        Keyring(issuer=ISSUER).key_set()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rotate_every": TIMING.sign_for},
        {"island": TIMING.sign_for + SECOND},
        {"sign_for": TIMING.rotate_every},
        {"sign_for": TIMING.rotate_every + TIMING.poller_window + TIMING.acknowledge_within},
        {"acknowledge_within": TIMING.sign_for},
    ],
)
def test_durations_that_contradict_each_other_are_refused(wrong):
    """A key must not end before its successor can be active."""
    with pytest.raises(ValueError, match="sign_for"):
        replace(TIMING, **wrong)


def test_the_default_durations_hold_together():
    """The defaults of the design: window 15 min 5 s, retired keys for 1 h 15 min 35 s, verifiers have 15 min."""
    timing = Timing()
    assert timedelta(minutes=15) == timing.acknowledge_within
    assert timedelta(minutes=15, seconds=5) == timing.poller_window
    assert timedelta(hours=1, minutes=15, seconds=35) == timing.keep_retired


def test_a_newer_generation_may_follow_and_the_same_one_again():
    """A replica reads the same document over and over."""
    keyring = running()
    check_succession(keyring, keyring)
    revoked = keyring.with_revoked(jwk(1).kid, T0, TIMING)
    check_succession(keyring, revoked)
    check_succession(revoked, revoked.with_created(jwk(2), None, T0))


def test_an_older_or_forked_generation_may_not_follow():
    """Vault restored from an older backup must not bring back what was replaced since."""
    old = running()
    new = old.with_created(jwk(2), None, T0)
    with pytest.raises(KeyringRegressionError, match="generation 5, but 6"):
        check_succession(new, old)
    fork = old.with_created(jwk(3), None, T0)
    with pytest.raises(KeyringRegressionError, match="same generation"):
        check_succession(new, fork)


def test_a_revoked_key_never_comes_back():
    """Not under a higher generation either, and not by being forgotten."""
    current = running().with_revoked(jwk(1).kid, T0, TIMING)
    for state in (KeyState.STANDBY, None):
        keys = tuple(
            replace(k, state=state) if k.kid == jwk(1).kid else k for k in current.keys if state or k.kid != jwk(1).kid
        )
        loaded = replace(current, generation=current.generation + 5, keys=keys)
        with pytest.raises(KeyringRegressionError, match="no longer says"):
            check_succession(current, loaded)
