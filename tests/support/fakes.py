"""Vault's ports in memory, with switches for what goes wrong: fast parts for tests of what is built on them.

They run the same contract suites as the real ones (`tests/contract`). The keys and signatures are real.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from carnet.jwk import PublicJWK
from carnet_broker.edges.vault.kv_store import KvSigner
from carnet_broker.ports import (
    DocumentConflictError,
    KeyLostError,
    KeyStoreUnavailableError,
    RequestKind,
    RequestResult,
    RequestStatus,
    RotationRequest,
    StoredKey,
    VersionedDocument,
)

__all__ = ["FakeKeyStore", "FakeKeyringDocument", "FakeRotationRequests", "Faults"]


@dataclass
class Faults:
    """What goes wrong now. One object may be shared by all fakes, like one Vault is.

    Calls are named ``create signer sign destroy load replace pending answer sweep``.
    """

    down: bool = False
    """Every call fails, and has no effect."""
    failing: set[str] = field(default_factory=set)
    """Calls that fail, and have no effect."""
    losing: set[str] = field(default_factory=set)
    """Calls that take effect, and whose answer is lost."""
    calls: list[str] = field(default_factory=list)
    """Every call so far, failed ones too."""

    @contextmanager
    def during(self, call: str) -> Iterator[None]:
        """Surround the effect of `call`."""
        self.calls.append(call)
        if self.down or call in self.failing:
            msg = f"Vault is made to fail ({call})"
            raise KeyStoreUnavailableError(msg)
        yield
        if call in self.losing:
            msg = f"the answer of Vault is made to be lost ({call})"
            raise KeyStoreUnavailableError(msg)


class _FakeSigner:
    """Signs with a key that stays in the store, as Transit does: not without it, and not after its end."""

    def __init__(self, store: FakeKeyStore, key: StoredKey) -> None:
        self._store = store
        self._key = key

    @property
    def kid(self) -> str:
        return self._key.jwk.kid

    def sign(self, signing_input: bytes) -> bytes:
        with self._store.faults.during("sign"):
            private_key = self._store.keys.get(self.kid)
            if private_key is None:
                msg = f"key {self.kid} is gone"
                raise KeyStoreUnavailableError(msg)
            return KvSigner(self.kid, private_key).sign(signing_input)


class FakeKeyStore:
    """A key store. `versioned` makes it like Transit: keys have versions, and none signs without the store."""

    def __init__(self, faults: Faults | None = None, *, versioned: bool = False) -> None:
        self.faults = faults or Faults()
        self.keys: dict[str, ec.EllipticCurvePrivateKey] = {}
        self._versioned = versioned
        self.versions: dict[str, int | None] = {}
        self._lock = threading.Lock()

    def create(self) -> StoredKey:
        """Make a new key."""
        with self._lock, self.faults.during("create"):
            key = ec.generate_private_key(ec.SECP256R1())
            jwk = PublicJWK.of(key.public_key())
            self.keys[jwk.kid] = key
            self.versions[jwk.kid] = len(self.versions) + 1 if self._versioned else None
            return StoredKey(jwk, self.versions[jwk.kid])

    def signer(self, key: StoredKey) -> _FakeSigner | KvSigner:
        """Return the signer of `key`."""
        with self.faults.during("signer"):
            private_key = self.keys.get(key.jwk.kid)
            if private_key is None or self.versions[key.jwk.kid] != key.version:
                msg = f"key {key.jwk.kid} is gone, or is another"
                raise KeyLostError(msg)
            return _FakeSigner(self, key) if self._versioned else KvSigner(key.jwk.kid, private_key)

    def destroy(self, key: StoredKey, *, live: Sequence[StoredKey]) -> None:
        """Destroy `key`."""
        if any(key.jwk == other.jwk for other in live):
            msg = f"key {key.jwk.kid} is in use"
            raise ValueError(msg)
        with self.faults.during("destroy"):
            self.keys.pop(key.jwk.kid, None)


class FakeKeyringDocument:
    """The keyring document, with everything that was ever written."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.written: list[str] = []
        self.deleted = False
        self._lock = threading.Lock()

    def load(self) -> VersionedDocument | None:
        """Return the newest version."""
        with self._lock, self.faults.during("load"):
            if self.deleted:
                msg = "the keyring document was deleted"
                raise KeyStoreUnavailableError(msg)
            if not self.written:
                return None
            return VersionedDocument(json.loads(self.written[-1]), len(self.written))

    def replace(self, content: dict[str, Any], *, expected_version: int) -> int:
        """Write the next version."""
        with self._lock, self.faults.during("replace"):
            if expected_version != len(self.written):
                msg = f"the document is no longer version {expected_version}"
                raise DocumentConflictError(msg)
            self.written.append(json.dumps(content))
            return len(self.written)


class FakeRotationRequests:
    """The letter box. `clock` is Vault's: it gives each request the time at which it was made."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.requests: dict[str, RotationRequest] = {}
        self.results: dict[str, RequestResult] = {}
        self._last = datetime(2026, 1, 1, tzinfo=UTC)

    def submit(
        self,
        kind: RequestKind,
        kid: str | None = None,
        *,
        breakglass: bool = False,
        created_at: datetime | None = None,
    ) -> str:
        """Put a request into the box, as CI or breakglass does, and return its id."""
        self._last = created_at or self._last + timedelta(milliseconds=1)
        request_id = str(uuid.uuid4())
        self.requests[request_id] = RotationRequest(request_id, kind, self._last, breakglass, kid)
        return request_id

    def result(self, request_id: str) -> RequestResult | None:
        """Return the answer so far."""
        return self.results.get(request_id)

    def pending(self) -> Sequence[RotationRequest]:
        """Return the requests without a final answer."""
        with self.faults.during("pending"):
            found = [replace(one, result=self.results.get(name)) for name, one in self.requests.items()]
            return sorted(
                (one for one in found if one.result is None or one.result.status is RequestStatus.ACCEPTED),
                key=lambda one: one.created_at,
            )

    def answer(self, request: RotationRequest, result: RequestResult) -> None:
        """Write an answer, unless there is a final one."""
        with self.faults.during("answer"):
            known = self.results.get(request.request_id)
            if known is None or known.status is RequestStatus.ACCEPTED:
                self.results[request.request_id] = result

    def sweep(self, *, before: datetime) -> int:
        """Delete what was answered for good and made before `before`."""
        with self.faults.during("sweep"):
            old = [
                name
                for name, one in self.requests.items()
                if one.created_at < before
                and name in self.results
                and self.results[name].status is not RequestStatus.ACCEPTED
            ]
            for name in old:
                del self.requests[name], self.results[name]
            return len(old)
