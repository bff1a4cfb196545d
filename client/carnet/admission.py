"""How many calls one identity may make: the generic cell rate algorithm (ITU-T I.371), one number per identity.

That number is the *theoretical arrival time*: the moment at which all that the identity was admitted for is paid off at
the agreed rate. A call is admitted when that moment is at most `burst` calls ahead of now. So a quiet identity may
send a burst, a busy one goes at the rate, and a refused call costs nothing: who waits as told is admitted.

The table is bounded, and forgetting is what an attacker would ask for: an identity that is forgotten starts afresh. So

- an identity that has paid off is forgotten freely: it loses nothing and gains nothing;
- when all are busy, the eighth that owes least is forgotten, and the most that any of them owed becomes the *floor*:
  an identity that is not in the table is taken to owe that much. Nobody gains by being pushed out, and a newcomer to a
  table full of busy identities owes as much as the least busy of them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

__all__ = ["Admission"]

_FORGET: Final = 8
"""One in so many is forgotten at a time, so that the sorting is paid for by many new identities."""


class Admission:
    """Admits `rate` calls a second per identity, and bursts of `burst`, for at most `capacity` busy identities.

    Not locked. Threads that race on one identity can be admitted once too often each; who cannot have that, locks.
    """

    def __init__(self, *, rate: float, burst: int, capacity: int = 65_536) -> None:
        """Raise `ValueError` where a figure would admit nobody or everybody."""
        if not (0 < rate < float("inf")) or burst < 1 or capacity < _FORGET:
            msg = f"rate must be positive, burst at least 1, capacity at least {_FORGET}"
            raise ValueError(msg)
        self._interval = 1 / rate
        self._burst = burst
        self._capacity = capacity
        self._paid_off_at: dict[str, float] = {}
        self._floor = float("-inf")

    def admit(self, identity: str, cost: int, mono: float) -> timedelta | None:
        """Admit a call of `cost` (a batch costs its tokens) at `mono` seconds, or say how long to wait.

        A cost above the burst is admitted when nothing is owed, and paid off at the rate like any other. One below 1
        is 1: to ask for nothing is a call too.
        """
        cost = max(cost, 1)
        owed = max(self._paid_off_at.get(identity, self._floor) - mono, 0.0)
        too_much = owed + (min(cost, self._burst) - self._burst) * self._interval
        # A microsecond is the least that a timedelta can tell; below it there is nothing to wait for.
        if too_much > 1e-6:  # noqa: PLR2004
            return timedelta(seconds=too_much)
        if identity not in self._paid_off_at and len(self._paid_off_at) >= self._capacity:
            self._forget(mono)
        self._paid_off_at[identity] = mono + owed + cost * self._interval
        return None

    def _forget(self, mono: float) -> None:
        """Make room: forget who has paid off, and if that is not an eighth, who owes least."""
        busy = sorted((at, identity) for identity, at in list(self._paid_off_at.items()) if at > mono)
        surplus = max(len(busy) - self._capacity + self._capacity // _FORGET, 0)
        if surplus:
            self._floor = max(self._floor, busy[surplus - 1][0])
        self._paid_off_at = {identity: at for at, identity in busy[surplus:]}
