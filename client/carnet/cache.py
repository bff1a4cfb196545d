"""The token cache: which token to give, when to ask for the next one, and when to leave the broker alone.

Pure: it reads no clock, starts nothing and calls nobody. `mono` is monotonic seconds, `now` the wall clock (aware UTC);
the caller brings both, holds a lock around each method, and does what the answers say. Sync and async share it.

Each key has one entry, in one of four states:

========  ===========================================================  ==============================
state     means                                                        `ask` answers
========  ===========================================================  ==============================
MISSING   no token was ever had                                        `Fetch`, `Join` or `Held`
FRESH     the token is valid, and the time to replace it has not come  `Ready`
STALE     the token is valid, and should be replaced                   `Ready`, with `due`
EXPIRED   the token is over                                            `Fetch`, `Join` or `Held`
========  ===========================================================  ==============================

Rules:

1. A token is valid while its life has not passed in monotonic time *and* its end has not come by the wall clock. Either
   alone is fooled: the monotonic clock stops while a laptop sleeps, the wall clock may be set back. Both count from the
   moment the request was *sent*, so latency never makes a token look longer-lived than it is.
2. A valid token is returned, always: whatever is in flight, has failed or was refused.
3. One request is in flight for each key. `begin` starts it, `succeed` or `fail` ends it; `begin` says no in between.
4. A refresh is due at a random point of 50-70 % of the life. The broker's `refresh_in` moves the start of that window
   between 50 and 60 %, so that some spread always remains and clients that started together drift apart. It is never
   due sooner than `min_interval` after the last request.
5. After a failure the key is left alone for a random time from zero to a limit that doubles with each failure in a row
   (full jitter), up to `max_backoff`; longer if the broker said how long; and while the token is valid, at least for
   `min_interval`. In that time `ask` answers `Held` where it has no valid token.
6. A refusal (`Failure.reason` is set) does not end a token that is valid: the broker did not revoke it, and its
   verifiers would accept it. It does stop the asking: for `min_interval` where there is no valid token, for half to all
   of `max_backoff` where there is one. Past the token's end only a caller makes the cache ask again.
7. Only what is used is refreshed: an entry not asked for during one life of its token is idle. An idle token is still
   given out until its end, then it goes.
8. There are at most `max_entries`. For a new one the one goes that was not used for the longest time, but never one
   with a request in flight; where all have one, the new one is `Held`.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, NamedTuple, TypeAlias

from carnet.errors import BrokerUnavailableError, ConfigError, RequestDeniedError, TokenError
from carnet.token import Token

__all__ = [
    "Answer",
    "CacheSettings",
    "Failure",
    "Fetch",
    "Held",
    "Issued",
    "Join",
    "Ready",
    "TokenCache",
    "TokenKey",
]

_EARLIEST: Final = 0.5
_LATEST_START: Final = 0.6
_LATEST: Final = 0.7
_MAX_DOUBLINGS: Final = 32
_LONGEST_RETRY_AFTER: Final = 300.0
"""A broker that asks for more silence than this is wrong, or not the broker."""


class TokenKey(NamedTuple):
    """What makes two requests the same. Made by `TokenKey.of`. A tuple, because one is made for every call."""

    thumbprint: str
    audience: str
    scopes: tuple[str, ...]
    ttl: timedelta | None

    @classmethod
    def of(cls, thumbprint: str, audience: str, scopes: Iterable[str], ttl: timedelta | None) -> TokenKey:
        """Return the key; neither the order of `scopes` nor one named twice makes a difference."""
        return cls(thumbprint, audience, tuple(sorted(set(scopes))) if scopes else (), ttl)


@dataclass(frozen=True, slots=True)
class Issued:
    """What the broker answered: a token, how long it lives, and when the broker would like to be asked again."""

    token: Token
    expires_in: timedelta
    refresh_in: timedelta


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there was no token. A value: each caller that hears of it gets an exception of its own."""

    message: str
    reason: str | None = None
    """The broker's reason where it refused; None where it could not be reached or could not answer."""
    retry_after: timedelta | None = None

    def error(self) -> TokenError:
        """Return a new exception that says so."""
        if self.reason is None:
            return BrokerUnavailableError(self.message)
        return RequestDeniedError(self.message, reason=self.reason)


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """The timing of the cache. Raises `ConfigError` for what makes no sense."""

    min_interval: timedelta = timedelta(seconds=10)
    """The least time between two requests for one token, as long as a valid one is there."""
    first_backoff: timedelta = timedelta(milliseconds=500)
    """The longest pause after a first failure."""
    max_backoff: timedelta = timedelta(seconds=30)
    """The longest pause after many."""
    max_entries: int = 1024
    """How many tokens are kept."""

    def __post_init__(self) -> None:
        if self.min_interval < timedelta() or not timedelta() < self.first_backoff <= self.max_backoff:
            msg = "min_interval may not be negative, and first_backoff is more than zero and at most max_backoff"
            raise ConfigError(msg)
        if self.max_entries < 1:
            msg = f"max_entries is {self.max_entries}: keep at least one token"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Ready:
    """Here is a valid token. `due`: it should be replaced now, and nobody does it yet."""

    token: Token
    due: bool


