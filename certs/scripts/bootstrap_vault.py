r"""Set up Vault (or OpenBao) for one environment of Carnet: PKI, KV, Transit, policies and AppRoles.

::

    export VAULT_ADDR=https://vault.prod.example:8200 VAULT_TOKEN=... VAULT_CACERT=ca.pem
    bootstrap_vault.py setup --env prod --trust-domain prod.example \
        --workload spiffe://prod.example/ns/shop/sa/orders --workload spiffe://prod.example/ns/shop/sa/payments,serves
    bootstrap_vault.py issue-certificate spiffe://prod.example/ns/shop/sa/orders --out DIR

A run that finds everything as it should be writes nothing. A run after a half-finished one does the rest.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click
import hvac
import requests
import yaml
from cryptography import x509
from hvac.exceptions import Forbidden, InvalidRequest, VaultDown, VaultError

from carnet.spiffe import SpiffeID
from carnet.testing.ca import write_file
from command_line import Duration, one_line_errors, parse_trust_domain
from vault_access import Credentials, ensure_access, ensure_credentials
from vault_layout import Mounts, Workload
from vault_pki import ensure_pki, issue_certificate, revoke_certificate, root_pem
from vault_state import BootstrapError, Item, Outcome, Report, Vault

__all__ = [
    "BootstrapError",
    "Bootstrapped",
    "Credentials",
    "Item",
    "Mounts",
    "Outcome",
    "Workload",
    "bootstrap",
    "issue_certificate",
    "revoke_certificate",
    "root_pem",
]

_ENVIRONMENT: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_LEAF_LIFE: Final = timedelta(hours=24)
_DEFAULT_MOUNTS: Final = Mounts()
_KV_READY_WITHIN: Final = 10.0


_REMEDIES: Final[Mapping[type[VaultError], str]] = {
    Forbidden: "check VAULT_TOKEN and its policies",
    InvalidRequest: "check that 'setup' was run for this workload and this mount",
    VaultDown: "unseal Vault, or wait until it is ready",
}


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    """What a bootstrap did, and the login files by role (``broker``, ``ci``, ``breakglass``) where it wrote them."""

    items: tuple[Item, ...]
    credentials: Mapping[str, Credentials] = field(default_factory=dict)


def _ignore(_: Item) -> None:
    """Report to nobody."""


def _check(environment: str, trust_domain: str, workloads: Sequence[Workload]) -> None:
    if not _ENVIRONMENT.fullmatch(environment):
        msg = f"environment {environment!r} is not a name of a-z, 0-9 and '-' (at most 32, '-' only inside)"
        raise BootstrapError(msg)
    parse_trust_domain(trust_domain)
    roles: dict[str, SpiffeID] = {}
    for workload in workloads:
        if workload.spiffe_id.trust_domain != trust_domain:
            msg = f"workload {workload.spiffe_id} is not of the trust domain {trust_domain}"
            raise BootstrapError(msg)
        if workload.role in roles:
            msg = f"workloads {roles[workload.role]} and {workload.spiffe_id} share the role name {workload.role}"
            raise BootstrapError(msg)
        roles[workload.role] = workload.spiffe_id


def _ensure_kv(vault: Vault, mounts: Mounts, environment: str) -> None:
    vault.ensure_mount("mounts", mounts.kv, "kv", options={"version": "2"})
    deadline = time.monotonic() + _KV_READY_WITHIN
    while True:
        try:
            vault.read(f"{mounts.kv}/config")
            break
        except InvalidRequest:  # A new mount is being upgraded to version 2 for a moment.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    vault.ensure(
        f"keyring metadata of {environment}", f"{mounts.kv}/metadata/{environment}/keyring", {"cas_required": True}
    )


def _ensure_transit(vault: Vault, mounts: Mounts, environment: str) -> None:
    vault.ensure_mount("mounts", mounts.transit, "transit")
    name = f"carnet-{environment}"
    path = f"{mounts.transit}/keys/{name}"
    key = vault.read(path)
    if key is None:
        vault.write(path, type="ecdsa-p256", exportable=False, allow_plaintext_backup=False)
        vault.report(f"transit key {name}", Outcome.CREATED)
        return
    if key["type"] != "ecdsa-p256" or key["exportable"] or key["allow_plaintext_backup"]:
        # Vault cannot take these back: the key may have left it.
        msg = f"transit key {name} is of another type, or can be exported; delete {path} and run this again"
        raise BootstrapError(msg)
    if key["deletion_allowed"]:
        vault.write(f"{path}/config", deletion_allowed=False)
        vault.report(f"transit key {name}", Outcome.CHANGED)
        return
    vault.report(f"transit key {name}", Outcome.UNCHANGED)


def bootstrap(
    client: hvac.Client,
    *,
    environment: str,
    trust_domain: str,
    workloads: Sequence[Workload],
    now: datetime,
    credentials_dir: Path | None = None,
    mounts: Mounts = _DEFAULT_MOUNTS,
    leaf_life: timedelta = _LEAF_LIFE,
    report: Report = _ignore,
) -> Bootstrapped:
    """Bring Vault into the state that `environment` needs; `report` hears of each item as it is done.

    Workloads that are not named are left alone. With `credentials_dir` the login files of the roles are kept there.
    Raises `BootstrapError` or `InvalidIdentityError` for what must be corrected, and what hvac and requests raise.
    """
    _check(environment, trust_domain, workloads)
    items: list[Item] = []

    def note(item: Item) -> None:
        items.append(item)
        report(item)

    vault = Vault(client, note)
    ensure_pki(vault, mounts, trust_domain=trust_domain, workloads=workloads, leaf_life=leaf_life)
    _ensure_kv(vault, mounts, environment)
    _ensure_transit(vault, mounts, environment)
    ensure_access(vault, mounts, environment)
    credentials: dict[str, Credentials] = {}
    if credentials_dir is not None:
        credentials = ensure_credentials(vault, mounts, environment, credentials_dir, now=now)
    return Bootstrapped(tuple(items), credentials)


def _workloads_of_file(path: Path) -> tuple[Workload, ...]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        msg = f"{path}: cannot be read: {reason}"
        raise BootstrapError(msg) from error
    listed = content.get("workloads") if isinstance(content, dict) and set(content) == {"workloads"} else None
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        msg = f"{path}: must hold 'workloads:' and under it a list of SPIFFE_ID or SPIFFE_ID,serves"
        raise BootstrapError(msg)
    return tuple(Workload.parse(entry) for entry in listed)


def _client() -> hvac.Client:
    """Return a client as VAULT_ADDR, VAULT_TOKEN and VAULT_CACERT say."""
    values: dict[str, str] = {}
    for variable, what in (("VAULT_ADDR", "the URL of Vault"), ("VAULT_TOKEN", "a token that may set Vault up")):
        values[variable] = os.environ.get(variable, "")
        if not values[variable]:
            msg = f"{variable} is not set: set it to {what}"
            raise BootstrapError(msg)
    authority = os.environ.get("VAULT_CACERT", "")
    if authority and not Path(authority).is_file():
        msg = f"VAULT_CACERT names {authority}, which is not a file: set it to the PEM file with Vault's authority"
        raise BootstrapError(msg)
    session = requests.Session()
    session.trust_env = False  # Else REQUESTS_CA_BUNDLE overrides VAULT_CACERT.
    session.verify = authority or True
    return hvac.Client(url=values["VAULT_ADDR"], token=values["VAULT_TOKEN"], session=session, timeout=30)


@contextmanager
def _vault_errors() -> Iterator[None]:
    """Say what to do about the errors of Vault itself."""
    try:
        yield
    except requests.RequestException as error:
        msg = f"Vault at VAULT_ADDR={os.environ.get('VAULT_ADDR')} cannot be reached: {str(error)[:300]}"
        raise BootstrapError(msg) from error
    except VaultError as error:
        remedy = next((text for kind, text in _REMEDIES.items() if isinstance(error, kind)), "see its log")
        msg = f"Vault refused ({type(error).__name__}): {str(error)[:300]}; {remedy}"
        raise BootstrapError(msg) from error


_Command = Callable[..., Any]


def _mount_options(command: _Command) -> _Command:
    root = click.option("--pki-mount", default="pki", show_default=True, help="Mount of the root.")
    intermediate = click.option("--pki-int-mount", default="pki_int", show_default=True, help="And the intermediate.")
    return root(intermediate(command))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Set up Vault for Carnet, and issue certificates from it.

    VAULT_ADDR, VAULT_TOKEN and VAULT_CACERT say which Vault, and who is asking.
    """


