from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hvac
import pytest
import requests
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store
from hvac.exceptions import InvalidRequest

from bootstrap_vault import (
    BootstrapError,
    Bootstrapped,
    Mounts,
    Outcome,
    Workload,
    bootstrap,
    issue_certificate,
    main,
    revoke_certificate,
    root_pem,
)
from carnet.errors import ConfigError, InvalidIdentityError
from carnet_broker.demo.openbao import OpenBao
from support.vault import fresh_name
from support.vault_storage import OpenStorage, all_storage, bootstrapped_state

ORDERS = Workload.parse("spiffe://prod.example/ns/shop/sa/orders")
PAYMENTS = Workload.parse("spiffe://prod.example/ns/shop/sa/payments,serves")
WORKLOADS = (ORDERS, PAYMENTS)


@pytest.fixture(name="vault", scope="module")
def _vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenStorage]:
    """A server of this file's own, which shows its storage."""
    with OpenStorage.start(tmp_path_factory.mktemp("openbao")) as server:
        assert isinstance(server, OpenStorage)
        yield server


@dataclass
class Place:
    """Mounts and an environment that nobody else uses, and a directory for the login files."""

    server: OpenStorage
    directory: Path
    environment: str = field(default_factory=lambda: fresh_name("env"))
    mounts: Mounts = field(
        default_factory=lambda: Mounts(
            kv=fresh_name("kv"),
            transit=fresh_name("transit"),
            pki=fresh_name("pki"),
            pki_int=fresh_name("pki-int"),
            approle=fresh_name("approle"),
        )
    )

    def bootstrap(self, client: hvac.Client | None = None, **changed: Any) -> Bootstrapped:  # noqa: ANN401 - whatever `bootstrap` takes
        """Run the bootstrap with the usual workloads."""
        arguments = {
            "environment": self.environment,
            "trust_domain": "prod.example",
            "workloads": WORKLOADS,
            "now": datetime.now(UTC),
            "credentials_dir": self.directory,
            "mounts": self.mounts,
        }
        return bootstrap(client or self.server.client(), **(arguments | changed))

    def state(self) -> dict[str, Any]:
        """What is in Vault here."""
        return bootstrapped_state(self.server, self.mounts, self.environment)

    def files(self) -> dict[str, str]:
        """The login files."""
        return {file.name: file.read_text() for file in self.directory.iterdir()}


@pytest.fixture(name="place")
def _place(vault: OpenStorage, tmp_path: Path) -> Place:
    return Place(vault, tmp_path / "credentials")


class CutOffError(Exception):
    """The program dies here."""


