"""What hvac, requests and urllib3 would do by themselves, and must not: each is tried against a server that lies."""

from __future__ import annotations

import gzip
import logging
import os
import ssl
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from carnet.testing.ca import CertificateAuthority
from carnet_broker.edges.vault import VaultKeyringDocument, VaultNotTrustedError, VaultSession, connections
from support.lying_vault import CANARY_TOKEN, LyingVault, Received, once, reply
from support.vault import idle_sockets
from support.vault_lies import GOOD, OPERATIONS, fails, settings_for


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


@pytest.fixture(name="tls_vault")
def _tls_vault(tmp_path: Path) -> Iterator[tuple[LyingVault, Path]]:
    """One behind TLS, and the CA file that vouches for it."""
    authority = CertificateAuthority.create("prod.example")
    issued = authority.issue("spiffe://prod.example/vault", dns_names=("localhost",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*issued.write(tmp_path, "vault"))
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(authority.root_pem)
    with LyingVault(context).listening() as vault:
        yield vault, ca_file


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        f"HTTP/1.1 200 OK\r\nContent-Length: {10**15}\r\n\r\n",
        "HTTP/1.1 307 X\r\nLocation: /v1/other\r\n\r\n",
        "HTTP/1.1 500 X\r\n\r\n",
    ],
    ids=["chunk of less than nothing", "chunk line", "trailer", "long content", "redirect", "refusal"],
)
def test_no_way_to_say_it_takes_more_memory_than_the_limit(vault: LyingVault, session: VaultSession, head: str):
    """Whatever the header promises, what is read and kept is a little more than the limit of the answer."""
    block = b"canary\r\n" * 8192

    def endless(_: Received, send: Callable[[bytes], None]) -> None:
        send(head.encode())
        while not vault.stopping.is_set():
            send(block)

    session.check()
    vault.otherwise = endless
    tracemalloc.start()
    try:
        fails(session, OPERATIONS["read the keyring"])
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_compression_that_nobody_asked_for_is_not_undone(vault: LyingVault, session: VaultSession):
    """A small answer does not become a large one; what it holds is not believed either."""
    content = gzip.compress(b'{"data": {"data": {"document": "{}"}}}' + b" " * (64 * 1024 * 1024))
    for status, where in ((200, {}), (307, {"Location": "/v1/other"})):
        vault.otherwise = reply(status, content, headers={"Content-Encoding": "gzip", **where})
        session.check()
        tracemalloc.start()
        try:
            fails(session, OPERATIONS["read the keyring"])
            assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
        finally:
            tracemalloc.stop()
    assert "identity" == vault.received[-1].headers["accept-encoding"]


# -- what is sent, where, and how often -------------------------------------------------------------------------------


def test_redirect_is_not_even_looked_at(vault: LyingVault, session: VaultSession):
    """An address that cannot be read does not matter: the error is that of every redirect."""
    vault.otherwise = reply(307, b"", headers={"Location": "http://[canary"})
    assert "HTTP 307" in str(fails(session, OPERATIONS["read the keyring"]))


def test_no_cookie_is_kept(vault: LyingVault, session: VaultSession):
    """What a server wants to be told again is not told again."""
    vault.otherwise = reply(404, {"errors": []}, headers={"Set-Cookie": "canary=1; Path=/"})
    for _ in range(3):
        session.call("try", "GET", "carnet/data/prod/x", accept=(404,))
    assert [] == [received for received in vault.received if "cookie" in received.headers]


def test_nothing_is_sent_twice(vault: LyingVault, session: VaultSession):
    """Neither a request to wait nor a connection that breaks makes the library try again: a write may have happened."""
    session.check()
    before = len(vault.received)
    for answer in (reply(503, {"errors": []}, headers={"Retry-After": "1"}), once(b"HTTP/1.1 200"), once(b"")):
        vault.otherwise = answer
        fails(session, OPERATIONS["write the keyring"])
    assert 3 == len(vault.received) - before


def test_the_login_shows_no_token_and_all_else_that_of_the_login(vault: LyingVault, session: VaultSession):
    """The client of a login is its own: no token is put to a request that is made for another."""
    vault.otherwise = GOOD
    VaultKeyringDocument(session).load()
    tokens = [(received.path, received.headers.get("x-vault-token")) for received in vault.received]
    assert [("auth/approle/login", None), ("carnet/data/prod/keyring", CANARY_TOKEN)] == tokens


