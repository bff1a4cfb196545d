"""The ports to Vault: where the private keys live, the keyring document, and the letter box of CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from carnet.errors import CarnetError
from carnet.jwk import PublicJWK
from carnet_broker.core.keyring import Keyring
from carnet_broker.core.requests import RequestKind, RequestResult, RequestStatus, RotationRequest

__all__ = [
    "DocumentConflictError",
    "KeptKeyring",
    "KeyLostError",
    "KeyStore",
    "KeyStoreUnavailableError",
    "KeyringDocument",
    "RequestKind",
    "RequestResult",
    "RequestStatus",
    "RotationRequest",
    "RotationRequests",
    "Signer",
    "StoredKey",
    "VersionedDocument",
]


class KeyStoreUnavailableError(CarnetError):
    """Vault cannot be used now: down, sealed, slow, forbidding, or its answer makes no sense."""

    code = "KEY_STORE_UNAVAILABLE"
    retryable = True


class KeyLostError(CarnetError):
    """The private key behind a keyring entry is gone, or is not the one that the entry names."""

    code = "KEY_LOST"


class DocumentConflictError(CarnetError):
    """Somebody else replaced the keyring document first (check-and-set)."""

    code = "DOCUMENT_CONFLICT"
    retryable = True


@dataclass(frozen=True, slots=True)
class StoredKey:
    """One private key in a key store, by its public half. `version` is the Transit key version, None for KV."""

    jwk: PublicJWK
    version: int | None = None


class Signer(Protocol):
    """Signs with one private key."""

    @property
    def kid(self) -> str:
        """The RFC 7638 thumbprint of the key."""

    def sign(self, signing_input: bytes) -> bytes:
        """Return the 64-byte ES256 signature (RFC 7518 section 3.4), or raise `KeyStoreUnavailableError`."""


class KeyStore(Protocol):
    """Where the private signing keys live."""

    def create(self) -> StoredKey:
        """Make a new P-256 key. Raises `KeyStoreUnavailableError`."""

    def signer(self, key: StoredKey) -> Signer:
        """Return a signer whose key is proven to be `key`. Raises `KeyLostError` or `KeyStoreUnavailableError`."""

    def destroy(self, key: StoredKey, *, live: Sequence[StoredKey]) -> None:
        """Destroy the private key for good; done twice it does nothing. `live` are the keys that must go on working.

        Raises `KeyStoreUnavailableError`.
        """


@dataclass(frozen=True, slots=True)
class VersionedDocument:
    """The keyring document as it stands in Vault, with the version that check-and-set names."""

    content: dict[str, Any]
    version: int


class KeyringDocument(Protocol):
    """The one shared document that says which keys there are."""

    def load(self) -> VersionedDocument | None:
        """Return the current document, None where there is none yet. Raises `KeyStoreUnavailableError`."""

    def replace(self, content: dict[str, Any], *, expected_version: int) -> int:
        """Write the document if its version is still `expected_version` (0: there is none); return the new version.

        Raises `DocumentConflictError` or `KeyStoreUnavailableError`. After `KeyStoreUnavailableError` it is not known
        whether the write happened: load again.
        """


class KeptKeyring(Protocol):
    """The keyring that was in force here last, kept for the next start of this broker."""

    def keep(self, keyring: Keyring) -> None:
        """Keep `keyring` in place of what is there. Never raises."""

    def load(self) -> Keyring | None:
        """Return what was kept, None where nothing is there that can be relied on. Never raises."""


class RotationRequests(Protocol):
    """The letter box where CI asks for rotations, and the brokers answer."""

    def pending(self) -> Sequence[RotationRequest]:
        """Return the requests whose result is not final, oldest first. A request that cannot be read is skipped,
        answered as refused where possible, and never stops the others. Raises `KeyStoreUnavailableError`.
        """

    def answer(self, request: RotationRequest, result: RequestResult) -> None:
        """Write the result of `request`. Raises `KeyStoreUnavailableError`."""

    def sweep(self, *, before: datetime) -> int:
        """Delete requests, with their results, that were answered for good and made before `before`; say how many."""
