"""What this replica holds in memory of the revocations: the set that refuses, and how far it has got in the log.

Whoever has something newer gives it to the holder: the loop that reads the store, and whoever has appended to it just
now. Readers take the view once and work with that one. `carnet.revocations.RevocationSet` is written here, under a
lock, and read anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from carnet.revocations import Revocation, RevocationSet
from carnet_broker.core.watching import RevocationTail
from carnet_broker.ports import Appended, LogPosition, RevocationPage

__all__ = ["RevocationHolder", "RevocationView"]


@dataclass(frozen=True, slots=True)
class RevocationView:
    """The log as this replica last read it."""

    tail: RevocationTail
    read_at: datetime
    """When the store was last read, by our own wall clock."""
    read_mono: float
    """The same on the monotonic clock, in seconds."""

    @property
    def position(self) -> LogPosition:
        """How far this replica is."""
        return self.tail.position

    def age(self, now: datetime, mono: float) -> timedelta:
        """Return how long ago the store was read: the larger of two clocks, as with `KeyringView.age`."""
        return max(now - self.read_at, timedelta(seconds=mono - self.read_mono))


class RevocationHolder:
    """Holds the revocations in force. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = RevocationSet()
        self._view: RevocationView | None = None
        self._snapshot: tuple[LogPosition, tuple[Revocation, ...]] | None = None

    @property
    def view(self) -> RevocationView | None:
        """The view in force, None before the store was read for the first time."""
        return self._view

    @property
    def revocations(self) -> RevocationSet:
        """What refuses. To be read only, and asked for anew each time: a new epoch has a new one."""
        return self._set

    @property
    def version(self) -> int:
        """The version of the last revocation that is applied here; 0 before the first reading."""
        view = self._view
        return 0 if view is None else view.position.version

    def snapshot(self) -> tuple[LogPosition, tuple[Revocation, ...]]:
        """Return where this replica is, and all that is in force there. Raises `LookupError` before the first reading.

        Made once for each position, whoever asks: it costs some milliseconds for each 10,000 entries.
        """
        with self._lock:
            if self._view is None:
                msg = "the store was not read yet"
                raise LookupError(msg)
            if self._snapshot is None:
                self._snapshot = self._view.position, self._set.entries()
            return self._snapshot

    def take(self, page: RevocationPage, *, now: datetime, mono: float) -> bool:
        """Take in what was read from the store at `now` and `mono`; say whether the position has changed.

        A page that does not lead on from here changes nothing but the time of the reading. Of a snapshot of the same
        epoch nothing is lost that is in force here: whether the store has lost it is for the caller to find out.
        """
        with self._lock:
            view = self._view
            if view is None or (page.snapshot and _leads_on(view.position, page.position)):
                return self._replace(page, now, mono)
            new = [entry for entry in page.entries if entry.version > view.position.version]
            tail = view.tail.followed_by(new) if page.position.epoch == view.position.epoch else None
            self._view = replace(view, read_at=now, read_mono=mono)
            if tail is None or not new:
                return False
            self._advance(tail, new)
            return True

    def extend(self, appended: Appended) -> bool:
        """Take in what this replica has appended itself, where it follows without a gap; say whether it did.

        Nothing was appended where others had entered as much before.
        """
        with self._lock:
            view = self._view
            if view is None or not appended.entries or appended.position.epoch != view.position.epoch:
                return False
            tail = view.tail.followed_by(appended.entries)
            if tail is None or tail.position != appended.position:
                return False
            self._advance(tail, appended.entries)
            return True

    def expire(self, now: datetime) -> int:
        """Drop what has ended by `now`, a time that is not ahead (`carnet.revocations.lagging_time`)."""
        with self._lock:
            dropped = self._set.expire(now)
            if dropped:
                self._snapshot = None
            return dropped

    def _advance(self, tail: RevocationTail, entries: Sequence[Revocation]) -> None:
        assert self._view is not None  # noqa: S101 - who calls has looked
        self._set.add(entries)
        self._snapshot = None
        # After the set: whoever sees the new position can rely on the set.
        self._view = replace(self._view, tail=tail)

    def _replace(self, page: RevocationPage, now: datetime, mono: float) -> bool:
        fresh = RevocationSet(page.entries)
        if self._view is not None:
            # By their versions: a LIFT of the page ends an older BLOCK of ours.
            fresh.add(self._set.entries())
        self._set, self._snapshot = fresh, None
        self._view = RevocationView(RevocationTail(page.position), now, mono)
        return True


def _leads_on(here: LogPosition, there: LogPosition) -> bool:
    """Say whether a snapshot of `there` is not older than `here`: within an epoch nothing goes back."""
    return there.epoch > here.epoch or (there.epoch == here.epoch and there.version >= here.version and there != here)
