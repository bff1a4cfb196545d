"""Private keys in Transit: each is one version of one named key, is made in Vault, and never leaves it.

The version that the keyring names is pinned in every request. No answer is believed: its version and its signature are
checked with the public key before it goes anywhere.
"""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import load_pem_public_key

from carnet.encoding import decode_base64url
from carnet.errors import InvalidKeySetError
from carnet.jwk import PublicJWK
from carnet_broker.edges.vault.failures import LOST_RACE, has_phrase
from carnet_broker.edges.vault.kv_store import ES256, SELF_TEST
from carnet_broker.edges.vault.session import Reply, VaultSession
from carnet_broker.ports import KeyLostError, StoredKey

__all__ = ["TransitKeyStore", "TransitSigner"]

_SIGNATURE_BYTES: Final = 64
_TRIES: Final = 6
_PAUSE: Final = 0.03
"""Seconds, times the number of the try: the longest wait after a lost race."""


@dataclass(frozen=True, slots=True)
class _Versions:
    """What Transit says of the named key."""

    latest: int
    min_available: int
    min_decryption: int
    min_encryption: int
    public_keys: Mapping[int, str]

    @classmethod
    def parse(cls, data: object) -> _Versions:
        """Read the answer, or raise `ValueError`. Versions are texts there, and "9" sorts after "10": here numbers."""
        if not isinstance(data, dict) or not isinstance(data.get("keys"), dict):
            msg = "it is no Transit key"
            raise ValueError(msg)  # noqa: TRY004 - one error for one kind of fault
        if data.get("type") != "ecdsa-p256":
            msg = "the Transit key is not of type ecdsa-p256"
            raise ValueError(msg)
        if data.get("exportable") is not False or data.get("allow_plaintext_backup") is not False:
            msg = "the Transit key may leave Vault (exportable or allow_plaintext_backup): make another"
            raise ValueError(msg)
        public_keys: dict[int, str] = {}
        for version, entry in data["keys"].items():
            pem = entry.get("public_key") if isinstance(entry, dict) else None
            if not (version.isascii() and version.isdecimal() and isinstance(pem, str)):
                msg = "a version of the Transit key has no number or no public key"
                raise ValueError(msg)
            public_keys[int(version)] = pem
        return cls(
            latest=_whole(data, "latest_version"),
            min_available=_whole(data, "min_available_version"),
            min_decryption=_whole(data, "min_decryption_version"),
            min_encryption=_whole(data, "min_encryption_version"),
            public_keys=public_keys,
        )

    def jwk(self, version: int) -> PublicJWK | None:
        """Return the public key of `version`, None where there is none. Raises `ValueError` for what is not P-256."""
        pem = self.public_keys.get(version)
        if pem is None:
            return None
        try:
            return PublicJWK.of(load_pem_public_key(pem.encode("ascii", errors="replace")))
        except (ValueError, InvalidKeySetError):
            msg = f"version {version} of the Transit key has no P-256 public key"
            raise ValueError(msg) from None


def _whole(data: dict[str, Any], name: str) -> int:
    number = data.get(name)
    if type(number) is not int or number < 0:
        msg = f"{name} of the Transit key is not a number"
        raise ValueError(msg)
    return number


class TransitSigner:
    """Signs with one version of the key in Vault. Thread-safe."""

    def __init__(self, store: TransitKeyStore, jwk: PublicJWK, version: int) -> None:
        self._store = store
        self._jwk = jwk
        self._version = version

    def __repr__(self) -> str:
        return f"TransitSigner({self.kid!r}, version={self._version})"

    @property
    def kid(self) -> str:
        """The RFC 7638 thumbprint of the key."""
        return self._jwk.kid

    def sign(self, signing_input: bytes) -> bytes:
        """Return the ES256 signature, 64 bytes, that Vault made and that is good. Raises `KeyStoreUnavailableError`."""
        return self._store.sign(self._jwk, self._version, signing_input)


