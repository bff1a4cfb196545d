"""What this broker has heard from the verifiers that it serves, and when: more exactly than the store has it.

The store keeps for each verifier its newest acknowledgement. Here are the last ones, by the monotonic clock, beside the
moments at which revocations of this broker became durable.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from carnet.revocations import Revocation
from carnet_broker.ports import (
    Acknowledged,
    Appended,
    Clock,
    Joined,
    LogPosition,
    NewRevocation,
    RevocationLog,
    RevocationPage,
    SessionChange,
    SessionOutcome,
)
from carnet_broker.session_changes import Report

__all__ = ["Acknowledgements", "Durable", "NotedLog"]

_VERSIONS: Final = 1024
"""Revocations whose moment is kept."""
_HEARD: Final = 16
"""Acknowledgements that are kept of one verifier."""
_VERIFIERS: Final = 50_000


@dataclass(frozen=True, slots=True)
class Durable:
    """When a revocation became durable."""

    at: datetime
    """By the store's clock."""
    mono: float
    """By ours."""


@dataclass(slots=True)
class _Verifier:
    joined: float
    heard: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_HEARD))
    """Versions, and when each was acknowledged."""


class Acknowledgements:
    """Remembers within bounds. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._durable: OrderedDict[int, Durable] = OrderedDict()
        self._verifiers: OrderedDict[tuple[str, str], _Verifier] = OrderedDict()

    def durable(self, appended: Appended) -> None:
        """Note that the entries of `appended` are durable now."""
        mono = self._clock.mono()
        with self._lock:
            for entry in appended.entries:
                self._durable[entry.version] = Durable(appended.at, mono)
            while len(self._durable) > _VERSIONS:
                self._durable.popitem(last=False)

    def reporting(self, report: Report) -> Report:
        """Return what does the same as `report`, and notes what verifiers say on the way."""

        def reported(
            change: SessionChange, told: Callable[[SessionOutcome], None] | None = None, *, soon: bool = True
        ) -> None:
            self.hear(change)
            report(change, told, soon=soon)

        return reported

    def hear(self, change: SessionChange) -> None:
        """Note what a verifier says now."""
        mono = self._clock.mono()
        with self._lock:
            if isinstance(change, Joined):
                session = change.session
                verifier = _Verifier(mono)
                verifier.heard.append((session.revocation_version, mono))
                self._verifiers[session.spiffe_id, session.instance_id] = verifier
                while len(self._verifiers) > _VERIFIERS:
                    self._verifiers.popitem(last=False)
                return
            key = (change.spiffe_id, change.instance_id)
            if isinstance(change, Acknowledged):
                known = self._verifiers.get(key)
                if known is not None and change.revocation_version > known.heard[-1][0]:
                    known.heard.append((change.revocation_version, mono))
            else:
                self._verifiers.pop(key, None)

    def became_durable(self, version: int) -> Durable | None:
        """Return when `version` became durable, None where another broker revoked it, or it is long ago."""
        return self._durable.get(version)

    def newest(self, spiffe_id: str, instance_id: str) -> int:
        """Return the newest version that a verifier has acknowledged here, 0 where it did not."""
        with self._lock:
            known = self._verifiers.get((spiffe_id, instance_id))
            return 0 if known is None else known.heard[-1][0]

    def delay(self, spiffe_id: str, instance_id: str, version: int) -> tuple[bool, timedelta | None]:
        """Return whether this broker has heard of the verifier, and its time from durable to acknowledged, at most.

        The time is None where the verifier came later than the revocation, or has not acknowledged it.
        """
        with self._lock:
            known, durable = self._verifiers.get((spiffe_id, instance_id)), self._durable.get(version)
            if known is None or durable is None:
                return False, None
            if known.joined >= durable.mono:
                return True, None
            at = next((mono for heard, mono in known.heard if heard >= version), None)
            return True, None if at is None else timedelta(seconds=max(at - durable.mono, 0.0))


class NotedLog:
    """A log of revocations that notes when what is appended here became durable."""

    def __init__(self, log: RevocationLog, acknowledgements: Acknowledgements) -> None:
        self._log = log
        self._acknowledgements = acknowledgements

    def append(self, entries: Sequence[NewRevocation]) -> Appended:
        """Make `entries` durable (see the port), and note when they are."""
        appended = self._log.append(entries)
        self._acknowledgements.durable(appended)
        return appended

    def read(self, after: LogPosition | None) -> RevocationPage:
        """Return what came after `after` (see the port)."""
        return self._log.read(after)

    def begin_epoch(self, *, seen: LogPosition, carry: Sequence[Revocation], now: datetime) -> LogPosition:
        """Begin a new epoch (see the port)."""
        return self._log.begin_epoch(seen=seen, carry=carry, now=now)
