"""Who calls: from the certificates of a connection to a workload.

Rules (X509-SVID, RFC 5280, and tighter where it costs nobody):

- The connection is TLS 1.3. The TLS stack cannot be told to take nothing else, so each call is asked.
- The identity is the one URI SAN of the leaf, a SPIFFE ID of a trust domain of the bundle. A common name says nothing.
- The leaf is one: no CA, no right to sign certificates or lists; its key usage is there, critical, and has
  digitalSignature (X509-SVID section 4.3). Basic constraints may be absent: that means no CA (RFC 5280, 4.2.1.9).
- Its extended key usage is there and has server and client authentication (section 4.4 says so of those that have it).
- It lasts at most `LeafRules.max_life`: a certificate that outlives the memory of who has it is not an identity.
- Now is inside its window, and inside that of each certificate up to an anchor of the *current* bundle; none is
  revoked, and the revocation lists are not out of date. `notAfter` itself is over, as with a token and in OpenSSL.

All of this holds for each call, not for each connection: connections outlive certificates, CAs and lists. What cannot
change between two calls is remembered in `IdentityCache`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from carnet.claims import certificate_thumbprint
from carnet.errors import InvalidIdentityError
from carnet.spiffe import SpiffeID, spiffe_id_of_certificate
from carnet_broker.core.certificate_path import MAX_SENT, find_path
from carnet_broker.core.certificates import ParsedCertificate, UnreadableCertificateError, read_certificates
from carnet_broker.core.trust_bundle import TrustBundle
from carnet_broker.core.unauthenticated import IdentityReason, UnauthenticatedError

__all__ = [
    "IdentityCache",
    "IdentityReason",
    "LeafRules",
    "TrustBundle",
    "UnauthenticatedError",
    "Workload",
    "authenticate",
]

_TLS_1_3: Final = "TLSv1.3"
_MAX_CHAIN_BYTES: Final = 64 * 1024
_REFUSED_FOR: Final = timedelta(seconds=1)
_MAX_REFUSED: Final = 512
_PURPOSES: Final = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})


@dataclass(frozen=True, slots=True)
class LeafRules:
    """What an operator may set about leafs."""

    max_life: timedelta = timedelta(days=90)
    """From notBefore to notAfter. Longer ones are refused."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A caller that is who it says it is. Made by `authenticate` only."""

    spiffe_id: SpiffeID
    thumbprint: str
    """The leaf's ``x5t#S256`` (RFC 8705 section 3.1)."""
    leaf: x509.Certificate
    not_after: datetime
    """When the leaf, or a certificate above it, is over; aware UTC. Nothing issued on it may last longer."""


@dataclass(frozen=True, slots=True)
class _Verified:
    """A workload, and the window in which nothing but the window has to be looked at again."""

    workload: Workload
    not_before: datetime
    until: datetime


def authenticate(
    chain_pem: Sequence[bytes] | bytes,
    *,
    tls_version: str | None,
    bundle: TrustBundle,
    now: datetime,
    rules: LeafRules,
) -> Workload:
    """Return the workload behind a connection, or raise `UnauthenticatedError`.

    `chain_pem`: the certificates that the peer sent, its leaf first, in one text or several. `tls_version`: as the TLS
    stack names it, ``TLSv1.3``. `now`: aware UTC. Costs about 1 ms: `IdentityCache` does it once for each chain.
    """
    _check_tls_version(tls_version)
    return _verify(_as_tuple(chain_pem), bundle, now, rules).workload


class IdentityCache:
    """Remembers what was verified, until a window ends or the bundle changes, and what was refused, for a second.

    Holds at most twice `capacity` workloads and 512 refusals, none of the certificates that were sent. A call that is
    remembered costs a few microseconds, also one that is refused: who has a certificate that is not good can ask as
    often as the network goes. Safe for use by several threads: each step is one operation on a dict, and two that race
    verify twice.
    """

    def __init__(self, rules: LeafRules, *, capacity: int = 4096) -> None:
        self._rules = rules
        self._capacity = capacity
        self._remembered = _Remembered("")

    def authenticate(
        self, chain_pem: Sequence[bytes] | bytes, *, tls_version: str | None, bundle: TrustBundle, now: datetime
    ) -> Workload:
        """Return what `authenticate` returns, or raise what it raises."""
        _check_tls_version(tls_version)
        chain = _as_tuple(chain_pem)
        key = hashlib.sha256(b"\n".join(chain)).digest()
        remembered = self._remembered
        if remembered.version != bundle.version:
            remembered = self._remembered = _Remembered(bundle.version)
        verified = remembered.recent.get(key)
        if verified is None or not verified.not_before <= now < verified.until:
            verified = remembered.earlier.get(key)
            if verified is None or not verified.not_before <= now < verified.until:
                verified = self._verify_anew(chain, key, bundle, now, remembered)
            if len(remembered.recent) >= self._capacity:
                # Those that are in use come back from the earlier ones; the others are forgotten at the next turn.
                remembered = self._remembered = _Remembered(bundle.version, {}, remembered.recent, remembered.refused)
            remembered.recent[key] = verified
        return verified.workload

    def _verify_anew(
        self, chain: tuple[bytes, ...], key: bytes, bundle: TrustBundle, now: datetime, remembered: _Remembered
    ) -> _Verified:
        """Return what `_verify` returns, or raise what it raises; the same refusal once a second for each chain."""
        refused = remembered.refused.get(key)
        if refused is not None and refused.at <= now < refused.at + _REFUSED_FOR:
            raise UnauthenticatedError(refused.reason, refused.detail)
        try:
            return _verify(chain, bundle, now, self._rules)
        except UnauthenticatedError as error:
            if len(remembered.refused) >= _MAX_REFUSED:
                remembered.refused.clear()
            remembered.refused[key] = _Refused(error.reason, error.detail, now)
            raise


