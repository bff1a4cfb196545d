"""What this replica knows of keys and revocations, and whom it may tell: those that watch, and those that poll."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta

from carnet.revocations import Position
from carnet_broker.core.lost_entries import epoch_of
from carnet_broker.core.policy.model import Policy
from carnet_broker.core.watching import Standing, claim_is_possible, standing
from carnet_broker.core.workload import Workload
from carnet_broker.edges.grpc.status import BehindError, StaleError, UnavailableError
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError
from carnet_broker.ports import Clock, LogPosition
from carnet_broker.revocation_view import RevocationHolder, RevocationView
from carnet_broker.signing import KeyringHolder, KeyringView
from carnet_broker.store_parts import Claim

__all__ = ["TrustKnowledge", "invalid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustKnowledge:
    """What this replica knows, and how it gets to know more."""

    keys: KeyringHolder
    revocations: RevocationHolder
    policy: Callable[[], Policy]
    clock: Clock
    max_staleness: timedelta
    """How old what this replica knows may be before it tells nobody."""
    read_keyring: Callable[[], Awaitable[bool]]
    read_store: Callable[[Claim | None], Awaitable[bool]]
    """Reads the store anew; with what a verifier claims to have seen of it."""

    def views(self) -> tuple[KeyringView, RevocationView]:
        """Return what this replica knows. Raises `UnavailableError` or `StaleError` where that is nothing to tell."""
        keys, log = self.keys.view, self.revocations.view
        if keys is None or not keys.jwks:
            msg = "no keyring is loaded"
            raise UnavailableError(msg)
        now, mono = self.clock.now(), self.clock.mono()
        if log is None or max(keys.age(now, mono), log.age(now, mono)) > self.max_staleness:
            msg = f"keyring or revocations have not been read for {self.max_staleness}"
            raise StaleError(msg)
        return keys, log

    def is_blocked(self, identity: str) -> bool:
        """Say whether a block of that SPIFFE ID is in force here: no rotation waits for its verifiers."""
        return self.revocations.revocations.blocks(identity) is not None

    def check_serves(self, workload: Workload, audience: str) -> None:
        """Raise `RefusedError` unless the policy lets `workload` watch `audience`."""
        known = self.policy().audiences.get(audience)
        if known is None or not any(pattern.matches(workload.spiffe_id) for pattern in known.served_by):
            text = "the policy does not name this workload in served_by of this audience"
            raise RefusedError(Refusal(RefusalReason.NOT_GRANTED, text))

    async def catch_up(self, peer: Position | None, *, by: str) -> None:
        """Read again what a verifier that is ahead knows already. Raises where this replica stays behind.

        `by` is the verifier, for the log: its SPIFFE ID, and its instance where that is known.
        """
        for _ in range(3):
            keys, log = self.views()
            where = standing(peer, keys.keyring.generation, log.position)
            if peer is None or where is Standing.FOLLOWS:
                return
            claim = Claim(LogPosition(peer.epoch, peer.revocation_version, peer.revocation_digest), by)
            if where is Standing.AHEAD_IN_KEYRING:
                answered = await self.read_keyring()
            else:
                answered = await self.read_store(None)
                _, log = self.views()
                still = standing(peer, peer.generation, log.position) is not Standing.FOLLOWS
                if answered and still:
                    latest = epoch_of(self.clock.now())
                    if not claim_is_possible(peer, log.position, latest_epoch=latest):
                        msg = "position: no broker can have told this"
                        raise invalid(msg)
                    answered = await self.read_store(claim)
            if not answered:
                break
        keys, log = self.views()
        where = standing(peer, keys.keyring.generation, log.position)
        if where is not Standing.FOLLOWS:
            msg = f"the verifier is {where}"
            raise BehindError(msg)

    def check_serves_any(self, workload: Workload) -> None:
        """Raise `RefusedError` unless the policy lets `workload` watch an audience."""
        audiences = self.policy().audiences.values()
        if not any(pattern.matches(workload.spiffe_id) for known in audiences for pattern in known.served_by):
            text = "the policy does not name this workload in served_by of an audience"
            raise RefusedError(Refusal(RefusalReason.NOT_GRANTED, text))


def invalid(message: str) -> RefusedError:
    """Return the refusal of a request that is not well formed."""
    return RefusedError(Refusal(RefusalReason.INVALID_REQUEST, message))
