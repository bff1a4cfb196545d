"""Vault (HashiCorp Vault or OpenBao): where the private keys, the keyring and the letter box of CI are."""

from __future__ import annotations

from carnet_broker.edges.vault.ci import RotationClient
from carnet_broker.edges.vault.documents import VaultKeyringDocument
from carnet_broker.edges.vault.kv_store import KvKeyStore
from carnet_broker.edges.vault.requests import VaultRotationRequests
from carnet_broker.edges.vault.session import (
    VaultForbiddenError,
    VaultLoginError,
    VaultNotTrustedError,
    VaultSession,
)
from carnet_broker.edges.vault.settings import (
    SecretFile,
    SecretValue,
    VaultSettingError,
    VaultSettings,
)
from carnet_broker.edges.vault.transit_store import TransitKeyStore

__all__ = [
    "KvKeyStore",
    "RotationClient",
    "SecretFile",
    "SecretValue",
    "TransitKeyStore",
    "VaultForbiddenError",
    "VaultKeyringDocument",
    "VaultLoginError",
    "VaultNotTrustedError",
    "VaultRotationRequests",
    "VaultSession",
    "VaultSettingError",
    "VaultSettings",
]
