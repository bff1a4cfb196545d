"""The mirror of the keyring in the shared store: what a replica makes of it when Vault is away, or was restored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from carnet.jwk import KeySet
from carnet_broker.core.keyring import Keyring, KeyringRegressionError, KeyState
from carnet_broker.core.mirror import MirrorNotBelievedError
from carnet_broker.core.requests import RequestKind
from carnet_broker.core.rollout import Permit
from carnet_broker.ports import KeyStoreUnavailableError, StoreUnavailableError
from carnet_broker.signing import NoSigningKeyError
from support.keyrings import SECOND, TIMING, jwk
from support.rotation import ManualClock, MemoryKept, Replica, Vault, go_wrong

ACTIVE, STANDBY, RETIRED, REVOKED = KeyState.ACTIVE, KeyState.STANDBY, KeyState.RETIRED, KeyState.REVOKED
ISLAND = TIMING.island
LATELY = ISLAND / 2
"""How long the holders of these replicas call lately."""


@pytest.fixture(params=["kv", "transit"])
def vault(request) -> Vault:
    """An empty Vault and an empty store; once with keys like KV's and once with versions like Transit's."""
    return Vault(ManualClock(), versioned=request.param == "transit")


@pytest.fixture
def replica(vault: Vault) -> Replica:
    """A replica that has made its first round, and goes on to have both."""
    replica = Replica(vault)
    replica.tick()
    return replica


def without_vault(name: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - the answer of any call
    """A tap at which only the store can be reached."""
    return call() if name.startswith("store.") else go_wrong(name, call, "refused")


def without_anything(name: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - as above
    """A tap at which nothing can be reached."""
    go_wrong(name, call, "refused")


def with_both(name: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - as above
    """A tap at which all is well."""
    del name
    return call()


def cut_off(replica: Replica) -> None:
    """Do a round of a replica that Vault does not answer."""
    replica.tap = without_vault
    with pytest.raises(KeyStoreUnavailableError):
        replica.tick()


def published(replica: Replica) -> set[str]:
    """Return the names of the keys that it serves."""
    return set(KeySet.parse(replica.holder.view.jwks).keys)


def kept_by(keyring: Keyring) -> MemoryKept:
    """Return what a replica with `keyring` has left on its disk."""
    kept = MemoryKept()
    kept.keep(keyring)
    return kept


def rotate_now(vault: Vault, replica: Replica) -> None:
    """Rotate as breakglass does."""
    vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    replica.tick()


# -- a start without Vault ---------------------------------------------------------------------------------------------


def test_a_replica_that_starts_without_vault_serves_trust_and_signs_nothing(vault, replica):
    """It has the public part from the mirror and no private key; it signs when Vault is there. What it kept when it ran
    before vouches for the mirror, which has gone on meanwhile.
    """
    kept = replica.kept.keyring
    rotate_now(vault, replica)
    assert kept.generation < vault.keyring.generation
    fresh = Replica(vault, kept=kept_by(kept))
    cut_off(fresh)
    assert (vault.keyring, replica.holder.view.jwks) == (fresh.holder.view.keyring, fresh.holder.view.jwks)
    with pytest.raises(NoSigningKeyError, match="is not loaded here"):
        fresh.signs_with()
    assert not fresh.holder.is_degraded(vault.clock.now(), vault.clock.mono())
    fresh.tap = with_both
    fresh.tick()
    assert replica.signs_with() == fresh.signs_with()


@pytest.mark.parametrize("late", [timedelta(0), timedelta(microseconds=1)], ids=["in time", "too late"])
def test_what_was_kept_vouches_until_its_key_was_to_be_replaced(vault, replica, late):
    """By then there is a later keyring, and who knows what was revoked since."""
    fresh = Replica(vault, kept=kept_by(vault.keyring))
    vault.clock.pass_time(vault.keyring.active.sign_until - vault.clock.now() - timedelta(microseconds=1) + late)
    cut_off(fresh)
    assert (late == timedelta(0)) == (fresh.holder.view is not None)


def test_a_replica_that_starts_without_vault_and_kept_nothing_serves_nothing(vault, replica):
    """Whoever can write to the store could have made the mirror. That is no alarm: nothing is amiss with the mirror."""
    fresh = Replica(vault)
    cut_off(fresh)
    assert (None, []) == (fresh.holder.view, fresh.heard.refused_mirrors)
    fresh.tap = with_both
    fresh.tick()
    assert replica.signs_with() == fresh.signs_with()


def test_what_was_kept_does_not_vouch_for_a_mirror_after_two_rotations(vault, replica):
    """It knows neither signer nor standby any more."""
    kept = kept_by(vault.keyring)
    rotate_now(vault, replica)
    rotate_now(vault, replica)
    fresh = Replica(vault, kept=kept)
    cut_off(fresh)
    assert fresh.holder.view is None
    assert ["is not known in generation 5" in text for text in fresh.heard.refused_mirrors] == [True]


def test_what_is_kept_is_what_is_in_force(vault, replica):
    """Whether it came from Vault or from the mirror."""
    other = Replica(vault)
    other.tick()
    rotate_now(vault, replica)
    assert vault.keyring == replica.kept.keyring != other.kept.keyring
    cut_off(other)
    assert vault.keyring == other.kept.keyring


@pytest.mark.parametrize("tap", [without_vault, without_anything], ids=["the mirror is empty", "no store either"])
def test_a_replica_that_starts_with_nothing_serves_nothing(vault, tap):
    """Never an empty set."""
    replica = Replica(vault, tap=tap)
    with pytest.raises(KeyStoreUnavailableError):
        replica.tick()
    assert replica.holder.view is None


# -- a replica that is cut off from Vault ------------------------------------------------------------------------------


def test_the_store_confirms_the_signer_of_a_replica_without_vault(vault, replica):
    """For as long as it says that no later key is ACTIVE, not for the island only."""
    signer = replica.signs_with()
    for _ in range(5):
        vault.clock.pass_time(ISLAND)
        cut_off(replica)
        assert (signer, vault.clock.now()) == (replica.signs_with(), replica.holder.view.confirmed_at)
    replica.tap = without_anything
    vault.clock.pass_time(ISLAND)
    with pytest.raises(KeyStoreUnavailableError):
        replica.tick()
    assert signer == replica.signs_with()
    vault.clock.pass_time(SECOND)
    with pytest.raises(NoSigningKeyError, match="neither Vault nor the store"):
        replica.signs_with()


def test_a_later_signer_is_learned_from_the_store_and_signed_with_because_it_was_loaded_as_standby(vault, replica):
    """At once, and with no word of Vault: the standby of yesterday is the signer of today."""
    other = Replica(vault)
    other.tick()
    old, standby = vault.keyring.active.kid, vault.keyring.standby.kid
    rotate_now(vault, replica)
    assert old == other.signs_with()
    cut_off(other)
    assert (vault.keyring, standby) == (other.holder.view.keyring, other.signs_with())
    assert {old, standby, vault.keyring.standby.kid} == published(other)
    # The next one it could not load: it serves it, and does not sign with it, nor with the one before.
    rotate_now(vault, replica)
    cut_off(other)
    assert vault.keyring == other.holder.view.keyring
    with pytest.raises(NoSigningKeyError, match="is not loaded here"):
        other.signs_with()
    other.tap = with_both
    other.tick()
    assert replica.signs_with() == other.signs_with()


def test_k12_a_revocation_reaches_a_replica_without_vault(vault, replica):
    """It stops to serve the key and to sign with it."""
    other = Replica(vault)
    other.tick()
    victim = vault.keyring.active.kid
    vault.ask(RequestKind.REVOKE, victim, breakglass=True)
    replica.tick()
    cut_off(other)
    assert victim not in published(other)
    assert vault.keyring.active.kid == other.signs_with()


def test_a_permit_for_a_later_key_stops_a_replica_that_cannot_ask_vault(vault, replica):
    """The key may be ACTIVE, and the mirror not know it yet: it signs for a moment, not for the island."""
    other = Replica(vault)
    other.tick()
    row = vault.shared.row
    permit = Permit(generation=row.generation, kid=row.kid, given_at=vault.clock.now(), overdue=False)
    vault.shared.row = replace(row, permit=permit)
    for passed, signs in ((LATELY, True), (SECOND, False)):
        vault.clock.pass_time(passed)
        cut_off(other)
        if signs:
            assert vault.keyring.active.kid == other.signs_with()
        else:
            with pytest.raises(NoSigningKeyError, match="knows of a key later"):
                other.signs_with()
    # The store falls silent: what it said stands.
    other.tap = without_anything
    with pytest.raises(KeyStoreUnavailableError):
        other.tick()
    assert other.holder.view.doubted
    # Vault knows better.
    other.tap = with_both
    other.tick()
    assert vault.keyring.active.kid == other.signs_with() == row.kid


@pytest.mark.parametrize(
    ("generation", "kid", "permitted", "doubted"),
    [
        (5, "standby", False, False),
        (5, "standby", True, True),
        (3, "active", True, False),
        (6, "unknown", False, False),
        (6, "unknown", True, True),
        (7, "unknown", False, True),
        (2, "unknown", True, False),
    ],
)
def test_what_the_store_says_of_later_keys(vault, replica, generation, kid, permitted, doubted):
    """A permit for a standby, or for a key that is not in the keyring and is later; and a rollout that is too far on.

    A rollout that is one ahead is a publication that is about to happen: the key does not sign by that. A key that is
    not in the keyring and was raised before it was removed long ago.
    """
    kids = {"standby": vault.keyring.standby.kid, "active": vault.keyring.active.kid, "unknown": jwk(9).kid}
    assert 5 == vault.keyring.generation
    permit = Permit(generation=generation, kid=kids[kid], given_at=vault.clock.now(), overdue=False)
    row = replace(vault.shared.row, generation=generation, kid=kids[kid], permit=permit if permitted else None)
    vault.shared.row = row
    vault.clock.pass_time(SECOND)
    cut_off(replica)
    view = replica.holder.view
    assert (doubted, not doubted) == (view.doubted, vault.clock.now() == view.confirmed_at)


def test_a_replica_that_knows_more_than_the_mirror_brings_it_up_to_date(vault, replica):
    """Whoever rotated could not tell the store. What one replica has read of Vault helps those that cannot."""
    other = Replica(vault)
    other.tick()
    replica.tap = lambda name, call: go_wrong(name, call, "refused") if name.startswith("store.") else call()
    vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    with pytest.raises(StoreUnavailableError):
        replica.tick()
    assert 5 == vault.shared.mirrored
    replica.tap = without_vault
    cut_off(replica)
    assert (vault.keyring.generation, False) == (vault.shared.mirrored, replica.holder.view.doubted)
    cut_off(other)
    assert vault.keyring == other.holder.view.keyring


@pytest.mark.parametrize("call", ["store.save", "store.state"])
def test_a_store_that_falls_silent_in_the_middle_confirms_nothing(vault, replica, call):
    """The view stays as old as it is, and is not doubted either: nobody said anything."""
    if call == "store.save":
        vault.shared.put_mirror(0, None)
    before = replica.holder.view
    vault.clock.pass_time(SECOND)
    replica.tap = lambda name, do: without_vault(name, do) if name != call else go_wrong(name, do, "refused")
    with pytest.raises(KeyStoreUnavailableError):
        replica.tick()
    assert before is replica.holder.view


def test_a_later_keyring_whose_signer_nobody_confirms_is_signed_with_for_a_moment_only(vault, replica):
    """Adopted from the mirror, while the rollout could not be read."""
    other = Replica(vault)
    other.tick()
    rotate_now(vault, replica)
    other.tap = lambda name, do: without_vault(name, do) if name != "store.state" else go_wrong(name, do, "refused")
    with pytest.raises(KeyStoreUnavailableError):
        other.tick()
    assert (vault.keyring, True) == (other.holder.view.keyring, other.holder.view.doubted)


def test_what_is_not_saved_is_saved_at_the_next_look_of_any_replica(vault, replica):
    """A save that failed is trouble for a round, not for ever."""
    replica.tap = lambda name, call: go_wrong(name, call, "refused") if name == "store.save" else call()
    vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    with pytest.raises(StoreUnavailableError):
        replica.tick()
    assert 5 == vault.shared.mirrored
    Replica(vault).tick()
    assert vault.keyring.generation == vault.shared.mirrored


# -- Vault was restored (K07) ------------------------------------------------------------------------------------------


def restored(vault: Vault, replica: Replica) -> list[str]:
    """Rotate, then take Vault back to before; return the document as it was at its best."""
    before = list(vault.document.written)
    rotate_now(vault, replica)
    best = list(vault.document.written)
    vault.document.written[:] = [*before, *before[-1:] * 9]
    return best


def test_k07_a_fresh_replica_does_not_believe_a_document_that_is_older_than_the_mirror(vault, replica):
    """It has seen nothing of its own. It alarms, serves the keys of the mirror, signs nothing and writes nothing."""
    best = vault.keyring
    restored(vault, replica)
    best = replica.holder.view.keyring
    written = list(vault.document.written)
    fresh = Replica(vault)
    for number in (1, 2):
        with pytest.raises(KeyringRegressionError, match="older backup"):
            fresh.tick()
        assert number == fresh.heard.regressions
    assert (best, written) == (fresh.holder.view.keyring, vault.document.written)
    assert published(replica) == published(fresh)
    with pytest.raises(NoSigningKeyError):
        fresh.signs_with()


def test_k07_a_running_replica_goes_on_signing_while_the_store_confirms_it(vault, replica):
    """Nobody of those who check can have made a later key ACTIVE. When the document is back, so is all else."""
    best = restored(vault, replica)
    signer = replica.signs_with()
    for _ in range(3):
        vault.clock.pass_time(ISLAND)
        with pytest.raises(KeyringRegressionError):
            replica.tick()
        assert signer == replica.signs_with()
    vault.document.written[:] = [*vault.document.written, best[-1]]
    replica.tick()
    assert (signer, 3) == (replica.signs_with(), replica.heard.regressions)


def test_k07_without_the_store_a_running_replica_still_does_not_go_back(vault, replica):
    """It has its own memory, and no word of the store: it signs for the island."""
    restored(vault, replica)
    replica.tap = lambda name, call: go_wrong(name, call, "refused") if name.startswith("store.") else call()
    vault.clock.pass_time(ISLAND + SECOND)
    with pytest.raises(KeyringRegressionError):
        replica.tick()
    with pytest.raises(NoSigningKeyError):
        replica.signs_with()


def test_k07_another_document_of_the_generation_of_the_mirror_is_refused(vault, replica):
    """Restored, and written to by somebody who does not ask the store."""
    content = json.loads(vault.document.written[-1])
    content["keys"].pop()
    vault.document.written.append(json.dumps(content))
    fresh = Replica(vault)
    with pytest.raises(KeyringRegressionError, match="same generation"):
        fresh.tick()
    assert replica.holder.view.keyring == fresh.holder.view.keyring


# -- mirrors that are not to be believed -------------------------------------------------------------------------------


def mirror_says(vault: Vault, *, signed_by: str | None = None, **changes: Any) -> None:  # noqa: ANN401 - of the document
    """Put a changed copy of the newest document into the mirror, as of generation 1000."""
    content = json.loads(vault.document.written[-1]) | {"generation": 1000} | changes
    signature = vault.mirror_signature(signed_by, content) if signed_by is not None else None
    vault.shared.put_mirror(content["generation"], content, signature)


def with_a_key_of_mine(vault: Vault) -> list[dict[str, Any]]:
    """Return the keys of the newest document, and one that Vault does not have: an intruder's."""
    keys = json.loads(vault.document.written[-1])["keys"]
    mine = vault.store.create()
    signer = next(key for key in keys if key["state"] == "ACTIVE")
    return [key for key in keys if key is not signer] + [signer | {"jwk": mine.jwk.to_dict(), "version": mine.version}]


