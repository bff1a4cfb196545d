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
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from carnet.revocations import Revocation, RevocationKind, RevocationSet
from carnet_broker.ports import LogPosition, RevocationPage

__all__ = ["is_behind", "lost_entries"]


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


def _said_by(entry: Revocation) -> tuple[RevocationKind, str, int, datetime | None]:
    return entry.kind, entry.value, entry.before_version, entry.expires_at
