"""What a verifier knows of its issuer: keys and revocations, how far, and how fresh. No clock, no I/O.

Rules (the wire is `protos/carnet/v1/trust.proto`)

1. A position is (epoch, generation, revocation version, digest). Within an epoch no part of it goes back: what is lower
   is not loaded, says nothing of how fresh the knowledge at hand is, and is a reason to ask another replica. Keys and
   revocations are two halves: one that is behind does not keep the other from being loaded.
2. A delta follows from exactly the version at hand, one entry for each version, and its digest is computed again. What
   does not fit is a gap: nothing of it is loaded, and the next Hello asks for everything.
3. A snapshot is loaded as it is told, together with what is at hand and not over: no answer takes a revocation away.
   Only a block may be gone: within an epoch a snapshot without it says that it was lifted.
4. A higher epoch begins with a snapshot: the store was restored. It is loaded as by rule 3, blocks included, and
   counted, for somebody should look. A lower epoch is refused.
5. A change in parts is loaded when its last part is there, and is as fresh as its first.
6. An answer with anything in it that cannot be is refused whole. What is at hand stays.
   An epoch is the time of its beginning, so none is far ahead of the clock here (`MAX_EPOCH_AHEAD`). Within an epoch
   nothing grows by more than brokers can have done since (`MAX_GENERATION_JUMP`, `MAX_VERSION_JUMP`): who believed it
   would find every honest broker behind, and learn nothing more. Knowledge that is too old to decide is like none: it
   may be from long ago, so nothing is too far ahead of it.
7. Staleness is the age that was told, plus the time since this side sent the last word that the broker is known to have
   had before it wrote (`answered`). So an answer that lay in a buffer while a laptop slept does not look fresh.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from carnet.errors import InvalidRevocationError
from carnet.jwk import KeySet
from carnet.keysets import Freshness, KeySetCache, KeySetRules, KeySetSnapshot, Moment
from carnet.revocations import (
    Position,
    Revocation,
    RevocationKind,
    RevocationSet,
    check_entry,
    lagging_time,
    next_digest,
)
from carnet.trust_messages import MAX_ENTRIES, Change, RefusedResponseError, Response

__all__ = [
    "MAX_EPOCH_AHEAD",
    "MAX_GENERATION_JUMP",
    "MAX_VERSION_JUMP",
    "Outcome",
    "SavedTrust",
    "TrustState",
    "VerifierStatus",
]

MAX_EPOCH_AHEAD: Final = timedelta(days=1)
"""How far ahead of the wall clock here an epoch may begin. Its number is the milliseconds since 1970 at its beginning,
or one more than the epoch before. With clocks that are a day apart no token is good anyway: it seems to be issued in
the future, or over."""
MAX_GENERATION_JUMP: Final = 10_000
"""Generations between two answers. A rotation has about four, and needs a write to Vault for each."""
MAX_VERSION_JUMP: Final = MAX_ENTRIES
"""Revocations between two answers. A broker believes as much of what a verifier claims, and begins a new epoch above it
otherwise: so a verifier that was lied to finds its way back."""

_NOTHING: Final = timedelta()
_CLEAN_EVERY: Final = timedelta(minutes=1)
_DIGEST_BYTES: Final = 32
_LAST_NUMBER: Final = 2**53 - 1  # As for revocations: the last whole number that every JSON reader keeps exact.
_UNIX_START: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


class Outcome(StrEnum):
    """What came of a response."""

    LOADED = "loaded"
    CURRENT = "current"
    """Nothing new, but fresh."""
    PART = "part"
    """The rest has yet to come."""
    BEHIND = "behind"
    """The broker knows less than this side does, in one half at least."""


@dataclass(frozen=True, slots=True)
class SavedTrust:
    """What outlives a process."""

    position: Position
    keys: KeySet
    max_age: timedelta
    entries: tuple[Revocation, ...]
    age: timedelta
    """How old it is."""


@dataclass(frozen=True, slots=True)
class VerifierStatus:
    """How a verifier is doing, for health pages and metrics."""

    epoch: int
    """0 as long as no broker told of revocations."""
    generation: int
    """0 as long as there is no key set."""
    revocation_version: int
    revocations: int
    """How many are in force here."""
    staleness: timedelta | None
    """None as long as there is nothing that could decide."""
    usable: bool
    """Whether tokens can be verified."""
    supply: str
    """``push`` by a stream, ``poll`` by questions, ``await`` before the first answer."""
    target: str | None
    """The broker whose stream is open, None where there is none."""
    live: bool
    """Whether rotations wait for this verifier."""
    new_epochs: int
    """How often a broker said that the store was restored. Somebody should look."""
    last_error: str
    """What the last attempt failed of; empty after a good one."""


class TrustState:
    """The state of one verifier. One writer under its lock; `keys.usable`, `revocations` and `revision` need none."""

    def __init__(self, rules: KeySetRules, *, issuer: str, now: Moment, follows_revocations: bool) -> None:
        self.keys = KeySetCache(rules, issuer=issuer, follows_revocations=follows_revocations)
        self.revocations = RevocationSet()
        self.revision = 0
        """Grows with each change of the revocations."""
        self.new_epochs = 0
        self.wants_all = False
        """Whether the next Hello must ask for a snapshot (rule 2)."""
        self._rules = rules
        self._issuer = issuer
        self._epoch = 0
        self._version = 0
        self._digest = b""
        self._started = now
        self._cleaned = now

    @property
    def max_staleness(self) -> timedelta:
        """How old knowledge may be."""
        return self._rules.max_staleness

    @property
    def position(self) -> Position | None:
        """What is loaded, None before the first revocations (which may be none) are."""
        if not self._epoch:
            return None
        return Position(self._epoch, self.keys.generation, self._version, self._digest)

    def apply(self, response: Response, *, asked_at: Moment, now: Moment, of_keys: bool = True) -> Outcome:
        """Load a whole response. Raises `RefusedResponseError`, and then has loaded nothing of it.

        `of_keys`: whether it says anything of keys. An answer to a poll for revocations does not.
        """
        told = response.position
        if not of_keys:
            response = replace(response, position=replace(told, generation=self.keys.generation))
        if response.age < _NOTHING:
            msg = f"the broker says that its knowledge is {response.age} old"
            raise RefusedResponseError(msg)
        new_epoch = self._check_epoch(response, now)
        entries = self._checked(response, new_epoch=new_epoch)
        freshness = Freshness(response.age, asked_at)
        keys = self._take_keys(response, freshness, now, new_epoch=new_epoch) if of_keys else Outcome.CURRENT
        if told.epoch < self._epoch:
            return Outcome.BEHIND
        taken = self._take_change(told, response.change, entries, freshness, now, new_epoch=new_epoch)
        self._clean(now)
        for outcome in (Outcome.BEHIND, Outcome.LOADED):
            if outcome in {keys, taken}:
                return outcome
        return Outcome.CURRENT

    def status(self, now: Moment, *, target: str | None, live: bool, last_error: str = "") -> VerifierStatus:
        """Return how it is."""
        return VerifierStatus(
            epoch=self._epoch,
            generation=self.keys.generation,
            revocation_version=self._version,
            revocations=len(self.revocations),
            staleness=self.keys.staleness(now),
            usable=self.keys.usable(now) is not None,
            supply=self.keys.supply.value,
            target=target,
            live=live and target is not None,
            new_epochs=self.new_epochs,
            last_error=last_error,
        )

    def saved(self, now: Moment) -> SavedTrust | None:
        """Return what is worth keeping, None where there is not enough to decide with."""
        snapshot, position, age = self.keys.snapshot, self.position, self.keys.staleness(now)
        if snapshot is None or position is None or age is None:
            return None
        return SavedTrust(position, snapshot.keys, snapshot.max_age, self.revocations.entries(), age)

    def restore(self, saved: SavedTrust, now: Moment) -> None:
        """Begin with what another process left. Only where nothing is loaded yet."""
        freshness = Freshness(saved.age, now)
        position = saved.position
        self.keys.load(KeySetSnapshot(self._issuer, position.generation, saved.keys, saved.max_age, freshness.age, now))
        self.keys.told_revocations(freshness, now)
        self._load(position, RevocationSet(saved.entries))

    def _check_epoch(self, response: Response, now: Moment) -> bool:
        """Say whether the response begins a new epoch. Refuses a position that cannot be (rule 6)."""
        told, change = response.position, response.change
        if told.epoch < 1:
            msg = "the broker names no epoch"
            raise RefusedResponseError(msg)
        if max(told.generation, told.revocation_version) > _LAST_NUMBER:
            msg = f"the broker names generation {told.generation} and revocation {told.revocation_version}"
            raise RefusedResponseError(msg)
        new_epoch = told.epoch > self._epoch
        if new_epoch:
            _check_begun(told.epoch, now.wall)
        elif told.epoch == self._epoch:
            self._check_jump(told, now)
        if new_epoch and (change is None or not change.snapshot):
            msg = f"the broker is in epoch {told.epoch}, this side in {self._epoch}, and it gave no snapshot"
            raise self._gap(msg)
        return new_epoch

    def _check_jump(self, told: Position, now: Moment) -> None:
        age = self.keys.staleness(now)
        if age is None or age > self._rules.max_staleness:
            return
        for what, to, at_hand, most in (
            ("generation", told.generation, self.keys.generation, MAX_GENERATION_JUMP),
            ("revocation", told.revocation_version, self._version, MAX_VERSION_JUMP),
        ):
            if to - at_hand > most:
                msg = (
                    f"the broker names {what} {to}, {at_hand} is loaded, and it cannot have had more than {most} since"
                )
                raise RefusedResponseError(msg)

    def _checked(self, response: Response, *, new_epoch: bool) -> tuple[Revocation, ...]:
        """Return the entries of the change, checked (rules 2 and 6)."""
        told, change = response.position, response.change
        self._check_keys(response, new_epoch=new_epoch)
        if change is None:
            if told.epoch == self._epoch and told.revocation_version > self._version:
                msg = (
                    f"the broker has revocation {told.revocation_version}, {self._version} is loaded, and it gave none"
                )
                raise self._gap(msg)
            same_version = told.epoch == self._epoch and told.revocation_version == self._version
            if same_version and told.revocation_digest != self._digest:
                msg = f"the broker knows other revocations up to {told.revocation_version} than this side"
                raise self._gap(msg)
            return ()
        if (told.revocation_version, told.revocation_digest) != (change.to_version, change.to_digest):
            msg = f"the change leads to revocation {change.to_version}, the position is {told.revocation_version}"
            raise RefusedResponseError(msg)
        if len(change.to_digest) != _DIGEST_BYTES or len(change.entries) > MAX_ENTRIES:
            msg = f"the change has {len(change.entries)} entries and a digest of {len(change.to_digest)} bytes"
            raise RefusedResponseError(msg)
        for entry in change.entries:
            try:
                check_entry(entry)
            except InvalidRevocationError as error:
                raise RefusedResponseError(str(error)) from error
            if entry.version > change.to_version:
                msg = f"revocation {entry.version} is in a change that leads to {change.to_version}"
                raise RefusedResponseError(msg)
        if not change.snapshot and told.epoch == self._epoch and change.to_version > self._version:
            self._check_chain(change)
        return change.entries

    def _check_chain(self, change: Change) -> None:
        if change.from_version != self._version:
            msg = f"the delta is one from revocation {change.from_version}, and {self._version} is loaded"
            raise self._gap(msg)
        digest = self._digest
        for version, entry in enumerate(change.entries, self._version + 1):
            if entry.version != version:
                msg = f"revocation {version} is missing in the delta"
                raise self._gap(msg)
            digest = next_digest(digest, entry)
        if self._version + len(change.entries) != change.to_version or digest != change.to_digest:
            msg = f"the delta to revocation {change.to_version} does not lead to the digest that it names"
            raise self._gap(msg)

    def _check_keys(self, response: Response, *, new_epoch: bool) -> None:
        told, keys = response.position, response.keys
        if keys is None:
            if told.generation > self.keys.generation or (new_epoch and told.generation < self.keys.generation):
                msg = f"the broker has generation {told.generation}, {self.keys.generation} is loaded, and it gave none"
                raise self._gap(msg)
        elif keys.generation != told.generation:
            msg = f"the key set is of generation {keys.generation}, the position of {told.generation}"
            raise RefusedResponseError(msg)
        elif keys.issuer != self._issuer or keys.max_age <= _NOTHING:
            msg = f"the key set is of issuer {keys.issuer[:200]!r} with max-age {keys.max_age}: check CARNET_ISSUER"
            raise RefusedResponseError(msg)

    def _take_keys(self, response: Response, freshness: Freshness, now: Moment, *, new_epoch: bool) -> Outcome:
        told, keys = response.position, response.keys
        if told.epoch < self._epoch or (told.generation < self.keys.generation and not new_epoch):
            return Outcome.BEHIND
        if keys is None:
            self.keys.confirm(freshness, now)
            return Outcome.CURRENT
        snapshot = KeySetSnapshot(
            keys.issuer, keys.generation, keys.keys, keys.max_age, freshness.age, freshness.asked_at
        )
        self.keys.load(snapshot, new_epoch=new_epoch)
        return Outcome.LOADED

    def _take_change(
        self,
        told: Position,
        change: Change | None,
        entries: tuple[Revocation, ...],
        freshness: Freshness,
        now: Moment,
        *,
        new_epoch: bool,
    ) -> Outcome:
        lower = told.revocation_version < self._version or (
            change is not None and not change.snapshot and change.to_version == self._version
        )
        if lower and not new_epoch:
            return Outcome.BEHIND
        if change is None:
            self.keys.told_revocations(freshness, now)
            return Outcome.CURRENT
        if not change.snapshot:
            self.revocations.add(entries)
            self._load(told, self.revocations)
        else:
            self._clean(now, at_once=True)
            kept = [
                entry
                for entry in self.revocations.entries()
                if new_epoch or entry.version > told.revocation_version or entry.kind is not RevocationKind.BLOCK
            ]
            united = RevocationSet(entries)
            united.add(kept)
            self.new_epochs += new_epoch and self._epoch > 0
            self.wants_all = False
            self._load(told, united)
        self.keys.told_revocations(freshness, now)
        return Outcome.LOADED

    def _load(self, told: Position, revocations: RevocationSet) -> None:
        self.revocations = revocations
        self._epoch, self._version, self._digest = told.epoch, told.revocation_version, told.revocation_digest
        self.keys.follows_revocations = True  # Whoever was told once must go on being told.
        self.revision += 1

    def _clean(self, now: Moment, *, at_once: bool = False) -> None:
        """Drop what is over, by a time that a wall clock which jumps ahead cannot move."""
        if not at_once and now.since(self._cleaned) < _CLEAN_EVERY:
            return
        self._cleaned = now
        self.revocations.expire(self._lagging(now))

    def _lagging(self, now: Moment) -> datetime:
        elapsed = timedelta(seconds=now.monotonic - self._started.monotonic)
        return lagging_time(started=self._started.wall, elapsed=elapsed, wall=now.wall)

    def _gap(self, message: str) -> RefusedResponseError:
        self.wants_all = True
        return RefusedResponseError(message, gap=True)


def _check_begun(epoch: int, wall: datetime) -> None:
    """Refuse an epoch that begins too far ahead of the clock here (rule 6)."""
    ahead = epoch - (wall - _UNIX_START) // _MILLISECOND
    if ahead > MAX_EPOCH_AHEAD // _MILLISECOND:
        hours = ahead // (timedelta(hours=1) // _MILLISECOND)
        msg = (
            f"the broker names epoch {epoch}, which begins {hours} hours ahead of the clock of this host"
            f" ({wall:%Y-%m-%dT%H:%M:%SZ}): set that clock if it is behind; if it is right, the broker lies, or a"
            " broker's clock was ahead when its store began"
        )
        raise RefusedResponseError(msg)
