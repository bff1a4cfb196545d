"""The caller's certificate as a verifier needs it: parsed once, however many tokens come with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

from cryptography import x509

from carnet.certificate_names import certificate_names
from carnet.claims import certificate_thumbprint, parse_certificate

__all__ = ["PeerCertificate", "peer_of"]

_KEPT: Final = 256
"""A service sees few certificates, each many times."""


@dataclass(frozen=True, eq=False)
class PeerCertificate:
    """The leaf that a caller showed in TLS."""

    certificate: x509.Certificate
    thumbprint: str
    """Its ``x5t#S256`` (RFC 8705 section 3.1)."""

    @cached_property
    def names(self) -> frozenset[str]:
        """What a revocation may call it: `certificate_names`."""
        return certificate_names(self.certificate)


@lru_cache(maxsize=_KEPT)
def peer_of(certificate: bytes | x509.Certificate) -> PeerCertificate:
    """Return the leaf that `certificate` is: parsed, DER, or PEM, of which the first counts.

    Raises `InvalidIdentityError` where the bytes are no certificate.
    """
    parsed = parse_certificate(certificate)
    return PeerCertificate(parsed, certificate_thumbprint(parsed))
