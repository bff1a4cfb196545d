"""What a verifier that watches is sent next, and what it may say of itself. Pure.

Rules
-----
1. A verifier is told what leads from where it is to where this broker is: the key set when its generation is older, and
   the revocations since its version, as a delta. It gets a snapshot when it has nothing, is of another epoch, has
   another digest at its version, or has been away for longer than the entries that are kept.
2. A change is told in parts of a bounded size. All but the last one say `more`: nothing is loaded before the last.
   Each part says the position that the whole change leads to.
3. A verifier that is ahead in the keyring, the epoch or the version is told nothing: it would have to go back.
   This broker reads again what it may have missed, or sends the verifier to another one.
4. What a verifier claims is believed within bounds. A store that was restored is behind what verifiers have seen, so a
   claim of a later version can be true; one of `FARTHEST_CLAIM` more is not.
5. A verifier is silent when `max_staleness` has passed since it last answered: then it refuses all tokens by its own
   rule, and nothing has to wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final

from carnet.claims import is_name
from carnet.revocations import GENESIS_DIGEST, Position, Revocation, next_digest
from carnet_broker.ports import LogPosition

__all__ = [
    "FARTHEST_CLAIM",
    "KEPT_ENTRIES",
    "PART_BYTES",
    "PART_ENTRIES",
    "Change",
    "Hello",
    "HelloError",
    "Push",
    "RevocationTail",
    "Snapshot",
    "Standing",
    "change_from",
    "check_hello",
    "check_position",
    "claim_is_possible",
    "in_parts",
    "is_silent",
    "pushes",
    "standing",
    "told_from",
]

KEPT_ENTRIES: Final = 4096
"""The last entries of the log that are kept for deltas; who has been away for longer gets a snapshot."""
FARTHEST_CLAIM: Final = 1_000_000
"""Versions by which a verifier may be ahead of the store, which a restored backup would explain."""
PART_ENTRIES: Final = 256
PART_BYTES: Final = 32 * 1024
"""The size of a part, about; one entry can have 2 KiB."""

_ENTRY_BYTES: Final = 32
"""What an entry has besides its value."""
_INSTANCE_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST_BYTES: Final = len(GENESIS_DIGEST)
_LAST_NUMBER: Final = 2**53 - 1
_LONGEST_STALENESS: Final = timedelta(days=1)
_SHORTEST_STALENESS: Final = timedelta(milliseconds=100)


# -- where a broker is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RevocationTail:
    """A place in the log of revocations, and the last entries that lead there. Immutable."""

    position: LogPosition
    entries: tuple[Revocation, ...] = ()
    """The last ones, without a gap, up to `position`."""
    digests: tuple[bytes, ...] = ()
    """The running digest before each of `entries`."""

    def followed_by(self, entries: Sequence[Revocation]) -> RevocationTail | None:
        """Return the tail with `entries` after it, None where they do not follow it without a gap."""
        position, digests = self.position, list(self.digests)
        version, digest = position.version, position.digest
        for entry in entries:
            if entry.version != version + 1:
                return None
            digests.append(digest)
            version, digest = entry.version, next_digest(digest, entry)
        kept = (*self.entries, *entries)[-KEPT_ENTRIES:]
        return RevocationTail(LogPosition(position.epoch, version, digest), kept, tuple(digests[-KEPT_ENTRIES:]))

    def since(self, version: int, digest: bytes) -> tuple[Revocation, ...] | None:
        """Return the entries after `version`, None where they are not kept, or lead from another digest."""
        if version == self.position.version:
            return () if digest == self.position.digest else None
        start = version - self.position.version + len(self.entries)
        if not 0 <= start < len(self.entries) or self.digests[start] != digest:
            return None
        return self.entries[start:]


class Standing(StrEnum):
    """Where a verifier is, seen from a broker."""

    FOLLOWS = "follows"
    """Nowhere ahead: it can be told what leads to here."""
    AHEAD_IN_KEYRING = "ahead in the keyring"
    AHEAD_IN_EPOCH = "ahead in the epoch"
    AHEAD_IN_VERSION = "ahead in the version"


def standing(peer: Position | None, generation: int, here: LogPosition) -> Standing:
    """Say where `peer` is (None: nothing loaded), seen from `generation` and `here` (rule 3)."""
    if peer is None:
        return Standing.FOLLOWS
    if peer.epoch > here.epoch:
        return Standing.AHEAD_IN_EPOCH
    if peer.epoch == here.epoch and peer.revocation_version > here.version:
        return Standing.AHEAD_IN_VERSION
    return Standing.AHEAD_IN_KEYRING if peer.generation > generation else Standing.FOLLOWS


def claim_is_possible(peer: Position, here: LogPosition, *, latest_epoch: int) -> bool:
    """Say whether a restored store explains that `peer` is ahead of `here` (rule 4).

    `latest_epoch`: the number that an epoch would have that begins now.
    """
    if peer.epoch == here.epoch:
        return peer.revocation_version - here.version <= FARTHEST_CLAIM
    # A new epoch goes on `FARTHEST_CLAIM` above the highest version seen; the store was restored from before that.
    return peer.epoch <= latest_epoch and peer.revocation_version - here.version <= 3 * FARTHEST_CLAIM


# -- what it is sent ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """One part of what leads from one version of the log to another."""

    from_version: int
    to: LogPosition
    snapshot: bool
    more: bool
    entries: tuple[Revocation, ...]


@dataclass(frozen=True, slots=True)
class Push:
    """One response. Without key set and change it is a heartbeat."""

    position: Position
    """Where the verifier is once it has loaded this and all parts that belong to it."""
    key_set: bool = False
    change: Change | None = None


Snapshot = Callable[[], tuple[LogPosition, Sequence[Revocation]]]


def change_from(peer: LogPosition | None, tail: RevocationTail, snapshot: Snapshot) -> list[Change]:
    """Return the parts that lead from `peer` (None: nothing loaded) to `tail`, or later; none where it is there.

    `snapshot` returns all that is in force, and its position.
    """
    if peer is not None and peer.epoch == tail.position.epoch:
        entries = tail.since(peer.version, peer.digest)
        if entries is not None:
            return _parts(peer.version, tail.position, entries, snapshot=False) if entries else []
    to, everything = snapshot()
    return _parts(0, to, everything, snapshot=True)


def pushes(peer: Position | None, generation: int, tail: RevocationTail, snapshot: Snapshot) -> list[Push]:
    """Return what `peer` is sent now, none where it is up to date (rules 1 and 2). It must be nowhere ahead."""
    log = None if peer is None else LogPosition(peer.epoch, peer.revocation_version, peer.revocation_digest)
    changes = change_from(log, tail, snapshot)
    to = changes[-1].to if changes else tail.position
    position = Position(to.epoch, generation, to.version, to.digest)
    key_set = peer is None or peer.generation < generation
    if not changes:
        return [Push(position, key_set=True)] if key_set else []
    return [Push(position, key_set and number == 0, change) for number, change in enumerate(changes)]


def told_from(peer: Position | None, tail: RevocationTail) -> Position | None:
    """Return `peer` where a delta leads on from it, else None: it is told what one is that has nothing.

    So there is one snapshot, whatever places verifiers claim to be at.
    """
    if peer is None or peer.epoch != tail.position.epoch:
        return None
    return None if tail.since(peer.revocation_version, peer.revocation_digest) is None else peer


def in_parts(entries: Iterable[Revocation]) -> list[tuple[Revocation, ...]]:
    """Return `entries`, divided into parts of a bounded size; one empty part where there are none."""
    parts: list[tuple[Revocation, ...]] = []
    part: list[Revocation] = []
    size = 0
    for entry in entries:
        cost = len(entry.value) + _ENTRY_BYTES
        if part and (len(part) >= PART_ENTRIES or size + cost > PART_BYTES):
            parts.append(tuple(part))
            part, size = [], 0
        part.append(entry)
        size += cost
    return [*parts, tuple(part)]


def _parts(from_version: int, to: LogPosition, entries: Iterable[Revocation], *, snapshot: bool) -> list[Change]:
    parts = in_parts(entries)
    return [Change(from_version, to, snapshot, number < len(parts), part) for number, part in enumerate(parts, start=1)]


# -- what it says of itself --------------------------------------------------------------------------------------------


class HelloError(ValueError):
    """A verifier introduced itself with what cannot be. The message names the field."""


@dataclass(frozen=True, slots=True)
class Hello:
    """How a verifier introduces itself."""

    instance_id: str
    audience: str
    position: Position | None
    max_staleness: timedelta
    accepts_stale: bool


def check_hello(hello: Hello) -> None:
    """Raise `HelloError` unless `hello` is well formed."""
    if _INSTANCE_ID.fullmatch(hello.instance_id) is None:
        msg = 'instance_id: 1 to 64 letters, digits, "-", "_" and "."'
        raise HelloError(msg)
    if not is_name(hello.audience):
        msg = "audience: give the name of one audience"
        raise HelloError(msg)
    if not _SHORTEST_STALENESS <= hello.max_staleness <= _LONGEST_STALENESS:
        msg = "max_staleness: 100 ms to one day"
        raise HelloError(msg)
    if hello.position is not None:
        check_position(hello.position)


def check_position(position: Position) -> None:
    """Raise `HelloError` unless `position` is one that a verifier can be at."""
    numbers = (position.epoch, position.generation, position.revocation_version)
    if len(position.revocation_digest) != _DIGEST_BYTES or not all(0 <= number <= _LAST_NUMBER for number in numbers):
        msg = f"position: numbers up to 2^53 - 1, and a digest of {_DIGEST_BYTES} bytes"
        raise HelloError(msg)


def is_silent(last_answer: float, mono: float, max_staleness: timedelta) -> bool:
    """Say whether a verifier has been silent for too long (rule 5). Times in monotonic seconds."""
    return mono - last_answer >= max_staleness.total_seconds()
