"""What is to be revoked, as it is written on a command line."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from carnet.claims import certificate_thumbprint
from carnet.encoding import decode_base64url
from carnet.errors import ConfigError
from carnet.testing import CertificateAuthority
from carnet_broker.core.revocation_target import (
    certificate_in_pem,
    certificate_name,
    moment,
    subject_of,
    token_id_of,
)

JTI = "3q2-7wAAAAAAAAAAAAAAAA"
THUMBPRINT = "A" * 42 + "E"
ORDERS = "spiffe://prod.example/ns/shop/sa/orders"


def test_a_jti_is_taken_as_it_is() -> None:
    """Nothing is added to it."""
    assert JTI == token_id_of(JTI, "--jti")


@pytest.mark.parametrize("text", ["-", "eyJhbGciOiJFUzI1NiJ9.e30.c2ln", " eyJ.x", "eyJhbGciOiJFUzI1NiJ9.\n"])
def test_a_token_is_refused_and_not_shown(text: str) -> None:
    """Others can read a command line; the message says how to see the jti."""
    with pytest.raises(ConfigError) as caught:
        token_id_of(text, "--root")
    assert str(caught.value).startswith("--root takes the jti of a token, never the token: ")
    assert "eyJ" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "two words", "x"])
def test_what_is_no_jti_is_refused(text: str) -> None:
    """The message names the option."""
    with pytest.raises(ConfigError, match=r"^--jti .* is no jti"):
        token_id_of(text, "--jti")


def test_a_subject_is_a_whole_spiffe_id() -> None:
    """No pattern, and no short form."""
    assert ORDERS == subject_of(ORDERS)
    for text in ("orders", "spiffe://prod.example/ns/shop/sa/*", ""):
        with pytest.raises(ConfigError, match=r"^--subject: "):
            subject_of(text)


def test_a_certificate_has_several_names_and_one_form() -> None:
    """Hex in both cases, with colons and without, base64url, and the forms of the log."""
    raw = decode_base64url(THUMBPRINT.encode())
    for text in (THUMBPRINT, raw.hex(), raw.hex().upper(), raw.hex(":"), f"sha256:{THUMBPRINT}"):
        assert f"sha256:{THUMBPRINT}" == certificate_name(text)
    assert f"spki-sha256:{THUMBPRINT}" == certificate_name(f"spki-sha256:{THUMBPRINT}")
    for text in ("tls.pem", "", raw.hex()[:-2], f"md5:{THUMBPRINT}"):
        assert certificate_name(text) is None


def test_a_pem_gives_name_and_end_of_its_leaf() -> None:
    """The first certificate of a chain is meant; what is no PEM is a `ValueError`."""
    issued = CertificateAuthority.create().issue(ORDERS)
    found = certificate_in_pem(issued.certificate_pem)
    assert f"sha256:{certificate_thumbprint(issued.leaf)}" == found.name
    assert issued.leaf.not_valid_after_utc == found.not_after
    with pytest.raises(ValueError, match="PEM"):
        certificate_in_pem(b"no certificate")


def test_a_moment_has_its_time_zone() -> None:
    """It comes out in UTC; one without is not guessed."""
    expected = datetime(2026, 11, 24, 16, 30, tzinfo=UTC)
    for text in ("2026-11-24T16:30:00Z", "2026-11-24T17:30:00+01:00"):
        assert expected == moment(text, "--ends-at")
    for text in ("2026-11-24T16:30:00", "tomorrow", ""):
        with pytest.raises(ConfigError, match=r"^--ends-at .* is no moment with its time zone"):
            moment(text, "--ends-at")