def test_a_mirror_that_forgets_a_revocation_is_not_adopted(vault, replica):
    """A revoked key does not come back that way either: alarm, and what is in force stays."""
    forgetful = json.loads(vault.document.written[-1])["keys"]
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    replica.tick()
    before = replica.holder.view
    mirror_says(vault, keys=forgetful, signed_by=vault.keyring.active.kid)
    cut_off(replica)
    assert (before, 1) == (replica.holder.view, replica.heard.regressions)


@pytest.mark.parametrize("change", [{"issuer": "https://other.example"}, {"form": 2}, {"surprise": 1}])
def test_a_mirror_that_cannot_be_read_is_told_of_and_holds_up_what_needs_the_store(vault, replica, change):
    """Two environments in one store, or a newer broker: nothing is adopted, nothing published over it."""
    mirror_says(vault, **change)
    vault.ask(RequestKind.REVOKE, vault.keyring.active.kid, breakglass=True)
    with pytest.raises(StoreUnavailableError, match="not one of this broker"):
        replica.tick()
    assert [REVOKED, ACTIVE] == vault.states
    fresh = Replica(vault, tap=without_vault)
    with pytest.raises(KeyStoreUnavailableError):
        fresh.tick()
    assert fresh.holder.view is None


def test_a_mirror_that_differs_in_the_same_generation_confirms_nothing(vault, replica):
    """Two histories, both signed: without Vault nobody can say which is right."""
    before = replica.holder.view
    mirror_says(vault, generation=5, keys=with_a_key_of_mine(vault), signed_by=vault.keyring.active.kid)
    vault.clock.pass_time(SECOND)
    cut_off(replica)
    assert before is replica.holder.view


