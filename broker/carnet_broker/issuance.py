"""Issuing a token, from an authenticated workload's request to the finished token.

This is the whole way, in order: admission, policy, draft, audit, signature. No token leaves unaudited: its record is
durable before the signature is made, and counts as issued from then on, whatever becomes of the answer.

Everything here runs on the event loop and takes microseconds, but for two waits: for the disk, and for a signer that is
not in this process.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from carnet.admission import Admission
from carnet.claims import MAX_SCOPES, is_name, is_scope_token
from carnet.errors import CarnetError, InvalidTokenError
from carnet_broker.core.keyring import KeyRecord
from carnet_broker.core.ledger import IssueRecord, RefusalRecord
from carnet_broker.core.minting import CertificateEndingError, Draft, MintingRules, check_signature, draft_token
from carnet_broker.core.policy.model import Denial, Policy
from carnet_broker.core.workload import Workload
from carnet_broker.ports import AuditSink, AuditUnavailableError, KeyStoreUnavailableError, Signer
from carnet_broker.revocation_view import RevocationHolder
from carnet_broker.signing import KeyringHolder, NoSigningKeyError

__all__ = ["MAX_BATCH", "Issued", "Issuer", "Refusal", "RefusalReason", "RefusedError", "TokenRequest"]

MAX_BATCH: Final = 64
"""Requests in one call."""

CHECK_EVERY: Final = 64
"""One in so many signatures of a key in memory is verified before its token leaves."""


class RefusalReason(StrEnum):
    """Why no token was issued; the code that the caller sees."""

    INVALID_REQUEST = "INVALID_REQUEST"
    NOT_GRANTED = "NOT_GRANTED"
    SCOPE_NOT_GRANTED = "SCOPE_NOT_GRANTED"
    BLOCKED = "BLOCKED"
    CERTIFICATE_ENDING = "CERTIFICATE_ENDING"
    TOO_MANY_REQUESTS = "TOO_MANY_REQUESTS"
    NO_SIGNING_KEY = "NO_SIGNING_KEY"
    KEY_STORE_UNAVAILABLE = "KEY_STORE_UNAVAILABLE"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    CLOCK_IS_OFF = "CLOCK_IS_OFF"
    AUDIT_UNAVAILABLE = "AUDIT_UNAVAILABLE"


_DENIALS: Final = {
    RefusalReason.NOT_GRANTED: "the policy gives this workload no grant for this audience",
    RefusalReason.SCOPE_NOT_GRANTED: "a scope that was asked for is outside of what the policy grants",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer that carries no token."""

    reason: RefusalReason
    message: str
    """A text that the caller may see."""
    retry_after: timedelta | None = None
    """How long to wait before asking again can help; None where it cannot."""


