"""Rules T05 to T10: names that are no SPIFFE ID of the trust domain, or not the only one (SPIFFE-ID section 2).

In the names, ``{id}`` stands for a good SPIFFE ID of the authority's trust domain, and ``{td}`` for the trust domain.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Final

from carnet.testing.ca import CertificateAuthority
from certificate_recipe import NO_NAME, Presented, common_name, good_name, leaf, oid, tlv
from wrong_kind import Build, Expected, WrongCertificate

__all__ = ["NAMES"]

# Tags of GeneralName (RFC 5280 section 4.2.1.6).
_OTHER, _EMAIL, _DNS, _DIRECTORY, _URI, _IP, _REGISTERED = 0xA0, 0x81, 0x82, 0xA4, 0x86, 0x87, 0x88
_LONGEST: Final = 2048
_LEGAL: Final = (string.ascii_letters + string.digits + "-._").encode()


def _fill(content: bytes, ca: CertificateAuthority) -> bytes:
    domain = ca.trust_domain
    for mark, text in ((b"{id}", good_name(ca)), (b"{td}", domain), (b"{TD}", domain.upper())):
        content = content.replace(mark, text.encode())
    return content


def _names(*names: tuple[int, bytes], cn: bytes = b"") -> Build:
    """Return the builder of a leaf with these names: tags and contents. `cn` is the common name, if any."""

    def build(ca: CertificateAuthority, now: datetime) -> Presented:
        filled = [tlv(tag, _fill(content, ca)) for tag, content in names]
        return leaf(ca, now, names=filled, subject=common_name(_fill(cn, ca).decode()) if cn else NO_NAME)

    return build


def _uri(*names: bytes) -> Build:
    return _names(*((_URI, name) for name in names))


def _long(length: int) -> Build:
    """Return the builder of a leaf whose SPIFFE ID, a legal one, has `length` bytes."""

    def build(ca: CertificateAuthority, now: datetime) -> Presented:
        name = f"{good_name(ca)}-".encode()
        return leaf(ca, now, names=[tlv(_URI, name.ljust(length, b"x"))])

    return build


def _other_name(ca: CertificateAuthority, now: datetime) -> Presented:
    """Return a leaf whose SPIFFE ID is the text of an otherName."""
    return leaf(ca, now, names=[tlv(_OTHER, oid("1.2.3.4"), tlv(0xA0, tlv(0x0C, good_name(ca).encode())))])


_U, _A = Expected.UNAUTHENTICATED, Expected.ACCEPT

_CASES: Final[Mapping[str, tuple[Expected, str, Build]]] = {
    "T05-good": (_A, "twin: one URI and nothing else", _uri(b"{id}")),
    "T05-good-with-dns": (_A, "twin: a DNS name beside it", _names((_DNS, b"orders.shop.svc.{td}"), (_URI, b"{id}"))),
    "T05-good-with-common-name": (_A, "twin: a common name says nothing", _names((_URI, b"{id}"), cn=b"orders")),
    "T05-common-name-only": (_U, "the id is in the CN", _names(cn=b"{id}")),
    "T05-no-name": (_U, "neither SAN nor CN", _names()),
    "T05-dns": (_U, "the id is a DNS name", _names((_DNS, b"{id}"))),
    "T05-dns-and-common-name": (_U, "in both, but not as URI", _names((_DNS, b"{id}"), cn=b"{id}")),
    "T05-email": (_U, "the id is an e-mail address", _names((_EMAIL, b"{id}"))),
    "T05-ip": (_U, "an IP address only", _names((_IP, bytes([127, 0, 0, 1])))),
    "T05-other-name": (_U, "the id is an otherName", _other_name),
    "T05-directory-name": (_U, "a directory name only", _names((_DIRECTORY, common_name("orders").public_bytes()))),
    "T05-registered-id": (_U, "a registered id only", _names((_REGISTERED, oid("1.2.3.4")[2:]))),
    "T06-two-ids": (_U, "two workloads", _uri(b"{id}", b"spiffe://{td}/ns/shop/sa/payments")),
    "T06-id-and-https": (_U, "a second URI that is no SPIFFE ID", _uri(b"{id}", b"https://shop.{td}/orders")),
    "T06-https-and-id": (_U, "the same, the other way round", _uri(b"https://shop.{td}/orders", b"{id}")),
    "T06-same-twice": (_U, "the same id twice", _uri(b"{id}", b"{id}")),
    "T07-nul": (_U, "some readers stop at the NUL", _uri(b"{id}\x00.evil")),
    "T07-nul-at-end": (_U, "a NUL at the end", _uri(b"{id}\x00")),
    "T07-nul-in-domain": (_U, "a NUL in the trust domain", _uri(b"spiffe://{td}\x00.evil/ns/shop/sa/orders")),
    "T07-carriage-return": (_U, "CR LF", _uri(b"{id}\r\n")),
    "T07-line-feed": (_U, "a line feed at the end, which `$` in a pattern lets pass", _uri(b"{id}\n")),
    "T07-latin-1": (_U, "not ASCII", _uri(b"{id}\xe9")),
    "T07-utf-8": (_U, "not ASCII, well-formed UTF-8", _uri("{id}é".encode())),
    "T07-homoglyph": (_U, "Cyrillic o", _uri("spiffe://{td}/ns/shop/sa/\N{CYRILLIC SMALL LETTER O}rders".encode())),
    "T07-homoglyph-domain": (
        _U,
        "full-width full stop",
        _uri("spiffe://prod\N{FULLWIDTH FULL STOP}example/a".encode()),
    ),
    "T07-punycode": (_U, "legal, and another trust domain", _uri(b"spiffe://xn--prd-0na.example/ns/shop/sa/orders")),
    "T07-2048-bytes": (_A, "twin: as long as may be", _long(_LONGEST)),
    "T07-2049-bytes": (_U, "one byte too long", _long(_LONGEST + 1)),
    "T07-20000-bytes": (Expected.HANDSHAKE, "the certificate is over 16 KiB", _long(20_000)),
    "T07-empty": (_U, "an empty URI", _uri(b"")),
    "T08-other": (_U, "another environment's", _uri(b"spiffe://staging.example/ns/shop/sa/orders")),
    "T08-sub-domain": (_U, "below ours", _uri(b"spiffe://eu.{td}/ns/shop/sa/orders")),
    "T08-suffix": (_U, "begins like ours", _uri(b"spiffe://{td}.evil/ns/shop/sa/orders")),
    "T08-prefix": (_U, "ends like ours", _uri(b"spiffe://evil{td}/ns/shop/sa/orders")),
    "T08-upper-case": (_U, "ours in capitals", _uri(b"spiffe://{TD}/ns/shop/sa/orders")),
    "T08-trailing-dot": (_U, "ours with a root dot", _uri(b"spiffe://{td}./ns/shop/sa/orders")),
    "T08-empty": (_U, "no trust domain", _uri(b"spiffe:///ns/shop/sa/orders")),
    "T08-ipv6": (_U, "an address in brackets", _uri(b"spiffe://[::1]/ns/shop/sa/orders")),
    "T08-ipv4": (_U, "legal, and another trust domain", _uri(b"spiffe://127.0.0.1/ns/shop/sa/orders")),
    "T08-256-bytes": (_U, "longer than 255", _uri(b"spiffe://" + b"a" * 256 + b"/ns/shop/sa/orders")),
    "T08-scheme-upper-case": (_U, "SPIFFE://", _uri(b"SPIFFE://{td}/ns/shop/sa/orders")),
    "T08-scheme-https": (_U, "https://", _uri(b"https://{td}/ns/shop/sa/orders")),
    "T08-scheme-none": (_U, "no scheme", _uri(b"//{td}/ns/shop/sa/orders")),
    "T08-one-slash": (_U, "spiffe:/", _uri(b"spiffe:/{td}/ns/shop/sa/orders")),
    "T08-three-slashes": (_U, "spiffe:///", _uri(b"spiffe:///{td}/ns/shop/sa/orders")),
    "T08-space-before": (_U, "a space before it", _uri(b" {id}")),
    "T09-none": (_U, "names the trust domain and no workload", _uri(b"spiffe://{td}")),
    "T09-root": (_U, "/", _uri(b"spiffe://{td}/")),
    "T09-only-slashes": (_U, "//", _uri(b"spiffe://{td}//")),
    "T09-empty-segment": (_U, "//", _uri(b"spiffe://{td}/ns//shop/sa/orders")),
    "T09-dot": (_U, "/./", _uri(b"spiffe://{td}/ns/./shop/sa/orders")),
    "T09-dot-dot": (_U, "/../", _uri(b"spiffe://{td}/ns/shop/sa/payments/../orders")),
    "T09-dot-at-end": (_U, "/.", _uri(b"{id}/.")),
    "T09-dot-dot-at-end": (_U, "/..", _uri(b"{id}/..")),
    "T09-three-dots": (_A, "twin: a legal segment", _uri(b"{id}/...")),
    "T09-trailing-slash": (_U, "a slash at the end", _uri(b"{id}/")),
    "T09-percent": (_U, "%61 is an a elsewhere", _uri(b"spiffe://{td}/ns/shop/s%61/orders")),
    "T09-percent-slash": (_U, "%2f is a slash elsewhere", _uri(b"spiffe://{td}/ns/shop%2fsa/orders")),
    "T09-query": (_U, "?q", _uri(b"{id}?q")),
    "T09-query-empty": (_U, "?", _uri(b"{id}?")),
    "T09-fragment": (_U, "#f", _uri(b"{id}#f")),
    "T09-port": (_U, ":443", _uri(b"spiffe://{td}:443/ns/shop/sa/orders")),
    "T09-port-empty": (_U, ":", _uri(b"spiffe://{td}:/ns/shop/sa/orders")),
    "T09-user": (_U, "user@", _uri(b"spiffe://user@{td}/ns/shop/sa/orders")),
    "T09-user-is-ours": (_U, "ours as user, theirs as host", _uri(b"spiffe://{td}@evil.example/ns/shop/sa/orders")),
    "T10-segment": (_U, "* as last segment", _uri(b"spiffe://{td}/ns/shop/sa/*")),
    "T10-two-stars": (_U, "** as last segment", _uri(b"spiffe://{td}/**")),
    "T10-inner-segment": (_U, "* as inner segment", _uri(b"spiffe://{td}/ns/*/sa/orders")),
    "T10-domain": (_U, "* as trust domain", _uri(b"spiffe://*/ns/shop/sa/orders")),
    "T10-dns": (_U, "a good id, and every DNS name of the domain", _names((_DNS, b"*.{td}"), (_URI, b"{id}"))),
}


def _every_byte() -> Iterator[WrongCertificate]:
    """Every byte value inside the path and inside the trust domain (go-spiffe's tests try the same)."""
    for value in range(256):
        byte = bytes([value])
        # A slash makes two segments of one, and both are good.
        expected = _A if byte in _LEGAL + b"/" else _U
        note = f"{byte!r} in the path"
        yield WrongCertificate(f"T09-path-byte-{value:02x}", expected, note, _uri(b"{id}" + byte + b"x"))
    for value in range(256):
        byte = bytes([value])
        note = f"{byte!r} in the trust domain"
        yield WrongCertificate(
            f"T08-domain-byte-{value:02x}", _U, note, _uri(b"spiffe://x" + byte + b"{td}/ns/shop/sa/orders")
        )


NAMES: Final = (*(WrongCertificate(name, *case) for name, case in _CASES.items()), *_every_byte())