# -- whoever can write to the store, and cannot sign -------------------------------------------------------------------


def forged(vault: Vault, forgery: str, **changes: Any) -> str:  # noqa: ANN401 - members of the document
    """Put a mirror with an intruder's key into the store; return the name of the key."""
    keys = with_a_key_of_mine(vault)
    mine, active = keys[-1]["jwk"]["kid"], vault.keyring.active.kid
    mirror_says(vault, keys=keys, signed_by=mine if forgery == "own key" else None, **changes)
    found = vault.shared.mirror.load()
    content, generation = found.content, found.generation
    if forgery == "another's name":
        signature = vault.mirror_signature(mine, content)
        vault.shared.put_mirror(generation, content, replace(signature, kid=active))
    if forgery == "another generation":
        vault.shared.put_mirror(generation, content, vault.mirror_signature(active, content, generation - 1))
    return mine


FORGERIES = ["unsigned", "own key", "another's name", "another generation"]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_mirror_brings_no_key_before_verifiers_without_vault(vault, replica, forgery):
    """What is in force stays, and is not confirmed: it is told of, and a signer stops soon, as a later one may be."""
    before = replica.holder.view
    mine = forged(vault, forgery)
    vault.clock.pass_time(LATELY)
    cut_off(replica)
    view = replica.holder.view
    assert (before.keyring, before.confirmed_at, True) == (view.keyring, view.confirmed_at, view.doubted)
    assert mine not in published(replica)
    assert 1 == len(replica.heard.refused_mirrors)
    vault.clock.pass_time(SECOND)
    with pytest.raises(NoSigningKeyError):
        replica.signs_with()


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_mirror_does_not_stop_a_replica_that_reaches_vault(vault, replica, forgery):
    """It goes on with Vault; what needs the store waits until somebody has looked into it. A revocation does not."""
    mine = forged(vault, forgery)
    victim = vault.keyring.active.kid
    vault.ask(RequestKind.REVOKE, victim, breakglass=True)
    with pytest.raises(StoreUnavailableError, match="is not believed"):
        replica.tick()
    assert vault.keyring == replica.holder.view.keyring
    assert not {mine, victim} & published(replica)
    assert replica.signs_with() == vault.keyring.active.kid
    assert 1000 == vault.shared.mirrored


