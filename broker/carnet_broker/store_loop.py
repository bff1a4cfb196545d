"""The threads that speak to the shared store: read revocations, renew the lease, and tell of verifiers.

The store can hang, so nobody who answers calls waits for it. One round reads the revocations since the last one, writes
what verifiers have said, renews the lease of this replica where that is due, and looks whether another replica has a
newer keyring. A round is due each `poll_interval`, when the store says that something has changed, and when somebody
here has something for it. What a round cannot do now stays for the next one.

One thread reads, another one does the rest of the round: all verifiers answer a revocation at about the same time, and
the next revocation does not wait until that is written.

Where the store is behind what was seen of it, it was restored from a backup: a new epoch begins (`core.lost_entries`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Final

from carnet.revocations import Revocation, lagging_time
from carnet_broker.core.lost_entries import as_they_were, is_behind, lost_entries, outrun_entries, raised
from carnet_broker.core.rollout import live_sessions
from carnet_broker.ports import (
    Appended,
    Clock,
    LogPosition,
    NewRevocation,
    ReplicaReport,
    ReplicasSeen,
    RevocationPage,
    SessionChange,
    SessionOutcome,
    StoreUnavailableError,
)
from carnet_broker.revocation_view import RevocationHolder
from carnet_broker.session_changes import Said, SessionChanges
from carnet_broker.store_parts import Claim, StoreEvents, StorePorts, StoreTiming, Turns, answer

__all__ = ["StoreEvents", "StoreLoop", "StorePorts", "StoreTiming"]

_AFTER_READING: Final = 0.1
"""Seconds by which the rest of a round gives way to the reading, which verifiers wait for."""
_GATHER_FOR: Final = 0.02
"""Seconds for which what verifiers say is gathered, so that a storm of them is a few transactions."""
_GATHER_LONGER_FOR: Final = 0.25
"""The same for what verifiers say of a revocation, which all of them do: no rotation waits for it."""
_BATCH: Final = 500
"""Changes of sessions in one transaction, about."""
_ASK_WITHIN: Final = 3.0
"""Seconds that whoever asks for a reading waits for it."""
_LOOK_AT_MOST_EVERY: Final = 0.1
"""Seconds between two looks for a newer keyring, however much verifiers have to say."""
_LISTEN_FOR: Final = timedelta(seconds=30)
_CLEAN_EVERY: Final = 600.0
_COUNT_EVERY: Final = 5.0
_EPOCH_AT_MOST_EVERY: Final = 60.0
"""Seconds between two epochs that begin because of what a verifier claims."""
_STOP_WITHIN: Final = 5.0
_PAUSE_AFTER_FAILURE: Final = 0.25


class StoreLoop:
    """Runs round after round in one thread, and `append` in others."""

    def __init__(
        self,
        store: StorePorts,
        holder: RevocationHolder,
        clock: Clock,
        events: StoreEvents,
        *,
        replica_id: str,
        version: str,
        timing: StoreTiming,
        generation: Callable[[], int],
        changed: Callable[[], None],
        newer_keyring: Callable[[], None],
        sessions_written: Callable[[Sequence[SessionChange]], None],
    ) -> None:
        """Wire the parts.

        `generation` is that of the keyring in force here. `changed` hears that the revocations have changed,
        `newer_keyring` that another replica has published a keyring that this one does not have, and `sessions_written`
        what verifiers have said, once the store has it. All are called in threads of the loop and must not wait.
        """
        self._store = store
        self._holder = holder
        self._clock = clock
        self._events = events
        self._replica_id = replica_id
        self._version = version
        self._timing = timing
        self._generation = generation
        self._changed = changed
        self._newer_keyring = newer_keyring
        self._sessions_written = sessions_written
        self._poll_interval = timing.poll_interval.total_seconds()
        self._renew_every = timing.lease.total_seconds() / 3
        self._due = threading.Condition()
        self._reading = Turns()
        self._writing = Turns()
        self._said = SessionChanges()
        self._asked: list[Future[bool]] = []
        self._claims: list[Claim] = []
        self._stopping = False
        self._told = False
        """Whether the store says that something has changed since the last look for a newer keyring."""
        self._looked_at = float("-inf")
        self._renewed_at = float("-inf")
        self._renewed_generation = -1
        self._renewed_epoch = -1
        self._restored = False
        self._counted_at = float("-inf")
        self._cleaned_at = clock.mono()
        self._claimed_at = float("-inf")
        self._generations_seen = (0, 0)
        self._seen: ReplicasSeen | None = None
        self._offset = timedelta(0)
        self._started_at, self._started_mono = clock.now(), clock.mono()
        self._appending = ThreadPoolExecutor(max_workers=4, thread_name_prefix="carnet-revoke")
        self._threads = [
            threading.Thread(target=self._keep_reading, name="carnet-store-read", daemon=True),
            threading.Thread(target=self._keep_writing, name="carnet-store-write", daemon=True),
            threading.Thread(target=self._listen, name="carnet-wakeups", daemon=True),
        ]

    # -- what others see -------------------------------------------------------------------------------------------

    @property
    def failing(self) -> bool:
        """Whether the last round failed."""
        return self._reading.failing or self._writing.failing

    @property
    def clock_offset(self) -> timedelta:
        """How far the wall clock of this machine is from the store's, at least; never negative."""
        return self._offset

    def replicas_seen(self) -> ReplicasSeen | None:
        """Return the replicas as of the last renewal of our lease, None before the first."""
        return self._seen

    def report(
        self, change: SessionChange, told: Callable[[SessionOutcome], None] | None = None, *, soon: bool = True
    ) -> None:
        """Write a change of a session (see `session_changes.Report`)."""
        self._said.add(Said(change, self._clock.mono(), told))
        with self._due:
            self._bring_forward(self._writing, _GATHER_FOR if soon else _GATHER_LONGER_FOR)

    def append(self, entries: Sequence[NewRevocation]) -> Future[Appended]:
        """Make `entries` durable, and put them in force here. The future may raise `StoreUnavailableError`."""
        return self._appending.submit(self._append, tuple(entries))

    async def revoke(self, entries: Sequence[NewRevocation]) -> Appended:
        """Return what `append` returns. Raises `StoreUnavailableError`, after `append_within` at the latest.

        Then it is not known whether the entries were made durable.
        """
        try:
            async with asyncio.timeout(self._timing.append_within.total_seconds()):
                return await asyncio.wrap_future(self.append(entries))
        except TimeoutError as error:
            msg = f"the store did not answer within {self._timing.append_within}"
            raise StoreUnavailableError(msg) from error

    async def read_again(self, claim: Claim | None = None) -> bool:
        """Read the store after this call was made; say whether it answered in time.

        `claim` is what a verifier says that it has seen. Where the store is behind it also then, a new epoch begins;
        once a minute at most.
        """
        asked: Future[bool] = Future()
        with self._due:
            if self._stopping:
                return False
            self._asked.append(asked)
            if claim is not None:
                self._claims.append(claim)
        self.wake(_GATHER_FOR)
        try:
            async with asyncio.timeout(_ASK_WITHIN):
                return await asyncio.wrap_future(asked)
        except TimeoutError:
            return False

    def wake(self, within: float = 0.0) -> None:
        """Do a round within that many seconds: something has changed in the store."""
        with self._due:
            self._told = True
            self._bring_forward(self._reading, within)
            self._bring_forward(self._writing, within + _AFTER_READING)

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Write what is left, end the lease and the threads. A store that hangs is not waited for."""
        with self._due:
            self._stopping = True
            self._due.notify_all()
        self._store.wakeups.close()
        for thread in self._threads:
            thread.join(_STOP_WITHIN)
        self._appending.shutdown(wait=False, cancel_futures=True)

    # -- a round ---------------------------------------------------------------------------------------------------

    def round(self) -> None:
        """Do one round in the calling thread. Raises `StoreUnavailableError`."""
        self._read()
        self._write()
        self._expire()

    def _write(self) -> None:
        """Do what is due of a round but reading the log. The lease first: verifiers may have ever so much to say."""
        mono = self._clock.mono()
        if mono - self._renewed_at >= self._renew_every or self._generation() != self._renewed_generation:
            self._renew()
        self._write_sessions()
        self._look_for_a_newer_keyring(mono)
        if self._seen is not None and mono - self._counted_at >= _COUNT_EVERY:
            self._count_verifiers(self._seen)
            self._counted_at = mono
        if mono - self._cleaned_at >= _CLEAN_EVERY:
            self._store.leases.clean()
            self._cleaned_at = mono

    def _expire(self) -> None:
        elapsed = timedelta(seconds=self._clock.mono() - self._started_mono)
        self._holder.expire(lagging_time(started=self._started_at, elapsed=elapsed, wall=self._clock.now()))

    def _read(self) -> None:
        """Take in what is new in the log; begin a new epoch where the store was restored."""
        with self._due:
            claims, self._claims = self._claims, []
        now, mono = self._clock.now(), self._clock.mono()  # Before the reading: what is read is as new as that.
        view = self._holder.view
        after = None if view is None else view.position
        page = self._store.log.read(after)
        seen, carry = self._what_is_missed(page, after, claims, mono)
        if seen is not None:
            self._events.store_restored(seen, page.position)
            self._store.log.begin_epoch(seen=seen.position, carry=carry, now=now)
            now, mono = self._clock.now(), self._clock.mono()
            page = self._store.log.read(after)
        lacking = self._what_it_lacks(page, after)
        if self._holder.take(page, now=now, mono=mono):
            self._changed()
        if lacking:
            self._append(lacking)
        self._events.revocations_read(page.position, len(self._holder.revocations))

    def _what_is_missed(
        self, page: RevocationPage, after: LogPosition | None, claims: Sequence[Claim], mono: float
    ) -> tuple[Claim | None, tuple[Revocation, ...]]:
        """Return what was seen that the store is behind of, and what is known for certain from before that."""
        found = page.position
        if after is not None and is_behind(found, after):
            return Claim(after, f"replica {self._replica_id}"), self._holder.revocations.entries()
        if after is not None and page.snapshot:
            own = self._holder.revocations.entries()
            if found.epoch == after.epoch and lost_entries(page, own):
                # It was restored, and has gone on beyond what we had seen: other entries, at the same versions.
                return Claim(replace(after, version=found.version + 1), f"replica {self._replica_id}"), own
            return None, ()
        highest = max(claims, key=lambda claim: (claim.position.epoch, claim.position.version), default=None)
        is_due = mono - self._claimed_at >= _EPOCH_AT_MOST_EVERY
        if highest is not None and is_behind(found, highest.position) and is_due:
            self._claimed_at = mono
            return highest, ()  # Each of ours may have come after the restoration.
        return None, ()

    def _what_it_lacks(self, page: RevocationPage, after: LogPosition | None) -> list[NewRevocation]:
        """Return what is to be entered into a log that does not go on from where we were.

        Another replica has begun the epoch, and did not know of all that we know; nor did those who revoked meanwhile.
        """
        if after is None or not page.snapshot:
            return []
        own = self._holder.revocations.entries()
        outrun = outrun_entries(page.entries, own, seen=after.version, now=page.read_at)
        return as_they_were(lost_entries(page, own)) + raised(outrun)

    def _write_sessions(self) -> None:
        """Write what verifiers have said. What cannot be written now stays for the next round."""
        for batch in self._said.batches(_BATCH, everything=self._stopping):
            mono = self._clock.mono()
            try:
                outcomes = self._store.sessions.write([said.aged(mono) for said in batch])
            except BaseException:
                self._said.put_back(batch)
                raise
            for said, outcome in zip(batch, outcomes, strict=True):
                said.tell(outcome)
            self._sessions_written([said.change for said in batch])
        with self._due:
            self._bring_forward(self._writing, _GATHER_LONGER_FOR if len(self._said) else self._poll_interval)

    def _count_verifiers(self, seen: ReplicasSeen) -> None:
        """Tell how many verifiers are live, of all brokers."""
        replicas = {replica.replica_id: replica for replica in seen.replicas}
        self._events.verifiers_counted(len(live_sessions(self._store.sessions.all(), replicas, seen.now)))

    def _renew(self) -> None:
        generation = self._generation()
        before = self._clock.now()
        seen = self._store.leases.renew(
            ReplicaReport(
                replica_id=self._replica_id,
                version=self._version,
                generation=generation,
                revocation_version=self._holder.version,
                lease=self._timing.lease,
                renewed_at=None if self._seen is None else self._seen.now,
            )
        )
        after = self._clock.now()
        self._renewed_at, self._renewed_generation, self._seen = self._clock.mono(), generation, seen
        self._offset = max(before - seen.now, seen.now - after, timedelta(0))
        epoch, self._renewed_epoch = self._renewed_epoch, self._epoch()
        # Where the epoch has changed since, somebody has found out already.
        self._restored = self._restored or (seen.restored and epoch == self._renewed_epoch)
        if self._restored:
            self._begin_epoch()
        self._events.lease_renewed(
            live_replicas=sum(replica.is_live(seen.now) for replica in seen.replicas),
            clock_offset=self._offset.total_seconds(),
        )

    def _epoch(self) -> int:
        view = self._holder.view
        return -1 if view is None else view.position.epoch

    def _begin_epoch(self) -> None:
        """Begin a new epoch although no revocation is missing: sessions are, and with it all verifiers join anew."""
        view = self._holder.view
        if view is not None:
            self._events.store_restored(Claim(view.position, "the store, which has lost leases"), view.position)
            seen = replace(view.position, version=view.position.version + 1)
            # Nothing is carried: each of ours is there, and may have come after the restoration.
            self._store.log.begin_epoch(seen=seen, carry=(), now=self._clock.now())
        self._restored = False
        self.wake()

    def _look_for_a_newer_keyring(self, mono: float) -> None:
        """Look now, or soon where that was done just now: a key that was revoked must not wait for the poll.

        What our own verifiers have said is no reason to look.
        """
        if not self._told and mono - self._looked_at < self._poll_interval:
            return
        pause = self._looked_at + _LOOK_AT_MOST_EVERY - mono
        if pause > 0:
            with self._due:
                self._bring_forward(self._writing, pause)
            return
        self._told = False  # Before the look: what comes after it is another reason.
        mirrored = self._store.mirror.load()
        # Raised comes before Vault has the document, and mirrored after: each of them is news.
        seen = self._store.rollout.state().generation, 0 if mirrored is None else mirrored.generation
        if seen != self._generations_seen and max(seen) > self._generation():
            self._newer_keyring()
        self._generations_seen, self._looked_at = seen, mono

    def _append(self, entries: Sequence[NewRevocation]) -> Appended:
        view = self._holder.view
        appended, too_early = self._store.log.append(entries), tuple[Revocation, ...]()
        given_after = replace(appended.position, version=appended.position.version - len(appended.entries))
        if view is not None and is_behind(given_after, view.position):
            # The store was restored, and gave versions that the `rv` of tokens have already.
            self._events.store_restored(Claim(view.position, f"replica {self._replica_id}"), given_after)
            seen = replace(view.position, version=max(view.position.version, appended.position.version) + 1)
            own = self._holder.revocations.entries()
            self._store.log.begin_epoch(seen=seen, carry=own, now=self._clock.now())
            too_early, appended = appended.entries, self._store.log.append(entries)
        if self._holder.extend(appended):
            self._changed()
        else:
            self.wake()  # Others were first, and their entries are read before ours.
        # What was entered before the epoch, and holds in it as it is, was entered here all the same.
        return replace(appended, entries=(*filter(appended.standing.__contains__, too_early), *appended.entries))

    # -- the threads -----------------------------------------------------------------------------------------------

    def _keep_reading(self) -> None:
        while not self._stopping:
            with self._due:
                asked, self._asked = self._asked, []
                self._reading.due_at = self._clock.mono() + self._poll_interval
            self._attempt(self._reading, self._read_and_expire)
            answer(asked, well=not self._reading.failing)
            self._wait(self._reading)
        with self._due:
            asked, self._asked = self._asked, []
        answer(asked, well=False)

    def _keep_writing(self) -> None:
        while not self._stopping:
            with self._due:
                self._writing.due_at = self._clock.mono() + self._poll_interval
            self._attempt(self._writing, self._write)
            self._wait(self._writing)
        self._attempt(self._writing, self._write)
        try:
            self._store.leases.leave(self._replica_id)
        except StoreUnavailableError as error:
            self._events.store_failed(error)  # The lease ends by itself.

    def _read_and_expire(self) -> None:
        self._read()
        self._expire()

    def _attempt(self, turns: Turns, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - reported; a fault of one round must not end all reading
            turns.failing = True
            self._events.store_failed(error)
        else:
            turns.failing = False
            if not self.failing:
                self._events.store_answered()

    def _bring_forward(self, turns: Turns, within: float) -> None:
        """Have a turn within that many seconds. To be called with the lock."""
        turns.due_at = min(turns.due_at, self._clock.mono() + within)
        self._due.notify_all()

    def _wait(self, turns: Turns) -> None:
        with self._due:
            not_before = self._clock.mono() + (_PAUSE_AFTER_FAILURE if turns.failing else 0.0)
            while not self._stopping and (left := max(turns.due_at, not_before) - self._clock.mono()) > 0:
                self._due.wait(left)

    def _listen(self) -> None:
        while not self._stopping:
            if self._store.wakeups.wait(_LISTEN_FOR):
                self.wake()
