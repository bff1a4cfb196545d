"""Private keys in KV: made and used in the memory of the broker, which goes on signing without Vault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from carnet.errors import InvalidKeySetError
from carnet.jwk import PublicJWK
from carnet_broker.edges.vault.kv import KvMount
from carnet_broker.edges.vault.session import VaultSession
from carnet_broker.ports import DocumentConflictError, KeyLostError, KeyStoreUnavailableError, StoredKey

__all__ = ["ES256", "SELF_TEST", "KvKeyStore", "KvSigner"]

ES256: Final = ECAlgorithm(ECAlgorithm.SHA256)
SELF_TEST: Final = b"carnet self-test"
"""Signed to prove a key. No token begins like this: a signing input is base64url, and has a dot."""
_MEMBER: Final = "private_key"


class KvSigner:
    """Signs in this process. It never shows its key, and cannot be pickled or copied into another process."""

    __slots__ = ("_key", "_kid")

    def __init__(self, kid: str, key: ec.EllipticCurvePrivateKey) -> None:
        self._kid = kid
        self._key = key

    def __repr__(self) -> str:
        return f"KvSigner({self._kid!r})"

    def __reduce__(self) -> NoReturn:
        msg = "a signer holds a private key, and is not pickled"
        raise TypeError(msg)

    @property
    def kid(self) -> str:
        """The RFC 7638 thumbprint of the key."""
        return self._kid

    def sign(self, signing_input: bytes) -> bytes:
        """Return the ES256 signature, 64 bytes. Needs no Vault."""
        return ES256.sign(signing_input, self._key)


class KvKeyStore:
    """The key store in KV version 2, at ``keys/KID``. Thread-safe."""

    def __init__(self, session: VaultSession) -> None:
        self._kv = KvMount(session)

    def create(self) -> StoredKey:
        """Make a P-256 key, and write it once. Raises `KeyStoreUnavailableError`.

        A key that was written without our hearing of it is named by nobody, and signs nothing.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        jwk = PublicJWK.of(key.public_key())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            self._kv.write(_name(jwk.kid), _what(jwk.kid), {_MEMBER: pem.decode("ascii")}, expected_version=0)
        except DocumentConflictError as error:
            msg = f"Vault says that the new key {jwk.kid} is there already"
            raise KeyStoreUnavailableError(msg) from error
        return StoredKey(jwk)

    def signer(self, key: StoredKey) -> KvSigner:
        """Read the private key of `key`, prove that it is that one, and return its signer.

        Raises `KeyLostError` where it is gone, is not P-256, or is another key than its name says, and
        `KeyStoreUnavailableError`.
        """
        kid = key.jwk.kid
        entry = self._kv.read(_name(kid), _what(kid))
        if entry is None or entry.data is None:
            msg = f"the private key of {kid} is not in Vault any more: it was deleted"
            raise KeyLostError(msg)
        private_key = _parse(kid, entry.data)
        signer = KvSigner(kid, private_key)
        # The kid is the digest of the public half. That the private half belongs to it is shown by signing.
        if not ES256.verify(SELF_TEST, key.jwk.public_key, signer.sign(SELF_TEST)):
            msg = f"what Vault holds as the private key of {kid} does not sign for it"
            raise KeyLostError(msg)
        return signer

    def destroy(self, key: StoredKey, *, live: Sequence[StoredKey]) -> None:
        """Destroy the private key with all versions of its entry; one that is gone is fine.

        Raises `ValueError` for a key that is among `live`, and `KeyStoreUnavailableError`.
        """
        if any(key.jwk == other.jwk for other in live):
            msg = f"key {key.jwk.kid} is in use, and is not destroyed"
            raise ValueError(msg)
        self._kv.destroy(_name(key.jwk.kid), _what(key.jwk.kid))


def _name(kid: str) -> str:
    return f"keys/{kid}"


def _what(kid: str) -> str:
    return f"the private key of {kid}"


def _parse(kid: str, data: dict[str, object]) -> ec.EllipticCurvePrivateKey:
    """Return the P-256 key in `data` whose thumbprint is `kid`, or raise `KeyLostError` that shows nothing of it."""
    text = data.get(_MEMBER)
    key: object = None
    if isinstance(text, str) and data.keys() == {_MEMBER}:
        try:
            key = serialization.load_pem_private_key(text.encode("ascii", errors="replace"), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        msg = f"what Vault holds as the private key of {kid} is not a private key in PEM"
        raise KeyLostError(msg)
    try:
        found = PublicJWK.of(key.public_key())
    except InvalidKeySetError as error:
        msg = f"what Vault holds as the private key of {kid} is not a P-256 key"
        raise KeyLostError(msg) from error
    if found.kid != kid:
        msg = f"what Vault holds as the private key of {kid} is another key, {found.kid}"
        raise KeyLostError(msg)
    return key
