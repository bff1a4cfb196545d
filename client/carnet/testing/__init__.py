"""Parts for the tests of services that use Carnet."""

from __future__ import annotations

from carnet.testing.ca import CertificateAuthority, IssuedCertificate, Issuer

__all__ = ["CertificateAuthority", "IssuedCertificate", "Issuer"]
