"""Several rotation drivers over one Vault and one store, interleaved call by call, with outages, deaths and lost keys;
and the verifiers that they wait for.

Hypothesis takes the part of the scheduler and of bad luck. Each driver does its rounds in a thread that stops before
every call to Vault or to the store, so that any other may do anything in between; a call may be refused, take effect
without an answer, or be the last thing that its process does. A replica can lose Vault, or the store, for a while.

One case is left out, because the rules leave it open: breakglass changes the signer (which needs no permit) while
nobody who knows of it can tell the store. Until somebody can, a replica that reaches the store and not Vault goes on
with the signer that it knows. What it signs then is not held against anybody.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from carnet_broker.core.keyring import TRANSITIONS, Keyring, KeyState
from carnet_broker.core.requests import RequestKind
from carnet_broker.core.rollout import laggards
from carnet_broker.ports import KeyStoreUnavailableError, ReplicasSeen, StoreUnavailableError
from carnet_broker.signing import NoSigningKeyError
from support.counts import count
from support.keyrings import SECOND, TIMING
from support.rotation import FAULTS, KilledError, ManualClock, Replica, Vault, go_wrong
from support.shared_store import LEASE, MAX_STALENESS

WINDOW = TIMING.poller_window
CALL_LASTS = 2 * SECOND
"""No call to Vault lasts longer: its timeout."""
FAULT = st.sampled_from([None, None, None, *FAULTS])
NUMBER = st.integers(0, 2)
VERIFIER = st.integers(0, 3)


class Round:
    """One round of one replica, which stops before each of its calls."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.waits_before: str | None = None
        """The call that comes next; None when the round is over."""
        self.waited = timedelta(0)
        self.killed = False
        self._fault: str | None = None
        self._unexpected: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        replica.tap = self._tap
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._stop()

    def go_on(self, fault: str | None = None) -> None:
        """Let the call happen, or what `fault` says, and run up to the next."""
        self._fault, self.waited = fault, timedelta(0)
        self._go.release()
        self._stop()

    def _stop(self) -> None:
        assert self._stopped.acquire(timeout=10)
        if self._unexpected is not None:
            raise self._unexpected

    def _tap(self, name: str, call: Callable[[], object]) -> object:
        self.waits_before = name
        self._stopped.release()
        self._go.acquire()
        fault = self._fault
        if self.replica.is_cut_off_from(name):
            fault = {"killed after": "killed before", "killed before": "killed before"}.get(fault, "refused")
        return call() if fault is None else go_wrong(name, call, fault)

    def _run(self) -> None:
        try:
            self.replica.tick()
        except (KeyStoreUnavailableError, StoreUnavailableError):
            pass
        except KilledError:
            self.killed = True
        except BaseException as error:  # noqa: BLE001 - raised again in the thread of the test
            self._unexpected = error
        finally:
            self.waits_before = None
            self._stopped.release()


class Process(Replica):
    """A replica that can lose Vault or the store, and whose lease a thread of its own renews."""

    def __init__(self, vault: Vault) -> None:
        super().__init__(vault)
        self.without: str | None = None
        """What it cannot reach: ``vault`` or ``store``."""
        self.spoke_at = vault.clock.now()
        """When it last spoke to the store."""
        self.renew()

    def is_cut_off_from(self, call: str) -> bool:
        """Say whether `call` gets nowhere."""
        return self.without == ("store" if call.startswith("store.") else "vault")

    def replicas(self) -> ReplicasSeen:
        """Return what the last renewal brought."""
        return self.seen

    def renew(self) -> None:
        """Renew the lease, as the thread that speaks to the store does."""
        if self.without != "store":
            self.spoke_at = self.vault.clock.now()
            self.seen = self.vault.shared.renew(self.replica_id, self.generation)

    @property
    def age(self) -> timedelta:
        """How old what it tells its verifiers is."""
        clock = self.vault.clock
        return max(self.holder.view.age(clock.now(), clock.mono()), clock.now() - self.spoke_at)


@dataclass
class Watcher:
    """A verifier that watches one replica, and loads what it is sent when Hypothesis says so."""

    name: str
    replica: Process
    loaded: Keyring

    @property
    def accepts(self) -> bool:
        """Whether it does not refuse all tokens, because what it knows is too old."""
        return self.replica.age <= MAX_STALENESS


