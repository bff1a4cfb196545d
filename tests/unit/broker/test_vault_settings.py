from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import requests

from carnet.errors import ConfigError
from carnet.testing.ca import CertificateAuthority
from carnet_broker.edges.vault import SecretFile, SecretValue, VaultSettings
from carnet_broker.edges.vault.transport import bounded_session

_SETTINGS = VaultSettings(
    address="https://vault.example:8200",
    environment="prod",
    role_id=SecretValue("VAULT_ROLE_ID", "role"),
    secret_id=SecretValue("VAULT_SECRET_ID", "canary"),
)


def test_defaults_are_those_of_the_bootstrap():
    """What is not given is what the bootstrap sets up, and the timeout is small."""
    assert ("carnet", "transit", "carnet-prod", "approle") == (
        _SETTINGS.kv_mount,
        _SETTINGS.transit_mount,
        _SETTINGS.transit_key,
        _SETTINGS.approle_mount,
    )
    assert timedelta(seconds=5) == _SETTINGS.timeout
    assert "canary" not in repr(_SETTINGS)


@pytest.mark.parametrize(
    ("address", "host", "port", "tls"),
    [
        ("https://vault.example:8200", "vault.example", 8200, True),
        ("https://vault.example", "vault.example", 443, True),
        ("https://vault.example/", "vault.example", 443, True),
        ("https://10.0.0.7:8200", "10.0.0.7", 8200, True),
        ("https://[2001:db8::1]:8200", "2001:db8::1", 8200, True),
        ("http://127.0.0.1:8200", "127.0.0.1", 8200, False),
        ("http://127.9.9.9", "127.9.9.9", 80, False),
        ("http://[::1]:8200", "::1", 8200, False),
        ("http://localhost:8200", "localhost", 8200, False),
    ],
)
def test_address_is_read(address: str, host: str, port: int, *, tls: bool):
    """An https address anywhere, and an http address of this machine; the HTTP library reads it as we do."""
    settings = replace(_SETTINGS, address=address)
    request = requests.Request("GET", settings.address).prepare()
    pool = bounded_session(None).get_adapter(request.url).poolmanager.connection_from_url(request.url)
    assert (host, port, tls) == (pool.host.strip("[]"), pool.port, pool.scheme == "https")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "vault.example:8200",
        "vault.example",
        "//vault.example",
        "ftp://vault.example",
        "https://",
        "https://:8200",
        "https://vault.example:0",
        "https://vault.example:65536",
        "https://vault.example:x",
        "https://vault.example:8200/v1",
        "https://vault.example?x=1",
        "https://vault.example#x",
        "https://root:canary@vault.example",
        "https://@vault.example",
        "https://vault_example",
        "https://-vault.example",
        "https://vault..example/",
        "https://va ult",
        "https://vault.example\n",
        "https://[::1",
        "https://b\u00fccher.example",
        " https://vault.example",
    ],
)
def test_address_of_another_form_is_refused(address: str):
    """What is not scheme, host and port is refused with the form to give, and no request goes anywhere."""
    with pytest.raises(ConfigError, match="https://HOST:PORT") as caught:
        replace(_SETTINGS, address=address)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("host", ["vault.example", "10.0.0.7", "0.0.0.0", "localhost.example", "127.0.0.1.example"])  # noqa: S104 - refused
def test_plain_http_leaves_the_machine_only_when_told(host: str):
    """Keys and tokens cross a network in the clear only where the setting says so."""
    with pytest.raises(ConfigError, match="in the clear"):
        replace(_SETTINGS, address=f"http://{host}:8200")
    assert f"http://{host}:8200" == replace(_SETTINGS, address=f"http://{host}:8200", plaintext=True).address


