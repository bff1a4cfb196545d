from __future__ import annotations

import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from carnet.testing import IssuedCertificate
from dev_ca import load_authority, main

PAYMENTS = "spiffe://prod.example/ns/shop/sa/payments"


def run(*arguments: object) -> Result:
    """Run the command as a shell would."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(name="ca")
def _ca(tmp_path: Path) -> Path:
    assert 0 == run("init", tmp_path / "ca").exit_code
    return tmp_path / "ca"


def test_init_makes_a_root_that_verifies_its_intermediate(ca: Path) -> None:
    """Both last a year, and both keys can be read by their owner only."""
    root, intermediate = (
        x509.load_pem_x509_certificate((ca / f"{n}.pem").read_bytes()) for n in ("root", "intermediate")
    )
    intermediate.verify_directly_issued_by(root)
    assert {0o600} == {stat.S_IMODE((ca / f"{n}-key.pem").stat().st_mode) for n in ("root", "intermediate")}
    assert 365 == (root.not_valid_after_utc - root.not_valid_before_utc).days


def test_second_init_changes_nothing(ca: Path) -> None:
    """An authority is never overwritten."""
    before = content(ca)
    done = run("init", ca)
    assert (0, before) == (done.exit_code, content(ca))
    assert f"unchanged {ca}/root.pem\nunchanged {ca}/intermediate.pem\n" == done.output


def test_init_completes_an_authority_without_intermediate(ca: Path) -> None:
    """A run that was interrupted after the root goes on with the same root."""
    before = content(ca)
    (ca / "intermediate.pem").unlink()
    (ca / "intermediate-key.pem").unlink()
    assert 0 == run("init", ca).exit_code
    assert before["root.pem"] == content(ca)["root.pem"]
    assert 0 == run("issue", ca, PAYMENTS).exit_code


def test_issued_server_certificate_verifies_and_has_both_names(ca: Path) -> None:
    """`--serves` adds the derived DNS name; the chain leads to root.pem."""
    done = run("issue", ca, PAYMENTS, "--serves")
    assert f"created   {ca}/ns-shop-sa-payments.pem\n" == done.output
    pem, key = ((ca / f"ns-shop-sa-payments{end}.pem") for end in ("", "-key"))
    leaf, *others = x509.load_pem_x509_certificates(pem.read_bytes())
    root = x509.load_pem_x509_certificate((ca / "root.pem").read_bytes())
    PolicyBuilder().store(Store([root])).build_client_verifier().verify(leaf, others)
    issued = IssuedCertificate(pem.read_bytes(), key.read_bytes(), leaf)
    assert (PAYMENTS, ("payments.shop.svc.prod.example",)) == (issued.spiffe_id, issued.dns_names)
    assert 0o600 == stat.S_IMODE(key.stat().st_mode)


def test_certificate_that_is_good_is_kept(ca: Path) -> None:
    """A second issue with the same names writes nothing."""
    run("issue", ca, PAYMENTS, "--serves")
    before = content(ca)
    done = run("issue", ca, PAYMENTS, "--serves")
    assert (f"unchanged {ca}/ns-shop-sa-payments.pem\n", before) == (done.output, content(ca))


def test_certificate_near_its_end_or_with_other_names_is_renewed(ca: Path) -> None:
    """Other DNS names, an end that is near, or another authority: a new certificate."""
    run("issue", ca, PAYMENTS, "--ttl", "1s")
    changed = f"changed   {ca}/ns-shop-sa-payments.pem\n"
    assert changed == run("issue", ca, PAYMENTS).output
    assert changed == run("issue", ca, PAYMENTS, "--dns", "localhost").output
    (ca / "intermediate.pem").unlink()
    (ca / "intermediate-key.pem").unlink()
    run("init", ca)
    assert changed == run("issue", ca, PAYMENTS, "--dns", "localhost").output


def test_loaded_authority_issues_for_its_trust_domain(ca: Path) -> None:
    """What was written can be used from Python."""
    assert "prod.example" == load_authority(ca).trust_domain


def test_certificate_does_not_outlive_its_authority(tmp_path: Path) -> None:
    """A longer life is cut to that of the intermediate."""
    run("init", tmp_path, "--ttl", "1h")
    run("issue", tmp_path, PAYMENTS, "--ttl", "24h")
    leaf = x509.load_pem_x509_certificate((tmp_path / "ns-shop-sa-payments.pem").read_bytes())
    assert load_authority(tmp_path).intermediate.certificate.not_valid_after_utc == leaf.not_valid_after_utc


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["init", "CA", "--trust-domain", "staging.example"],
            "is the authority of prod.example; use another directory",
        ),
        (["init", "CA", "--trust-domain", "Staging"], "has no valid trust domain"),
        (["init", "CA", "--trust-domain", "a/b"], "'a/b' is not the name of a trust domain"),
        (["issue", "CA", "spiffe://staging.example/a"], "is not of the trust domain prod.example"),
        (["issue", "CA", "https://prod.example/a"], "does not start with spiffe://"),
        (["issue", "CA", "spiffe://prod.example/a", "--serves"], "has no DNS name"),
        (["issue", "CA", "spiffe://prod.example/root"], "the name root is the authority's; choose another with --name"),
        (
            ["issue", "CA", "spiffe://prod.example/a", "--name", "b"],
            "belongs to spiffe://prod.example/b; choose another",
        ),
        (["issue", "CA/none", "spiffe://prod.example/a"], "holds no authority; make one: dev_ca.py init"),
    ],
)
def test_wrong_input_ends_with_one_line_and_exit_code_2(arguments: list[str], message: str, ca: Path) -> None:
    """The line says what is wrong and what to do; nothing is written."""
    run("issue", ca, "spiffe://prod.example/b")
    before = content(ca)
    done = run(*(argument.replace("CA", str(ca)) for argument in arguments))
    assert (2, 1, before) == (done.exit_code, done.stderr.count("\n"), content(ca)), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("file", "replacement", "message"),
    [
        ("root-key.pem", None, "is there without root-key.pem; put that back, or move this one away"),
        ("root.pem", None, "has an intermediate and no root"),
        ("intermediate.pem", "", "is not what this program wrote"),
        ("intermediate-key.pem", "root-key.pem", "is not the key of"),
    ],
)
def test_damaged_authority_is_not_repaired_by_force(file: str, replacement: str | None, message: str, ca: Path) -> None:
    """Keys that are lost or mixed up are for a person to sort out."""
    if replacement is None:
        (ca / file).unlink()
    else:
        (ca / file).write_bytes((ca / replacement).read_bytes() if replacement else b"rubbish")
    before = content(ca)
    done = run("init", ca)
    assert (2, 1, before) == (done.exit_code, done.stderr.count("\n"), content(ca)), done.stderr
    assert message in done.stderr


def test_duration_without_unit_is_refused_with_exit_code_2(ca: Path) -> None:
    """Durations have one form in the whole project."""
    done = run("issue", ca, PAYMENTS, "--ttl", "3600")
    assert 2 == done.exit_code
    assert "write a whole number and one unit" in done.stderr
