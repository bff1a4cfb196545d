"""What a replica signs with, and for how long it may: two clocks, the island, and the end of the key."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from carnet_broker.core.keyring import Keyring
from carnet_broker.edges.vault.kv_store import KvSigner
from carnet_broker.signing import KeyringHolder, KeyringView, NoSigningKeyError
from support.keyrings import SECOND, T0, TIMING, jwk, running

ISLAND = TIMING.island
WITHIN = timedelta(seconds=20)
SIGNER = KvSigner(jwk(0).kid, ec.derive_private_key(1_000_003, ec.SECP256R1()))
KEYRING = running()
SIGN_UNTIL = T0 + TIMING.sign_for


def view(keyring: Keyring = KEYRING, *, signer: KvSigner | None = SIGNER, at: timedelta = timedelta(0)) -> KeyringView:
    """A view that Vault confirmed `at` after the beginning of time, on both clocks."""
    return KeyringView(
        keyring=keyring,
        key=keyring.active,
        signer=signer,
        jwks=keyring.key_set().to_json(),
        confirmed_at=T0 + at,
        confirmed_mono=at.total_seconds(),
    )


def holding(held: KeyringView) -> KeyringHolder:
    """A holder with that view in force."""
    holder = KeyringHolder(island=ISLAND, confirm_within=WITHIN)
    holder.adopt(held)
    return holder


def may_sign(holder: KeyringHolder, wall: timedelta, mono: timedelta | None = None) -> bool:
    """Say whether the holder signs when so much time has passed on its clocks."""
    try:
        key, signer = holder.signing_key(T0 + wall, (wall if mono is None else mono).total_seconds())
    except NoSigningKeyError:
        return False
    assert (KEYRING.active, SIGNER) == (key, signer)
    return True


def test_nothing_is_signed_before_a_keyring_is_loaded():
    """Nor is there a view."""
    holder = KeyringHolder(island=ISLAND)
    assert holder.view is None
    with pytest.raises(NoSigningKeyError, match="no ACTIVE key"):
        holder.signing_key(T0, 0.0)


@pytest.mark.parametrize(
    "held",
    [
        view(signer=None),
        replace(view(), key=None),
        replace(view(), key=replace(KEYRING.active, sign_until=None)),
    ],
    ids=["no private key", "no ACTIVE key", "no end"],
)
def test_a_view_that_lacks_a_part_signs_nothing(held):
    """A keyring alone is not enough."""
    with pytest.raises(NoSigningKeyError, match=r"no ACTIVE key|the private key .* is not loaded here"):
        holding(held).signing_key(T0, 0.0)


@pytest.mark.parametrize(("offset", "signs"), [(-1, True), (0, True), (1, False)])
def test_a_replica_that_nobody_confirms_signs_for_the_island_and_not_longer(offset, signs):
    """To its last second: so long the retired key is published for its sake."""
    assert signs is may_sign(holding(view()), ISLAND + offset * SECOND)


@pytest.mark.parametrize(("offset", "signs"), [(-1, True), (0, False), (1, False)])
def test_k09_a_key_signs_until_its_end_however_fresh_the_view_is(offset, signs):
    """At `sign_until` itself it is over."""
    holder = holding(view(at=TIMING.sign_for))
    assert signs is may_sign(holder, TIMING.sign_for + offset * SECOND)


def test_a_confirmed_view_signs_on():
    """Each confirmation begins the island anew, on both clocks."""
    holder = holding(view())
    holder.confirm(T0 + ISLAND, ISLAND.total_seconds())
    assert may_sign(holder, 2 * ISLAND)
    assert not may_sign(holder, 2 * ISLAND + SECOND)


def test_k08_a_suspended_machine_counts_the_time_that_it_slept():
    """The monotonic clock stood still, the wall did not."""
    assert not may_sign(holding(view()), ISLAND + SECOND, mono=SECOND)


def test_k08_a_wall_clock_that_was_set_back_does_not_prolong_the_island():
    """The wall says that no time has passed, or less than none; the monotonic clock says otherwise."""
    for wall in (timedelta(0), -timedelta(hours=1)):
        assert may_sign(holding(view()), wall, mono=ISLAND)
        assert not may_sign(holding(view()), wall, mono=ISLAND + SECOND)


@pytest.mark.parametrize(("offset", "signs"), [(-1, True), (0, True), (1, False)])
def test_k08_a_replica_that_the_store_has_doubts_about_signs_for_a_moment_only(offset, signs):
    """The store was reached and does not confirm: a later key may be ACTIVE, so the island is not for this case."""
    holder = holding(view())
    holder.doubt()
    assert signs is may_sign(holder, WITHIN + offset * SECOND)
    holder.confirm(T0 + WITHIN, WITHIN.total_seconds())
    assert may_sign(holder, WITHIN + ISLAND)


def test_there_is_nothing_to_doubt_before_a_keyring_is_loaded():
    """Nor does a second doubt change anything."""
    holder = KeyringHolder(island=ISLAND)
    holder.doubt()
    assert holder.view is None
    holder.adopt(view())
    holder.doubt()
    doubted = holder.view
    holder.doubt()
    assert doubted is holder.view


@pytest.mark.parametrize(("offset", "degraded"), [(-1, False), (0, False), (1, True)])
def test_a_replica_is_degraded_when_vault_did_not_confirm_its_view_lately(offset, degraded):
    """It signs on meanwhile."""
    holder = holding(view())
    passed = WITHIN + offset * SECOND
    assert degraded is holder.is_degraded(T0 + passed, passed.total_seconds())
    assert may_sign(holder, passed)


def test_a_replica_with_no_view_is_degraded_and_cannot_be_confirmed():
    """There is nothing to confirm."""
    holder = KeyringHolder(island=ISLAND)
    holder.confirm(T0, 0.0)
    assert (None, True) == (holder.view, holder.is_degraded(T0, 0.0))


def test_the_default_of_lately_is_a_minute():
    """As the design has it."""
    holder = KeyringHolder(island=ISLAND)
    holder.adopt(view())
    assert not holder.is_degraded(T0, 60.0)
    assert holder.is_degraded(T0, 61.0)


def test_a_reader_keeps_the_view_that_it_took():
    """A rotation replaces the view whole; who has begun with the old one sees nothing of the new."""
    holder = holding(view())
    taken = holder.view
    rotated = KEYRING.with_activated(jwk(1).kid, T0, TIMING)
    holder.adopt(view(rotated))
    assert (KEYRING, rotated) == (taken.keyring, holder.view.keyring)
    holder.confirm(T0 + SECOND, 1.0)
    assert (T0, rotated.active) == (taken.confirmed_at, holder.view.key)