@pytest.mark.parametrize(
    "name", ["environment", "transit_key", "kv_mount", "transit_mount", "approle_mount", "namespace"]
)
@pytest.mark.parametrize(
    "value", ["..", ".", "a b", "a?b", "a#b", "a%2fb", "/a", "a/", "a//b", "a/../b", "\u00e9", "a\n"]
)
def test_name_that_would_make_another_path_is_refused(name: str, value: str):
    """A name is what it seems to be, and no way out of its place."""
    with pytest.raises(ConfigError, match=name):
        replace(_SETTINGS, **{name: value})


def test_mounts_and_namespaces_may_have_several_parts():
    """A mount or a namespace may be nested; an environment or a key may not."""
    settings = replace(_SETTINGS, kv_mount="team/kv", transit_mount="team/t", approle_mount="a/b", namespace="x/y")
    assert "team/kv" == settings.kv_mount
    with pytest.raises(ConfigError):
        replace(_SETTINGS, environment="a/b")
    with pytest.raises(ConfigError):
        replace(_SETTINGS, environment="")


@pytest.mark.parametrize("seconds", [0, -1])
def test_timeout_must_be_some_time(seconds: int):
    """Without a timeout a broker would hang."""
    with pytest.raises(ConfigError, match="timeout"):
        replace(_SETTINGS, timeout=timedelta(seconds=seconds))


@pytest.mark.parametrize("content", [b"abc-123", b"abc-123\n", b"  abc-123\r\n\n"])
def test_secret_file_is_read_each_time(tmp_path: Path, content: bytes):
    """The bare value is returned, and a new one as soon as it is there."""
    file = SecretFile(tmp_path / "secret")
    file.path.write_bytes(content)
    assert "abc-123" == file()
    file.path.write_bytes(b"next")
    assert "next" == file()
    assert "next" not in repr(file)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"a b", b"canary\nmore", b"canary\xff", "canary\u00e9".encode(), b"canary\0", b"x" * 5000]
)
def test_secret_file_with_something_else_is_refused(tmp_path: Path, content: bytes):
    """The error names the file, and shows nothing of what is in it."""
    file = SecretFile(tmp_path / "secret")
    file.path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"secret is empty, or holds more") as caught:
        file()
    assert "canary" not in str(caught.value)


def test_secret_file_that_is_not_there_is_named(tmp_path: Path):
    """A missing file, or a directory in its place, is named with the reason."""
    with pytest.raises(ConfigError, match="secret cannot be read"):
        SecretFile(tmp_path / "secret")()
    with pytest.raises(ConfigError, match="cannot be read"):
        SecretFile(tmp_path)()


@pytest.mark.parametrize("value", ["", "  ", "a b", "canary\nmore", "\u00e9"])
def test_secret_value_that_is_none_is_named(value: str):
    """The error gives the name of the variable, and never the value."""
    secret = SecretValue("VAULT_SECRET_ID", value)
    with pytest.raises(ConfigError, match="VAULT_SECRET_ID is empty") as caught:
        secret()
    assert "canary" not in str(caught.value) + repr(secret)


def test_secret_value_is_stripped():
    """White space around a value, as a shell may leave it, does not matter."""
    assert "abc" == SecretValue("VAULT_SECRET_ID", " abc\n")()


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"", "holds no certificate"), (b"canary", "holds no certificate")],
)
def test_files_are_checked_at_the_start(tmp_path: Path, content: bytes | None, says: str):
    """A CA file that cannot be used is named before anything is sent; the twin: one that can be used passes."""
    good = tmp_path / "good.pem"
    good.write_bytes(CertificateAuthority.create("prod.example").root_pem)
    replace(_SETTINGS, ca_file=good).check_files()
    _SETTINGS.check_files()
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file} {says}"):
        replace(_SETTINGS, ca_file=file).check_files()


@pytest.mark.parametrize("name", ["role_id", "secret_id"])
def test_secrets_are_checked_at_the_start(name: str):
    """A secret that is missing is named before anything is sent."""
    with pytest.raises(ConfigError, match="VAULT_X is empty"):
        replace(_SETTINGS, **{name: SecretValue("VAULT_X", "")}).check_files()
