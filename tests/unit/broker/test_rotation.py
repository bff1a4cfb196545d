"""The rotation driver over a Vault in memory: its way through the life of the keys, and every bad day of one call."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from carnet.jwk import KeySet
from carnet_broker.core.keyring import KeyringRegressionError, KeyState
from carnet_broker.core.keyring_document import InvalidKeyringError
from carnet_broker.core.requests import RequestKind
from carnet_broker.ports import KeyStoreUnavailableError, StoreUnavailableError
from carnet_broker.signing import NoSigningKeyError
from support.keyrings import SECOND, T0, TIMING
from support.rotation import FAULTS, FaultAt, KilledError, ManualClock, Replica, Vault, go_wrong

ACTIVE, STANDBY, RETIRED, REVOKED = KeyState.ACTIVE, KeyState.STANDBY, KeyState.RETIRED, KeyState.REVOKED
WINDOW = TIMING.poller_window
LATER = WINDOW + TIMING.min_interval


@pytest.fixture(params=["kv", "transit"])
def vault(request) -> Vault:
    """An empty Vault, once with keys like KV's and once with versions like Transit's."""
    return Vault(ManualClock(), versioned=request.param == "transit")


@pytest.fixture
def replica(vault: Vault) -> Replica:
    """A replica that has made its first round."""
    replica = Replica(vault)
    replica.tick()
    return replica


def rotated(vault: Vault, replica: Replica, kind: RequestKind = RequestKind.ROTATE) -> str:
    """Ask for a rotation when one may be had at once, and return the id of the request."""
    vault.clock.pass_time(LATER)
    request = vault.ask(kind, breakglass=kind is not RequestKind.ROTATE)
    replica.tick()
    return request


# -- the ordinary way --------------------------------------------------------------------------------------------------


def test_the_first_start_makes_a_signer_and_a_standby(vault):
    """One round, from nothing: the first key signs at once, the second is published and waits."""
    replica = Replica(vault)
    until = replica.tick()
    assert [ACTIVE, STANDBY] == vault.states
    assert ["CreateKey", "PublishKey", "ActivateKey", "CreateKey", "PublishKey"] == replica.heard.steps
    assert [1, 2, 3, 4, 5] == replica.heard.generations
    assert vault.keyring.active.kid == replica.signs_with()
    assert vault.keyring == replica.holder.view.keyring
    assert {key.kid for key in vault.keyring.keys} == set(KeySet.parse(replica.holder.view.jwks).keys)
    assert T0 + TIMING.rotate_every == until
    assert (set(), set()) == (vault.orphans, vault.bereft)


def test_a_quiet_round_writes_nothing_and_confirms_the_view(vault, replica):
    """What Vault says again is fresh again; the document, the signers and the steps stay."""
    signer, written = replica.holder.view.signer, len(vault.document.written)
    vault.clock.pass_time(5 * SECOND)
    replica.tick()
    assert vault.clock.now() == replica.holder.view.confirmed_at
    assert vault.clock.mono() == replica.holder.view.confirmed_mono
    assert (written, signer) == (len(vault.document.written), replica.holder.view.signer)


def test_a_second_replica_finds_the_same_keys_and_takes_no_step(vault, replica):
    """Whoever comes later loads what is there, signers included."""
    second = Replica(vault)
    second.tick()
    assert ([], [vault.keyring.generation]) == (second.heard.steps, second.heard.generations)
    assert replica.signs_with() == second.signs_with()


@pytest.mark.parametrize(("offset", "answer"), [(-1, "WAITING_FOR_POLLERS"), (0, "ROTATED"), (1, "ROTATED")])
def test_a_rotation_that_is_asked_for_comes_at_the_end_of_the_window(vault, replica, offset, answer):
    """Not a second sooner than every verifier can have the standby; the round says until when it waits."""
    # The first key is revoked to make a standby that was published just now, by a rotation that nobody asked CI for.
    vault.clock.pass_time(LATER)
    vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    replica.tick()
    vault.clock.pass_time(TIMING.min_interval)
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    replica.tick()
    before = vault.keyring
    request = vault.ask()
    assert before.standby.published_at + WINDOW == replica.tick()
    vault.clock.pass_time(WINDOW + offset * SECOND)
    replica.tick()
    assert answer == vault.reason(request)
    signs = before.standby.kid if answer == "ROTATED" else before.active.kid
    assert (signs, signs) == (vault.keyring.active.kid, replica.signs_with())


def test_the_old_key_is_published_to_its_end_and_then_destroyed(vault, replica):
    """RETIRED, it still verifies; a second before `keep_until` too; then it is gone, and its private key with it."""
    old = vault.keyring.active.kid
    rotated(vault, replica)
    assert RETIRED is vault.keyring.get(old).state
    end = vault.keyring.get(old).keep_until
    vault.clock.pass_time(end - vault.clock.now() - SECOND)
    assert end == replica.tick()
    assert old in KeySet.parse(replica.holder.view.jwks).keys
    assert old in vault.store.keys
    vault.clock.pass_time(SECOND)
    replica.tick()
    assert old not in KeySet.parse(replica.holder.view.jwks).keys
    assert (None, False) == (vault.keyring.get(old), old in vault.store.keys)


def test_breakglass_rotates_at_once_and_is_answered_by_name(vault, replica):
    """No window, and not by a rotation that came before it."""
    before = vault.keyring
    request = vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    replica.tick()
    assert ("ROTATED", before.standby.kid) == (vault.reason(request), vault.keyring.active.kid)
    assert (request,) == vault.keyring.active.answers


@pytest.mark.parametrize("state", [ACTIVE, STANDBY, RETIRED])
def test_k12_a_revoked_key_is_gone_at_once_and_its_private_key_too(vault, replica, state):
    """Whatever its state: not published, not signed with, destroyed; a signer and a standby are there."""
    rotated(vault, replica)
    victim = vault.keyring.in_state(state)[0].kid
    request = vault.ask(RequestKind.REVOKE, victim, breakglass=True)
    replica.tick()
    assert "REVOKED" == vault.reason(request)
    assert (REVOKED, False) == (vault.keyring.get(victim).state, victim in vault.store.keys)
    assert victim not in KeySet.parse(replica.holder.view.jwks).keys
    assert victim != replica.signs_with()
    assert (1, 1) == (vault.states.count(ACTIVE), vault.states.count(STANDBY))
    replica.tick()
    assert vault.keyring.get(victim).destroyed_at is not None


def test_two_rotations_in_a_row_by_breakglass_are_two(vault, replica):
    """Each asks for a key that did not sign before it asked."""
    first = rotated(vault, replica, RequestKind.ROTATE_NOW)
    signer = vault.keyring.active.kid
    second = vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    replica.tick()
    assert (vault.reason(first), vault.reason(second)) == ("ROTATED", "ROTATED")
    assert signer != vault.keyring.active.kid


def test_many_requests_of_ci_do_not_make_breakglass_rotate_twice(vault, replica):
    """The activation names a bounded number of requests, breakglass before CI: who stuffs the box gains nothing."""
    vault.clock.pass_time(LATER)
    for _ in range(150):
        vault.ask()
    request = vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    standby = vault.keyring.standby.kid
    replica.tick()
    assert (standby, "ROTATED") == (vault.keyring.active.kid, vault.reason(request))
    assert 1 == replica.heard.steps[5:].count("ActivateKey")
    assert (100, []) == (len(vault.keyring.active.answers), vault.unanswered)


def test_answered_requests_are_swept_after_a_week(vault, replica):
    """Not before, and not at every round."""
    request = rotated(vault, replica)
    vault.clock.pass_time(timedelta(days=6, hours=23))
    replica.tick()
    assert "ROTATED" == vault.reason(request)
    vault.clock.pass_time(timedelta(minutes=30))
    vault.requests.requests[request] = replace(vault.requests.requests[request], created_at=T0 - timedelta(days=30))
    replica.tick()
    assert request in vault.requests.requests
    vault.clock.pass_time(timedelta(minutes=31))
    replica.tick()
    assert {} == vault.requests.requests | vault.requests.results


def test_each_step_has_the_time_at_which_it_is_taken(vault):
    """In a slow Vault a round lasts long: what is published, activated or retired counts from its own write."""
    writes = []

    def slow(name: str, call: Callable[[], object]) -> object:
        if name == "replace":
            writes.append(vault.clock.now())
        vault.clock.pass_time(4 * SECOND)
        return call()

    replica = Replica(vault, tap=slow)
    replica.tick()
    vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    replica.tick()
    first, second, _ = vault.keyring.keys
    created, published, activated, created_next, published_next, activated_next, *_ = writes
    assert (created, published, activated) == (first.created_at, first.published_at, first.activated_at)
    assert (created_next, published_next) == (second.created_at, second.published_at)
    assert activated_next == second.activated_at == first.retired_at
    assert activated_next + TIMING.keep_retired == first.keep_until
    assert T0 + 8 * SECOND < created < published < activated
    assert replica.holder.view.confirmed_at < vault.clock.now()


# -- several replicas (K01) --------------------------------------------------------------------------------------------


class Meddler:
    """A tap that lets another replica do a whole round just before the `number`-th `replace`."""

    def __init__(self, number: int, other: Replica) -> None:
        self._left = number
        self._other = other
        self.meddled = False

    def __call__(self, name: str, call: Callable[[], object]) -> object:
        """Do the call, after the other's round where it is due."""
        if name == "replace":
            self._left -= 1
            if self._left == -1:
                self.meddled = True
                self._other.tick()
        return call()


