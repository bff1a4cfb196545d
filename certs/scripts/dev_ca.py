r"""A certificate authority in a directory, for development: a root, an intermediate, and leafs with SPIFFE IDs.

::

    dev_ca.py init DIR --trust-domain prod.example
    dev_ca.py issue DIR spiffe://prod.example/ns/shop/sa/orders
    dev_ca.py issue DIR spiffe://prod.example/ns/shop/sa/payments --serves

Not for production: the keys lie in files. There, Vault is the authority (`bootstrap_vault.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import click
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from carnet.errors import ConfigError
from carnet.spiffe import SpiffeID, server_dns_name
from carnet.testing.ca import (
    CertificateAuthority,
    IssuedCertificate,
    Issuer,
    certificate_pem,
    private_key_pem,
    write_file,
)
from command_line import Duration, one_line_errors, parse_trust_domain

__all__ = ["load_authority", "main"]

_ROOT: Final = "root"
_INTERMEDIATE: Final = "intermediate"


def _key_file(certificate_file: Path) -> Path:
    return certificate_file.with_name(f"{certificate_file.stem}-key.pem")


def _load(directory: Path, name: str) -> IssuedCertificate | None:
    """Return the certificate and key `name` in `directory`, None where neither is there."""
    certificate_file = directory / f"{name}.pem"
    key_file = _key_file(certificate_file)
    if not certificate_file.exists() and not key_file.exists():
        return None
    for file, other in ((certificate_file, key_file), (key_file, certificate_file)):
        if not file.exists():
            msg = f"{other} is there without {file.name}; put that back, or move this one away"
            raise ConfigError(msg)
    try:
        leaf = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    except (ValueError, TypeError) as error:
        msg = f"{certificate_file} or {key_file} is not what this program wrote ({error}); move both away"
        raise ConfigError(msg) from error
    if key.public_key() != leaf.public_key():
        msg = f"{key_file} is not the key of {certificate_file}; move both away"
        raise ConfigError(msg)
    return IssuedCertificate(certificate_file.read_bytes(), key_file.read_bytes(), leaf)


def _issuer(directory: Path, name: str) -> Issuer | None:
    loaded = _load(directory, name)
    if loaded is None:
        return None
    key = serialization.load_pem_private_key(loaded.private_key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        msg = f"{directory / name}-key.pem is not an EC key, so this program did not write it"
        raise ConfigError(msg)
    return Issuer(loaded.leaf, key)


def _ensure_issuer(
    directory: Path, name: str, subject: str, *, lifetime: timedelta, now: datetime, by: Issuer | None = None
) -> Issuer:
    """Return the authority `name` in `directory`; make it where there is none, and never replace one."""
    found = _issuer(directory, name)
    if found is not None:
        click.echo(f"unchanged {directory / name}.pem")
        return found
    not_after = now + lifetime
    if by is not None:
        not_after = min(not_after, by.certificate.not_valid_after_utc)
    path_length = None if by is None else 0
    made = Issuer.create(subject, not_before=now, not_after=not_after, path_length=path_length, by=by)
    certificate_file = directory / f"{name}.pem"
    write_file(_key_file(certificate_file), private_key_pem(made.private_key), mode=0o600)
    write_file(certificate_file, certificate_pem(made.certificate))
    click.echo(f"created   {certificate_file}")
    return made


def _trust_domain(issuer: Issuer) -> str:
    names = issuer.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return "".join(str(name.value) for name in names).removesuffix(f" {_ROOT}")


def load_authority(directory: Path) -> CertificateAuthority:
    """Return the authority that ``init`` made in `directory`. Raises `ConfigError` or `OSError`."""
    root, intermediate = _issuer(directory, _ROOT), _issuer(directory, _INTERMEDIATE)
    if root is None or intermediate is None:
        msg = f"{directory} holds no authority; make one: dev_ca.py init {directory}"
        raise ConfigError(msg)
    return CertificateAuthority(_trust_domain(root), root, intermediate)


def _is_wanted(held: IssuedCertificate, ca: CertificateAuthority, dns_names: tuple[str, ...], now: datetime) -> bool:
    """Say whether `held` has the wanted names, is by `ca`, and has a third of its life left."""
    try:
        held.leaf.verify_directly_issued_by(ca.intermediate.certificate)
    except (ValueError, InvalidSignature):
        return False
    begin, end = held.leaf.not_valid_before_utc, held.leaf.not_valid_after_utc
    return sorted(held.dns_names) == sorted(dns_names) and end - now > (end - begin) / 3


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Make SPIFFE certificates for development. Not for production: the authority's keys lie in files."""


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--trust-domain", default="prod.example", show_default=True, help="SPIFFE trust domain.")
@click.option("--ttl", type=Duration(), default="365d", show_default=True, help="Life of root and intermediate.")
def init(*, directory: Path, trust_domain: str, ttl: timedelta) -> None:
    """Make a root and an intermediate in DIR. An authority that is there is never replaced."""
    with one_line_errors():
        parse_trust_domain(trust_domain)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        now = datetime.now(UTC)
        if (directory / f"{_INTERMEDIATE}.pem").exists() and not (directory / f"{_ROOT}.pem").exists():
            msg = (
                f"{directory} has an intermediate and no root; put root.pem and its key back, or use another directory"
            )
            raise ConfigError(msg)
        root = _ensure_issuer(directory, _ROOT, f"{trust_domain} {_ROOT}", lifetime=ttl, now=now)
        if _trust_domain(root) != trust_domain:
            msg = f"{directory} is the authority of {_trust_domain(root)}; use another directory for {trust_domain}"
            raise ConfigError(msg)
        name = f"{trust_domain} {_INTERMEDIATE}"
        _ensure_issuer(directory, _INTERMEDIATE, name, lifetime=ttl, now=now, by=root)


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("spiffe_id")
@click.option("--serves", is_flag=True, help="Add the DNS name that the workload serves by.")
@click.option("--dns", "dns_names", multiple=True, metavar="NAME", help="Add another DNS name. Repeatable.")
@click.option("--ttl", type=Duration(), default="24h", show_default=True, help="Life of the certificate.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory for the files; DIR by default.")
@click.option("--name", help="Start of the file names; by default the path of the id with dashes.")
def issue(
    *,
    directory: Path,
    spiffe_id: str,
    serves: bool,
    dns_names: tuple[str, ...],
    ttl: timedelta,
    out: Path | None,
    name: str | None,
) -> None:
    """Issue NAME.pem and NAME-key.pem (0600) for SPIFFE_ID.

    A certificate that is there, has the same names and a third of its life left is kept; else it is renewed.
    """
    with one_line_errors():
        ca, who, now = load_authority(directory), SpiffeID.parse(spiffe_id), datetime.now(UTC)
        if who.trust_domain != ca.trust_domain:
            msg = f"{who} is not of the trust domain {ca.trust_domain}, for which {directory} is the authority"
            raise ConfigError(msg)
        wanted = ((server_dns_name(who),) if serves else ()) + dns_names
        name, out = name or "-".join(who.segments), out or directory
        if name in {_ROOT, _INTERMEDIATE}:
            msg = f"the name {name} is the authority's; choose another with --name"
            raise ConfigError(msg)
        held = _load(out, name)
        if held is not None and held.spiffe_id != spiffe_id:
            msg = f"{out / name}.pem belongs to {held.spiffe_id}; choose another --name or --out"
            raise ConfigError(msg)
        if held is not None and _is_wanted(held, ca, wanted, now):
            click.echo(f"unchanged {out / name}.pem")
            return
        if ca.intermediate.certificate.not_valid_after_utc <= now:
            msg = f"the authority in {directory} is at its end; make a new one in another directory"
            raise ConfigError(msg)
        # No longer than the authority: some verifiers want the windows nested.
        not_after = min(now + ttl, ca.intermediate.certificate.not_valid_after_utc)
        certificate_file, _ = ca.issue(spiffe_id, dns_names=wanted, not_after=not_after).write(out, name)
        click.echo(f"{'created' if held is None else 'changed':<10}{certificate_file}")


if __name__ == "__main__":
    main()
