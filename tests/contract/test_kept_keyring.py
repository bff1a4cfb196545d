"""What every `KeptKeyring` promises: the one on the disk, and the one that other tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from carnet_broker.kept_keyring import KeyringFile
from carnet_broker.ports import KeptKeyring
from support.keyrings import ISSUER, T0, TIMING, jwk, running
from support.rotation import MemoryKept


@pytest.fixture(name="kept", params=["file", "memory"])
def _kept(request: pytest.FixtureRequest, tmp_path: Path) -> KeptKeyring:
    if request.param == "memory":
        return MemoryKept()
    return KeyringFile(tmp_path, issuer=ISSUER, store_name="kv", failed=lambda error: pytest.fail(str(error)))


def test_what_was_kept_last_is_found(kept: KeptKeyring):
    """Nothing at first; then the last one whole, whatever its generation."""
    assert kept.load() is None
    later = running().with_revoked(jwk(0).kid, T0, TIMING)
    for keyring in (running(), later, running()):
        kept.keep(keyring)
        assert keyring == kept.load()
