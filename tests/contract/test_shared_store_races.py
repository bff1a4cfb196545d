"""What holds for the shared store when many use it at once: gap-free versions, and the gate before a key signs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import Connection, event

from carnet.errors import ConfigError
from carnet.revocations import Revocation, RevocationKind, next_digest
from carnet_broker.core.rollout import Permit
from carnet_broker.edges.store import SharedStore
from carnet_broker.edges.store.migrate import SCHEMA_VERSION
from carnet_broker.ports import Acknowledged, LogPosition, SessionOutcome, WaitingFor
from support.counts import count
from support.store_places import (
    ALICE,
    FakePlace,
    PostgresPlace,
    SqlitePlace,
    Store,
    StorePlace,
    joined,
    report,
    revoked,
)

Real = SqlitePlace | PostgresPlace


@pytest.fixture(name="place")
def _place(store_place: StorePlace) -> StorePlace:
    """An empty store of each kind."""
    return store_place


@pytest.fixture(name="real")
def _real(real_store_place: Real) -> Real:
    """An empty store in each real database."""
    return real_store_place


@contextmanager
def before_commit(store: SharedStore, do: Callable[[], None]) -> Iterator[None]:
    """Call `do` when a transaction of `store` has done all, and holds its locks, and is about to commit."""

    def hook(_: Connection) -> None:
        do()

    engine = store._database.backend.engine
    event.listen(engine, "commit", hook)
    try:
        yield
    finally:
        event.remove(engine, "commit", hook)


def patient(place: StorePlace) -> Store:
    """A way to a store that many threads write to without a pause: SQLite lets them in by chance."""
    return place.open() if isinstance(place, FakePlace) else place.open(timeout=timedelta(seconds=60))


class Stalled:
    """A call of `store` that has stopped before its commit."""

    def __init__(self, pool: ThreadPoolExecutor, store: SharedStore, call: Callable[[], object]) -> None:
        self._reached = threading.Event()
        self._go_on = threading.Event()
        self.result: Future[object] = pool.submit(self._run, store, call)
        assert self._reached.wait(20)

    def go_on(self) -> object:
        """Let it commit, and return what it returned."""
        self._go_on.set()
        return self.result.result(20)

    def _run(self, store: SharedStore, call: Callable[[], object]) -> object:
        with before_commit(store, self._stop):
            return call()

    def _stop(self) -> None:
        self._reached.set()
        assert self._go_on.wait(20)


@pytest.fixture(name="pool")
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for calls that wait."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


def waits(future: Future[object]) -> bool:
    """Whether the call has not returned after a while."""
    try:
        future.result(0.3)
    except TimeoutError:
        return True
    return False


# Versions


def test_append_waits_for_the_one_before_and_a_reader_sees_no_gap(real: Real, pool: ThreadPoolExecutor):
    """A takes a version and stalls before its commit; B waits; a reader in between sees neither; then both, in order.

    Ids that are taken at the INSERT and become visible at the COMMIT would show 2 before 1, and a reader would go on
    from 2.
    """
    a, b, reader = real.open(), real.open(), real.open()
    start = reader.revocations.read(None).position
    stalled = Stalled(pool, a, lambda: a.revocations.append([revoked(real)]))
    second = pool.submit(b.revocations.append, [revoked(real)])
    assert waits(second)
    page = reader.revocations.read(start)
    assert (start, ()) == (page.position, page.entries)
    stalled.go_on()
    assert 2 == second.result(20).entries[0].version
    assert [1, 2] == [entry.version for entry in reader.revocations.read(start).entries]


def test_two_that_revoke_one_token_at_once_write_it_once(real: Real, pool: ThreadPoolExecutor):
    """A has written it and stalls before its commit; B waits for that, finds it, and gets its version."""
    a, b = real.open(), real.open()
    same = revoked(real, "A" * 22, RevocationKind.TOKEN)
    stalled = Stalled(pool, a, lambda: a.revocations.append([same]))
    second = pool.submit(b.revocations.append, [same])
    assert waits(second)
    stalled.go_on()
    appended = second.result(20)
    assert ((), [1]) == (appended.entries, [entry.version for entry in appended.standing])
    assert 2 == b.revocations.append([revoked(real)]).entries[0].version


def test_eight_that_revoke_the_same_tokens_leave_each_once_and_no_gap(place: StorePlace):
    """Each of 8 threads revokes all of 40 tokens: versions are exactly 1 to 40, and all are told the same ones."""
    news = [revoked(place, f"token-{number:016}", RevocationKind.TOKEN) for number in range(40)]
    stores = [patient(place) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda store: [store.revocations.append([new]).standing[0] for new in news], stores))
    assert all(one == told[0] for one in told)
    page = stores[0].revocations.read(None)
    assert list(range(1, 41)) == [entry.version for entry in page.entries]
    assert set(told[0]) == set(page.entries)


def test_append_that_fails_at_its_commit_leaves_no_gap(real: Real):
    """The version of an entry that was rolled back is given to the next one."""
    store, other = real.open(), real.open()

    def fail() -> None:
        msg = "the end of the transaction"
        raise ZeroDivisionError(msg)

    with before_commit(store, fail), pytest.raises(ZeroDivisionError):
        store.revocations.append([revoked(real), revoked(real)])
    assert 1 == other.revocations.append([revoked(real)]).entries[0].version
    assert 2 == store.revocations.append([revoked(real)]).entries[0].version


def test_new_epoch_and_an_append_do_not_mix(real: Real, pool: ThreadPoolExecutor):
    """An entry that is written while the epoch begins is of the old one, or of the new one, and in no case lost."""
    a, b = real.open(), real.open()
    start = b.revocations.read(None).position
    seen = LogPosition(start.epoch, 10, b"x" * 32)
    stalled = Stalled(pool, a, lambda: a.revocations.begin_epoch(seen=seen, carry=(), now=real.clock.now()))
    appended = pool.submit(b.revocations.append, [revoked(real)])
    assert waits(appended)
    begun = stalled.go_on()
    assert isinstance(begun, LogPosition)
    position = appended.result(20).position
    assert (begun.epoch, begun.version + 1) == (position.epoch, position.version)


def test_eight_writers_leave_no_gap_and_a_reader_sees_each_entry_once_in_order(place: StorePlace):
    """8 threads write 200 entries each, in calls of 1 to 4: versions are exactly 1 to 1,600.

    A reader that follows by deltas all the while never sees one twice, none out of order, and its digest matches.
    """
    each = count("entries_of_each_writer")
    stores = [patient(place) for _ in range(9)]
    position = stores[8].revocations.read(None).position
    entries: list[Revocation] = []
    versions: list[int] = []

    def write(number: int) -> list[int]:
        store, written, size = stores[number], list[int](), number % 4 + 1
        while len(written) < each:
            appended = store.revocations.append([revoked(place)] * min(size, each - len(written)))
            assert appended.position.version == appended.entries[-1].version
            written += [entry.version for entry in appended.entries]
        return written

    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(write, number) for number in range(8)]
        while len(entries) < 8 * each:
            page = stores[8].revocations.read(position)
            assert not page.snapshot
            digest = position.digest
            for entry in page.entries:
                digest = next_digest(digest, entry)
            assert digest == page.position.digest
            entries.extend(page.entries)
            position = page.position
            if not page.entries:
                assert not any(writer.done() and writer.exception() for writer in writers)
                stores[8].wakeups.wait(timedelta(seconds=0.2))
        versions = [version for writer in writers for version in writer.result()]
    assert list(range(1, 8 * each + 1)) == sorted(versions)
    assert list(range(1, 8 * each + 1)) == [entry.version for entry in entries]


# The gate


def test_permit_waits_for_a_join_that_is_under_way_and_counts_it(real: Real, pool: ThreadPoolExecutor):
    """A verifier that joins with the old generation is counted, however close the permit is."""
    a, b = real.open(), real.open()
    a.replicas.renew(report())
    stalled = Stalled(pool, a, lambda: a.sessions.write([joined(generation=1)]))
    permit = pool.submit(b.rollout.permit, 2, "k2", overdue=False)
    assert waits(permit)
    assert (SessionOutcome(live=True),) == stalled.go_on()
    waiting = permit.result(20)
    assert isinstance(waiting, WaitingFor)
    assert ["one"] == [session.instance_id for session in waiting.laggards]


@pytest.mark.parametrize("step", ["raise", "permit"])
def test_join_waits_for_a_raise_that_is_under_way_and_is_refused(real: Real, pool: ThreadPoolExecutor, step: str):
    """A verifier that has only the old generation is not admitted past a raise or a permit that was first."""
    a, b = real.open(), real.open()
    if step == "raise":
        stalled = Stalled(pool, a, lambda: a.rollout.raise_to(2, "k2"))
    else:
        stalled = Stalled(pool, a, lambda: a.rollout.permit(2, "k2", overdue=False))
    join = pool.submit(b.sessions.write, [joined(generation=1)])
    assert waits(join)
    stalled.go_on()
    assert [SessionOutcome(live=False, required_generation=2)] == list(join.result(20))
    assert () == tuple(b.sessions.all())


def test_joins_do_not_wait_for_each_other(postgres, pool: ThreadPoolExecutor):
    """In PostgreSQL they share the lock of the row: a slow broker holds up no other one's verifiers."""
    place = PostgresPlace(postgres)
    a, b = place.open(), place.open()
    stalled = Stalled(pool, a, lambda: a.sessions.write([joined("one")]))
    assert [SessionOutcome(live=True)] == list(b.sessions.write([joined("two")]))
    stalled.go_on()
    assert 2 == len(b.sessions.all())
    place.close()


