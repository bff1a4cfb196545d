"""The rotation driver and the shared store: who is waited for, and what goes on without the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from carnet_broker.core.keyring import Hold, KeyState
from carnet_broker.core.requests import RequestKind
from carnet_broker.core.rollout import Permit, RolloutState
from carnet_broker.ports import KeyStoreUnavailableError, StoreUnavailableError
from support.keyrings import SECOND, TIMING
from support.rotation import ManualClock, Replica, Vault, go_wrong
from support.shared_store import LEASE, MAX_STALENESS

ACTIVE, STANDBY, RETIRED, REVOKED = KeyState.ACTIVE, KeyState.STANDBY, KeyState.RETIRED, KeyState.REVOKED
WINDOW = TIMING.poller_window
DEADLINE = TIMING.acknowledge_within
FREE = TIMING.min_interval
"""After it CI may rotate again, and the window of the standby is long over."""


@pytest.fixture
def vault() -> Vault:
    """An empty Vault, and an empty store."""
    return Vault(ManualClock())


@pytest.fixture
def replica(vault: Vault) -> Replica:
    """A replica that has made its first round."""
    replica = Replica(vault)
    replica.tick()
    return replica


def refusing(*names: str) -> Callable[[str, Callable[[], Any]], Any]:
    """Return a tap at which the calls of these names fail; ``store.`` stands for all calls to the store."""

    def tap(name: str, call: Callable[[], object]) -> object:
        if name in names or ("store." in names and name.startswith("store.")):
            go_wrong(name, call, "refused")
        return call()

    return tap


WITHOUT_STORE = refusing("store.")
STRAIGHT = refusing()


def asked(vault: Vault, replica: Replica) -> str:
    """Ask for a rotation when one may be had, do a round, and return the id of the request."""
    vault.clock.pass_time(FREE)
    replica.replicas()  # As the thread that renews the lease has done all the time.
    request = vault.ask()
    replica.tick()
    return request


def detail(vault: Vault, request: str) -> dict[str, Any]:
    """Return the figures of the answer to a request."""
    result = vault.requests.result(request)
    assert result is not None
    return result.detail


# -- verifiers ---------------------------------------------------------------------------------------------------------


def test_a_rotation_waits_for_each_live_verifier_and_for_no_longer(vault, replica):
    """The second acknowledgement makes it; until then the answer names who is missing, and until when."""
    for name in ("pod-1", "pod-2"):
        assert vault.shared.join(name, replica.replica_id, replica.generation)
    standby = vault.keyring.standby.kid
    vault.ask(RequestKind.REVOKE, standby, breakglass=True)
    replica.tick()
    request = asked(vault, replica)
    since = vault.clock.now()
    assert "WAITING_FOR_VERIFIERS" == vault.reason(request)
    assert (since + DEADLINE).isoformat() == detail(vault, request)["deadline"]
    assert (
        ["spiffe://prod.example/ns/shop/sa/payments pod-1", "spiffe://prod.example/ns/shop/sa/payments pod-2"],
        2,
    ) == (
        detail(vault, request)["waiting_for"],
        detail(vault, request)["missing"],
    )
    vault.shared.acknowledge("pod-1", replica.replica_id, replica.generation)
    assert since + DEADLINE == replica.tick()
    assert ["spiffe://prod.example/ns/shop/sa/payments pod-2"] == detail(vault, request)["waiting_for"]
    assert (Hold.VERIFIERS, ["pod-2"]) == (replica.heard.waiting[-1][0].hold, replica.heard.waiting[-1][1])
    vault.shared.acknowledge("pod-2", replica.replica_id, replica.generation)
    replica.tick()
    assert "ROTATED" == vault.reason(request)
    assert [(False, [])] == [(permit.overdue, left) for permit, left in replica.heard.permits]


def lagging(vault: Vault, replica: Replica) -> str:
    """Let a verifier join and not load the standby that comes then; ask for a rotation, and return its id."""
    vault.shared.join("pod", replica.replica_id, replica.generation)
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    replica.tick()
    return asked(vault, replica)


@pytest.mark.parametrize(("offset", "answer"), [(-1, "WAITING_FOR_VERIFIERS"), (0, "ROTATED")])
def test_at_the_deadline_the_rotation_goes_on_and_names_who_is_left_behind(vault, replica, offset, answer):
    """To the second; the permit says that it is overdue."""
    request = lagging(vault, replica)
    vault.clock.pass_time(DEADLINE + offset * SECOND)
    replica.tick()
    assert answer == vault.reason(request)
    expected = [(True, ["pod"])] if answer == "ROTATED" else []
    assert expected == [(permit.overdue, left) for permit, left in replica.heard.permits]
    assert ([] if answer == "ROTATED" else ["pod"]) == replica.heard.waiting[-1][1]


def test_one_that_lags_holds_up_no_later_rotation_until_it_acknowledges_again(vault, replica):
    """It was named once; from the moment that it has the newest key it counts again."""
    lagging(vault, replica)
    vault.clock.pass_time(DEADLINE)
    replica.tick()
    second = asked(vault, replica)
    assert ("ROTATED", [[("pod")], []]) == (vault.reason(second), [left for _, left in replica.heard.permits])
    vault.shared.acknowledge("pod", replica.replica_id, replica.generation)
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    replica.tick()
    assert "WAITING_FOR_VERIFIERS" == vault.reason(asked(vault, replica))


@pytest.mark.parametrize("fate", ["leaves", "polls", "its broker died"])
def test_who_can_miss_nothing_is_not_waited_for(vault, replica, fate):
    """One that is gone, one that polls, and one that by its own rule refuses all tokens by now."""
    other = Replica(vault)
    other.tick()
    vault.shared.join("pod", other.replica_id, replica.generation, polls=fate == "polls")
    other.replicas()
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    replica.tick()
    if fate == "leaves":
        vault.shared.part("pod", other.replica_id)
    if fate == "its broker died":
        assert LEASE + MAX_STALENESS < FREE
    else:
        vault.clock.pass_time(SECOND)
        other.tick()
    assert "ROTATED" == vault.reason(asked(vault, replica))


def test_a_verifier_of_a_broker_that_died_is_waited_for_while_it_may_accept_tokens(vault, replica):
    """Until its lease and then the verifier's own patience are over; a second later it is not."""
    other = Replica(vault)
    other.tick()
    other.replicas()
    vault.shared.join("pod", other.replica_id, replica.generation)
    vault.clock.pass_time(FREE - LEASE - MAX_STALENESS + SECOND)
    other.replicas()
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    replica.tick()
    other.tick()
    vault.clock.pass_time(LEASE + MAX_STALENESS - SECOND)
    request = vault.ask()
    replica.tick()
    assert "WAITING_FOR_VERIFIERS" == vault.reason(request)
    vault.clock.pass_time(SECOND)
    replica.tick()
    assert "ROTATED" == vault.reason(request)


