"""Several rotation drivers over one Vault, interleaved call by call, with outages, deaths and lost keys.

Hypothesis takes the part of the scheduler and of bad luck. Each driver does its rounds in a thread that stops before
every call to Vault, so that any other may do anything in between; a call may be refused, take effect without an answer,
or be the last thing that its process does.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from carnet_broker.core.keyring import TRANSITIONS, Keyring, KeyState
from carnet_broker.core.requests import RequestKind
from carnet_broker.ports import KeyStoreUnavailableError
from carnet_broker.signing import NoSigningKeyError
from support.counts import count
from support.keyrings import SECOND, TIMING
from support.rotation import FAULTS, KilledError, ManualClock, Replica, Vault

WINDOW = TIMING.replica_lag + TIMING.poller_window
CALL_LASTS = 2 * SECOND
"""No call to Vault lasts longer: its timeout."""
FAULT = st.sampled_from([None, None, None, *FAULTS])
NUMBER = st.integers(0, 2)


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
        if self._fault is None:
            return call()
        done, error = FAULTS[self._fault]
        if done:
            call()
        raise error(name)

    def _run(self) -> None:
        try:
            self.replica.tick()
        except KeyStoreUnavailableError:
            pass
        except KilledError:
            self.killed = True
        except BaseException as error:  # noqa: BLE001 - raised again in the thread of the test
            self._unexpected = error
        finally:
            self.waits_before = None
            self._stopped.release()


class RotationWorld(RuleBasedStateMachine):
    """Three replicas, one Vault, and whoever asks for rotations."""

    @initialize(versioned=st.booleans())
    def empty(self, versioned: bool) -> None:
        """Begin with an empty Vault."""
        self.clock = ManualClock()
        self.vault = Vault(self.clock, versioned=versioned)
        self.replicas = [Replica(self.vault) for _ in range(3)]
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

    @rule(number=NUMBER, times=st.integers(0, 12), fault=st.sampled_from(list(FAULTS)))
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
            self.replicas[number] = Replica(self.vault)

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
        self.tokens.append((kid, self.clock.now() + TIMING.longest_life))

    @precondition(lambda self: len(self.vault.document.written) > 0)
    @rule()
    def quiet(self) -> None:
        """Everything works again: whatever happened, it comes to a good end by itself."""
        self.rest()
        if self.vault.bereft:
            # Whoever holds a key in memory does not miss it in Vault. Who starts without it does.
            assert self.vault.bereft <= self.lost
            self.replicas = [Replica(self.vault) for _ in range(3)]
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
        elif not revoked and not self.asked_now & set(new.answers):
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