@dataclass(frozen=True, slots=True)
class Join:
    """No valid token; a request is in flight: wait for that one."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """No valid token, and nothing in flight: `begin`, then ask the broker."""


@dataclass(frozen=True, slots=True)
class Held:
    """No valid token, and the broker is to be left alone until `until` (monotonic), because of `failure`."""

    failure: Failure
    until: float


Answer: TypeAlias = Ready | Join | Fetch | Held
"""What to do for a caller."""


@dataclass(slots=True)
class _Entry:
    used_at: float
    begun_at: float
    in_flight: bool = True
    token: Token | None = None
    life: float = 0.0
    ends_at: float = 0.0
    refresh_at: float = 0.0
    failure: Failure | None = None
    failures: int = 0
    held_until: float = 0.0

    def is_valid(self, mono: float, now: datetime) -> bool:
        return self.token is not None and mono < self.ends_at and now < self.token.expires_at

    def is_refreshable(self, mono: float) -> bool:
        """Whether a refresh may be made of itself, with no caller waiting (rules 6 and 7)."""
        if self.in_flight or self.token is None or mono >= self.used_at + self.life:
            return False
        refused = self.failure is not None and self.failure.reason is not None
        return not (refused and mono >= self.ends_at)


class TokenCache:
    """The entries, and the rules of this module. Not thread-safe: hold one lock around every method."""

    def __init__(self, settings: CacheSettings, rng: random.Random) -> None:
        self._settings = settings
        self._min_interval = settings.min_interval.total_seconds()
        self._first_backoff = settings.first_backoff.total_seconds()
        self._max_backoff = settings.max_backoff.total_seconds()
        self._rng = rng
        self._entries: OrderedDict[TokenKey, _Entry] = OrderedDict()  # The one not used for the longest time is first.

    def __len__(self) -> int:
        """Return the number of entries, those without a token included."""
        return len(self._entries)

    def ask(self, key: TokenKey, *, mono: float, now: datetime) -> Answer:
        """Say what to do for a caller that wants a token, and note that it was asked for."""
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= self._settings.max_entries and self._evictable() is None:
                return Held(Failure(f"{len(self._entries)} token requests are under way"), mono + self._first_backoff)
            return Fetch()
        entry.used_at = mono
        self._entries.move_to_end(key)
        if entry.token is not None and entry.is_valid(mono, now):
            return Ready(entry.token, due=mono >= entry.refresh_at and not entry.in_flight)
        if entry.in_flight:
            return Join()
        if entry.failure is not None and mono < entry.held_until:
            return Held(entry.failure, entry.held_until)
        return Fetch()

    def fresh(self, key: TokenKey, *, mono: float, now: datetime) -> Token | None:
        """Return the token if its state is FRESH, and note that it was asked for: the short way of most calls."""
        entry = self._entries.get(key)
        if entry is None or mono >= entry.refresh_at or not entry.is_valid(mono, now):
            return None
        entry.used_at = mono
        self._entries.move_to_end(key)
        return entry.token

    def begin(self, key: TokenKey, *, mono: float) -> bool:
        """Start the one request for `key`, which `succeed` or `fail` ends; False where one is in flight already."""
        entry = self._entries.get(key)
        if entry is None:
            while len(self._entries) >= self._settings.max_entries:
                oldest = self._evictable()
                if oldest is None:
                    return False
                del self._entries[oldest]
            self._entries[key] = _Entry(used_at=mono, begun_at=mono)
            return True
        if entry.in_flight:
            return False
        entry.in_flight, entry.begun_at = True, mono
        return True

    def succeed(self, key: TokenKey, issued: Issued, *, sent: float) -> None:
        """End the request for `key` with a token. `sent` is the monotonic time at which the broker was asked for it."""
        entry = self._entries[key]
        life = issued.expires_in.total_seconds()
        start = min(max(issued.refresh_in.total_seconds(), _EARLIEST * life), _LATEST_START * life)
        entry.in_flight, entry.failure, entry.failures, entry.held_until = False, None, 0, 0.0
        entry.token, entry.life, entry.ends_at = issued.token, life, sent + life
        entry.refresh_at = max(sent + self._rng.uniform(start, _LATEST * life), entry.begun_at + self._min_interval)

    def fail(self, key: TokenKey, failure: Failure, *, mono: float, now: datetime) -> None:
        """End the request for `key` without a token; one that is valid stays."""
        entry = self._entries[key]
        valid = entry.is_valid(mono, now)
        if failure.reason is not None:
            pause = self._rng.uniform(0.5, 1.0) * self._max_backoff if valid else self._min_interval
        else:
            limit = min(self._first_backoff * 2.0 ** min(entry.failures, _MAX_DOUBLINGS), self._max_backoff)
            pause = self._rng.uniform(0.0, limit)
        if failure.retry_after is not None:
            wanted = min(failure.retry_after.total_seconds(), _LONGEST_RETRY_AFTER)
            pause = max(pause, wanted * self._rng.uniform(1.0, 1.5))
        entry.in_flight, entry.failure, entry.failures = False, failure, entry.failures + 1
        entry.held_until = mono + pause
        entry.refresh_at = max(entry.held_until, entry.begun_at + self._min_interval if valid else 0.0)

    def due(self, *, mono: float) -> list[TokenKey]:
        """Return the keys whose token should be replaced now, each to `begin`; let go of what is over and idle."""
        for key in [key for key, entry in self._entries.items() if mono >= self._ends(entry) and not entry.in_flight]:
            del self._entries[key]
        return [k for k, entry in self._entries.items() if mono >= entry.refresh_at and entry.is_refreshable(mono)]

    def next_due(self, *, mono: float) -> float | None:
        """Return the monotonic time at which to call `due` again, None where nothing has a token.

        What is in flight does not count: call again when it ends, and when `ask` answered with `due`.
        """
        times = (
            entry.refresh_at if entry.refresh_at > mono or entry.is_refreshable(mono) else self._ends(entry)
            for entry in self._entries.values()
            if entry.token is not None and not entry.in_flight
        )
        earliest = min(times, default=None)
        return None if earliest is None else max(earliest, mono)

    def thumbprints(self) -> set[str]:
        """Return the identities that have an entry."""
        return {key.thumbprint for key in self._entries}

    def copy_idle(self, rng: random.Random) -> TokenCache:
        """Return a cache with the same tokens and nothing in flight: for the child of a fork, or another event loop.

        `rng` must be a new one, or the children of one process would all refresh at the same moments.
        """
        copy = TokenCache(self._settings, rng)
        copy._entries.update((key, replace(entry, in_flight=False)) for key, entry in self._entries.items())
        return copy

    def _ends(self, entry: _Entry) -> float:
        """When an entry that nobody asks for is of no more use: token over, idle, and its failure forgotten."""
        return max(entry.ends_at, entry.used_at + max(entry.life, self._max_backoff), entry.held_until)

    def _evictable(self) -> TokenKey | None:
        return next((key for key, entry in self._entries.items() if not entry.in_flight), None)
