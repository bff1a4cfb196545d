"""Revoking a token, from the request of the workload that it was issued to until the revocation is durable.

The caller is told no more than that a token is not its own: what it holds may be anything that it found. A token is
recognised by its signature, by any key that this issuer publishes, and by its `sub` and `client_id`; what is wrong with
it otherwise, such as its audience, is no reason to keep it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

from carnet.admission import Admission
from carnet.claims import Claims, claims_of_payload
from carnet.errors import InvalidTokenError
from carnet.verify import parse_unverified, verify_signature
from carnet_broker.core.ledger import RefusalRecord, RevocationRecord
from carnet_broker.core.revocation import RevocationRules, revocation_of_token
from carnet_broker.core.workload import Workload
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError
from carnet_broker.ports import Appended, AuditSink, AuditUnavailableError, NewRevocation, StoreUnavailableError
from carnet_broker.signing import KeyringHolder

__all__ = ["Revoker"]

_NOT_ITS_OWN: Final = "this is no token that was issued to the caller, or that speaks for it"


class Revoker:
    """Revokes tokens for the workloads that hold them. Lives on one event loop."""

    def __init__(
        self,
        *,
        issuer: str,
        keys: KeyringHolder,
        rules: RevocationRules,
        admission: Admission,
        audit: AuditSink,
        append: Callable[[Sequence[NewRevocation]], Awaitable[Appended]],
        record: Callable[[Sequence[RevocationRecord]], Awaitable[None]],
        unrecorded: Callable[[AuditUnavailableError], None],
    ) -> None:
        """Wire the parts.

        `append` makes revocations durable, or raises `StoreUnavailableError`. `record` puts them on the audit record;
        where that fails, they hold nevertheless, and `unrecorded` hears of it.
        """
        self._issuer = issuer
        self._keys = keys
        self._rules = rules
        self._admission = admission
        self._audit = audit
        self._append = append
        self._record = record
        self._unrecorded = unrecorded

    async def revoke_token(self, workload: Workload, token: str, *, now: datetime, mono: float) -> int:
        """Revoke `token`, and return the version of the revocation once that is durable; 0 where it is over anyway.

        Raises `RefusedError`: too many requests, not a token of the caller, or the shared store cannot be used.
        """
        try:
            self._admit(workload, mono)
            by = str(workload.spiffe_id)
            claims = self._own(workload, token)
            entry = revocation_of_token(claims, now=now, rules=self._rules, by=by, reason="by its holder")
            if entry is None:
                return 0
            appended = await self.revoke(entry, certificate=workload.thumbprint)
        except RefusedError as error:
            refused = RefusalRecord(
                at=now,
                reason=str(error.refusal.reason),
                subject=str(workload.spiffe_id),
                certificate=workload.thumbprint,
                detail=f"RevokeToken: {error.__cause__ or error.refusal.message}",
            )
            self._audit.refusal(refused)
            raise
        else:
            return appended.standing[-1].version

    def _admit(self, workload: Workload, mono: float) -> None:
        retry_after = self._admission.admit(str(workload.spiffe_id), 1, mono)
        if retry_after is not None:
            text = "too many requests of this workload"
            raise RefusedError(Refusal(RefusalReason.TOO_MANY_REQUESTS, text, retry_after))

    async def revoke(self, entry: NewRevocation, *, certificate: str) -> Appended:
        """Make `entry` durable, record it, and return how it was written. Raises `RefusedError` where the store cannot.

        One that would change nothing is not written, and not recorded: what holds in its place is in `standing`.

        `certificate`: the leaf of whoever asks, by its ``x5t#S256``.
        """
        try:
            appended = await self._append([entry])
        except StoreUnavailableError as error:
            text = "the broker cannot write to its store now; it may have done so: ask again"
            raise RefusedError(Refusal(RefusalReason.STORE_UNAVAILABLE, text, timedelta(seconds=1))) from error
        records = [
            RevocationRecord(
                at=appended.at,
                epoch=appended.position.epoch,
                version=written.version,
                what=str(written.kind),
                value=written.value,
                before_version=written.before_version,
                expires_at=written.expires_at,
                by=entry.by,
                certificate=certificate,
                reason=entry.reason,
            )
            for written in appended.entries
        ]
        if not records:
            return appended
        try:
            await self._record(records)
        except AuditUnavailableError as error:
            # It holds, and must: whoever revokes cannot wait for a disk.
            self._unrecorded(error)
        return appended

    def _own(self, workload: Workload, token: str) -> Claims:
        """Return what `token` says, if it is one of `workload`. Raises `RefusedError`, the same for all that is not."""
        refused = RefusedError(Refusal(RefusalReason.NOT_GRANTED, _NOT_ITS_OWN))
        view = self._keys.view
        try:
            unverified = parse_unverified(token)
            key = view.keyring.get(unverified.kid) if view is not None else None
            if view is None or key is None or key not in view.keyring.published:
                raise refused
            verify_signature(key.jwk, unverified.signing_input, unverified.signature)
            claims = claims_of_payload(unverified.unverified_payload)
        except InvalidTokenError as error:
            raise refused from error
        if claims.issuer != self._issuer or workload.spiffe_id not in (claims.subject, claims.client_id):
            raise refused
        return claims