@pytest.mark.parametrize("number", range(5))
def test_k01_a_lost_race_at_the_first_start_loses_nothing(vault, number):
    """Whichever step it is: one signer, one standby, no private key that nobody needs, both replicas agree."""
    other = Replica(vault)
    replica = Replica(vault, tap=(meddler := Meddler(number, other)))
    replica.tick()
    other.tick()
    assert meddler.meddled
    assert [ACTIVE, STANDBY] == vault.states
    assert (set(), set()) == (vault.orphans, vault.bereft)
    assert vault.keyring.active.kid == replica.signs_with() == other.signs_with()


@pytest.mark.parametrize("number", range(4))
def test_k01_two_requests_and_two_replicas_make_one_rotation(vault, replica, number):
    """Whoever is first at any of the steps: one new signer, and both requests are answered by it."""
    other = Replica(vault)
    other.tick()
    vault.clock.pass_time(LATER)
    requests = [vault.ask(), vault.ask()]
    before = vault.keyring
    replica.tap = Meddler(number, other)
    replica.tick()
    other.tick()
    assert ["ROTATED", "ROTATED"] == [vault.reason(request) for request in requests]
    assert before.standby.kid == vault.keyring.active.kid == replica.signs_with() == other.signs_with()
    assert [RETIRED, ACTIVE, STANDBY] == vault.states
    assert (set(), set()) == (vault.orphans, vault.bereft)


