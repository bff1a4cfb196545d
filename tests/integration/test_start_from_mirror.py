"""Brokers that start while Vault is of no use: they serve trust from the mirror of the keyring, and issue nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from carnet.jwk import KeySet
from carnet.verify import parse_unverified
from carnet_broker.core.requests import RequestKind, RequestStatus
from carnet_broker.demo.openbao import OpenBao
from carnet_broker.edges.vault import RotationClient
from support.running_broker import RunningBroker, reason_of, start_broker
from support.tcp_proxy import TcpProxy, proxy_to
from support.vault import VaultPlace
from support.watching import watching

STORED = {"vault": {"poll_interval": "200ms", "start_within": "500ms", "timeout": "2s"}}


@pytest.fixture(name="vault")
def _vault(vault_place: VaultPlace) -> Iterator[TcpProxy]:
    """The line to Vault, which the test may cut."""
    with proxy_to(vault_place.server.address.partition("://")[2]) as line:
        yield line


@pytest.fixture(name="stack")
def _stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def settings(directory: Path, line: TcpProxy) -> Mapping[str, Any]:
    """Return the settings of all brokers of a test: one store, and Vault behind `line`."""
    return {
        "vault": {**STORED["vault"], "address": f"http://{line.address}"},
        "store": {"url": f"sqlite:///{directory.resolve()}/shared.db"},
    }


def watched(broker: RunningBroker) -> KeySet:
    """Return the keys that a new verifier is told on its stream."""
    with watching(broker) as verifier:
        return KeySet.parse(verifier.wait_for(lambda response: response.HasField("key_set")).key_set.jwks)


def issues_nothing(broker: RunningBroker) -> None:
    """Check that a token is refused for want of a key, and that the broker says that it is not ready."""
    with pytest.raises(grpc.RpcError) as refused:
        broker.issue("payments")
    assert (grpc.StatusCode.UNAVAILABLE, "NO_SIGNING_KEY") == (refused.value.code(), reason_of(refused.value))
    assert 503 == broker.get("/readyz")[0]
    assert any(problem.startswith("signing key:") for problem in broker.readiness()["problems"])


def serves_trust(broker: RunningBroker, keys: KeySet) -> None:
    """Check that verifiers get `keys`, whether they poll or watch."""
    assert keys == KeySet.parse(broker.key_set().jwks)
    assert keys == watched(broker)


def test_a_broker_that_starts_without_vault_serves_trust_and_issues_once_vault_is_there(
    vault_place, vault, stack, tmp_path
):
    """It has the public keys from the mirror in the store. When Vault comes it issues, and nothing was restarted."""
    shared = settings(tmp_path, vault)
    with start_broker(vault_place, tmp_path / "first", settings=shared) as first:
        keys = KeySet.parse(first.key_set().jwks)
        ca = first.ca
    vault.cut()
    fresh = stack.enter_context(start_broker(vault_place, tmp_path / "second", ca=ca, settings=shared))
    serves_trust(fresh, keys)
    issues_nothing(fresh)
    vault.mend()
    fresh.wait_for(lambda: fresh.readiness()["ready"], "ready once Vault answers")
    assert parse_unverified(fresh.issue("payments").token).kid in keys.keys
    serves_trust(fresh, keys)


class Backups:
    """Copies of all that a Vault has on its disk."""

    def __init__(self, server: OpenBao, directory: Path) -> None:
        self._server = server
        self._directory = directory
        self._data = server.directory / "data"

    def take(self, name: str) -> None:
        """Copy what there is."""
        self._server.stop()
        shutil.copytree(self._data, self._directory / name)
        self._server.restart()

    def restore(self, name: str) -> None:
        """Put a copy in place of what there is."""
        self._server.stop()
        shutil.rmtree(self._data)
        shutil.copytree(self._directory / name, self._data)
        self._server.restart()


def test_k07_a_fresh_broker_that_meets_a_restored_vault_serves_trust_from_the_mirror_and_issues_nothing(
    own_vault_place, stack, tmp_path
):
    """Vault has forgotten a rotation. A broker that has seen nothing of it knows it from the store, and does not go
    back. Once the last state is there again it issues, and nothing was restarted.
    """
    place = own_vault_place
    shared = {**STORED, "store": {"url": f"sqlite:///{tmp_path.resolve()}/shared.db"}}
    backups = Backups(place.server, tmp_path)
    with start_broker(place, tmp_path / "first", settings=shared) as first:
        before = KeySet.parse(first.key_set().jwks)
        backups.take("old")
        breakglass = RotationClient(place.session("breakglass"))
        request = breakglass.submit(RequestKind.ROTATE_NOW)
        first.wait_for(lambda: is_done(breakglass, request), "the rotation", within=20)
        keys, ca = KeySet.parse(first.key_set().jwks), first.ca
    assert before.keys.keys() < keys.keys.keys()
    backups.take("last")
    backups.restore("old")
    fresh = stack.enter_context(start_broker(place, tmp_path / "second", ca=ca, settings=shared))
    serves_trust(fresh, keys)
    issues_nothing(fresh)
    fresh.wait_for(lambda: metric(fresh, "carnet_keyring_regressions_total") > 1, "it looks at Vault again")
    backups.restore("last")
    fresh.wait_for(lambda: fresh.readiness()["ready"], "ready once Vault is as it was", within=20)
    assert parse_unverified(fresh.issue("payments").token).kid in keys.keys


def metric(broker: RunningBroker, name: str) -> float:
    """Return a metric without labels."""
    lines = broker.get("/metrics")[1].splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def is_done(client: RotationClient, request: str) -> bool:
    """Say whether a request has its last answer."""
    result = client.result(request)
    return result is not None and result.status is RequestStatus.DONE
