"""Real OpenBao servers for tests, as fixtures. `tests/conftest.py` makes them known everywhere.

A test that only stores things takes `openbao`, which all tests share, or `vault_place`, a fresh environment in it that
the real bootstrap set up, with its least-privilege roles. A test that seals, stops, restarts or pauses a server takes
`own_openbao`, and may `prepare` a place in it.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hvac
import pytest
from requests.adapters import HTTPAdapter

from bootstrap_vault import Bootstrapped, bootstrap
from carnet_broker.demo.openbao import OpenBao
from carnet_broker.edges.vault import SecretFile, VaultSession, VaultSettings

__all__ = [
    "VaultPlace",
    "fresh_name",
    "idle_sockets",
    "openbao",
    "own_openbao",
    "own_vault_place",
    "prepare",
    "vault_place",
]


def fresh_name(what: str) -> str:
    """Return a name that no other test uses, for a mount, an environment or a role."""
    return f"{what}-{uuid.uuid4().hex[:12]}"


def idle_sockets(session: VaultSession) -> list[socket.socket]:
    """Return the sockets of the connections that `session` keeps."""
    adapter = session._http.get_adapter(session.settings.address)
    assert isinstance(adapter, HTTPAdapter)
    pools = [adapter.poolmanager.pools[key].pool for key in adapter.poolmanager.pools.keys()]  # noqa: SIM118
    kept = [connection for pool in pools if pool is not None for connection in pool.queue if connection is not None]
    return [connection.sock for connection in kept if connection.sock is not None]


@dataclass(frozen=True, slots=True)
class VaultPlace:
    """One environment in a Vault, as the bootstrap leaves it."""

    server: OpenBao
    environment: str
    bootstrapped: Bootstrapped
    _closing: ExitStack = field(default_factory=ExitStack, repr=False)

    def settings(self, role: str = "broker", **changes: Any) -> VaultSettings:  # noqa: ANN401 - any field
        """Return the settings of a role: ``broker``, ``ci`` or ``breakglass``."""
        credentials = self.bootstrapped.credentials[role]
        settings = VaultSettings(
            address=self.server.address,
            ca_file=self.server.ca_file,
            environment=self.environment,
            role_id=SecretFile(credentials.role_id_file),
            secret_id=SecretFile(credentials.secret_id_file),
            timeout=timedelta(seconds=5),
        )
        return replace(settings, **changes)

    def session(self, role: str = "broker", **changes: Any) -> VaultSession:  # noqa: ANN401 - any field of the settings
        """Return a new session of a role; it is closed with the test."""
        session = VaultSession(self.settings(role, **changes))
        self._closing.callback(session.close)
        return session

    def root(self) -> hvac.Client:
        """Return a client that may do anything."""
        return self.server.client()

    @property
    def kv_path(self) -> str:
        """Where the entries are: ``carnet/data/ENVIRONMENT``."""
        return f"carnet/data/{self.environment}"

    @property
    def metadata_path(self) -> str:
        """Where their metadata are."""
        return f"carnet/metadata/{self.environment}"

    def close(self) -> None:
        """Close the sessions."""
        self._closing.close()


def prepare(server: OpenBao, directory: Path) -> VaultPlace:
    """Bootstrap a fresh environment in `server`, and put the login files of its roles into `directory`."""
    environment = fresh_name("env")
    made = bootstrap(
        server.client(),
        environment=environment,
        trust_domain="prod.example",
        workloads=(),
        now=datetime.now(UTC),
        credentials_dir=directory,
    )
    return VaultPlace(server, environment, made)


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


@pytest.fixture
def vault_place(openbao: OpenBao, tmp_path: Path) -> Iterator[VaultPlace]:
    """A fresh environment in the shared server."""
    place = prepare(openbao, tmp_path / "login")
    yield place
    place.close()


@pytest.fixture
def own_vault_place(own_openbao: OpenBao, tmp_path: Path) -> Iterator[VaultPlace]:
    """A fresh environment in a server of its own."""
    place = prepare(own_openbao, tmp_path / "login")
    yield place
    place.close()
