"""Bad input, at every command: one line that names the file or the variable, what is wrong and what to do.

The line is the only thing that is printed, it starts with ``error:``, the exit code is 2, and there is no traceback.
The commands are processes: forked from one that has imported all of it where there are many rows, and started from
nothing where there are few. That all else is right in each row is shown by the first test.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import DNSName, UniformResourceIdentifier

from carnet.encoding import base64url
from carnet.testing import CertificateAuthority
from certificate_recipe import leaf, tlv
from support.commands import Ended, one_line, run_command
from support.forking import Forking, forking
from support.running_broker import BROKER, BROKER_NAME, ORDERS, POLICY, write_broker_files
from support.vault import VaultPlace, prepare

RUBBISH: Final = bytes(range(256))
WITHOUT_RIGHTS: Final = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: root may read what its mode forbids
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass
class Site:
    """All files of one broker, in one directory."""

    directory: Path
    ca: CertificateAuthority
    config: dict[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """Return the path of a file."""
        return self.directory / name

    def write(self, name: str, content: str | bytes) -> None:
        """Replace a file."""
        self.file(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def certificate(self, **changes: Any) -> None:  # noqa: ANN401 - what the authority takes
        """Give the broker another certificate by its own authority."""
        wanted = {"spiffe_id": BROKER, "dns_names": [BROKER_NAME]} | changes
        self.ca.issue(**wanted).write(self.directory, "broker")

    def set(self, path: str, value: object) -> None:
        """Change one entry of the configuration; None takes it out."""
        *sections, name = path.split(".")
        section = self.config
        for part in sections:
            section = section.setdefault(part, {})
        section.pop(name, None)
        if value is not None:
            section[name] = value

    def save(self) -> None:
        """Write the configuration."""
        self.write("broker.yaml", yaml.safe_dump(self.config))


@pytest.fixture(scope="module", name="template")
def _template(vault: VaultPlace, tmp_path_factory: pytest.TempPathFactory) -> Site:
    directory = tmp_path_factory.mktemp("template")
    _, ca = write_broker_files(vault, directory)
    credentials = vault.bootstrapped.credentials["broker"]
    shutil.copy(credentials.role_id_file, directory / "role-id")
    shutil.copy(credentials.secret_id_file, directory / "secret-id")
    return Site(directory, ca)


@pytest.fixture(scope="module", name="forked")
def _forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    with forking(tmp_path_factory.mktemp("forked")) as forked:
        yield forked


@pytest.fixture(scope="module", name="vault")
def _vault(openbao, tmp_path_factory) -> Iterator[VaultPlace]:
    place = prepare(openbao, tmp_path_factory.mktemp("vault"))
    yield place
    place.close()


@pytest.fixture(name="site")
def _site(template: Site, tmp_path: Path) -> Site:
    """A broker whose files are all good."""
    directory = tmp_path / "site"
    shutil.copytree(template.directory, directory)
    site = Site(directory, template.ca)
    site.config = yaml.safe_load((directory / "broker.yaml").read_text())
    site.config["vault"] |= {"role_id_file": "role-id", "secret_id_file": "secret-id", "start_within": "300ms"}
    site.config["store"]["url"] = f"sqlite:///{directory}/store.db"
    site.save()
    return site


def broker(site: Site, command: str, *, before: tuple[str, ...] = (), config: str = "broker.yaml") -> Ended:
    """Run ``carnet-broker serve`` or ``check-config``."""
    return run_command("carnet_broker", command, "--config", site.file(config), before=before)


def test_good_files_are_good(site):
    """What every row below starts from."""
    ended = broker(site, "check-config")
    assert (0, "") == (ended.code, ended.err)
    assert f"{site.file('broker.yaml')}: ok, issuer https://tokens.prod.example, keys in kv\n" == ended.out


Fault = Callable[[Site], None]


def _missing(name: str) -> Fault:
    return lambda site: site.file(name).unlink()


def _folder(name: str) -> Fault:
    def fault(site: Site) -> None:
        site.file(name).unlink()
        site.file(name).mkdir()

    return fault


def _holds(name: str, content: str | bytes) -> Fault:
    return lambda site: site.write(name, content)


def _mode(name: str, mode: int) -> Fault:
    """Return the fault of a file, or of a directory that is made for it, with this mode."""

    def fault(site: Site) -> None:
        if not site.file(name).exists():
            site.file(name).mkdir()
        site.file(name).chmod(mode)

    return fault


def _config(path: str, value: object) -> Fault:
    def fault(site: Site) -> None:
        site.set(path, value)
        site.save()

    return fault


def _policy(old: str, new: str) -> Fault:
    assert old in POLICY
    return lambda site: site.write("policy.yaml", POLICY.replace(old, new))


def _certificate(**changes: Any) -> Fault:  # noqa: ANN401 - what the authority takes
    return lambda site: site.certificate(**changes)


def _other_key(site: Site) -> None:
    site.write("broker-key.pem", site.ca.issue(BROKER).private_key_pem)


def _locked_key(site: Site) -> None:
    key = serialization.load_pem_private_key(site.file("broker-key.pem").read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"canary")
    site.write(
        "broker-key.pem",
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption),
    )


def _names(*names: UniformResourceIdentifier | DNSName, extended: bytes | None = None) -> Fault:
    """Return the fault of a certificate with these names, and other usages."""

    def fault(site: Site) -> None:
        encoded = [tlv(0x86 if isinstance(n, UniformResourceIdentifier) else 0x82, n.value.encode()) for n in names]
        made = leaf(
            site.ca,
            datetime.now(UTC),
            names=encoded,
            replace={} if extended is None else {"extended": extended},
        )
        site.write("broker.pem", made.chain_pem)
        site.write("broker-key.pem", made.private_key_pem)

    return fault


def _crl(content: bytes) -> Fault:
    def fault(site: Site) -> None:
        site.write("crl.pem", content)
        _config("tls.crl_files", ["crl.pem"])(site)

    return fault


_NOW: Final = datetime.now(UTC).replace(microsecond=0)
_ENDED: Final = _NOW - timedelta(hours=1)
_CLIENT_ONLY: Final = bytes.fromhex("30130603551d25040c300a06082b06010505070302")

FILES: Mapping[str, tuple[Fault, str]] = {
    # -- the configuration itself
    "config missing": (
        _missing("broker.yaml"),
        "{config}: cannot be read (No such file or directory); give the broker",
    ),
    "config is a directory": (_folder("broker.yaml"), "{config}: cannot be read (Is a directory); give the broker"),
    "config empty": (_holds("broker.yaml", ""), "{config}:1: the file is empty; write what it should hold"),
    "config is rubbish": (_holds("broker.yaml", RUBBISH), "{config}:2: this is not UTF-8; save the file as UTF-8"),
    "config is no YAML": (_holds("broker.yaml", "issuer: [\n"), "{config}:1: this is not YAML: "),
    "config is no mapping": (_holds("broker.yaml", "- issuer\n"), "{config}:1: this must be a mapping (key: value)"),
    "unknown key": (
        _config("issuers", "x"),
        "{config}:4: issuers: unknown key; did you mean issuer? the keys here are",
    ),
    "unknown key in a section": (
        _config("vault.adress", "x"),
        "{config}:18: vault.adress: unknown key; did you mean address? ",
    ),
    "required key missing": (
        _config("tls.key_file", None),
        "{config}:12: tls.key_file: this is required and missing; add it",
    ),
    "wrong type": (
        _config("limits.tokens_per_second", "many"),
        "{config}:5: limits.tokens_per_second: this must be a whole number; correct it",
    ),
    "no duration": (
        _config("keys.max_age", "soon"),
        "{config}:5: keys.max_age: 'soon' is not a duration; write a whole number and one unit",
    ),
    "issuer in the clear": (
        _config("issuer", "http://tokens.prod.example"),
        "{config}:3: issuer: 'http://tokens.prod.example' is not an",
    ),
    "Vault in the clear": (
        _config("vault.address", "http://192.0.2.1:8200"),
        "{config}:17: vault.address: 'http://192.0.2.1:8200' is not an https",
    ),
    "Vault at a path": (
        _config("vault.address", "https://vault.example/v1"),
        "vault in the configuration: the address of Vault 'https://vault.example/v1' is not of the form https://HOST:PORT",
    ),
    "environment that is a path": (
        _config("vault.environment", "../prod"),
        "vault in the configuration: the environment",
    ),
    "no address to listen on": (
        _config("listen.tokens", "8443"),
        "{config}:7: listen.tokens: '8443' is no address; write host:port, for",
    ),
    "plain port for everybody": (
        _config("listen.plain", "8.8.8.8:80"),
        "{config}:4: listen: plain: 8.8.8.8 is not a loopback",
    ),
    "lives that contradict": (
        _config("tokens.default_life", "2h"),
        "{config}:1: tokens: shortest_life <= default_life <= longest_life does",
    ),
    "times that contradict": (
        _config("keys.sign_for", "1h"),
        "{config}:1: sign_for must be longer than rotate_every + max_age",
    ),
    "polling too seldom": (
        _config("vault.poll_interval", "1m"),
        "{config}:1: vault.poll_interval must not be longer than keys",
    ),
    # -- the policy
    "policy missing": (
        _missing("policy.yaml"),
        "{dir}/policy.yaml: cannot be read (No such file or directory); policy_file",
    ),
    "policy is a directory": (
        _folder("policy.yaml"),
        "{dir}/policy.yaml: cannot be read (Is a directory); policy_file in",
    ),
    "policy empty": (
        _holds("policy.yaml", ""),
        "{dir}/policy.yaml: the file is empty; policy_file in the configuration",
    ),
    "policy is rubbish": (
        _holds("policy.yaml", RUBBISH),
        "{dir}/policy.yaml:2: this is not UTF-8; save the file as UTF-8",
    ),
    "policy is no YAML": (_holds("policy.yaml", "grants: ["), "{dir}/policy.yaml:1: this is not YAML: "),
    "unknown key in the policy": (
        _holds("policy.yaml", f"{POLICY}admin: []\n"),
        "{dir}/policy.yaml:9: admin: unknown key; did you mean admins? ",
    ),
    "policy of another issuer": (
        _policy("https://tokens.prod.example", "https://tokens.staging.example"),
        "{dir}/policy.yaml: the policy is for issuer https://tokens.staging.example, this broker is https://tokens.prod",
    ),
    "policy with longer lives": (
        _policy("max_ttl: 10m, binding", "max_ttl: 2h, binding"),
        "{dir}/policy.yaml:5: audiences.reports: max_ttl 2h is longer than tokens.longest_life 1h of this broker;",
    ),
    "policy that fails its tests": (
        _holds("policy.yaml", POLICY + f"tests:\n  - {{ workload: {ORDERS}, audience: payments, expect: deny }}\n"),
        "{dir}/policy.yaml:10: tests[0]: expected deny, and allowed: ",
    ),
    # -- the certificate and its key
    "certificate missing": (
        _missing("broker.pem"),
        "certificate file {dir}/broker.pem does not exist: correct the path",
    ),
    "certificate is a directory": (
        _folder("broker.pem"),
        "certificate file {dir}/broker.pem cannot be read (Is a direct",
    ),
    "certificate empty": (
        _holds("broker.pem", ""),
        "certificate file {dir}/broker.pem is empty: have it written again",
    ),
    "certificate is rubbish": (
        _holds("broker.pem", RUBBISH),
        "certificate file {dir}/broker.pem holds no PEM certificate: name the file that has -----BEGIN",
    ),
    "certificate that ended": (
        _certificate(not_before=_ENDED - timedelta(hours=1), not_after=_ENDED),
        f"certificate file {{dir}}/broker.pem ended at {_ENDED:%Y-%m-%dT%H:%M:%SZ}: renew it",
    ),
    "certificate of tomorrow": (
        _certificate(not_before=_NOW + timedelta(days=1), not_after=_NOW + timedelta(days=2)),
        "certificate file {dir}/broker.pem begins at ",
    ),
    "certificate without a SPIFFE ID": (
        _names(DNSName(BROKER_NAME)),
        "certificate file {dir}/broker.pem is not that of a workload (the certificate has 0 URI names where exactly",
    ),
    "certificate with two SPIFFE IDs": (
        _names(UniformResourceIdentifier(BROKER), UniformResourceIdentifier(ORDERS)),
        "certificate file {dir}/broker.pem is not that of a workload (the certificate has 2 URI names where exactly",
    ),
    "certificate without a DNS name": (
        _certificate(dns_names=[]),
        f"certificate file {{dir}}/broker.pem has no DNS name {BROKER_NAME}, by which clients know this server:",
    ),
    "certificate with another DNS name": (
        _certificate(dns_names=["broker.prod.example"]),
        f"certificate file {{dir}}/broker.pem has no DNS name {BROKER_NAME}, by which clients know this server:",
    ),
    "certificate of one that cannot serve": (
        _certificate(spiffe_id="spiffe://prod.example/broker"),
        "certificate file {dir}/broker.pem is not that of a server: spiffe://prod.example/broker has no DNS name",
    ),
    "certificate for clients only": (
        _names(UniformResourceIdentifier(BROKER), DNSName(BROKER_NAME), extended=_CLIENT_ONLY),
        "certificate file {dir}/broker.pem is not for servers: have it issued with the extended key usages of both",
    ),
    "key missing": (_missing("broker-key.pem"), "key file {dir}/broker-key.pem does not exist: correct the path"),
    "key is rubbish": (
        _holds("broker-key.pem", RUBBISH),
        "key file {dir}/broker-key.pem holds no PEM private key: name",
    ),
    "key of another": (_other_key, "key file {dir}/broker-key.pem is not the key of the certificate: name a pair"),
    "key with a password": (_locked_key, "key file {dir}/broker-key.pem has a password: store the key without one"),
    # -- whom it trusts
    "CA missing": (
        _missing("ca.pem"),
        "{dir}/ca.pem: cannot be read (No such file or directory); tls.client_ca_file in",
    ),
    "CA empty": (_holds("ca.pem", ""), "{dir}/ca.pem: the file is empty; tls.client_ca_file in the configuration"),
    "CA is rubbish": (_holds("ca.pem", RUBBISH), "{dir}/ca.pem: the CA bundle is refused: "),
    "CA that is none": (
        lambda site: site.write("ca.pem", site.ca.issue(ORDERS).certificate_pem),
        "{dir}/ca.pem: the CA bundle holds ",
    ),
    "CRL is rubbish": (
        _crl(RUBBISH),
        "{dir}/ca.pem, {dir}/crl.pem: the revocation list file holds no whole CRL in PEM",
    ),
    "CRL missing": (
        _config("tls.crl_files", ["crl.pem"]),
        "{dir}/crl.pem: cannot be read (No such file or directory); tls.",
    ),
    # -- the way to Vault
    "CA of Vault missing": (
        _config("vault.ca_file", "vault.pem"),
        "{dir}/vault.pem cannot be read (No such file or dire",
    ),
    "CA of Vault that is none": (
        _config("vault.ca_file", "policy.yaml"),
        "{dir}/policy.yaml holds no certificate that can be read: give the PEM file of the CA of Vault",
    ),
    "key that everybody may write to": (
        _mode("broker-key.pem", 0o602),
        "{dir}/broker-key.pem: every user of this host may write to it (mode 0602): take that right away (chmod o-w)",
    ),
    "audit directory that everybody may write to": (
        _mode("audit", 0o777),
        "{dir}/audit: every user of this host may write to it (mode 0777), and remove records: take that right away",
    ),
    "role id missing": (
        _missing("role-id"),
        "{dir}/role-id cannot be read (No such file or directory): it must hold what",
    ),
    "role id empty": (
        _holds("role-id", " \n"),
        "{dir}/role-id is empty, or holds more than one line of printable ASCII",
    ),
    "secret id is a directory": (
        _folder("secret-id"),
        "{dir}/secret-id cannot be read (Is a directory): it must hold what",
    ),
    "secret id of two lines": (
        _holds("secret-id", "canary\ncanary\n"),
        "{dir}/secret-id is empty, or holds more than one",
    ),
}


def expect(line: str, expected: str, site: Site) -> None:
    """Show that a line begins as expected, goes on to say what to do, and shows no secret."""
    assert line.startswith(expected.format(dir=site.directory, config=site.file("broker.yaml")))
    assert "canary" not in line


@pytest.mark.parametrize("row", FILES)
def test_a_file_that_is_wrong_stops_serve_and_check_config(forked, site, row):
    """Both say the same, before anything is bound or sent; nothing else is printed."""
    fault, expected = FILES[row]
    fault(site)
    lines = {
        command: one_line(forked.run("carnet_broker", command, "--config", site.file("broker.yaml")))
        for command in ("serve", "check-config")
    }
    expect(lines["serve"], expected, site)
    assert lines["serve"] == lines["check-config"]


@pytest.mark.parametrize(
    ("name", "mode", "says"),
    [
        ("broker-key.pem", 0o644, "every user of this host may read it (mode 0644), and it is secret: chmod 0600"),
        ("broker-key.pem", 0o660, "others may write to it (mode 0660), and it is secret: chmod 0600"),
        ("secret-id", 0o644, "every user of this host may read it (mode 0644), and it is secret: chmod 0600"),
        ("audit", 0o2775, "its group may write to it (mode 2775), and remove records: chmod g-w"),
        ("broker-key.pem", 0o600, None),
        ("broker-key.pem", 0o440, None),
        ("broker-key.pem", 0o640, None),
        ("audit", 0o700, None),
        ("audit", 0o755, None),
        ("audit", 0o1777, None),
    ],
)
def test_what_platforms_do_with_modes_is_accepted_and_told_where_it_is_wide(forked, site, name, mode, says):
    """Kubernetes mounts secrets 0644, 0440 or 0640, and lets a group write into volumes: no reason not to start."""
    _mode(name, mode)(site)
    ended = forked.run("carnet_broker", "check-config", "--config", site.file("broker.yaml"))
    warnings = ended.out.splitlines()[1:]
    assert (0, "", 0 if says is None else 1) == (ended.code, ended.err, len(warnings))
    assert all(line.startswith(f"warning: {site.file(name)}: {says}") for line in warnings)
    ended = forked.run("carnet_broker", "check-config", "--json", "--config", site.file("broker.yaml"))
    assert [line.removeprefix("warning: ") for line in warnings] == json.loads(ended.out)["warnings"]


def test_serve_logs_what_others_may_do_with_a_file(site):
    """Once, when it starts to serve; and it serves."""
    site.file("broker-key.pem").chmod(0o644)
    arguments = [sys.executable, "-m", "carnet_broker", "serve", "--config", str(site.file("broker.yaml"))]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [json.loads(next(process.stderr))]
        while "serving" != lines[-1]["event"]:
            lines.append(json.loads(next(process.stderr)))
        process.terminate()
        process.communicate(timeout=30)
    (told,) = (line for line in lines if line["event"] == "open_to_others")
    assert "warning" == told["level"]
    assert told["problem"].startswith(f"{site.file('broker-key.pem')}: every user of this host may read it (mode 0644)")


@pytest.mark.parametrize("name", ["broker.yaml", "policy.yaml", "broker-key.pem", "ca.pem", "secret-id"])
def test_a_file_that_may_not_be_read_is_named(site, name):
    """Root may read everything, so the process gives that right up first."""
    site.file(name).chmod(0)
    line = one_line(broker(site, "check-config", before=(sys.executable, "-c", WITHOUT_RIGHTS)))
    assert str(site.file(name)) in line
    assert any(why in line for why in ("Permission denied", "is not readable", "may not be read by this process"))


@pytest.mark.parametrize(
    "row", ["config empty", "policy missing", "key of another", "CA that is none", "role id empty"]
)
def test_serve_from_the_beginning(site, row):
    """The same by the command as it is started for real, in time."""
    fault, expected = FILES[row]
    fault(site)
    ended = broker(site, "serve")
    expect(one_line(ended), expected, site)
    assert ended.seconds < 20


# -- what only serving finds out ---------------------------------------------------------------------------------------


def served(forked: Forking, site: Site) -> Ended:
    """Run ``carnet-broker serve``."""
    return forked.run("carnet_broker", "serve", "--config", site.file("broker.yaml"))


def after_the_log(ended: Ended) -> Ended:
    """Return what a broker printed without its log, which tells of the keyring that it loaded before it gave up."""
    *log, last = ended.err.splitlines()
    assert {"keyring_step", "connections_limited"} >= {json.loads(line)["event"] for line in log}
    return replace(ended, err=last)


@pytest.mark.parametrize("listener", ["tokens", "trust", "plain"])
def test_a_port_that_is_taken_is_named(site, listener):
    """By the name of its setting."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        _config(f"listen.{listener}", address)(site)
        line = one_line(after_the_log(broker(site, "serve")))
    assert line.startswith(f"listen.{listener}: cannot listen on {address}")


