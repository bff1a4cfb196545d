"""The key set of a verifier: when to ask for it, and what can be said with the one at hand. No clock, no I/O.

Rules

1. One fetch at a time. `begin` says that one starts, `succeed` or `fail` that it is over.
2. A fetch is due once 60 to 80 % of the time is over for which the set may be used: the issuer's max-age, or what is
   left of `max_staleness`, whichever is less; never sooner than `poll_floor` after the last answer. A fetch that fails
   is tried again after a wait that doubles from `retry_first` to `retry_most`, with full jitter.
3. Staleness is the age that the answer stated plus the time since it was asked for. A set whose staleness is over
   `max_staleness` decides nothing, unless the verifier was built to accept it (`OnStale.ACCEPT`).
4. A failure never drops the set at hand, and nothing replaces it but a set of the same issuer whose generation is not
   lower. (An empty set cannot be written: see `KeySet`.)
5. A `kid` that the set lacks may be asked for, once per `cooldown` over all of them, whatever comes of it. If the
   answer lacks it too, the `kid` is remembered as absent until a newer generation comes; at most `max_absent` of them.
   A `kid` that was in the set and is not in a later one was withdrawn for good (removed or revoked): it is absent with
   no question, until a new epoch.
6. "No" and "cannot tell" differ. Absent is no. Unknown while nothing may be asked is cannot tell: the key may be new.
7. A set that is usable and holds the key is used, whatever else goes on.
8. News come from fetches (`Supply.POLL`), or a stream pushes them (`carnet.watching`): then no fetch is due, and only a
   missing key is asked for. A pushed set obeys rule 4, and clears what is remembered as absent. A push that brings
   nothing new still says how fresh the set is.
9. A verifier that follows revocations decides nothing before it was told of them, nor when what it was told is over
   `max_staleness`: a set is as stale as the staler of both.

What may be said about one `kid` is the table in `decide`.

Time is a `Moment`: a monotonic reading, which stands still while a laptop sleeps, and the wall clock, which may be set.
Elapsed time is the greater of both, so each fault makes the set look older and never younger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from carnet.errors import ConfigError, InvalidKeySetError
from carnet.jwk import KeySet

__all__ = [
    "Freshness",
    "KeySetCache",
    "KeySetRules",
    "KeySetSnapshot",
    "Knowledge",
    "Moment",
    "OnStale",
    "Supply",
    "Verdict",
    "decide",
]

_NOTHING: Final = timedelta(0)
_SOONEST: Final = 0.6
_SPREAD: Final = 0.2
_MAX_DOUBLINGS: Final = 16
"""Far above any `retry_most`; keeps the doubling a small number."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One reading of both clocks: seconds of the monotonic one, and aware UTC."""

    monotonic: float
    wall: datetime

    def since(self, earlier: Moment) -> timedelta:
        """Return the time since `earlier`: the greater of what the two clocks say."""
        return max(timedelta(seconds=self.monotonic - earlier.monotonic), self.wall - earlier.wall)


@dataclass(frozen=True, slots=True)
class Freshness:
    """How old some knowledge is."""

    age: timedelta
    """How old it was for whoever told it."""
    asked_at: Moment
    """When it was asked for, or when the last word went out that the teller is known to have had before it spoke."""

    def staleness(self, now: Moment) -> timedelta:
        """Return how old it is by now."""
        return self.age + max(_NOTHING, now.since(self.asked_at))


@dataclass(frozen=True, slots=True)
class KeySetSnapshot:
    """One answer of an issuer."""

    issuer: str
    generation: int
    """The version of the keyring behind the set. It only grows."""
    keys: KeySet
    max_age: timedelta
    """For how long the issuer lets the set be used."""
    age: timedelta
    """How old the issuer's own knowledge was when it answered."""
    asked_at: Moment
    """When the question went out, which is safer to count from than the receipt: an answer may lie in a buffer."""

    def __post_init__(self) -> None:
        if self.max_age <= _NOTHING or self.age < _NOTHING:
            msg = f"key set generation {self.generation} has max-age {self.max_age} and age {self.age}"
            raise InvalidKeySetError(msg)

    @property
    def freshness(self) -> Freshness:
        """How old the answer is."""
        return Freshness(self.age, self.asked_at)

    def staleness(self, now: Moment) -> timedelta:
        """Return how old the set is by now."""
        return self.freshness.staleness(now)


