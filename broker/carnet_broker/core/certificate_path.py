"""From a leaf to a trust anchor: path building and validation (RFC 5280 section 6, RFC 4158).

The TLS stack did this once, when the connection was made, with the CAs of that moment. It is done here again with the
CAs of now. `cryptography.x509.verification` is not used: it knows no URI name constraints and no Ed25519, and its
profile is the web's.

A peer chooses what it sends, so the work is bounded: `MAX_SENT` certificates, `MAX_PATH` long, `_MAX_CHECKS`
signatures. Certificates that are of no use are passed over; one good path is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID

from carnet_broker.core.certificates import ParsedCertificate
from carnet_broker.core.name_constraints import forbidden_name
from carnet_broker.core.trust_bundle import TrustBundle
from carnet_broker.core.unauthenticated import IdentityReason, UnauthenticatedError

__all__ = ["MAX_PATH", "MAX_SENT", "find_path"]

MAX_SENT: Final = 10
"""Certificates that a peer may send, its leaf among them."""

MAX_PATH: Final = 6
"""Certificates in a path: a leaf, at most four intermediates, an anchor."""

_MAX_CHECKS: Final = 16
"""Signatures that are checked for one leaf, about 100 us each."""

_CLIENT_PURPOSES: Final = frozenset({ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE})

Path = tuple[ParsedCertificate, ...]


def find_path(
    leaf: ParsedCertificate, sent: Sequence[ParsedCertificate], bundle: TrustBundle, now: datetime
) -> tuple[Path, datetime | None]:
    """Return a good path from `leaf` to an anchor of `bundle`, and when its revocation lists are out of date.

    Depth first, what the bundle holds before what was sent. Raises `UnauthenticatedError`: UNTRUSTED where there is no
    path, or the reason why the path that there is cannot be used.
    """
    failure = _untrusted(f"no CA is called {leaf.issuer.rfc4514_string()}")
    anchors = {anchor.fingerprint for anchor in bundle.anchors}
    known = {certificate.fingerprint: certificate for certificate in (*sent, *bundle.anchors)}
    stack: list[Path] = [(leaf,)]
    checks = 0
    while stack:
        path = stack.pop()
        if path[-1].fingerprint in anchors:
            try:
                return path, _accept(path, bundle, now)
            except UnauthenticatedError as error:
                failure = error
            continue
        for issuer in known.values():
            if issuer.subject != path[-1].issuer or issuer in path or len(path) == MAX_PATH:
                continue
            obstacle = _obstacle(issuer, path, now)
            if obstacle is None:
                checks += 1
                if checks > _MAX_CHECKS:
                    detail = "too many signatures to check"
                    raise _untrusted(detail)
                if _is_signed_by(path[-1], issuer):
                    stack.append((*path, issuer))
                    continue
                obstacle = f"its key did not sign {path[-1].title}"
            if (
                failure.reason is IdentityReason.UNTRUSTED
            ):  # A path that is only barred tells more than one that is not.
                failure = _untrusted(f"{issuer.title}: {obstacle}")
    raise failure


def _obstacle(issuer: ParsedCertificate, path: Path, now: datetime) -> str | None:
    """Return why `issuer` cannot be the next of `path`, its signature aside; None where it can."""
    intermediates = sum(not certificate.is_self_issued for certificate in path[1:])
    for wrong, obstacle in (
        (not issuer.may_sign_certificates, "it is not a CA"),
        (not issuer.not_before <= now < issuer.not_after, "it is expired or not yet valid"),
        (issuer.path_length is not None and intermediates > issuer.path_length, "its path length is exceeded"),
        (not issuer.key_is_accepted, "its key is of a kind or size that is not accepted"),
        # RFC 5280 leaves this open (section 4.2.1.12); TLS stacks read it as a limit on what is below, and so do we.
        (
            issuer.purposes is not None and issuer.purposes.isdisjoint(_CLIENT_PURPOSES),
            "its extended key usage has no client authentication",
        ),
        (issuer.unprocessed is not None, f"its critical extension {issuer.unprocessed} is not supported"),
    ):
        if wrong:
            return obstacle
    return None


def _is_signed_by(certificate: ParsedCertificate, issuer: ParsedCertificate) -> bool:
    if not certificate.signature_is_accepted:
        return False
    try:
        certificate.certificate.verify_directly_issued_by(issuer.certificate)
    except (InvalidSignature, TypeError, UnsupportedAlgorithm, ValueError):
        return False
    return True


def _accept(path: Path, bundle: TrustBundle, now: datetime) -> datetime | None:
    """Check what only a whole path can tell: name constraints and revocation."""
    for position, ca in enumerate(path):
        if ca.name_constraints is None or position == 0:
            continue
        # Also for self-issued certificates, which section 6.1.3 would let by: the rule is shorter, and stricter.
        for certificate in path[:position]:
            name = forbidden_name(ca.name_constraints, certificate)
            if name is not None:
                detail = f"{ca.title}: its name constraints forbid {name}"
                raise _untrusted(detail)
    return bundle.check_revocation(path, now)


def _untrusted(detail: str) -> UnauthenticatedError:
    return UnauthenticatedError(IdentityReason.UNTRUSTED, detail)