def test_an_audit_directory_that_cannot_be_written_is_named(forked, site):
    """A file is in its place, its parent is not there, or it may not be written to."""
    site.write("audit", "in the way")
    line = one_line(served(forked, site))
    assert line.startswith(
        f"{site.file('audit')}: the audit record cannot be kept there (File exists); give a directory"
    )
    _config("audit.directory", "nowhere/audit")(site)
    line = one_line(served(forked, site))
    assert line.startswith(f"{site.file('nowhere/audit')}: the audit record cannot be kept there (No such file or dire")
    site.file("audit").unlink()
    site.file("audit").mkdir(mode=0o500)
    _config("audit.directory", "audit")(site)
    line = one_line(broker(site, "serve", before=(sys.executable, "-c", WITHOUT_RIGHTS)))
    assert line.startswith(f"{site.file('audit')}: the audit record cannot be kept there (Permission denied); give a")


@pytest.mark.parametrize("name", ["role-id", "secret-id"])
def test_a_login_that_vault_does_not_accept_is_named_at_once(forked, site, name):
    """Vault said no, so it is not asked again until `start_within` is over."""
    _config("vault.start_within", "1m")(site)
    site.write(name, "canary")
    ended = served(forked, site)
    line = one_line(ended)
    assert line.startswith(
        f"vault.role_id_file {site.file('role-id')} or vault.secret_id_file {site.file('secret-id')}: Vault at http"
    )
    assert "check the role id and the secret id" in line
    assert "canary" not in line
    assert ended.seconds < 10


