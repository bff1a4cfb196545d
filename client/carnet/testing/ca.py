"""A certificate authority for tests and development: a root, an intermediate, and leafs with SPIFFE IDs.

::

    ca = CertificateAuthority.create("prod.example")
    orders = ca.issue("spiffe://prod.example/ns/shop/sa/orders")
    certificate_file, key_file = orders.write(directory, "orders")
    (directory / "ca.pem").write_bytes(ca.root_pem)

Nothing here is fit for production: the keys of the authority are in memory, or in a file next to what they signed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from carnet.spiffe import SpiffeID, server_dns_name, spiffe_id_of_certificate

__all__ = [
    "CertificateAuthority",
    "IssuedCertificate",
    "Issuer",
    "certificate_pem",
    "key_usage",
    "private_key_pem",
    "write_file",
]

_BACKDATED: Final = timedelta(minutes=1)
"""So that a peer whose clock is a little behind does not see a certificate that is not yet valid."""

_LEAF_LIFE: Final = timedelta(hours=1)
_USAGES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def key_usage(*usages: str) -> x509.KeyUsage:
    """Return the key usage extension that has exactly `usages` set (RFC 5280 section 4.2.1.3)."""
    return x509.KeyUsage(**{usage: usage in usages for usage in _USAGES})


def private_key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return `key` as unencrypted PKCS 8."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(*certificates: x509.Certificate) -> bytes:
    """Return `certificates` in the order given."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def write_file(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Put `content` at `path` with `mode`, in one step: a reader sees the old file or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    # Made with its final mode, so that a key can at no time be read by others.
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    new.replace(path)


@dataclass(frozen=True, slots=True)
class Issuer:
    """One certificate that signs others, with its key."""

    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(
        cls, name: str, *, not_before: datetime, not_after: datetime, path_length: int | None, by: Issuer | None = None
    ) -> Issuer:
        """Return a new authority signed by `by`; None makes a root, which signs itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signer, issuer = (by.private_key, by.certificate.subject) if by else (key, subject)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            .add_extension(key_usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .sign(signer, hashes.SHA256())
        )
        return cls(certificate, key)


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A workload's certificate: the chain to send (leaf, then intermediate), its key, and the parsed leaf."""

    certificate_pem: bytes = field(repr=False)
    private_key_pem: bytes = field(repr=False)
    leaf: x509.Certificate

    @property
    def spiffe_id(self) -> str:
        """The one URI SAN of the leaf."""
        return str(spiffe_id_of_certificate(self.leaf))

    @property
    def dns_names(self) -> tuple[str, ...]:
        """The DNS SANs of the leaf."""
        names = self.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return tuple(names.get_values_for_type(x509.DNSName))

    def write(self, directory: Path, name: str) -> tuple[Path, Path]:
        """Write ``NAME.pem`` and ``NAME-key.pem`` (mode 0600), each in one step; return both paths."""
        directory.mkdir(parents=True, exist_ok=True)
        certificate_file, key_file = directory / f"{name}.pem", directory / f"{name}-key.pem"
        write_file(key_file, self.private_key_pem, mode=0o600)
        write_file(certificate_file, self.certificate_pem)
        return certificate_file, key_file


