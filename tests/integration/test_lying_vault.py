"""Every way in which Vault, or what stands before it, can answer wrongly: each is one kind of error, in time."""

from __future__ import annotations

import socket
import ssl
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from carnet.testing.ca import CertificateAuthority
from carnet_broker.edges.vault import (
    VaultKeyringDocument,
    VaultSession,
)
from support.lying_vault import CANARY_TOKEN, LyingVault, Received, drip, once, reply
from support.vault_lies import GOOD, METADATA, OPERATIONS, WRONG_BODIES, check_no_secret, fails, settings_for


@pytest.fixture(name="vault")
def _vault() -> Iterator[LyingVault]:
    """A server that can be told to lie."""
    with LyingVault().listening() as vault:
        yield vault


@pytest.fixture(name="session")
def _session(vault: LyingVault) -> Iterator[VaultSession]:
    """A session with it."""
    session = VaultSession(settings_for(vault))
    yield session
    session.close()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_k05_answer_that_is_none(vault: LyingVault, session: VaultSession, operation: str):
    """No rubbish, however it is made, becomes anything but the one kind of error; afterwards the session goes on."""
    for name, answer in WRONG_BODIES.items():
        if name == "a large body" and operation in {"list requests", "sweep"}:
            continue  # A door that cannot be listed is passed over: see below.
        vault.otherwise = once(answer)
        fails(session, OPERATIONS[operation])
    vault.otherwise = reply(200, {"data": {"data": {"document": "{}"}, "metadata": METADATA}})
    loaded = VaultKeyringDocument(session).load()
    assert loaded is not None
    assert 1 == loaded.version


@pytest.mark.parametrize("status", [201, 300, 301, 302, 307, 308, 400, 401, 403, 405, 412, 418, 429, 472, 473, 500])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_k05_status_that_is_no_success(vault: LyingVault, session: VaultSession, operation: str, status: int):
    """Each status is named in the error, with what to do."""
    vault.otherwise = reply(status, {"errors": ["canary"]}, headers={"Location": "http://127.0.0.1:1/canary"})
    if operation in {"ask", "read a result", "read the keyring as CI"} and status == 403:
        return  # A fault of the configuration there: see the contract of RotationClient.
    error = fails(session, OPERATIONS[operation])
    assert f"HTTP {status}" in str(error)


@pytest.mark.parametrize("status", [404, 501, 502, 503, 504])
def test_k05_server_that_is_not_ready(vault: LyingVault, session: VaultSession, status: int):
    """A seal, a proxy without a server, and a mount that is gone are not taken for "the key is lost"."""
    for errors in (
        ["Vault is sealed"],
        ['no handler for route "carnet/canary". route entry not found.'],
        ["canary"],
        7,
    ):
        vault.otherwise = reply(status, {"errors": errors})
        for operation in OPERATIONS.values():
            fails(session, operation)
    vault.otherwise = reply(status, b"<html>canary</html>")
    for operation in OPERATIONS.values():
        fails(session, operation)


def test_known_words_of_vault_are_passed_on(vault: LyingVault, session: VaultSession):
    """An operator reads Vault's own reason where it is one that is known to hold no secret."""
    vault.otherwise = reply(503, {"errors": ["Vault is sealed"]})
    assert "(Vault is sealed): Vault is sealed or in maintenance: unseal it" in str(
        fails(session, OPERATIONS["read the keyring"])
    )
    vault.otherwise = reply(500, {"errors": ["canary: no space left on device: canary"]})
    assert "(no space left on device)" in str(fails(session, OPERATIONS["write the keyring"]))


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 90,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
        GOOD[:-5],
        b"",
    ],
    ids=["a good answer", "header lines", "continue for ever", "all but the end", "silence"],
)
@pytest.mark.parametrize("where", ["login", "after it"])
def test_k05_slow_server_is_left_in_time(vault: LyingVault, session: VaultSession, data: bytes, where: str):
    """A server that sends a byte now and then holds a call for the timeout and no longer, wherever it begins."""
    lie = drip(data, vault)
    if where == "login":
        vault.lies["auth/approle/login"] = lie
    else:
        vault.otherwise = lie
    error = fails(session, OPERATIONS["read the keyring"])
    assert "did not answer in time" in str(error)
    vault.lies["auth/approle/login"] = LyingVault.login()
    vault.otherwise = GOOD
    time.sleep(0.5)  # The pause after a login that failed.
    assert VaultKeyringDocument(session).load() is not None


