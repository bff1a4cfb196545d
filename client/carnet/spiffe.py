"""SPIFFE IDs, and the one place where a certificate becomes an identity.

Rules, from the SPIFFE ID specification (sections 2 and 2.3) and RFC 5280:

- A SPIFFE ID is ``spiffe://<trust domain><path>``. The trust domain is lower-case letters, digits, ``.``, ``-`` and
  ``_``; the path is non-empty segments of letters, digits and the same three signs, and no segment is ``.`` or ``..``.
  There is no port, userinfo, query, fragment, percent-encoding or trailing slash. At most 2,048 bytes.
- A workload's leaf has exactly one URI SAN, and that is its SPIFFE ID. Common names and other SAN types say nothing.

Parsing is the only way to make a `SpiffeID`; what cannot be parsed does not exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from carnet.errors import InvalidIdentityError

__all__ = ["SpiffeID", "SpiffeIDPattern", "server_dns_name", "spiffe_id_of_certificate"]

_MAX_LENGTH: Final = 2048
_MAX_TRUST_DOMAIN: Final = 255
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]+")
_SEGMENT: Final = re.compile(r"[a-zA-Z0-9._-]+")
_DNS_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def _parse(text: str, *, what: str) -> tuple[str, tuple[str, ...]]:
    """Split `text` into a checked trust domain and the unchecked segments of its path."""
    if len(text) > _MAX_LENGTH:  # Every legal character is one byte, so characters are bytes here.
        msg = f"{what} is longer than {_MAX_LENGTH} bytes"
        raise InvalidIdentityError(msg)
    scheme, found, rest = text.partition("://")
    if not found or scheme != "spiffe":
        msg = f"{what} {text[:80]!r} does not start with spiffe://"
        raise InvalidIdentityError(msg)
    trust_domain, *segments = rest.split("/")
    if len(trust_domain) > _MAX_TRUST_DOMAIN or not _TRUST_DOMAIN.fullmatch(trust_domain):
        msg = f"{what} {text[:80]!r} has no valid trust domain (a-z, 0-9, '.', '-', '_')"
        raise InvalidIdentityError(msg)
    return trust_domain, tuple(segments)


def _is_segment(segment: str) -> bool:
    return segment not in {".", ".."} and _SEGMENT.fullmatch(segment) is not None


@dataclass(frozen=True, slots=True)
class SpiffeID:
    """The name of one workload. Made by `SpiffeID.parse` only."""

    trust_domain: str
    segments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> SpiffeID:
        """Return the SPIFFE ID that `text` is, or raise `InvalidIdentityError` (SPIFFE ID section 2)."""
        trust_domain, segments = _parse(text, what="SPIFFE ID")
        if not segments:
            msg = f"SPIFFE ID {text[:80]!r} has no path, so it names a trust domain and not a workload"
            raise InvalidIdentityError(msg)
        for segment in segments:
            if not _is_segment(segment):
                msg = f"SPIFFE ID {text[:80]!r} has an invalid path segment {segment[:40]!r}"
                raise InvalidIdentityError(msg)
        return cls(trust_domain, segments)

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/{'/'.join(self.segments)}"


@dataclass(frozen=True, slots=True)
class SpiffeIDPattern:
    """A set of SPIFFE IDs of one trust domain: ``*`` stands for one whole segment, ``**``, only last, for one or more.

    A wildcard never stands for part of a segment, and never for nothing.
    """

    trust_domain: str
    segments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> SpiffeIDPattern:
        """Return the pattern that `text` is, or raise `InvalidIdentityError`."""
        trust_domain, segments = _parse(text, what="SPIFFE ID pattern")
        if not segments:
            msg = f"SPIFFE ID pattern {text[:80]!r} has no path; to name all workloads write {text[:80]}/**"
            raise InvalidIdentityError(msg)
        for position, segment in enumerate(segments):
            last = position == len(segments) - 1
            if not (_is_segment(segment) or segment == "*" or (segment == "**" and last)):
                msg = (
                    f"SPIFFE ID pattern {text[:80]!r} has an invalid path segment {segment[:40]!r}"
                    " (a plain segment, '*', or '**' as the last one)"
                )
                raise InvalidIdentityError(msg)
        return cls(trust_domain, segments)

    @property
    def exact(self) -> SpiffeID | None:
        """The one SPIFFE ID that matches, or None where the pattern has a wildcard."""
        if "*" in self.segments or "**" in self.segments:
            return None
        return SpiffeID(self.trust_domain, self.segments)

    def matches(self, spiffe_id: SpiffeID) -> bool:
        """Say whether `spiffe_id` is in the set."""
        wanted, given = self.segments, spiffe_id.segments
        if self.trust_domain != spiffe_id.trust_domain:
            return False
        if wanted[-1] == "**":
            wanted = wanted[:-1]
            if len(given) <= len(wanted):
                return False
            given = given[: len(wanted)]
        return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/{'/'.join(self.segments)}"


def spiffe_id_of_certificate(certificate: x509.Certificate) -> SpiffeID:
    """Return the SPIFFE ID of `certificate`, or raise `InvalidIdentityError`.

    Exactly one URI SAN, and it is a SPIFFE ID (X509-SVID section 2). Read from the parsed certificate: what gRPC lists
    as SPIFFE ID or URI mixes SAN types and ends at a NUL.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    except (ValueError, x509.DuplicateExtension) as error:
        msg = "the certificate's subject alternative names cannot be parsed"
        raise InvalidIdentityError(msg) from error
    if len(uris) != 1:
        msg = f"the certificate has {len(uris)} URI names where exactly one SPIFFE ID is required"
        raise InvalidIdentityError(msg)
    return SpiffeID.parse(uris[0])


def server_dns_name(spiffe_id: SpiffeID) -> str:
    """Return the one DNS name of a serving leaf, or raise `InvalidIdentityError`.

    ``spiffe://prod.example/ns/shop/sa/payments`` serves as ``payments.shop.svc.prod.example``. TLS clients that cannot
    check a URI SAN (gRPC's Python client is one) check this name; the PKI gives it to nobody else.
    """
    match spiffe_id.segments:
        case ("ns", namespace, "sa", name) if all(map(_DNS_LABEL.fullmatch, (namespace, name))):
            return f"{name}.{namespace}.svc.{spiffe_id.trust_domain}"
    msg = f"{spiffe_id} has no DNS name: only spiffe://DOMAIN/ns/NAMESPACE/sa/NAME with DNS labels can serve"
    raise InvalidIdentityError(msg)