class RotationWorld(RuleBasedStateMachine):
    """Three replicas, one Vault, and whoever asks for rotations."""

    @initialize(versioned=st.booleans())
    def empty(self, versioned: bool) -> None:
        """Begin with an empty Vault."""
        self.clock = ManualClock()
        self.vault = Vault(self.clock, versioned=versioned)
        self.replicas = [Process(self.vault) for _ in range(3)]
        self.watchers: dict[int, Watcher] = {}
        self.joined = 0
        self.permitted: set[str] = set()
        self.lacked: dict[str, datetime] = {}
        """For a key, when a live replica last served a set without it."""
        self.replaced_by_breakglass: set[str] = set()
        self.untold: dict[str, datetime] = {}
        """For a key of these, when the mirror last had it for the signer."""
        self.rounds: dict[int, Round] = {}
        self.checked = 0
        self.asked_now: set[str] = set()
        self.lost: set[str] = set()
        self.may_be_orphans: set[str] = set()
        self.tokens: list[tuple[str, object]] = []

    # -- rounds, call by call --------------------------------------------------------------------------------------

    @rule(number=NUMBER)
    def begin(self, number: int) -> None:
        """A replica begins a round, and stops before its first call."""
        if number not in self.rounds:
            self.rounds[number] = Round(self.replicas[number])

    @rule(number=NUMBER, faults=st.lists(FAULT, min_size=1, max_size=6))
    def go_on(self, number: int, faults: list[str | None]) -> None:
        """A replica makes its next calls."""
        for fault in faults:
            if number in self.rounds:
                self.call(number, fault)

    @rule(number=NUMBER)
    def whole_round(self, number: int) -> None:
        """A replica does a round, or what is left of it, with nobody in between."""
        self.begin(number)
        while number in self.rounds:
            self.call(number, None)

    @rule(number=NUMBER, times=st.integers(0, 20), fault=st.sampled_from(list(FAULTS)))
    def round_that_breaks(self, number: int, times: int, fault: str) -> None:
        """A replica does a round in which one call goes wrong."""
        self.begin(number)
        for turn in itertools.count():
            if number not in self.rounds:
                return
            self.call(number, fault if turn == times else None)

    def call(self, number: int, fault: str | None) -> None:
        """Let one call of a replica happen, and see what became of the replica."""
        going = self.rounds[number]
        known, what = set(self.vault.store.versions), going.waits_before
        going.go_on(fault)
        if what == "create" and fault is not None:
            self.may_be_orphans |= set(self.vault.store.versions) - known  # Made, and nobody heard of it.
        if going.waits_before is None:
            del self.rounds[number]
            going.replica.tap = lambda _, call: call()
        if going.killed:
            self.may_be_orphans |= {key.jwk.kid for key in going.replica.driver._unplaced}
            self.replicas[number] = Process(self.vault)
        self.check_documents()
        self.look_at_the_permit()
        self.look_at_the_mirror()

    # -- the rest of the world -------------------------------------------------------------------------------------

    @rule(duration=st.sampled_from([1, 2]))
    def a_moment_passes(self, duration: int) -> None:
        """Time passes while calls are under way; one that has lasted too long ends without an answer."""
        self.pass_time(duration * SECOND)

    @rule(
        duration=st.sampled_from(
            [WINDOW, TIMING.island, TIMING.min_interval, TIMING.keep_retired, timedelta(minutes=9)]
        )
    )
    def time_passes(self, duration: timedelta) -> None:
        """A longer time passes; what was under way has timed out before."""
        self.pass_time(duration)

    def pass_time(self, duration: timedelta) -> None:
        """Move the clock; a call that would last longer than it can times out, and so do the round's others."""
        for number in list(self.rounds):
            while number in self.rounds and self.rounds[number].waited + duration > CALL_LASTS:
                self.call(number, "answer lost")
            if number in self.rounds:
                self.rounds[number].waited += duration
        self.clock.pass_time(duration)
        for _ in range(2):  # So that each has heard of all others.
            for replica in self.replicas:
                replica.renew()
        self.look_at_the_mirror()
        standby = self.vault.keyring.standby
        if standby is None:
            return
        for replica in self.replicas:
            view = replica.holder.view
            if view is not None and view.keyring.get(standby.kid) not in view.keyring.published:
                until = min(self.clock.now(), replica.spoke_at + LEASE)
                self.lacked[standby.kid] = max(until, self.lacked.get(standby.kid, until))

    # -- verifiers -------------------------------------------------------------------------------------------------

    @rule(verifier=VERIFIER, number=NUMBER)
    def a_verifier_joins(self, verifier: int, number: int) -> None:
        """One comes, or goes to another replica; it may be told to load more first, and then is not counted there."""
        replica = self.replicas[number]
        if replica.holder.view is None or replica.without == "store":
            return
        known = self.watchers.get(verifier)
        loaded = replica.holder.view.keyring
        if known is not None and known.loaded.generation > loaded.generation:
            loaded = known.loaded
        self.joined += known is None
        name = known.name if known is not None else f"pod-{self.joined}"
        if self.vault.shared.join(name, replica.replica_id, loaded.generation):
            self.watchers[verifier] = Watcher(name, replica, loaded)

    @rule(verifier=VERIFIER)
    def a_verifier_loads(self, verifier: int) -> None:
        """It has what its replica serves, and says so, which the store may not hear."""
        watcher = self.watchers.get(verifier)
        if watcher is None or watcher.replica not in self.replicas:
            return
        keyring = watcher.replica.holder.view.keyring
        if watcher.loaded.generation < keyring.generation:
            watcher.loaded = keyring
        if watcher.replica.without != "store":
            self.vault.shared.acknowledge(watcher.name, watcher.replica.replica_id, watcher.loaded.generation)

    @rule(verifier=VERIFIER)
    def a_verifier_leaves(self, verifier: int) -> None:
        """It ends, and says goodbye where somebody hears it."""
        watcher = self.watchers.pop(verifier, None)
        if watcher is not None and watcher.replica in self.replicas and watcher.replica.without != "store":
            self.vault.shared.part(watcher.name, watcher.replica.replica_id)

    @rule(number=NUMBER, what=st.sampled_from([None, None, "vault", "store"]))
    def a_replica_loses_something(self, number: int, what: str | None) -> None:
        """From now on it cannot reach Vault, or the store, or it can reach both again."""
        self.replicas[number].without = what

    def look_at_the_permit(self) -> None:
        """Hold a permit to the rules, in the moment in which it is there."""
        raised = self.vault.shared.row
        permit = raised.permit
        if permit is None or permit.kid in self.permitted:
            return
        self.permitted.add(permit.kid)
        live = self.vault.shared.live()
        assert [] == laggards(live, permit.generation)
        if permit.overdue:
            assert raised.raised_at + TIMING.acknowledge_within <= permit.given_at
        else:
            assert [] == [one for one in live if one.generation < permit.generation and not one.lagging]
        lag = {session.instance_id for session in live if session.lagging}
        for watcher in self.watchers.values():
            if watcher.accepts and watcher.name not in lag:
                assert watcher.loaded.get(permit.kid) in watcher.loaded.published
        if permit.kid in self.lacked:
            assert self.lacked[permit.kid] + TIMING.poller_window <= permit.given_at

    def look_at_the_mirror(self) -> None:
        """Note which keys the mirror has for the signer that breakglass has replaced: the case that is left out."""
        mirrored = self.vault.shared.mirrored
        signer = self.vault.history[mirrored - 1].active if mirrored else None
        if signer is not None and signer.kid in self.replaced_by_breakglass:
            self.untold[signer.kid] = self.clock.now()

    @rule(now=st.sampled_from([False, False, True]))
    def somebody_asks(self, now: bool) -> None:
        """CI asks for a rotation, or breakglass for one at once."""
        request = self.vault.ask(RequestKind.ROTATE_NOW if now else RequestKind.ROTATE, breakglass=now)
        if now:
            self.asked_now.add(request)

    @rule(victim=st.integers(0, 5))
    def somebody_revokes(self, victim: int) -> None:
        """Breakglass revokes one of the newest keys."""
        kids = [key.kid for key in self.vault.keyring.keys]
        if victim < len(kids):
            self.vault.ask(RequestKind.REVOKE, kids[-1 - victim], breakglass=True)

    @rule(luck=st.integers(0, 9), victim=st.integers(0, 2))
    def a_private_key_is_lost(self, luck: int, victim: int) -> None:
        """Now and then Vault loses a key."""
        kids = list(self.vault.store.keys)
        if luck == 0 and victim < len(kids):
            self.lost.add(kids[-1 - victim])
            del self.vault.store.keys[kids[-1 - victim]]

    @rule(number=NUMBER)
    def a_token_is_signed(self, number: int) -> None:
        """A replica signs with what it holds, however old, as long as it may."""
        try:
            kid = self.replicas[number].signs_with()
        except NoSigningKeyError:
            return
        untold = self.untold.get(kid)
        if untold is None or untold + TIMING.island < self.clock.now():
            self.tokens.append((kid, self.clock.now() + TIMING.longest_life))

    @precondition(lambda self: len(self.vault.document.written) > 0)
    @rule()
    def quiet(self) -> None:
        """Everything works again: whatever happened, it comes to a good end by itself."""
        for replica in self.replicas:
            replica.without = None
        self.rest()
        if self.vault.bereft:
            # Whoever holds a key in memory does not miss it in Vault. Who starts without it does.
            assert self.vault.bereft <= self.lost
            self.replicas = [Process(self.vault) for _ in range(3)]
            self.rest()
        keyring = self.vault.keyring
        assert (1, 1) == (len(keyring.in_state(KeyState.ACTIVE)), len(keyring.in_state(KeyState.STANDBY)))
        assert [] == self.vault.unanswered
        assert {keyring.active.kid} == {replica.signs_with() for replica in self.replicas}
        assert {keyring.generation} == {replica.holder.view.keyring.generation for replica in self.replicas}
        assert set() == self.vault.bereft
        assert self.vault.orphans <= self.may_be_orphans
        named = {key.kid for known in self.vault.history for key in known.keys}
        assert set() == self.vault.orphans & named

    def rest(self) -> None:
        """Let all replicas do their rounds until nothing is left to be done."""
        for _ in range(4):
            for number in range(3):
                self.whole_round(number)
            self.pass_time(TIMING.keep_retired)
            self.check_documents()
        for number in (0, 1, 2, 0):
            self.whole_round(number)

    def teardown(self) -> None:
        """End every story well."""
        if hasattr(self, "vault"):
            self.whole_round(0)
            self.quiet()

    # -- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def check_documents(self) -> None:
        """Each document follows from the one before by the rules, whoever wrote it."""
        history = self.vault.document.written
        if self.checked < len(history):
            keyrings = self.vault.history[max(self.checked - 1, 0) :]
            for before, after in itertools.pairwise(keyrings):
                self.check_step(before, after)
            self.checked = len(history)

    def check_step(self, before: Keyring, after: Keyring) -> None:
        """Hold one write to the rules."""
        assert before.generation + 1 == after.generation
        assert len(after.in_state(KeyState.ACTIVE)) <= 1
        assert len(after.in_state(KeyState.STANDBY)) <= 1
        for key in before.keys:
            now = after.get(key.kid)
            if now is None:
                assert key.state is KeyState.REMOVED
                assert key.kid not in self.vault.store.keys
            else:
                assert now.state is key.state or now.state in TRANSITIONS[key.state]
        old, new = before.active, after.active
        if old is None or old == new:
            return
        revoked = after.get(old.kid).state is KeyState.REVOKED
        if new is None:
            assert revoked
            assert before.standby is None
        elif revoked or self.asked_now & set(new.answers):
            self.replaced_by_breakglass.add(old.kid)
        else:
            assert new.kid in self.permitted
            assert new.published_at + WINDOW <= new.activated_at
            if old.kid not in self.lost:
                assert old.activated_at + min(TIMING.min_interval, TIMING.rotate_every) <= new.activated_at

    @invariant()
    def every_living_token_has_its_key_published(self) -> None:
        """No good token is refused for want of a key, whichever replica signed it, cut off or not."""
        if not self.tokens:
            return
        keyring, now = self.vault.keyring, self.clock.now()
        self.tokens = [(kid, end) for kid, end in self.tokens if end > now]
        good = {kid for kid, _ in self.tokens if (key := keyring.get(kid)) is None or key.state is not KeyState.REVOKED}
        assert good <= {key.kid for key in keyring.published}

    @invariant()
    def no_replica_goes_back(self) -> None:
        """What a replica has in force only ever grows newer."""
        for replica in self.replicas:
            assert replica.heard.generations == sorted(replica.heard.generations)


TestRotationWorld = RotationWorld.TestCase
TestRotationWorld.settings = settings(max_examples=count("rotation_machine"), stateful_step_count=50, deadline=None)
