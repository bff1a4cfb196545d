"""The thread that speaks to the shared store: what it reads, writes and finds out, and what an outage does to it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest

from carnet.revocations import RevocationKind
from carnet_broker.core.rollout import VerifierSession
from carnet_broker.ports import (
    Acknowledged,
    Joined,
    Left,
    LogPosition,
    NewRevocation,
    ReplicaReport,
    SessionChange,
    StoreUnavailableError,
)
from carnet_broker.revocation_view import RevocationHolder
from carnet_broker.store_loop import StoreLoop, StorePorts, StoreTiming
from carnet_broker.store_parts import Claim
from support.store_fakes import FakeStoreData

T0 = datetime(2026, 11, 24, 12, tzinfo=UTC)
PAYMENTS = "spiffe://prod.example/ns/shop/sa/payments"
TIMING = StoreTiming(
    poll_interval=timedelta(seconds=1), lease=timedelta(seconds=15), append_within=timedelta(milliseconds=500)
)


@dataclass
class HandClock:
    """Clocks that the test moves."""

    wall: datetime = T0
    seconds: float = 100.0

    def now(self) -> datetime:
        """Return the wall time."""
        return self.wall

    def mono(self) -> float:
        """Return monotonic seconds."""
        return self.seconds

    def move(self, seconds: float) -> None:
        """Move both."""
        self.wall += timedelta(seconds=seconds)
        self.seconds += seconds


class RealClock:
    """The clocks of this machine."""

    def now(self) -> datetime:
        """Return the wall time."""
        return datetime.now(UTC)

    def mono(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()


@dataclass
class Heard:
    """Everything that the loop tells."""

    restored: list[tuple[LogPosition, LogPosition]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    answered: int = 0
    changed: int = 0
    newer: int = 0
    lease: tuple[int, float] | None = None
    live: list[int] = field(default_factory=list)
    written: list[SessionChange] = field(default_factory=list)

    def store_answered(self) -> None:
        """Count."""
        self.answered += 1

    def store_failed(self, error: Exception) -> None:
        """Keep."""
        self.failures.append(error)

    def store_restored(self, claim: Claim, found: LogPosition) -> None:
        """Keep."""
        self.restored.append((claim, found))

    def revocations_read(self, position: LogPosition, count: int) -> None:
        """Nothing."""

    def lease_renewed(self, *, live_replicas: int, clock_offset: float) -> None:
        """Keep."""
        self.lease = live_replicas, clock_offset

    def verifiers_counted(self, live: int) -> None:
        """Keep."""
        self.live.append(live)

    def on_change(self) -> None:
        """Count."""
        self.changed += 1

    def on_newer_keyring(self) -> None:
        """Count."""
        self.newer += 1


class Replica:
    """One broker's loop over a store that is shared in memory."""

    def __init__(self, data: FakeStoreData, clock: HandClock | RealClock, name: str = "one") -> None:
        self.store = data.open()
        self.heard = Heard()
        self.holder = RevocationHolder()
        self.generation = 1
        ports = StorePorts(
            log=self.store.revocations,
            sessions=self.store.sessions,
            rollout=self.store.rollout,
            leases=self.store.replicas,
            mirror=self.store.mirror,
            wakeups=self.store.wakeups,
        )
        self.loop = StoreLoop(
            ports,
            self.holder,
            clock,
            self.heard,
            replica_id=name,
            version="1",
            timing=TIMING,
            generation=lambda: self.generation,
            changed=self.heard.on_change,
            newer_keyring=self.heard.on_newer_keyring,
            sessions_written=self.heard.written.extend,
        )


@pytest.fixture(name="clock")
def _clock() -> HandClock:
    return HandClock()


@pytest.fixture(name="data")
def _data(clock: HandClock) -> FakeStoreData:
    return FakeStoreData(now=clock.now, elapsed=lambda: timedelta(seconds=clock.mono()))


def token(number: int = 1) -> NewRevocation:
    """A token to revoke."""
    return NewRevocation(
        kind=RevocationKind.TOKEN, value=f"token-number-{number:06}", expires_at=T0 + timedelta(hours=1)
    )