def test_a_role_without_the_right_to_this_environment_is_named_at_once(forked, site):
    """The login is good, and for something else."""
    _config("vault.environment", "elsewhere")(site)
    _config("vault.start_within", "1m")(site)
    ended = served(forked, site)
    line = one_line(ended)
    assert line.startswith("vault.environment elsewhere: Vault at http")
    assert "the policy of this AppRole does not allow it: run the bootstrap again" in line
    assert ended.seconds < 10


def test_a_vault_that_is_not_there_is_named_when_it_had_its_time(site):
    """It may be starting as well, so it is asked for a while."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    _config("vault.address", address)(site)
    line = one_line(broker(site, "serve"))
    assert line.startswith(f"vault.address: Vault at {address}: cannot log in (auth/approle/login): no connection")


def test_a_vault_that_is_not_trusted_is_named_at_once(forked, site, own_openbao):
    """Its certificate is by another authority than the file that is named."""
    _config("vault.address", own_openbao.address)(site)
    _config("vault.ca_file", "ca.pem")(site)
    _config("vault.start_within", "1m")(site)
    ended = served(forked, site)
    line = one_line(ended)
    assert line.startswith(f"vault.ca_file {site.file('ca.pem')}: Vault at {own_openbao.address}: cannot log in")
    assert ended.seconds < 10


def test_a_keyring_of_another_broker_is_refused(forked, site, vault_place):
    """The environment in Vault is of another issuer, or keeps its keys elsewhere: nothing is taken up or changed."""
    place = vault_place
    credentials = place.bootstrapped.credentials["broker"]
    for name, value in (
        ("vault.environment", place.environment),
        ("vault.role_id_file", str(credentials.role_id_file)),
        ("vault.secret_id_file", str(credentials.secret_id_file)),
    ):
        _config(name, value)(site)
    path = f"{place.kv_path}/keyring"
    document = '{"form":1,"issuer":"https://tokens.staging.example","store":"kv","generation":1,"keys":[]}'
    place.root().write_data(path, data={"data": {"document": document}, "options": {"cas": 0}})
    line = one_line(served(forked, site))
    assert line.startswith(
        "the keyring document has issuer 'https://tokens.staging.example', where this broker is set up"
    )
    found = place.root().read(path)
    assert found is not None
    assert document == found["data"]["data"]["document"]


# -- the other commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "{file}: cannot be read (No such file or directory); give the path of a policy file"),
        (b"", "{file}:1: the file is empty; write what it should hold"),
        (RUBBISH, "{file}:2: this is not UTF-8; save the file as UTF-8"),
        (b"issuer: [", "{file}:1: this is not YAML: "),
        (f"{POLICY}admin: []\n".encode(), "{file}:9: admin: unknown key; did you mean admins? "),
        (
            POLICY.replace("prod.example/ns/shop/sa/orders, audience: p", "staging.example/x, audience: p").encode(),
            "{file}:7",
        ),
    ],
)
def test_policy_check_names_file_and_line(forked, tmp_path, content, expected):
    """As the broker would, were it to load it."""
    file = tmp_path / "policy.yaml"
    if content is not None:
        file.write_bytes(content)
    line = one_line(forked.run("carnet_broker", "policy", "check", file))
    assert line.startswith(expected.format(file=file))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "Missing command: see 'carnet-broker --help'"),
        (("serv",), "No such command 'serv'"),
        (("serve",), "Missing option '--config' (env var: 'CARNET_BROKER_CONFIG'): see 'carnet-broker serve --help'"),
        (("check-config", "--config"), "Option '--config' requires an argument"),
        (("policy",), "Missing command: see 'carnet-broker policy --help'"),
        (("policy", "check"), "Missing argument 'FILE': see 'carnet-broker policy check --help'"),
        (("demo", "--hold"), "--hold needs --dir DIR: the place for DIR/env: see 'carnet-broker demo --help'"),
    ],
)
def test_a_command_line_that_is_wrong_is_one_line(forked, arguments, expected):
    """It says where the help is, and does not print it."""
    assert one_line(forked.run("carnet_broker", *arguments)).startswith(expected)


SDK: Mapping[str, tuple[dict[str, str | None], str]] = {
    "no broker": ({"CARNET_BROKER": None}, "CARNET_BROKER is not set: give brokers=... or set it to host:port"),
    "empty broker": (
        {"CARNET_BROKER": " "},
        "CARNET_BROKER is empty: set it to host:port[,host:port], or leave it out",
    ),
    "broker without a port": ({"CARNET_BROKER": "broker.example"}, "CARNET_BROKER: "),
    "broker as URL": ({"CARNET_BROKER": "https://broker.example:8443"}, "CARNET_BROKER: "),
    "name that is none": (
        {"CARNET_BROKER_NAME": "a b"},
        "CARNET_BROKER_NAME is 'a b', which is no DNS name: set it to",
    ),
    "no certificate": ({"CARNET_CERT_FILE": None}, "CARNET_CERT_FILE is not set: "),
    "certificate missing": (
        {"CARNET_CERT_FILE": "{dir}/none.pem"},
        "certificate file {dir}/none.pem (CARNET_CERT_FILE) does not exist: correct the path",
    ),
    "certificate is a directory": (
        {"CARNET_CERT_FILE": "{dir}"},
        "certificate file {dir} (CARNET_CERT_FILE) cannot be read (Is a directory): name a PEM file",
    ),
    "certificate empty": (
        {"CARNET_CERT_FILE": "{dir}/empty"},
        "certificate file {dir}/empty (CARNET_CERT_FILE) is empty",
    ),
    "certificate is rubbish": (
        {"CARNET_CERT_FILE": "{dir}/rubbish"},
        "certificate file {dir}/rubbish (CARNET_CERT_FILE) holds no PEM certificate: name the file",
    ),
    "no key": ({"CARNET_KEY_FILE": None}, "CARNET_KEY_FILE is not set: "),
    "key is rubbish": ({"CARNET_KEY_FILE": "{dir}/rubbish"}, "key file {dir}/rubbish (CARNET_KEY_FILE) holds no PEM"),
    "key of another": (
        {"CARNET_KEY_FILE": "{dir}/broker-key.pem"},
        "key file {dir}/broker-key.pem (CARNET_KEY_FILE) is not the key of the certificate: name a pair",
    ),
    "no CA": ({"CARNET_CA_FILE": None}, "CARNET_CA_FILE is not set: "),
    "CA missing": ({"CARNET_CA_FILE": "{dir}/none.pem"}, "CA file {dir}/none.pem (CARNET_CA_FILE) does not exist: "),
    "CA empty": ({"CARNET_CA_FILE": "{dir}/empty"}, "CA file {dir}/empty (CARNET_CA_FILE) is empty: have it written"),
    "CA is rubbish": (
        {"CARNET_CA_FILE": "{dir}/rubbish"},
        "CA file {dir}/rubbish (CARNET_CA_FILE) holds no PEM certif",
    ),
}
VERIFIER: Mapping[str, tuple[dict[str, str | None], str]] = {
    "no trust": ({"CARNET_TRUST": None}, "CARNET_TRUST is not set: "),
    "trust without a port": ({"CARNET_TRUST": "broker.example"}, "CARNET_TRUST: "),
    "no issuer": ({"CARNET_ISSUER": None}, "CARNET_ISSUER is not set: "),
    "issuer that is none": ({"CARNET_ISSUER": "a\tb"}, "CARNET_ISSUER is "),
    "no audience": ({"CARNET_AUDIENCE": None}, "CARNET_AUDIENCE is not set: "),
    "certificate missing": SDK["certificate missing"],
    "key of another": SDK["key of another"],
    "CA is rubbish": SDK["CA is rubbish"],
}


@pytest.fixture(scope="module", name="workload")
def _workload(template: Site) -> tuple[Path, dict[str, str]]:
    """The files and the environment of a workload whose broker is away."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
    directory = template.directory
    certificate, key = template.ca.issue(ORDERS).write(directory, "orders")
    (directory / "empty").touch()
    (directory / "rubbish").write_bytes(RUBBISH)
    return directory, {
        "CARNET_BROKER": target,
        "CARNET_TRUST": target,
        "CARNET_ISSUER": "https://tokens.prod.example",
        "CARNET_AUDIENCE": "payments",
        "CARNET_CERT_FILE": str(certificate),
        "CARNET_KEY_FILE": str(key),
        "CARNET_CA_FILE": str(directory / "ca.pem"),
    }


