"""Who may do what in Vault: one policy and one AppRole of the same name for brokers, CI and breakglass.

What a policy does not name is refused. None has Vault's ``default`` policy, which would bring a private store and more.
KV v2 has one path for the content of a secret (``data/``) and one for the secret as such (``metadata/``: list, and
delete for good). There ``create`` without ``update`` means: write once, never replace.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from carnet.testing.ca import write_file
from vault_layout import Mounts
from vault_state import Outcome, Vault

__all__ = ["ROLES", "Credentials", "ensure_access", "ensure_credentials", "policy_text", "role_name"]

_OWN: Final = """
# Its own token, and no other.
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self"  { capabilities = ["update"] }
path "auth/token/revoke-self" { capabilities = ["update"] }
"""

_BROKER: Final = """
# The keyring: check-and-set is required by the metadata, which the broker cannot change.
# Its metadata tell a keyring that was never written from one that was wiped.
path "{kv}/data/{env}/keyring"     {{ capabilities = ["create", "read", "update"] }}
path "{kv}/metadata/{env}/keyring" {{ capabilities = ["read"] }}

# Private keys: written once, and destroyed with all their versions.
path "{kv}/data/{env}/keys/+"     {{ capabilities = ["create", "read"] }}
path "{kv}/metadata/{env}/keys/+" {{ capabilities = ["delete"] }}

# The letter boxes of CI and breakglass.
path "{kv}/metadata/{env}/requests"     {{ capabilities = ["list"] }}
path "{kv}/data/{env}/requests/+"       {{ capabilities = ["read"] }}
path "{kv}/metadata/{env}/requests/+"   {{ capabilities = ["read", "delete"] }}
path "{kv}/metadata/{env}/breakglass"   {{ capabilities = ["list"] }}
path "{kv}/data/{env}/breakglass/+"     {{ capabilities = ["read"] }}
path "{kv}/metadata/{env}/breakglass/+" {{ capabilities = ["read", "delete"] }}

# The answers.
path "{kv}/data/{env}/results/+"     {{ capabilities = ["create", "read", "update"] }}
path "{kv}/metadata/{env}/results/+" {{ capabilities = ["delete"] }}

# Transit: sign, look, rotate, and drop old versions. Of the key's settings only those that drop old versions: not
# `exportable`, `allow_plaintext_backup` or `deletion_allowed`.
path "{transit}/keys/carnet-{env}"          {{ capabilities = ["read"] }}
path "{transit}/keys/carnet-{env}/rotate"   {{ capabilities = ["update"] }}
path "{transit}/sign/carnet-{env}"          {{ capabilities = ["update"] }}
path "{transit}/sign/carnet-{env}/sha2-256" {{ capabilities = ["update"] }}
path "{transit}/keys/carnet-{env}/config" {{
  capabilities       = ["update"]
  allowed_parameters = {{ "min_decryption_version" = [], "min_encryption_version" = [] }}
}}
path "{transit}/keys/carnet-{env}/trim" {{
  capabilities       = ["update"]
  allowed_parameters = {{ "min_available_version" = [] }}
}}
"""

_CI: Final = """
path "{kv}/data/{env}/keyring"    {{ capabilities = ["read"] }}
path "{kv}/data/{env}/requests/+" {{ capabilities = ["create", "read"] }}
path "{kv}/data/{env}/results/+"  {{ capabilities = ["read"] }}
"""

_BREAKGLASS: Final = (
    _CI
    + """path "{kv}/data/{env}/breakglass/+" {{ capabilities = ["create", "read"] }}
"""
)


@dataclass(frozen=True, slots=True)
class _Role:
    policy: str
    token_ttl: timedelta
    token_max_ttl: timedelta
    secret_id_ttl: timedelta


ROLES: Final = {
    # A broker renews its token, and logs in again once a day; a stolen token is worth minutes once it is revoked there.
    "broker": _Role(_BROKER, timedelta(minutes=15), timedelta(days=1), timedelta(days=90)),
    # Long enough to wait for a rotation, which takes as long as plain pollers may take to see a key.
    "ci": _Role(_CI, timedelta(minutes=20), timedelta(hours=1), timedelta(days=30)),
    "breakglass": _Role(_BREAKGLASS, timedelta(minutes=10), timedelta(minutes=30), timedelta(days=30)),
}
"""The roles by their short names."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The files that a role logs in with."""

    role: str
    role_id_file: Path
    secret_id_file: Path = field(repr=False)