def session(instance: str = "v1", generation: int = 1) -> VerifierSession:
    """A verifier that has loaded a generation."""
    return VerifierSession(
        spiffe_id=PAYMENTS,
        instance_id=instance,
        audience="payments",
        replica_id="one",
        generation=generation,
        generation_at=T0,
        revocation_version=0,
        revocation_at=T0,
        max_staleness=timedelta(minutes=5),
    )


# -- revocations -------------------------------------------------------------------------------------------------------


def test_a_round_takes_in_what_others_have_revoked_and_says_so_once(data, clock):
    """The second round finds nothing, and is as fresh as its beginning."""
    replica = Replica(data, clock)
    replica.loop.round()
    data.open().revocations.append([token()])
    replica.loop.round()
    assert (1, 2) == (replica.holder.version, replica.heard.changed)
    clock.move(5)
    replica.loop.round()
    assert 2 == replica.heard.changed
    assert timedelta(0) == replica.holder.view.age(clock.now(), clock.mono())


def test_what_this_replica_revokes_is_in_force_when_it_is_durable(data, clock):
    """Nobody waits for the next round."""
    replica = Replica(data, clock)
    replica.loop.round()
    appended = replica.loop.append([token()]).result(5)
    assert appended.position == replica.holder.view.position
    assert 2 == replica.heard.changed


def test_what_is_appended_after_others_is_taken_in_with_theirs(data, clock):
    """There is no gap in what is in force."""
    replica = Replica(data, clock)
    replica.loop.round()
    data.open().revocations.append([token(1)])
    replica.loop.append([token(2)]).result(5)
    assert 0 == replica.holder.version
    replica.loop.round()
    assert 2 == replica.holder.version


def test_a_store_that_is_behind_what_was_seen_begins_a_new_epoch_and_loses_nothing(data, clock):
    """The entry that the backup lacks is carried over, and the alarm goes off once."""
    replica = Replica(data, clock)
    replica.loop.round()
    backup = data.copy()
    replica.loop.append([token()]).result(5)
    seen = replica.holder.view.position
    data.restore(backup)
    replica.loop.round()
    assert [Claim(seen, "replica one")] == [claim for claim, _ in replica.heard.restored]
    assert replica.holder.view.position.epoch > seen.epoch
    fresh = data.open().revocations.read(None)
    assert [token().value] == [entry.value for entry in fresh.entries]
    replica.loop.round()
    assert 1 == len(replica.heard.restored)


def test_a_store_that_was_emptied_begins_a_new_epoch_above_all_versions_that_were_seen(data, clock):
    """Its epoch is later, and its versions begin anew: the `rv` of old tokens would be above all new revocations."""
    replica = Replica(data, clock)
    replica.loop.round()
    replica.loop.append([token()]).result(5)
    seen = replica.holder.view.position
    clock.move(3600)
    data.restore(FakeStoreData(now=clock.now, elapsed=lambda: timedelta(seconds=clock.mono())).copy())
    assert data.open().revocations.read(None).position.epoch > seen.epoch
    clock.move(-1800)  # What is carried over has not ended.
    replica.loop.round()
    position = replica.holder.view.position
    assert (1, True) == (len(replica.heard.restored), position.version > seen.version)
    assert [token().value] == [entry.value for entry in data.open().revocations.read(None).entries]
    appended = replica.loop.append([token(2)]).result(5)
    assert appended.position.version > seen.version


def test_a_restored_store_that_has_gone_on_is_found_out_by_what_it_lacks(data, clock):
    """It has another entry at the version that was seen."""
    replica = Replica(data, clock)
    replica.loop.round()
    backup = data.copy()
    replica.loop.append([token(1)]).result(5)
    data.restore(backup)
    data.open().revocations.append([token(2), token(3)])
    replica.loop.round()
    assert ["replica one"] == [claim.by for claim, _ in replica.heard.restored]
    values = {entry.value for entry in data.open().revocations.read(None).entries}
    assert {token(number).value for number in (1, 2, 3)} == values
    assert 3 == len(replica.holder.revocations)


