"""The ports of the shared store in memory, for tests of what stands on it.

`FakeStoreData` is the database, `FakeStoreData.open` a broker's way to it. It passes the same contract suite as the
real ones. The clock is an argument. `FakeStoreData.down` makes every call fail, `copy` and `restore` are a backup.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind
from carnet_broker.core.lost_entries import epoch_of, outrun_entries, raised
from carnet_broker.core.mirror import MirrorSignature
from carnet_broker.core.rollout import (
    Permit,
    ReplicaLease,
    RolloutState,
    VerifierSession,
    has_forgotten,
    laggards,
    live_sessions,
    recount_ends,
    recounts_for_a_claim,
)
from carnet_broker.edges.store.cleaning import KEPT, SETTLED, SlowClock
from carnet_broker.edges.store.entries import EPOCH_JUMP, chained, entered, follows, lacking, numbered
from carnet_broker.edges.store.replicas import was_forgotten
from carnet_broker.ports import (
    Acknowledged,
    Appended,
    Joined,
    Left,
    LogPosition,
    MirroredKeyring,
    NewRevocation,
    ReplicaReport,
    ReplicasSeen,
    RevocationPage,
    SessionChange,
    SessionOutcome,
    StoreUnavailableError,
    WaitingFor,
)

__all__ = ["FakeStore", "FakeStoreData"]

_Key = tuple[str, str]


@dataclass(slots=True)
class _Tables:
    position: LogPosition
    entries: list[Revocation] = field(default_factory=list)
    sessions: dict[_Key, tuple[str, VerifierSession]] = field(default_factory=dict)
    """With the stream of each."""
    rollout: RolloutState = field(
        default_factory=lambda: RolloutState(generation=0, kid="", raised_at=None, permit=None)
    )
    permit: Permit | None = None
    restored_at: datetime | None = None
    replicas: dict[str, ReplicaLease] = field(default_factory=dict)
    mirror: tuple[int, str, MirrorSignature | None, datetime] | None = None


class FakeStoreData:
    """What all brokers share. Thread-safe."""

    def __init__(
        self,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        elapsed: Callable[[], timedelta] = timedelta,
        sessions_per_identity: int = 200,
    ) -> None:
        """`now` is the store's clock, `elapsed` a monotonic one, for cleaning."""
        self.now = now
        self.elapsed = elapsed
        self.sessions_per_identity = sessions_per_identity
        self.down = False
        """Set it and every call raises `StoreUnavailableError`."""
        self._lock = threading.RLock()
        self._tables = _Tables(LogPosition(epoch=epoch_of(now()), version=0, digest=GENESIS_DIGEST))
        self._wakeups: list[FakeWakeups] = []

    def open(self, *, notify: bool = True, settled: timedelta = SETTLED) -> FakeStore:
        """Return one broker's way to the store."""
        return FakeStore(self, notify=notify, settled=settled)

    def copy(self) -> object:
        """Return a backup."""
        with self._lock:
            return copy.deepcopy(self._tables)

    def restore(self, backup: object) -> None:
        """Put a backup in place of what there is."""
        assert isinstance(backup, _Tables)
        with self._lock:
            self._tables = copy.deepcopy(backup)

    @contextmanager
    def transaction(self) -> Iterator[_Tables]:
        """Run the block alone."""
        with self._lock:
            if self.down:
                msg = "the shared store cannot be used now"
                raise StoreUnavailableError(msg)
            yield self._tables

    def wake(self, store: FakeStore) -> None:
        """Wake those that wait, and where `store` does not notify only its own."""
        with self._lock:
            waiting = list(self._wakeups)
        for wakeups in waiting:
            if store.notify or wakeups.store is store:
                wakeups.wake()

    def attach(self, wakeups: FakeWakeups) -> None:
        """Have `wakeups` woken from now on."""
        with self._lock:
            self._wakeups.append(wakeups)

    def detach(self, wakeups: FakeWakeups) -> None:
        """Have `wakeups` woken no more."""
        with self._lock:
            self._wakeups = [other for other in self._wakeups if other is not wakeups]


