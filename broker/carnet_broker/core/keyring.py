"""The keyring: which signing keys there are, and what may happen to them next.

Rules
-----
1. Everything that decides over a key lives in this file. It is pure: values in, values out, `now` an argument.
2. A key goes ``PENDING -> STANDBY -> ACTIVE -> RETIRED -> REMOVED``, and from any of them to ``REVOKED``: see
   `TRANSITIONS`. Published, so that verifiers accept it, are STANDBY, ACTIVE and RETIRED.
3. At most one key is ACTIVE, and one STANDBY is always kept published: it is what makes a rotation, and the
   replacement of a stolen key, instant and safe.
4. A PENDING key has been recorded but not proven. Only a replica that has signed with it publishes it.
5. A STANDBY may become ACTIVE when nobody who plays by the rules can miss it: `Timing.poller_window` after the moment
   from which every live replica has served it. Where no key is ACTIVE this is waived: then nothing signs, and a new
   key that a verifier must fetch is better than none.
6. A RETIRED key stays published until the last token that it can have signed is over: the successor's activation,
   plus `island` (how long a replica that is cut off may go on with the old key), plus the longest life of a token,
   plus leeway and skew (`keep_until`, fixed when it retires).
7. A REVOKED key leaves a tombstone for good, so that it is never adopted again. A REMOVED one is forgotten once its
   private key is destroyed.
8. The generation grows by one with each change. A replica never goes back: `check_succession`.

The caller carries out the step that `plan` names, writes the new keyring with check-and-set, and plans again. Any
replica may do so; whoever loses the race has changed nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from carnet.errors import CarnetError
from carnet.jwk import KeySet, PublicJWK

__all__ = [
    "MAX_PUBLISHED_KEYS",
    "TRANSITIONS",
    "ActivateKey",
    "CreateKey",
    "DestroyKey",
    "KeyRecord",
    "KeyState",
    "Keyring",
    "KeyringRegressionError",
    "PublishKey",
    "RemoveKey",
    "RevokeKey",
    "Step",
    "Timing",
    "Wait",
    "Wish",
    "check_succession",
    "plan",
]

MAX_PUBLISHED_KEYS: Final = 32
"""A rotation waits rather than publish more keys than this: every verifier has to hold them."""


class KeyringRegressionError(CarnetError):
    """A loaded keyring is older than the one in use, or brings back a revoked key. The one in use stays."""

    code = "KEYRING_REGRESSION"


class KeyState(StrEnum):
    """The life of a key."""

    PENDING = "PENDING"
    STANDBY = "STANDBY"
    ACTIVE = "ACTIVE"
    RETIRED = "RETIRED"
    REMOVED = "REMOVED"
    REVOKED = "REVOKED"


TRANSITIONS: Final[Mapping[KeyState, frozenset[KeyState]]] = MappingProxyType(
    {
        KeyState.PENDING: frozenset({KeyState.STANDBY, KeyState.REVOKED}),
        KeyState.STANDBY: frozenset({KeyState.ACTIVE, KeyState.REVOKED}),
        KeyState.ACTIVE: frozenset({KeyState.RETIRED, KeyState.REVOKED}),
        KeyState.RETIRED: frozenset({KeyState.REMOVED, KeyState.REVOKED}),
        KeyState.REMOVED: frozenset({KeyState.REVOKED}),
        KeyState.REVOKED: frozenset(),
    }
)

PUBLISHED: Final = frozenset({KeyState.STANDBY, KeyState.ACTIVE, KeyState.RETIRED})
LIVE: Final = PUBLISHED | {KeyState.PENDING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The durations that rotation rests on. Defaults are for production; tests use small ones."""

    max_age: timedelta = timedelta(minutes=5)
    """For how long a verifier may use a key set before it fetches it again; served with every set."""
    poller_interval: timedelta = timedelta(minutes=10)
    """The longest pause of verifiers that poll by a clock of their own and ignore the max-age. 0: there are none."""
    replica_lag: timedelta = timedelta(seconds=15)
    """The longest time that a replica needs to serve a document after it was written."""
    skew: timedelta = timedelta(seconds=5)
    """How far two clocks may be apart."""
    leeway: timedelta = timedelta(seconds=30)
    """What verifiers allow on `nbf` and `iat`."""
    longest_life: timedelta = timedelta(hours=1)
    """No token lives longer than this, whatever the policy says."""
    island: timedelta = timedelta(minutes=15)
    """How long a replica that nobody can reach may go on signing."""
    sign_for: timedelta = timedelta(days=7)
    """For how long a key may sign after its activation."""
    rotate_every: timedelta = timedelta(days=1)
    """The age at which the ACTIVE key is replaced with no request."""
    min_interval: timedelta = timedelta(minutes=10)
    """The shortest time between two rotations that CI asked for."""

    def __post_init__(self) -> None:
        """Refuse durations that contradict each other, with `ValueError`."""
        if self.rotate_every + self.poller_window >= self.sign_for:
            needed = "rotate_every + max_age + poller_interval + skew"
            msg = f"sign_for must be longer than {needed}: the key would end before the next one signs"
            raise ValueError(msg)
        if self.island > self.sign_for:
            msg = "island must not be longer than sign_for"
            raise ValueError(msg)

    @property
    def poller_window(self) -> timedelta:
        """How long after every replica serves a key the slowest verifier has it."""
        return self.max_age + self.poller_interval + self.skew

    @property
    def keep_retired(self) -> timedelta:
        """How long a RETIRED key stays published after its successor's activation."""
        return self.island + self.longest_life + self.leeway + self.skew


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """One key in the keyring. Every time is aware UTC; a time that has not come is None."""

    jwk: PublicJWK
    state: KeyState
    created_at: datetime
    version: int | None = None
    """The Transit key version; None where the private key is in KV."""
    published_at: datetime | None = None
    activated_at: datetime | None = None
    answers: tuple[str, ...] = ()
    """The ids of the requests that the activation answered: no clock tells that as surely."""
    sign_until: datetime | None = None
    retired_at: datetime | None = None
    keep_until: datetime | None = None
    ended_at: datetime | None = None
    """When it was REMOVED or REVOKED."""
    destroyed_at: datetime | None = None

    @property
    def kid(self) -> str:
        """The RFC 7638 thumbprint of the public key."""
        return self.jwk.kid

    def moved(self, state: KeyState, **changes: Any) -> KeyRecord:  # noqa: ANN401 - fields of many types
        """Return this record in `state`. Raises `ValueError` for a move that `TRANSITIONS` does not have."""
        if state not in TRANSITIONS[self.state]:
            msg = f"key {self.kid} cannot go from {self.state} to {state}"
            raise ValueError(msg)
        return replace(self, state=state, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyring:
    """All keys of one issuer, by age. Immutable; each change makes the next generation."""

    issuer: str
    generation: int = 0
    keys: tuple[KeyRecord, ...] = ()

    def get(self, kid: str) -> KeyRecord | None:
        """Return the key of that name."""
        return next((key for key in self.keys if key.kid == kid), None)

    def require(self, kid: str) -> KeyRecord:
        """Return the key of that name. Raises `ValueError` where there is none."""
        key = self.get(kid)
        if key is None:
            msg = f"key {kid} is not in the keyring"
            raise ValueError(msg)
        return key

    def in_state(self, state: KeyState) -> tuple[KeyRecord, ...]:
        """Return the keys in `state`, oldest first."""
        return tuple(key for key in self.keys if key.state is state)

    @property
    def active(self) -> KeyRecord | None:
        """The key that signs."""
        return next(iter(self.in_state(KeyState.ACTIVE)), None)

    @property
    def standby(self) -> KeyRecord | None:
        """The key that signs next."""
        return next(iter(self.in_state(KeyState.STANDBY)), None)

    @property
    def live(self) -> tuple[KeyRecord, ...]:
        """The keys whose private half must go on existing."""
        return tuple(key for key in self.keys if key.state in LIVE)

    @property
    def published(self) -> tuple[KeyRecord, ...]:
        """The keys that verifiers accept."""
        return tuple(key for key in self.keys if key.state in PUBLISHED)

    def key_set(self) -> KeySet:
        """Return the published keys. Raises `ValueError` where there are none: an empty set is never served."""
        published = self.published
        if not published:
            msg = "the keyring has no published key"
            raise ValueError(msg)
        return KeySet.of(key.jwk for key in published)

    # -- changes: each returns the next generation -----------------------------------------------------------------

    def with_created(self, jwk: PublicJWK, version: int | None, now: datetime) -> Keyring:
        """Record a new key as PENDING. Raises `ValueError` for a key that the keyring knows already."""
        if self.get(jwk.kid) is not None:
            msg = f"key {jwk.kid} is in the keyring already"
            raise ValueError(msg)
        record = KeyRecord(jwk=jwk, version=version, state=KeyState.PENDING, created_at=now)
        return self._next((*self.keys, record))

    def with_published(self, kid: str, now: datetime) -> Keyring:
        """Publish a proven key: PENDING to STANDBY."""
        return self._moved(kid, KeyState.STANDBY, published_at=now)

    def with_activated(self, kid: str, now: datetime, timing: Timing, *, answers: Sequence[str] = ()) -> Keyring:
        """Make the standby the signer, and retire the key that was. `answers` are the requests that this satisfies."""
        keys = [
            key.moved(KeyState.RETIRED, retired_at=now, keep_until=now + timing.keep_retired)
            if key.state is KeyState.ACTIVE
            else key
            for key in self.keys
        ]
        changed = replace(self, keys=tuple(keys))
        return changed._moved(  # noqa: SLF001 - of this class
            kid, KeyState.ACTIVE, activated_at=now, sign_until=now + timing.sign_for, answers=tuple(answers)
        )

    def with_removed(self, kid: str, now: datetime) -> Keyring:
        """Stop publishing a key whose last token is over."""
        return self._moved(kid, KeyState.REMOVED, ended_at=now)

    def with_revoked(self, kid: str, now: datetime, timing: Timing) -> Keyring:
        """Stop trusting a key at once. Where it was the signer, the standby takes over in the same step."""
        was_active = self.require(kid).state is KeyState.ACTIVE
        changed = self._moved(kid, KeyState.REVOKED, ended_at=now)
        standby = changed.standby
        if was_active and standby is not None:
            activated = changed.with_activated(standby.kid, now, timing)
            return replace(activated, generation=self.generation + 1)
        return changed

    def with_destroyed(self, kid: str, now: datetime) -> Keyring:
        """Note that the private key is gone: a REMOVED key is forgotten, a REVOKED one leaves its tombstone."""
        if self.require(kid).state is KeyState.REVOKED:
            return self._next(tuple(replace(k, destroyed_at=now) if k.kid == kid else k for k in self.keys))
        return self._next(tuple(key for key in self.keys if key.kid != kid))

    def _moved(self, kid: str, state: KeyState, **changes: Any) -> Keyring:  # noqa: ANN401 - as above
        moved = self.require(kid).moved(state, **changes)
        return self._next(tuple(moved if key.kid == kid else key for key in self.keys))

    def _next(self, keys: tuple[KeyRecord, ...]) -> Keyring:
        return replace(self, generation=self.generation + 1, keys=keys)


# -- what next ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreateKey:
    """Make a new private key, and record it as PENDING."""


@dataclass(frozen=True, slots=True)
class PublishKey:
    """Sign with the PENDING key; if that is good, publish it."""

    kid: str


@dataclass(frozen=True, slots=True)
class ActivateKey:
    """Make the STANDBY key the signer."""

    kid: str


@dataclass(frozen=True, slots=True)
class RemoveKey:
    """Stop publishing a RETIRED key."""

    kid: str


@dataclass(frozen=True, slots=True)
class RevokeKey:
    """Stop trusting a key."""

    kid: str


@dataclass(frozen=True, slots=True)
class DestroyKey:
    """Destroy the private key of a REMOVED or REVOKED key."""

    kid: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before `until` (None: until somebody asks)."""

    until: datetime | None


Step = CreateKey | PublishKey | ActivateKey | RemoveKey | RevokeKey | DestroyKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was asked for, by CI or by breakglass."""

    rotate: bool = False
    """As soon as no verifier can miss the new key."""
    rotate_now: bool = False
    """At once."""
    revoke: tuple[str, ...] = ()
    """Key ids to stop trusting at once."""


def plan(keyring: Keyring, *, now: datetime, timing: Timing, served_since: datetime | None, wish: Wish) -> Step | Wait:
    """Return the next step, or how long there is none.

    `served_since` is the moment from which every live replica has served the STANDBY key; None where that is not known
    yet, which lets nothing activate it but a wish "now".
    """
    step = _plan_at_once(keyring, wish)
    if step is not None:
        return step
    rotation = _plan_rotation(keyring, now, timing, served_since, rotate=wish.rotate)
    if isinstance(rotation, ActivateKey):
        return rotation
    # Tidying comes last: where a private key cannot be destroyed, the keys go on rotating all the same.
    return _plan_tidying(keyring, now) or rotation


def _plan_at_once(keyring: Keyring, wish: Wish) -> RevokeKey | ActivateKey | PublishKey | CreateKey | None:
    """Decide on what no clock has a say in."""
    for kid in wish.revoke:
        key = keyring.get(kid)
        if key is not None and key.state is not KeyState.REVOKED:
            return RevokeKey(kid)
    standby = keyring.standby
    if standby is not None and (keyring.active is None or wish.rotate_now):
        return ActivateKey(standby.kid)
    for key in keyring.in_state(KeyState.PENDING):
        return PublishKey(key.kid)
    full = len(keyring.published) >= MAX_PUBLISHED_KEYS
    if standby is None and not full:
        return CreateKey()
    return None


def _plan_tidying(keyring: Keyring, now: datetime) -> RemoveKey | DestroyKey | None:
    """Decide on what is no longer needed."""
    for key in keyring.in_state(KeyState.RETIRED):
        if key.keep_until is not None and key.keep_until <= now:
            return RemoveKey(key.kid)
    for key in keyring.keys:
        if key.state is KeyState.REMOVED or (key.state is KeyState.REVOKED and key.destroyed_at is None):
            return DestroyKey(key.kid)
    return None


def _plan_rotation(
    keyring: Keyring, now: datetime, timing: Timing, served_since: datetime | None, *, rotate: bool
) -> ActivateKey | Wait:
    """Decide on the ordinary rotation: due by age or asked for, and safe for every verifier."""
    active, standby = keyring.active, keyring.standby
    ends = [key.keep_until for key in keyring.in_state(KeyState.RETIRED) if key.keep_until is not None]
    if active is None or active.activated_at is None or standby is None or served_since is None:
        return Wait(min(ends, default=None))
    due_at = now if rotate else active.activated_at + timing.rotate_every
    ready_at = max(due_at, served_since + timing.poller_window)
    if ready_at <= now:
        return ActivateKey(standby.kid)
    return Wait(min([*ends, ready_at]))


def check_succession(current: Keyring, loaded: Keyring) -> None:
    """Raise `KeyringRegressionError` unless `loaded` may follow `current`.

    A restored backup of Vault would bring back an old generation, and with it keys that were revoked since.
    """
    if loaded.generation < current.generation:
        msg = (
            f"the keyring in Vault is generation {loaded.generation}, but {current.generation} was loaded before:"
            " Vault was restored from an older backup, or the document was rolled back"
        )
        raise KeyringRegressionError(msg)
    if loaded.generation == current.generation and loaded != current:
        msg = f"the keyring in Vault differs from the one that was loaded as the same generation {loaded.generation}"
        raise KeyringRegressionError(msg)
    for key in current.in_state(KeyState.REVOKED):
        again = loaded.get(key.kid)
        if again is None or again.state is not KeyState.REVOKED:
            msg = f"the keyring in Vault no longer says that key {key.kid} is revoked"
            raise KeyringRegressionError(msg)