@pytest.mark.parametrize("number", range(6))
def test_k01_a_revocation_and_a_rotation_at_once(vault, replica, number):
    """Two replicas carry out both, in whichever order: the revoked key neither signs nor is published."""
    other = Replica(vault)
    other.tick()
    vault.clock.pass_time(LATER)
    victim = vault.keyring.active.kid
    requests = [vault.ask(), vault.ask(RequestKind.REVOKE, victim, breakglass=True)]
    replica.tap = Meddler(number, other)
    replica.tick()
    other.tick()
    replica.tick()
    assert [] == vault.unanswered
    assert {"ROTATED", "REVOKED"} == {vault.reason(request) for request in requests}
    assert (1, 1, REVOKED) == (vault.states.count(ACTIVE), vault.states.count(STANDBY), vault.keyring.get(victim).state)
    assert (set(), set()) == (vault.orphans, vault.bereft)
    assert victim not in {replica.signs_with(), other.signs_with()}


def test_a_round_in_which_every_write_loses_ends_and_says_that_there_is_more(vault):
    """A replica that is always beaten does not go round for ever; what it made for nothing it has destroyed."""

    def beaten(name: str, call: Callable[[], object]) -> object:
        if name == "replace":
            # Another writer, newer than what this replica has loaded.
            vault.document.written.append("{}")
            try:
                return call()
            finally:
                vault.document.written.clear()
        return call()

    replica = Replica(vault, tap=beaten)
    assert vault.clock.now() == replica.tick()
    replica.tap = lambda name, call: call()
    replica.tick()
    assert ([ACTIVE, STANDBY], set()) == (vault.states, vault.orphans)