@dataclass(frozen=True, slots=True)
class _Refused:
    """Why a chain was refused, and when."""

    reason: IdentityReason
    detail: str
    at: datetime


@dataclass(frozen=True, slots=True)
class _Remembered:
    """What was decided with one version of the bundle, by the digest of the chain that was sent."""

    version: str
    recent: dict[bytes, _Verified] = field(default_factory=dict)
    earlier: dict[bytes, _Verified] = field(default_factory=dict)
    refused: dict[bytes, _Refused] = field(default_factory=dict)


def _as_tuple(chain_pem: Sequence[bytes] | bytes) -> tuple[bytes, ...]:
    return (chain_pem,) if isinstance(chain_pem, bytes) else tuple(chain_pem)


def _check_tls_version(tls_version: str | None) -> None:
    if tls_version != _TLS_1_3:
        raise UnauthenticatedError(IdentityReason.TLS_VERSION, f"the connection is {tls_version}, not {_TLS_1_3}")


def _verify(chain: tuple[bytes, ...], bundle: TrustBundle, now: datetime, rules: LeafRules) -> _Verified:
    leaf, *sent = _read_chain(chain)
    _check_leaf(leaf, rules, now)
    try:
        spiffe_id = spiffe_id_of_certificate(leaf.certificate)
    except InvalidIdentityError as error:
        raise UnauthenticatedError(IdentityReason.SPIFFE_ID, str(error)) from error
    if spiffe_id.trust_domain not in bundle.trust_domains:
        raise UnauthenticatedError(IdentityReason.WRONG_TRUST_DOMAIN, f"{spiffe_id} is of another trust domain")
    path, lists_end = find_path(leaf, sent, bundle, now)
    not_after = min(certificate.not_after for certificate in path)
    return _Verified(
        Workload(spiffe_id, certificate_thumbprint(leaf.certificate), leaf.certificate, not_after),
        not_before=max(certificate.not_before for certificate in path),
        until=not_after if lists_end is None else min(not_after, lists_end),
    )


def _read_chain(chain: tuple[bytes, ...]) -> tuple[ParsedCertificate, ...]:
    pem = b"\n".join(chain)
    if not pem.strip():
        raise UnauthenticatedError(IdentityReason.NO_CERTIFICATE, "the peer sent no certificate")
    if len(pem) > _MAX_CHAIN_BYTES or pem.count(b"-----BEGIN ") > MAX_SENT:
        detail = f"the peer sent {len(pem)} bytes of certificates; at most {_MAX_CHAIN_BYTES}, and {MAX_SENT} of them"
        raise UnauthenticatedError(IdentityReason.CHAIN_TOO_LONG, detail)
    try:
        return read_certificates(pem)
    except UnreadableCertificateError as error:
        raise UnauthenticatedError(IdentityReason.MALFORMED, f"a certificate that the peer sent: {error}") from error


def _check_leaf(leaf: ParsedCertificate, rules: LeafRules, now: datetime) -> None:
    """Hold `leaf` to all rules that need nothing but itself, its identity aside. Raises `UnauthenticatedError`."""
    usage, purposes, life = leaf.key_usage, leaf.purposes, leaf.not_after - leaf.not_before
    signs = usage is not None and (usage.key_cert_sign or usage.crl_sign)
    unusable = usage is None or not leaf.key_usage_is_critical or not usage.digital_signature
    wildcard = any("*" in name.value for name in leaf.names if isinstance(name, x509.DNSName))
    for wrong, reason, detail in (
        (now < leaf.not_before, IdentityReason.NOT_YET_VALID, f"valid from {leaf.not_before}"),
        (now >= leaf.not_after, IdentityReason.EXPIRED, f"valid until {leaf.not_after}"),
        (
            life > rules.max_life,
            IdentityReason.LIFE_TOO_LONG,
            f"valid for {life}, more than {rules.max_life}",
        ),
        (leaf.is_ca or signs, IdentityReason.NOT_A_LEAF, "a CA, or with the right to sign certificates or lists"),
        (unusable, IdentityReason.KEY_USAGE, "no critical key usage with digitalSignature"),
        (
            purposes is None or not purposes >= _PURPOSES,
            IdentityReason.EXTENDED_KEY_USAGE,
            "not for both server and client authentication",
        ),
        (leaf.unprocessed is not None, IdentityReason.CRITICAL_EXTENSION, f"extension {leaf.unprocessed}"),
        (not leaf.key_is_accepted, IdentityReason.KEY_POLICY, "not P-256, P-384, Ed25519 or RSA of 2048 bits or more"),
        (not leaf.signature_is_accepted, IdentityReason.SIGNATURE_POLICY, "not signed over SHA-256 or better"),
        (wildcard, IdentityReason.SPIFFE_ID, "a DNS name with a wildcard stands for many workloads"),
    ):
        if wrong:
            raise UnauthenticatedError(reason, detail)
