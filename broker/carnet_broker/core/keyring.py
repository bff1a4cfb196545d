"""The keyring: which signing keys there are, and what may happen to them next.

Rules
-----
1. Everything that decides over a key lives in this file. It is pure: values in, values out, `now` an argument.
2. A key goes ``PENDING -> STANDBY -> ACTIVE -> RETIRED -> REMOVED``, and from any of them to ``REVOKED``: see
   `TRANSITIONS`. Published, so that verifiers accept it, are STANDBY, ACTIVE and RETIRED.
3. At most one key is ACTIVE, and one STANDBY is always kept published: it is what makes a rotation, and the
   replacement of a stolen key, instant and safe.
4. A PENDING key has been recorded but not proven. Only a replica that has signed with it publishes it.
5. A STANDBY may become ACTIVE when nobody who plays by the rules can miss it. First the window for those that poll must
   be over: `Timing.poller_window` after the moment from which every live replica has served it. Then every live
   verifier must have acknowledged it; or the deadline is over, `Timing.acknowledge_within` after the rotation was due
   and the key was there to be loaded, and those that lag are named. The store says so by a permit (`core.rollout`),
   and there is no other way. Where no key is ACTIVE this is waived: then nothing signs, and a new key that a verifier
   must fetch is better than none. Breakglass waives it too.
6. A RETIRED key stays published until the last token that it can have signed is over: the successor's activation,
   plus `island` (how long a replica that is cut off may go on with the old key), plus the longest life of a token,
   plus leeway and skew (`keep_until`, fixed when it retires).
7. A REVOKED key leaves a tombstone for good, so that it is never adopted again. A REMOVED one is forgotten once its
   private key is destroyed.
8. The generation grows by one with each change. A replica never goes back: `check_succession`.
9. No store, no step: while the shared store does not answer (`Gate` is None), no key is made, published or permitted.
   What takes trust away, and what breakglass asks for at once, does not wait for it.

The caller carries out the step that `plan` names, writes the new keyring with check-and-set, and plans again. Any
replica may do so; whoever loses the race has changed nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from carnet.errors import CarnetError
from carnet.jwk import KeySet, PublicJWK
from carnet_broker.core.rotation_timing import Timing

__all__ = [
    "MAX_PUBLISHED_KEYS",
    "TRANSITIONS",
    "ActivateKey",
    "CreateKey",
    "DestroyKey",
    "Gate",
    "Hold",
    "KeyRecord",
    "KeyState",
    "Keyring",
    "KeyringRegressionError",
    "PermitKey",
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
class PermitKey:
    """Ask the store whether the STANDBY key may become the signer. The document does not change by it."""

    kid: str
    overdue: bool
    """Whether the deadline is over: then it may, and the verifiers that have not acknowledged it are named."""


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


class Hold(StrEnum):
    """What a rotation that is due waits for."""

    STORE = "WAITING_FOR_STORE"
    """The shared store does not answer."""
    REPLICAS = "WAITING_FOR_REPLICAS"
    """A live broker has not loaded the standby."""
    POLLERS = "WAITING_FOR_POLLERS"
    """The window for verifiers that poll is not over."""
    VERIFIERS = "WAITING_FOR_VERIFIERS"
    """A live verifier has not acknowledged the standby, and the deadline is not over."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before `until` (None: until somebody asks)."""

    until: datetime | None
    hold: Hold | None = None
    """What holds up a rotation that is due; None where none is."""
    hold_ends: datetime | None = None
    """When `hold` ends at the latest, where that is known."""


Step = CreateKey | PublishKey | PermitKey | ActivateKey | RemoveKey | RevokeKey | DestroyKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What the shared store knows of the way from STANDBY to ACTIVE. Its times are the store's."""

    raised_at: datetime | None = None
    """Since when nobody is admitted without the STANDBY key; None where the store does not know the key."""
    served_since: datetime | None = None
    """Since when every live replica has served the STANDBY key; None while one does not."""
    permitted: bool = False
    """Whether the STANDBY key may become the signer."""
    awaiting: bool = False
    """Whether the store was asked for the permit in this round, and did not give it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was asked for, by CI or by breakglass."""

    rotate_since: datetime | None = None
    """Since when a rotation is wanted, as soon as no verifier can miss the new key; None: none is."""
    rotate_now: bool = False
    """At once."""
    revoke: tuple[str, ...] = ()
    """Key ids to stop trusting at once."""