class Supply(StrEnum):
    """Where news come from."""

    POLL = "poll"
    """From fetches, when they are due."""
    AWAIT = "await"
    """From a stream that is being opened for the first time: what is asked meanwhile waits for it."""
    PUSH = "push"
    """From a stream that is open, or was a moment ago."""


class OnStale(StrEnum):
    """What a verifier does with a set whose staleness is over the budget."""

    REFUSE = "refuse"
    """Say that it cannot tell."""
    ACCEPT = "accept"
    """Go on with it, however old. Keys that were withdrawn meanwhile go on being trusted."""


@dataclass(frozen=True, slots=True)
class KeySetRules:
    """The settings behind the rules above. Raises `ConfigError` for a duration or a count that is not positive."""

    max_staleness: timedelta = timedelta(minutes=5)
    on_stale: OnStale = OnStale.REFUSE
    cooldown: timedelta = timedelta(seconds=30)
    poll_floor: timedelta = timedelta(milliseconds=500)
    retry_first: timedelta = timedelta(seconds=1)
    retry_most: timedelta = timedelta(seconds=30)
    max_absent: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_staleness", "cooldown", "poll_floor", "retry_first", "retry_most"):
            if getattr(self, name) <= _NOTHING:
                msg = f"{name} must be longer than nothing, and is {getattr(self, name)}"
                raise ConfigError(msg)
        if self.max_absent < 1:
            msg = f"max_absent must be at least 1, and is {self.max_absent}"
            raise ConfigError(msg)


class Verdict(StrEnum):
    """What can be said about a `kid`."""

    USE = "use"
    """The set may be used and holds the key."""
    NO = "no"
    """The issuer does not publish this key: it was asked, or has withdrawn it."""
    ASK = "ask"
    """A fetch may start now, and may tell."""
    WAIT = "wait"
    """A fetch is under way, and may tell."""
    CANNOT_TELL = "cannot-tell"
    """Nothing may be asked now."""


class Knowledge(StrEnum):
    """What the set at hand says about a `kid`."""

    PRESENT = "present"
    ABSENT = "absent"
    """Not in the set, and the issuer was asked for it, or has withdrawn it."""
    UNKNOWN = "unknown"
    """Not in the set, and nobody asked."""


def decide(*, usable: bool, knowledge: Knowledge, fetching: bool, may_ask: bool) -> Verdict:
    """Return the verdict: the whole table, first row that fits."""
    match usable, knowledge, fetching, may_ask:
        case True, Knowledge.PRESENT, _, _:
            return Verdict.USE
        case True, Knowledge.ABSENT, _, _:
            return Verdict.NO
        case _, _, True, _:
            return Verdict.WAIT
        case _, _, _, True:
            return Verdict.ASK
    return Verdict.CANNOT_TELL