# -- replicas and pollers ----------------------------------------------------------------------------------------------


def test_the_window_for_pollers_begins_when_the_last_live_replica_serves_the_standby(vault, replica):
    """While one does not, the rotation is held up, and the answer says so; a dead one is not waited for."""
    vault.clock.pass_time(FREE)
    late, dead = Replica(vault), Replica(vault)
    late.tick()
    dead.tick()
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    for _ in range(4):
        late.replicas()  # It lives, and has not loaded what the other has written.
        request = vault.ask()
        replica.tick()
        assert "WAITING_FOR_REPLICAS" == vault.reason(request)
        vault.clock.pass_time(LEASE - SECOND)
    late.tick()
    since = vault.clock.now()
    late.replicas()
    replica.tick()
    assert ("WAITING_FOR_POLLERS", (since + WINDOW).isoformat()) == (
        vault.reason(request),
        detail(vault, request)["not_before"],
    )
    vault.clock.pass_time(WINDOW - SECOND)
    late.replicas()
    replica.tick()
    assert "WAITING_FOR_POLLERS" == vault.reason(request)
    vault.clock.pass_time(SECOND)
    late.replicas()
    replica.tick()
    assert "ROTATED" == vault.reason(request)


def test_a_change_of_another_key_does_not_begin_the_window_anew(vault, replica):
    """Leases tell since when a replica serves its newest generation; what counts is when it first served the key."""
    vault.clock.pass_time(FREE)
    vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    replica.tick()
    vault.clock.pass_time(TIMING.keep_retired - WINDOW / 2)
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    replica.tick()
    since, generation = vault.clock.now(), vault.keyring.generation
    vault.clock.pass_time(WINDOW / 2)
    replica.tick()
    assert generation < vault.keyring.generation  # The retired key was removed and destroyed.
    vault.clock.pass_time(WINDOW / 2)
    request = vault.ask()
    replica.tick()
    assert ("ROTATED", since + WINDOW) == (vault.reason(request), vault.keyring.active.activated_at)


@pytest.mark.parametrize("known", ["nothing", "too old"])
def test_what_is_not_known_of_the_other_replicas_holds_up_the_rotation(vault, replica, known):
    """Before the first lease, and when the thread that renews it is stuck: breakglass is not held up."""
    seen = replica.replicas()
    replica.driver._shared._replicas = lambda: None if known == "nothing" else seen
    vault.clock.pass_time(FREE)
    request = vault.ask()
    replica.tick()
    assert "WAITING_FOR_REPLICAS" == vault.reason(request)
    now = vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    replica.tick()
    assert ("ROTATED", "ROTATED") == (vault.reason(request), vault.reason(now))


