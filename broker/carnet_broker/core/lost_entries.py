"""Finding out that the shared store has lost revocations: it was restored from a backup. Pure.

Rules
-----
1. Neither epoch nor version ever goes back. A store that is behind what was read of it before was restored. One that
   was emptied has a later epoch, and versions that begin anew: it is behind too, because the `rv` of old tokens would
   be above all that is revoked from now on.
2. A restored store can have gone on: then it has other entries at the versions that were seen. So whoever gets a
   snapshot looks for its own entries in it; those that have not ended, and that nothing in the snapshot outdoes, must
   be there.
3. An entry is looked for by what it says, not by its version: in a new epoch it is entered anew.
4. Until that is found out, a restored store gives versions anew. A SUBJECT or LIFT that gets one of these has a
   `before_version` below the `rv` of tokens that are out already, and misses them. So those that nobody knew before,
   and that the `rv` of a token may have outrun, are entered anew at a version above all. As a SUBJECT, for a lift that
   is entered late could end a block that came after it. Where it cannot be told from an old one that a later one had
   outdone, one token too many is refused rather than one too few.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from carnet.revocations import Revocation, RevocationKind, RevocationSet
from carnet_broker.ports import LogPosition, NewRevocation, RevocationPage

__all__ = ["as_they_were", "epoch_of", "is_behind", "lost_entries", "outrun_entries", "raised"]

_EPOCH_START: Final = datetime(1970, 1, 1, tzinfo=UTC)
_BY_RV: Final = frozenset({RevocationKind.SUBJECT, RevocationKind.LIFT})


def epoch_of(now: datetime) -> int:
    """Return the epoch that begins at `now`: unix milliseconds."""
    return (now - _EPOCH_START) // timedelta(milliseconds=1)


def is_behind(store: LogPosition, seen: LogPosition) -> bool:
    """Say whether the store, at `store`, is behind what was `seen` of it before (rule 1)."""
    return store.epoch < seen.epoch or store.version < seen.version


def lost_entries(page: RevocationPage, own: Iterable[Revocation]) -> tuple[Revocation, ...]:
    """Return those of `own` that should be in the snapshot `page`, and are not (rules 2 and 3)."""
    together = RevocationSet(page.entries)
    together.add(own)
    there = {_said_by(entry) for entry in page.entries}
    return tuple(
        entry
        for entry in together.entries()
        if _said_by(entry) not in there and (entry.expires_at is None or entry.expires_at > page.read_at)
    )


def outrun_entries(
    held: Iterable[Revocation], own: Iterable[Revocation], *, seen: int, now: datetime
) -> tuple[Revocation, ...]:
    """Return those of `held` that tokens with an `rv` of up to `seen` may have outrun: one for each subject (rule 4).

    `own` is what was known before: neither that, nor what comes before any of it in one log, is meant.
    """
    held, known = tuple(held), frozenset(own)
    shared = max((entry.version for entry in held if entry in known), default=0)
    sayings = {_said_by(entry) for entry in known}
    safe, outrun = dict[str, datetime](), dict[str, Revocation]()
    for entry in held:
        if entry.kind not in _BY_RV or entry.expires_at is None or entry.expires_at <= now:
            continue
        if entry.before_version > seen:
            safe[entry.value] = max(entry.expires_at, safe.get(entry.value, now))
        elif entry.version > shared and _said_by(entry) not in sayings:
            other = outrun.get(entry.value)
            if other is None or _end(other) < entry.expires_at:
                outrun[entry.value] = entry
    return tuple(entry for entry in outrun.values() if _end(entry) > safe.get(entry.value, now))


def as_they_were(entries: Iterable[Revocation]) -> list[NewRevocation]:
    """Return `entries`, to be entered anew with their own `before_version`."""
    return [
        NewRevocation(
            kind=entry.kind,
            value=entry.value,
            expires_at=entry.expires_at,
            before_version=entry.before_version or None,
            reason="carried over into a new epoch",
        )
        for entry in entries
    ]


def raised(entries: Iterable[Revocation]) -> list[NewRevocation]:
    """Return `entries`, to be entered anew for all tokens that are out by then (rule 4)."""
    reason = "raised above all versions of the epoch before"
    return [
        NewRevocation(kind=RevocationKind.SUBJECT, value=entry.value, expires_at=entry.expires_at, reason=reason)
        for entry in entries
    ]


def _end(entry: Revocation) -> datetime:
    assert entry.expires_at is not None  # noqa: S101 - only a block has none
    return entry.expires_at


def _said_by(entry: Revocation) -> tuple[RevocationKind, str, int, datetime | None]:
    return entry.kind, entry.value, entry.before_version, entry.expires_at