# -- one call goes wrong (K02) -----------------------------------------------------------------------------------------


def story(vault: Vault, replica: Replica) -> None:
    """Everything that can happen to a keyring: from nothing through a rotation, a removal and a revocation."""
    replica.tick()
    rotated(vault, replica)
    vault.clock.pass_time(TIMING.keep_retired)
    replica.tick()
    vault.ask(RequestKind.REVOKE, vault.keyring.active.kid, breakglass=True)
    replica.tick()
    rotated(vault, replica, RequestKind.ROTATE_NOW)


def calls_of_the_story(*, versioned: bool) -> int:
    """How many calls the whole story makes."""
    vault = Vault(ManualClock(), versioned=versioned)
    replica = Replica(vault, tap=(counter := FaultAt(-1, "refused")))
    story(vault, replica)
    return len(counter.calls)


@pytest.mark.parametrize("versioned", [False, True], ids=["kv", "transit"])
@pytest.mark.parametrize("fault", FAULTS)
def test_k02_any_one_call_may_go_wrong(fault, versioned):
    """Refused, answered to nobody, or killed there: whoever comes next brings it all to a good end.

    There is always a signer once there was one, never two, no request is left without an answer, every live key has its
    private key, and every other private key is destroyed. Only one can be left: that of a key that was being made when
    its maker ended or was not told, before it stood in any document. Nobody publishes that one, ever.
    """
    total = calls_of_the_story(versioned=versioned)
    assert 40 < total
    struck = set()
    for number in range(total):
        vault = Vault(ManualClock(), versioned=versioned)
        tap = FaultAt(number, fault)
        replica = Replica(vault, tap=tap)
        with suppress(KilledError, KeyStoreUnavailableError, StoreUnavailableError):
            story(vault, replica)
        struck.add(tap.struck)
        made = set(vault.store.versions)
        if fault.startswith("killed"):
            replica = Replica(vault)
        replica.tick()
        vault.clock.pass_time(LATER)
        replica.tick()
        for before, after in zip(vault.history, vault.history[1:], strict=False):
            assert before.generation + 1 == after.generation
            revoked = len(after.in_state(REVOKED)) > len(before.in_state(REVOKED))
            assert 1 >= len(after.in_state(ACTIVE)) >= len(before.in_state(ACTIVE)) - revoked, (number, tap.struck)
        vault.clock.pass_time(TIMING.keep_retired)
        replica.tick()
        assert (1, 1) == (vault.states.count(ACTIVE), vault.states.count(STANDBY)), (number, tap.struck)
        assert [] == vault.unanswered, (number, tap.struck)
        assert set() == vault.bereft, (number, tap.struck)
        assert vault.keyring.active.kid == replica.signs_with()
        if vault.orphans:
            assert (1, True) == (len(vault.orphans), vault.orphans <= made), (number, tap.struck)
            named = {key.kid for keyring in vault.history for key in keyring.keys}
            assert set() == vault.orphans & named, (number, tap.struck)
            may_orphan = {"killed before": {"replace"}, "killed after": {"create"}, "answer lost": {"create"}}
            assert tap.struck in may_orphan.get(fault, set()), (number, tap.struck)
    assert {"create", "signer", "destroy", "load", "replace", "pending", "answer", "sweep"} <= struck
    assert {f"store.{call}" for call in ("load", "save", "state", "raise_to", "permit")} <= struck
    assert 13 == len(struck)


