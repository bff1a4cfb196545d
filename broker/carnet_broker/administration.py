"""What those who run the brokers may do: cut off what was stolen, and see who has heard of it.

Whoever calls is an admin of the policy (`core.admins`), judged at each call; the policy may have changed. What changes
something is on the audit record before it is answered, and so is each refusal. Looking leaves no record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol, TypeVar

from carnet.admission import Admission
from carnet.errors import InvalidRevocationError
from carnet.jwk import is_thumbprint
from carnet.revocations import Position, RevocationKind
from carnet_broker.acknowledgements import Acknowledgements
from carnet_broker.core.admins import admin_of, peer_address
from carnet_broker.core.keyring import Hold, Keyring, Timing
from carnet_broker.core.ledger import KeyRevocationRecord, RefusalRecord
from carnet_broker.core.policy.model import Policy
from carnet_broker.core.revocation import RevocationRules, new_revocation
from carnet_broker.core.rollout import RolloutState, VerifierSession, laggards, live_sessions, served_since
from carnet_broker.core.spread import Spread, delay_by_store, laggards_first, spread_of
from carnet_broker.core.workload import Workload
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError
from carnet_broker.keyring_loop import KeyringLoop, UnknownKeyError
from carnet_broker.ports import (
    Appended,
    AuditSink,
    AuditUnavailableError,
    Clock,
    KeyStoreUnavailableError,
    ReplicasSeen,
    Rollout,
    StoreUnavailableError,
    VerifierSessions,
)
from carnet_broker.revocation_view import RevocationHolder
from carnet_broker.revoking import Revoker
from carnet_broker.rotation import RotationProgress
from carnet_broker.signing import KeyringHolder

__all__ = ["Administration", "RevokedKey", "RolloutSeen", "Standing", "StoreReader"]

_NO_ADMIN: Final = "the policy names no such admin, or not from this address"
_REVOKE_KEY_WITHIN: Final = 20.0
"""Seconds that whoever revokes a key waits for Vault."""
_TRY_AGAIN_AFTER: Final = timedelta(seconds=1)
_STORE_DOWN: Final = "the broker cannot read its store now"

_Found = TypeVar("_Found")


class StoreReader(Protocol):
    """What is asked of the loop that speaks to the store (`store_loop.StoreLoop`)."""

    def replicas_seen(self) -> ReplicasSeen | None:
        """Return the brokers as of the last look."""

    async def read_again(self) -> bool:
        """Read the revocations anew; say whether the store answered."""


@dataclass(frozen=True, slots=True)
class RevokedKey:
    """What became of the keyring."""

    generation: int
    active_kid: str
    """Empty where no key is left that could sign."""


@dataclass(frozen=True, slots=True)
class RolloutSeen:
    """The standby key on its way to being the signer."""

    kid: str
    generation: int
    permitted: bool
    deadline: datetime | None
    window_ends: datetime | None
    missing: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How brokers, verifiers and rotation stand."""

    position: Position | None
    """Where this broker is, None where it has not read keyring and store yet."""
    seen: ReplicasSeen
    verifiers: tuple[tuple[VerifierSession, bool], ...]
    """The live ones with whether each lags, those first."""
    rollout: RolloutSeen | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Administration:
    """Serves AdminService. Lives on one event loop."""

    policy: Callable[[], Policy]
    revoker: Revoker
    rules: RevocationRules
    revocations: RevocationHolder
    keys: KeyringHolder
    keyring_loop: KeyringLoop
    timing: Timing
    store: StoreReader
    sessions: VerifierSessions
    rollout: Rollout
    acknowledgements: Acknowledgements
    store_threads: Executor
    """For the questions to the store, which may hang."""
    store_timeout: timedelta
    admission: Admission
    audit: AuditSink
    record: Callable[[Sequence[KeyRevocationRecord]], Awaitable[None]]
    unrecorded: Callable[[AuditUnavailableError], None]
    """Hears of what was done and could not be recorded: it stays done."""
    clock: Clock

    def admit(self, workload: Workload, peer: str) -> None:
        """Raise `RefusedError` unless `workload` is an admin at the address `peer`, as gRPC writes it."""
        retry_after = self.admission.admit(str(workload.spiffe_id), 1, self.clock.mono())
        if retry_after is not None:
            text = "too many requests of this workload"
            raise RefusedError(Refusal(RefusalReason.TOO_MANY_REQUESTS, text, retry_after))
        blocked = self.revocations.revocations.blocks(str(workload.spiffe_id)) is not None
        if blocked or admin_of(self.policy(), workload.spiffe_id, peer_address(peer)) is None:
            raise RefusedError(Refusal(RefusalReason.NOT_GRANTED, _NO_ADMIN))

    def refused(self, method: str, reason: str, detail: str, *, workload: Workload, peer: str) -> None:
        """Put a refusal on the audit record."""
        self.audit.refusal(
            RefusalRecord(
                at=self.clock.now(),
                reason=reason,
                subject=str(workload.spiffe_id),
                certificate=workload.thumbprint,
                policy=self.policy().version,
                peer=peer,
                detail=f"{method}: {detail}",
            )
        )

    async def revoke(
        self,
        workload: Workload,
        kind: RevocationKind,
        value: str,
        *,
        ends_at: datetime | None,
        reason: str,
    ) -> Appended:
        """Make a revocation durable, and return it once it is. Raises `RefusedError`."""
        try:
            entry = new_revocation(
                kind,
                value,
                now=self.clock.now(),
                rules=self.rules,
                ends_at=ends_at,
                by=str(workload.spiffe_id),
                reason=reason,
            )
        except InvalidRevocationError as error:
            raise RefusedError(Refusal(RefusalReason.INVALID_REQUEST, str(error))) from error
        if kind is RevocationKind.LIFT:
            await self._check_blocked(value)
        return await self.revoker.revoke(entry, certificate=workload.thumbprint)

    async def _check_blocked(self, subject: str) -> None:
        """Refuse to lift what is not blocked: a name with a slip in it would be lifted, and the block stay."""
        if self.revocations.revocations.blocks(subject) is None:
            await self.store.read_again()  # Another broker may have blocked it just now.
        if self.revocations.revocations.blocks(subject) is None:
            text = "lift: this subject is not blocked"
            raise RefusedError(Refusal(RefusalReason.INVALID_REQUEST, text))

    async def spread(self, version: int) -> Spread:
        """Return how far revocation `version` has spread. Raises `RefusedError`.

        What this broker has heard itself is exact; of verifiers at other brokers it has what the store tells, and times
        only where it was this broker that revoked.
        """
        view = self.revocations.view
        if view is None or not 0 < version <= view.position.version:
            await self.store.read_again()
            view = self.revocations.view
        if view is None or not 0 < version <= view.position.version:
            text = "revocation_version: there is no such revocation"
            raise RefusedError(Refusal(RefusalReason.INVALID_REQUEST, text))
        live = await self._live()
        durable = self.acknowledgements.became_durable(version)

        def delay(session: VerifierSession) -> timedelta | None:
            known, found = self.acknowledgements.delay(session.spiffe_id, session.instance_id, version)
            return found if known or durable is None else delay_by_store(session, durable.at)

        return spread_of(
            live,
            version,
            heard=lambda session: self.acknowledgements.newest(session.spiffe_id, session.instance_id),
            delay=delay,
        )

    async def revoke_key(self, workload: Workload, kid: str, *, peer: str) -> RevokedKey:
        """Stop trusting a signing key. Raises `RefusedError`, or `UnknownKeyError` for one that is not in the keyring.

        This broker does not answer before Vault has the new keyring, and takes `_REVOKE_KEY_WITHIN` for it at most.
        """
        if not is_thumbprint(kid):
            text = "key_id: give the RFC 7638 thumbprint of the key, as carnet-broker keys status lists it"
            raise RefusedError(Refusal(RefusalReason.INVALID_REQUEST, text))
        try:
            async with asyncio.timeout(_REVOKE_KEY_WITHIN):
                keyring = await asyncio.wrap_future(self.keyring_loop.revoke_key(kid))
        except UnknownKeyError:
            raise
        except (TimeoutError, KeyStoreUnavailableError, StoreUnavailableError) as error:
            text = "Vault did not answer in time: the key may be trusted still; ask again, or another broker"
            raise RefusedError(Refusal(RefusalReason.KEY_STORE_UNAVAILABLE, text, _TRY_AGAIN_AFTER)) from error
        active = keyring.active
        revoked = RevokedKey(keyring.generation, "" if active is None else active.kid)
        record = KeyRevocationRecord(
            at=self.clock.now(),
            kid=kid,
            generation=revoked.generation,
            active=revoked.active_kid,
            by=str(workload.spiffe_id),
            certificate=workload.thumbprint,
            peer=peer,
        )
        try:
            await self.record([record])
        except AuditUnavailableError as error:
            self.unrecorded(error)
        return revoked

    async def standing(self) -> Standing:
        """Return how brokers, verifiers and rotation stand. Raises `RefusedError` where the store does not answer."""
        state = await self._ask(self.rollout.state)
        live = await self._live()
        keys, log = self.keys.view, self.revocations.view
        position = None
        if keys is not None and log is not None:
            here = log.position
            position = Position(here.epoch, keys.keyring.generation, here.version, here.digest)
        seen = self._seen()
        rollout = None
        if keys is not None:
            rollout = _rollout_seen(keys.keyring, state, live, seen, self.keyring_loop.progress, self.timing)
        newest = state.generation if rollout is not None else 0
        return Standing(position, seen, tuple(laggards_first(live, newest)), rollout)

    async def _live(self) -> list[VerifierSession]:
        sessions = await self._ask(self.sessions.all)
        seen = self._seen()
        return live_sessions(sessions, {replica.replica_id: replica for replica in seen.replicas}, seen.now)

    def _seen(self) -> ReplicasSeen:
        seen = self.store.replicas_seen()
        if seen is None:
            raise _store_down()
        return seen

    async def _ask(self, question: Callable[[], _Found]) -> _Found:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.store_timeout.total_seconds()):
                return await loop.run_in_executor(self.store_threads, question)
        except (TimeoutError, StoreUnavailableError) as error:
            raise _store_down() from error