def changed(workload: tuple[Path, dict[str, str]], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return the environment of the workload, changed as said (None: not set)."""
    directory, environment = workload
    filled = {name: None if value is None else value.format(dir=directory) for name, value in changes.items()}
    return {name: value for name, value in {**environment, **filled}.items() if value is not None}


@pytest.mark.parametrize("row", SDK)
def test_carnet_token_names_the_variable_and_the_file(forked, workload, row):
    """Before anything is connected."""
    changes, expected = SDK[row]
    line = one_line(forked.run("carnet", "token", "payments", environment=changed(workload, changes)))
    assert line.startswith(expected.format(dir=workload[0]))


HEADER: Final = f'{{"alg":"ES256","typ":"at+jwt","kid":"{"A" * 43}"}}'
TOKEN: Final = f"{base64url(HEADER.encode()).decode()}.e30.{'A' * 86}"


@pytest.mark.parametrize("row", VERIFIER)
def test_carnet_verify_names_the_variable_and_the_file(forked, workload, row):
    """The token is looked at after the settings."""
    changes, expected = VERIFIER[row]
    line = one_line(forked.run("carnet", "verify", "--no-binding", TOKEN, environment=changed(workload, changes)))
    assert line.startswith(expected.format(dir=workload[0]))


def test_a_broker_that_is_away_is_no_bad_input(workload):
    """Its twins: all settings are right, so the exit code says "try again later"; still in one line."""
    environment = changed(workload, {})
    with ThreadPoolExecutor() as pool:
        token = pool.submit(run_command, "carnet", "token", "payments", "--timeout", "1s", environment=environment)
        verify = pool.submit(
            run_command, "carnet", "verify", "--no-binding", "--timeout", "1s", TOKEN, environment=environment
        )
    assert "check CARNET_BROKER, and that a broker runs there" in one_line(token.result(), code=3)
    assert "check CARNET_TRUST" in one_line(verify.result(), code=3)
