"""Every wrong kind of client certificate, and the good twin of each: one table, for tests and for the command line.

::

    from wrong_certificates import WRONG_CERTIFICATES
    for name, kind in WRONG_CERTIFICATES.items():
        shown = kind.build(ca, now)      # chain and key, PEM
        kind.expected                    # what a server that trusts ca.root has to do

Make one right before it is used: some are about seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final

import click

from carnet.errors import ConfigError
from carnet.testing.ca import CertificateAuthority, write_file
from certificate_recipe import Presented
from command_line import one_line_errors, parse_trust_domain
from wrong_chains import CHAINS
from wrong_keys import KEYS
from wrong_kind import Client, Expected, WrongCertificate
from wrong_names import NAMES
from wrong_profiles import PROFILES

__all__ = ["WRONG_CERTIFICATES", "Client", "Expected", "Presented", "WrongCertificate"]

WRONG_CERTIFICATES: Final[Mapping[str, WrongCertificate]] = MappingProxyType(
    {kind.name: kind for kind in sorted((*CHAINS, *PROFILES, *NAMES, *KEYS), key=lambda kind: kind.name)}
)
"""All kinds by name."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--trust-domain", default="prod.example", show_default=True, help="Of the authority that is made.")
@click.option("--only", metavar="START", default="", help="Only the kinds whose name starts so, for instance T03.")
def main(*, directory: Path, trust_domain: str, only: str) -> None:
    """Make an authority and every wrong kind of certificate by it, and write them to DIRECTORY.

    ca.pem is the root to trust; index.json says of each NAME.pem and NAME-key.pem what must become of it.
    """
    with one_line_errors():
        kinds = [kind for kind in WRONG_CERTIFICATES.values() if kind.name.startswith(only)]
        if not kinds:
            msg = f"no kind has a name that starts with {only}; they start with T01 to T15"
            raise ConfigError(msg)
        now = datetime.now(UTC)
        ca = CertificateAuthority.create(parse_trust_domain(trust_domain), now=now)
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / "ca.pem", ca.root_pem)
        for kind in kinds:
            made = kind.build(ca, now)
            write_file(directory / f"{kind.name}.pem", made.chain_pem)
            write_file(directory / f"{kind.name}-key.pem", made.private_key_pem, mode=0o600)
        index = [
            {"name": k.name, "row": k.row, "expected": k.expected, "client": k.client, "note": k.note} for k in kinds
        ]
        write_file(directory / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    click.echo(f"{len(kinds)} kinds in {directory}")


if __name__ == "__main__":
    main()