def test_no_permit_passes_a_verifier_that_has_not_loaded_the_key(place: StorePlace):
    """Four brokers admit verifiers with what is published while a fifth raises, publishes and asks for permits.

    When a permit that is not overdue is given, every verifier that is counted has acknowledged its generation.
    """
    brokers = [patient(place) for _ in range(4)]
    gate = patient(place)
    gate.replicas.renew(report(lease=timedelta(hours=1)))
    published, over = [1], threading.Event()

    def admit(number: int) -> int:
        admitted = 0
        while not over.is_set():
            name, generation = f"{number}-{admitted}", published[0]
            (outcome,) = brokers[number].sessions.write([joined(name, generation=generation)])
            if outcome.live:
                admitted += 1
                change = Acknowledged(ALICE, name, "stream-1", published[0], 7, timedelta())
                brokers[number].sessions.write([change])
            # All that were admitted acknowledge what is published now.
            time.sleep(0.05)
            brokers[number].sessions.write(
                [
                    Acknowledged(ALICE, f"{number}-{before}", "stream-1", published[0], 7, timedelta())
                    for before in range(admitted)
                ]
            )
        return admitted

    with ThreadPoolExecutor(4) as pool:
        admitting = [pool.submit(admit, number) for number in range(4)]
        try:
            for generation in range(2, 6):
                while len(gate.sessions.all()) < 3 * generation:
                    time.sleep(0.02)
                gate.rollout.raise_to(generation, f"k{generation}")
                published[0] = generation
                while not isinstance(gate.rollout.permit(generation, f"k{generation}", overdue=False), Permit):
                    assert not any(task.done() for task in admitting)
                assert [] == [s for s in gate.sessions.all() if s.generation < generation]
        finally:
            over.set()
        assert sum(task.result(30) for task in admitting) == len(gate.sessions.all())