_SCRIPT = """
import sys
from pathlib import Path
from carnet_broker.edges.vault import SecretValue, VaultKeyringDocument, VaultSession, VaultSettings

login = {"role_id": SecretValue("r", "role"), "secret_id": SecretValue("s", "secret")}
settings = VaultSettings(address=sys.argv[1], environment="prod", ca_file=Path(sys.argv[2]), **login)
session = VaultSession(settings)
assert VaultKeyringDocument(session).load() is not None
session.close()
"""


def test_nothing_of_the_environment_is_used_from_the_start(tls_vault: tuple[LyingVault, Path], tmp_path: Path):
    """hvac reads variables when it is imported, requests files at home: a process that has them all is not misled."""
    vault, ca_file = tls_vault
    vault.otherwise = GOOD
    home = tmp_path / "home"
    home.mkdir()
    (home / ".vault-token").write_text("s.home")
    (home / ".netrc").write_text("default login canary password canary\n")
    (home / ".netrc").chmod(0o600)
    session_keys = tmp_path / "keys"
    session_keys.touch()
    with LyingVault().listening() as other:
        environment = {
            **dict.fromkeys(("VAULT_ADDR", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"), other.address),
            **dict.fromkeys(("VAULT_CACERT", "VAULT_CAPATH", "VAULT_CLIENT_CERT", "VAULT_CLIENT_KEY"), "/nowhere"),
            **dict.fromkeys(("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"), "/nowhere"),
            "VAULT_TOKEN": "s.other",
            "VAULT_NAMESPACE": "other",
            "HOME": str(home),
            "NETRC": str(home / ".netrc"),
            "SSLKEYLOGFILE": str(session_keys),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", _SCRIPT, vault.address, str(ca_file)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (0, "", "") == (run.returncode, run.stdout, run.stderr)
        assert [] == other.received
    assert [None, CANARY_TOKEN] == [received.headers.get("x-vault-token") for received in vault.received]
    for name in ("authorization", "x-vault-namespace"):
        assert [] == [received for received in vault.received if name in received.headers]
    assert "TRAFFIC_SECRET" not in session_keys.read_text()


def test_ca_that_was_withdrawn_is_not_trusted_by_the_next_connection(tls_vault: tuple[LyingVault, Path]):
    """The CA file is read for each connection: what is no longer in it does not count, what is in it does."""
    vault, ca_file = tls_vault
    session = VaultSession(settings_for(vault, ca_file=ca_file))
    vault.otherwise = once(GOOD)
    assert VaultKeyringDocument(session).load() is not None
    good = ca_file.read_bytes()
    ca_file.write_bytes(CertificateAuthority.create("prod.example").root_pem)
    assert isinstance(fails(session, OPERATIONS["read the keyring"]), VaultNotTrustedError)
    ca_file.write_bytes(good)
    assert VaultKeyringDocument(session).load() is not None
    session.close()


# -- what is said -----------------------------------------------------------------------------------------------------


def test_b11_no_library_logs_what_the_other_side_said(
    vault: LyingVault, session: VaultSession, caplog: pytest.LogCaptureFixture
):
    """urllib3 warns of header lines that it cannot read, and quotes them: they may be our token."""
    caplog.set_level(logging.WARNING)
    for head in ("canary", "X-Y canary: z", " canary", "canary\r\nX: y"):
        vault.otherwise = once(f"HTTP/1.1 500 X\r\n{head}\r\n\r\n{{}}".encode())
        fails(session, OPERATIONS["read the keyring"])
    assert [] == caplog.records


# -- connections ------------------------------------------------------------------------------------------------------


def test_connection_that_was_idle_for_long_is_not_used_again(
    vault: LyingVault, session: VaultSession, monkeypatch: pytest.MonkeyPatch
):
    """What stands between may have forgotten a silent connection: a new one is opened."""
    vault.otherwise = GOOD
    document = VaultKeyringDocument(session)
    document.load()
    first = idle_sockets(session)
    document.load()
    assert first == idle_sockets(session)
    assert 1 == len(first)
    monkeypatch.setattr(connections, "_IDLE_SECONDS", 0.0)
    document.load()
    assert 1 == len(idle_sockets(session))
    assert first != idle_sockets(session)


def test_no_more_connections_are_kept_than_a_few(
    vault: LyingVault, session: VaultSession, caplog: pytest.LogCaptureFixture
):
    """Twenty threads at once open twenty connections, and eight are kept, without a word about it in the log."""
    barrier = threading.Barrier(20, timeout=5)

    def together(_: Received, send: Callable[[bytes], None]) -> None:
        barrier.wait()
        send(GOOD)

    session.check()
    vault.otherwise = together
    threads = [threading.Thread(target=VaultKeyringDocument(session).load) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 8 == len(idle_sockets(session))
    assert [] == caplog.records