@pytest.mark.parametrize("call", ["create", "signer", "destroy", "load", "replace", "pending", "answer", "sweep"])
def test_k05_a_call_that_always_fails_is_reported_and_heals_with_no_restart(vault, replica, call):
    """The round says so by its error; as soon as the call works again, everything that was asked for is done."""

    def forbidden(name: str, call_it: Callable[[], object]) -> object:
        if name == call:
            msg = f"{name} is forbidden"
            raise KeyStoreUnavailableError(msg)
        return call_it()

    replica.tap = forbidden
    vault.clock.pass_time(timedelta(hours=2))
    vault.ask()
    vault.ask(RequestKind.REVOKE, vault.keyring.active.kid, breakglass=True)
    for _ in range(3):
        with pytest.raises(KeyStoreUnavailableError, match=f"{call} is forbidden"):
            replica.tick()
    replica.tap = lambda name, call_it: call_it()
    replica.tick()
    assert ([], set(), set()) == (vault.unanswered, vault.bereft, vault.orphans)
    assert (1, 1) == (vault.states.count(ACTIVE), vault.states.count(STANDBY))


def refusing(*names: str) -> Callable[[str, Callable[[], Any]], Any]:
    """Return a tap at which the calls of these names fail."""

    def tap(name: str, call: Callable[[], object]) -> object:
        if name in names:
            go_wrong(name, call, "refused")
        return call()

    return tap


def test_a_letter_box_that_cannot_be_read_does_not_stop_the_rotation_that_is_due(vault, replica):
    """Whoever can spoil the box cannot keep the keys from changing."""
    standby = vault.keyring.standby.kid
    vault.clock.pass_time(TIMING.rotate_every)
    replica.tap = refusing("pending")
    with pytest.raises(KeyStoreUnavailableError):
        replica.tick()
    assert (standby, [RETIRED, ACTIVE, STANDBY]) == (vault.keyring.active.kid, vault.states)


def test_a_key_that_cannot_be_destroyed_does_not_stop_the_rotations_that_are_due(vault, replica):
    """Tidying comes last: the keys change, and what is over is no longer published."""
    replica.tap = refusing("destroy")
    for _ in range(4):
        vault.clock.pass_time(TIMING.rotate_every)
        before = vault.keyring
        with suppress(KeyStoreUnavailableError):
            replica.tick()
        assert before.standby.kid == vault.keyring.active.kid
    assert 3 >= len(vault.keyring.published)
    replica.tap = refusing()
    replica.tick()
    assert set() == vault.orphans


def test_a_revocation_is_in_force_although_no_private_key_can_be_had(vault, replica):
    """A replica that cannot load the next standby serves the newest keyring all the same: the revoked key is out."""
    other = Replica(vault)
    other.tick()
    victim = vault.keyring.active.kid
    vault.ask(RequestKind.REVOKE, victim, breakglass=True)
    replica.tick()
    other.tap = refusing("signer")
    with pytest.raises(KeyStoreUnavailableError):
        other.tick()
    assert vault.keyring == other.holder.view.keyring
    assert victim not in KeySet.parse(other.holder.view.jwks).keys
    assert vault.keyring.active.kid == other.signs_with()
    # The rounds go on failing until it has all keys, and are right in everything else.
    vault.clock.pass_time(TIMING.island)
    with pytest.raises(KeyStoreUnavailableError):
        other.tick()
    assert vault.keyring.active.kid == other.signs_with()
    other.tap = refusing()
    other.tick()
    assert vault.keyring.standby.kid in other.driver._signers


def test_a_replica_that_cannot_load_the_signer_serves_keys_and_does_not_sign(vault, replica):
    """It knows that a later key signs, so it does not go on with an older one; it signs when it has that key."""
    other = Replica(vault, tap=refusing("signer"))
    with pytest.raises(KeyStoreUnavailableError):
        other.tick()
    assert replica.holder.view.jwks == other.holder.view.jwks
    with pytest.raises(NoSigningKeyError):
        other.signs_with()
    other.tap = refusing()
    other.tick()
    assert replica.signs_with() == other.signs_with()