def test_what_the_first_replica_did_not_know_of_is_entered_into_the_new_epoch_by_the_second(data, clock):
    """Two replicas, each with an entry that only it had read before the store was restored."""
    first, second = Replica(data, clock, "one"), Replica(data, clock, "two")
    first.loop.round()
    second.loop.round()
    backup = data.copy()
    second.loop.append([token(7)]).result(5)
    data.restore(backup)
    first.loop.append([token(1)]).result(5)
    backup = data.copy()
    first.loop.append([token(2)]).result(5)
    data.restore(backup)
    first.loop.round()
    second.loop.round()
    values = {entry.value for entry in data.open().revocations.read(None).entries}
    assert {token(number).value for number in (1, 2, 7)} == values


ALICE = "spiffe://prod.example/ns/shop/sa/alice"


def subject() -> NewRevocation:
    """A subject to revoke."""
    return NewRevocation(kind=RevocationKind.SUBJECT, value=ALICE, expires_at=T0 + timedelta(hours=1))


def reach(data: FakeStoreData) -> int:
    """Up to which `rv` tokens of the subject are refused."""
    entries = data.open().revocations.read(None).entries
    return max(entry.before_version for entry in entries if entry.value == ALICE) - 1


def test_who_revokes_in_a_restored_store_gets_a_version_above_all_that_were_given(data, clock):
    """Nobody had found out yet: the epoch begins first, and the answer is of the new one."""
    replica = Replica(data, clock)
    replica.loop.round()
    backup = data.copy()
    replica.loop.append([token(1), token(2)]).result(5)
    seen = replica.holder.view.position
    data.restore(backup)
    appended = replica.loop.append([subject()]).result(5)
    assert appended.position.epoch > seen.epoch
    assert appended.entries[0].before_version > seen.version
    assert [Claim(seen, "replica one")] == [claim for claim, _ in replica.heard.restored]
    replica.loop.round()
    assert appended.position == replica.holder.view.position
    assert 1 == len(replica.heard.restored)
    assert {token(1).value, token(2).value, ALICE} == {entry.value for entry in replica.holder.revocations.entries()}


def test_what_is_revoked_in_a_restored_store_and_holds_in_the_new_epoch_is_told_as_entered(data, clock):
    """By the version of before the epoch: its audit record is written, as of what is entered only after it."""
    replica = Replica(data, clock)
    replica.loop.round()
    backup = data.copy()
    replica.loop.append([token(1)]).result(5)
    data.restore(backup)
    appended = replica.loop.append([token(2)]).result(5)
    assert 1 == len(replica.heard.restored)
    assert [token(2).value] == [entry.value for entry in appended.entries]
    assert appended.entries == appended.standing
    replica.loop.round()
    assert {token(1).value, token(2).value} == {entry.value for entry in replica.holder.revocations.entries()}


def test_what_another_revoked_in_a_restored_store_is_raised_by_whoever_finds_out(data, clock):
    """The other one had seen less than the backup holds, so that its version looked new to it."""
    first, second = Replica(data, clock, "one"), Replica(data, clock, "two")
    second.loop.round()
    backup = data.copy()
    first.loop.round()
    first.loop.append([token(number) for number in range(1, 6)]).result(5)
    seen = first.holder.version
    data.restore(backup)
    assert 1 == second.loop.append([subject()]).result(5).position.version
    first.loop.round()
    assert reach(data) >= seen
    assert 1 == len(first.heard.restored)


def test_what_came_before_an_epoch_that_another_has_begun_is_raised_by_whoever_has_seen_more(data, clock):
    """Whoever began it could not know that the `rv` of tokens had got beyond what was revoked."""
    first, second = Replica(data, clock, "one"), Replica(data, clock, "two")
    first.loop.round()
    backup = data.copy()
    first.loop.append([token(1)]).result(5)
    second.loop.round()
    first.loop.append([token(number) for number in range(2, 6)]).result(5)
    seen = first.holder.version
    data.restore(backup)
    data.open().revocations.append([token(9), subject()])
    known = second.holder.revocations.entries() + data.open().revocations.read(None).entries
    data.open().revocations.begin_epoch(
        seen=LogPosition(second.holder.view.position.epoch, 3, b"x" * 32), carry=known, now=clock.now()
    )
    assert 1 == reach(data)
    first.loop.round()
    assert reach(data) >= seen
    version = data.open().revocations.read(None).position.version
    first.loop.round()
    second.loop.round()
    assert version == data.open().revocations.read(None).position.version, "once is enough"


