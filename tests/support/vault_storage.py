"""What is in a Vault: all of its storage as it is, and the part that a bootstrap makes in a form that two can share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import requests
from cryptography import x509

from bootstrap_vault import Mounts
from carnet_broker.demo.openbao import OpenBao

__all__ = ["OpenStorage", "all_storage", "bootstrapped_state"]

_UNREADABLE = {"core/cluster/local/info", "core/hsm/barrier-unseal-keys", "core/keyring"}
# As it is stored: what happens to begin like compressed data is not taken for it.
_AS_STORED = {"encoding": "base64", "compressed": "false"}
_CHANGES_BY_ITSELF = {
    *("creation_time", "created_time", "updated_time", "modified", "keys", "accessor", "uuid"),
    *("version", "current_metadata_version"),
}


class OpenStorage(OpenBao):
    """An OpenBao that shows its storage, decrypted, to the root token."""

    def _write_config(self) -> None:
        super()._write_config()
        file = self.directory / "openbao.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"raw_storage_endpoint": True}))


def all_storage(server: OpenStorage) -> dict[str, str]:
    """Every entry in the storage of `server`, but for three of its own that it shows to nobody."""
    session = requests.Session()
    session.trust_env = False
    session.headers["X-Vault-Token"] = server.root_token

    def walk(folder: str) -> Iterator[str]:
        answer = session.request("LIST", f"{server.address}/v1/sys/raw/{folder}", timeout=10)
        for name in answer.json()["data"]["keys"]:
            yield from walk(folder + name) if name.endswith("/") else [folder + name]

    entries = {}
    for path in set(walk("")) - _UNREADABLE:
        answer = session.get(f"{server.address}/v1/sys/raw/{path}", params=_AS_STORED, timeout=10)
        answer.raise_for_status()
        entries[path] = answer.json()["data"]["value"]
    return entries


def bootstrapped_state(server: OpenBao, mounts: Mounts, environment: str) -> dict[str, Any]:
    """All that a bootstrap makes, without what differs between two (keys, times, the names of mounts).

    Things that should be there once are counted.
    """
    client = server.client()

    def data(path: str) -> dict[str, Any]:
        answer = client.read(path)
        assert isinstance(answer, dict), path
        found: dict[str, Any] = answer["data"]
        return found

    def read(path: str) -> dict[str, Any]:
        return {key: value for key, value in data(path).items() if key not in _CHANGES_BY_ITSELF}

    def names(path: str) -> list[str]:
        answer = client.list(path)
        return list(answer["data"]["keys"]) if isinstance(answer, dict) else []

    def certificate(path: str) -> x509.Certificate:
        return x509.load_pem_x509_certificate(data(path)["certificate"].encode())

    root, intermediate = (certificate(f"{mount}/issuer/default") for mount in (mounts.pki, mounts.pki_int))
    intermediate.verify_directly_issued_by(root)
    state: dict[str, Any] = {
        "root": root.subject.rfc4514_string(),
        "intermediate": intermediate.subject.rfc4514_string(),
        "intermediate constraints": intermediate.extensions.get_extension_for_class(x509.BasicConstraints).value,
        "transit versions": len(data(f"{mounts.transit}/keys/carnet-{environment}")["keys"]),
    }
    for mount in (mounts.pki, mounts.pki_int):
        label = "root" if mount == mounts.pki else "intermediate"
        for kind in ("issuers", "keys", "certs"):
            state[f"{label} {kind}"] = len(names(f"{mount}/{kind}"))
    for role in names(f"{mounts.pki_int}/roles"):
        state[f"pki role {role}"] = read(f"{mounts.pki_int}/roles/{role}")
    paths = {
        "mounts": [f"sys/mounts/{m}/tune" for m in (mounts.pki, mounts.pki_int, mounts.kv, mounts.transit)],
        "auth": [f"sys/auth/{mounts.approle}/tune"],
        "crl": [f"{mounts.pki}/config/crl", f"{mounts.pki_int}/config/crl", f"{mounts.pki_int}/config/auto-tidy"],
        "keyring": [f"{mounts.kv}/metadata/{environment}/keyring"],
        "transit": [f"{mounts.transit}/keys/carnet-{environment}"],
    }
    for role in ("broker", "ci", "breakglass"):
        name = f"carnet-{role}-{environment}"
        paths[role] = [f"sys/policies/acl/{name}", f"auth/{mounts.approle}/role/{name}"]
        state[f"{role} secret ids"] = len(names(f"auth/{mounts.approle}/role/{name}/secret-id"))
    state |= {label: [read(path) for path in listed] for label, listed in paths.items()}
    text = json.dumps(state, default=str, sort_keys=True)
    own = {mounts.kv: "KV", mounts.transit: "TRANSIT", mounts.approle: "APPROLE", environment: "ENVIRONMENT"}
    for name, label in own.items():
        text = text.replace(name, label)
    result: dict[str, Any] = json.loads(text)
    return result