@pytest.mark.parametrize("data", [GOOD, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 90], ids=["body", "header lines"])
def test_k05_slow_server_behind_tls_is_left_in_time(tmp_path: Path, data: bytes):
    """The deadline holds for TLS as for a plain connection; the twin: an answer that comes in time is read."""
    authority = CertificateAuthority.create("prod.example")
    certificate_file, key_file = authority.issue("spiffe://prod.example/vault", dns_names=("localhost",)).write(
        tmp_path, "vault"
    )
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(authority.root_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    with LyingVault(context).listening() as vault:
        session = VaultSession(settings_for(vault, ca_file=ca_file))
        vault.otherwise = drip(data, vault)
        assert "did not answer in time" in str(fails(session, OPERATIONS["read the keyring"]))
        vault.otherwise = GOOD
        assert VaultKeyringDocument(session).load() is not None
        session.close()


def test_k05_handshake_that_never_ends_is_left_in_time(vault: LyingVault):
    """A server that takes the connection and says nothing of TLS holds a call no longer than any other."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"https://127.0.0.1:{silent.getsockname()[1]}"
        session = VaultSession(settings_for(vault, address=address))
        assert "did not answer in time" in str(fails(session, VaultSession.check))


def test_endless_body_is_left_at_its_limit(vault: LyingVault, session: VaultSession):
    """A server that never stops talking is left when the answer is longer than any of this kind."""

    def endless(_: Received, send: Callable[[bytes], None]) -> None:
        send(b"HTTP/1.1 200 OK\r\n\r\n")
        while not vault.stopping.is_set():
            send(b'{"data":"' + b"x" * 65536)

    vault.otherwise = endless
    assert "longer than 1048576 bytes" in str(fails(session, OPERATIONS["read the keyring"]))


def test_redirect_is_not_followed(vault: LyingVault, session: VaultSession):
    """The token goes to no other address, whatever the answer says."""
    with LyingVault().listening() as other:
        for status in (301, 302, 303, 307, 308):
            vault.otherwise = reply(status, b"", headers={"Location": f"{other.address}/v1/carnet/x"})
            error = fails(session, OPERATIONS["read the keyring"])
            assert "never followed" in str(error)
        assert [] == other.received


def test_nothing_of_the_environment_is_used(vault: LyingVault, session: VaultSession, monkeypatch: pytest.MonkeyPatch):
    """Neither a proxy nor another address or token of the environment changes where a call goes, or as whom."""
    with LyingVault().listening() as other:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "VAULT_ADDR"):
            monkeypatch.setenv(name, other.address)
        monkeypatch.setenv("VAULT_TOKEN", "s.other")
        monkeypatch.setenv("VAULT_NAMESPACE", "other")
        vault.otherwise = GOOD
        assert VaultKeyringDocument(session).load() is not None
        assert [] == other.received
    assert CANARY_TOKEN == vault.received[-1].headers["x-vault-token"]
    assert "x-vault-namespace" not in vault.received[-1].headers


def test_namespace_is_sent_where_it_is_set(vault: LyingVault):
    """Every call names the namespace, the login too."""
    session = VaultSession(settings_for(vault, namespace="team/a"))
    vault.otherwise = GOOD
    assert VaultKeyringDocument(session).load() is not None
    assert ["team/a"] * 2 == [received.headers["x-vault-namespace"] for received in vault.received]
    session.close()


def test_b11_errors_that_repeat_what_we_sent_show_no_secret(vault: LyingVault, session: VaultSession):
    """A Vault that puts our token, our secret id or a private key into its answers gets none of it into an error."""

    def repeat(received: Received, send: Callable[[bytes], None]) -> None:
        said = "canary " + received.headers.get("x-vault-token", "") + received.body.decode("ascii")
        quiet = said.replace("\r", " ").replace("\n", " ")
        kind = len(vault.received) % 4
        if kind == 0:
            send(reply(500, {"errors": [said]}, reason=quiet, headers={"X-Said": quiet, "Location": quiet}))
        elif kind == 1:
            send(f"{quiet}\r\n\r\n".encode())
        elif kind == 2:
            send(reply(200, quiet.encode()))
        else:
            send(f"HTTP/1.1 {quiet}\r\n\r\n".encode())

    vault.otherwise = repeat
    for operation in OPERATIONS.values():
        for _ in range(4):
            error = fails(session, operation)
            assert "BEGIN PRIVATE KEY" not in "".join(traceback.format_exception(error))
    vault.lies["auth/approle/login"] = repeat
    for _ in range(4):
        fresh = VaultSession(session.settings)
        check_no_secret(fails(fresh, VaultSession.check))
        fresh.close()
    assert "canary" not in repr(session) + repr(session.settings) + repr(session._login)