async def test_what_was_revoked_before_a_verifier_told_of_more_is_raised(data, clock):
    """All brokers began on the restored store, and revoked before one came that remembers."""
    replica = Replica(data, clock)
    replica.loop.round()
    replica.loop.append([subject()]).result(5)
    here = replica.holder.view.position
    asked = asyncio.ensure_future(
        replica.loop.read_again(Claim(LogPosition(here.epoch, 40, here.digest), "a verifier"))
    )
    await asyncio.sleep(0)
    replica.loop.round()
    asked.cancel()
    assert reach(data) >= 40


async def test_a_claim_of_a_verifier_begins_an_epoch_at_most_once_a_minute(data, clock):
    """A verifier that lies costs a snapshot a minute, and tokens of those that were revoked lately; no more."""
    replica = Replica(data, clock)
    replica.loop.round()
    for expected, pause in ((1, 1), (1, 59), (2, 2)):
        here = replica.holder.view.position
        claim = Claim(LogPosition(here.epoch, here.version + 5, here.digest), "a verifier")
        asked = asyncio.ensure_future(replica.loop.read_again(claim))
        await asyncio.sleep(0)
        replica.loop.round()
        asked.cancel()
        assert expected == len(replica.heard.restored)
        assert claim.by == replica.heard.restored[-1][0].by
        clock.move(pause)
    # The last one came after the minute was over.
    here = replica.holder.view.position
    assert here.version > 2_000_000


# -- verifiers ---------------------------------------------------------------------------------------------------------


def test_what_verifiers_say_is_written_in_batches_and_each_hears_the_outcome(data, clock):
    """A storm of joins is a few transactions."""
    replica = Replica(data, clock)
    outcomes = []
    for number in range(700):
        data.sessions_per_identity = 1000
        replica.loop.report(Joined(session(f"v{number}"), f"s{number}"), outcomes.append)
    replica.loop.round()
    assert [True] * 700 == [outcome.live for outcome in outcomes]
    assert 700 == len(replica.store.sessions.all())


def test_of_what_one_verifier_says_in_a_row_the_last_counts(data, clock):
    """With the time since it said so."""
    replica = Replica(data, clock)
    replica.loop.report(Joined(session(), "s1"), None)
    for version in (1, 2, 3):
        replica.loop.report(Acknowledged(PAYMENTS, "v1", "s1", 1, version, timedelta(0)))
    clock.move(2)
    replica.loop.round()
    (written,) = replica.store.sessions.all()
    assert (3, clock.now() - timedelta(seconds=2)) == (written.revocation_version, written.revocation_at)
    replica.loop.report(Left(PAYMENTS, "v1", "s1"))
    replica.loop.round()
    assert [] == list(replica.store.sessions.all())


def test_what_cannot_be_written_in_an_outage_is_written_after_it_in_its_order(data, clock):
    """Nothing that a verifier said is lost."""
    replica = Replica(data, clock)
    replica.loop.report(Joined(session(), "s1"))
    replica.loop.report(Left(PAYMENTS, "v1", "s1"))
    replica.loop.report(Joined(session("v2"), "s2"))
    data.down = True
    with pytest.raises(StoreUnavailableError):
        replica.loop.round()
    data.down = False
    replica.loop.round()
    assert ["v2"] == [one.instance_id for one in replica.store.sessions.all()]


# -- the lease, the clock and the keyring ------------------------------------------------------------------------------


def test_the_lease_is_renewed_in_time_and_at_once_with_a_new_generation(data, clock):
    """The window for pollers begins with it."""
    replica = Replica(data, clock)
    replica.loop.round()
    assert (1, 0.0) == replica.heard.lease
    before = replica.loop.replicas_seen()
    clock.move(4)
    replica.loop.round()
    assert replica.loop.replicas_seen() is before
    replica.generation = 2
    replica.loop.round()
    (lease,) = replica.loop.replicas_seen().replicas
    assert (2, clock.now()) == (lease.generation, lease.generation_at)
    clock.move(5)
    replica.loop.round()
    (lease,) = replica.loop.replicas_seen().replicas
    assert clock.now() == lease.renewed_at


