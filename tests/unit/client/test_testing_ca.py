from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

import carnet.testing
from carnet.errors import InvalidIdentityError
from carnet.testing import CertificateAuthority, IssuedCertificate

NOW = datetime(2027, 3, 1, 12, 0, 0, tzinfo=UTC)
ORDERS = "spiffe://prod.example/ns/shop/sa/orders"
PAYMENTS = "spiffe://prod.example/ns/shop/sa/payments"


@pytest.fixture(name="ca")
def _ca() -> CertificateAuthority:
    return CertificateAuthority.create(now=NOW)


def verify(issued: IssuedCertificate, root: CertificateAuthority, at: datetime = NOW) -> None:
    """Verify what a client would show, with nothing but the root of `root`."""
    leaf, *others = x509.load_pem_x509_certificates(issued.certificate_pem)
    store = Store(x509.load_pem_x509_certificates(root.root_pem))
    PolicyBuilder().store(store).time(at).build_client_verifier().verify(leaf, others)


def test_public_names_are_the_literal_list() -> None:
    """What users may import is written down, and is there."""
    assert ["CertificateAuthority", "IssuedCertificate", "Issuer"] == carnet.testing.__all__
    assert all(hasattr(carnet.testing, name) for name in carnet.testing.__all__)


def test_issued_chain_verifies_against_the_root(ca: CertificateAuthority) -> None:
    """Leaf and intermediate lead to the root, within the window."""
    verify(ca.issue(ORDERS), ca)


def test_issued_chain_does_not_verify_against_another_root(ca: CertificateAuthority) -> None:
    """The success above needs this very root, not one of the same name."""
    other = CertificateAuthority.create(now=NOW)
    with pytest.raises(VerificationError):
        verify(ca.issue(ORDERS), other)


@pytest.mark.parametrize("at", [NOW - timedelta(seconds=61), NOW + timedelta(seconds=3601)])
def test_issued_chain_does_not_verify_outside_its_window(ca: CertificateAuthority, at: datetime) -> None:
    """By default a leaf is valid from a minute ago to an hour from now."""
    verify(ca.issue(ORDERS), ca, NOW - timedelta(seconds=60))
    verify(ca.issue(ORDERS), ca, NOW + timedelta(seconds=3600))
    with pytest.raises(VerificationError):
        verify(ca.issue(ORDERS), ca, at)


def test_window_is_what_was_asked_for(ca: CertificateAuthority) -> None:
    """A test that needs an expired certificate gets one."""
    issued = ca.issue(ORDERS, not_before=NOW - timedelta(hours=2), not_after=NOW - timedelta(seconds=1))
    assert NOW - timedelta(hours=2) == issued.leaf.not_valid_before_utc
    assert NOW - timedelta(seconds=1) == issued.leaf.not_valid_after_utc
    with pytest.raises(VerificationError):
        verify(issued, ca)


def test_leaf_is_an_x509_svid(ca: CertificateAuthority) -> None:
    """One URI name and nothing else, not a CA, signs only, client and server (X509-SVID section 4)."""
    extensions = ca.issue(ORDERS).leaf.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName)
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert [x509.UniformResourceIdentifier(ORDERS)] == list(names.value)
    assert (True, True, True) == (names.critical, basic.critical, usage.critical)
    assert (False, True, False) == (basic.value.ca, usage.value.digital_signature, usage.value.key_cert_sign)
    assert [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH] == list(extended.value)


def test_leaf_names_its_key_and_its_issuers(ca: CertificateAuthority) -> None:
    """Key identifiers are there, so that a verifier with two intermediates finds the right one."""
    issued = ca.issue(ORDERS)
    authority = issued.leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    subject = ca.intermediate.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert subject.digest == authority.key_identifier
    assert issued.leaf.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def test_private_key_belongs_to_the_leaf(ca: CertificateAuthority) -> None:
    """The pair can be loaded together."""
    issued = ca.issue(ORDERS)
    key = serialization.load_pem_private_key(issued.private_key_pem, None)
    assert issued.leaf.public_key() == key.public_key()


def test_two_issues_share_neither_key_nor_serial(ca: CertificateAuthority) -> None:
    """A renewed certificate is another certificate."""
    first, second = ca.issue(ORDERS), ca.issue(ORDERS)
    assert first.leaf.public_key() != second.leaf.public_key()
    assert first.leaf.serial_number != second.leaf.serial_number


def test_server_leaf_has_the_derived_dns_name(ca: CertificateAuthority) -> None:
    """`issue_server` adds the one name that clients check, and nothing else."""
    issued = ca.issue_server(PAYMENTS)
    assert (PAYMENTS, ("payments.shop.svc.prod.example",)) == (issued.spiffe_id, issued.dns_names)


