"""Bad days of a real OpenBao, over TLS: sealed, stopped, stopped dead, restarted, unknown, not trusted.

One server is treated badly by all tests, and put right after each. What was made before goes on afterwards with no
restart: the same session, store and signer.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from carnet.errors import ConfigError
from carnet_broker.demo.openbao import OpenBao
from carnet_broker.edges.vault import (
    KvKeyStore,
    RotationClient,
    TransitKeyStore,
    VaultKeyringDocument,
    VaultRotationRequests,
    VaultSession,
)
from carnet_broker.ports import KeyStoreUnavailableError, Signer, VersionedDocument
from support.vault import VaultPlace, prepare

_TIMEOUT = 1.2
_SLACK = 2.0
"""Seconds that a busy machine may add; a call that is not bounded takes far longer."""
_INPUT = b"a.b"


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBao]:
    """A server for this module, which its tests may treat badly and must put right."""
    with OpenBao.start(tmp_path_factory.mktemp("openbao"), dev=False, tls=True) as server:
        yield server


@pytest.fixture(name="place")
def _place(server: OpenBao, tmp_path: Path) -> Iterator[VaultPlace]:
    """A fresh environment in it."""
    place = prepare(server, tmp_path / "login")
    yield place
    place.close()


@dataclass
class Broker:
    """What a broker holds of Vault, loaded while all was well."""

    session: VaultSession
    document: VaultKeyringDocument
    requests: VaultRotationRequests
    kv: KvKeyStore
    transit: TransitKeyStore
    kv_signer: Signer
    transit_signer: Signer

    @property
    def needs_vault(self) -> dict[str, Callable[[], object]]:
        """Everything that cannot be done without Vault."""
        return {
            "load the keyring": self.document.load,
            "write the keyring": lambda: self.document.replace({"generation": 2}, expected_version=1),
            "list requests": self.requests.pending,
            "create in KV": self.kv.create,
            "create in Transit": self.transit.create,
            "sign with Transit": lambda: self.transit_signer.sign(_INPUT),
        }

    def check_all_is_well(self) -> None:
        """Do everything, with what was made before."""
        loaded = self.document.load()
        assert loaded is not None
        assert VersionedDocument({"generation": 1}, 1) == loaded
        assert [] == list(self.requests.pending())
        assert 64 == len(self.transit_signer.sign(_INPUT))
        for store in (self.kv, self.transit):
            key = store.create()
            assert key.jwk.kid == store.signer(key).kid

    def check_vault_is_missed(self, match: str) -> None:
        """Nothing that needs Vault works, each fails in time with `match`; and KV goes on signing."""
        for what, operation in self.needs_vault.items():
            started = time.monotonic()
            with pytest.raises(KeyStoreUnavailableError, match=match) as caught:
                operation()
            assert time.monotonic() - started < _TIMEOUT + _SLACK, what
            assert self.session.settings.address in str(caught.value)
            assert 64 == len(self.kv_signer.sign(_INPUT))


def _broker(place: VaultPlace, session: VaultSession) -> Broker:
    document = VaultKeyringDocument(session)
    document.replace({"generation": 1}, expected_version=0)
    kv, transit = KvKeyStore(session), TransitKeyStore(session)
    return Broker(
        session,
        document,
        VaultRotationRequests(session),
        kv,
        transit,
        kv.signer(kv.create()),
        transit.signer(transit.create()),
    )


@pytest.fixture(name="broker")
def _broker_fixture(place: VaultPlace) -> Broker:
    """A broker that has been at work for a while."""
    broker = _broker(place, place.session(timeout=timedelta(seconds=_TIMEOUT)))
    broker.check_all_is_well()
    return broker


def _recovers(broker: Broker, within: float = 10.0) -> None:
    """Wait until everything works again, as a broker that asks again and again would."""
    ends_at = time.monotonic() + within
    while True:
        try:
            broker.check_all_is_well()
        except KeyStoreUnavailableError:
            if time.monotonic() > ends_at:
                raise
            time.sleep(0.1)
        else:
            return


def test_k05_sealed_vault(server: OpenBao, broker: Broker):
    """Sealed, everything says so; unsealed, everything goes on."""
    server.seal()
    try:
        broker.check_vault_is_missed("Vault is sealed.*unseal it")
    finally:
        server.unseal()
    _recovers(broker)


def test_k05_stopped_and_restarted_vault(server: OpenBao, broker: Broker):
    """With the process gone every call fails at once; after a restart the session goes on, with its old token."""
    token = broker.session._login
    server.stop()
    try:
        broker.check_vault_is_missed("no connection")
    finally:
        server.restart()
    _recovers(broker)
    assert token == broker.session._login


def test_k05_restart_between_two_calls_is_not_noticed(server: OpenBao, broker: Broker):
    """A connection that ended while it was idle is not used again: no call fails."""
    server.restart()
    broker.check_all_is_well()


def test_k05_vault_that_stands_still(server: OpenBao, broker: Broker):
    """A process that is stopped dead takes connections and never answers: each call ends after its timeout."""
    server.pause()
    try:
        broker.check_vault_is_missed("did not answer in time")
    finally:
        server.resume()
    _recovers(broker)


def test_k05_many_threads_at_a_vault_that_stands_still(server: OpenBao, place: VaultPlace):
    """Sixteen threads without a login wait no longer than one does, whoever of them tries to log in."""
    session = place.session(timeout=timedelta(seconds=_TIMEOUT))
    took: list[float] = []

    def sign() -> None:
        started = time.monotonic()
        with pytest.raises(KeyStoreUnavailableError):
            TransitKeyStore(session).create()
        took.append(time.monotonic() - started)

    server.pause()
    try:
        threads = [threading.Thread(target=sign) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.resume()
    assert 16 == len(took)
    assert max(took) < _TIMEOUT + _SLACK


def test_k06_all_tokens_revoked_while_sealed_and_restarted(server: OpenBao, place: VaultPlace, broker: Broker):
    """Every lease revoked, and a restart on top: the next call logs in anew."""
    login = broker.session._login
    assert login is not None
    place.root().write_data("auth/token/revoke", data={"token": login.token})
    server.restart()
    _recovers(broker)
    assert broker.session._login is not None
    assert login.token != broker.session._login.token


def test_k05_vault_that_comes_up_after_the_broker(server: OpenBao, place: VaultPlace):
    """A session that was made while there was no Vault works as soon as there is one."""
    session = place.session(timeout=timedelta(seconds=_TIMEOUT))
    server.stop()
    try:
        with pytest.raises(KeyStoreUnavailableError, match="no connection"):
            session.check()
    finally:
        server.restart()
    time.sleep(0.5)
    session.check()


def test_system_certificates_are_those_built_into_openssl(place: VaultPlace, monkeypatch: pytest.MonkeyPatch):
    """Without a CA file the system's own certificates decide, in a file or in a directory, and no variable does."""
    ca_file = str(place.server.ca_file)
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", ca_file)
    monkeypatch.setenv("VAULT_CACERT", ca_file)
    with pytest.raises(KeyStoreUnavailableError, match="TLS failed"):
        place.session(ca_file=None).check()
    paths = ssl.get_default_verify_paths()
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths._replace(openssl_cafile=ca_file))
    place.session(ca_file=None).check()
    nowhere = paths._replace(openssl_cafile="/nowhere", openssl_capath="/nowhere")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nowhere)
    with pytest.raises(KeyStoreUnavailableError, match="TLS failed"):
        place.session(ca_file=None).check()