class KeySetCache:
    """The state of one verifier's key set. Changed under the caller's lock.

    `usable` and `verdict` only read, each part once, so they may be called without the lock: another thread's change is
    seen either whole or not yet.
    """

    def __init__(self, rules: KeySetRules, *, issuer: str, follows_revocations: bool = False) -> None:
        self._rules = rules
        self._issuer = issuer
        self.supply = Supply.POLL
        self.follows_revocations = follows_revocations
        self._told: Freshness | None = None  # How fresh the revocations are; None before the first.
        self._snapshot: KeySetSnapshot | None = None
        self._fetching = False
        self._asked_kid: str | None = None
        self._kid_asked_at: Moment | None = None
        self._absent: dict[str, None] = {}  # Insertion order: the oldest goes first.
        self._withdrawn: dict[str, None] = {}  # As above.
        self._failures = 0
        self._why = ""  # What the last fetch failed of; empty after a good one.
        self._waits_from: Moment | None = None
        self._wait = _NOTHING

    @property
    def snapshot(self) -> KeySetSnapshot | None:
        """The last good answer, None before the first."""
        return self._snapshot

    @property
    def generation(self) -> int:
        """The generation at hand; an answer must not be lower. 0 before the first."""
        snapshot = self._snapshot
        return 0 if snapshot is None else snapshot.generation

    @property
    def fetching(self) -> bool:
        """Whether a fetch is under way."""
        return self._fetching

    def usable(self, now: Moment, *, on_stale: OnStale | None = None) -> KeySet | None:
        """Return the set if it may decide now (rules 3 and 9). `on_stale` is by default that of the rules."""
        snapshot, told = self._snapshot, self._told
        if snapshot is None or (told is None and self.follows_revocations):
            return None
        if (on_stale or self._rules.on_stale) is OnStale.REFUSE:
            budget = self._rules.max_staleness
            if _over(budget, snapshot, now) or (told is not None and _over(budget, told, now)):
                return None
        return snapshot.keys

    def staleness(self, now: Moment) -> timedelta | None:
        """Return how old the set and the revocations are, whichever is older; None where there is no set."""
        if self._snapshot is None:
            return None
        known = self._snapshot.staleness(now)
        return known if self._told is None else max(known, self._told.staleness(now))

    def verdict(self, kid: str, now: Moment) -> Verdict:
        """Return what can be said about `kid` now."""
        keys = self.usable(now)
        if keys is None:
            return decide(
                usable=False,
                knowledge=Knowledge.UNKNOWN,
                fetching=self._fetching or self.supply is Supply.AWAIT,
                may_ask=self.supply is Supply.POLL and not self.due_in(now),
            )
        if keys.get(kid) is not None:
            knowledge = Knowledge.PRESENT
        else:
            is_absent = kid in self._absent or kid in self._withdrawn
            knowledge = Knowledge.ABSENT if is_absent else Knowledge.UNKNOWN
        return decide(usable=True, knowledge=knowledge, fetching=self._fetching, may_ask=not self._cooling(now))

    def due_in(self, now: Moment) -> timedelta:
        """Return how long until a fetch is due (rule 2); zero if it is."""
        if self._waits_from is None:
            return _NOTHING
        return max(_NOTHING, self._wait - now.since(self._waits_from))

    def begin(self, now: Moment, *, kid: str | None = None) -> None:
        """Say that a fetch starts; `kid` is the one that is missed, None for a fetch that was due."""
        if self._fetching:
            msg = "a fetch is under way"  # Rule 1. A fault of the caller, which holds the lock.
            raise RuntimeError(msg)
        self._fetching = True
        self._asked_kid = kid
        if kid is not None:
            self._kid_asked_at = now

    def succeed(self, snapshot: KeySetSnapshot, now: Moment, *, jitter: float, incomplete: str = "") -> None:
        """Take the answer of the fetch in; `jitter` is a random number from 0 to 1.

        `incomplete` is what went wrong with the rest of the answer: then it is asked for again as after a failure.

        Raises `InvalidKeySetError` for an answer that may not replace the set at hand; then the fetch has failed.
        """
        try:
            self._check(snapshot, at_least=self.generation)
        except InvalidKeySetError as error:
            self.fail(now, jitter=jitter, why=str(error))
            raise
        if snapshot.generation > self.generation:
            self._absent.clear()
        self._replace(snapshot)
        self._why = incomplete
        left = self._rules.max_staleness - snapshot.staleness(now)
        if left < _NOTHING or incomplete:  # Too old on arrival: it is no use to ask for the like of it at once.
            self._back_off(now, jitter)
        else:
            self._failures = 0
            wait = min(snapshot.max_age, left) * (_SOONEST + _SPREAD * jitter)
            self._waits_from, self._wait = now, max(self._rules.poll_floor, wait)
        if self._asked_kid is not None and snapshot.keys.get(self._asked_kid) is None:
            self._remember(self._absent, self._asked_kid)
        self._fetching = False

    def load(self, snapshot: KeySetSnapshot, *, new_epoch: bool = False) -> None:
        """Take a pushed set in (rule 8). In a new epoch its generation may be lower: the issuer was restored.

        Raises `InvalidKeySetError` for one that may not replace the set at hand.
        """
        self._check(snapshot, at_least=0 if new_epoch else self.generation)
        self._absent.clear()
        self._replace(snapshot)
        if new_epoch:
            self._withdrawn.clear()  # What was withdrawn since the backup is published again.
        self._why = ""
        self._failures, self._waits_from = 0, None  # Should the stream end, a fetch is due.

    def confirm(self, freshness: Freshness, now: Moment) -> None:
        """Note that the set at hand is the one of the issuer, as of `freshness`. Never makes it older."""
        snapshot = self._snapshot
        if snapshot is not None and freshness.staleness(now) < snapshot.staleness(now):
            self._snapshot = replace(snapshot, age=freshness.age, asked_at=freshness.asked_at)
        self._why = ""

    def told_revocations(self, freshness: Freshness, now: Moment) -> None:
        """Note that the revocations at hand are those of the issuer, as of `freshness`. Never makes them older."""
        if self._told is None or freshness.staleness(now) < self._told.staleness(now):
            self._told = freshness

    def lost(self, why: str) -> None:
        """Note what a stream ended of: for `explain`."""
        self._why = why

    def fail(self, now: Moment, *, jitter: float, why: str = "") -> None:
        """Say that the fetch failed, and of what: for `explain`. The set at hand stays (rule 4)."""
        self._back_off(now, jitter)
        self._why = why
        self._fetching = False

    def explain(self, now: Moment) -> str:
        """Return why nothing can be told: for the message of an error."""
        snapshot = self._snapshot
        why = self._why or "no answer came so far, check where the keys are asked for (CARNET_TRUST)"
        if snapshot is None:
            return f"no key set of {self._issuer} could be had yet: {why}"
        if self._told is None and self.follows_revocations:
            return f"the revocations of {self._issuer} could not be had yet: {why}"
        if self.usable(now) is None:
            what, age = "key set", snapshot.staleness(now)
            if self._told is not None and self._told.staleness(now) > age:
                what, age = "knowledge of revocations", self._told.staleness(now)
            return (
                f"the {what} of {self._issuer} is {age.total_seconds():.0f} s old, over the limit"
                f" of {self._rules.max_staleness.total_seconds():.0f} s, and no newer one could be had: {why}"
            )
        return (
            f"the key is not in the key set of {self._issuer} (generation {snapshot.generation}), and unknown keys are"
            f" asked for once in {self._rules.cooldown.total_seconds():.0f} s"
        )

    def _check(self, snapshot: KeySetSnapshot, *, at_least: int) -> None:
        if snapshot.issuer != self._issuer:
            msg = (
                f"the key set is of issuer {snapshot.issuer[:200]!r}, and this verifier trusts {self._issuer!r}:"
                " check CARNET_ISSUER"
            )
            raise InvalidKeySetError(msg)
        if snapshot.generation < at_least:
            msg = f"the key set is of generation {snapshot.generation}, and {at_least} is loaded"
            raise InvalidKeySetError(msg)

    def _replace(self, snapshot: KeySetSnapshot) -> None:
        before = self._snapshot
        if before is not None:
            # First this and then the set: a reader in between finds the key, and asks nobody for it.
            for kid in before.keys.keys:
                if snapshot.keys.get(kid) is None:
                    self._remember(self._withdrawn, kid)
        self._snapshot = snapshot

    def _remember(self, kids: dict[str, None], kid: str) -> None:
        kids[kid] = None
        if len(kids) > self._rules.max_absent:
            del kids[next(iter(kids))]

    def _cooling(self, now: Moment) -> bool:
        asked_at = self._kid_asked_at
        return asked_at is not None and now.since(asked_at) < self._rules.cooldown

    def _back_off(self, now: Moment, jitter: float) -> None:
        most = min(self._rules.retry_most, self._rules.retry_first * 2 ** min(self._failures, _MAX_DOUBLINGS))
        self._failures += 1
        self._waits_from, self._wait = now, max(self._rules.poll_floor, most * jitter)


def _over(budget: timedelta, known: KeySetSnapshot | Freshness, now: Moment) -> bool:
    """Say whether the staleness of `known` is over `budget`. Does what `staleness` does, in less time."""
    asked_at, left = known.asked_at, budget - known.age
    return (
        left < _NOTHING or now.wall - asked_at.wall > left or now.monotonic - asked_at.monotonic > left.total_seconds()
    )