class CountingSession(requests.Session):
    """Counts what is written to Vault, and dies right after the write number `last`."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.trust_env = False
        self.writes: list[str] = []
        self.last = last

    def request(self, method: str, url: str, *arguments: object, **named: object) -> requests.Response:
        """Send, count, and perhaps die."""
        if self.last == 0:
            raise CutOffError
        answer = super().request(method, url, *arguments, **named)
        # Looking a secret id up is a POST that changes nothing.
        if method.upper() not in {"GET", "LIST"} and not url.endswith("/secret-id/lookup"):
            self.writes.append(f"{method.upper()} {url}")
            if len(self.writes) == self.last:
                raise CutOffError
        return answer


def counting(server: OpenStorage, last: int | None = None) -> tuple[hvac.Client, CountingSession]:
    """A client for the root token whose writes are counted."""
    session = CountingSession(last)
    return hvac.Client(url=server.address, token=server.root_token, session=session, timeout=10), session


def test_first_run_makes_everything(place: Place) -> None:
    """Nothing is unchanged, but for what Vault has by default and the bootstrap leaves so."""
    done = place.bootstrap()
    assert {Outcome.CREATED, Outcome.CHANGED} == {item.outcome for item in done.items}
    assert {"broker", "ci", "breakglass"} == set(done.credentials)


def test_second_run_writes_nothing_in_vault_and_nothing_on_disk(place: Place) -> None:
    """All items are unchanged, no write is sent, and the whole storage of the server is the same, byte for byte."""
    place.bootstrap()
    before, files = all_storage(place.server), place.files()
    client, session = counting(place.server)
    done = place.bootstrap(client)
    assert {Outcome.UNCHANGED} == {item.outcome for item in done.items}
    assert [] == session.writes
    assert before == all_storage(place.server)
    assert files == place.files()


def test_run_after_any_interruption_completes_the_work(vault: OpenStorage, tmp_path: Path) -> None:
    """Cut off after each single write in turn, the next run ends in the state of an undisturbed one.

    That includes how many keys, issuers, certificates and secret ids there are: nothing is left over.
    """
    whole = Place(vault, tmp_path / "whole")
    client, session = counting(vault)
    whole.bootstrap(client)
    expected, steps = whole.state(), len(session.writes)
    assert 20 < steps < 60
    for step in range(steps + 1):
        place = Place(vault, tmp_path / f"cut-{step}")
        client, _ = counting(vault, step)
        if step < steps:
            with pytest.raises(CutOffError):
                place.bootstrap(client)
        place.bootstrap()
        assert expected == place.state(), f"cut off after write {step}: {session.writes[step - 1]}"
        assert [] == [name for name in place.files() if name.endswith(".pending")]
        assert {Outcome.UNCHANGED} == {item.outcome for item in place.bootstrap().items}


def test_settings_changed_by_hand_are_put_back(place: Place) -> None:
    """Only what differs is written, and is reported as changed."""
    place.bootstrap()
    expected = place.state()
    client, mounts, env = place.server.client(), place.mounts, place.environment
    role = client.read(f"{mounts.pki_int}/roles/{ORDERS.role}")["data"]
    client.write_data(f"{mounts.pki_int}/roles/{ORDERS.role}", data=role | {"allow_any_name": True})
    client.write_data(f"sys/policies/acl/carnet-ci-{env}", data={"policy": 'path "*" { capabilities = ["read"] }'})
    client.write_data(f"{mounts.kv}/metadata/{env}/keyring", data={"cas_required": False})
    client.write_data(f"{mounts.transit}/keys/carnet-{env}/config", data={"deletion_allowed": True})
    client.write_data(f"sys/mounts/{mounts.pki_int}/tune", data={"max_lease_ttl": "1h"})
    changed = {item.name for item in place.bootstrap().items if item.outcome is not Outcome.UNCHANGED}
    assert {
        f"pki role {ORDERS.role}",
        f"policy carnet-ci-{env}",
        f"keyring metadata of {env}",
        f"transit key carnet-{env}",
        f"mount {mounts.pki_int}",
    } == changed
    assert expected == place.state()


def test_workload_can_be_added_later(place: Place) -> None:
    """A run with one workload more makes one role more, and leaves those alone that it does not name."""
    place.bootstrap(workloads=(ORDERS,))
    changed = [item for item in place.bootstrap(workloads=(PAYMENTS,)).items if item.outcome is not Outcome.UNCHANGED]
    assert [(f"pki role {PAYMENTS.role}", Outcome.CREATED)] == [(item.name, item.outcome) for item in changed]
    assert issue_certificate(place.server.client(), ORDERS, mounts=place.mounts)


def test_two_environments_share_a_vault(place: Place) -> None:
    """A second environment adds its own key, policies and roles, and changes nothing of the first."""
    place.bootstrap()
    before = place.state()
    other = Place(place.server, place.directory, mounts=place.mounts)
    created = {item.name for item in other.bootstrap().items if item.outcome is Outcome.CREATED}
    assert {f"transit key carnet-{other.environment}", f"approle carnet-ci-{other.environment}"} < created
    assert before == place.state()


# Login files.


def log_in(place: Place, role: str) -> hvac.Client:
    """Log in with the files of a role."""
    files = place.bootstrap().credentials[role]
    client = place.server.client(token="")
    client.auth.approle.login(
        files.role_id_file.read_text().strip(),
        files.secret_id_file.read_text().strip(),
        mount_point=place.mounts.approle,
    )
    return client


@pytest.mark.parametrize(("role", "ttl"), [("broker", 900), ("ci", 1200), ("breakglass", 600)])
def test_login_gives_a_short_renewable_token_of_one_policy(place: Place, role: str, ttl: int) -> None:
    """The token has the policy of its name and not Vault's default one."""
    token = log_in(place, role).auth.token.lookup_self()["data"]
    assert [f"carnet-{role}-{place.environment}"] == token["policies"]
    assert (True, "service") == (token["renewable"], token["type"])
    assert ttl - 10 <= token["ttl"] <= ttl


