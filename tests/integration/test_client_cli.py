"""The commands of the SDK as processes, against a broker over real mutual TLS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from carnet.spiffe import SpiffeID, server_dns_name
from carnet.testing.ca import CertificateAuthority
from support.broker_stub import BrokerStub

BROKER = "spiffe://prod.example/ns/carnet/sa/broker"
ORDERS = "spiffe://prod.example/ns/shop/sa/orders"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(name="ca", scope="module")
def _ca() -> CertificateAuthority:
    return CertificateAuthority.create()


@pytest.fixture(name="broker")
def _broker(ca: CertificateAuthority) -> Iterator[BrokerStub]:
    with BrokerStub.start(ca) as broker:
        yield broker


@pytest.fixture(name="workload")
def _workload(broker: BrokerStub, ca: CertificateAuthority, tmp_path: Path) -> dict[str, str]:
    """What the environment of orders holds."""
    cert_file, key_file = ca.issue(ORDERS).write(tmp_path, "orders")
    (tmp_path / "ca.pem").write_bytes(ca.root_pem)
    return {
        "CARNET_BROKER": broker.target,
        "CARNET_TRUST": broker.target,
        "CARNET_ISSUER": broker.issuer,
        "CARNET_CERT_FILE": str(cert_file),
        "CARNET_KEY_FILE": str(key_file),
        "CARNET_CA_FILE": str(tmp_path / "ca.pem"),
    }


@pytest.fixture(name="run")
def _run(workload: dict[str, str]) -> Run:
    """Run ``carnet`` with the environment of orders, changed as said."""

    def run(*arguments: str, given: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2] / "client")}
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "carnet", *arguments],
            env=environ | workload | variables,
            input=given,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@contextmanager
def server_without_services(ca: CertificateAuthority) -> Iterator[str]:
    """Run a gRPC server that has the broker's certificate and answers nothing; yield where it is."""
    issued = ca.issue(BROKER, dns_names=[server_dns_name(SpiffeID.parse(BROKER))])
    credentials = grpc.ssl_server_credentials(
        [(issued.private_key_pem, issued.certificate_pem)], ca.root_pem, require_client_auth=True
    )
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_token_is_printed_alone(run: Run, broker: BrokerStub) -> None:
    """`$(carnet token payments)` is the token and nothing else."""
    done = run("token", "payments")
    assert (0, "", 2) == (done.returncode, done.stderr, done.stdout.count("."))
    assert 1 == len(done.stdout.splitlines())
    assert ["payments"] == [call.audience for call in broker.issue_calls]


def test_scopes_and_life_are_asked_for(run: Run, broker: BrokerStub) -> None:
    """Options become the request; the object names what was granted."""
    done = run("token", "payments", "--scope", "refund", "--scope", "charge", "--ttl", "60s", "--json")
    shown = json.loads(done.stdout)
    assert (["charge", "refund"], "payments") == (shown["scopes"], shown["audience"])
    left = datetime.fromisoformat(shown["expires_at"]) - datetime.now(UTC)
    assert timedelta(seconds=40) < left <= timedelta(seconds=60)
    (call,) = broker.issue_calls
    assert (("charge", "refund"), timedelta(seconds=60)) == (call.scopes, call.ttl)