def role_name(role: str, environment: str) -> str:
    """Return the name in Vault of a role of `ROLES`, which is also its policy's."""
    return f"carnet-{role}-{environment}"


def policy_text(role: str, environment: str, mounts: Mounts) -> str:
    """Return the policy of a role of `ROLES` for `environment`."""
    return ROLES[role].policy.format(env=environment, kv=mounts.kv, transit=mounts.transit).lstrip() + _OWN


def _seconds(duration: timedelta) -> int:
    return int(duration.total_seconds())


def ensure_access(vault: Vault, mounts: Mounts, environment: str) -> None:
    """Make the policies, and the AppRoles that carry them."""
    for role in ROLES:
        name = role_name(role, environment)
        text = policy_text(role, environment, mounts)
        vault.ensure(f"policy {name}", f"sys/policies/acl/{name}", {"policy": text})
    vault.ensure_mount("auth", mounts.approle, "approle")
    for role, terms in ROLES.items():
        name = role_name(role, environment)
        wanted: dict[str, Any] = {
            "bind_secret_id": True,
            "secret_id_num_uses": 0,
            "secret_id_ttl": _seconds(terms.secret_id_ttl),
            "token_policies": [name],
            "token_no_default_policy": True,
            "token_type": "service",
            "token_period": 0,
            "token_num_uses": 0,
            "token_ttl": _seconds(terms.token_ttl),
            "token_max_ttl": _seconds(terms.token_max_ttl),
        }
        vault.ensure(f"approle {name}", f"auth/{mounts.approle}/role/{name}", wanted)


def _end_of(vault: Vault, path: str, secret_id: str) -> datetime | None:
    """Return when Vault stops taking `secret_id`, None where it does not take it now. Looking does not use it."""
    found = vault.write(f"{path}/secret-id/lookup", secret_id=secret_id) if secret_id else {}
    # Vault writes nanoseconds, which Python cannot read; seconds are enough.
    return datetime.fromisoformat(found["expiration_time"][:19] + "+00:00") if found else None


def _held(file: Path) -> str:
    return file.read_text("utf-8").strip() if file.exists() else ""


def _mint(vault: Vault, path: str, file: Path) -> None:
    """Put a new secret id into `file`.

    It is written beside the file first, then made known to Vault, then moved: wherever a run is cut off, the next one
    finds the same secret id, and none is left in Vault that nobody holds.
    """
    pending = file.with_name(f"{file.name}.pending")
    secret_id = _held(pending)
    if not secret_id:
        secret_id = secrets.token_hex(32)
        write_file(pending, f"{secret_id}\n".encode(), mode=0o600)
    if _end_of(vault, path, secret_id) is None:
        vault.write(f"{path}/custom-secret-id", secret_id=secret_id)
    pending.replace(file)


def ensure_credentials(
    vault: Vault, mounts: Mounts, environment: str, directory: Path, *, now: datetime
) -> dict[str, Credentials]:
    """Put the role id and a secret id of each role into `directory` (files of mode 0600); return where they are.

    A secret id that is there, and good for at least a third of its life, is kept.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made: dict[str, Credentials] = {}
    for role, terms in ROLES.items():
        name = role_name(role, environment)
        path = f"auth/{mounts.approle}/role/{name}"
        files = Credentials(name, directory / f"{name}-role-id", directory / f"{name}-secret-id")
        made[role] = files
        role_id = (vault.read(f"{path}/role-id") or {})["role_id"]
        _ensure_file(vault, files.role_id_file, role_id)
        held = _held(files.secret_id_file)
        end = _end_of(vault, path, held)
        if end is not None and end - now > terms.secret_id_ttl / 3:
            vault.report(str(files.secret_id_file), Outcome.UNCHANGED)
        else:
            _mint(vault, path, files.secret_id_file)
            vault.report(str(files.secret_id_file), Outcome.CHANGED if held else Outcome.CREATED)
    return made


def _ensure_file(vault: Vault, path: Path, text: str) -> None:
    held = _held(path)
    if held == text:
        vault.report(str(path), Outcome.UNCHANGED)
        return
    write_file(path, f"{text}\n".encode(), mode=0o600)
    vault.report(str(path), Outcome.CHANGED if held else Outcome.CREATED)