def test_login_files_are_for_their_owner_only(place: Place) -> None:
    """Mode 0600 in a directory of mode 0700."""
    place.bootstrap()
    assert {0o600} == {stat.S_IMODE(file.stat().st_mode) for file in place.directory.iterdir()}
    assert 0o700 == stat.S_IMODE(place.directory.stat().st_mode)


def test_secret_id_that_vault_does_not_know_is_replaced(place: Place) -> None:
    """A file that was damaged, or belongs to another Vault, is put right; the others stay."""
    done = place.bootstrap()
    before = place.files()
    file = done.credentials["ci"].secret_id_file
    file.write_text("of another time\n")
    changed = [item for item in place.bootstrap().items if item.outcome is not Outcome.UNCHANGED]
    assert [(str(file), Outcome.CHANGED)] == [(item.name, item.outcome) for item in changed]
    assert {file.name} == {name for name, text in place.files().items() if before[name] != text}
    log_in(place, "ci")


@pytest.mark.parametrize(("days", "renewed"), [(19, False), (21, True)])
def test_secret_id_is_renewed_in_the_last_third_of_its_life(place: Place, days: int, renewed: bool) -> None:
    """CI's lasts 30 days: after 19 it stays, after 21 there is a new one."""
    place.bootstrap()
    before = place.files()
    place.bootstrap(now=datetime.now(UTC) + timedelta(days=days))
    name = f"carnet-ci-{place.environment}-secret-id"
    assert renewed is (before[name] != place.files()[name])
    log_in(place, "ci")


def test_without_a_directory_no_secret_id_is_made(place: Place) -> None:
    """Login files are made only where they were asked for."""
    done = place.bootstrap(credentials_dir=None)
    assert ({}, False) == (done.credentials, place.directory.exists())
    assert 0 == place.state()["broker secret ids"]


# Certificates.