class TransitKeyStore:
    """The key store in Transit. Thread-safe."""

    def __init__(self, session: VaultSession) -> None:
        self._session = session
        self._mount = session.settings.transit_mount
        self._key = session.settings.transit_key

    def create(self) -> StoredKey:
        """Rotate the named key, and return its new version. Raises `KeyStoreUnavailableError`.

        A rotation answers with the newest version, not with the one that it made: of two at the same time both may
        return the later one. That is safe, for the keyring takes a key once, and the earlier one is never named.
        """
        operation = "rotate the Transit key"
        data = self._write(operation, "rotate", {}).body.get("data")
        versions = self._read() if data is None else self._parse(operation, data)
        jwk = self._public_key(operation, versions, versions.latest)
        if jwk is None:
            self._session.senseless(operation, "the newest version has no public key")
        return StoredKey(jwk, versions.latest)

    def signer(self, key: StoredKey) -> TransitSigner:
        """Prove that the version of `key` is in Vault, is that key and signs, and return its signer.

        Raises `KeyLostError` where it is gone, may not sign any more or is another key, and
        `KeyStoreUnavailableError`.
        """
        operation = "read the Transit key"
        versions = self._read()
        version = key.version
        found = None if version is None else self._public_key(operation, versions, version)
        if version is None or found is None or version < versions.min_encryption:
            msg = (
                f"version {version} of the Transit key {self._key} is not in Vault any more: key {key.jwk.kid} is lost"
            )
            raise KeyLostError(msg)
        if found != key.jwk:
            msg = f"version {version} of the Transit key {self._key} is key {found.kid}, and not {key.jwk.kid}"
            raise KeyLostError(msg)
        signer = TransitSigner(self, found, version)
        signer.sign(SELF_TEST)
        return signer

    def destroy(self, key: StoredKey, *, live: Sequence[StoredKey]) -> None:
        """Trim `key` and every older version that is not needed; what was trimmed before is fine.

        Transit drops versions from the oldest on only. So a key that is newer than one of `live` stays in Vault, named
        by nobody, and goes with the next key that is destroyed after those ended. `live` may be out of date: the oldest
        live version only ever grows, so an old list trims less.

        Raises `ValueError` for a key that is among `live` or has no version, and `KeyStoreUnavailableError`.
        """
        if key.version is None or any(key.version == other.version for other in live):
            msg = f"version {key.version} of the Transit key is in use, or is none: it is not destroyed"
            raise ValueError(msg)
        oldest = min((other.version for other in live if other.version is not None), default=key.version + 1)
        for _ in range(_TRIES):
            versions = self._read()
            if versions.min_available >= oldest:
                return
            if versions.latest < oldest:  # One version always stays: let it be one that nobody has signed with.
                self.create()
                continue
            if self._trim(versions, oldest):
                return
        # Somebody else moves the same limits, in steps that undo each other.
        operation = f"trim the Transit key to version {oldest}"
        self._session.senseless(operation, "another client changes its limits at the same time")

    def sign(self, jwk: PublicJWK, version: int, signing_input: bytes) -> bytes:
        """Return the signature of `version`, checked with `jwk`. Raises `KeyStoreUnavailableError`."""
        operation = f"sign with version {version} of the Transit key"
        body = {
            "input": base64.b64encode(signing_input).decode("ascii"),
            "key_version": version,
            "marshaling_algorithm": "jws",
            "prehashed": False,
        }
        reply = self._session.call(operation, "POST", f"{self._mount}/sign/{self._key}/sha2-256", body)
        data = reply.body.get("data")
        if not isinstance(data, dict) or data.get("key_version", version) != version:
            self._session.senseless(operation, "it is signed with another version, or not at all")
        prefix = f"vault:v{version}:"
        text = data.get("signature")
        if not isinstance(text, str) or not text.startswith(prefix):
            self._session.senseless(operation, "the signature does not name the version that was asked for")
        try:
            signature = decode_base64url(text.removeprefix(prefix).encode("ascii", errors="replace"))
        except ValueError:
            signature = b""
        if len(signature) != _SIGNATURE_BYTES or not ES256.verify(signing_input, jwk.public_key, signature):
            self._session.senseless(operation, "the signature is not good for the public key of that version")
        return signature

    def _trim(self, versions: _Versions, oldest: int) -> bool:
        """Drop the versions before `oldest`. False if another client got in between: then look again."""
        limits = {
            "min_decryption_version": max(versions.min_decryption, oldest),
            "min_encryption_version": max(versions.min_encryption, oldest),
        }
        raised = self._write("raise the limits of the Transit key", "config", dict(limits), accept=(400,))
        if raised.status == 400:  # noqa: PLR2004
            return False
        least = {"min_available_version": oldest}
        return self._write("trim the Transit key", "trim", least, accept=(400,)).status != 400  # noqa: PLR2004

    def _write(self, operation: str, what: str, body: dict[str, Any], *, accept: tuple[int, ...] = ()) -> Reply:
        """Change the named key. Who loses a race against another replica tries again, for each change stands alone."""
        path = f"{self._mount}/keys/{self._key}/{what}"
        reply = self._session.call(operation, "POST", path, body, accept=(*accept, 500))
        for turn in range(1, _TRIES):
            if reply.status != 500 or not has_phrase(reply.body, LOST_RACE):  # noqa: PLR2004
                break
            time.sleep(random.uniform(0, turn * _PAUSE))  # noqa: S311 - keeps two replicas apart, no secret
            reply = self._session.call(operation, "POST", path, body, accept=(*accept, 500))
        if reply.status == 500:  # noqa: PLR2004
            self._session.refused(operation, path, reply)
        return reply

    def _read(self) -> _Versions:
        operation = "read the Transit key"
        reply = self._session.call(operation, "GET", f"{self._mount}/keys/{self._key}")
        return self._parse(operation, reply.body.get("data"))

    def _parse(self, operation: str, data: object) -> _Versions:
        try:
            return _Versions.parse(data)
        except ValueError as error:
            self._session.senseless(operation, str(error))

    def _public_key(self, operation: str, versions: _Versions, version: int) -> PublicJWK | None:
        try:
            return versions.jwk(version)
        except ValueError as error:
            self._session.senseless(operation, str(error))