class CertificateAuthority:
    """A root and an intermediate of one trust domain. Made by `create`, or from two `Issuer` that were kept.

    `now` stops the authority's clock there; None means the real one. Instances are not safe for use by two threads
    that revoke at the same time.
    """

    def __init__(self, trust_domain: str, root: Issuer, intermediate: Issuer, *, now: datetime | None = None) -> None:
        self.trust_domain = trust_domain
        self.root = root
        self.intermediate = intermediate
        self._now = now
        self._revoked: list[x509.RevokedCertificate] = []
        self._crl_number = 0

    @classmethod
    def create(
        cls,
        trust_domain: str = "prod.example",
        *,
        now: datetime | None = None,
        lifetime: timedelta = timedelta(days=30),
    ) -> CertificateAuthority:
        """Make a new root and intermediate that both last `lifetime`."""
        start = now or datetime.now(UTC)
        before, after = start - _BACKDATED, start + lifetime
        root = Issuer.create(f"{trust_domain} root", not_before=before, not_after=after, path_length=None)
        intermediate = Issuer.create(
            f"{trust_domain} intermediate", not_before=before, not_after=after, path_length=0, by=root
        )
        return cls(trust_domain, root, intermediate, now=now)

    def with_new_intermediate(self) -> CertificateAuthority:
        """Return an authority with the same root and a new intermediate of another name; its CRL starts empty."""
        certificate = self.root.certificate
        intermediate = Issuer.create(
            f"{self.trust_domain} intermediate {x509.random_serial_number():x}"[:60],
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            path_length=0,
            by=self.root,
        )
        return CertificateAuthority(self.trust_domain, self.root, intermediate, now=self._now)

    @property
    def root_pem(self) -> bytes:
        """The trust anchor."""
        return certificate_pem(self.root.certificate)

    @property
    def intermediate_pem(self) -> bytes:
        """The certificate that signs the leafs."""
        return certificate_pem(self.intermediate.certificate)

    def issue(
        self,
        spiffe_id: str,
        *,
        dns_names: Sequence[str] = (),
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> IssuedCertificate:
        """Return a new key and its leaf for `spiffe_id`, which is taken as it is: tests want wrong ones too.

        The window is from one minute ago to one hour from now unless given.
        """
        now = self._now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.UniformResourceIdentifier(spiffe_id), *map(x509.DNSName, dns_names)]
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.intermediate.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED if not_before is None else not_before)
            .not_valid_after(now + _LEAF_LIFE if not_after is None else not_after)
            # With an empty subject the SAN is critical (RFC 5280 section 4.2.1.6).
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage("digital_signature"), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.intermediate.private_key.public_key()),
                critical=False,
            )
            .sign(self.intermediate.private_key, hashes.SHA256())
        )
        return IssuedCertificate(certificate_pem(leaf, self.intermediate.certificate), private_key_pem(key), leaf)

    def issue_server(self, spiffe_id: str) -> IssuedCertificate:
        """Return what `issue` returns, with the one DNS name that `spiffe_id` serves by."""
        return self.issue(spiffe_id, dns_names=[server_dns_name(SpiffeID.parse(spiffe_id))])

    def reissue(
        self, issued: IssuedCertificate, *, not_before: datetime | None = None, not_after: datetime | None = None
    ) -> IssuedCertificate:
        """Return a renewed certificate: the names of `issued`, with a new key and a new window as `issue` has it."""
        return self.issue(issued.spiffe_id, dns_names=issued.dns_names, not_before=not_before, not_after=not_after)

    def revoke(self, issued: IssuedCertificate) -> None:
        """Put the serial number of `issued` on the list that `crl_pem` returns."""
        self._revoked.append(
            x509.RevokedCertificateBuilder()
            .serial_number(issued.leaf.serial_number)
            .revocation_date(self._now or datetime.now(UTC))
            .build()
        )

    def crl_pem(self, *, now: datetime | None = None, lifetime: timedelta = timedelta(hours=1)) -> bytes:
        """Return the intermediate's revocation list, made at `now` (default: the authority's clock)."""
        made = now or self._now or datetime.now(UTC)
        self._crl_number += 1
        builder = (
            x509.CertificateRevocationListBuilder(revoked_certificates=self._revoked)
            .issuer_name(self.intermediate.certificate.subject)
            .last_update(made)
            .next_update(made + lifetime)
            .add_extension(x509.CRLNumber(self._crl_number), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.intermediate.private_key.public_key()),
                critical=False,
            )
        )
        crl = builder.sign(self.intermediate.private_key, hashes.SHA256())
        return crl.public_bytes(serialization.Encoding.PEM)