@pytest.fixture(name="pki", scope="module")
def _pki(vault: OpenStorage, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(vault, tmp_path_factory.mktemp("credentials"))
    place.bootstrap()
    return place


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.role)
def test_issued_certificate_is_an_x509_svid_of_its_workload(pki: Place, workload: Workload) -> None:
    """It chains to the root, has one URI name, and a DNS name only if the workload serves (X509-SVID section 4)."""
    issued = issue_certificate(pki.server.client(), workload, mounts=pki.mounts)
    leaf, *others = x509.load_pem_x509_certificates(issued.certificate_pem)
    root = x509.load_pem_x509_certificate(root_pem(pki.server.client(), mounts=pki.mounts))
    PolicyBuilder().store(Store([root])).build_client_verifier().verify(leaf, others)
    extensions = leaf.extensions
    dns_names = ("payments.shop.svc.prod.example",) if workload.serves else ()
    assert (str(workload.spiffe_id), dns_names) == (issued.spiffe_id, issued.dns_names)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (True, True, False) == (usage.critical, usage.value.digital_signature, usage.value.key_cert_sign)
    assert (True, False) == (basic.critical, basic.value.ca)
    assert 2 == len(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert [] == list(leaf.subject)
    assert 1 == len(others), "the intermediate is sent, the root is not"
    key = serialization.load_pem_private_key(issued.private_key_pem, None)
    assert leaf.public_key() == key.public_key()
    assert isinstance(key, ec.EllipticCurvePrivateKey)


def test_issued_certificate_lives_as_long_as_asked_and_never_longer_than_the_role_allows(pki: Place) -> None:
    """A short life is granted, a long one is cut to 24 hours."""
    for asked, granted in ((timedelta(minutes=5), timedelta(minutes=5)), (timedelta(days=9), timedelta(hours=24))):
        leaf = issue_certificate(pki.server.client(), ORDERS, ttl=asked, mounts=pki.mounts).leaf
        assert granted + timedelta(seconds=30) == leaf.not_valid_after_utc - leaf.not_valid_before_utc


NAMES_OF_OTHERS = [
    {"uri_sans": "spiffe://prod.example/ns/shop/sa/bank"},
    {"uri_sans": "spiffe://prod.example/ns/shop/sa/payment"},
    {"uri_sans": "spiffe://prod.example/ns/shop/sa/{name}/x"},
    {"uri_sans": "spiffe://prod.example/ns/shop/sa/*"},
    {"uri_sans": "{id},spiffe://prod.example/ns/shop/sa/bank"},
    {"uri_sans": "{id}", "alt_names": "bank.shop.svc.prod.example"},
    {"uri_sans": "{id}", "alt_names": "x.payments.shop.svc.prod.example"},
    {"uri_sans": "{id}", "alt_names": "*.shop.svc.prod.example"},
    {"uri_sans": "{id}", "alt_names": "*.payments.shop.svc.prod.example"},
    {"uri_sans": "{id}", "alt_names": "localhost"},
    {"uri_sans": "{id}", "common_name": "bank.shop.svc.prod.example"},
    {"uri_sans": "{id}", "ip_sans": "127.0.0.1"},
    {"uri_sans": "{id}", "other_sans": "1.3.6.1.4.1.311.20.2.3;utf8:orders"},
    {"uri_sans": "{id}", "user_ids": "orders"},
    {"uri_sans": "{id}", "not_after": "2099-01-01T00:00:00Z"},
    {"uri_sans": "{id}", "not_before": "2020-01-01T00:00:00Z"},
]


@pytest.mark.parametrize("wanted", NAMES_OF_OTHERS, ids=json.dumps)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.role)
def test_t25_role_refuses_names_of_others(pki: Place, workload: Workload, wanted: dict[str, str]) -> None:
    """No workload can get a certificate with an id, DNS name, address or end that is not its own."""
    marks = {"id": str(workload.spiffe_id), "name": workload.spiffe_id.segments[-1]}
    data = {key: value.format(**marks) for key, value in wanted.items()}
    with pytest.raises(InvalidRequest):
        pki.server.client().write_data(f"{pki.mounts.pki_int}/issue/{workload.role}", data=data)


def test_t25_role_of_one_that_does_not_serve_allows_no_dns_name(pki: Place) -> None:
    """Not even the name that would be derived from its own id."""
    data = {"uri_sans": str(ORDERS.spiffe_id), "alt_names": "orders.shop.svc.prod.example"}
    with pytest.raises(InvalidRequest, match="not allowed by this role"):
        pki.server.client().write_data(f"{pki.mounts.pki_int}/issue/{ORDERS.role}", data=data)


