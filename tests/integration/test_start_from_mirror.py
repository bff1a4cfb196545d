"""Brokers that start while Vault is of no use: they serve trust from the mirror of the keyring, and issue nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.jwk import KeySet, PublicJWK
from carnet.testing import CertificateAuthority
from carnet.verify import parse_unverified
from carnet_broker.core.mirror import mirror_signing_input
from carnet_broker.core.requests import RequestKind, RequestStatus
from carnet_broker.demo.openbao import OpenBao
from carnet_broker.edges.vault import RotationClient
from carnet_broker.edges.vault.kv_store import KvSigner
from support.postgres import Postgres
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
    """It has the public keys from the mirror in the store, because the keyring that it kept when it ran before vouches
    for them. When Vault comes it issues, and nothing was restarted.
    """
    shared = settings(tmp_path, vault)
    with start_broker(vault_place, tmp_path / "first", settings=shared) as first:
        keys = KeySet.parse(first.key_set().jwks)
        ca = first.ca
    vault.cut()
    fresh = stack.enter_context(start_broker(vault_place, tmp_path / "first", ca=ca, settings=shared))
    serves_trust(fresh, keys)
    issues_nothing(fresh)
    vault.mend()
    fresh.wait_for(lambda: fresh.readiness()["ready"], "ready once Vault answers")
    assert parse_unverified(fresh.issue("payments").token).kid in keys.keys
    serves_trust(fresh, keys)


def test_a_broker_that_never_saw_vault_does_not_start_from_the_mirror(vault_place, vault, tmp_path):
    """It has kept nothing that could vouch for it: whoever can write to the store could have made it."""
    shared = settings(tmp_path, vault)
    with start_broker(vault_place, tmp_path / "first", settings=shared) as first:
        ca = first.ca
    vault.cut()
    assert "vault.address" in why_it_does_not_start(vault_place, tmp_path / "second", ca, shared)


@pytest.fixture(name="on_postgres")
def _on_postgres(postgres: Postgres, vault: TcpProxy) -> tuple[str, Mapping[str, Any]]:
    """A database of its own, and the settings of brokers on it."""
    database = postgres.create_database()
    address = {"address": f"http://{vault.address}"}
    return database, {"vault": {**STORED["vault"], **address}, "store": {"url": postgres.url(database)}}


def signed_by(postgres: Postgres, database: str) -> tuple[int, str | None, bytes | None]:
    """Return generation and signature of the mirror."""
    with postgres.connect(database) as connection:
        row = connection.execute("SELECT generation, signed_by, signature FROM keyring_mirror").fetchone()
    assert row is not None
    return row


def bring_a_key_of_mine(postgres: Postgres, database: str, *, name: str | None) -> PublicJWK:
    """Do what somebody can who writes to the database: a later keyring, with a key of their own for the ACTIVE one.

    It is signed with that key, in the name of `name`; not at all where that is None.
    """
    mine = ec.generate_private_key(ec.SECP256R1())
    jwk = PublicJWK.of(mine.public_key())
    with postgres.connect(database) as connection:
        row = connection.execute("SELECT content FROM keyring_mirror").fetchone()
        assert row is not None
        content = json.loads(row[0])
        content["generation"] = 1000
        next(key for key in content["keys"] if key["state"] == "ACTIVE")["jwk"] = jwk.to_dict()
        signing_input = mirror_signing_input(content, issuer=content["issuer"], generation=1000)
        signature = None if name is None else KvSigner(jwk.kid, mine).sign(signing_input)
        connection.execute(
            "UPDATE keyring_mirror SET generation = 1000, content = %s, signed_by = %s, signature = %s",
            (json.dumps(content, sort_keys=True), jwk.kid if name == "mine" else name, signature),
        )
        connection.commit()
    return jwk


@pytest.mark.parametrize(
    ("kind", "name"),
    [("kv", None), ("kv", "mine"), ("kv", "theirs"), ("transit", "theirs")],
    ids=["unsigned", "own key", "another's name", "another's name, transit"],
)
def test_whoever_writes_to_the_database_brings_no_key_before_verifiers(  # noqa: PLR0917 - fixtures
    vault_place, vault, postgres, on_postgres, stack, tmp_path, name, kind
):
    """Not by a broker that cannot reach Vault, nor by one that starts then, nor by one that starts beside it. One that
    runs goes on with what it had, and says what it found.
    """
    database, shared = on_postgres
    shared = {**shared, "keys": {"store": kind}}
    running = stack.enter_context(start_broker(vault_place, tmp_path / "running", settings=shared))
    keys = KeySet.parse(running.key_set().jwks)
    generation, signer, signature = signed_by(postgres, database)
    assert generation > 0
    assert signer in keys.keys
    assert 64 == len(signature or b"")
    vault.cut()
    running.wait_for(lambda: metric(running, "carnet_vault_reachable") == 0, "it sees that Vault is away")
    mine = bring_a_key_of_mine(postgres, database, name=signer if name == "theirs" else name)
    running.wait_for(lambda: metric(running, "carnet_mirrors_refused_total") > 0, "it has found the mirror")
    serves_trust(running, keys)
    assert mine.kid not in KeySet.parse(running.key_set().jwks).keys
    refused = [entry["problem"] for entry in running.log() if entry.get("event") == "mirror_refused"]
    assert "the keyring in the shared store, generation 1000, is not believed" in refused[0]
    assert "vault.address" in why_it_does_not_start(vault_place, tmp_path / "fresh", running.ca, shared)
    vault.mend()
    assert "generation 1000, is not believed" in why_it_does_not_start(
        vault_place, tmp_path / "beside", running.ca, shared
    )
    running.wait_for(lambda: metric(running, "carnet_vault_reachable") == 1, "Vault is back", within=20)
    running.wait_for(lambda: running.readiness()["ready"], "it issues", within=20)
    assert parse_unverified(running.issue("payments").token).kid in keys.keys
    serves_trust(running, keys)
    # The remedy of the operations page: the brokers write it anew.
    with postgres.connect(database) as connection:
        connection.execute("DELETE FROM keyring_mirror")
        connection.commit()
    running.wait_for(lambda: is_mirrored(postgres, database), "the mirror is written again", within=20)
    assert (generation, signer) == signed_by(postgres, database)[:2]


def is_mirrored(postgres: Postgres, database: str) -> bool:
    """Say whether there is a mirror."""
    with postgres.connect(database) as connection:
        return connection.execute("SELECT generation FROM keyring_mirror").fetchone() is not None


def why_it_does_not_start(
    place: VaultPlace, directory: Path, ca: CertificateAuthority, shared: Mapping[str, Any]
) -> str:
    """Start a broker that does not start; return what it says."""
    with (
        pytest.raises(AssertionError, match="the broker ended") as ended,
        start_broker(place, directory, ca=ca, settings=shared),
    ):
        pass
    return str(ended.value)


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
    """Vault has forgotten a rotation. A broker that has seen nothing of it knows it from the store, where it is signed
    by the key that was the standby before, and does not go back. Once the last state is there again it issues, and
    nothing was restarted.
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
