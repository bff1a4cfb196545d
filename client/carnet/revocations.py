"""Revocations: what they name, how long they last, and which tokens they refuse. Pure: no clock, no I/O.

Rules
-----
1. The log of revocations is one sequence; versions grow by one with each entry, and never go back within an epoch.
   `next_digest` chains the entries, so two sides with the same version and digest know the same.
2. A TOKEN is refused by its jti, never by its text: a signature has more than one spelling (ECDSA is malleable).
3. A SUBJECT is refused by version: the token says in `rv` which revocations its issuer had applied. No clock has a say
   in what was issued before and what after.
4. A BLOCK refuses every token of its subject until a LIFT of a higher version.
5. An entry leaves a set when nothing is left that it could refuse, and not before: `expire` wants a time that does not
   run ahead (`lagging_time`).
6. Of entries that refuse the same, the one that refuses longest and most stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from carnet.certificate_names import is_certificate_name
from carnet.claims import Claims, is_token_id
from carnet.errors import InvalidIdentityError, InvalidRevocationError
from carnet.spiffe import SpiffeID

__all__ = [
    "GENESIS_DIGEST",
    "Position",
    "Revocation",
    "RevocationKind",
    "RevocationSet",
    "check_entry",
    "lagging_time",
    "next_digest",
]

GENESIS_DIGEST: Final = bytes(32)
"""The digest of an epoch before its first entry."""

_LAST_VERSION: Final = 2**53 - 1  # As for `rv`: the last whole number that every JSON reader keeps exact (RFC 8259).
_EPOCH_START: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND: Final = timedelta(seconds=1)


class RevocationKind(StrEnum):
    """What a revocation names."""

    TOKEN = "token"  # noqa: S105 - no secret
    """One token, by its jti."""
    SUBJECT = "subject"
    """The tokens of one SPIFFE ID whose `rv` is below `before_version`: no clock has a say in it."""
    CERTIFICATE = "certificate"
    """The tokens that are bound to one certificate."""
    ROOT = "root"
    """A token and all that were derived from it, by the jti of the first."""
    BLOCK = "block"
    """All tokens of one SPIFFE ID, until lifted."""
    LIFT = "lift"
    """Ends a block; the tokens whose `rv` is below `before_version` stay refused."""


_BY_TOKEN: Final = frozenset({RevocationKind.TOKEN, RevocationKind.ROOT})
_BY_SUBJECT: Final = frozenset({RevocationKind.SUBJECT, RevocationKind.BLOCK, RevocationKind.LIFT})
_FINAL: Final = frozenset({RevocationKind.BLOCK, RevocationKind.LIFT})
"""Of these two the latest decides: what comes before it is over, and must not come back."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """One entry of the log of revocations."""

    version: int
    """Grows by one with each entry of an epoch."""
    kind: RevocationKind
    value: str
    """A jti, a SPIFFE ID, or a certificate in one of the forms of `certificate_names`."""
    before_version: int
    """For SUBJECT, BLOCK and LIFT; 0 for the others."""
    expires_at: datetime | None
    """From here on nothing is left to refuse: aware UTC, whole seconds. None for a BLOCK that lasts until lifted."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a verifier or a broker has got. Within an epoch no part of it goes back."""

    epoch: int
    """Names one life of the shared store; a restored one begins a new, higher one."""
    generation: int
    """The version of the keyring."""
    revocation_version: int
    revocation_digest: bytes
    """The running hash over all revocations of the epoch up to that version: `next_digest`."""


