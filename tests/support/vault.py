"""Real OpenBao servers for tests, as fixtures. `tests/conftest.py` makes them known everywhere.

A test that only stores things takes `openbao`, which all tests share, and keeps to mounts and an environment of its own
(`fresh_name`). A test that seals, stops, restarts or pauses a server takes `own_openbao`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from carnet_broker.demo.openbao import OpenBao

__all__ = ["fresh_name", "openbao", "own_openbao"]


def fresh_name(what: str) -> str:
    """Return a name that no other test uses, for a mount, an environment or a role."""
    return f"{what}-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def openbao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBao]:
    """One server for the whole run, with its data in memory. Nobody may stop, seal or pause it."""
    with OpenBao.start(tmp_path_factory.mktemp("openbao"), dev=True) as server:
        yield server


@pytest.fixture
def own_openbao(tmp_path: Path) -> Iterator[OpenBao]:
    """A server that this test may treat badly, over HTTPS, with its data on disk, so that it can be restarted."""
    with OpenBao.start(tmp_path / "openbao", dev=False, tls=True) as server:
        yield server