@pytest.mark.parametrize("seconds", [-20, -6, 0, 6, 20])
def test_the_offset_of_the_clocks_is_found_with_the_lease(clock, seconds):
    """Whichever of them is ahead."""
    data = FakeStoreData(now=lambda: clock.now() + timedelta(seconds=seconds))
    replica = Replica(data, clock)
    replica.loop.round()
    assert timedelta(seconds=abs(seconds)) == replica.loop.clock_offset


def test_a_newer_keyring_of_another_replica_is_told_of_once(data, clock):
    """As raised, or as mirrored; one that is there already is no news."""
    replica = Replica(data, clock)
    replica.loop.round()
    assert 0 == replica.heard.newer
    data.open().rollout.raise_to(2, "kid")
    clock.move(1)
    replica.loop.round()
    clock.move(1)
    replica.loop.round()
    assert 1 == replica.heard.newer
    data.open().mirror.save(3, {"generation": 3}, None)
    clock.move(1)
    replica.loop.round()
    assert 2 == replica.heard.newer


def test_a_keyring_that_was_raised_is_told_of_again_when_it_is_mirrored(data, clock):
    """When it is raised Vault has no document of it yet: whoever looks then has to look again."""
    replica = Replica(data, clock)
    data.open().rollout.raise_to(2, "kid")
    replica.loop.round()
    assert 1 == replica.heard.newer
    data.open().mirror.save(2, {"generation": 2}, None)
    clock.move(1)
    replica.loop.round()
    assert 2 == replica.heard.newer
    replica.generation = 2
    data.open().mirror.save(3, {"generation": 3}, None)
    replica.generation = 3
    clock.move(1)
    replica.loop.round()
    assert 2 == replica.heard.newer, "this broker has it already"


def test_the_store_is_cleaned_now_and_then_and_what_has_ended_is_dropped_here(data, clock):
    """By clocks that do not run ahead."""
    replica = Replica(data, clock)
    replica.loop.round()
    replica.loop.append([token()]).result(5)
    clock.move(3599)
    replica.loop.round()
    assert 1 == len(replica.holder.revocations)
    clock.wall += timedelta(days=1)
    replica.loop.round()
    assert 1 == len(replica.holder.revocations), "a wall clock that jumps ahead is not believed"
    clock.seconds += 2
    replica.loop.round()
    assert 0 == len(replica.holder.revocations)


# -- the threads -------------------------------------------------------------------------------------------------------


def until(condition, within: float = 5.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def test_the_thread_reads_when_the_store_tells_and_ends_its_lease_at_the_end():
    """Another replica's entry arrives long before the poll interval; an outage is told of and gets over."""
    data = FakeStoreData()
    replica = Replica(data, RealClock())
    replica.loop.start()
    try:
        until(lambda: replica.holder.view is not None)
        started = time.monotonic()
        ends = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
        data.open().revocations.append(
            [NewRevocation(kind=RevocationKind.TOKEN, value="token-number-000001", expires_at=ends)]
        )
        until(lambda: replica.holder.version == 1)
        assert time.monotonic() - started < 0.5
        data.down = True
        assert not await replica.loop.read_again()
        assert replica.loop.failing
        with pytest.raises(StoreUnavailableError):
            await replica.loop.revoke([token(2)])
        data.down = False
        assert await replica.loop.read_again()
        assert not replica.loop.failing
    finally:
        replica.loop.stop()
    (lease,) = data.open().replicas.renew(_report("two")).replicas[:1]
    assert lease.replica_id != "one" or not lease.is_live(datetime.now(UTC))
    assert not await replica.loop.read_again()


def test_a_newer_keyring_is_told_of_long_before_the_poll_however_often_there_is_something_to_write():
    """A look just before it was mirrored puts the next look off by a moment, and not to the next poll."""
    data = FakeStoreData()
    replica = Replica(data, RealClock())
    replica.loop.start()
    try:
        until(lambda: replica.heard.answered > 1)
        for generation in range(2, 12):
            replica.loop.wake()
            time.sleep(0.01 * generation)
            data.open().mirror.save(generation, {"generation": generation}, None)
            started = time.monotonic()
            until(lambda generation=generation: replica.heard.newer >= generation - 1)
            assert time.monotonic() - started < TIMING.poll_interval.total_seconds() / 2
    finally:
        replica.loop.stop()


async def test_who_revokes_does_not_wait_for_a_store_that_hangs():
    """After the deadline it is told that it is not known."""
    replica = Replica(FakeStoreData(), RealClock())
    replica.store.revocations.append = lambda _: time.sleep(2)
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="did not answer within"):
        await replica.loop.revoke([token()])
    assert time.monotonic() - started < 1.5


