"""What may be revoked, and for how long an entry of the log lasts. Pure.

Rules
-----
1. An entry lasts as long as there can be something that it refuses, and then `leeway` and `skew` longer: clocks differ.
2. TOKEN and ROOT: to the end of the token, where that is known, else for the longest life that a token can have.
3. SUBJECT and LIFT: for `max_staleness` and then the longest life that a token can have. A broker that has not heard
   of the entry goes on issuing tokens with a lower `rv` for so long, and no longer.
4. CERTIFICATE: to its end, where that is known, else for the longest life that a certificate can have.
5. BLOCK: until lifted.

`new_revocation` is for whoever revokes by name (AdminService); `revocation_of_token` for whoever holds the token
(RevokeToken). What they return goes to `RevocationLog.append`, which gives it its version.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from carnet.claims import Claims
from carnet.errors import InvalidRevocationError
from carnet.revocations import Revocation, RevocationKind, check_entry
from carnet_broker.ports import NewRevocation

__all__ = ["MAX_REASON", "RevocationRules", "new_revocation", "revocation_of_token"]

MAX_REASON: Final = 200
"""Characters of the reason of a revocation."""

_FARTHEST_END: Final = timedelta(days=10 * 365)
_BY_VERSION: Final = frozenset({RevocationKind.SUBJECT, RevocationKind.BLOCK, RevocationKind.LIFT})


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationRules:
    """The lives that entries follow from."""

    longest_life: timedelta
    """Of a token."""
    max_leaf_life: timedelta
    """Of a certificate."""
    max_staleness: timedelta
    """How old the revocations of a broker may be while it issues."""
    leeway: timedelta
    skew: timedelta

    @property
    def margin(self) -> timedelta:
        """How much longer than what it refuses an entry lasts."""
        return self.leeway + self.skew

    def longest(self, kind: RevocationKind) -> timedelta:
        """Return how long from now there can be something that an entry of `kind` refuses, where nothing is known."""
        if kind is RevocationKind.CERTIFICATE:
            return self.max_leaf_life
        return self.longest_life + (self.max_staleness if kind in _BY_VERSION else timedelta(0))


def new_revocation(
    kind: RevocationKind,
    value: str,
    *,
    now: datetime,
    rules: RevocationRules,
    ends_at: datetime | None = None,
    by: str = "",
    reason: str = "",
) -> NewRevocation:
    """Return the entry that revokes `value`. Raises `InvalidRevocationError` that says what is wrong.

    `ends_at`: when what is revoked ends by itself, None where that is not known; for the kinds that name a token or a
    certificate. `by` is the SPIFFE ID of whoever asks.
    """
    if len(reason) > MAX_REASON or not (reason.isprintable() or not reason):
        msg = f"reason: at most {MAX_REASON} printable characters"
        raise InvalidRevocationError(msg)
    if kind in _BY_VERSION and ends_at is not None:
        msg = f"ends_at: a revocation of kind {kind} names no single token or certificate, so nothing has that end"
        raise InvalidRevocationError(msg)
    if ends_at is not None and ends_at <= now:
        msg = f"ends_at: {ends_at.isoformat()} is over, so there is nothing to revoke"
        raise InvalidRevocationError(msg)
    if ends_at is not None and ends_at > now + _FARTHEST_END:
        msg = f"ends_at: {ends_at.isoformat()} is farther away than any end can be"
        raise InvalidRevocationError(msg)
    expires_at = None
    if kind is not RevocationKind.BLOCK:
        expires_at = _whole_second((ends_at or now + rules.longest(kind)) + rules.margin)
    before_version = 1 if kind in _BY_VERSION else 0
    check_entry(Revocation(1, kind, value, before_version, expires_at))
    return NewRevocation(kind=kind, value=value, expires_at=expires_at, by=by, reason=reason)


def revocation_of_token(
    claims: Claims, *, now: datetime, rules: RevocationRules, by: str = "", reason: str = ""
) -> NewRevocation | None:
    """Return the entry that revokes the token of `claims`, None where it is over everywhere by now."""
    if now >= claims.expires_at + rules.margin:
        return None
    expires_at = _whole_second(claims.expires_at + rules.margin)
    return NewRevocation(kind=RevocationKind.TOKEN, value=claims.token_id, expires_at=expires_at, by=by, reason=reason)


def _whole_second(at: datetime) -> datetime:
    """Return `at`, rounded up: an entry may last longer than it has to, and not shorter."""
    return at if at.microsecond == 0 else at.replace(microsecond=0) + timedelta(seconds=1)
