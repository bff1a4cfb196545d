from __future__ import annotations

import io
import json
import subprocess
import sys
from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.claims import Claims, certificate_thumbprint
from carnet.cli import run
from carnet.cli.parameters import read_peer_certificate
from carnet.jwk import PublicJWK
from carnet.spiffe import SpiffeID
from carnet.testing.ca import CertificateAuthority
from carnet.verify import assemble, encode_unsigned, raw_signature

ORDERS = SpiffeID.parse("spiffe://prod.example/ns/shop/sa/orders")
KEY = ec.generate_private_key(ec.SECP256R1())
VARIABLES = ("BROKER", "TRUST", "BROKER_NAME", "CERT_FILE", "KEY_FILE", "CA_FILE", "ISSUER", "AUDIENCE")


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"CARNET_{name}", raising=False)


def signed_token(*, life: timedelta = timedelta(minutes=5)) -> str:
    """A token of the right form."""
    now = datetime.now(UTC).replace(microsecond=0)
    claims = Claims(
        issuer="https://tokens.prod.example",
        subject=ORDERS,
        audience="payments",
        client_id=ORDERS,
        expires_at=now + life,
        issued_at=now,
        not_before=now,
        token_id="0123456789abcdef",
        scopes=("charge", "refund"),
        confirmation="A" * 43,
        revocation_version=7,
    )
    signing_input = encode_unsigned(claims, PublicJWK.of(KEY.public_key()).kid)
    return assemble(signing_input, raw_signature(KEY.sign(signing_input, ec.ECDSA(hashes.SHA256()))))


def text_token(header: object, claims: object, signature: str = "AA") -> str:
    """Three parts, whatever is in them."""
    parts = (urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, claims))
    return ".".join([*parts, signature])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr: one line, of which the text after ``error:`` is returned. Nothing went to stdout."""
    out, err = capsys.readouterr()
    assert "" == out
    assert err.startswith("error: ")
    assert 1 == err.count("\n")
    return err.removeprefix("error: ").rstrip("\n")


def test_inspect_explains_every_claim_and_says_that_nothing_was_checked(capsys: pytest.CaptureFixture[str]) -> None:
    """The first word is UNVERIFIED; each member has its value and its meaning, times are readable."""
    assert 0 == run(["inspect", signed_token()])
    out = capsys.readouterr().out
    assert out.startswith("UNVERIFIED: ")
    for part in (
        'iss        "https://tokens.prod.example"',
        'sub        "spiffe://prod.example/ns/shop/sa/orders"',
        'scope      "charge refund"',
        "the one service that the token is for",
        'cnf        {"x5t#S256": "AAAAAA',
        "rv         7",
        "the end of the token: 20",
        ", in ",
        " ago",
    ):
        assert part in out
    assert "would refuse" not in out


def test_inspect_as_json_is_marked_as_not_verified(capsys: pytest.CaptureFixture[str]) -> None:
    """A script sees header and claims, and that neither was verified."""
    assert 0 == run(["inspect", "--json", signed_token()])
    shown = json.loads(capsys.readouterr().out)
    assert (False, True, None) == (shown["verified"], shown["well_formed"], shown["problem"])
    assert ("at+jwt", "payments") == (shown["header"]["typ"], shown["claims"]["aud"])


@pytest.mark.parametrize(
    ("token", "problem"),
    [
        (text_token({"alg": "none"}, {"sub": "admin"}), "the signature is not 64 bytes long"),
        (text_token({"alg": "HS256"}, {}, "A" * 86), "the header's alg is not ES256"),
        (text_token({"alg": "ES256", "typ": "JWT"}, {}, "A" * 86), "the header's members"),
        (f"{signed_token()}.x", "three parts"),
        (f"{signed_token()}==", "the signature"),
    ],
)
def test_inspect_reads_what_a_verifier_would_refuse_and_says_so(
    token: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token of another form is explained as far as it can be read; the exit code says that it is refused."""
    assert 1 == run(["inspect", token])
    out = capsys.readouterr().out
    assert out.startswith("UNVERIFIED: ")
    assert "a verifier would refuse it: " in out
    assert problem in out or "alg" in out


def test_inspect_names_members_that_do_not_belong(capsys: pytest.CaptureFixture[str]) -> None:
    """A member that no Carnet token has is said to be one."""
    assert 1 == run(["inspect", text_token({"alg": "ES256", "jku": "https://evil.example"}, {"admin": True})])
    assert 2 == capsys.readouterr().out.count("not a member of a Carnet token: a verifier refuses it")


def test_inspect_lets_no_control_sign_through(capsys: pytest.CaptureFixture[str]) -> None:
    """A hostile token cannot write to the terminal: values and names are shown as JSON in ASCII, and cut."""
    hostile = {"sub": "\x1b]0;owned\x07\u202e", "\x1b[2J": 1, "aud": "a" * 5000}
    assert 1 == run(["inspect", text_token({"alg": "\x1b[31m"}, hostile)])
    out = capsys.readouterr().out
    assert out.isascii()
    assert set() == {sign for sign in out if ord(sign) < 32} - {"\n"}
    assert max(map(len, out.splitlines())) < 300


