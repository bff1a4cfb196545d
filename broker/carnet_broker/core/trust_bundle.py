"""What the broker trusts to name workloads: CAs, and the revocation lists that take back what they said.

A bundle is parsed whole or not at all, and never changes: who reloads it builds the next one and swaps. So a call is
decided by one bundle, and a broken file can never become an empty bundle.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from carnet.errors import ConfigError
from carnet_broker.core.certificates import (
    ParsedCertificate,
    UnreadableCertificateError,
    read_certificates,
    signature_is_accepted,
)
from carnet_broker.core.unauthenticated import IdentityReason, UnauthenticatedError

__all__ = ["RevocationList", "TrustBundle"]

_CRL: Final = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]{1,255}")


@dataclass(frozen=True, slots=True, eq=False)
class RevocationList:
    """One full revocation list (RFC 5280 section 5). Who signed it is checked when an issuer is at hand."""

    crl: x509.CertificateRevocationList
    issuer: x509.Name
    this_update: datetime
    next_update: datetime
    serial_numbers: frozenset[int]

    @classmethod
    def parse(cls, pem: bytes) -> RevocationList:
        """Return the list, or raise `ConfigError`."""
        try:
            crl = x509.load_pem_x509_crl(pem)
            critical = [extension.oid.dotted_string for extension in crl.extensions if extension.critical]
            parsed = (
                crl.issuer,
                crl.last_update_utc,
                crl.next_update_utc,
                frozenset(entry.serial_number for entry in crl),
            )
            accepted = signature_is_accepted(crl)
        except Exception as error:
            # As with certificates: what the parser raises is no closed list, and all of it means the same.
            msg = f"the revocation list cannot be parsed ({type(error).__name__}): give the CA's CRL in PEM"
            raise ConfigError(msg) from error
        issuer, this_update, next_update, serial_numbers = parsed
        title = f"the revocation list of {issuer.rfc4514_string()}"
        if critical:
            # A delta, or one that speaks for other CAs or for some certificates only (sections 5.2.4 and 5.2.5).
            msg = f"{title} has a critical extension ({critical[0]}): give a full list of one CA"
            raise ConfigError(msg)
        if next_update is None:
            msg = f"{title} has no nextUpdate, so nobody could tell when it is out of date (RFC 5280 section 5.1.2.5)"
            raise ConfigError(msg)
        if not accepted:
            msg = f"{title} is signed with an algorithm that is not accepted: SHA-256, SHA-384, SHA-512 or Ed25519"
            raise ConfigError(msg)
        return cls(crl, issuer, this_update, next_update, serial_numbers)

    def is_signed_by(self, issuer: ParsedCertificate) -> bool:
        """Say whether `issuer` made the list: the name alone may be another CA's too."""
        key = issuer.certificate.public_key()
        may_sign = issuer.key_usage is None or issuer.key_usage.crl_sign
        return may_sign and self.crl.is_signature_valid(key)  # type: ignore[arg-type] # a CA's key can sign