# -- the order of things -----------------------------------------------------------------------------------------------


def calls_of(replica: Replica, *names: str) -> list[str]:
    """Do a round, and return which of the calls `names` it made, in order."""
    calls = []

    def tap(name: str, call: Callable[[], object]) -> object:
        if name in names:
            calls.append(name)
        return call()

    replica.tap = tap
    replica.tick()
    return calls


def test_the_rollout_is_raised_before_the_publication_and_the_mirror_is_up_to_date_before_that(vault):
    """So whoever is not counted has the key, and whoever sees a later rollout knows that the mirror may be old."""
    assert [
        *("replace", "store.save"),  # made
        *("store.raise_to", "replace", "store.save"),  # published
        *("replace", "store.save"),  # ACTIVE: nothing signs yet
        *("replace", "store.save"),
        *("store.raise_to", "replace", "store.save"),
    ] == calls_of(Replica(vault), "store.raise_to", "store.save", "store.permit", "replace")
    assert (5, vault.keyring.standby.kid) == (vault.shared.row.generation, vault.shared.row.kid)
    assert 5 == vault.shared.mirrored


def test_a_mirror_that_is_behind_is_brought_up_before_the_next_publication(vault, replica):
    """Although the save after the last write failed: else a replica without Vault could not tell what it misses."""
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    failing = iter([True])

    def once(name: str, call: Callable[[], object]) -> object:
        if name == "store.save" and next(failing, False):
            go_wrong(name, call, "refused")
        return call()

    replica.tap = once
    with pytest.raises(StoreUnavailableError):
        replica.tick()
    assert STANDBY not in vault.states  # Not in the round in which the store has failed.
    calls = calls_of(replica, "store.raise_to", "store.save", "replace")
    assert ["store.save", "replace", "store.save", "store.raise_to"] == calls[:4]
    assert [ACTIVE, REVOKED, STANDBY] == vault.states


def test_a_permit_that_was_given_is_used_by_whoever_comes_next(vault, replica):
    """Its receiver died before it wrote: no second count, no second wait."""
    vault.clock.pass_time(FREE)
    request = vault.ask()
    replica.tap = refusing("replace")
    with pytest.raises(KeyStoreUnavailableError):
        replica.tick()
    assert vault.shared.row.permit is not None
    other = Replica(vault)
    other.tick()
    assert ("ROTATED", []) == (vault.reason(request), other.heard.permits)


@pytest.mark.parametrize("row", ["of an older key", "none at all"])
def test_a_standby_that_the_store_does_not_know_is_made_known_and_counts_from_then(vault, replica, row):
    """The store is younger than the keyring, or was restored: it catches up with no restart."""
    if row == "none at all":
        vault.shared.row = RolloutState(generation=0, kid="", raised_at=None, permit=None)
    else:
        vault.shared.row = replace(vault.shared.row, generation=3, kid=vault.keyring.active.kid)
    assert vault.shared.join("pod", replica.replica_id, 4)
    vault.clock.pass_time(SECOND)
    replica.tick()
    expected = (vault.keyring.generation, vault.keyring.standby.kid, vault.clock.now())
    raised = vault.shared.row
    assert expected == (raised.generation, raised.kid, raised.raised_at)
    assert not vault.shared.join("late", replica.replica_id, 4)
    request = asked(vault, replica)
    assert ("WAITING_FOR_VERIFIERS", 1) == (vault.reason(request), detail(vault, request)["missing"])


def test_a_permit_that_the_store_does_not_give_is_not_asked_for_without_end(vault, replica):
    """It has given it to another key meanwhile: the round waits, and the next one reads anew."""
    vault.clock.pass_time(FREE + DEADLINE)
    request = vault.ask()
    row = vault.shared.row
    other = Permit(generation=row.generation, kid="another", given_at=vault.clock.now(), overdue=False)
    asked_for = []

    def moved_on(name: str, call: Callable[[], object]) -> object:
        if name == "store.permit":
            asked_for.append(name)
            vault.shared.row = replace(row, kid=other.kid, permit=other)
            try:
                return call()
            finally:
                vault.shared.row = row
        return call()

    replica.tap = moved_on
    replica.tick()
    assert (["store.permit"], "WAITING_FOR_VERIFIERS", 0) == (
        asked_for,
        vault.reason(request),
        detail(vault, request)["missing"],
    )
    replica.tap = STRAIGHT
    replica.tick()
    assert "ROTATED" == vault.reason(request)