@pytest.mark.parametrize("exp", [-1, 10**30, 1.5, "1", True, None, [1]])
def test_inspect_shows_times_that_are_none(exp: object, capsys: pytest.CaptureFixture[str]) -> None:
    """A time that is no time is shown as it is."""
    assert 1 == run(["inspect", text_token({"alg": "ES256"}, {"exp": exp})])
    assert f"exp        {json.dumps(exp)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    ["x", "a.b.c", "", "..", "e30", "bnVsbA.bnVsbA.x", "W10.e30.x", "\u00e4.\u00f6.\u00fc", text_token([[]], {})],
)
def test_inspect_refuses_what_is_no_token(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be read at all is bad input: exit code 2 and one line."""
    assert 2 == run(["inspect", text])
    assert "token" in error_of(capsys)


def test_inspect_survives_the_deepest_nesting(capsys: pytest.CaptureFixture[str]) -> None:
    """A text made to exhaust the parser is refused like any other."""
    deep = urlsafe_b64encode(b"[" * 30_000).decode().rstrip("=")
    assert 2 == run(["inspect", f"{deep}.{deep}.x"])
    assert "this is no token" in error_of(capsys)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b" \n"])
def test_rubbish_on_standard_input_is_bad_input(
    content: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are no text end in one line as well."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert 2 == run(["inspect", "-"])
    assert "token" in error_of(capsys)


def test_token_is_read_from_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`-` takes the token from a pipe, where the process list does not show it."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{signed_token()}\n".encode())))
    assert 0 == run(["inspect", "-"])
    assert "payments" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command: see 'carnet --help'"),
        (["tokn"], "No such command 'tokn'"),
        (["token"], "Missing argument 'AUDIENCE': see 'carnet token --help'"),
        (["token", "payments", "--ttl", "3"], "'3' is not a duration; write a whole number and one unit"),
        (["token", "payments", "--timeout", "0s"], "'0s' is no time at all"),
        (["token", "payments", "--what"], "No such option"),
        (["token", "payments"], "CARNET_BROKER is not set: give brokers=... or set it to host:port[,host:port]"),
        (["verify", "x.y.z"], "give --peer-certificate X, or --no-binding"),
        (["verify", "--peer-certificate", "/nowhere.pem", "x"], "--peer-certificate /nowhere.pem: No such file"),
        (["verify", "--peer-certificate", "/etc/hostname", "x"], "no PEM certificate in it"),
        (["verify", "--no-binding", signed_token()], "CARNET_ISSUER is not set"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and a line that names the argument or variable and the remedy."""
    assert 2 == run(arguments)
    shown = capsys.readouterr()
    assert message in shown.err + shown.out
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("variable", VARIABLES[:6])
def test_empty_variable_is_named(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty variable in a manifest is an error that names it."""
    ca = CertificateAuthority.create()
    cert_file, key_file = ca.issue(str(ORDERS)).write(tmp_path, "orders")
    (tmp_path / "ca.pem").write_bytes(ca.root_pem)
    values = {
        "BROKER": "127.0.0.1:1",
        "TRUST": "127.0.0.1:1",
        "CERT_FILE": str(cert_file),
        "KEY_FILE": str(key_file),
        "CA_FILE": str(tmp_path / "ca.pem"),
        "ISSUER": "https://tokens.prod.example",
        "AUDIENCE": "payments",
    }
    for name, value in (values | {variable: ""}).items():
        monkeypatch.setenv(f"CARNET_{name}", value)
    command = ["verify", "--no-binding", signed_token()] if variable == "TRUST" else ["token", "payments"]
    assert 2 == run(command)
    assert error_of(capsys).startswith(f"CARNET_{variable} is empty: set it to ")


def test_malformed_token_needs_no_keys_to_be_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no verifier would read is not good, whether or not the keys can be had."""
    assert 1 == run(["verify", "--no-binding", "a.b.c"])
    assert "the token is not good: " in error_of(capsys)
    assert 1 == run(["verify", "--no-binding", "--json", "a.b.c"])
    shown = json.loads(capsys.readouterr().out)
    assert (False, "MALFORMED") == (shown["valid"], shown["reason"])


def test_certificate_is_named_by_thumbprint_or_file(tmp_path: Path) -> None:
    """Hex with or without colons, base64url, and a PEM file mean the same certificate."""
    issued = CertificateAuthority.create().issue(str(ORDERS))
    cert_file, _ = issued.write(tmp_path, "orders")
    digest = issued.leaf.fingerprint(hashes.SHA256())
    expected = certificate_thumbprint(issued.leaf)
    for text in (expected, digest.hex(), digest.hex().upper(), digest.hex(":"), str(cert_file)):
        assert expected == read_peer_certificate(text)


@pytest.mark.parametrize("command", [[], ["token"], ["inspect"], ["verify"]])
def test_help_documents_the_exit_codes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever writes a script finds the exit codes where the options are."""
    assert 0 == run([*command, "--help"])
    assert "exit code" in " ".join(capsys.readouterr().out.lower().split())


def test_help_says_how_to_complete(capsys: pytest.CaptureFixture[str]) -> None:
    """The shell completion is mentioned."""
    assert 0 == run(["--help"])
    assert "_CARNET_COMPLETE=bash_source carnet" in capsys.readouterr().out


def test_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` names the program and its version."""
    assert 0 == run(["--version"])
    assert capsys.readouterr().out.startswith("carnet, version ")


def test_help_loads_neither_grpc_nor_cryptography() -> None:
    """Help is there at once: what takes long to load is loaded by the command that needs it."""
    text = (
        "import sys; from carnet.cli import run; run(['token', '--help'])\n"
        "print(sorted({'grpc', 'cryptography', 'jwt', 'google.protobuf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert "[]" == done.stdout.splitlines()[-1]
