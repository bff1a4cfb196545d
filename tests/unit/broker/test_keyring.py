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
    Keyring,
    KeyringRegressionError,
    KeyState,
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
READY = T0 + TIMING.replica_lag + TIMING.poller_window


def planned(keyring, now, wish=NOTHING, served_since=T0 + TIMING.replica_lag):
    """Plan with the test's timing."""
    return plan(keyring, now=now, timing=TIMING, served_since=served_since, wish=wish)


def test_an_empty_keyring_gets_a_key_that_is_published_and_activated_at_once():
    """Where nothing signs, no window is waited for."""
    keyring = Keyring(issuer=ISSUER)
    assert planned(keyring, T0, served_since=None) == CreateKey()
    keyring = keyring.with_created(jwk(0), None, T0)
    assert planned(keyring, T0, served_since=None) == PublishKey(jwk(0).kid)
    keyring = keyring.with_published(jwk(0).kid, T0)
    assert planned(keyring, T0, served_since=None) == ActivateKey(jwk(0).kid)
    keyring = keyring.with_activated(jwk(0).kid, T0, TIMING)
    assert planned(keyring, T0, served_since=None) == CreateKey()


def test_a_standby_is_kept_published_next_to_the_active_key():
    """One ACTIVE and one STANDBY is the state of rest."""
    keyring = running()
    assert [KeyState.ACTIVE, KeyState.STANDBY] == [key.state for key in keyring.keys]
    assert {jwk(0).kid, jwk(1).kid} == set(keyring.key_set().keys)
    assert planned(keyring, T0) == Wait(T0 + TIMING.rotate_every)


@pytest.mark.parametrize(("offset", "expected"), [(-1, "wait"), (0, "activate"), (1, "activate")])
def test_a_requested_rotation_waits_for_the_poller_window(offset, expected):
    """The standby activates from the exact end of the window, and not a second sooner."""
    step = planned(running(), READY + offset * SECOND, Wish(rotate=True))
    assert step == (Wait(READY) if expected == "wait" else ActivateKey(jwk(1).kid))


@pytest.mark.parametrize(("offset", "expected"), [(-1, "wait"), (0, "activate"), (1, "activate")])
def test_a_rotation_is_due_by_age_with_no_request(offset, expected):
    """`rotate_every` after its activation a key is replaced."""
    due = T0 + TIMING.rotate_every
    step = planned(running(), due + offset * SECOND)
    assert step == (Wait(due) if expected == "wait" else ActivateKey(jwk(1).kid))


def test_no_rotation_while_it_is_not_known_since_when_the_standby_is_served():
    """Without the word of the other replicas only breakglass activates."""
    late = T0 + 10 * TIMING.rotate_every
    assert planned(running(), late, Wish(rotate=True), served_since=None) == Wait(None)
    assert planned(running(), late, Wish(rotate_now=True), served_since=None) == ActivateKey(jwk(1).kid)


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
    served = READY + TIMING.replica_lag
    assert planned(keyring, old.keep_until - SECOND, served_since=served) == Wait(old.keep_until)
    assert planned(keyring, old.keep_until, served_since=served) == RemoveKey(jwk(0).kid)
    removed = keyring.with_removed(jwk(0).kid, old.keep_until)
    assert jwk(0).kid not in removed.key_set().keys
    assert planned(removed, old.keep_until, served_since=served) == DestroyKey(jwk(0).kid)
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
    assert planned(changed, T0, served_since=None) == CreateKey()
    changed = changed.with_created(jwk(1), None, T0).with_published(jwk(1).kid, T0)
    assert planned(changed, T0, served_since=None) == ActivateKey(jwk(1).kid)


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
    assert planned(keyring, T0, Wish(rotate=True, rotate_now=True)) == Wait(T0 + TIMING.keep_retired)


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
    [{"rotate_every": TIMING.sign_for}, {"island": TIMING.sign_for + SECOND}, {"sign_for": TIMING.rotate_every}],
)
def test_durations_that_contradict_each_other_are_refused(wrong):
    """A key must not end before its successor can be active."""
    with pytest.raises(ValueError, match="sign_for"):
        replace(TIMING, **wrong)


def test_the_default_durations_hold_together():
    """The defaults of the design: window 15 min 5 s, retired keys for 1 h 15 min 35 s."""
    timing = Timing()
    assert timedelta(minutes=15, seconds=5) == timing.poller_window
    assert timedelta(hours=1, minutes=15, seconds=35) == timing.keep_retired


def test_a_newer_generation_may_follow_and_the_same_one_again():
    """A replica reads the same document over and over."""
    keyring = running()
    check_succession(keyring, keyring)
    check_succession(keyring, keyring.with_revoked(jwk(1).kid, T0, TIMING))


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
