"""The ports of the broker: what the inside asks of the outside world. At most three methods each.

Every port has one contract suite in ``tests/contract`` that each implementation runs, fakes included.
Implementations are synchronous and thread-safe; they live in ``carnet_broker.edges`` and never import each other.
"""

from __future__ import annotations

from carnet_broker.ports.audit import AuditSink, AuditUnavailableError
from carnet_broker.ports.clock import Clock
from carnet_broker.ports.keys import (
    DocumentConflictError,
    KeptKeyring,
    KeyLostError,
    KeyringDocument,
    KeyStore,
    KeyStoreUnavailableError,
    RequestKind,
    RequestResult,
    RequestStatus,
    RotationRequest,
    RotationRequests,
    Signer,
    StoredKey,
    VersionedDocument,
)
from carnet_broker.ports.store import (
    Acknowledged,
    Appended,
    Joined,
    KeyringMirror,
    Left,
    LogPosition,
    MirroredKeyring,
    NewRevocation,
    ReplicaLeases,
    ReplicaReport,
    ReplicasSeen,
    RevocationLog,
    RevocationPage,
    Rollout,
    SessionChange,
    SessionOutcome,
    StoreUnavailableError,
    VerifierSessions,
    WaitingFor,
    Wakeups,
)

__all__ = [
    "Acknowledged",
    "Appended",
    "AuditSink",
    "AuditUnavailableError",
    "Clock",
    "DocumentConflictError",
    "Joined",
    "KeptKeyring",
    "KeyLostError",
    "KeyStore",
    "KeyStoreUnavailableError",
    "KeyringDocument",
    "KeyringMirror",
    "Left",
    "LogPosition",
    "MirroredKeyring",
    "NewRevocation",
    "ReplicaLeases",
    "ReplicaReport",
    "ReplicasSeen",
    "RequestKind",
    "RequestResult",
    "RequestStatus",
    "RevocationLog",
    "RevocationPage",
    "Rollout",
    "RotationRequest",
    "RotationRequests",
    "SessionChange",
    "SessionOutcome",
    "Signer",
    "StoreUnavailableError",
    "StoredKey",
    "VerifierSessions",
    "VersionedDocument",
    "WaitingFor",
    "Wakeups",
]