def plan(keyring: Keyring, *, now: datetime, timing: Timing, gate: Gate | None, wish: Wish) -> Step | Wait:
    """Return the next step, or how long there is none.

    `gate` is what the shared store says; None where it does not answer: then no key is made, published or permitted.
    """
    step = _plan_at_once(keyring, gate, wish)
    if step is not None:
        return step
    rotation = _plan_rotation(keyring, now, timing, gate, wish)
    if not isinstance(rotation, Wait):
        return rotation
    # Tidying comes last: where a private key cannot be destroyed, the keys go on rotating all the same.
    return _plan_tidying(keyring, now) or rotation


def _plan_at_once(
    keyring: Keyring, gate: Gate | None, wish: Wish
) -> RevokeKey | ActivateKey | PublishKey | CreateKey | None:
    """Decide on what no clock has a say in."""
    for kid in wish.revoke:
        key = keyring.get(kid)
        if key is not None and key.state is not KeyState.REVOKED:
            return RevokeKey(kid)
    standby = keyring.standby
    if standby is not None and (keyring.active is None or wish.rotate_now):
        return ActivateKey(standby.kid)
    if gate is None:
        return None
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
    keyring: Keyring, now: datetime, timing: Timing, gate: Gate | None, wish: Wish
) -> ActivateKey | PermitKey | Wait:
    """Decide on the ordinary rotation: due by age or asked for, and safe for every verifier."""
    active, standby = keyring.active, keyring.standby
    ends = [key.keep_until for key in keyring.in_state(KeyState.RETIRED) if key.keep_until is not None]
    if gate is None:
        return Wait(min(ends, default=None), Hold.STORE)
    if active is None or active.activated_at is None or standby is None:
        return Wait(min(ends, default=None))
    if gate.permitted:
        # Also when nobody asks any more: a permit that lies about keeps replicas without Vault from signing.
        return ActivateKey(standby.kid)
    due_at = active.activated_at + timing.rotate_every
    if wish.rotate_since is not None:
        due_at = min(due_at, wish.rotate_since, now)
    return _plan_permit(standby.kid, now, timing, gate, due_at=due_at, ends=ends)


def _plan_permit(
    kid: str, now: datetime, timing: Timing, gate: Gate, *, due_at: datetime, ends: list[datetime]
) -> PermitKey | Wait:
    """Decide whether to ask for the permit: when it is due, the pollers have the key, and nobody has been asked yet."""
    is_due = due_at <= now
    if gate.raised_at is None or gate.served_since is None:
        return Wait(min(ends, default=None), Hold.REPLICAS if is_due else None)
    window_ends = gate.served_since + timing.poller_window
    if not is_due or window_ends > now:
        return Wait(min([*ends, max(due_at, window_ends)]), Hold.POLLERS if is_due else None, window_ends)
    deadline = max(due_at, gate.raised_at) + timing.acknowledge_within
    if gate.awaiting:
        return Wait(min([*ends, deadline]) if now < deadline else min(ends, default=None), Hold.VERIFIERS, deadline)
    return PermitKey(kid, overdue=deadline <= now)


def check_succession(current: Keyring, loaded: Keyring) -> None:
    """Raise `KeyringRegressionError` unless `loaded` may follow `current`.

    A restored backup of Vault would bring back an old generation, and with it keys that were revoked since.
    """
    if loaded.generation < current.generation:
        msg = (
            f"the keyring in Vault is generation {loaded.generation}, but {current.generation} was in force before:"
            " Vault was restored from an older backup, or the document was rolled back"
        )
        raise KeyringRegressionError(msg)
    if loaded.generation == current.generation and loaded != current:
        msg = f"the keyring in Vault differs from the one that was in force as the same generation {loaded.generation}"
        raise KeyringRegressionError(msg)
    for key in current.in_state(KeyState.REVOKED):
        again = loaded.get(key.kid)
        if again is None or again.state is not KeyState.REVOKED:
            msg = f"the keyring in Vault no longer says that key {key.kid} is revoked"
            raise KeyringRegressionError(msg)