@dataclass(frozen=True, slots=True, eq=False)
class TrustBundle:
    """The trust anchors, the revocation lists and the trust domains. Made by `parse` only.

    Every anchor speaks for every trust domain of the bundle. Domains with CAs of their own need name constraints in
    the CAs.
    """

    version: str
    """A digest of all that the bundle holds: equal where nothing changed."""
    trust_domains: frozenset[str]
    anchors: tuple[ParsedCertificate, ...]
    revocation_lists: tuple[RevocationList, ...]
    """Newest first."""

    @classmethod
    def parse(cls, ca_pem: bytes, crls_pem: Sequence[bytes], trust_domains: Collection[str]) -> TrustBundle:
        """Return the bundle, or raise `ConfigError`, whose text starts with what is wrong: put the file's name before.

        `ca_pem`: one or more CA certificates. All are anchors, self-signed or not. `crls_pem`: none, or one or more
        texts of one or more CRLs each; with any given, a leaf whose issuer has no current list is refused.
        """
        if not trust_domains or not all(map(_TRUST_DOMAIN.fullmatch, trust_domains)):
            msg = "give at least one trust domain, like prod.example: a-z, 0-9, '.', '-' and '_'"
            raise ConfigError(msg)
        try:
            anchors = read_certificates(ca_pem)
        except UnreadableCertificateError as error:
            msg = f"the CA bundle is refused: {error}; give the PEM certificates of the trusted CAs, and nothing else"
            raise ConfigError(msg) from error
        for anchor in anchors:
            _check_anchor(anchor)
        lists = [RevocationList.parse(block) for pem in crls_pem for block in _blocks(pem)]
        digest = hashlib.sha256()
        for part in (
            *(name.encode() for name in sorted(trust_domains)),
            *sorted(anchor.fingerprint for anchor in anchors),
            *sorted(hashlib.sha256(revoked.crl.public_bytes(Encoding.DER)).digest() for revoked in lists),
        ):
            digest.update(len(part).to_bytes(4, "big") + part)
        return cls(
            version=digest.hexdigest()[:32],
            trust_domains=frozenset(trust_domains),
            anchors=anchors,
            revocation_lists=tuple(sorted(lists, key=lambda revoked: revoked.this_update, reverse=True)),
        )

    def check_revocation(self, path: Sequence[ParsedCertificate], now: datetime) -> datetime | None:
        """Return when the first of the lists that cover `path` (leaf first) is out of date; None without lists.

        Raises `UnauthenticatedError`: REVOKED, CRL_OUT_OF_DATE or CRL_MISSING. A list is taken as it is from the moment
        it is here, also if its thisUpdate is ahead of our clock: it is signed, and newer is better.
        """
        if not self.revocation_lists:
            return None
        ends = []
        for certificate, issuer in pairwise(path):
            newest = self._newest_list_of(issuer)
            if newest is None:
                if certificate is path[0]:
                    detail = f"no revocation list of {issuer.title} is loaded"
                    raise UnauthenticatedError(IdentityReason.CRL_MISSING, detail)
                continue
            if now >= newest.next_update:
                detail = f"the revocation list of {issuer.title} was to be renewed at {newest.next_update.isoformat()}"
                raise UnauthenticatedError(IdentityReason.CRL_OUT_OF_DATE, detail)
            if certificate.serial_number in newest.serial_numbers:
                detail = f"{issuer.title} has revoked serial {certificate.serial_number:x}"
                raise UnauthenticatedError(IdentityReason.REVOKED, detail)
            ends.append(newest.next_update)
        return min(ends)

    def _newest_list_of(self, issuer: ParsedCertificate) -> RevocationList | None:
        for candidate in self.revocation_lists:
            if candidate.issuer == issuer.subject and candidate.is_signed_by(issuer):
                return candidate
        return None


def _check_anchor(anchor: ParsedCertificate) -> None:
    if not anchor.may_sign_certificates:
        msg = f"the CA bundle holds {anchor.title}, which may not sign certificates: give the CA's own certificate"
        raise ConfigError(msg)
    if not anchor.key_is_accepted:
        msg = f"the CA bundle holds {anchor.title}, whose key is not P-256, P-384, Ed25519 or RSA of 2048 bits or more"
        raise ConfigError(msg)
    if anchor.unprocessed is not None:
        msg = (
            f"the CA bundle holds {anchor.title}, with a critical extension that is not supported: {anchor.unprocessed}"
        )
        raise ConfigError(msg)


def _blocks(pem: bytes) -> list[bytes]:
    blocks = _CRL.findall(pem)
    if not blocks or len(blocks) != pem.count(b"-----BEGIN "):
        msg = "the revocation list file holds no whole CRL in PEM, or something else too: give X509 CRL blocks alone"
        raise ConfigError(msg)
    return blocks