def test_t25_names_in_a_signing_request_are_not_taken_over(pki: Place) -> None:
    """A workload that keeps its key may have a request signed; what counts is what the role allows, not the request."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.UniformResourceIdentifier("spiffe://prod.example/ns/shop/sa/bank"), x509.DNSName("bank.example")]
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bank.example")]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    data = {"csr": request.public_bytes(serialization.Encoding.PEM).decode(), "uri_sans": str(ORDERS.spiffe_id)}
    made = pki.server.client().write_data(f"{pki.mounts.pki_int}/sign/{ORDERS.role}", data=data)["data"]
    leaf = x509.load_pem_x509_certificate(made["certificate"].encode())
    found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [x509.UniformResourceIdentifier(str(ORDERS.spiffe_id))] == list(found)
    assert [] == list(leaf.subject)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_t16_revoked_certificate_is_on_the_list_at_once(pki: Place) -> None:
    """The list is rebuilt with the revocation, and not at the next turn hours later; it lasts over the grace period."""
    client = pki.server.client()
    revoked, kept = (issue_certificate(client, ORDERS, mounts=pki.mounts).leaf for _ in range(2))
    revoke_certificate(client, revoked, mounts=pki.mounts)
    crl = x509.load_pem_x509_crl(
        requests.get(f"{pki.server.address}/v1/{pki.mounts.pki_int}/crl/pem", timeout=10).content
    )
    assert crl.get_revoked_certificate_by_serial_number(revoked.serial_number) is not None
    assert crl.get_revoked_certificate_by_serial_number(kept.serial_number) is None
    assert timedelta(hours=72) == crl.next_update_utc - crl.last_update_utc


# What is in the way.


def test_authority_of_another_trust_domain_is_not_taken_over(pki: Place) -> None:
    """The mounts belong to one trust domain; the message says what to do."""
    other = Workload.parse("spiffe://staging.example/ns/shop/sa/orders")
    with pytest.raises(BootstrapError, match="give each trust domain mounts of its own"):
        pki.bootstrap(trust_domain="staging.example", workloads=(other,))


def test_intermediate_of_another_root_is_refused(pki: Place, tmp_path: Path) -> None:
    """An intermediate that this root did not sign would be trusted by nobody."""
    mixed = Mounts(kv=pki.mounts.kv, transit=pki.mounts.transit, pki=fresh_name("pki"), pki_int=pki.mounts.pki_int)
    with pytest.raises(BootstrapError, match="did not sign"):
        pki.bootstrap(mounts=mixed)


def test_role_of_another_workload_is_not_taken_over(pki: Place) -> None:
    """Two paths may give the same role name; the first keeps it."""
    pki.bootstrap(workloads=(Workload.parse("spiffe://prod.example/a-b/c"),))
    with pytest.raises(BootstrapError, match="the PKI role a-b-c belongs to spiffe:"):
        pki.bootstrap(workloads=(Workload.parse("spiffe://prod.example/a/b-c"),))


@pytest.mark.parametrize("key", [{"type": "ecdsa-p256", "exportable": True}, {"type": "ed25519"}], ids=json.dumps)
def test_transit_key_that_may_have_left_vault_is_refused(place: Place, key: dict[str, Any]) -> None:
    """`exportable` cannot be taken back, and a key of another type signs other tokens."""
    client = place.server.client()
    client.write_data(f"sys/mounts/{place.mounts.transit}", data={"type": "transit"})
    client.write_data(f"{place.mounts.transit}/keys/carnet-{place.environment}", data=key)
    with pytest.raises(BootstrapError, match="is of another type, or can be exported"):
        place.bootstrap()


def test_mount_of_another_engine_is_refused(place: Place) -> None:
    """What lies at the path is not touched."""
    place.server.client().write_data(f"sys/mounts/{place.mounts.kv}", data={"type": "kv", "options": {"version": "1"}})
    with pytest.raises(BootstrapError, match="choose another mount"):
        place.bootstrap()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"environment": "Prod"}, BootstrapError, "environment 'Prod' is not a name"),
        ({"environment": "a/b"}, BootstrapError, "environment 'a/b' is not a name"),
        ({"environment": ""}, BootstrapError, "environment '' is not a name"),
        ({"trust_domain": "Prod"}, InvalidIdentityError, "has no valid trust domain"),
        ({"trust_domain": "prod.example/x"}, InvalidIdentityError, "is not the name of a trust domain"),
        ({"workloads": (Workload.parse("spiffe://x/y"),)}, BootstrapError, "is not of the trust domain prod.example"),
        ({"workloads": (ORDERS, ORDERS)}, BootstrapError, "share the role name ns-shop-sa-orders"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    place: Place, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The message names it; Vault is not even asked."""
    client, session = counting(place.server, 0)
    with pytest.raises(error, match=message):
        place.bootstrap(client, **changed)
    assert [] == session.writes


