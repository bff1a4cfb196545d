"""The thread that drives the keyring: when it looks at Vault, and what it tells those who ask it to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import pytest

from carnet_broker import keyring_loop
from carnet_broker.core.keyring import Keyring, KeyState
from carnet_broker.core.requests import RequestKind
from carnet_broker.core.rollout import VerifierSession
from carnet_broker.keyring_loop import KeyringLoop, UnknownKeyError
from carnet_broker.ports import Acknowledged, Clock, Joined, KeyStoreUnavailableError, Left, StoreUnavailableError
from carnet_broker.rotation import RotationProgress
from support.keyrings import SECOND, T0, running
from support.rotation import ManualClock, Replica, Vault, go_wrong

FOREVER = timedelta(hours=1)
"""A poll interval that no test lives to see the end of."""


@dataclass
class Driver:
    """Stands for the rotation driver: counts its rounds, can be held up in one, and can be made to fail."""

    clock: ManualClock = field(default_factory=ManualClock)
    until: datetime | None = None
    failure: Exception | None = None
    held: bool = False
    lasts: timedelta = timedelta(0)
    rounds: int = 0
    began: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    told: list[str] = field(default_factory=list)

    asked_to_revoke: list[tuple[str, ...]] = field(default_factory=list)
    without_store: list[str | None] = field(default_factory=list)
    keyring: Keyring | None = None
    progress: RotationProgress | None = None

    def tick(self, clock: Clock, *, revoke: Sequence[str] = ()) -> datetime | None:
        """Do a round."""
        assert clock is self.clock
        self.asked_to_revoke.append(tuple(revoke))
        self.rounds += 1
        self.began.release()
        if self.held:
            assert self.go_on.acquire(timeout=10)
        self.clock.pass_time(self.lasts)
        if self.failure is not None:
            raise self.failure
        return self.until

    def vault_answered(self) -> None:
        """Note a good round."""
        self.told.append("answered")
        self.ended.release()

    def vault_failed(self, error: Exception) -> None:
        """Note a bad one."""
        self.told.append(str(error))
        self.ended.release()

    def rotation_without_store(self, error: StoreUnavailableError | None) -> None:
        """Note whether the shared store was there."""
        self.without_store.append(None if error is None else str(error))

    def loop(self, poll_interval: timedelta = FOREVER) -> KeyringLoop:
        """Return a loop that drives this."""
        return KeyringLoop(self, self.clock, self, poll_interval=poll_interval)

    @contextmanager
    def running(self, poll_interval: timedelta = FOREVER) -> Iterator[KeyringLoop]:
        """Run the loop, past its first round unless that is held up."""
        loop = self.loop(poll_interval)
        loop.start()
        assert (self.began if self.held else self.ended).acquire(timeout=10)
        try:
            yield loop
        finally:
            self.held = False
            self.go_on.release()
            loop.stop()


async def asked(loop: KeyringLoop, number: int) -> list[asyncio.Task[bool]]:
    """Let so many ask for a look, and return when all of them wait."""
    tasks = [asyncio.create_task(loop.read_again()) for _ in range(number)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


# -- pauses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("until", "pause"),
    [
        (None, 5.0),
        (T0 + 60 * SECOND, 5.0),
        (T0 + 5 * SECOND, 5.0),
        (T0 + 4 * SECOND, 4.0),
        (T0 + timedelta(milliseconds=20), 0.02),
        (T0 + timedelta(milliseconds=19), 0.02),
        (T0, 0.02),
        (T0 - 60 * SECOND, 0.02),
    ],
)
def test_the_pause_is_until_the_next_step_is_due_and_at_most_the_poll_interval(until, pause):
    """And never so short that a plan which is always due could spin."""
    assert pause == Driver(until=until).loop(5 * SECOND).round()


def test_the_pause_counts_from_the_end_of_the_round():
    """A round that lasted long leaves less to wait for."""
    assert 1.0 == Driver(until=T0 + 4 * SECOND, lasts=3 * SECOND).loop(5 * SECOND).round()


def test_a_round_in_the_calling_thread_raises_what_happened():
    """At the start of the broker somebody has to know."""
    with pytest.raises(KeyStoreUnavailableError, match="sealed"):
        Driver(failure=KeyStoreUnavailableError("sealed")).loop().round()


# -- the thread --------------------------------------------------------------------------------------------------------


LAGGARD = VerifierSession(
    spiffe_id="spiffe://prod.example/ns/shop/sa/payments",
    instance_id="v1",
    audience="payments",
    replica_id="one",
    generation=1,
    generation_at=T0,
    revocation_version=0,
    revocation_at=T0,
    max_staleness=60 * SECOND,
)
HEARD = Acknowledged(LAGGARD.spiffe_id, "v1", "s1", 2, 0, timedelta(0))


@pytest.mark.parametrize(
    ("laggards", "changes", "rounds"),
    [
        ((LAGGARD,), [HEARD], 2),
        ((LAGGARD,), [Left(LAGGARD.spiffe_id, "v2", "s2"), Left(LAGGARD.spiffe_id, "v1", "s1")], 2),
        ((LAGGARD,), [Joined(LAGGARD, "s3"), replace(HEARD, instance_id="v2")], 1),
        ((LAGGARD,), [], 1),
        ((), [HEARD], 1),
        (None, [HEARD], 1),
    ],
    ids=["acknowledged", "left", "others", "nobody", "waits for nobody", "no round yet"],
)
def test_the_last_answer_that_a_rotation_waits_for_is_looked_at_at_once(laggards, changes, rounds):
    """It does not wait for the next poll. What others say is no reason to ask Vault."""
    driver = Driver()
    if laggards is not None:
        driver.progress = RotationProgress(Keyring(issuer="https://tokens.prod.example"), None, None, laggards)
    with driver.running() as loop:
        loop.hear(changes)
        assert (rounds == 2) is driver.ended.acquire(timeout=10 if rounds == 2 else 0.1)
    assert rounds == driver.rounds


def test_it_polls_again_and_again():
    """Each round is told of."""
    driver = Driver()
    with driver.running(timedelta(milliseconds=20)):
        for _ in range(3):
            assert driver.ended.acquire(timeout=10)
    assert {"answered"} == set(driver.told)
    assert 4 <= driver.rounds


@pytest.mark.parametrize("failure", [KeyStoreUnavailableError("sealed"), ZeroDivisionError("a fault of ours")])
def test_a_round_that_fails_is_reported_and_the_next_one_comes(failure):
    """Whatever it was: rotation goes on, and the loop says that it fails until a round goes well."""
    driver = Driver(failure=failure)
    with driver.running(timedelta(milliseconds=20)) as loop:
        assert loop.failing
        assert driver.ended.acquire(timeout=10)
        driver.failure = None
        while driver.told[-1] != "answered":
            assert driver.ended.acquire(timeout=10)
        assert not loop.failing
    assert [str(failure)] * 2 == driver.told[:2]


def test_stop_ends_a_long_pause_at_once_and_waits_for_the_round_under_way():
    """After it no round begins."""
    driver = Driver()
    with driver.running():
        pass
    assert 1 == driver.rounds
    driver = Driver(held=True)
    loop = driver.loop()
    loop.start()
    assert driver.began.acquire(timeout=10)
    stopping = threading.Thread(target=loop.stop)
    stopping.start()
    stopping.join(0.05)
    assert stopping.is_alive()
    driver.go_on.release()
    stopping.join(10)
    assert (False, 1, ["answered"]) == (stopping.is_alive(), driver.rounds, driver.told)


# -- who asks for a look -----------------------------------------------------------------------------------------------


async def test_an_answer_of_the_last_second_is_new_enough():
    """No round is made for it; at the full second one is."""
    driver = Driver()
    with driver.running() as loop:
        driver.clock.pass_time(timedelta(milliseconds=999))
        assert await loop.read_again()
        assert 1 == driver.rounds
        driver.clock.pass_time(timedelta(milliseconds=1))
        assert await loop.read_again()
        assert 2 == driver.rounds


async def test_a_round_is_as_new_as_its_beginning():
    """What a slow round has read may be older than its end."""
    driver = Driver(lasts=timedelta(milliseconds=1500))
    with driver.running() as loop:
        driver.lasts = timedelta(0)
        assert await loop.read_again()
        assert 2 == driver.rounds


async def test_k11_many_who_ask_share_one_round():
    """A flood of unknown keys costs Vault about one look a second."""
    driver = Driver()
    with driver.running() as loop:
        driver.clock.pass_time(SECOND)
        driver.held = True
        tasks = await asked(loop, 50)
        assert await asyncio.to_thread(driver.began.acquire, timeout=10)
        assert await asyncio.to_thread(driver.began.acquire, timeout=10)
        later = await asked(loop, 50)
        driver.held = False
        driver.go_on.release()
        assert [True] * 100 == await asyncio.gather(*tasks, *later)
        for _ in range(50):
            assert await loop.read_again()
        # The first round, one for those who asked, one for those who came while that was under way.
        assert 3 >= driver.rounds


async def test_k11_a_vault_that_fails_is_not_flooded_either():
    """Who asks again within the second is told what the last look brought."""
    driver = Driver(failure=KeyStoreUnavailableError("refused"))
    with driver.running() as loop:
        for _ in range(50):
            assert not await loop.read_again()
        assert 1 == driver.rounds
        driver.clock.pass_time(SECOND)
        assert not await loop.read_again()
        assert 2 == driver.rounds
        driver.failure = None
        driver.clock.pass_time(SECOND)
        assert await loop.read_again()


async def test_who_asks_wakes_the_thread_and_is_told_whether_vault_answered():
    """Not at the next poll, which is an hour away."""
    driver = Driver()
    with driver.running() as loop:
        driver.clock.pass_time(SECOND)
        driver.failure = KeyStoreUnavailableError("sealed")
        assert not await loop.read_again()
        assert loop.failing


async def test_who_asks_while_a_round_is_under_way_gets_the_next_one():
    """That round may have read before the question came."""
    driver = Driver(held=True)
    with driver.running() as loop:
        (task,) = await asked(loop, 1)
        driver.clock.pass_time(2 * SECOND)
        driver.go_on.release()
        assert await asyncio.to_thread(driver.began.acquire, timeout=10)
        assert not task.done()
        driver.go_on.release()
        assert await task


async def test_k05_a_vault_that_hangs_is_as_good_as_one_that_does_not_answer(monkeypatch):
    """The caller is told within its time; the thread hangs on, and works when Vault does."""
    monkeypatch.setattr(keyring_loop, "_ASK_WITHIN", 0.05)
    driver = Driver(held=True)
    with driver.running() as loop:
        assert not await loop.read_again()
        driver.held = False
        driver.go_on.release()
        assert await asyncio.to_thread(driver.ended.acquire, timeout=10)
        driver.clock.pass_time(SECOND)
        monkeypatch.setattr(keyring_loop, "_ASK_WITHIN", 10.0)
        assert await loop.read_again()


async def test_g11_a_caller_that_goes_away_does_not_disturb_the_others():
    """Its place is given up; those beside it are told."""
    driver = Driver(held=True)
    with driver.running() as loop:
        gone, stays = await asked(loop, 2)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        driver.held = False
        driver.go_on.release()
        assert await stays


async def test_who_asks_when_it_is_over_is_told_no(monkeypatch):
    """Those who wait, and those who come later: nobody waits for a thread that has ended."""
    monkeypatch.setattr(keyring_loop, "_ASK_WITHIN", 1000.0)
    driver = Driver(held=True)
    loop = driver.loop()
    loop.start()
    assert await asyncio.to_thread(driver.began.acquire, timeout=10)
    (waiting,) = await asked(loop, 1)
    loop._wake.clear()
    stopping = asyncio.create_task(asyncio.to_thread(loop.stop))
    assert await asyncio.to_thread(loop._wake.wait, 10)  # Set by `stop`, when it has said so to the thread.
    driver.go_on.release()
    assert not await waiting
    await stopping
    driver.clock.pass_time(SECOND)
    assert not await loop.read_again()
    assert 1 == driver.rounds


async def test_it_drives_the_real_driver():
    """From an empty Vault to a signer, by the thread alone."""
    vault = Vault(ManualClock())
    replica = Replica(vault)
    told = Driver()
    loop = KeyringLoop(replica.driver, vault.clock, told, poll_interval=FOREVER)
    loop.start()
    assert await loop.read_again()
    assert vault.keyring.active.kid == replica.signs_with()
    loop.stop()


# -- the shared store --------------------------------------------------------------------------------------------------


async def test_a_store_that_fails_is_not_a_vault_that_fails():
    """The round is told of as one that Vault answered, and who asked for a look hears so."""
    driver = Driver(failure=StoreUnavailableError("the store is down"))
    with driver.running() as loop:
        assert (False, True) == (loop.failing, loop.without_store)
        driver.clock.pass_time(SECOND)
        assert await loop.read_again()
        driver.failure = None
        driver.clock.pass_time(SECOND)
        assert await loop.read_again()
        assert not loop.without_store
    assert ["the store is down", "the store is down", None] == driver.without_store[:3]
    assert {"answered"} == set(driver.told)


def test_whoever_wakes_it_gets_a_round_at_once():
    """For instance when the store has heard of a newer keyring, or of the last acknowledgement."""
    driver = Driver()
    with driver.running() as loop:
        loop.wake()
        assert driver.ended.acquire(timeout=10)
    assert 2 == driver.rounds


# -- revoking a key ----------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Iterator[tuple[Vault, Replica, KeyringLoop]]:
    """A loop that drives the real driver, past its first round."""
    vault = Vault(ManualClock())
    replica = Replica(vault)
    replica.tick()
    loop = KeyringLoop(replica.driver, vault.clock, Driver(), poll_interval=FOREVER)
    loop.start()
    yield vault, replica, loop
    loop.stop()


@pytest.mark.parametrize("store", ["well", "down"])
def test_k12_a_key_is_revoked_at_once_and_the_caller_is_told_the_keyring(real, store):
    """In the thread of the loop, with or without the shared store: the standby signs when the answer is there."""
    vault, replica, loop = real
    if store == "down":
        replica.tap = lambda name, call: go_wrong(name, call, "refused") if name.startswith("store.") else call()
    victim, standby = vault.keyring.active.kid, vault.keyring.standby.kid
    keyring = loop.revoke_key(victim).result(timeout=10)
    assert KeyState.REVOKED is keyring.get(victim).state
    assert standby == keyring.active.kid == vault.keyring.active.kid == replica.signs_with()
    assert keyring.generation <= vault.keyring.generation
    assert keyring == loop.revoke_key(victim).result(timeout=10)
    assert (KeyState.STANDBY in vault.states) is (store == "well")


def test_a_key_that_is_unknown_is_not_revoked(real):
    """The caller is told that there is none."""
    vault, _, loop = real
    before = vault.keyring
    with pytest.raises(UnknownKeyError, match="no key nobody"):
        loop.revoke_key("nobody").result(timeout=10)
    assert before == vault.keyring


def test_a_key_that_cannot_be_revoked_now_is_not_tried_again_behind_the_callers_back(real):
    """Vault is down: the caller hears why, and decides."""
    vault, replica, loop = real
    victim = vault.keyring.active.kid
    replica.tap = lambda name, call: go_wrong(name, call, "refused") if name == "replace" else call()
    with pytest.raises(KeyStoreUnavailableError, match="replace"):
        loop.revoke_key(victim).result(timeout=10)
    replica.tap = lambda _, call: call()
    vault.clock.pass_time(SECOND)
    assert asyncio.run(loop.read_again())
    assert victim == vault.keyring.active.kid


def test_a_key_that_is_revoked_is_told_of_although_the_round_failed(real):
    """Its private key cannot be destroyed now; it is no longer trusted all the same."""
    vault, replica, loop = real
    victim = vault.keyring.active.kid
    replica.tap = lambda name, call: go_wrong(name, call, "refused") if name == "destroy" else call()
    assert KeyState.REVOKED is loop.revoke_key(victim).result(timeout=10).get(victim).state


def test_a_caller_that_gave_up_before_its_turn_revokes_nothing():
    """Its future is cancelled: what it asked for is not done."""
    driver = Driver(held=True)
    with driver.running() as loop:
        assert loop.revoke_key("kid").cancel()
        driver.held = False
        driver.go_on.release()
        assert driver.ended.acquire(timeout=10)
        assert driver.ended.acquire(timeout=10)
    assert [(), ()] == driver.asked_to_revoke


def test_a_round_that_left_the_key_as_it_is_says_so():
    """Other steps were due, more than fit in one round."""
    keyring = running()
    driver = Driver(keyring=keyring)
    with driver.running() as loop, pytest.raises(KeyStoreUnavailableError, match="was not revoked"):
        loop.revoke_key(keyring.active.kid).result(timeout=10)
    assert [(), (keyring.active.kid,)] == driver.asked_to_revoke


def test_who_asks_for_a_revocation_when_it_is_over_is_told_so():
    """Those who wait, and those who come later."""
    driver = Driver(held=True)
    loop = driver.loop()
    loop.start()
    assert driver.began.acquire(timeout=10)
    waiting, gone = loop.revoke_key("kid"), loop.revoke_key("other")
    assert gone.cancel()
    loop._stopping = True
    driver.go_on.release()
    loop.stop()
    for revoked in (waiting, loop.revoke_key("kid")):
        with pytest.raises(KeyStoreUnavailableError, match="shutting down"):
            revoked.result(timeout=10)


def test_breakglass_in_the_letter_box_and_an_admin_who_revoke_the_same_key(real):
    """Both are told that it is done."""
    vault, _, loop = real
    victim = vault.keyring.standby.kid
    request = vault.ask(RequestKind.REVOKE, victim, breakglass=True)
    assert KeyState.REVOKED is loop.revoke_key(victim).result(timeout=10).get(victim).state
    assert "REVOKED" == vault.reason(request)