def test_a_key_that_lost_its_race_is_destroyed_later_if_that_fails_at_first(vault, replica):
    """It is remembered until it is gone, and holds nothing up until then."""
    other = Replica(vault)
    other.tick()
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    meddler = Meddler(1, other)

    def meddled(name: str, call: Callable[[], object]) -> object:
        return refusing("destroy")(name, lambda: meddler(name, call))

    replica.tap = meddled
    with pytest.raises(KeyStoreUnavailableError):
        replica.tick()
    assert (True, 1) == (meddler.meddled, len(vault.orphans))
    assert [ACTIVE, STANDBY] == sorted(state for state in vault.states if state is not REVOKED)
    replica.tap = refusing()
    replica.tick()
    assert (set(), set()) == (vault.orphans, vault.bereft)


# -- keys that are lost (K04, K14) -------------------------------------------------------------------------------------


def test_k04_a_pending_key_that_is_lost_is_given_up(vault):
    """It was never published; another is made in its place."""

    def losing(name: str, call: Callable[[], object]) -> object:
        answer = call()
        if name == "create" and len(vault.store.versions) == 1:
            vault.store.keys.clear()
        return answer

    replica = Replica(vault, tap=losing)
    replica.tick()
    assert [REVOKED, ACTIVE, STANDBY] == vault.states
    assert [vault.keyring.keys[0].kid] == replica.heard.lost
    assert vault.keyring.keys[0].published_at is None
    assert set() == vault.bereft


@pytest.mark.parametrize("fresh", [False, True], ids=["running", "started anew"])
def test_k04_a_standby_key_that_is_lost_never_signs(vault, replica, fresh):
    """A replica that starts finds out at once, one that runs at the activation; the signer signs on meanwhile."""
    signer, standby = vault.keyring.active.kid, vault.keyring.standby.kid
    del vault.store.keys[standby]
    if fresh:
        replica = Replica(vault)
    vault.clock.pass_time(LATER)
    vault.ask()
    replica.tick()
    assert (REVOKED, signer, signer) == (
        vault.keyring.get(standby).state,
        vault.keyring.active.kid,
        replica.signs_with(),
    )
    assert [standby] == replica.heard.lost
    assert (set(), STANDBY) == (vault.bereft, vault.states[-1])
    vault.clock.pass_time(WINDOW)
    replica.tick()
    assert [] == vault.unanswered
    assert vault.keyring.active.kid not in {signer, standby}


def test_k04_a_lost_active_key_is_replaced_as_soon_as_every_verifier_has_the_next(vault, replica):
    """A replica that starts without it does not sign, says so once, and does not wait for the rotation by age."""
    lost, standby = vault.keyring.active.kid, vault.keyring.standby.kid
    del vault.store.keys[lost]
    fresh = Replica(vault)
    for _ in range(3):
        fresh.tick()
    assert [lost] == fresh.heard.lost
    with pytest.raises(NoSigningKeyError):
        fresh.signs_with()
    vault.clock.pass_time(WINDOW)
    fresh.tick()
    assert (standby, RETIRED) == (fresh.signs_with(), vault.keyring.get(lost).state)
    assert lost in KeySet.parse(fresh.holder.view.jwks).keys


def test_k04_a_lost_active_key_that_comes_back_signs_again(vault, replica):
    """An operator may undelete what was deleted by mistake."""
    lost = vault.keyring.active.kid
    private_key = vault.store.keys.pop(lost)
    fresh = Replica(vault)
    fresh.tick()
    vault.store.keys[lost] = private_key
    fresh.tick()
    assert lost == fresh.signs_with()


def test_k04_a_running_replica_signs_on_with_the_key_in_its_memory(replica):
    """With KV the loaded key goes on; with Transit no signature can be had, and callers live on their tokens."""
    vault = replica.vault
    signer = replica.holder.view.signer
    vault.store.keys.clear()
    replica.tick()
    assert vault.keyring.active.kid == replica.signs_with()
    if vault.store_name == "kv":
        assert 64 == len(signer.sign(b"a.b"))
    else:
        with pytest.raises(KeyStoreUnavailableError):
            signer.sign(b"a.b")


