"""The files that the configuration names: each is read, checked, and said to be wrong by its own name.

A file that is wrong stops the broker at the start; later it leaves the last good one in force (see `watched`). So what
is only found out by callers, such as a certificate that has ended, is looked for here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from carnet.durations import format_duration
from carnet.errors import ConfigError, InvalidIdentityError
from carnet.identity import Identity
from carnet.spiffe import server_dns_name
from carnet_broker.config import BrokerConfig, host_and_port, is_loopback
from carnet_broker.core.policy import Policy, load_policy
from carnet_broker.core.workload import TrustBundle
from carnet_broker.edges.grpc.listeners import TlsPems
from carnet_broker.edges.store import check_store_url
from carnet_broker.edges.vault import SecretFile, VaultSettings
from carnet_broker.file_modes import check_audit_directory, check_key_file

__all__ = ["TlsMaterial", "check_files", "load_policy_file", "load_tls", "load_vault_settings"]


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """The broker's own certificate and whom it trusts, from one state of the files."""

    identity: Identity
    pems: TlsPems
    bundle: TrustBundle


def load_tls(config: BrokerConfig, trust_domains: Sequence[str], now: datetime) -> TlsMaterial:
    """Load and check all TLS files. Raises `ConfigError` that names the file."""
    tls = config.tls
    check_key_file(tls.key_file)
    identity = Identity.load(tls.certificate_file, tls.key_file)
    _check_serves(identity, tls.certificate_file, now)
    ca_pem = _read(tls.client_ca_file, "tls.client_ca_file")
    crls = [_read(file, "tls.crl_files") for file in tls.crl_files]
    try:
        bundle = TrustBundle.parse(ca_pem, crls, trust_domains)
    except ConfigError as error:
        files = ", ".join(str(file) for file in (tls.client_ca_file, *tls.crl_files))
        msg = f"{files}: {error}"
        raise ConfigError(msg) from error
    pems = TlsPems(identity.private_key_pem, identity.certificate_chain_pem, ca_pem)
    return TlsMaterial(identity, pems, bundle)


def load_policy_file(config: BrokerConfig) -> Policy:
    """Load the policy. Raises `ConfigError` that names file and line, also where it is one of another environment."""
    file = config.policy_file
    policy = load_policy(_read(file, "policy_file"), str(file))
    if policy.issuer != config.issuer:
        msg = f"{file}: the policy is for issuer {policy.issuer}, this broker is {config.issuer}; use that one's policy"
        raise ConfigError(msg)
    admin_host = host_and_port(config.listen.admin)[0]
    if not (policy.admins or is_loopback(admin_host)):
        msg = (
            f"{file}: the policy names no admins, and listen.admin {admin_host} of this broker can be reached by"
            " others; name who may use the admin port, or listen on 127.0.0.1"
        )
        raise ConfigError(msg)
    _check_lives(policy, config)
    return policy


def _check_lives(policy: Policy, config: BrokerConfig) -> None:
    """Refuse limits that this broker would not keep, or by which nobody would get a token. Raises `ConfigError`."""
    longest, shortest = config.tokens.longest_life, config.tokens.shortest_life
    limits = [(f"{a.line}: audiences.{a.name}", a.max_ttl) for a in policy.audiences.values()]
    limits += [(f"{grant.line}: grants[{grant.position}]", grant.max_ttl) for grant in policy.grants]
    for where, limit in limits:
        if limit > longest:
            bound = f"longer than tokens.longest_life {format_duration(longest)} of this broker; lower the one or raise"
        elif limit < shortest:
            bound = f"shorter than tokens.shortest_life {format_duration(shortest)} here; raise the one or lower"
        else:
            continue
        msg = f"{config.policy_file}:{where}: max_ttl {format_duration(limit)} is {bound} the other"
        raise ConfigError(msg)


def load_vault_settings(config: BrokerConfig) -> VaultSettings:
    """Return where Vault is and the AppRole to log in with, all its files read once; nothing is sent.

    Raises `ConfigError` that names the file, or the part of the configuration.
    """
    vault = config.vault
    try:
        settings = VaultSettings(
            address=vault.address,
            ca_file=vault.ca_file,
            namespace=vault.namespace,
            environment=vault.environment,
            kv_mount=vault.kv_mount,
            transit_mount=vault.transit_mount,
            transit_key=vault.transit_key or "",
            approle_mount=vault.approle_mount,
            role_id=SecretFile(vault.role_id_file),
            secret_id=SecretFile(vault.secret_id_file),
            timeout=vault.timeout,
        )
    except ConfigError as error:
        msg = f"vault in the configuration: {error}"
        raise ConfigError(msg) from error
    settings.check_files()
    return settings


def check_files(config: BrokerConfig, now: datetime) -> None:
    """Load all that the configuration names, without serving and without asking Vault. Raises `ConfigError`."""
    policy = load_policy_file(config)
    load_tls(config, [policy.trust_domain], now)
    load_vault_settings(config)
    check_audit_directory(config.audit.directory)
    check_store_url(config.store.url)


def _check_serves(identity: Identity, file: Path, now: datetime) -> None:
    """Refuse a certificate that no client would accept from a server. Raises `ConfigError`."""
    name, leaf = f"certificate file {file}", identity.certificate
    try:
        expected = server_dns_name(identity.spiffe_id)
    except InvalidIdentityError as error:
        msg = f"{name} is not that of a server: {error}"
        raise ConfigError(msg) from error
    # It has alternative names, for the SPIFFE ID is one of them.
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if expected not in names.get_values_for_type(x509.DNSName):
        msg = f"{name} has no DNS name {expected}, by which clients know this server: have it issued with that name"
        raise ConfigError(msg)
    try:
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        usages = None  # Good for everything.
    if usages is not None and ExtendedKeyUsageOID.SERVER_AUTH not in usages:
        msg = f"{name} is not for servers: have it issued with the extended key usages of both server and client"
        raise ConfigError(msg)
    if now >= identity.not_after:
        msg = f"{name} ended at {identity.not_after:%Y-%m-%dT%H:%M:%SZ}: renew it"
        raise ConfigError(msg)
    if now < identity.not_before:
        msg = f"{name} begins at {identity.not_before:%Y-%m-%dT%H:%M:%SZ}: check the clock of this host"
        raise ConfigError(msg)


def _read(file: Path, setting: str) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        msg = f"{file}: cannot be read ({error.strerror}); {setting} in the configuration names it"
        raise ConfigError(msg) from error
    if not content.strip():
        msg = f"{file}: the file is empty; {setting} in the configuration names it"
        raise ConfigError(msg)
    return content