async def test_a_stop_does_not_need_the_store():
    """The lease ends by itself; that it could not be ended is told."""
    data = FakeStoreData()
    replica = Replica(data, RealClock())
    replica.loop.start()
    until(lambda: replica.heard.answered > 0)
    data.down = True
    asked = asyncio.ensure_future(replica.loop.read_again())
    await asyncio.sleep(0)
    await asyncio.to_thread(replica.loop.stop)
    assert not await asked
    assert replica.heard.failures


def _report(name: str) -> ReplicaReport:
    return ReplicaReport(replica_id=name, version="1", generation=1, revocation_version=0, lease=timedelta(seconds=15))


# -- how many there are ------------------------------------------------------------------------------------------------


def test_live_verifiers_of_all_brokers_are_counted_each_few_seconds(data, clock):
    """Those that poll are not live; nor is the store read for it at each round."""
    replica, other = Replica(data, clock, "one"), Replica(data, clock, "two")
    replica.loop.report(Joined(session("v1"), "s1"), None)
    other.loop.report(Joined(replace(session("v2"), replica_id="two"), "s2"), None)
    other.loop.report(Joined(replace(session("v3"), replica_id="two", polls=True), "s3"), None)
    other.loop.round()
    replica.loop.round()
    assert [2] == replica.heard.live
    replica.loop.report(Left(PAYMENTS, "v1", "s1"))
    clock.move(4)
    replica.loop.round()
    assert [2] == replica.heard.live
    clock.move(2)
    replica.loop.round()
    assert [2, 1] == replica.heard.live


def test_what_verifiers_have_said_is_passed_on_once_the_store_has_it(data, clock):
    """Not before: whoever hears it counts them in the store."""
    replica = Replica(data, clock)
    left = Left(PAYMENTS, "v1", "s1")
    replica.loop.report(left)
    data.down = True
    with pytest.raises(StoreUnavailableError):
        replica.loop.round()
    assert [] == replica.heard.written
    data.down = False
    replica.loop.round()
    assert [left] == replica.heard.written


# -- fairness ----------------------------------------------------------------------------------------------------------


def test_a_storm_of_verifiers_does_not_keep_the_lease_from_its_renewal(data, clock):
    """The lease comes first, and a round ends although there is more to write; the next one goes on with it."""
    replica = Replica(data, clock)
    write, renew = replica.store.sessions.write, replica.store.replicas.renew
    done: list[str] = []
    numbers = iter(range(10**9))

    def add(count: int) -> None:
        for _ in range(count):
            replica.loop.report(Joined(session(f"v{next(numbers)}"), "s"))

    def writing(changes):
        done.append("sessions")
        if len(done) < 50:
            add(len(changes))  # There is always more, as long as this goes on.
        return write(changes)

    def renewing(report):
        done.append("lease")
        return renew(report)

    replica.store.sessions.write = writing
    replica.store.replicas.renew = renewing
    add(500)
    replica.loop.round()
    assert ["lease", *["sessions"] * 4] == done
    clock.move(6)
    replica.loop.round()
    assert ["lease", *["sessions"] * 4] * 2 == done


def test_what_is_left_is_written_when_the_broker_stops(data, clock):
    """However much it is."""
    data.sessions_per_identity = 10_000
    replica = Replica(data, clock)
    for number in range(2_600):
        replica.loop.report(Joined(session(f"v{number}"), "s"))
    replica.loop._stopping = True
    replica.loop.round()
    assert 2_600 == len(replica.store.sessions.all())