class RefusedError(CarnetError):
    """No token was issued; `refusal` says why. The cause, for the log, is its ``__cause__``."""

    code = "REFUSED"

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"{refusal.reason}: {refusal.message}")
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What a workload asks for, as it came over the wire: nothing of it has been checked."""

    audience: str
    scopes: tuple[str, ...]
    """Empty asks for all that the grant gives."""
    ttl: timedelta | None
    """None asks for the default life."""


def _check(request: TokenRequest) -> None:
    """Raise `RefusedError` with INVALID_REQUEST and the name of the field unless `request` is well formed."""
    if not is_name(request.audience):
        msg = "audience: give the name of one audience"
        raise _invalid(msg)
    scopes = request.scopes
    if len(scopes) > MAX_SCOPES or not all(map(is_scope_token, scopes)) or len(set(scopes)) != len(scopes):
        msg = f"scopes: at most {MAX_SCOPES} scope-tokens (RFC 6749 section 3.3), each once"
        raise _invalid(msg)
    if request.ttl is not None and request.ttl < timedelta(seconds=1):
        msg = "ttl: at least one second, or none for the default"
        raise _invalid(msg)


@dataclass(frozen=True, slots=True)
class Issued:
    """A finished token and what its holder has to know of it."""

    token: str
    draft: Draft
    expires_in: timedelta
    refresh_in: timedelta


class Issuer:
    """Issues tokens. Lives on one event loop."""

    def __init__(
        self,
        *,
        rules: MintingRules,
        policy: Callable[[], Policy],
        keys: KeyringHolder,
        admission: Admission,
        audit: AuditSink,
        commit: Callable[[Sequence[IssueRecord]], Awaitable[None]],
        sign: Callable[[Signer, Sequence[bytes]], Awaitable[list[bytes]]],
        check_every: int = CHECK_EVERY,
        revocations: RevocationHolder,
        obstacle: Callable[[datetime, float], Refusal | None] = lambda _now, _mono: None,
        count_issued: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Wire the parts.

        `commit` makes records durable, or raises `AuditUnavailableError`. `sign` signs, or raises
        `KeyStoreUnavailableError`. Of the signatures one in `check_every` is verified before its token leaves.
        `obstacle` says why nothing may be issued at a time, None where it may. `count_issued` hears how many tokens
        each call got.
        """
        self._rules = rules
        self._policy = policy
        self._keys = keys
        self._admission = admission
        self._audit = audit
        self._commit = commit
        self._sign = sign
        self._check_every = check_every
        self._revocations = revocations
        self._obstacle = obstacle
        self._count_issued = count_issued
        self._signed = 0

    async def issue(
        self, workload: Workload, requests: Sequence[TokenRequest], *, now: datetime, mono: float
    ) -> list[Issued | RefusedError]:
        """Answer each of `requests`, in their order.

        A batch costs as many calls as it has requests, and waits for the disk once. Raises `RefusedError` where the
        whole call is refused: none or too many requests, too many calls, no key to sign with, the audit record cannot
        be written, no signature. Each refusal, of a call or of one request, is on record once.
        """
        try:
            return await self._answers(workload, requests, now, mono)
        except RefusedError as error:
            self._record_refusal(error, workload, now)
            raise

    async def _answers(
        self, workload: Workload, requests: Sequence[TokenRequest], now: datetime, mono: float
    ) -> list[Issued | RefusedError]:
        """Answer each of `requests`, or raise `RefusedError` for the whole call."""
        # Before anything else: a call that is not well formed is a call too.
        retry_after = self._admission.admit(str(workload.spiffe_id), len(requests), mono)
        if retry_after is not None:
            raise RefusedError(
                Refusal(RefusalReason.TOO_MANY_REQUESTS, "too many requests of this workload", retry_after)
            )
        if not 0 < len(requests) <= MAX_BATCH:
            msg = f"requests: one to {MAX_BATCH} in a call"
            raise _invalid(msg)
        # The version before the blocks: a token never claims to know of a revocation that was not looked at.
        version = self._revocations.version
        if self._revocations.revocations.blocks(str(workload.spiffe_id)) is not None:
            raise RefusedError(Refusal(RefusalReason.BLOCKED, "this workload is blocked"))
        obstacle = self._obstacle(now, mono)
        if obstacle is not None:
            raise RefusedError(obstacle)
        try:
            key, signer = self._keys.signing_key(now, mono)
        except NoSigningKeyError as error:
            refusal = Refusal(RefusalReason.NO_SIGNING_KEY, "the broker has no signing key now", timedelta(seconds=5))
            raise RefusedError(refusal) from error
        policy = self._policy()
        answers = [self._draft(workload, request, policy, key, version, now) for request in requests]
        drafts = [answer for answer in answers if isinstance(answer, Draft)]
        if drafts:
            await self._record(workload, drafts, policy)
        issued = iter(await self._finish(drafts, key, signer, now) if drafts else ())
        return [answer if isinstance(answer, RefusedError) else next(issued) for answer in answers]

    def _draft(
        self, workload: Workload, request: TokenRequest, policy: Policy, key: KeyRecord, version: int, now: datetime
    ) -> Draft | RefusedError:
        """Decide by the policy, and draft the token of a grant."""
        try:
            _check(request)
        except RefusedError as error:
            # What is not well formed is not recorded in the caller's words: the record says only that it came.
            self._record_refusal(error, workload, now, policy=policy.version)
            return error
        decision = policy.decide(workload.spiffe_id, request.audience, request.scopes)
        if isinstance(decision, Denial):
            reason = RefusalReason(decision.reason)
            refused = RefusedError(Refusal(reason, _DENIALS[reason]))
            self._record_refusal(refused, workload, now, request, policy.version)
            return refused
        try:
            return draft_token(
                workload=workload,
                audience=request.audience,
                grant=decision,
                ttl=request.ttl,
                key=key.jwk,
                sign_until=key.sign_until or now,
                token_id=secrets.token_urlsafe(16),
                revocation_version=version,
                now=now,
                rules=self._rules,
            )
        except CertificateEndingError as error:
            message = "the certificate of the caller ends too soon for a token: renew it first"
            refused = RefusedError(Refusal(RefusalReason.CERTIFICATE_ENDING, message))
            refused.__cause__ = error
        except ValueError as error:
            refused = _invalid(f"ttl: {error}")
        except InvalidTokenError as error:
            # A grant of many long scopes, all of them asked for: no verifier would take so large a token.
            refused = _invalid("scopes: so many do not fit into one token; ask for fewer")
            refused.__cause__ = error
        self._record_refusal(refused, workload, now, request, policy.version)
        return refused

    async def _record(self, workload: Workload, drafts: Sequence[Draft], policy: Policy) -> None:
        """Make the intents to issue durable, or refuse the call."""
        records = [
            IssueRecord(
                at=draft.claims.issued_at,
                token_id=draft.claims.token_id,
                kid=draft.kid,
                subject=str(draft.claims.subject),
                audience=draft.claims.audience,
                scopes=draft.claims.scopes,
                expires_at=draft.claims.expires_at,
                certificate=workload.thumbprint,
                bound=draft.claims.confirmation is not None,
                policy=policy.version,
                rule=draft.rule,
            )
            for draft in drafts
        ]
        try:
            await self._commit(records)
        except AuditUnavailableError as error:
            message = "the broker cannot write its audit record now"
            raise RefusedError(Refusal(RefusalReason.AUDIT_UNAVAILABLE, message, timedelta(seconds=1))) from error

    async def _finish(self, drafts: Sequence[Draft], key: KeyRecord, signer: Signer, now: datetime) -> list[Issued]:
        """Sign drafts whose records are durable."""
        try:
            signatures = await self._sign(signer, [draft.signing_input for draft in drafts])
            tokens = [draft.signed(signature) for draft, signature in zip(drafts, signatures, strict=True)]
            for token, draft in zip(tokens, drafts, strict=True):
                self._signed += 1
                if self._signed % self._check_every == 0:
                    check_signature(token, draft, key=key.jwk, now=now, rules=self._rules)
        except (KeyStoreUnavailableError, InvalidTokenError) as error:
            refusal = Refusal(RefusalReason.KEY_STORE_UNAVAILABLE, "the broker cannot sign now", timedelta(seconds=1))
            raise RefusedError(refusal) from error
        issued = []
        for token, draft in zip(tokens, drafts, strict=True):
            expires_in = draft.claims.expires_at - now
            issued.append(Issued(token, draft, expires_in, expires_in * self._rules.refresh_at))
        self._count_issued(len(issued))
        return issued

    def _record_refusal(
        self,
        error: RefusedError,
        workload: Workload,
        now: datetime,
        request: TokenRequest | None = None,
        policy: str = "",
    ) -> None:
        """Put a refusal on record: of `request`, where its words may be there, and by which version of the policy."""
        self._audit.refusal(
            RefusalRecord(
                at=now,
                reason=str(error.refusal.reason),
                subject=str(workload.spiffe_id),
                audience=request.audience if request is not None else "",
                scopes=request.scopes if request is not None else (),
                certificate=workload.thumbprint,
                policy=policy,
                detail=str(error.__cause__ or ""),
            )
        )


def _invalid(message: str) -> RefusedError:
    return RefusedError(Refusal(RefusalReason.INVALID_REQUEST, message))
