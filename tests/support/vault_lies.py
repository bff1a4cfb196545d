"""What the tests of a lying Vault share: the operations that are tried, what is answered, and how each must fail."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.jwk import PublicJWK
from carnet_broker.edges.vault import (
    KvKeyStore,
    RotationClient,
    SecretValue,
    TransitKeyStore,
    VaultKeyringDocument,
    VaultRotationRequests,
    VaultSession,
    VaultSettings,
)
from carnet_broker.ports import (
    KeyStoreUnavailableError,
    RequestKind,
    StoredKey,
)
from support.lying_vault import LyingVault, reply

SECRET_ID = "canary-secret-id"
ROLE_ID = "canary-role-id"
TIMEOUT = 1.0
SLACK = 2.0
"""Seconds that a busy machine may add; a call that is not bounded takes far longer."""
KEY = ec.generate_private_key(ec.SECP256R1())
STORED = StoredKey(PublicJWK.of(KEY.public_key()), 2)
PEM = (
    KEY.public_key()
    .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    .decode("ascii")
)
TRANSIT_KEY = {
    "type": "ecdsa-p256",
    "exportable": False,
    "allow_plaintext_backup": False,
    "latest_version": 2,
    "min_available_version": 0,
    "min_decryption_version": 1,
    "min_encryption_version": 0,
    "keys": {"1": {"public_key": PEM}, "2": {"public_key": PEM}},
}

OPERATIONS: dict[str, Callable[[VaultSession], object]] = {
    "read the keyring": lambda session: VaultKeyringDocument(session).load(),
    "write the keyring": lambda session: VaultKeyringDocument(session).replace({}, expected_version=0),
    "create in KV": lambda session: KvKeyStore(session).create(),
    "sign with KV": lambda session: KvKeyStore(session).signer(STORED),
    "destroy in KV": lambda session: KvKeyStore(session).destroy(STORED, live=[]),
    "create in Transit": lambda session: TransitKeyStore(session).create(),
    "load from Transit": lambda session: TransitKeyStore(session).signer(STORED),
    "sign with Transit": lambda session: TransitKeyStore(session).sign(STORED.jwk, 2, b"a.b"),
    "destroy in Transit": lambda session: TransitKeyStore(session).destroy(STORED, live=[]),
    "list requests": lambda session: VaultRotationRequests(session).pending(),
    "sweep": lambda session: VaultRotationRequests(session).sweep(before=datetime(2030, 1, 1, tzinfo=UTC)),
    "ask": lambda session: RotationClient(session).submit(RequestKind.ROTATE),
    "read a result": lambda session: RotationClient(session).result("x"),
    "read the keyring as CI": lambda session: RotationClient(session).keyring(),
}


def settings_for(vault: LyingVault, **changes: Any) -> VaultSettings:  # noqa: ANN401 - any field
    """Return the settings of a broker at `vault`, with a short timeout and secrets that must not be seen."""
    settings = VaultSettings(
        address=vault.address,
        environment="prod",
        role_id=SecretValue("VAULT_ROLE_ID", ROLE_ID),
        secret_id=SecretValue("VAULT_SECRET_ID", SECRET_ID),
        timeout=timedelta(seconds=TIMEOUT),
    )
    return replace(settings, **changes)


def fails(session: VaultSession, operation: Callable[[VaultSession], object]) -> KeyStoreUnavailableError:
    """Return the error of `operation`, which came in time and shows no secret in any of its texts."""
    started = time.monotonic()
    with pytest.raises(KeyStoreUnavailableError) as caught:
        operation(session)
    assert time.monotonic() - started < TIMEOUT + SLACK
    check_no_secret(caught.value)
    assert session.settings.address in str(caught.value)
    return caught.value


def check_no_secret(error: BaseException) -> None:
    """Hold every text of `error`, and of what caused it, against the secrets that were sent and answered."""
    texts = "".join(traceback.format_exception(error)) + repr(error) + str(error)
    assert "canary" not in re.sub(r'File ".*"', "", texts)


METADATA = {"version": 1, "created_time": "2026-01-01T00:00:00.123456789Z"}
GOOD = reply(200, {"data": {"data": {"document": "{}"}, "metadata": METADATA}})


WRONG_BODIES = {
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