def test_server_leaf_is_refused_for_an_id_that_cannot_serve(ca: CertificateAuthority) -> None:
    """An id that has no DNS name is an error and not a leaf without one."""
    with pytest.raises(InvalidIdentityError):
        ca.issue_server("spiffe://prod.example/orders")


def test_reissued_leaf_keeps_its_names(ca: CertificateAuthority) -> None:
    """Renewal: the same names, a new key, a new window."""
    first = ca.issue_server(PAYMENTS)
    second = ca.reissue(first, not_after=NOW + timedelta(hours=9))
    assert (first.spiffe_id, first.dns_names) == (second.spiffe_id, second.dns_names)
    assert first.leaf.public_key() != second.leaf.public_key()
    assert NOW + timedelta(hours=9) == second.leaf.not_valid_after_utc
    verify(second, ca)


def test_new_intermediate_is_trusted_through_the_same_root(ca: CertificateAuthority) -> None:
    """An intermediate can be replaced under a root that stays, and both go on verifying."""
    second = ca.with_new_intermediate()
    assert ca.root_pem == second.root_pem
    assert ca.intermediate.certificate.subject != second.intermediate.certificate.subject
    verify(second.issue(ORDERS), ca)
    verify(ca.issue(ORDERS), second)


def test_revocation_list_holds_what_was_revoked_and_nothing_else(ca: CertificateAuthority) -> None:
    """A revoked serial is on the list; one that was not, and one of another intermediate, are not."""
    revoked, kept, other = ca.issue(ORDERS), ca.issue(ORDERS), ca.with_new_intermediate()
    empty = x509.load_pem_x509_crl(ca.crl_pem())
    ca.revoke(revoked)
    crl = x509.load_pem_x509_crl(ca.crl_pem())
    assert crl.is_signature_valid(ca.intermediate.private_key.public_key())
    assert empty.get_revoked_certificate_by_serial_number(revoked.leaf.serial_number) is None
    assert crl.get_revoked_certificate_by_serial_number(revoked.leaf.serial_number) is not None
    assert crl.get_revoked_certificate_by_serial_number(kept.leaf.serial_number) is None
    assert 0 == len(x509.load_pem_x509_crl(other.crl_pem()))


def test_revocation_list_numbers_grow_and_times_are_given(ca: CertificateAuthority) -> None:
    """A later list has a higher number (RFC 5280 section 5.2.3) and the window that was asked for."""
    first = x509.load_pem_x509_crl(ca.crl_pem())
    second = x509.load_pem_x509_crl(ca.crl_pem(now=NOW + timedelta(hours=1), lifetime=timedelta(minutes=5)))
    numbers = [crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number for crl in (first, second)]
    assert [1, 2] == numbers
    assert (NOW, NOW + timedelta(hours=1)) == (first.last_update_utc, first.next_update_utc)
    assert NOW + timedelta(hours=1, minutes=5) == second.next_update_utc


def test_written_key_can_be_read_by_its_owner_only(ca: CertificateAuthority, tmp_path: Path) -> None:
    """NAME.pem and NAME-key.pem, the key with mode 0600, also when it replaces a file with a wider mode."""
    issued = ca.issue(ORDERS)
    (tmp_path / "orders-key.pem").write_text("old")
    (tmp_path / "orders-key.pem").chmod(0o644)
    certificate_file, key_file = issued.write(tmp_path, "orders")
    assert [tmp_path / "orders.pem", tmp_path / "orders-key.pem"] == [certificate_file, key_file]
    assert (issued.certificate_pem, issued.private_key_pem) == (certificate_file.read_bytes(), key_file.read_bytes())
    assert 0o600 == stat.S_IMODE(key_file.stat().st_mode)
    assert ["orders-key.pem", "orders.pem"] == sorted(file.name for file in tmp_path.iterdir())


def test_no_representation_shows_a_key(ca: CertificateAuthority) -> None:
    """A failing test prints its values; the keys in them stay out."""
    issued = ca.issue(ORDERS)
    assert "PRIVATE" not in repr(issued)
    assert "private_key" not in repr(ca.root)


def test_real_clock_is_used_where_none_is_given() -> None:
    """Without `now` what is issued is valid at this moment."""
    ca = CertificateAuthority.create("staging.example")
    issued = ca.issue("spiffe://staging.example/ns/shop/sa/orders")
    ca.revoke(issued)
    verify(issued, ca, datetime.now(UTC))
    assert 1 == len(x509.load_pem_x509_crl(ca.crl_pem()))