@pytest.mark.parametrize("forgery", FORGERIES)
def test_k07_a_replica_that_starts_with_vault_beside_a_later_mirror_that_it_cannot_check_does_not_start(
    vault, replica, forgery
):
    """Either is right: Vault was restored, or the mirror was forged. It says so."""
    forged(vault, forgery)
    fresh = Replica(vault)
    with pytest.raises(MirrorNotBelievedError, match="generation 1000, is not believed"):
        fresh.tick()
    assert (None, 1) == (fresh.holder.view, len(fresh.heard.refused_mirrors))


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("generation", [4, 5])
def test_a_forged_mirror_that_is_no_later_is_written_over(vault, replica, forgery, generation):
    """As is what a broker of the version before has written: it cannot sign."""
    forged(vault, forgery, generation=generation)
    replica.tick()
    mirrored = vault.shared.mirror.load()
    assert (5, vault.keyring.active.kid) == (mirrored.generation, mirrored.signature.kid)
    assert json.loads(vault.document.written[-1]) == mirrored.content


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_replica_that_kept_a_keyring_does_not_start_from_a_forged_mirror(vault, replica, forgery):
    """Nor does it from one that is older than what it kept."""
    mine = forged(vault, forgery)
    fresh = Replica(vault, kept=kept_by(replica.holder.view.keyring))
    cut_off(fresh)
    assert (None, 1) == (fresh.holder.view, len(fresh.heard.refused_mirrors))
    assert mine not in published(replica)
    older = vault.history[-2]
    content = json.loads(vault.document.written[-2])
    vault.shared.put_mirror(older.generation, content, vault.mirror_signature(vault.keyring.active.kid, content))
    cut_off(fresh)
    assert (None, 1, 1) == (fresh.holder.view, len(fresh.heard.refused_mirrors), fresh.heard.regressions)


