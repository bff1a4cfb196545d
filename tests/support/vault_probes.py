"""Every path and verb that a role in Vault might try, each as one probe with a name.

A probe is allowed if Vault does not answer 403: the policy lets it through, whatever becomes of it then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import requests

from bootstrap_vault import Mounts
from carnet_broker.demo.openbao import OpenBao

__all__ = ["EVERYBODY", "Probe", "Scene", "probes"]

EVERYBODY: Final = {
    "pki ca",
    "pki chain",
    "pki crl",
    "pki issuer",
    "pki cert",
    "sys health",
    "sys seal-status",
    "approle login",
}
"""What Vault tells, or lets, anybody without a token: public certificates, how it is, and logging in."""

_MERGE: Final = {"Content-Type": "application/merge-patch+json"}


@dataclass(frozen=True, slots=True)
class Probe:
    """One request."""

    name: str
    method: str
    path: str
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scene:
    """A bootstrapped place with something of each kind in it."""

    server: OpenBao
    mounts: Mounts
    environment: str

    def send(self, probe: Probe, token: str) -> requests.Response:
        """Send `probe` with `token`."""
        with requests.Session() as session:
            session.trust_env = False
            headers = {"X-Vault-Token": token, **probe.headers}
            url = f"{self.server.address}/v1/{probe.path}"
            return session.request(probe.method, url, json=probe.body, headers=headers, timeout=10)

    def reset(self) -> None:
        """Put one secret of each kind there, with one version, and take away what probes have made."""
        client, kv = self.server.client(), self.mounts.kv
        for folder in (f"{self.environment}/{area}" for area in ("keys", "requests", "breakglass", "results")):
            for name in ("old", "new"):
                client.delete(f"{kv}/metadata/{folder}/{name}")
            client.write_data(f"{kv}/data/{folder}/old", data={"data": {"kind": "rotate"}})
        client.delete(f"{kv}/metadata/{self.environment}/keyring")
        client.write_data(f"{kv}/metadata/{self.environment}/keyring", data={"cas_required": True})
        keyring = {"data": {"generation": 1}, "options": {"cas": 0}}
        client.write_data(f"{kv}/data/{self.environment}/keyring", data=keyring)


def _secret(kv: str, folder: str, area: str) -> Iterator[Probe]:
    """Everything that can be done to the secrets in one folder; `area` is what they are called."""
    old, new = ("keyring", "other") if area == "keyring" else (f"{area}/old", f"{area}/new")
    content = {"data": {"kind": "rotate"}, "options": {"cas": 0}}
    again = {"data": {"kind": "rotate"}, "options": {"cas": 1}}
    versions = {"versions": [1]}
    where = f"{folder}/{old}"
    yield Probe(f"{area} read", "GET", f"{kv}/data/{where}")
    yield Probe(f"{area} read version", "GET", f"{kv}/data/{where}?version=1")
    yield Probe(f"{area} read subkeys", "GET", f"{kv}/subkeys/{where}")
    yield Probe(f"{area} create", "POST", f"{kv}/data/{folder}/{new}", content)
    yield Probe(f"{area} create deeper", "POST", f"{kv}/data/{folder}/{new}/x", content)
    yield Probe(f"{area} update", "POST", f"{kv}/data/{where}", again)
    yield Probe(f"{area} update by put", "PUT", f"{kv}/data/{where}", again)
    yield Probe(f"{area} patch", "PATCH", f"{kv}/data/{where}", again, _MERGE)
    yield Probe(f"{area} delete", "DELETE", f"{kv}/data/{where}")
    yield Probe(f"{area} delete versions", "POST", f"{kv}/delete/{where}", versions)
    yield Probe(f"{area} undelete", "POST", f"{kv}/undelete/{where}", versions)
    yield Probe(f"{area} destroy", "POST", f"{kv}/destroy/{where}", versions)
    yield Probe(f"{area} destroy by put", "PUT", f"{kv}/destroy/{where}", versions)
    yield Probe(f"{area} metadata read", "GET", f"{kv}/metadata/{where}")
    yield Probe(f"{area} metadata write", "POST", f"{kv}/metadata/{where}", {"max_versions": 1})
    yield Probe(f"{area} metadata create", "POST", f"{kv}/metadata/{folder}/{new}", {"max_versions": 1})
    yield Probe(f"{area} metadata patch", "PATCH", f"{kv}/metadata/{where}", {"cas_required": False}, _MERGE)
    yield Probe(f"{area} metadata delete", "DELETE", f"{kv}/metadata/{where}")
    parent = folder if area == "keyring" else f"{folder}/{area}"
    for method in ("LIST", "SCAN"):
        yield Probe(f"{area} {method.lower()}", method, f"{kv}/metadata/{parent}/")
        yield Probe(f"{area} {method.lower()} details", method, f"{kv}/detailed-metadata/{parent}/")
        yield Probe(f"{area} {method.lower()} data", method, f"{kv}/data/{parent}/")


def _transit(transit: str, key: str, label: str) -> Iterator[Probe]:
    path, data = f"{transit}/keys/{key}", "Y2FybmV0"
    yield Probe(f"{label} read", "GET", path)
    yield Probe(f"{label} list", "LIST", f"{transit}/keys")
    yield Probe(f"{label} rotate", "POST", f"{path}/rotate", {})
    for setting, value in (
        ("exportable", True),
        ("allow_plaintext_backup", True),
        ("deletion_allowed", True),
        ("auto_rotate_period", "1h"),
        ("min_decryption_version", 1),
        ("min_encryption_version", 1),
    ):
        yield Probe(f"{label} config {setting}", "POST", f"{path}/config", {setting: value})
    both = {"min_decryption_version": 1, "exportable": True}
    yield Probe(f"{label} config allowed with exportable", "POST", f"{path}/config", both)
    yield Probe(f"{label} trim", "POST", f"{path}/trim", {"min_available_version": 1})
    yield Probe(f"{label} delete", "DELETE", path)
    yield Probe(f"{label} soft delete", "DELETE", f"{path}/soft-delete")
    yield Probe(f"{label} restore soft deleted", "POST", f"{path}/soft-delete-restore", {})
    yield Probe(f"{label} create", "POST", f"{path}-new", {"type": "ecdsa-p256"})
    yield Probe(f"{label} import version", "POST", f"{path}/import_version", {"ciphertext": data})
    for kind in ("signing-key", "encryption-key", "hmac-key", "public-key"):
        yield Probe(f"{label} export {kind}", "GET", f"{transit}/export/{kind}/{key}")
    yield Probe(f"{label} export wrapped", "GET", f"{transit}/byok-export/other/{key}")
    yield Probe(f"{label} backup", "GET", f"{transit}/backup/{key}")
    yield Probe(f"{label} restore", "POST", f"{transit}/restore/{key}", {"backup": data, "force": True})
    yield Probe(f"{label} sign", "POST", f"{transit}/sign/{key}", {"input": data})
    yield Probe(f"{label} sign sha2-256", "POST", f"{transit}/sign/{key}/sha2-256", {"input": data})
    yield Probe(f"{label} sign sha1", "POST", f"{transit}/sign/{key}/sha1", {"input": data})
    yield Probe(f"{label} verify", "POST", f"{transit}/verify/{key}", {"input": data, "signature": "vault:v1:AA=="})
    for verb in ("hmac", "encrypt", "decrypt", "rewrap", "datakey/plaintext"):
        yield Probe(f"{label} {verb}", "POST", f"{transit}/{verb}/{key}", {"input": data, "plaintext": data})


def _pki(mounts: Mounts) -> Iterator[Probe]:
    orders = {"uri_sans": "spiffe://prod.example/ns/shop/sa/orders"}
    mount = mounts.pki_int
    yield Probe("pki ca", "GET", f"{mount}/ca/pem")
    yield Probe("pki chain", "GET", f"{mount}/ca_chain")
    yield Probe("pki crl", "GET", f"{mount}/crl/pem")
    yield Probe("pki issuer", "GET", f"{mount}/issuer/default/json")
    yield Probe("pki cert", "GET", f"{mount}/cert/ca")
    yield Probe("pki issue", "POST", f"{mount}/issue/ns-shop-sa-orders", orders)
    yield Probe("pki sign", "POST", f"{mount}/sign/ns-shop-sa-orders", orders)
    yield Probe("pki sign verbatim", "POST", f"{mount}/sign-verbatim", {"csr": "x"})
    yield Probe("pki role read", "GET", f"{mount}/roles/ns-shop-sa-orders")
    yield Probe("pki role list", "LIST", f"{mount}/roles")
    yield Probe("pki role write", "POST", f"{mount}/roles/ns-shop-sa-orders", {"allow_any_name": True})
    yield Probe("pki role create", "POST", f"{mount}/roles/mine", {"allow_any_name": True})
    yield Probe("pki role delete", "DELETE", f"{mount}/roles/ns-shop-sa-orders")
    yield Probe("pki revoke", "POST", f"{mount}/revoke", {"serial_number": "01:02"})
    yield Probe("pki crl rotate", "GET", f"{mount}/crl/rotate")
    yield Probe("pki crl config", "POST", f"{mount}/config/crl", {"disable": True})
    yield Probe("pki certs list", "LIST", f"{mount}/certs")
    yield Probe("pki tidy", "POST", f"{mount}/tidy", {})
    yield Probe("pki keys list", "LIST", f"{mount}/keys")
    yield Probe("pki issuer write", "POST", f"{mount}/issuer/default", {"issuer_name": "mine"})
    yield Probe("pki issuer delete", "DELETE", f"{mount}/issuer/default")
    yield Probe("pki root sign", "POST", f"{mounts.pki}/root/sign-intermediate", {"csr": "x", "common_name": "mine"})
    yield Probe("pki root generate", "POST", f"{mounts.pki}/root/generate/exported", {"common_name": "mine"})
    yield Probe("pki root delete", "DELETE", f"{mounts.pki}/root")


def _system(mounts: Mounts, policy: str) -> Iterator[Probe]:
    everything = {"policy": 'path "*" { capabilities = ["sudo", "read"] }'}
    yield Probe("sys health", "GET", "sys/health")
    yield Probe("sys seal-status", "GET", "sys/seal-status")
    yield Probe("sys policy list", "LIST", "sys/policies/acl")
    yield Probe("sys policy read", "GET", f"sys/policies/acl/{policy}")
    yield Probe("sys policy write", "POST", f"sys/policies/acl/{policy}", everything)
    yield Probe("sys policy write old way", "PUT", f"sys/policy/{policy}", everything)
    yield Probe("sys policy create", "POST", "sys/policies/acl/mine", everything)
    yield Probe("sys policy delete", "DELETE", f"sys/policies/acl/{policy}")
    yield Probe("sys mounts", "GET", "sys/mounts")
    yield Probe("sys mount", "POST", "sys/mounts/mine", {"type": "kv"})
    yield Probe("sys unmount", "DELETE", f"sys/mounts/{mounts.kv}")
    yield Probe("sys remount", "POST", "sys/remount", {"from": mounts.kv, "to": "mine"})
    yield Probe("sys tune", "POST", f"sys/mounts/{mounts.kv}/tune", {"max_lease_ttl": "1h"})
    yield Probe("sys auth", "GET", "sys/auth")
    yield Probe("sys auth enable", "POST", "sys/auth/mine", {"type": "approle"})
    yield Probe("sys auth disable", "DELETE", f"sys/auth/{mounts.approle}")
    yield Probe("sys audit", "GET", "sys/audit")
    yield Probe("sys audit enable", "POST", "sys/audit/mine", {"type": "file", "options": {"file_path": "/tmp/x"}})  # noqa: S108
    yield Probe("sys seal", "POST", "sys/seal")
    yield Probe("sys rotate", "POST", "sys/rotate")
    yield Probe("sys raw", "GET", "sys/raw/core/mounts")
    yield Probe("sys capabilities", "POST", "sys/capabilities-self", {"paths": ["sys/seal"]})
    yield Probe("sys acl", "GET", "sys/internal/ui/resultant-acl")
    yield Probe("sys wrap", "POST", "sys/wrapping/wrap", {"a": "b"})
    yield Probe("sys leases", "LIST", "sys/leases/lookup/auth")
    yield Probe("sys lease revoke", "POST", "sys/leases/revoke-prefix/auth")
    yield Probe("sys plugins", "GET", "sys/plugins/catalog")
    yield Probe("kv config read", "GET", f"{mounts.kv}/config")
    yield Probe("kv config write", "POST", f"{mounts.kv}/config", {"max_versions": 1})
    yield Probe("kv list top", "LIST", f"{mounts.kv}/metadata/")
    yield Probe("cubbyhole read", "GET", "cubbyhole/x")
    yield Probe("cubbyhole write", "POST", "cubbyhole/x", {"a": "b"})
    yield Probe("identity entities", "LIST", "identity/entity/id")
    yield Probe("identity token", "GET", "identity/oidc/token/mine")


def _auth(mounts: Mounts, role: str) -> Iterator[Probe]:
    path = f"auth/{mounts.approle}/role"
    yield Probe("approle login", "POST", f"auth/{mounts.approle}/login", {"role_id": "x", "secret_id": "y"})
    yield Probe("approle list", "LIST", path)
    yield Probe("approle read", "GET", f"{path}/{role}")
    yield Probe("approle write", "POST", f"{path}/{role}", {"token_policies": ["root"]})
    yield Probe("approle create", "POST", f"{path}/mine", {"token_policies": ["root"]})
    yield Probe("approle delete", "DELETE", f"{path}/{role}")
    yield Probe("approle role id", "GET", f"{path}/{role}/role-id")
    yield Probe("approle secret id", "POST", f"{path}/{role}/secret-id", {})
    yield Probe("approle own secret id", "POST", f"{path}/{role}/custom-secret-id", {"secret_id": "z"})
    yield Probe("approle secret ids", "LIST", f"{path}/{role}/secret-id")
    yield Probe("token create", "POST", "auth/token/create", {"policies": ["default"]})
    yield Probe("token create orphan", "POST", "auth/token/create-orphan", {})
    yield Probe("token accessors", "LIST", "auth/token/accessors")
    yield Probe("token lookup other", "POST", "auth/token/lookup", {"token": "x"})
    yield Probe("token renew other", "POST", "auth/token/renew", {"token": "x"})
    yield Probe("token revoke other", "POST", "auth/token/revoke", {"token": "x"})
    yield Probe("token revoke accessor", "POST", "auth/token/revoke-accessor", {"accessor": "x"})
    yield Probe("token lookup self", "GET", "auth/token/lookup-self")
    yield Probe("token renew self", "POST", "auth/token/renew-self", {})
    yield Probe("token revoke self", "POST", "auth/token/revoke-self")


def probes(scene: Scene) -> list[Probe]:
    """Return all probes; the last one ends the token that sends it."""
    kv, environment, mounts = scene.mounts.kv, scene.environment, scene.mounts
    found: list[Probe] = []
    for area in ("keyring", "keys", "requests", "breakglass", "results"):
        found += _secret(kv, environment, area)
        found += [Probe(f"staging {p.name}", p.method, p.path, p.body, p.headers) for p in _secret(kv, "staging", area)]
    found += _transit(mounts.transit, f"carnet-{environment}", "transit")
    found += _transit(mounts.transit, "carnet-staging", "staging transit")
    found += _pki(mounts)
    found += _system(mounts, f"carnet-ci-{environment}")
    found += _auth(mounts, f"carnet-broker-{environment}")
    return found