@pytest.mark.parametrize(
    "text", ["spiffe://prod.example/orders,serves", "spiffe://prod.example/a,b", "prod.example/a", ""]
)
def test_workload_that_cannot_be_is_refused(text: str) -> None:
    """One that serves needs a DNS name; after the comma only 'serves' may stand."""
    with pytest.raises(InvalidIdentityError):
        Workload.parse(text)


def test_root_is_refused_where_there_is_none(place: Place) -> None:
    """Before the first run there is nothing to trust."""
    place.server.client().write_data(f"sys/mounts/{place.mounts.pki}", data={"type": "pki"})
    with pytest.raises(ConfigError, match="run the setup first"):
        root_pem(place.server.client(), mounts=place.mounts)


# The command.


def run(place: Place, *arguments: str, **environment: str) -> Result:
    """Run the command for `place`, with mounts of its own where it has such options."""
    mounts = ["--pki-mount", place.mounts.pki, "--pki-int-mount", place.mounts.pki_int]
    if arguments[0] == "setup":
        mounts += ["--kv-mount", place.mounts.kv, "--transit-mount", place.mounts.transit]
    variables = {"VAULT_ADDR": place.server.address, "VAULT_TOKEN": place.server.root_token, "VAULT_CACERT": ""}
    return CliRunner().invoke(main, [*arguments, *mounts], env=variables | environment)


def setup(place: Place, *arguments: str) -> list[str]:
    """The arguments of a setup."""
    return ["setup", "--env", place.environment, "--trust-domain", "prod.example", *arguments]


def test_setup_command_says_what_it_did(place: Place) -> None:
    """One line for each item, or one JSON document; the second run says unchanged."""
    given = ["--workload", str(ORDERS.spiffe_id), "--credentials-dir", str(place.directory)]
    first = run(place, *setup(place, *given))
    second = run(place, *setup(place, *given, "--json"))
    assert (0, 0) == (first.exit_code, second.exit_code), first.stderr + second.stderr
    assert f"created   pki role {ORDERS.role}\n" in first.output
    items = json.loads(second.output)["items"]
    assert len(first.output.splitlines()) == len(items)
    assert {"unchanged"} == {item["outcome"] for item in items}
    assert place.server.root_token not in first.output + second.output
    assert not [text for text in place.files().values() if text.strip() in first.output]


def test_setup_command_reads_workloads_from_a_file(place: Place, tmp_path: Path) -> None:
    """The file lists the same texts as the option."""
    (tmp_path / "workloads.yaml").write_text(f"workloads:\n- {ORDERS.spiffe_id}\n- {PAYMENTS.spiffe_id},serves\n")
    done = run(place, *setup(place, "--workloads-file", str(tmp_path / "workloads.yaml")))
    assert 0 == done.exit_code, done.stderr
    assert f"created   pki role {ORDERS.role}\ncreated   pki role {PAYMENTS.role}\n" in done.output


def test_certificate_commands_issue_and_revoke(pki: Place, tmp_path: Path) -> None:
    """What is issued can be used and revoked again; the key is for its owner only."""
    done = run(pki, "issue-certificate", f"{PAYMENTS.spiffe_id},serves", "--out", str(tmp_path), "--name", "payments")
    assert f"{tmp_path}/payments.pem\n{tmp_path}/payments-key.pem\n{tmp_path}/ca.pem\n" == done.output
    assert 0o600 == stat.S_IMODE((tmp_path / "payments-key.pem").stat().st_mode)
    assert root_pem(pki.server.client(), mounts=pki.mounts) == (tmp_path / "ca.pem").read_bytes()
    serial = x509.load_pem_x509_certificate((tmp_path / "payments.pem").read_bytes()).serial_number
    assert f"revoked {serial:x}\n" == run(pki, "revoke-certificate", str(tmp_path / "payments.pem")).output