def test_k12_a_revoked_key_cannot_undo_its_revocation_by_a_mirror(vault, replica):
    """Its thief signs a later mirror in which it is ACTIVE. The standby has signed the one that revokes it."""
    other = Replica(vault)
    other.tick()
    victim = vault.keyring.active.kid
    stolen = vault.store.keys[victim]
    before = json.loads(vault.document.written[-1])
    vault.ask(RequestKind.REVOKE, victim, breakglass=True)
    replica.tick()
    cut_off(other)
    assert victim not in published(other)
    assert vault.shared.mirror.load().signature.kid == vault.keyring.active.kid
    content = before | {"generation": 1000}
    vault.store.keys[victim] = stolen
    vault.shared.put_mirror(1000, content, vault.mirror_signature(victim, content))
    cut_off(other)
    assert victim not in published(other)
    assert "is REVOKED" in other.heard.refused_mirrors[-1]


def test_a_mirror_is_not_written_while_nobody_can_sign_it(vault, replica):
    """A signer in Vault that does not answer: what needs the store waits. The standby signs in place of the signer."""
    active, standby = vault.keyring.active.kid, vault.keyring.standby.kid
    vault.shared.put_mirror(0, None)
    if vault.store_name == "kv":
        replica.tick()
        assert active == vault.shared.mirror.load().signature.kid
        return
    keys = dict(vault.store.keys)
    vault.store.keys.clear()
    with pytest.raises(StoreUnavailableError, match="could not be signed"):
        replica.tick()
    assert 0 == vault.shared.mirrored
    vault.store.keys[standby] = keys[standby]
    replica.tick()
    assert (5, standby) == (vault.shared.mirrored, vault.shared.mirror.load().signature.kid)


def test_a_mirror_of_a_keyring_without_keys_to_sign_with_says_only_that_it_is_there(vault):
    """The first key, before it was proven: unsigned. A replica that is cut off doubts by it, and believes nothing."""
    replica = Replica(vault)
    seen = []
    real = vault.shared.mirror.save

    def save(generation: int, content: dict[str, Any], signature: Any) -> None:  # noqa: ANN401 - MirrorSignature | None
        seen.append((generation, None if signature is None else signature.kid))
        real(generation, content, signature)

    vault.shared.mirror.save = save
    replica.tick()
    first, second = (key.kid for key in vault.keyring.keys)
    assert [(1, None), (2, first), (3, first), (4, first), (5, first)] == seen
    assert (ACTIVE, STANDBY) == (vault.keyring.get(first).state, vault.keyring.get(second).state)