# Wake-ups


def test_change_wakes_those_that_wait(place: StorePlace):
    """Each change that others should look at wakes them; what changes nothing, and a mere renewal, wakes nobody."""
    writer, waiter = place.open(), place.open()
    writer.replicas.renew(report())
    changes: list[Callable[[], object]] = [
        lambda: writer.revocations.append([revoked(place)]),
        lambda: writer.rollout.raise_to(2, "k2"),
        lambda: writer.sessions.write([joined(generation=2)]),
        lambda: writer.mirror.save(2, {}, None),
        lambda: writer.replicas.renew(report(generation=2)),
        lambda: writer.replicas.leave("broker-1"),
    ]
    for change in changes:
        while waiter.wakeups.wait(timedelta(seconds=0.3)):
            pass
        change()
        assert waiter.wakeups.wait(timedelta(seconds=10))
    writer.replicas.renew(report(generation=2))
    while waiter.wakeups.wait(timedelta(seconds=0.3)):
        pass
    writer.replicas.renew(report(generation=2))
    writer.revocations.read(None)
    writer.mirror.save(2, {}, None)
    writer.sessions.write([Acknowledged(ALICE, "one", "stream-1", 2, 7, timedelta())])
    assert not waiter.wakeups.wait(timedelta(seconds=0.3))