def test_k04_all_private_keys_lost_heals_by_itself(vault, replica):
    """Revoked, made anew, published, and active when the window is over; what is left is a keyring like any other."""
    vault.store.keys.clear()
    fresh = Replica(vault)
    for _ in range(4):
        vault.clock.pass_time(WINDOW)
        fresh.tick()
    assert vault.keyring.active.kid == fresh.signs_with()
    assert STANDBY in vault.states
    assert vault.bereft <= {key.kid for key in vault.keyring.in_state(RETIRED)}
    vault.clock.pass_time(TIMING.keep_retired)
    fresh.tick()
    assert (set(), set()) == (vault.orphans, vault.bereft)


# -- documents that are not to be believed (K04, K07) ------------------------------------------------------------------


def unchanged_by(vault: Vault, replica: Replica, error: type[Exception], match: str) -> None:
    """Hold a round to raise `error`, write nothing, and leave the keyring in force as it is.

    Nothing confirms it while the shared store is away too; the store does when it is there.
    """
    view, written, keys = replica.holder.view, list(vault.document.written), dict(vault.store.keys)
    mirrored = vault.shared.mirror.load().content
    replica.tap = refusing("store.load")
    vault.clock.pass_time(SECOND)
    with pytest.raises(error, match=match):
        replica.tick()
    assert view is replica.holder.view
    replica.tap = refusing()
    with pytest.raises(error, match=match):
        replica.tick()
    confirmed = replace(view, confirmed_at=vault.clock.now(), confirmed_mono=vault.clock.mono())
    assert confirmed == replica.holder.view
    assert (written, keys, mirrored) == (vault.document.written, vault.store.keys, vault.shared.mirror.load().content)


def test_k07_a_restored_older_document_is_refused(vault, replica):
    """The rotation that the backup has forgotten is not undone, and nothing is written on top of the old."""
    old = list(vault.document.written)
    rotated(vault, replica)
    vault.document.written[:] = [*old, *old[-1:] * 9]
    unchanged_by(vault, replica, KeyringRegressionError, "older backup")
    assert old_active(old) != replica.signs_with()


def old_active(written: list[str]) -> str:
    """Return the kid of the signer in the last of `written`."""
    return next(k["jwk"]["kid"] for k in json.loads(written[-1])["keys"] if k["state"] == "ACTIVE")


def test_k07_a_document_that_forgets_a_revocation_is_refused(vault, replica):
    """Whatever its generation: a revoked key does not come back."""
    victim = vault.keyring.standby.kid
    before = json.loads(vault.document.written[-1])
    vault.ask(RequestKind.REVOKE, victim, breakglass=True)
    replica.tick()
    vault.document.written.append(json.dumps(before | {"generation": 1000}))
    unchanged_by(vault, replica, KeyringRegressionError, "no longer says")


def test_k04_another_document_of_the_same_generation_is_refused(vault, replica):
    """Two histories of one number mean that somebody wrote past the check."""
    content = json.loads(vault.document.written[-1])
    content["keys"].pop()
    vault.document.written.append(json.dumps(content))
    unchanged_by(vault, replica, KeyringRegressionError, "same generation")


def test_k04_a_document_that_is_gone_is_refused(vault, replica):
    """Wiped, it is not taken for the empty place of a first start."""
    vault.document.written.clear()
    unchanged_by(vault, replica, KeyringRegressionError, "generation 0")


@pytest.mark.parametrize(
    "change", [{"form": 2}, {"keys": "none"}, {"generation": 0}, {"surprise": 1}, {"issuer": "https://other.example"}]
)
def test_k04_a_document_that_breaks_a_rule_is_refused(vault, replica, change):
    """The view in force stays, and nothing is repaired by writing over it."""
    vault.document.written.append(json.dumps(json.loads(vault.document.written[-1]) | change))
    unchanged_by(vault, replica, InvalidKeyringError, "the keyring document")


def test_k04_a_document_of_another_issuer_or_store_is_not_taken_up(vault, replica):
    """A broker that is set up for another environment or key store starts with nothing, and changes nothing."""
    written = list(vault.document.written)
    for stranger in (
        Replica(vault, issuer="https://tokens.staging.example"),
        Replica(vault, store_name="kv" if vault.store_name == "transit" else "transit"),
    ):
        with pytest.raises(InvalidKeyringError):
            stranger.tick()
        assert stranger.holder.view is None
    assert written == vault.document.written