class FakeStore:
    """One broker's way to the store: the same attributes as `edges.store.SharedStore`."""

    def __init__(self, data: FakeStoreData, *, notify: bool = True, settled: timedelta = SETTLED) -> None:
        self.data = data
        self.notify = notify
        self.revocations = FakeRevocations(self)
        self.sessions = FakeSessions(self)
        self.rollout = FakeRollout(self)
        self.replicas = FakeReplicas(self, SlowClock(settled))
        self.mirror = FakeMirror(self)
        self._opened: list[FakeWakeups] = []
        self.wakeups = self.open_wakeups()

    def prepare(self) -> None:
        """Raise `StoreUnavailableError` when the store is down."""
        with self.data.transaction():
            pass

    def open_wakeups(self) -> FakeWakeups:
        """Return one more `ports.Wakeups`, for another thread."""
        wakeups = FakeWakeups(self)
        self._opened.append(wakeups)
        return wakeups

    def close(self) -> None:
        """End all waits."""
        for wakeups in self._opened:
            wakeups.close()

    def changed(self) -> None:
        """Wake whom it may concern."""
        self.data.wake(self)


class FakeWakeups:
    """`ports.Wakeups`."""

    def __init__(self, store: FakeStore) -> None:
        self.store = store
        self._woken = threading.Event()
        self._closed = False
        store.data.attach(self)

    def wait(self, timeout: timedelta) -> bool:
        """Return True when something may have changed, False after `timeout` and when closed."""
        woken = self._woken.wait(timeout.total_seconds())
        if not self._closed:
            self._woken.clear()
        return woken and not self._closed

    def wake(self) -> None:
        """End the wait that is under way, or the next one."""
        self._woken.set()

    def close(self) -> None:
        """End each wait."""
        self._closed = True
        self._woken.set()
        self.store.data.detach(self)


class FakeRevocations:
    """`ports.RevocationLog`."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store

    def append(self, entries: Sequence[NewRevocation]) -> Appended:
        """Enter `entries`."""
        with self._store.data.transaction() as tables:
            pairs, standing = entered(entries, tables.entries, tables.position.version)
            written = tuple(entry for entry, _ in pairs)
            tables.entries.extend(written)
            tables.position = _after(tables.position, written)
            appended = Appended(written, tables.position, self._store.data.now(), standing)
        if written:
            self._store.changed()
        return appended

    def read(self, after: LogPosition | None) -> RevocationPage:
        """Return what came after `after`, or all."""
        with self._store.data.transaction() as tables:
            now = self._store.data.now()
            entries = list(tables.entries)
            if after is not None:
                later = [entry for entry in entries if entry.version > after.version]
                if follows(after, later, tables.position):
                    return RevocationPage(position=tables.position, snapshot=False, entries=tuple(later), read_at=now)
            return RevocationPage(position=tables.position, snapshot=True, entries=tuple(entries), read_at=now)

    def begin_epoch(self, *, seen: LogPosition, carry: Sequence[Revocation], now: datetime) -> LogPosition:
        """Begin a new epoch where the store is not a later state of what was `seen`."""
        with self._store.data.transaction() as tables:
            log = tables.position
            later = [entry for entry in tables.entries if entry.version > seen.version]
            later_life = log.epoch > seen.epoch and log.version >= seen.version
            if later_life or follows(seen, later, log) is not False:
                return log
            start = LogPosition(
                epoch=max(epoch_of(now), log.epoch + 1, seen.epoch + 1),
                version=max(log.version, seen.version) + EPOCH_JUMP,
                digest=GENESIS_DIGEST,
            )
            missing = lacking(carry, tables.entries, now)
            carried = [replace(entry, version=version) for version, entry in enumerate(missing, start.version + 1)]
            outrun = raised(outrun_entries(tables.entries, carry, seen=start.version, now=now))
            carried += [numbered(new, version) for version, new in enumerate(outrun, start.version + len(carried) + 1)]
            tables.entries.extend(carried)
            if recounts_for_a_claim(tables.restored_at, self._store.data.now()):
                tables.restored_at = self._store.data.now()
            tables.position = _after(start, carried)
            position = tables.position
        self._store.changed()
        return position


class FakeSessions:
    """`ports.VerifierSessions`."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store

    def write(self, changes: Sequence[SessionChange]) -> Sequence[SessionOutcome]:
        """Enter the changes."""
        with self._store.data.transaction() as tables:
            before = dict(tables.sessions)
            outcomes = tuple(self._enter(tables, change) for change in changes)
            changed = before != tables.sessions
        if changed:
            self._store.changed()
        return outcomes

    def all(self) -> Sequence[VerifierSession]:
        """Return every session."""
        with self._store.data.transaction() as tables:
            return tuple(session for _, (_, session) in sorted(tables.sessions.items()))

    def _enter(self, tables: _Tables, change: SessionChange) -> SessionOutcome:
        now = self._store.data.now()
        required = tables.rollout.generation
        if isinstance(change, Joined):
            return self._join(tables, change, now)
        not_live = SessionOutcome(live=False, required_generation=max(required, 1))
        key = (change.spiffe_id, change.instance_id)
        stream, session = tables.sessions.get(key, ("", None))
        if session is None or stream != change.stream:
            return not_live
        if isinstance(change, Left):
            del tables.sessions[key]
            return not_live
        tables.sessions[key] = (stream, _acknowledged(session, change, required, now))
        return SessionOutcome(live=True)

    def _join(self, tables: _Tables, change: Joined, now: datetime) -> SessionOutcome:
        session = change.session
        if session.generation < tables.rollout.generation:
            return SessionOutcome(live=False, required_generation=tables.rollout.generation)
        key = (session.spiffe_id, session.instance_id)
        ends = {replica_id: replica.ends_at for replica_id, replica in tables.replicas.items()}
        others = [other for at, (_, other) in tables.sessions.items() if at[0] == key[0] and at != key]
        if len(others) >= self._store.data.sessions_per_identity:
            others = [
                one for one in others if one.replica_id in ends and now < ends[one.replica_id] + one.max_staleness
            ]
        if len(others) >= self._store.data.sessions_per_identity:
            return SessionOutcome(live=False)
        tables.sessions[key] = (
            change.stream,
            replace(session, generation_at=now, revocation_at=now, lagging=False),
        )
        return SessionOutcome(live=True)


