"""What a server interceptor decides, whichever stack it is for: what the caller shows, and whether it is enough.

The order: the method's rule; exactly one bearer token; the caller's certificate as TLS knows it, inside its validity
window at this moment (an open or resumed connection outlives it); the verifier; the scopes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Final, Protocol, TypeAlias

from cryptography import x509

from carnet.claims import Claims
from carnet.errors import ConfigError, InvalidIdentityError
from carnet.grpc.refusals import Refusal, RefusedError
from carnet.grpc.rules import Rule, parse_rules
from carnet.keysets import OnStale
from carnet.spiffe import spiffe_id_of_certificate
from carnet.verify import MAX_TOKEN_BYTES

__all__ = ["Admitted", "AuthContext", "Guard", "Presented", "Revoking", "StreamEnd", "describe_peer"]

_TLS_1_3: Final = b"TLSv1.3"
_SCHEME: Final = "bearer "
_SPACES: Final = 32
"""RFC 9110 section 11.6.2 allows any number of spaces after the scheme; this many are read."""
_CERTIFICATES: Final = 1024
"""Certificates of callers that are kept parsed: each takes some 60 us to parse, and one of each caller is in use."""


AuthContext: TypeAlias = Mapping[str, Sequence[bytes]]
"""What TLS knows of the peer, as ``ServicerContext.auth_context`` returns it."""


class StreamEnd(StrEnum):
    """How long a stream of calls may go on."""

    TOKEN = "token"  # noqa: S105 - no secret
    """Until its token or the certificate of the caller ends, or one of them is revoked."""
    OPEN = "open"
    """Until either side ends it, by explicit choice: the right to call is checked at the start only."""


@dataclass(frozen=True, slots=True)
class Presented:
    """What a caller shows."""

    token: str
    certificate: x509.Certificate | None
    """The leaf of the caller, None where TLS asked for none."""


class Revoking(Protocol):
    """What a guard needs of a verifier to end streams: `Verifier` and `AsyncVerifier` have it."""

    @property
    def revision(self) -> int:
        """Grows with each change of the revocations."""

    def is_revoked(self, claims: Claims, *, peer_certificate: x509.Certificate | None = None) -> bool:
        """Say whether a token that was verified has been revoked meanwhile."""


class _Revoked:
    """Says whether the right behind one call was taken away. Looks again only when revocations changed."""

    def __init__(self, verifier: Revoking, claims: Claims, certificate: x509.Certificate | None) -> None:
        self._verifier = verifier
        self._claims = claims
        self._certificate = certificate
        self._seen = -1  # Not that of now: something may have changed since the token was verified.
        self._revoked = False

    def __call__(self) -> bool:
        revision = self._verifier.revision
        if revision != self._seen:
            self._revoked = self._revoked or self._verifier.is_revoked(self._claims, peer_certificate=self._certificate)
            self._seen = revision
        return self._revoked


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Admitted:
    """A call that may go on."""

    claims: Claims
    ends_at: datetime | None
    """When the right to go on ends, None where it does not."""
    revoked: Callable[[], bool] = _never
    """Says whether the right was taken away meanwhile. Cheap: it looks only at what changed since the last time."""

    def is_over(self, now: datetime) -> bool:
        """Say whether the right to go on has ended."""
        return (self.ends_at is not None and now >= self.ends_at) or self.revoked()

    def seconds_left(self, now: datetime) -> float | None:
        """Return for how long the call may still go on, None for ever."""
        return None if self.ends_at is None else max((self.ends_at - now) / timedelta(seconds=1), 0.0)


@dataclass(frozen=True, slots=True)
class _Leaf:
    certificate: x509.Certificate
    not_before: datetime
    not_after: datetime


class Guard:
    """The rules of one server."""

    def __init__(self, rules: Mapping[str, Rule], *, stream: StreamEnd | str) -> None:
        self._rules = parse_rules(rules)
        try:
            self._stream = StreamEnd(stream)
        except ValueError:
            msg = f"stream is {str(stream)[:40]!r}: give 'token' or 'open'"
            raise ConfigError(msg) from None

    def asks_for_token(self, method: str) -> bool:
        """Say whether a caller of `method` is looked at; where no rule says otherwise, it is."""
        rule = self._rules.get(method)
        return rule is None or rule.token

    def on_stale(self, method: str) -> OnStale | None:
        """Return what `method` does with keys and revocations that are too old; None leaves it to the verifier."""
        rule = self._rules.get(method)
        return None if rule is None else rule.on_stale

    @property
    def accepts_stale(self) -> bool:
        """Whether any method goes on with keys and revocations that are too old."""
        return any(rule.on_stale is OnStale.ACCEPT for rule in self._rules.values())

    def presented(
        self,
        metadata: Sequence[tuple[str, str | bytes]],
        peer: AuthContext,
        *,
        now: datetime,
    ) -> Presented:
        """Return what the caller shows. Raises `RefusedError`."""
        return Presented(_bearer_token(metadata), _peer_certificate(peer, now))

    def admit(self, method: str, claims: Claims, presented: Presented, verifier: Revoking) -> Admitted:
        """Return what a caller that `verifier` has verified may do. Raises `RefusedError`."""
        rule = self._rules.get(method)
        if rule is None:
            text = f"the method has no rule, so nobody may call it (the caller was {claims.subject})"
            raise RefusedError(Refusal.NO_RULE, text)
        missing = rule.scopes.difference(claims.scopes)
        if missing:
            text = f"token {claims.token_id} of {claims.subject} lacks scope {' '.join(sorted(missing))}"
            raise RefusedError(Refusal.INSUFFICIENT_SCOPE, text)
        if self._stream is StreamEnd.OPEN:
            return Admitted(claims, None)
        revoked = _Revoked(verifier, claims, presented.certificate)
        if presented.certificate is None:
            return Admitted(claims, claims.expires_at, revoked)
        return Admitted(claims, min(claims.expires_at, presented.certificate.not_valid_after_utc), revoked)


def describe_peer(peer: AuthContext) -> str:
    """Return who the caller is, for the log: its SPIFFE ID as its certificate has it."""
    shown = peer.get("x509_pem_cert")
    if not shown:
        return "a caller without certificate"
    try:
        return str(spiffe_id_of_certificate(_parse_leaf(shown[0]).certificate))
    except (ValueError, InvalidIdentityError):
        return "a caller without SPIFFE ID"


def _bearer_token(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata if key == "authorization"]  # Keys are lower case (RFC 9113 section 8.2).
    if len(values) != 1:
        raise RefusedError(Refusal.NO_TOKEN, f"{len(values)} authorization values where exactly one is required")
    value = values[0]
    if not isinstance(value, str) or len(value) > MAX_TOKEN_BYTES + len(_SCHEME) + _SPACES:
        raise RefusedError(Refusal.INVALID_TOKEN, "the authorization value is too long, or no text")
    # The scheme in any case (RFC 9110 section 11.1), and at least one space (RFC 6750 section 2.1).
    if value[: len(_SCHEME)].lower() != _SCHEME:
        raise RefusedError(Refusal.NO_TOKEN, "the authorization scheme is not Bearer")
    return value[len(_SCHEME) :].lstrip(" ")


def _peer_certificate(peer: AuthContext, now: datetime) -> x509.Certificate | None:
    # Only the certificate itself is believed: the SPIFFE ID and names that gRPC lists end at a NUL and mix SAN types.
    shown = peer.get("x509_pem_cert")
    if not shown:
        return None
    # Versions of gRPC before 1.85 do not tell the version of TLS, and none can be told to take 1.3 only.
    version = peer.get("ssl_tls_version", (_TLS_1_3,))
    if list(version) != [_TLS_1_3]:
        raise RefusedError(Refusal.INVALID_TOKEN, "the connection is not TLS 1.3")
    try:
        leaf = _parse_leaf(shown[0])
    except ValueError:
        raise RefusedError(Refusal.INVALID_TOKEN, "the caller's certificate cannot be parsed") from None
    if not leaf.not_before <= now < leaf.not_after:
        text = f"the caller's certificate is valid from {leaf.not_before:%FT%TZ} to {leaf.not_after:%FT%TZ} only"
        raise RefusedError(Refusal.INVALID_TOKEN, text)
    return leaf.certificate


@lru_cache(_CERTIFICATES)
def _parse_leaf(pem: bytes) -> _Leaf:
    certificate = x509.load_pem_x509_certificate(pem)
    return _Leaf(certificate, certificate.not_valid_before_utc, certificate.not_valid_after_utc)
