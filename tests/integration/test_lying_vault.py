"""Every way in which Vault, or what stands before it, can answer wrongly: each is one kind of error, in time."""

from __future__ import annotations

import base64
import re
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from carnet.encoding import base64url
from carnet.jwk import PublicJWK
from carnet.testing.ca import CertificateAuthority
from carnet_broker.edges.vault import (
    KvKeyStore,
    RotationClient,
    SecretValue,
    TransitKeyStore,
    VaultForbiddenError,
    VaultKeyringDocument,
    VaultLoginError,
    VaultRotationRequests,
    VaultSession,
    VaultSettings,
    transport,
)
from carnet_broker.ports import (
    KeyStoreUnavailableError,
    RequestKind,
    RequestResult,
    RequestStatus,
    RotationRequest,
    StoredKey,
)
from support.lying_vault import CANARY_TOKEN, Lie, LyingVault, Received, drip, once, reply

_SECRET_ID = "canary-secret-id"
_ROLE_ID = "canary-role-id"
_TIMEOUT = 1.0
_SLACK = 2.0
"""Seconds that a busy machine may add; a call that is not bounded takes far longer."""
_KEY = ec.generate_private_key(ec.SECP256R1())
_STORED = StoredKey(PublicJWK.of(_KEY.public_key()), 2)
_PEM = (
    _KEY.public_key()
    .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    .decode("ascii")
)
_TRANSIT_KEY = {
    "type": "ecdsa-p256",
    "exportable": False,
    "allow_plaintext_backup": False,
    "latest_version": 2,
    "min_available_version": 0,
    "min_decryption_version": 1,
    "min_encryption_version": 0,
    "keys": {"1": {"public_key": _PEM}, "2": {"public_key": _PEM}},
}

_OPERATIONS: dict[str, Callable[[VaultSession], object]] = {
    "read the keyring": lambda session: VaultKeyringDocument(session).load(),
    "write the keyring": lambda session: VaultKeyringDocument(session).replace({}, expected_version=0),
    "create in KV": lambda session: KvKeyStore(session).create(),
    "sign with KV": lambda session: KvKeyStore(session).signer(_STORED),
    "destroy in KV": lambda session: KvKeyStore(session).destroy(_STORED, live=[]),
    "create in Transit": lambda session: TransitKeyStore(session).create(),
    "load from Transit": lambda session: TransitKeyStore(session).signer(_STORED),
    "sign with Transit": lambda session: TransitKeyStore(session).sign(_STORED.jwk, 2, b"a.b"),
    "destroy in Transit": lambda session: TransitKeyStore(session).destroy(_STORED, live=[]),
    "list requests": lambda session: VaultRotationRequests(session).pending(),
    "sweep": lambda session: VaultRotationRequests(session).sweep(before=datetime(2030, 1, 1, tzinfo=UTC)),
    "ask": lambda session: RotationClient(session).submit(RequestKind.ROTATE),
    "read a result": lambda session: RotationClient(session).result("x"),
    "read the keyring as CI": lambda session: RotationClient(session).keyring(),
}


@pytest.fixture(name="vault")
def _vault() -> Iterator[LyingVault]:
    """A server that can be told to lie."""
    with LyingVault().listening() as vault:
        yield vault


def _settings(vault: LyingVault, **changes: Any) -> VaultSettings:  # noqa: ANN401 - any field
    settings = VaultSettings(
        address=vault.address,
        environment="prod",
        role_id=SecretValue("VAULT_ROLE_ID", _ROLE_ID),
        secret_id=SecretValue("VAULT_SECRET_ID", _SECRET_ID),
        timeout=timedelta(seconds=_TIMEOUT),
    )
    return replace(settings, **changes)


@pytest.fixture(name="session")
def _session(vault: LyingVault) -> Iterator[VaultSession]:
    """A session with it."""
    session = VaultSession(_settings(vault))
    yield session
    session.close()


def _fails(session: VaultSession, operation: Callable[[VaultSession], object]) -> KeyStoreUnavailableError:
    """Return the error of `operation`, which came in time and shows no secret in any of its texts."""
    started = time.monotonic()
    with pytest.raises(KeyStoreUnavailableError) as caught:
        operation(session)
    assert time.monotonic() - started < _TIMEOUT + _SLACK
    _check_no_secret(caught.value)
    assert session.settings.address in str(caught.value)
    return caught.value