class FakeRollout:
    """`ports.Rollout`."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store

    def raise_to(self, generation: int, kid: str) -> None:
        """Raise the rollout; it never goes down."""
        with self._store.data.transaction() as tables:
            row, permit = tables.rollout, tables.permit
            if generation == row.generation and (permit is None or permit.generation != generation):
                tables.rollout = replace(row, kid=kid)
            elif generation > row.generation:
                _raise(tables, generation, kid, self._store.data.now())
        self._store.changed()

    def permit(
        self, generation: int, kid: str, *, overdue: bool, seen: Sequence[ReplicaLease] = ()
    ) -> Permit | WaitingFor:
        """Give the permit, or name those that it waits for."""
        with self._store.data.transaction() as tables:
            now = self._store.data.now()
            given = tables.permit
            if given is not None and given.generation == generation:
                return replace(given, repeated=True) if given.kid == kid else WaitingFor(laggards=())
            if generation > tables.rollout.generation:
                _raise(tables, generation, kid, now)
            sessions = [session for _, session in tables.sessions.values()]
            restored_at, leases = tables.restored_at, tables.replicas
            recounts = restored_at is not None and now < recount_ends(restored_at, sessions, leases.values())
            if recounts or has_forgotten(leases, seen):
                return WaitingFor(laggards=())
            late = laggards(live_sessions(sessions, tables.replicas, now), generation)
            if late and not overdue:
                return WaitingFor(laggards=tuple(late))
            for session in late:
                key = (session.spiffe_id, session.instance_id)
                tables.sessions[key] = (tables.sessions[key][0], replace(session, lagging=True))
            permit = Permit(generation=generation, kid=kid, given_at=now, overdue=bool(late))
            tables.permit = permit
        self._store.changed()
        return permit

    def state(self) -> RolloutState:
        """Return the rollout, and its permit."""
        with self._store.data.transaction() as tables:
            row, permit = tables.rollout, tables.permit
            named = permit is not None and (permit.generation, permit.kid) == (row.generation, row.kid)
            return replace(row, permit=permit if named else None)


class FakeReplicas:
    """`ports.ReplicaLeases`."""

    def __init__(self, store: FakeStore, clock: SlowClock) -> None:
        self._store = store
        self._clock = clock

    def renew(self, report: ReplicaReport) -> ReplicasSeen:
        """Renew the lease."""
        with self._store.data.transaction() as tables:
            now = self._store.data.now()
            before = tables.replicas.get(report.replica_id)
            known = before is not None and before.generation == report.generation
            restored = was_forgotten(report, None if before is None else before.renewed_at, now)
            if restored:
                tables.restored_at = now
            tables.replicas[report.replica_id] = ReplicaLease(
                replica_id=report.replica_id,
                version=report.version,
                generation=report.generation,
                generation_at=before.generation_at if before is not None and known else now,
                revocation_version=report.revocation_version,
                renewed_at=now,
                lease=report.lease,
            )
            leases = tuple(lease for _, lease in sorted(tables.replicas.items()))
        seen = ReplicasSeen(now=now, replicas=leases, restored=restored)
        if not known or restored:
            self._store.changed()
        return seen

    def leave(self, replica_id: str) -> None:
        """End the lease now."""
        with self._store.data.transaction() as tables:
            now = self._store.data.now()
            lease = tables.replicas.get(replica_id)
            if lease is not None and lease.is_live(now):
                tables.replicas[replica_id] = replace(lease, renewed_at=now, lease=timedelta())
        self._store.changed()

    def clean(self) -> int:
        """Delete what has ended for long enough."""
        data = self._store.data
        with data.transaction() as tables:
            now = self._clock.time(data.now(), elapsed=data.elapsed())
            if now is None:
                return 0
            before = now - KEPT
            rows = len(tables.entries) + len(tables.sessions) + len(tables.replicas)
            over = {entry for entry in tables.entries if entry.expires_at is not None and entry.expires_at < before}
            lifts = {entry.value: entry.version for entry in over if entry.kind is RevocationKind.LIFT}
            tables.entries = [
                entry
                for entry in tables.entries
                if entry not in over
                and not (entry.kind is RevocationKind.BLOCK and entry.version < lifts.get(entry.value, 0))
            ]
            for lease in [lease for lease in tables.replicas.values() if lease.ends_at < before]:
                of_it = {at: s for at, (_, s) in tables.sessions.items() if s.replica_id == lease.replica_id}
                gone = [at for at, session in of_it.items() if session.max_staleness < before - lease.ends_at]
                for at in gone:
                    del tables.sessions[at]
                if len(gone) == len(of_it):
                    del tables.replicas[lease.replica_id]
            return rows - len(tables.entries) - len(tables.sessions) - len(tables.replicas)


class FakeMirror:
    """`ports.KeyringMirror`."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store

    def save(self, generation: int, content: dict[str, Any], signature: MirrorSignature | None) -> None:
        """Keep `content`, unless a later generation is there."""
        with self._store.data.transaction() as tables:
            text, there = json.dumps(content, sort_keys=True), tables.mirror
            changed = there is None or (there[0] <= generation and there[:3] != (generation, text, signature))
            if changed:
                tables.mirror = (generation, text, signature, self._store.data.now())
        if changed:
            self._store.changed()

    def load(self) -> MirroredKeyring | None:
        """Return what was kept last."""
        with self._store.data.transaction() as tables:
            if tables.mirror is None:
                return None
            generation, content, signature, saved_at = tables.mirror
            now = self._store.data.now()
        return MirroredKeyring(
            generation=generation, content=json.loads(content), saved_at=saved_at, read_at=now, signature=signature
        )


def _after(position: LogPosition, entries: Sequence[Revocation]) -> LogPosition:
    return replace(position, version=position.version + len(entries), digest=chained(position.digest, entries))


def _raise(tables: _Tables, generation: int, kid: str, now: datetime) -> None:
    tables.rollout = RolloutState(generation=generation, kid=kid, raised_at=now, permit=None)


def _acknowledged(session: VerifierSession, change: Acknowledged, required: int, now: datetime) -> VerifierSession:
    at = now - max(change.ago, timedelta())
    if change.generation > session.generation:
        session = replace(session, generation=change.generation, generation_at=at)
    if change.revocation_version > session.revocation_version:
        session = replace(session, revocation_version=change.revocation_version, revocation_at=at)
    return replace(session, lagging=session.lagging and session.generation < required)