ISSUE = ["issue-certificate", "spiffe://prod.example/ns/shop/sa/bank", "--out", "OUT"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (ISSUE, {"VAULT_ADDR": ""}, "VAULT_ADDR is not set: set it to the URL of Vault"),
        (ISSUE, {"VAULT_TOKEN": ""}, "VAULT_TOKEN is not set: set it to a token that may set Vault up"),
        (ISSUE, {"VAULT_CACERT": "/none.pem"}, "VAULT_CACERT names /none.pem, which is not a file"),
        (ISSUE, {"VAULT_ADDR": "http://127.0.0.1:1"}, "Vault at VAULT_ADDR=http://127.0.0.1:1 cannot be reached"),
        (ISSUE, {"VAULT_ADDR": "127.0.0.1"}, "Vault at VAULT_ADDR=127.0.0.1 cannot be reached"),
        (ISSUE, {"VAULT_TOKEN": "wrong"}, "check VAULT_TOKEN and its policies"),
        (ISSUE, {}, "check that 'setup' was run for this workload"),
        (["issue-certificate", "orders", "--out", "OUT"], {}, "SPIFFE ID 'orders' does not start with spiffe://"),
        (["revoke-certificate", "OUT"], {}, "No such file or directory"),
        (["setup", "--env", "E", "--trust-domain", "prod.example"], {}, "environment 'E' is not a name"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(
    pki: Place, tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    """Exit code 2, one line that names what is wrong and what to do, and no traceback."""
    done = run(pki, *(argument.replace("OUT", str(tmp_path / "out")) for argument in arguments), **environment)
    assert (2, 1) == (done.exit_code, done.stderr.count("\n")), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "[", "workload: []", "workloads: spiffe://a/b", "workloads: [1]", "workloads: []\nextra: 1", "\xff"]
)
def test_workloads_file_that_is_wrong_is_named(pki: Place, tmp_path: Path, text: str) -> None:
    """The line begins with the file."""
    (tmp_path / "workloads.yaml").write_bytes(text.encode("latin-1"))
    done = run(pki, *setup(pki, "--workloads-file", str(tmp_path / "workloads.yaml")))
    assert (2, 1) == (done.exit_code, done.stderr.count("\n")), done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}/workloads.yaml: ")


def test_command_is_told_when_it_does_not_speak_to_vault(pki: Place, tmp_path: Path) -> None:
    """A path in VAULT_ADDR leads to pages that are not Vault's API."""
    done = run(pki, *setup(pki), VAULT_ADDR=f"{pki.server.address}/ui")
    assert (2, 1) == (done.exit_code, done.stderr.count("\n")), done.stderr
    assert os.linesep == done.stderr[-1]


def test_https_with_the_authority_of_vault_works_and_without_is_refused(own_openbao: OpenBao) -> None:
    """VAULT_CACERT is what Vault's certificate is checked against, whatever else the environment says."""
    variables = {
        "VAULT_ADDR": own_openbao.address,
        "VAULT_TOKEN": own_openbao.root_token,
        "VAULT_CACERT": str(own_openbao.ca_file),
        "REQUESTS_CA_BUNDLE": "/none.pem",
    }
    arguments = ["setup", "--env", "prod", "--trust-domain", "prod.example"]
    done = CliRunner().invoke(main, arguments, env=variables)
    assert 0 == done.exit_code, done.stderr
    refused = CliRunner().invoke(main, arguments, env=variables | {"VAULT_CACERT": ""})
    assert (2, 1) == (refused.exit_code, refused.stderr.count("\n"))
    assert "cannot be reached" in refused.stderr
    own_openbao.seal()
    sealed = CliRunner().invoke(main, arguments, env=variables)
    assert (2, 1) == (sealed.exit_code, sealed.stderr.count("\n"))
    assert "unseal Vault, or wait until it is ready" in sealed.stderr
