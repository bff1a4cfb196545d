"""The PKI in Vault: a root that signs one intermediate, and one role per workload that can issue only that workload.

Two workloads whose paths give the same role name (``a-b/c`` and ``a/b-c``) cannot share a Vault; the second is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

import hvac
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from carnet.testing.ca import IssuedCertificate, certificate_pem
from vault_layout import Mounts, Workload
from vault_state import BootstrapError, Outcome, Vault

__all__ = ["ensure_pki", "issue_certificate", "revoke_certificate", "root_pem"]

_ROOT_LIFE: Final = timedelta(days=3650)
_INTERMEDIATE_LIFE: Final = timedelta(days=1825)
_OPENBAO_ONLY: Final = frozenset({"allow_wildcard_certificates", "not_after_bound", "not_before_bound"})

_DEFAULT_MOUNTS: Final = Mounts()
_CRL: Final = {
    # auto_rebuild makes a new list a grace period before the old one ends, so the expiry has to be longer than that.
    # With it a revocation waits for the next rebuild: who revokes also asks for a rebuild (`revoke_certificate`).
    "expiry": "72h",
    "auto_rebuild": True,
    "auto_rebuild_grace_period": "12h",
    "disable": False,
}
_TIDY: Final = {
    # Leafs live for hours and all are stored (a certificate can only be revoked by serial when it is).
    "enabled": True,
    "interval_duration": 43200,
    "tidy_cert_store": True,
    "tidy_revoked_certs": True,
    "safety_buffer": 259200,
}


def _seconds(duration: timedelta) -> int:
    return int(duration.total_seconds())


def _issuer(vault: Vault, mount: str) -> x509.Certificate | None:
    """Return the default issuer of `mount`, None where it has none yet."""
    if not vault.keys(f"{mount}/issuers"):
        return None
    issuer = vault.read(f"{mount}/issuer/default")
    if issuer is None:
        msg = f"{mount}/ in Vault has issuers but no default one; set {mount}/config/issuers"
        raise BootstrapError(msg)
    return x509.load_pem_x509_certificate(issuer["certificate"].encode())


def _common_name(name: x509.Name) -> str:
    return "".join(str(attribute.value) for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME))


def _ensure_root(vault: Vault, mounts: Mounts, trust_domain: str) -> x509.Certificate:
    name = f"{trust_domain} root"
    root = _issuer(vault, mounts.pki)
    if root is not None:
        if _common_name(root.subject) != name:
            msg = (
                f"{mounts.pki}/ in Vault is the authority {_common_name(root.subject)!r} and not {name!r};"
                " give each trust domain mounts of its own (--pki-mount, --pki-int-mount)"
            )
            raise BootstrapError(msg)
        vault.report(f"root {name}", Outcome.UNCHANGED)
        return root
    made = vault.write(
        f"{mounts.pki}/root/generate/internal",
        common_name=name,
        exclude_cn_from_sans=True,
        key_type="ec",
        key_bits=256,
        ttl=_seconds(_ROOT_LIFE),
    )
    vault.report(f"root {name}", Outcome.CREATED)
    return x509.load_pem_x509_certificate(made["certificate"].encode())


def _csr(vault: Vault, mount: str, name: str) -> x509.CertificateSigningRequest:
    """Return a request for the key of the intermediate: the one that an unfinished run left, or else a new one."""
    wanted: dict[str, object] = {"common_name": name, "exclude_cn_from_sans": True}
    left = vault.keys(f"{mount}/keys")
    if left:
        made = vault.write(f"{mount}/intermediate/generate/existing", key_ref=left[0], **wanted)
    else:
        made = vault.write(f"{mount}/intermediate/generate/internal", key_type="ec", key_bits=256, **wanted)
    return x509.load_pem_x509_csr(made["csr"].encode())


def _signed(vault: Vault, mount: str, csr: x509.CertificateSigningRequest, name: str) -> str:
    """Return the certificate for `csr`: the one that an unfinished run left, or else a new one."""
    key = csr.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    for serial in vault.keys(f"{mount}/certs"):
        stored = vault.read(f"{mount}/cert/{serial}")
        if stored is not None:
            certificate = x509.load_pem_x509_certificate(stored["certificate"].encode())
            if key == certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
                return str(stored["certificate"])
    made = vault.write(
        f"{mount}/root/sign-intermediate",
        csr=csr.public_bytes(Encoding.PEM).decode(),
        common_name=name,
        exclude_cn_from_sans=True,
        max_path_length=0,
        ttl=_seconds(_INTERMEDIATE_LIFE),
    )
    return str(made["certificate"])


def _ensure_intermediate(vault: Vault, mounts: Mounts, trust_domain: str, root: x509.Certificate) -> None:
    name = f"{trust_domain} intermediate"
    intermediate = _issuer(vault, mounts.pki_int)
    if intermediate is None:
        csr = _csr(vault, mounts.pki_int, name)
        certificate = _signed(vault, mounts.pki, csr, name)
        vault.write(f"{mounts.pki_int}/intermediate/set-signed", certificate=certificate)
        vault.report(name, Outcome.CREATED)
        return
    try:
        intermediate.verify_directly_issued_by(root)
    except (ValueError, InvalidSignature) as error:
        msg = (
            f"{mounts.pki_int}/ in Vault holds an authority that {mounts.pki}/ did not sign;"
            " choose other mounts (--pki-mount, --pki-int-mount)"
        )
        raise BootstrapError(msg) from error
    vault.report(name, Outcome.UNCHANGED)


def _ensure_role(vault: Vault, mounts: Mounts, workload: Workload, life: timedelta) -> None:
    path = f"{mounts.pki_int}/roles/{workload.role}"
    current = vault.read(path)
    if current is not None and current["allowed_uri_sans"] != [str(workload.spiffe_id)]:
        msg = (
            f"the PKI role {workload.role} belongs to {', '.join(current['allowed_uri_sans']) or 'nobody'}"
            f" and not to {workload.spiffe_id}; rename one of the workloads, or delete {path}"
        )
        raise BootstrapError(msg)
    wanted = {
        "allowed_uri_sans": [str(workload.spiffe_id)],
        "allowed_domains": [workload.dns_name] if workload.dns_name else [],
        "allow_bare_domains": workload.serves,
        "allow_subdomains": False,
        "allow_glob_domains": False,
        "allow_wildcard_certificates": False,
        "allow_any_name": False,
        "allow_localhost": False,
        "allow_ip_sans": False,
        "allowed_other_sans": [],
        "allowed_uri_sans_template": False,
        "allowed_domains_template": False,
        "enforce_hostnames": True,
        "require_cn": False,
        "use_csr_sans": False,
        "use_csr_common_name": False,
        "basic_constraints_valid_for_non_ca": True,
        "key_type": "ec",
        "key_bits": 256,
        "key_usage": ["DigitalSignature"],
        "ext_key_usage": [],
        "ext_key_usage_oids": [],
        "client_flag": True,
        "server_flag": True,
        "code_signing_flag": False,
        "email_protection_flag": False,
        "no_store": False,
        "ttl": _seconds(life),
        "max_ttl": _seconds(life),
        "not_before_duration": 30,
        # By default a caller may name any end in `not_after`, past max_ttl (tried on OpenBao 2.7).
        "not_after_bound": "forbid",
        "not_before_bound": "forbid",
    }
    vault.ensure(f"pki role {workload.role}", path, wanted, optional=_OPENBAO_ONLY)


def ensure_pki(
    vault: Vault, mounts: Mounts, *, trust_domain: str, workloads: Sequence[Workload], leaf_life: timedelta
) -> None:
    """Make root, intermediate, revocation lists and roles. `leaf_life` is the longest life of a leaf."""
    vault.ensure_mount("mounts", mounts.pki, "pki", max_lease=_seconds(_ROOT_LIFE))
    root = _ensure_root(vault, mounts, trust_domain)
    vault.ensure(f"crl {mounts.pki}", f"{mounts.pki}/config/crl", _CRL)
    vault.ensure_mount("mounts", mounts.pki_int, "pki", max_lease=_seconds(_INTERMEDIATE_LIFE))
    _ensure_intermediate(vault, mounts, trust_domain, root)
    vault.ensure(f"crl {mounts.pki_int}", f"{mounts.pki_int}/config/crl", _CRL)
    vault.ensure(f"tidy {mounts.pki_int}", f"{mounts.pki_int}/config/auto-tidy", _TIDY)
    for workload in workloads:
        _ensure_role(vault, mounts, workload, leaf_life)


def root_pem(client: hvac.Client, *, mounts: Mounts = _DEFAULT_MOUNTS) -> bytes:
    """Return the trust anchor of the PKI."""
    root = _issuer(Vault(client, lambda _: None), mounts.pki)
    if root is None:
        msg = f"{mounts.pki}/ in Vault has no authority yet; run the setup first"
        raise BootstrapError(msg)
    return certificate_pem(root)


def issue_certificate(
    client: hvac.Client, workload: Workload, *, ttl: timedelta | None = None, mounts: Mounts = _DEFAULT_MOUNTS
) -> IssuedCertificate:
    """Issue a leaf through the role of `workload`; `ttl` is cut to what the role allows, None asks for all of it.

    A workload that serves gets its one DNS name. Raises what hvac raises.
    """
    wanted = {"uri_sans": str(workload.spiffe_id), "private_key_format": "pkcs8"}
    if workload.dns_name:
        wanted["alt_names"] = workload.dns_name
    if ttl is not None:
        wanted["ttl"] = f"{_seconds(ttl)}s"
    path = f"{mounts.pki_int}/issue/{workload.role}"
    made = Vault(client, lambda _: None).write(path, **wanted)
    leaf = x509.load_pem_x509_certificate(made["certificate"].encode())
    chain = [x509.load_pem_x509_certificate(pem.encode()) for pem in made["ca_chain"]]
    # The root is not sent: who does not have it does not believe it.
    sent = [certificate for certificate in chain if certificate.subject != certificate.issuer]
    return IssuedCertificate(certificate_pem(leaf, *sent), f"{made['private_key'].strip()}\n".encode(), leaf)


def revoke_certificate(client: hvac.Client, leaf: x509.Certificate, *, mounts: Mounts = _DEFAULT_MOUNTS) -> None:
    """Revoke `leaf`, and rebuild the revocation list at once so that it says so."""
    serial = leaf.serial_number
    octets = serial.to_bytes((serial.bit_length() + 7) // 8, "big")
    Vault(client, lambda _: None).write(f"{mounts.pki_int}/revoke", serial_number=octets.hex(":"))
    client.read(f"{mounts.pki_int}/crl/rotate")
