from __future__ import annotations

from pathlib import Path

import pytest

from carnet import settings
from carnet.endpoints import Target
from carnet.errors import ConfigError
from carnet.spiffe import SpiffeID
from carnet.testing.ca import CertificateAuthority

WORKLOAD = SpiffeID.parse("spiffe://prod.example/ns/shop/sa/orders")


@pytest.fixture(name="files", scope="module")
def _files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a workload whose files are there."""
    directory = tmp_path_factory.mktemp("files")
    ca = CertificateAuthority.create()
    cert_file, key_file = ca.issue(str(WORKLOAD)).write(directory, "orders")
    (directory / "ca.pem").write_bytes(ca.root_pem)
    return {
        "CARNET_CERT_FILE": str(cert_file),
        "CARNET_KEY_FILE": str(key_file),
        "CARNET_CA_FILE": str(directory / "ca.pem"),
    }


def refusal(function: object, *arguments: object, **keywords: object) -> str:
    """The message of the ConfigError that the call must raise."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


def test_argument_goes_before_the_environment() -> None:
    """Explicit argument, then environment."""
    environ = {"CARNET_ISSUER": "https://env.example"}
    assert "https://argument.example" == settings.issuer("https://argument.example", environ)
    assert "https://env.example" == settings.issuer(None, environ)


def test_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no environment is given, os.environ is read."""
    monkeypatch.setenv("CARNET_AUDIENCE", "payments")
    assert "payments" == settings.audience()


def test_missing_setting_says_what_to_set() -> None:
    """One form of error for every setting that is missing."""
    expected = "CARNET_BROKER is not set: give brokers=... or set it to host:port[,host:port]"
    assert expected == refusal(settings.targets, settings.BROKER, None, {})


def test_issuer_has_no_default() -> None:
    """Whose tokens are good is never guessed."""
    assert refusal(settings.issuer, None, {}).startswith("CARNET_ISSUER is not set: give issuer=...")


@pytest.mark.parametrize("empty", ["", " ", "\n"])
@pytest.mark.parametrize(
    ("read", "variable", "argument"),
    [
        (settings.issuer, "CARNET_ISSUER", "issuer"),
        (settings.audience, "CARNET_AUDIENCE", "audience"),
        (lambda given, environ: settings.targets(settings.TRUST, given, environ), "CARNET_TRUST", "trust"),
        (settings.ca_pem, "CARNET_CA_FILE", "ca_file"),
        (
            lambda given, environ: settings.broker_name(given, workload=WORKLOAD, environ=environ),
            "CARNET_BROKER_NAME",
            "broker_name",
        ),
    ],
)
def test_empty_value_is_an_error_and_not_unset(read: object, variable: str, argument: str, empty: str) -> None:
    """An empty variable or argument is a mistake that a default would hide."""
    assert refusal(read, None, {variable: empty}).startswith(f"{variable} is empty: set it to ")
    assert refusal(read, empty, {}).startswith(f"{argument} is empty: set it to ")


def test_targets_come_as_text_or_as_a_list() -> None:
    """A list of servers is the same as one text divided by commas."""
    expected = (Target("a", 1), Target("b", 2))
    assert expected == settings.targets(settings.BROKER, "a:1,b:2", {})
    assert expected == settings.targets(settings.BROKER, ["a:1", "b:2"], {})
    assert expected == settings.targets(settings.BROKER, None, {"CARNET_BROKER": "a:1,b:2"})


def test_wrong_target_is_told_with_its_source() -> None:
    """The error names the variable, or the argument, that holds the wrong server."""
    assert refusal(settings.targets, settings.BROKER, None, {"CARNET_BROKER": "a"}).startswith("CARNET_BROKER: 'a' ")
    assert refusal(settings.targets, settings.BROKER, "a", {}).startswith("brokers: 'a' ")
    assert refusal(settings.targets, settings.BROKER, [], {}).startswith("brokers is empty")


def test_identity_comes_from_the_environment(files: dict[str, str]) -> None:
    """Certificate and key are those that the variables name."""
    assert WORKLOAD == settings.identity(environ=files).spiffe_id


def test_identity_comes_from_arguments(files: dict[str, str]) -> None:
    """Paths may be given as such."""
    identity = settings.identity(Path(files["CARNET_CERT_FILE"]), Path(files["CARNET_KEY_FILE"]), {})
    assert WORKLOAD == identity.spiffe_id


def test_half_a_pair_is_refused(files: dict[str, str]) -> None:
    """A certificate from an argument and a key from the environment do not belong together."""
    expected = "cert_file=... is given without key_file=...: give both, or neither"
    assert expected == refusal(settings.identity, files["CARNET_CERT_FILE"], None, files)
    expected = "key_file=... is given without cert_file=...: give both, or neither"
    assert expected == refusal(settings.identity, None, files["CARNET_KEY_FILE"], files)


def test_wrong_file_is_told_with_its_variable(files: dict[str, str]) -> None:
    """An error about a file that the environment named says by which variable."""
    message = refusal(settings.identity, environ=files | {"CARNET_KEY_FILE": "/nowhere/key.pem"})
    assert message.startswith("key file /nowhere/key.pem (CARNET_KEY_FILE) does not exist")
    message = refusal(settings.identity, files["CARNET_CERT_FILE"], "/nowhere/key.pem", files)
    assert message.startswith("key file /nowhere/key.pem does not exist")


def test_authorities_come_from_the_environment(files: dict[str, str]) -> None:
    """The CA file is read, and named if it is wrong."""
    assert settings.ca_pem(environ=files).startswith(b"-----BEGIN CERTIFICATE-----")
    message = refusal(settings.ca_pem, environ={"CARNET_CA_FILE": "/nowhere/ca.pem"})
    assert message.startswith("CA file /nowhere/ca.pem (CARNET_CA_FILE) does not exist")


def test_broker_has_one_name_in_each_trust_domain() -> None:
    """The default name is that of the broker's SPIFFE ID, wherever the broker is reached."""
    assert "broker.carnet.svc.prod.example" == settings.broker_name(workload=WORKLOAD, environ={})


def test_name_of_the_broker_may_be_set() -> None:
    """Argument, then environment."""
    environ = {"CARNET_BROKER_NAME": "env.example"}
    assert "env.example" == settings.broker_name(workload=WORKLOAD, environ=environ)
    assert "given.example" == settings.broker_name("given.example", workload=WORKLOAD, environ=environ)


def test_spiffe_id_as_name_of_the_broker_is_told_apart() -> None:
    """gRPC cannot match a SPIFFE ID: the error says which DNS name to write instead."""
    message = refusal(
        settings.broker_name,
        workload=WORKLOAD,
        environ={"CARNET_BROKER_NAME": "spiffe://prod.example/ns/carnet/sa/broker"},
    )
    assert "serves as broker.carnet.svc.prod.example" in message


@pytest.mark.parametrize("name", ["broker:443", "https://broker", "127.0.0.1", "::1", "a b", "bröker", "spiffe://x/y"])
def test_what_no_certificate_says_is_no_name_of_a_broker(name: str) -> None:
    """A target, a URL or an address is no DNS name."""
    assert "which is no DNS name" in refusal(settings.broker_name, name, workload=WORKLOAD, environ={})


@pytest.mark.parametrize("name", ["a b", "pay\x00ments", "päyments", "x" * 256, 'a"b'])
def test_name_that_no_token_can_hold_is_refused(name: str) -> None:
    """An audience or issuer that can never be met is told at the start."""
    assert "which no token can name" in refusal(settings.audience, name, {})
    assert "which no token can name" in refusal(settings.issuer, None, {"CARNET_ISSUER": name})
