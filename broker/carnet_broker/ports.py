"""The ports of the broker: what the inside asks of the outside world. At most three methods each.

Every port has one contract suite in ``tests/contract`` that each implementation runs, fakes included.
Implementations are synchronous and thread-safe; they live in ``carnet_broker.edges`` and never import each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from carnet.errors import CarnetError
from carnet.jwk import PublicJWK
from carnet_broker.core.ledger import IssueRecord, RefusalRecord
from carnet_broker.core.requests import RequestKind, RequestResult, RequestStatus, RotationRequest

__all__ = [
    "AuditSink",
    "AuditUnavailableError",
    "Clock",
    "DocumentConflictError",
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


class AuditUnavailableError(CarnetError):
    """A record could not be made durable, so nothing may be issued."""

    code = "AUDIT_UNAVAILABLE"
    retryable = True


class Clock(Protocol):
    """The two clocks of the outermost edge; below it, times are arguments."""

    def now(self) -> datetime:
        """Return the wall time, aware UTC."""

    def mono(self) -> float:
        """Return monotonic seconds; it does not go back, and may stand still while the machine sleeps."""


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


class AuditSink(Protocol):
    """Where every issue and every refusal is recorded before the caller hears of it."""

    def issue(self, records: Sequence[IssueRecord]) -> None:
        """Make the intents to issue durable before returning: those of one call together, which costs what one costs.

        Raises `AuditUnavailableError`; then nothing is issued, although some of the intents may stand in the record.
        """

    def refusal(self, record: RefusalRecord) -> None:
        """Record a refusal; it may be dropped and counted, never raises, and never takes the space of an issue."""

    def close(self) -> None:
        """Write out what is held, and release the file."""