def _rollout_seen(
    keyring: Keyring,
    state: RolloutState,
    live: Sequence[VerifierSession],
    seen: ReplicasSeen,
    progress: RotationProgress | None,
    timing: Timing,
) -> RolloutSeen | None:
    """Return where the standby key is on its way, None where there is none or the store does not know it."""
    standby, active = keyring.standby, keyring.active
    if standby is None or state.kid != standby.kid:
        return None
    gate = progress.gate if progress is not None else None
    wait = progress.wait if progress is not None else None
    served = gate.served_since if gate is not None and gate.served_since is not None else None
    if served is None:
        served = served_since(seen.replicas, state.generation, seen.now)
    deadline = None
    if wait is not None and wait.hold is Hold.VERIFIERS:
        deadline = wait.hold_ends
    elif active is not None and active.activated_at is not None and state.raised_at is not None:
        due_at = active.activated_at + timing.rotate_every
        if wait is not None and wait.hold is not None:
            due_at = min(due_at, seen.now)  # It was asked for.
        deadline = max(due_at, state.raised_at) + timing.acknowledge_within
    return RolloutSeen(
        kid=standby.kid,
        generation=state.generation,
        permitted=state.permit is not None,
        deadline=deadline,
        window_ends=None if served is None else served + timing.poller_window,
        missing=len(laggards(live, state.generation)),
    )


def _store_down() -> RefusedError:
    return RefusedError(Refusal(RefusalReason.STORE_UNAVAILABLE, _STORE_DOWN, _TRY_AGAIN_AFTER))