def test_refusal_ends_with_code_1_and_its_reason(run: Run, broker: BrokerStub) -> None:
    """A pipeline can tell a refusal from an outage."""
    broker.token_faults.deny("NOT_GRANTED")
    done = run("token", "payments")
    assert (1, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith("error: no token for audience payments as spiffe://prod.example/ns/shop/sa/orders: ")
    assert done.stderr.endswith("(NOT_GRANTED)\n")


def test_outage_ends_with_code_3_in_the_time_that_was_given(run: Run, broker: BrokerStub) -> None:
    """An outage is worth a retry, and does not hold up a pipeline longer than it says."""
    broker.down()
    started = time.monotonic()
    done = run("token", "payments", "--timeout", "500ms")
    assert (3, "", 1) == (done.returncode, done.stdout, done.stderr.count("\n"))
    assert broker.target in done.stderr
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("variable", ["CARNET_CERT_FILE", "CARNET_KEY_FILE", "CARNET_CA_FILE"])
def test_missing_file_ends_with_code_2_and_its_name(run: Run, variable: str) -> None:
    """One line that names the file, the variable and the remedy; no traceback."""
    done = run("token", "payments", **{variable: "/nowhere/file.pem"})
    assert (2, "", 1) == (done.returncode, done.stdout, done.stderr.count("\n"))
    assert f"/nowhere/file.pem ({variable}) does not exist" in done.stderr


def test_token_is_good_with_its_certificate(run: Run, workload: dict[str, str]) -> None:
    """`verify` does what the service would: the token and the certificate that it came with belong together."""
    token = run("token", "payments").stdout
    done = run("verify", "--audience", "payments", "--peer-certificate", workload["CARNET_CERT_FILE"], "-", given=token)
    assert (0, "") == (done.returncode, done.stderr)
    assert f"{ORDERS} may charge at payments" in done.stdout


def test_token_is_good_without_binding_where_that_is_asked_for(run: Run) -> None:
    """A service without mutual TLS checks all but the certificate."""
    token = run("token", "payments").stdout
    done = run("verify", "--no-binding", "--json", "-", given=token, CARNET_AUDIENCE="payments")
    shown = json.loads(done.stdout)
    assert (0, True, "payments") == (done.returncode, shown["valid"], shown["claims"]["aud"])


@pytest.mark.parametrize(
    ("audience", "certificate", "reason"),
    [("ledger", None, "WRONG_AUDIENCE"), ("payments", "aa" * 32, "WRONG_CONFIRMATION")],
)
def test_token_is_not_good_elsewhere_or_with_another_certificate(
    run: Run, audience: str, certificate: str | None, reason: str
) -> None:
    """Exit code 1, and the reason for who debugs it."""
    token = run("token", "payments").stdout
    binding = ["--no-binding"] if certificate is None else ["--peer-certificate", certificate]
    done = run("verify", "--audience", audience, *binding, "-", given=token)
    assert (1, "") == (done.returncode, done.stdout)
    assert f"({reason})" in done.stderr


def test_unbound_token_is_good_only_without_binding(run: Run, broker: BrokerStub) -> None:
    """A token that anybody could use is not good where a certificate was shown with it."""
    broker.bind = False
    token = run("token", "payments").stdout
    done = run("verify", "--audience", "payments", "--peer-certificate", "aa" * 32, "-", given=token)
    assert 1 == done.returncode
    assert "(MISSING_CLAIM)" in done.stderr
    assert 0 == run("verify", "--audience", "payments", "--no-binding", "-", given=token).returncode


def test_token_of_a_key_that_is_not_published_is_not_good(run: Run, broker: BrokerStub) -> None:
    """Whoever signed it, it was not this issuer."""
    token = run("token", "payments").stdout
    broker.rotate(keep_old=False)
    done = run("verify", "--audience", "payments", "--no-binding", "-", given=token)
    assert 1 == done.returncode
    assert "(UNKNOWN_KEY)" in done.stderr


def test_keys_that_cannot_be_had_are_not_a_no(run: Run, broker: BrokerStub) -> None:
    """Exit code 3 means that it cannot be told: the token may be good."""
    token = run("token", "payments").stdout
    broker.down()
    done = run("verify", "--audience", "payments", "--no-binding", "--timeout", "1s", "-", given=token)
    assert (3, "", 1) == (done.returncode, done.stdout, done.stderr.count("\n"))
    assert "CARNET_TRUST" in done.stderr


@pytest.mark.parametrize("command", ["token", "verify"])
def test_failed_handshake_is_one_line(run: Run, command: str, tmp_path: Path) -> None:
    """A broker of other authorities: what gRPC would write about it beside our line is kept back."""
    token = run("token", "payments").stdout
    (tmp_path / "other.pem").write_bytes(CertificateAuthority.create().root_pem)
    asked = ["payments"] if command == "token" else ["--audience", "payments", "--no-binding", "-"]
    done = run(command, *asked, "--timeout", "3s", given=token, CARNET_CA_FILE=str(tmp_path / "other.pem"))
    assert (3, "", 1) == (done.returncode, done.stdout, done.stderr.count("\n"))
    assert "CARNET_CA_FILE" in done.stderr


def test_verify_says_that_the_issuer_is_another_one(run: Run) -> None:
    """The keys came, and are those of somebody else: the line names both issuers and the variable."""
    token = run("token", "payments").stdout
    asked = ("verify", "--audience", "payments", "--no-binding", "--timeout", "2s", "-")
    done = run(*asked, given=token, CARNET_ISSUER="https://other.example")
    assert (3, "", 1) == (done.returncode, done.stdout, done.stderr.count("\n"))
    assert "this verifier trusts 'https://other.example': check CARNET_ISSUER" in done.stderr


def test_verify_says_that_the_server_is_no_trust_listener(run: Run, ca: CertificateAuthority) -> None:
    """A server that does not know the question, as the port for tokens does not."""
    token = run("token", "payments").stdout
    asked = ("verify", "--audience", "payments", "--no-binding", "--timeout", "2s", "-")
    with server_without_services(ca) as target:
        done = run(*asked, given=token, CARNET_TRUST=target)
    assert (3, "", 1) == (done.returncode, done.stdout, done.stderr.count("\n"))
    assert f"{target}: UNIMPLEMENTED" in done.stderr
    assert "this is no trust listener" in done.stderr
