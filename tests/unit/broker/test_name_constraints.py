from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from carnet.testing import CertificateAuthority
from carnet_broker.core.certificates import ParsedCertificate, read_certificates
from carnet_broker.core.name_constraints import forbidden_name
from certificate_recipe import leaf, tlv

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
URI, DNS, EMAIL, IP = x509.UniformResourceIdentifier, x509.DNSName, x509.RFC822Name, x509.IPAddress
ID = "spiffe://prod.example/ns/shop/sa/orders"
CA = CertificateAuthority.create(now=NOW)


def certificate(*names: tuple[int, str | bytes], subject: x509.Name | None = None) -> ParsedCertificate:
    """Return a certificate with these alternative names, each a tag and a text."""
    encoded = [tlv(tag, text if isinstance(text, bytes) else text.encode()) for tag, text in names]
    return read_certificates(leaf(CA, NOW, names=encoded, subject=subject or x509.Name([])).chain_pem)[0]


def allows(
    certified: ParsedCertificate,
    *,
    permitted: Sequence[x509.GeneralName] = (),
    excluded: Sequence[x509.GeneralName] = (),
) -> bool:
    """Say whether these constraints allow all names."""
    return forbidden_name(x509.NameConstraints(permitted or None, excluded or None), certified) is None


@pytest.mark.parametrize(
    ("uri", "base", "within"),
    [
        (ID, "prod.example", True),
        (ID, "PROD.example", True),
        (ID, "example", False),
        (ID, ".example", True),
        (ID, ".prod.example", False),
        (ID, "xprod.example", False),
        (ID, "d.example", False),
        (ID, "", False),
        ("spiffe://eu.prod.example/x", ".prod.example", True),
        ("spiffe://eu.prod.example/x", "prod.example", False),
        ("spiffe://evilprod.example/x", ".prod.example", False),
        ("https://user@prod.example:443/x?q#f", "prod.example", True),
        ("https://prod.example?x=@other.example", "prod.example", True),
        ("spiffe://prod.example", "prod.example", True),
        ("SPIFFE://PROD.EXAMPLE/x", "prod.example", True),
    ],
)
def test_a_uri_is_within_by_its_host(uri: str, base: str, within: bool):
    """RFC 5280 section 4.2.1.10: a host alone, or with a leading period all below it. T11."""
    certified = certificate((0x86, uri))

    assert within == allows(certified, permitted=[URI(base)])
    assert within != allows(certified, excluded=[URI(base)])


@pytest.mark.parametrize(
    "uri", ["urn:x", "spiffe:/prod.example/x", "spiffe:///x", "https://[::1]/x", "prod.example", ""]
)
def test_a_uri_without_a_host_name_is_never_allowed_under_a_uri_constraint(uri: str):
    """It cannot be told whether it is within: so it is not permitted, and it is excluded."""
    certified = certificate((0x86, uri))

    assert not allows(certified, permitted=[URI("prod.example")])
    assert not allows(certified, excluded=[URI("other.example")])
    assert allows(certified, permitted=[DNS("prod.example")])


@pytest.mark.parametrize(
    ("name", "base", "within"),
    [
        ("prod.example", "prod.example", True),
        ("a.b.prod.example", "prod.example", True),
        ("A.PROD.example", "prod.EXAMPLE", True),
        ("evilprod.example", "prod.example", False),
        ("example", "prod.example", False),
        ("a.prod.example", ".prod.example", True),
        ("prod.example", ".prod.example", False),
        ("anything", "", True),
    ],
)
def test_a_dns_name_is_within_with_labels_added_on_the_left(name: str, base: str, within: bool):
    """RFC 5280 section 4.2.1.10."""
    certified = certificate((0x86, ID), (0x82, name))

    assert within == allows(certified, permitted=[DNS(base)])
    assert within != allows(certified, excluded=[DNS(base)])


def test_a_constraint_says_nothing_about_names_of_another_form():
    """A DNS constraint lets a certificate without DNS names by (T11)."""
    certified = certificate((0x86, ID))

    assert allows(certified, permitted=[DNS("other.example"), EMAIL("x@other.example")])
    assert allows(certified, permitted=[x509.DirectoryName(x509.Name([]))])


def test_one_permitted_is_enough_and_one_excluded_is_too_many():
    """Of several constraints of one form."""
    certified = certificate((0x86, ID))

    assert allows(certified, permitted=[URI("other.example"), URI("prod.example")])
    assert not allows(certified, permitted=[URI("prod.example")], excluded=[URI("other.example"), URI("prod.example")])


def test_every_name_has_to_be_allowed():
    """Not just the first."""
    certified = certificate((0x86, ID), (0x82, "good.example"), (0x82, "bad.test"))

    assert not allows(certified, permitted=[DNS("example")])
    assert allows(certified, permitted=[DNS("example"), DNS("test")])


@pytest.mark.parametrize(
    ("certified", "constraint"),
    [
        (certificate((0x86, ID), (0x81, "a@prod.example")), EMAIL("a@prod.example")),
        (certificate((0x86, ID), (0x87, ip_address("10.0.0.1").packed)), IP(ip_network("10.0.0.0/8"))),
        (
            certificate((0x86, ID), subject=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")])),
            x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")])),
        ),
        (
            certificate((0x86, ID), subject=x509.Name([x509.NameAttribute(NameOID.EMAIL_ADDRESS, "a@prod.example")])),
            EMAIL("a@prod.example"),
        ),
    ],
    ids=["email", "address", "subject", "email-in-subject"],
)
def test_a_form_that_is_not_processed_refuses_each_certificate_that_has_it(
    certified: ParsedCertificate, constraint: x509.GeneralName
):
    """RFC 5280 section 4.2.1.10: process the constraint, or reject the certificate. Without one, all is well."""
    assert not allows(certified, permitted=[constraint])
    assert not allows(certified, excluded=[constraint])
    assert allows(certified, permitted=[URI("prod.example")])


def test_the_work_is_bounded():
    """T12: names times constraints, at the limit and above."""
    certified = certificate((0x86, ID), *[(0x82, "a.example")] * 63)

    assert allows(certified, permitted=[DNS("example")] * 64)
    assert not allows(certified, permitted=[DNS("example")] * 65)