def test_k05_ca_that_does_not_vouch(place: VaultPlace, tmp_path: Path):
    """A server whose certificate the CA file does not vouch for gets no login; nor does one that the system trusts not.

    When the right file is put in its place, the same session goes on.
    """
    other = tmp_path / "ca.pem"
    with OpenBao.start(tmp_path / "other", tls=True) as stranger:
        assert stranger.ca_file is not None
        shutil.copy(stranger.ca_file, other)
    for ca_file in (other, None):
        session = place.session(ca_file=ca_file)
        with pytest.raises(KeyStoreUnavailableError, match=r"TLS failed \(.*certificate"):
            session.check()
        with pytest.raises(ConfigError, match="VAULT_CACERT is wrong or not set"):
            RotationClient(place.session("ci", ca_file=ca_file)).keyring()
    session = place.session(ca_file=other)
    with pytest.raises(KeyStoreUnavailableError):
        session.check()
    assert place.server.ca_file is not None
    shutil.copy(place.server.ca_file, other)
    time.sleep(0.5)
    session.check()


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_ca_file_that_cannot_be_used_is_named(place: VaultPlace, tmp_path: Path, content: bytes | None):
    """A CA file that is missing or holds none is named, and nothing is trusted in its place."""
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(KeyStoreUnavailableError, match=f"the CA file {file} cannot be used"):
        place.session(ca_file=file).check()


def test_k05_certificate_for_another_name(place: VaultPlace):
    """The certificate must be for the address that was given: 127.0.0.2 reaches the server, and is refused."""
    server = place.server
    port = server.address.rpartition(":")[2]
    with socket.create_server(("127.0.0.2", 0)) as listener:
        relay = threading.Thread(target=_relay, args=(listener, int(port)), daemon=True)
        relay.start()
        address = f"https://127.0.0.2:{listener.getsockname()[1]}"
        with pytest.raises(KeyStoreUnavailableError, match=r"TLS failed \(.*127\.0\.0\.2"):
            place.session(address=address).check()
        relay.join(5)


def _relay(listener: socket.socket, port: int) -> None:
    """Pass one connection on to the server."""
    connection, _ = listener.accept()
    with connection, socket.create_connection(("127.0.0.1", port)) as onward:
        answers = threading.Thread(target=_copy, args=(onward, connection))
        answers.start()
        _copy(connection, onward)
        answers.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def test_k05_http_to_an_https_port_and_the_reverse(place: VaultPlace, openbao: OpenBao):
    """The wrong scheme is an error like the others, and says that this is not Vault's address."""
    plain = place.server.address.replace("https", "http")
    with pytest.raises(KeyStoreUnavailableError):
        place.session(address=plain).check()
    with pytest.raises(KeyStoreUnavailableError, match="TLS failed"):
        place.session(address=openbao.address.replace("http", "https")).check()


def test_k05_name_that_is_not_known(place: VaultPlace):
    """A name that does not resolve is named."""
    with pytest.raises(KeyStoreUnavailableError, match=r"the name vault\.invalid is not known"):
        place.session(address="https://vault.invalid:8200").check()


def test_k05_resolver_that_hangs(place: VaultPlace, monkeypatch: pytest.MonkeyPatch):
    """The system's resolver knows no timeout: a call does not wait for it longer than for anything else."""
    release = threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        release.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    session = place.session(timeout=timedelta(seconds=_TIMEOUT))
    started = time.monotonic()
    with pytest.raises(KeyStoreUnavailableError, match="was not resolved in time"):
        session.check()
    assert time.monotonic() - started < _TIMEOUT + _SLACK
    release.set()


def test_port_on_which_nobody_listens(place: VaultPlace):
    """A refused connection is said as such, at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(KeyStoreUnavailableError, match="Connection refused"):
        place.session(address=f"https://127.0.0.1:{port}").check()