@main.command()
@click.option("--env", "environment", required=True, help="Name of the environment, for instance prod.")
@click.option("--trust-domain", required=True, help="SPIFFE trust domain, for instance prod.example.")
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    metavar="SPIFFE_ID[,serves]",
    help="A workload that gets a PKI role; with ',serves' the role also allows its derived DNS name. Repeatable.",
)
@click.option(
    "--workloads-file", type=click.Path(path_type=Path), help="YAML file: 'workloads:' and a list of the same."
)
@click.option(
    "--credentials-dir", type=click.Path(path_type=Path), help="Where role ids and secret ids are kept (0600)."
)
@click.option("--leaf-life", type=Duration(), default="24h", show_default=True, help="Longest life of a certificate.")
@click.option("--kv-mount", default="carnet", show_default=True, help="Mount of the KV version 2 engine.")
@click.option("--transit-mount", default="transit", show_default=True, help="Mount of the Transit engine.")
@_mount_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
def setup(
    *,
    environment: str,
    trust_domain: str,
    workloads: tuple[str, ...],
    workloads_file: Path | None,
    credentials_dir: Path | None,
    leaf_life: timedelta,
    kv_mount: str,
    transit_mount: str,
    pki_mount: str,
    pki_int_mount: str,
    as_json: bool,
) -> None:
    """Bring Vault into the wanted state; say of each item whether it was created, changed or unchanged."""
    with one_line_errors(), _vault_errors():
        named = tuple(Workload.parse(text) for text in workloads)
        done = bootstrap(
            _client(),
            environment=environment,
            trust_domain=trust_domain,
            workloads=named + (_workloads_of_file(workloads_file) if workloads_file else ()),
            now=datetime.now(UTC),
            credentials_dir=credentials_dir,
            mounts=Mounts(kv=kv_mount, transit=transit_mount, pki=pki_mount, pki_int=pki_int_mount),
            leaf_life=leaf_life,
            report=_ignore if as_json else lambda item: click.echo(f"{item.outcome:<10}{item.name}"),
        )
    if as_json:
        click.echo(json.dumps({"items": [{"name": item.name, "outcome": item.outcome} for item in done.items]}))