def test_notify_only_wakes(place: StorePlace):
    """With it suppressed nobody else is woken, and whoever looks finds the change. The writer itself is woken."""
    writer, waiter = place.open(notify=False), place.open(notify=False)
    while waiter.wakeups.wait(timedelta(seconds=0.3)) or writer.wakeups.wait(timedelta(seconds=0.3)):
        pass
    appended = writer.revocations.append([revoked(place)])
    assert writer.wakeups.wait(timedelta(seconds=10))
    assert not waiter.wakeups.wait(timedelta(seconds=0.3))
    assert appended.position == waiter.revocations.read(None).position


def test_each_that_waits_is_woken(place: StorePlace):
    """Two threads of one process have a wake-up each, and neither takes the other's."""
    store = place.open()
    second = store.open_wakeups()
    while store.wakeups.wait(timedelta(seconds=0.3)) or second.wait(timedelta(seconds=0.3)):
        pass
    store.rollout.raise_to(1, "k1")
    assert store.wakeups.wait(timedelta(seconds=10))
    assert second.wait(timedelta(seconds=10))


def test_wake_up_that_comes_before_the_wait_is_not_lost(place: StorePlace):
    """Who was busy when something changed does not wait."""
    store = place.open()
    store.rollout.raise_to(1, "k1")
    assert store.wakeups.wait(timedelta(seconds=0))


def test_closing_ends_the_wait(place: StorePlace, pool: ThreadPoolExecutor):
    """A wait that is under way ends at once, and so does each further one; nothing was changed."""
    store = place.open()
    while store.wakeups.wait(timedelta(seconds=0.3)):
        pass
    waiting = pool.submit(store.wakeups.wait, timedelta(minutes=10))
    assert waits(waiting)
    store.close()
    assert not waiting.result(10)
    assert not store.wakeups.wait(timedelta(minutes=10))


# The tables


def test_many_brokers_start_on_an_empty_store_at_once(real: Real):
    """One of them makes the tables, the others wait for it; all are of one epoch."""
    with ThreadPoolExecutor(6) as pool:
        stores = [future.result(60) for future in [pool.submit(real.open) for _ in range(6)]]
    assert 1 == len({store.revocations.read(None).position for store in stores})


@pytest.mark.parametrize("compatible_from", [SCHEMA_VERSION, SCHEMA_VERSION + 1])
def test_software_of_before_runs_beside_the_next_version_only_where_that_one_says_so(real: Real, compatible_from: int):
    """A newer database refuses to start, in one line that says what to do, unless it declares itself compatible."""
    real.open().mirror.save(1, {}, None)
    statement = f"UPDATE schema_state SET version = {SCHEMA_VERSION + 1}, compatible_from = {compatible_from}"  # noqa: S608 - a number
    store = real.open()
    with store._database.write() as transaction:
        transaction.connection.exec_driver_sql(statement)
    if compatible_from == SCHEMA_VERSION:
        assert real.open().mirror.load() is not None
    else:
        with pytest.raises(
            ConfigError, match=rf"tables of version {SCHEMA_VERSION + 1}.*start the newer software again, or restore"
        ):
            real.open()
