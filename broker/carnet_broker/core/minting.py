"""Minting: from a grant to the exact bytes that are signed.

Rules
-----
1. The end of a token is the least of what the grant, the key and the caller's certificate allow; a token that would
   live shorter than `shortest_life` is refused, for it would end on its way.
2. What is about to be signed is read back by the verifier's own rules first: a broker never signs what no verifier
   would accept.
3. Claims of RFC 9068 section 2.2, confirmation of RFC 8705 section 3.1. Times are whole seconds, rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from carnet.claims import Claims
from carnet.errors import CarnetError
from carnet.jwk import KeySet, PublicJWK
from carnet.verify import Binding, Expectations, assemble, check_claims, encode_unsigned, verify_token
from carnet_broker.core.policy.model import Granted
from carnet_broker.core.workload import Workload

__all__ = ["CertificateEndingError", "Draft", "MintingRules", "check_signature", "draft_token"]


class CertificateEndingError(CarnetError):
    """The caller's certificate ends too soon for a token bound to it to be of use. Renew it first."""

    code = "CERTIFICATE_ENDING"


@dataclass(frozen=True, slots=True, kw_only=True)
class MintingRules:
    """What holds for every token of this issuer."""

    issuer: str
    default_life: timedelta = timedelta(minutes=5)
    longest_life: timedelta = timedelta(hours=1)
    shortest_life: timedelta = timedelta(seconds=30)
    refresh_at: float = 0.6
    """The share of its life after which a token is to be replaced."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A token that lacks its signature."""

    claims: Claims
    kid: str
    signing_input: bytes
    shortened: bool
    """Whether its life is shorter than the caller asked for."""
    rule: str
    """The grant that allows it, as the policy names it."""

    def signed(self, signature: bytes) -> str:
        """Return the token in compact form (RFC 7515 section 7.1)."""
        return assemble(self.signing_input, signature)


def draft_token(
    *,
    workload: Workload,
    audience: str,
    grant: Granted,
    ttl: timedelta | None,
    key: PublicJWK,
    sign_until: datetime,
    token_id: str,
    revocation_version: int,
    now: datetime,
    rules: MintingRules,
) -> Draft:
    """Return the draft of a token for `workload`.

    Raises `CertificateEndingError` where the certificate leaves too little life, `ValueError` where the grant does.
    """
    issued_at = now.replace(microsecond=0)
    wanted = ttl if ttl is not None else rules.default_life
    life = min(wanted, grant.max_ttl, rules.longest_life)
    # The certificate's end is a whole second, and exp == now is over for a verifier, so the two may be equal.
    expires_at = min(issued_at + life, workload.not_after, sign_until + rules.longest_life).replace(microsecond=0)
    if expires_at - issued_at < rules.shortest_life:
        if workload.not_after < issued_at + rules.shortest_life:
            msg = f"the certificate of {workload.spiffe_id} ends at {workload.not_after.isoformat()}"
            raise CertificateEndingError(msg)
        msg = f"a token may not live shorter than {rules.shortest_life}"
        raise ValueError(msg)
    claims = Claims(
        issuer=rules.issuer,
        subject=workload.spiffe_id,
        audience=audience,
        client_id=workload.spiffe_id,
        expires_at=expires_at,
        issued_at=issued_at,
        not_before=issued_at,
        token_id=token_id,
        scopes=grant.scopes,
        confirmation=workload.thumbprint if grant.binding is Binding.CERTIFICATE else None,
        revocation_version=revocation_version,
    )
    signing_input = encode_unsigned(claims, key.kid)
    expectations = _expectations(claims, grant.binding, rules)
    check_claims(claims, expectations=expectations, peer_thumbprint=workload.thumbprint, now=now)
    shortened = ttl is not None and expires_at < issued_at + ttl
    return Draft(claims=claims, kid=key.kid, signing_input=signing_input, shortened=shortened, rule=grant.rule)


def check_signature(token: str, draft: Draft, *, key: PublicJWK, now: datetime, rules: MintingRules) -> None:
    """Verify a finished token as its receiver will. Raises `InvalidTokenError`."""
    binding = Binding.NONE if draft.claims.confirmation is None else Binding.CERTIFICATE
    verify_token(
        token,
        keys=KeySet.of([key]),
        expectations=_expectations(draft.claims, binding, rules),
        peer_thumbprint=draft.claims.confirmation,
        now=now,
    )


def _expectations(claims: Claims, binding: Binding, rules: MintingRules) -> Expectations:
    return Expectations(issuer=rules.issuer, audience=claims.audience, binding=binding, max_life=rules.longest_life)
