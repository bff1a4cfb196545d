"""The rules of the log of revocations. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from carnet.errors import InvalidRevocationError
from carnet.revocations import Revocation, RevocationKind, check_entry, next_digest
from carnet_broker.ports import LogPosition, NewRevocation

__all__ = ["EPOCH_JUMP", "chained", "covers", "entered", "follows", "lacking", "numbered"]

EPOCH_JUMP: Final = 1_000_000
"""How far above everything seen the versions of a new epoch begin. What the lost part of the old one held is within."""

_BY_VERSION: Final = frozenset({RevocationKind.SUBJECT, RevocationKind.BLOCK, RevocationKind.LIFT})
_FINAL: Final = frozenset({RevocationKind.BLOCK, RevocationKind.LIFT})
_LONGEST_TEXT: Final = 1024


def numbered(new: NewRevocation, version: int) -> Revocation:
    """Return `new` as entry `version`. Raises `InvalidRevocationError` for one that cannot be."""
    before = new.before_version
    if before is None:
        before = version if new.kind in _BY_VERSION else 0
    entry = Revocation(
        version=version, kind=new.kind, value=new.value, before_version=before, expires_at=new.expires_at
    )
    check_entry(entry)
    for text in (new.by, new.reason):
        if len(text) > _LONGEST_TEXT or not text.isprintable():
            msg = f"who asked for revocation {version}, or why, is not printable, or longer than {_LONGEST_TEXT}"
            raise InvalidRevocationError(msg)
    return entry


def covers(held: Revocation, new: NewRevocation) -> bool:
    """Say whether `new` would change nothing while `held` is there: it lasts as long and reaches as far.

    Only where no version has a say. A SUBJECT, a BLOCK and a LIFT get theirs because of what came before them, so each
    of them says something that no earlier one does.
    """
    if new.expires_at is None or held.expires_at is None or new.kind in _BY_VERSION:
        return False
    reaches = held.kind is new.kind or (held.kind, new.kind) == (RevocationKind.ROOT, RevocationKind.TOKEN)
    return reaches and held.value == new.value and held.expires_at >= new.expires_at


def entered(
    news: Sequence[NewRevocation], held: Iterable[Revocation], version: int
) -> tuple[list[tuple[Revocation, NewRevocation]], tuple[Revocation, ...]]:
    """Return what is to be written after `version`, and for each of `news` the entry that stands for it.

    That is an earlier one where it covers it, of `held` or of `news`. Raises `InvalidRevocationError`.
    """
    written, standing = list[tuple[Revocation, NewRevocation]](), list[Revocation]()
    there: dict[str, list[Revocation]] = {}
    for known in held:
        there.setdefault(known.value, []).append(known)
    for new in news:
        entry = numbered(new, version + len(written) + 1)  # Also where it is not written: what cannot be is refused.
        earlier = next((one for one in there.get(new.value, ()) if covers(one, new)), None)
        if earlier is None:
            there.setdefault(new.value, []).append(entry)
            written.append((entry, new))
        standing.append(earlier or entry)
    return written, tuple(standing)


def chained(digest: bytes, entries: Iterable[Revocation]) -> bytes:
    """Return the digest after `entries`, where the one before them was `digest`."""
    for entry in entries:
        digest = next_digest(digest, entry)
    return digest


def follows(seen: LogPosition, entries: Sequence[Revocation], log: LogPosition) -> bool | None:
    """Say whether `log` is a later state of what was `seen`; None where that cannot be told any more.

    `entries` are those after `seen` that the store has, in order. They prove themselves: where none is missing, they
    lead from the one digest to the other.
    """
    if seen.epoch != log.epoch or seen.version > log.version:
        return False
    if len(entries) != log.version - seen.version:
        return None  # Some were cleaned up.
    return chained(seen.digest, entries) == log.digest


def lacking(carry: Iterable[Revocation], held: Iterable[Revocation], now: datetime) -> list[Revocation]:
    """Return those of `carry` that have not ended and that `held` cannot stand for, in the order of their versions.

    A block or a lift counts only as itself: versions of a store that was restored may have been given twice, so they
    do not say which came last. One too many is entered rather than one too few.
    """
    known = set(held)
    strongest: dict[tuple[RevocationKind, str], list[Revocation]] = {}
    for entry in known:
        strongest.setdefault((entry.kind, entry.value), []).append(entry)
    missing = [
        entry
        for entry in carry
        if (entry.expires_at is None or entry.expires_at > now)
        and entry not in known
        and (
            entry.kind in _FINAL
            or not any(_stands_for(other, entry) for other in strongest.get((entry.kind, entry.value), ()))
        )
    ]
    return sorted(missing, key=lambda entry: entry.version)


def _stands_for(held: Revocation, entry: Revocation) -> bool:
    lasts = held.expires_at is None or (entry.expires_at is not None and held.expires_at >= entry.expires_at)
    return lasts and held.before_version >= entry.before_version