def next_digest(previous: bytes, entry: Revocation) -> bytes:
    """Return the digest after `entry`, where the one before it was `previous`: SHA-256 over both."""
    seconds = "" if entry.expires_at is None else str((entry.expires_at - _EPOCH_START) // _SECOND)
    # No part can hold a line break: `check_entry`. So no two entries have one text.
    text = f"{entry.version}\n{entry.kind}\n{entry.value}\n{entry.before_version}\n{seconds}"
    return hashlib.sha256(previous + text.encode("ascii")).digest()


def check_entry(entry: Revocation) -> None:
    """Raise `InvalidRevocationError` for an entry that cannot be: wrong value for its kind, versions or end."""
    if not 0 < entry.version <= _LAST_VERSION:
        msg = f"the revocation has version {entry.version}"
        raise InvalidRevocationError(msg)
    if entry.kind in _BY_TOKEN:
        sound = is_token_id(entry.value)
    elif entry.kind in _BY_SUBJECT:
        sound = _is_spiffe_id(entry.value)
    else:
        sound = is_certificate_name(entry.value)
    if not sound:
        msg = f"revocation {entry.version} of kind {entry.kind} cannot name {entry.value[:80]!r}"
        raise InvalidRevocationError(msg)
    by_version = entry.kind in _BY_SUBJECT
    if not (0 < entry.before_version <= _LAST_VERSION if by_version else entry.before_version == 0):
        msg = f"revocation {entry.version} of kind {entry.kind} cannot have before_version {entry.before_version}"
        raise InvalidRevocationError(msg)
    ends = entry.expires_at
    if ends is None and entry.kind is not RevocationKind.BLOCK:
        msg = f"revocation {entry.version} of kind {entry.kind} has no end"
        raise InvalidRevocationError(msg)
    if ends is not None and (ends.utcoffset() != timedelta() or ends.microsecond):
        msg = f"revocation {entry.version} ends at {ends}, which is not a whole second in UTC"
        raise InvalidRevocationError(msg)


def lagging_time(*, started: datetime, elapsed: timedelta, wall: datetime) -> datetime:
    """Return a time that is not ahead of the real one, however the wall clock was set since `started`.

    `elapsed` is the monotonic time since `started` was read off the wall. A wall clock that jumps ahead is not
    believed; one that stands behind is. So what is cleaned up by this time is over.
    """
    return min(wall, started + elapsed)


class RevocationSet:
    """The revocations in force. One writer, under its own lock; read by any thread, without."""

    def __init__(self, entries: Iterable[Revocation] = ()) -> None:
        # Entries by what they name. A tuple is replaced whole, so a reader sees the one of before or the one of after.
        self._tokens: dict[str, tuple[Revocation, ...]] = {}
        self._subjects: dict[str, tuple[Revocation, ...]] = {}
        self._certificates: dict[str, tuple[Revocation, ...]] = {}
        self.add(entries)

    def __len__(self) -> int:
        return sum(len(kept) for index in self._indexes() for kept in index.values())

    def __repr__(self) -> str:
        return f"RevocationSet({len(self)} entries)"

    @property
    def names_certificates(self) -> bool:
        """Whether any entry names a certificate: only then `peer_names` matter, and they take time to make."""
        return bool(self._certificates)

    def add(self, entries: Iterable[Revocation]) -> None:
        """Enter `entries`, in any order. An entry that is there already changes nothing."""
        for entry in entries:
            index = self._index(entry.kind)
            index[entry.value] = _united(index.get(entry.value, ()), entry)

    def expire(self, now: datetime) -> int:
        """Drop what has ended by `now`, a time that is not ahead (see `lagging_time`); say how many."""
        dropped = 0
        for index in self._indexes():
            for value, kept in list(index.items()):
                left = tuple(entry for entry in kept if entry.expires_at is None or entry.expires_at > now)
                dropped += len(kept) - len(left)
                if not left:
                    del index[value]
                elif len(left) < len(kept):
                    index[value] = left
        return dropped

    def entries(self) -> tuple[Revocation, ...]:
        """Return all entries, by version."""
        everything = [entry for index in self._indexes() for kept in index.values() for entry in kept]
        return tuple(sorted(everything, key=lambda entry: entry.version))

    def refusal(self, claims: Claims, *, peer_names: frozenset[str] = frozenset()) -> Revocation | None:
        """Return an entry that refuses the token of `claims`, None where none does.

        `peer_names` are the `certificate_names` of the caller's certificate, where it is known.
        """
        found = self._tokens.get(claims.token_id)
        if found:
            return found[0]
        if self._subjects:
            for subject in {str(claims.subject), str(claims.client_id)}:
                for entry in self._subjects.get(subject, ()):
                    if entry.kind is RevocationKind.BLOCK or claims.revocation_version < entry.before_version:
                        return entry
        if self._certificates:
            if claims.confirmation is not None:
                peer_names |= {f"sha256:{claims.confirmation}"}
            return self.revokes_certificate(peer_names)
        return None

    def revokes_certificate(self, names: Iterable[str]) -> Revocation | None:
        """Return an entry that revokes the certificate of these `certificate_names`, None where none does."""
        return next((found[0] for name in names if (found := self._certificates.get(name))), None)

    def blocks(self, spiffe_id: str) -> Revocation | None:
        """Return the block of `spiffe_id` that is in force, None where there is none."""
        kept = self._subjects.get(spiffe_id, ())
        return next((entry for entry in kept if entry.kind is RevocationKind.BLOCK), None)

    def _indexes(self) -> tuple[dict[str, tuple[Revocation, ...]], ...]:
        return (self._tokens, self._subjects, self._certificates)

    def _index(self, kind: RevocationKind) -> dict[str, tuple[Revocation, ...]]:
        if kind in _BY_TOKEN:
            return self._tokens
        return self._subjects if kind in _BY_SUBJECT else self._certificates


def _united(kept: Iterable[Revocation], new: Revocation) -> tuple[Revocation, ...]:
    """Return `kept` and `new` without those that others outdo (rules 4 and 6), the newest first."""
    together = sorted((*kept, new), key=lambda entry: entry.version, reverse=True)
    lifted = max((entry.version for entry in together if entry.kind is RevocationKind.LIFT), default=0)
    united: list[Revocation] = []
    for entry in together:
        if entry.kind is RevocationKind.BLOCK and entry.version <= lifted:
            continue
        if not any(_outdoes(other, entry) for other in united):
            united = [other for other in united if not _outdoes(entry, other)]
            united.append(entry)
    return tuple(united)


def _outdoes(one: Revocation, other: Revocation) -> bool:
    """Say whether with `one` in force `other` changes nothing."""
    if (one.kind is RevocationKind.BLOCK) is not (other.kind is RevocationKind.BLOCK):
        return False  # A block says nothing of what holds after it is lifted, nor the others of what it refuses.
    if other.kind in _FINAL and (one.kind is not other.kind or one.version < other.version):
        return False
    lasts = one.expires_at is None or (other.expires_at is not None and one.expires_at >= other.expires_at)
    reaches = one.before_version >= other.before_version or one.kind is RevocationKind.BLOCK
    return lasts and reaches and (one.kind is not RevocationKind.TOKEN or other.kind is RevocationKind.TOKEN)


def _is_spiffe_id(text: str) -> bool:
    try:
        return str(SpiffeID.parse(text)) == text
    except InvalidIdentityError:
        return False
