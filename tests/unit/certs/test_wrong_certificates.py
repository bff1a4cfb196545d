from __future__ import annotations

import json
import stat
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from carnet.errors import InvalidIdentityError
from carnet.spiffe import spiffe_id_of_certificate
from carnet.testing import CertificateAuthority
from wrong_certificates import WRONG_CERTIFICATES, Client, Expected, WrongCertificate, main

ROWS = [f"T{number:02}" for number in range(1, 16)]
KINDS = list(WRONG_CERTIFICATES.values())
ACCEPTED = [kind for kind in KINDS if kind.expected is Expected.ACCEPT]
NAMES_REFUSED = [
    kind for kind in KINDS if kind.row in {"T05", "T06", "T07", "T09"} and kind.expected is Expected.UNAUTHENTICATED
]


@pytest.fixture(name="ca", scope="module")
def _ca() -> CertificateAuthority:
    return CertificateAuthority.create()


def name(kind: WrongCertificate) -> str:
    """The name of a kind, for the test's."""
    return kind.name


@pytest.mark.parametrize("row", ROWS)
def test_every_rule_is_tried_with_a_refusal(row: str) -> None:
    """Each rule has at least one kind that must be refused."""
    assert [kind for kind in KINDS if kind.row == row and kind.expected is not Expected.ACCEPT]


@pytest.mark.parametrize("row", [row for row in ROWS if row not in {"T06", "T08", "T10"}])
def test_every_rule_has_an_accepted_twin(row: str) -> None:
    """A refusal only counts beside something alike that is accepted. T05-good is the twin of the rules on names."""
    assert [kind for kind in ACCEPTED if kind.row == row]


def test_every_rule_is_one_of_the_known() -> None:
    """A kind with a mistyped rule would be counted nowhere."""
    assert set(ROWS) == {kind.row for kind in KINDS}


def test_every_byte_is_tried_in_path_and_trust_domain() -> None:
    """256 values each; 65 letters, digits and signs, and the slash between two segments, may be in a path."""
    path = [kind for kind in KINDS if kind.name.startswith("T09-path-byte-")]
    domain = [kind for kind in KINDS if kind.name.startswith("T08-domain-byte-")]
    assert (256, 256) == (len(path), len(domain))
    assert 66 == sum(kind.expected is Expected.ACCEPT for kind in path)


def test_every_kind_is_built_without_a_warning(ca: CertificateAuthority) -> None:
    """Each gives a PEM chain and the key of its leaf; showing nothing is the one exception."""
    now = datetime.now(UTC)
    for kind in KINDS:
        made = kind.build(ca, now)
        if kind.name == "T01-no-certificate":
            assert (b"", b"") == (made.chain_pem, made.private_key_pem)
            continue
        assert made.chain_pem.startswith(b"-----BEGIN CERTIFICATE-----"), kind.name
        assert serialization.load_pem_private_key(made.private_key_pem, None), kind.name
        assert kind.note, kind.name
        assert "PRIVATE" not in repr(made), kind.name


@pytest.mark.parametrize("kind", [kind for kind in ACCEPTED if "-byte-" not in kind.name], ids=name)
def test_openssl_accepts_every_accepted_twin(kind: WrongCertificate, ca: CertificateAuthority, tmp_path: Path) -> None:
    """A foreign verifier agrees, in its strict mode: what is said to be good is good."""
    (tmp_path / "root.pem").write_bytes(ca.root_pem)
    (tmp_path / "chain.pem").write_bytes(kind.build(ca, datetime.now(UTC)).chain_pem)
    command = "openssl verify -x509_strict -purpose sslclient -CAfile root.pem -untrusted chain.pem chain.pem"
    done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (0, "chain.pem: OK\n") == (done.returncode, done.stdout), done.stderr


def test_cryptography_accepts_every_accepted_twin(ca: CertificateAuthority) -> None:
    """And so does a second one, which however knows no name constraints on URIs."""
    verifier = PolicyBuilder().store(Store([ca.root.certificate])).build_client_verifier()
    for kind in ACCEPTED:
        leaf, *others = x509.load_pem_x509_certificates(kind.build(ca, datetime.now(UTC)).chain_pem)
        assert spiffe_id_of_certificate(leaf), kind.name
        if kind.name == "T11-permitted":
            with pytest.raises(VerificationError, match="unsupported name constraint"):
                verifier.verify(leaf, others)
        else:
            verifier.verify(leaf, others)


def test_no_refused_name_is_a_spiffe_id(ca: CertificateAuthority) -> None:
    """What a rule on names refuses is refused by the one place where a certificate becomes an identity.

    But for names that are legal and of another trust domain, which only the trust domain tells.
    """
    passed = []
    for kind in NAMES_REFUSED:
        leaf = x509.load_pem_x509_certificates(kind.build(ca, datetime.now(UTC)).chain_pem)[0]
        try:
            spiffe_id_of_certificate(leaf)
        except InvalidIdentityError:
            continue
        passed.append(kind.name)
    assert ["T07-punycode"] == passed


@pytest.mark.parametrize("kind", [k for k in KINDS if k.client is Client.OPENSSL], ids=name)
def test_kinds_for_openssl_are_refused_in_the_handshake(kind: WrongCertificate) -> None:
    """So a bare TLS client is enough to try them: no call has to be made."""
    assert Expected.HANDSHAKE is kind.expected


def test_command_writes_every_kind_with_an_index(tmp_path: Path) -> None:
    """DIR holds the root, chain and key of each kind, and what must become of it."""
    done = CliRunner().invoke(main, [str(tmp_path / "out"), "--only", "T03"])
    assert (0, f"6 kinds in {tmp_path / 'out'}\n") == (done.exit_code, done.output)
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert "handshake" == {entry["name"]: entry["expected"] for entry in index}["T03-server-only"]
    assert {"name", "row", "expected", "client", "note"} == set(index[0])
    for entry in index:
        assert x509.load_pem_x509_certificates((tmp_path / "out" / f"{entry['name']}.pem").read_bytes())
        assert 0o600 == stat.S_IMODE((tmp_path / "out" / f"{entry['name']}-key.pem").stat().st_mode)
    assert x509.load_pem_x509_certificate((tmp_path / "out/ca.pem").read_bytes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "T99"], "error: no kind has a name that starts with T99; they start with T01 to T15"),
        (["--trust-domain", "Prod"], "error: SPIFFE ID 'spiffe://Prod/x' has no valid trust domain"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    """Bad input ends with exit code 2, one line, and no traceback."""
    done = CliRunner().invoke(main, [str(tmp_path / "out"), *arguments])
    assert (2, 1) == (done.exit_code, done.stderr.count("\n"))
    assert done.stderr.startswith(message)