# -- without the store -------------------------------------------------------------------------------------------------


def failing_tick(replica: Replica) -> None:
    """Do a round that reports that the store is away."""
    with pytest.raises(StoreUnavailableError):
        replica.tick()


def test_without_the_store_no_key_is_made_published_or_rotated(vault):
    """From nothing, and with a rotation that is due; each in the first round after the store is there."""
    replica = Replica(vault, tap=WITHOUT_STORE)
    failing_tick(replica)
    assert [] == vault.states
    replica.tap = STRAIGHT
    replica.tick()
    assert [ACTIVE, STANDBY] == vault.states
    vault.clock.pass_time(FREE)
    request = vault.ask()
    replica.tap = WITHOUT_STORE
    failing_tick(replica)
    assert ("WAITING_FOR_STORE", [ACTIVE, STANDBY]) == (vault.reason(request), vault.states)
    replica.tap = STRAIGHT
    replica.tick()
    assert ("ROTATED", [RETIRED, ACTIVE, STANDBY]) == (vault.reason(request), vault.states)


@pytest.mark.parametrize("call", ["store.load", "store.state", "store.permit", "store.raise_to", "store.save"])
def test_each_call_that_fails_is_reported_and_costs_one_timeout_a_round(vault, replica, call):
    """After it the store is asked nothing more in the round; it heals with no restart."""
    vault.clock.pass_time(FREE)
    request = vault.ask()
    made = []

    def tap(name: str, do: Callable[[], object]) -> object:
        if name.startswith("store."):
            made.append(name)
        if name == call:
            go_wrong(name, do, "refused")
        return do()

    replica.tap = tap
    failing_tick(replica)
    assert call == made[-1]
    replica.tap = STRAIGHT
    replica.tick()
    assert ("ROTATED", [RETIRED, ACTIVE, STANDBY]) == (vault.reason(request), vault.states)
    assert vault.keyring.generation == vault.shared.mirrored


def test_k12_without_the_store_a_revoked_signer_gives_way_to_the_standby_at_once(vault, replica):
    """Its private key is destroyed; the next standby is made as soon as the store is there."""
    victim, standby = vault.keyring.active.kid, vault.keyring.standby.kid
    request = vault.ask(RequestKind.REVOKE, victim, breakglass=True)
    replica.tap = WITHOUT_STORE
    failing_tick(replica)
    assert ("REVOKED", standby, standby) == (vault.reason(request), vault.keyring.active.kid, replica.signs_with())
    assert ([REVOKED, ACTIVE], False) == (vault.states, victim in vault.store.keys)
    again = vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    failing_tick(replica)
    assert ("WAITING_FOR_STORE", standby) == (vault.reason(again), vault.keyring.active.kid)
    replica.tap = STRAIGHT
    replica.tick()
    assert ("ROTATED", STANDBY) == (vault.reason(again), vault.states[-1])


def test_without_the_store_breakglass_rotates_and_what_is_over_is_removed(vault, replica):
    """What takes trust away does not wait for those who give it."""
    old = vault.keyring.active.kid
    replica.tap = WITHOUT_STORE
    request = vault.ask(RequestKind.ROTATE_NOW, breakglass=True)
    failing_tick(replica)
    assert ("ROTATED", [RETIRED, ACTIVE]) == (vault.reason(request), vault.states)
    vault.clock.pass_time(TIMING.keep_retired)
    failing_tick(replica)
    assert ([ACTIVE], False) == (vault.states, old in vault.store.keys)


def test_a_vault_that_fails_beside_the_store_is_what_is_reported(vault, replica):
    """It is the one that holds up more."""
    vault.ask(RequestKind.REVOKE, vault.keyring.standby.kid, breakglass=True)
    replica.tap = refusing("store.", "pending")
    with pytest.raises(KeyStoreUnavailableError):
        replica.tick()


def test_the_progress_of_the_last_round_can_be_read(vault):
    """What it waits for, for whom, and how far the standby is: for the status that admins see."""
    replica = Replica(vault)
    assert (None, None) == (replica.driver.progress, replica.driver.keyring)
    replica.tick()
    request = lagging(vault, replica)
    progress = replica.driver.progress
    assert (vault.keyring, Hold.VERIFIERS) == (progress.keyring, progress.wait.hold)
    assert ["pod"] == [session.instance_id for session in progress.laggards]
    assert not progress.gate.permitted
    assert vault.keyring == replica.driver.keyring
    assert "WAITING_FOR_VERIFIERS" == vault.reason(request)
    assert timedelta(0) < progress.wait.until - vault.clock.now() <= DEADLINE