def _check_no_secret(error: BaseException) -> None:
    texts = "".join(traceback.format_exception(error)) + repr(error) + str(error)
    assert "canary" not in re.sub(r'File ".*"', "", texts)


_WRONG_BODIES = {
    "rubbish": b"\x00\xff not http at all\r\n\r\n",
    "nothing": b"",
    "an empty line": b"\r\n",
    "HTTP/0.9": b"hello",
    "half a status line": b"HTTP/1.1 2",
    "no status": b"HTTP/1.1 \r\n\r\n",
    "a status that is no number": b"HTTP/1.1 abc OK\r\n\r\n",
    "a web page": reply(200, b"<html>log in</html>"),
    "an empty body": reply(200, b""),
    "truncated JSON": reply(200, b'{"data": {"data": {"docu'),
    "a list": reply(200, []),
    "a text": reply(200, "data"),
    "null": reply(200, None),
    "a number": reply(200, 7),
    "an empty object": reply(200, {}),
    "data is null": reply(200, {"data": None}),
    "data is a list": reply(200, {"data": [1]}),
    "data is a text": reply(200, {"data": "x"}),
    "data is empty": reply(200, {"data": {}}),
    "data in data is a text": reply(200, {"data": {"data": "x", "metadata": {"version": 1}, "keys": "x"}}),
    "versions that are no numbers": reply(
        200, {"data": {"data": {}, "metadata": {"version": "1"}, "keys": {"x": {}}, "version": "1"}}
    ),
    "names that are no texts": reply(200, {"data": {"keys": [1, None]}}),
    "not UTF-8": reply(200, b'{"data": "\xff\xfe"}'),
    "very deep": reply(200, b'{"data":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "a long number": reply(200, b'{"data": ' + b"9" * 100_000 + b"}"),
    "NaN": reply(200, b'{"data": {"data": {}, "metadata": {"version": NaN}}}'),
    "a body that breaks off": reply(200, b"{}", headers={"Content-Length": "5000"}),
    "a wrong chunk": reply(200, b"zz\r\n{}\r\n", headers={"Transfer-Encoding": "chunked"}),
    "many header lines": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n{}",
    "a long header line": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n{}",
    "a large body": reply(200, b'{"data": "' + b"x" * (9 * 1024 * 1024) + b'"}'),
}


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_k05_answer_that_is_none(vault: LyingVault, session: VaultSession, operation: str):
    """No rubbish, however it is made, becomes anything but the one kind of error; afterwards the session goes on."""
    for name, answer in _WRONG_BODIES.items():
        if name == "a large body" and operation in {"list requests", "sweep"}:
            continue  # A door that cannot be listed is passed over: see below.
        vault.otherwise = once(answer)
        _fails(session, _OPERATIONS[operation])
    vault.otherwise = reply(200, {"data": {"data": {"document": "{}"}, "metadata": _METADATA}})
    loaded = VaultKeyringDocument(session).load()
    assert loaded is not None
    assert 1 == loaded.version


_METADATA = {"version": 1, "created_time": "2026-01-01T00:00:00.123456789Z"}


@pytest.mark.parametrize("status", [201, 300, 301, 302, 307, 308, 400, 401, 403, 405, 412, 418, 429, 472, 473, 500])
@pytest.mark.parametrize("operation", _OPERATIONS)
def test_k05_status_that_is_no_success(vault: LyingVault, session: VaultSession, operation: str, status: int):
    """Each status is named in the error, with what to do."""
    vault.otherwise = reply(status, {"errors": ["canary"]}, headers={"Location": "http://127.0.0.1:1/canary"})
    if operation in {"ask", "read a result", "read the keyring as CI"} and status == 403:
        return  # A fault of the configuration there: see the contract of RotationClient.
    error = _fails(session, _OPERATIONS[operation])
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
        for operation in _OPERATIONS.values():
            _fails(session, operation)
    vault.otherwise = reply(status, b"<html>canary</html>")
    for operation in _OPERATIONS.values():
        _fails(session, operation)


def test_known_words_of_vault_are_passed_on(vault: LyingVault, session: VaultSession):
    """An operator reads Vault's own reason where it is one that is known to hold no secret."""
    vault.otherwise = reply(503, {"errors": ["Vault is sealed"]})
    assert "(Vault is sealed): Vault is sealed or in maintenance: unseal it" in str(
        _fails(session, _OPERATIONS["read the keyring"])
    )
    vault.otherwise = reply(500, {"errors": ["canary: no space left on device: canary"]})
    assert "(no space left on device)" in str(_fails(session, _OPERATIONS["write the keyring"]))


_GOOD = reply(200, {"data": {"data": {"document": "{}"}, "metadata": _METADATA}})


@pytest.mark.parametrize(
    "data",
    [
        _GOOD,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 90,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
        _GOOD[:-5],
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
    error = _fails(session, _OPERATIONS["read the keyring"])
    assert "did not answer in time" in str(error)
    vault.lies["auth/approle/login"] = LyingVault.login()
    vault.otherwise = _GOOD
    time.sleep(0.5)  # The pause after a login that failed.
    assert VaultKeyringDocument(session).load() is not None


@pytest.mark.parametrize("data", [_GOOD, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 90], ids=["body", "header lines"])
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
        session = VaultSession(_settings(vault, ca_file=ca_file))
        vault.otherwise = drip(data, vault)
        assert "did not answer in time" in str(_fails(session, _OPERATIONS["read the keyring"]))
        vault.otherwise = _GOOD
        assert VaultKeyringDocument(session).load() is not None
        session.close()


def test_k05_handshake_that_never_ends_is_left_in_time(vault: LyingVault):
    """A server that takes the connection and says nothing of TLS holds a call no longer than any other."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"https://127.0.0.1:{silent.getsockname()[1]}"
        session = VaultSession(_settings(vault, address=address))
        assert "did not answer in time" in str(_fails(session, VaultSession.check))


def test_endless_body_is_left_at_its_limit(vault: LyingVault, session: VaultSession):
    """A server that never stops talking is left when the answer is longer than any of this kind."""

    def endless(_: Received, send: Callable[[bytes], None]) -> None:
        send(b"HTTP/1.1 200 OK\r\n\r\n")
        while not vault.stopping.is_set():
            send(b'{"data":"' + b"x" * 65536)

    vault.otherwise = endless
    assert "longer than 1048576 bytes" in str(_fails(session, _OPERATIONS["read the keyring"]))


def test_redirect_is_not_followed(vault: LyingVault, session: VaultSession):
    """The token goes to no other address, whatever the answer says."""
    with LyingVault().listening() as other:
        for status in (301, 302, 303, 307, 308):
            vault.otherwise = reply(status, b"", headers={"Location": f"{other.address}/v1/carnet/x"})
            error = _fails(session, _OPERATIONS["read the keyring"])
            assert "never followed" in str(error)
        assert [] == other.received


def test_nothing_of_the_environment_is_used(vault: LyingVault, session: VaultSession, monkeypatch: pytest.MonkeyPatch):
    """Neither a proxy nor another address or token of the environment changes where a call goes, or as whom."""
    with LyingVault().listening() as other:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "VAULT_ADDR"):
            monkeypatch.setenv(name, other.address)
        monkeypatch.setenv("VAULT_TOKEN", "s.other")
        monkeypatch.setenv("VAULT_NAMESPACE", "other")
        vault.otherwise = _GOOD
        assert VaultKeyringDocument(session).load() is not None
        assert [] == other.received
    assert CANARY_TOKEN == vault.received[-1].headers["x-vault-token"]
    assert "x-vault-namespace" not in vault.received[-1].headers


def test_namespace_is_sent_where_it_is_set(vault: LyingVault):
    """Every call names the namespace, the login too."""
    session = VaultSession(_settings(vault, namespace="team/a"))
    vault.otherwise = _GOOD
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
    for operation in _OPERATIONS.values():
        for _ in range(4):
            error = _fails(session, operation)
            assert "BEGIN PRIVATE KEY" not in "".join(traceback.format_exception(error))
    vault.lies["auth/approle/login"] = repeat
    for _ in range(4):
        fresh = VaultSession(session.settings)
        _check_no_secret(_fails(fresh, VaultSession.check))
        fresh.close()
    assert "canary" not in repr(session) + repr(session.settings) + repr(session._login)


# -- a Transit that lies ---------------------------------------------------------------------------------------------


def _raw(signing_input: bytes, key: ec.EllipticCurvePrivateKey = _KEY) -> bytes:
    r, s = decode_dss_signature(key.sign(signing_input, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


def _signing(make: Callable[[bytes], dict[str, object]]) -> Lie:
    """Return a Transit that answers a signature with what `make` says of the input."""

    def lie(received: Received, send: Callable[[bytes], None]) -> None:
        send(reply(200, {"data": make(base64.b64decode(received.data["input"]))}))

    return lie


_OTHER = ec.generate_private_key(ec.SECP256R1())


def _text(signature: bytes, version: object = 2) -> str:
    return f"vault:v{version}:{base64url(signature).decode()}"


_WRONG_SIGNATURES: dict[str, Callable[[bytes], dict[str, object]]] = {
    "by another key": lambda data: {"key_version": 2, "signature": _text(_raw(data, _OTHER))},
    "of another input": lambda data: {"key_version": 2, "signature": _text(_raw(data + b"x"))},
    "of nothing": lambda _: {"key_version": 2, "signature": _text(_raw(b""))},
    "all zero": lambda _: {"key_version": 2, "signature": _text(bytes(64))},
    "another version in the number": lambda data: {"key_version": 3, "signature": _text(_raw(data))},
    "another version in the text": lambda data: {"key_version": 2, "signature": _text(_raw(data), 3)},
    "another version in both": lambda data: {"key_version": 3, "signature": _text(_raw(data), 3)},
    "the version twenty": lambda data: {"key_version": 2, "signature": _text(_raw(data), 20)},
    "a version that is a text": lambda data: {"key_version": "2", "signature": _text(_raw(data))},
    "no version in the text": lambda data: {"key_version": 2, "signature": base64url(_raw(data)).decode()},
    "DER": lambda data: {"key_version": 2, "signature": _text(_KEY.sign(data, ec.ECDSA(hashes.SHA256())))},
    "too short": lambda data: {"key_version": 2, "signature": _text(_raw(data)[:63])},
    "too long": lambda data: {"key_version": 2, "signature": _text(_raw(data) + b"\0")},
    "padded": lambda data: {"key_version": 2, "signature": _text(_raw(data)) + "=="},
    "not canonical": lambda data: {"key_version": 2, "signature": _text(_raw(data))[:-1] + "_"},
    "not ASCII": lambda data: {"key_version": 2, "signature": _text(_raw(data)) + "\u00e9"},
    "empty": lambda _: {"key_version": 2, "signature": "vault:v2:"},
    "null": lambda _: {"key_version": 2, "signature": None},
    "missing": lambda _: {"key_version": 2},
}


@pytest.mark.parametrize("what", _WRONG_SIGNATURES)
def test_transit_answer_with_a_wrong_signature_is_refused(vault: LyingVault, session: VaultSession, what: str):
    """No signature leaves that is not good for the public key of the version that was asked for."""
    vault.otherwise = _signing(_WRONG_SIGNATURES[what])
    error = _fails(session, _OPERATIONS["sign with Transit"])
    assert "makes no sense" in str(error)


def test_transit_answer_with_a_good_signature_is_returned(vault: LyingVault, session: VaultSession):
    """The twin: what is signed by the right key, version and input is returned as it is; the version is pinned."""
    made: list[bytes] = []

    def sign(data: bytes) -> dict[str, object]:
        made.append(_raw(data))
        return {"key_version": 2, "signature": _text(made[-1])}

    vault.otherwise = _signing(sign)
    vault.lies["transit/keys/carnet-prod"] = reply(200, {"data": _TRANSIT_KEY})
    assert TransitKeyStore(session).sign(_STORED.jwk, 2, b"a.b") == made[-1]
    signer = TransitKeyStore(session).signer(_STORED)
    assert signer.sign(b"c.d") == made[-1]
    asked = [received for received in vault.received if received.path.startswith("transit/sign/")]
    assert {"transit/sign/carnet-prod/sha2-256"} == {received.path for received in asked}
    assert {(2, "jws", False)} == {
        (one.data["key_version"], one.data["marshaling_algorithm"], one.data["prehashed"]) for one in asked
    }


def test_signer_of_a_transit_that_signs_wrongly_is_none(vault: LyingVault, session: VaultSession):
    """A key is proven before it is used: where the proof fails there is no signer."""
    vault.lies["transit/keys/carnet-prod"] = reply(200, {"data": _TRANSIT_KEY})
    vault.otherwise = _signing(_WRONG_SIGNATURES["by another key"])
    _fails(session, _OPERATIONS["load from Transit"])


@pytest.mark.parametrize(
    "change",
    [
        {"type": "rsa-2048"},
        {"exportable": True},
        {"exportable": None},
        {"allow_plaintext_backup": True},
        {"latest_version": "2"},
        {"latest_version": True},
        {"latest_version": -1},
        {"latest_version": 7},
        {"min_encryption_version": None},
        {"keys": None},
        {"keys": {"two": {"public_key": _PEM}}},
        {"keys": {"\u0662": {"public_key": _PEM}}},
        {"keys": {"2": 1700000000}},
        {"keys": {"2": {"public_key": 7}}},
        {"keys": {"2": {"public_key": "x"}}},
        {"keys": {"2": {"public_key": "\u00e9"}}},
    ],
    ids=str,
)
def test_transit_key_that_makes_no_sense_is_refused(
    vault: LyingVault, session: VaultSession, change: dict[str, object]
):
    """A key of which anything is not as it must be gives no new key."""
    vault.lies["transit/keys/carnet-prod/rotate"] = reply(200, {"data": _TRANSIT_KEY | change})
    _fails(session, _OPERATIONS["create in Transit"])


def test_rotation_that_does_not_say_what_it_made(vault: LyingVault, session: VaultSession):
    """Older servers answer a rotation with nothing: the newest version is read, as a number."""
    keys = {str(version): {"public_key": _PEM} for version in range(1, 12)}
    described = {"data": _TRANSIT_KEY | {"latest_version": 11, "keys": keys}}
    vault.lies["transit/keys/carnet-prod/rotate"] = b"HTTP/1.1 204 No Content\r\n\r\n"
    vault.lies["transit/keys/carnet-prod"] = reply(200, described)
    assert StoredKey(_STORED.jwk, 11) == TransitKeyStore(session).create()


def test_limits_that_another_client_undoes_end_in_an_error(vault: LyingVault, session: VaultSession):
    """Trimming is tried a few times, each from a fresh look, and then given up with an error."""
    vault.lies["transit/keys/carnet-prod"] = reply(200, {"data": _TRANSIT_KEY | {"latest_version": 9}})
    vault.lies["transit/keys/carnet-prod/config"] = reply(200, {})
    vault.lies["transit/keys/carnet-prod/trim"] = reply(400, {"errors": ["x"]})
    assert "another client" in str(_fails(session, _OPERATIONS["destroy in Transit"]))
    vault.lies["transit/keys/carnet-prod/config"] = reply(400, {"errors": ["x"]})
    assert "another client" in str(_fails(session, _OPERATIONS["destroy in Transit"]))


def test_lost_race_of_transit_is_tried_again_and_given_up_in_the_end(vault: LyingVault, session: VaultSession):
    """OpenBao's answer to a lost race is not the end; if it does not stop, it is an error like others."""
    answers = [reply(500, {"errors": ["1 error occurred:\n\t* transaction commit failed\n\n"]})] * 2
    answers.append(reply(200, {"data": _TRANSIT_KEY}))

    def race(_: Received, send: Callable[[bytes], None]) -> None:
        send(answers.pop(0) if len(answers) > 1 else answers[0])

    vault.lies["transit/keys/carnet-prod/rotate"] = race
    assert _STORED == TransitKeyStore(session).create()
    answers[:] = [reply(500, {"errors": ["transaction commit failed"]})]
    with pytest.raises(KeyStoreUnavailableError, match="HTTP 500"):
        TransitKeyStore(session).create()


# -- a KV that lies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    ["2026-13-01T00:00:00Z", "2026-01-01T00:00:00", "2026-01-01T00:00:00+02:00", "2026-01-01 00:00:00Z", "", None, 7],
)
def test_time_that_is_none_is_refused(vault: LyingVault, session: VaultSession, written: object):
    """The time of an entry is aware UTC (RFC 3339), or the entry makes no sense."""
    vault.otherwise = reply(200, {"data": {"data": {"document": "{}"}, "metadata": {"version": 1}}})
    metadata = {"version": 1, "created_time": written}
    vault.otherwise = reply(200, {"data": {"data": {"document": "{}"}, "metadata": metadata}})
    _fails(session, _OPERATIONS["read the keyring"])


@pytest.mark.parametrize("fraction", ["", ".1", ".123456789"])
def test_time_is_read_in_every_length(vault: LyingVault, session: VaultSession, fraction: str):
    """Vault writes as many digits of a second as it needs."""
    metadata = {"version": 1, "created_time": f"2026-01-01T00:00:00{fraction}Z"}
    vault.otherwise = reply(200, {"data": {"data": {"document": "{}"}, "metadata": metadata}})
    assert VaultKeyringDocument(session).load() is not None


def test_metadata_that_make_no_sense_are_refused(vault: LyingVault, session: VaultSession):
    """Whether a keyring was ever written is read from its metadata, or is not known."""
    for data in (None, [], {}, {"current_version": "0", "cas_required": True}, {"current_version": None}):
        vault.lies["carnet/metadata/prod/keyring"] = reply(200, {"data": data})
        assert "makes no sense" in str(_fails(session, _OPERATIONS["read the keyring"]))
    vault.lies["carnet/metadata/prod/keyring"] = reply(200, {"data": {"current_version": 0, "cas_required": True}})
    assert VaultKeyringDocument(session).load() is None


def test_keyring_that_is_written_between_two_looks_is_read(vault: LyingVault, session: VaultSession):
    """Another replica may write the first keyring after we found none, and before we look at its metadata."""
    answers = [reply(404, {"errors": []}), _GOOD]
    vault.lies["carnet/metadata/prod/keyring"] = reply(200, {"data": {"current_version": 1, "cas_required": True}})
    vault.lies["carnet/data/prod/keyring"] = lambda _, send: send(answers.pop(0))
    loaded = VaultKeyringDocument(session).load()
    assert loaded is not None
    assert 1 == loaded.version


def test_new_key_that_is_there_already_is_refused(vault: LyingVault, session: VaultSession):
    """A key of 256 random bits that Vault claims to hold already is a lie, and not taken for a lost race."""
    words = "check-and-set parameter did not match the current version"
    vault.otherwise = reply(400, {"errors": [words]})
    with pytest.raises(KeyStoreUnavailableError, match="is there already"):
        KvKeyStore(session).create()


def test_door_that_cannot_be_listed_is_passed_over(vault: LyingVault, session: VaultSession):
    """Whoever stuffs one door stops neither the other nor the broker, and it can be seen."""
    request_id = "0edbb4bb-d97f-4a40-94c0-57d6413e7513"
    kind = {"data": {"data": {"kind": "rotate-now"}, "metadata": _METADATA}}
    vault.lies["carnet/metadata/prod/requests"] = reply(200, {"data": {"keys": ["x" * 36] * 300_000}})
    vault.lies["carnet/metadata/prod/breakglass"] = reply(200, {"data": {"keys": [request_id]}})
    vault.lies[f"carnet/data/prod/breakglass/{request_id}"] = reply(200, kind)
    box = VaultRotationRequests(session)
    assert [request_id] == [request.request_id for request in box.pending()]
    assert frozenset({"requests"}) == box.overfull
    assert 0 == box.sweep(before=datetime(2030, 1, 1, tzinfo=UTC))
    vault.lies["carnet/metadata/prod/requests"] = reply(404, {"errors": []})
    box.pending()
    assert frozenset() == box.overfull


def test_result_that_others_write_all_the_time_is_tried_again_later(vault: LyingVault, session: VaultSession):
    """A broker that loses the race for a result again and again gives up for this round, with an error."""
    request_id = "0edbb4bb-d97f-4a40-94c0-57d6413e7513"
    request = RotationRequest(request_id, RequestKind.ROTATE, datetime(2026, 1, 1, tzinfo=UTC), breakglass=False)
    vault.lies[f"carnet/data/prod/results/{request_id}"] = lambda received, send: send(
        reply(404, {"errors": []})
        if received.method == "GET"
        else reply(400, {"errors": ["check-and-set parameter did not match the current version"]})
    )
    with pytest.raises(KeyStoreUnavailableError, match="several brokers"):
        VaultRotationRequests(session).answer(request, RequestResult(RequestStatus.DONE, "ROTATED", "x"))


# -- connections ------------------------------------------------------------------------------------------------------


def test_connection_that_was_idle_for_long_is_not_used_again(
    vault: LyingVault, session: VaultSession, monkeypatch: pytest.MonkeyPatch
):
    """What stands between may have forgotten a silent connection: a new one is opened."""
    vault.otherwise = _GOOD
    document = VaultKeyringDocument(session)
    document.load()
    first = session._transport._idle[0]
    document.load()
    assert [first] == session._transport._idle
    monkeypatch.setattr(transport, "_IDLE_SECONDS", 0.0)
    document.load()
    assert first not in session._transport._idle


def test_no_more_connections_are_kept_than_a_few(vault: LyingVault, session: VaultSession):
    """Twenty threads at once open twenty connections, and eight are kept."""
    barrier = threading.Barrier(20, timeout=5)

    def together(_: Received, send: Callable[[bytes], None]) -> None:
        barrier.wait()
        send(_GOOD)

    session.check()
    vault.otherwise = together
    threads = [threading.Thread(target=VaultKeyringDocument(session).load) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 8 == len(session._transport._idle)


# -- a login that lies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        *(answer for name, answer in _WRONG_BODIES.items() if name != "a large body"),
        LyingVault.login(token=""),
        LyingVault.login(token="two words"),
        LyingVault.login(token="a\r\nX-Injected: yes"),
        LyingVault.login(token="\u00e9"),
        LyingVault.login(life="3600"),
        LyingVault.login(life=-1),
        LyingVault.login(life=True),
        LyingVault.login(life=None),
        reply(200, {"auth": None}),
        reply(200, {"auth": {"client_token": 7, "lease_duration": 1}}),
        reply(500, {"errors": ["canary"]}),
        reply(503, {"errors": ["Vault is sealed"]}),
        reply(307, b"", headers={"Location": "http://127.0.0.1:1/"}),
    ],
    ids=lambda answer: repr(answer[-60:]),
)
def test_k06_login_that_makes_no_sense(vault: LyingVault, session: VaultSession, answer: bytes):
    """No login comes of an answer that is none, and no request is made with what it named as a token."""
    vault.lies["auth/approle/login"] = once(answer)
    _fails(session, _OPERATIONS["read the keyring"])
    assert {"auth/approle/login"} == {received.path for received in vault.received}


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_k06_login_that_is_refused_says_so(vault: LyingVault, session: VaultSession, status: int):
    """A refused login is told apart from a Vault that is down: it is the AppRole that must be looked at."""
    vault.lies["auth/approle/login"] = reply(status, {"errors": ["invalid role or secret ID"]})
    error = _fails(session, _OPERATIONS["read the keyring"])
    assert isinstance(error, VaultLoginError)
    assert "check the role id and the secret id" in str(error)


def test_k06_failing_logins_do_not_flood_vault(vault: LyingVault, session: VaultSession):
    """A broker that is asked to sign all the time tries to log in twice a second, and answers the rest at once."""
    vault.lies["auth/approle/login"] = reply(400, {"errors": ["invalid role or secret ID"]})
    errors = {str(_fails(session, _OPERATIONS["sign with Transit"])) for _ in range(200)}
    assert 1 == len(errors)
    assert len(vault.received) <= 3


def test_k06_forbidden_is_asked_again_once_with_a_new_login(vault: LyingVault, session: VaultSession):
    """A 403 may be a dead token: one new login is tried, and after it did not help no other for a while."""
    vault.otherwise = reply(403, {"errors": ["permission denied"]})
    error = _fails(session, _OPERATIONS["read the keyring"])
    assert isinstance(error, VaultForbiddenError)
    logins = [received for received in vault.received if received.path == "auth/approle/login"]
    assert (2, 4) == (len(logins), len(vault.received))
    for _ in range(20):
        _fails(session, _OPERATIONS["read the keyring"])
    assert 2 == len([received for received in vault.received if received.path == "auth/approle/login"])