@main.command("issue-certificate")
@click.argument("workload", metavar="SPIFFE_ID[,serves]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory for the files.")
@click.option("--name", help="Start of the file names; by default the name of the PKI role.")
@click.option("--ttl", type=Duration(), help="Life of the certificate; by default all that the role allows.")
@_mount_options
def issue_certificate_command(
    *, workload: str, out: Path, name: str | None, ttl: timedelta | None, pki_mount: str, pki_int_mount: str
) -> None:
    """Issue a certificate through the workload's PKI role: NAME.pem, NAME-key.pem (0600), and ca.pem."""
    with one_line_errors(), _vault_errors():
        client, who = _client(), Workload.parse(workload)
        mounts = Mounts(pki=pki_mount, pki_int=pki_int_mount)
        issued = issue_certificate(client, who, ttl=ttl, mounts=mounts)
        certificate_file, key_file = issued.write(out, name or who.role)
        write_file(out / "ca.pem", root_pem(client, mounts=mounts))
    click.echo(f"{certificate_file}\n{key_file}\n{out / 'ca.pem'}")


@main.command("revoke-certificate")
@click.argument("file", type=click.Path(path_type=Path))
@_mount_options
def revoke_certificate_command(*, file: Path, pki_mount: str, pki_int_mount: str) -> None:
    """Revoke the first certificate in FILE, and rebuild the revocation list at once."""
    with one_line_errors(), _vault_errors():
        leaf = x509.load_pem_x509_certificate(file.read_bytes())
        revoke_certificate(_client(), leaf, mounts=Mounts(pki=pki_mount, pki_int=pki_int_mount))
    click.echo(f"revoked {leaf.serial_number:x}")


if __name__ == "__main__":
    main()
