"""Rules T02, T03, T04 and T15: time, usages, and the shape of a leaf (X509-SVID section 4, RFC 5280 section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from carnet.testing.ca import key_usage
from certificate_recipe import extension, good_name, leaf, oid, sequence, tlv
from wrong_kind import Build, Client, Expected, WrongCertificate

__all__ = ["PROFILES"]

_SECOND: Final = timedelta(seconds=1)
_UNKNOWN: Final = "1.3.6.1.4.1.99999.1"
_CLIENT, _SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
_ANY, _CODE = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, ExtendedKeyUsageOID.CODE_SIGNING


def _with(**parts: Any) -> Build:  # noqa: ANN401 - whatever `leaf` takes
    """Return the builder of a good leaf with `parts` changed; see `certificate_recipe.leaf`."""
    return lambda ca, now: leaf(ca, now, **parts)


def _window(before: timedelta, after: timedelta) -> Build:
    return lambda ca, now: leaf(ca, now, not_before=now + before, not_after=now + after)


def _extended(*usages: x509.ObjectIdentifier) -> Build:
    value = x509.ExtendedKeyUsage(usages).public_bytes() if usages else b""
    return _with(replace={"extended": extension("2.5.29.37", value) if value else b""})


def _usage(*usages: str, critical: bool = True) -> Build:
    return _with(replace={"usage": extension("2.5.29.15", key_usage(*usages).public_bytes(), critical=critical)})


def _basic(*, ca: bool) -> Build:
    value = x509.BasicConstraints(ca=ca, path_length=None).public_bytes()
    return _with(replace={"basic": extension("2.5.29.19", value, critical=True)})


def _names(value: bytes) -> Build:
    """Return the builder of a leaf whose SAN extension has this value."""
    return _with(replace={"names": extension("2.5.29.17", value, critical=True)})


def _twice(dotted: str, value: bytes) -> Build:
    return _with(extra=[extension(dotted, value)] * 2)


def _name_twice() -> Build:
    return lambda ca, now: leaf(
        ca, now, extra=[extension("2.5.29.17", sequence(tlv(0x86, good_name(ca).encode())), critical=True)]
    )


_H, _U, _A = Expected.HANDSHAKE, Expected.UNAUTHENTICATED, Expected.ACCEPT

_OPENSSL: Final = Client.OPENSSL

_CASES: Final[Mapping[str, tuple[Expected, str, Build] | tuple[Expected, str, Build, Client]]] = {
    "T02-expired-by-a-second": (_H, "ended a second ago", _window(-timedelta(hours=1), -_SECOND)),
    "T02-not-yet-valid": (_H, "begins in half a minute", _window(30 * _SECOND, timedelta(hours=1))),
    "T02-longer-than-policy": (_U, "lasts a year and a day", _window(-60 * _SECOND, timedelta(days=366))),
    "T02-ends-in-a-minute": (_A, "twin: still valid, for a minute", _window(-timedelta(hours=1), 60 * _SECOND)),
    "T03-both-usages": (_A, "twin: server and client, as the PKI makes them", _extended(_SERVER, _CLIENT)),
    "T03-server-only": (_H, "cannot be a client", _extended(_SERVER)),
    "T03-client-only": (_U, "SPIFFE: both usages or it is not a workload's leaf", _extended(_CLIENT)),
    "T03-code-signing": (_H, "for something else", _extended(_CODE)),
    "T03-any-usage": (_H, "anyExtendedKeyUsage is neither of the two", _extended(_ANY)),
    "T03-no-usage": (_U, "no extended key usage at all", _extended()),
    "T04-ca": (_U, "a leaf that says CA:TRUE", _basic(ca=True)),
    "T04-no-basic-constraints": (_A, "twin: absent is not a CA", _with(replace={"basic": b""})),
    "T04-key-cert-sign": (_U, "may sign certificates", _usage("digital_signature", "key_cert_sign")),
    "T04-crl-sign": (_U, "may sign revocation lists", _usage("digital_signature", "crl_sign")),
    "T04-no-digital-signature": (_H, "key agreement only", _usage("key_agreement"), _OPENSSL),
    "T04-usage-not-critical": (_U, "SPIFFE: critical", _usage("digital_signature", critical=False)),
    "T04-no-key-usage": (_U, "SPIFFE: must be there", _with(replace={"usage": b""})),
    "T15-unknown-extension": (
        _A,
        "twin: not critical, so it may be ignored",
        _with(extra=[extension(_UNKNOWN, b"\x05\x00")]),
    ),
    "T15-unknown-critical-extension": (
        _H,
        "nobody knows what it demands",
        _with(extra=[extension(_UNKNOWN, b"\x05\x00", critical=True)]),
    ),
    "T15-names-twice": (_H, "the SAN extension twice", _name_twice()),
    "T15-extension-twice": (_U, "an unknown extension twice", _twice(_UNKNOWN, b"\x05\x00")),
    "T15-v1": (_U, "version 1, no extensions", _with(version=None, no_extensions=True)),
    "T15-v1-with-extensions": (_H, "version 1 has no extensions", _with(version=None), _OPENSSL),
    "T15-v4": (_H, "there is no such version", _with(version=3), _OPENSSL),
    "T15-serial-negative": (_U, "RFC 5280: positive", _with(serial=-5)),
    "T15-serial-zero": (_U, "RFC 5280: positive", _with(serial=0)),
    "T15-serial-of-20-octets": (_A, "twin: the longest that is allowed", _with(serial=2**158 + 1)),
    "T15-serial-of-21-octets": (_U, "RFC 5280: at most 20", _with(serial=2**160 + 1)),
    "T15-serial-of-200-octets": (_U, "ten times too long", _with(serial=2**1590 + 1)),
    "T15-names-cut-off": (_H, "the SAN says it is longer than it is", _names(b"\x30\x10\x86\x02ab")),
    "T15-names-no-sequence": (_H, "the SAN is an OCTET STRING", _names(b"\x04\x02ab")),
    "T15-names-empty": (_U, "the SAN has no names", _names(sequence())),
    "T15-names-nothing": (_H, "the SAN has no bytes", _names(b"")),
    "T15-names-indefinite": (_H, "BER, not DER", _names(b"\x30\x80\x86\x02ab\x00\x00")),
    "T15-names-trailing": (_H, "bytes after the SAN", _names(sequence(tlv(0x86, b"spiffe://x/y")) + oid("1.2.3"))),
}

PROFILES: Final = tuple(WrongCertificate(name, *case) for name, case in _CASES.items())
