"""docs/operations.md, "A private key that nobody names": its commands, run as they are written there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from carnet.jwk import PublicJWK
from carnet_broker.core.keyring import Keyring
from carnet_broker.core.keyring_document import keyring_to_content
from carnet_broker.demo.openbao import openbao_binary
from carnet_broker.edges.vault import KvKeyStore, VaultKeyringDocument
from support.keyrings import T0
from support.vault import VaultPlace

PAGE = (Path(__file__).resolve().parents[2] / "docs/operations.md").read_text()


def commands(environment: str) -> list[str]:
    """Return the shell commands of the section, for this environment."""
    section = PAGE.split("\n## A private key that nobody names\n", 1)[1].split("\n## ", 1)[0]
    return [block.replace("prod/", f"{environment}/") for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL)]


def run(place: VaultPlace, folder: Path, command: str) -> int:
    """Run `command` as somebody who may do everything in Vault."""
    links = folder / "bin"
    links.mkdir(exist_ok=True)
    if not (links / "bao").exists():
        (links / "bao").symlink_to(openbao_binary())
    server = place.server
    environment = {
        "PATH": f"{links}:{os.environ['PATH']}",
        "HOME": str(folder),
        "BAO_ADDR": server.address,
        "BAO_TOKEN": server.root_token,
        "BAO_CACERT": str(server.ca_file or ""),
        "LC_ALL": "C",
    }
    return subprocess.run(["/bin/sh", "-c", command], cwd=folder, env=environment, check=False, timeout=60).returncode


def test_orphaned_private_keys_are_found_and_removed_and_no_others(vault_place: VaultPlace, tmp_path: Path):
    """Of three keys in Vault the keyring names one; one more is entered between the two looks, and stays as well."""
    session = vault_place.session()
    store, document = KvKeyStore(session), VaultKeyringDocument(session)
    named, late, orphan = (store.create() for _ in range(3))
    keyring = Keyring(issuer="https://tokens.prod.example").with_created(named.jwk, None, T0)
    version = document.replace(keyring_to_content(keyring, store="kv"), expected_version=0)
    list_them, compare, remove = commands(vault_place.environment)
    assert 0 == run(vault_place, tmp_path, list_them)
    assert {named.jwk.kid, late.jwk.kid, orphan.jwk.kid} == set((tmp_path / "held").read_text().split())
    entered = keyring.with_created(late.jwk, None, T0)
    document.replace(keyring_to_content(entered, store="kv"), expected_version=version)
    assert 0 == run(vault_place, tmp_path, compare)
    assert [orphan.jwk.kid] == (tmp_path / "orphans").read_text().split()
    assert 0 == run(vault_place, tmp_path, remove)
    left = vault_place.root().list(f"{vault_place.metadata_path}/keys")
    assert left is not None
    assert {named.jwk.kid, late.jwk.kid} == set(left["data"]["keys"])


def test_a_keyring_that_cannot_be_read_makes_no_orphans(vault_place: VaultPlace, tmp_path: Path):
    """The twin: without it every key would look like one that nobody names."""
    held = PublicJWK.of(ec.generate_private_key(ec.SECP256R1()).public_key()).kid
    (tmp_path / "held").write_text(f"{held}\n")
    assert 0 != run(vault_place, tmp_path, commands(vault_place.environment)[1])
    assert not (tmp_path / "orphans").exists()
