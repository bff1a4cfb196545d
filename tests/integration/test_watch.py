"""Watch against a running broker with its store in SQLite: a verifier on the wire that is told what changes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import pytest

from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind, next_digest
from carnet.v1 import token_pb2, token_pb2_grpc, trust_pb2
from support.running_broker import ORDERS, OUTSIDER, PAYMENTS, RunningBroker, reason_of, start_broker
from support.vault import VaultPlace, prepare
from support.watching import hello, watching

SETTINGS = {
    "trust": {"heartbeat": "1s", "max_staleness": "20s"},
    "limits": {"revocations_per_second": 1000, "revocation_burst": 1000},
}


@pytest.fixture(name="place", scope="module")
def _place(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultPlace]:
    place = prepare(openbao, tmp_path_factory.mktemp("login"))
    yield place
    place.close()


@pytest.fixture(name="broker", scope="module")
def _broker(place: VaultPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    with start_broker(place, tmp_path_factory.mktemp("broker"), settings=SETTINGS) as running:
        yield running


def revoke(broker: RunningBroker, token: str, spiffe_id: str = ORDERS) -> int:
    """Revoke a token as one of its holders; return the version."""
    with broker.channel(broker.identity(spiffe_id)) as channel:
        stub = token_pb2_grpc.TokenServiceStub(channel)
        version: int = stub.RevokeToken(token_pb2.RevokeTokenRequest(token=token), timeout=10).revocation_version
        return version


def test_a_verifier_gets_keys_and_a_snapshot_and_then_each_revocation(broker):
    """First all that it needs, then a delta as soon as something is revoked; its digest can be recomputed."""
    with watching(broker) as verifier:
        first = verifier.wait_for(lambda response: response.HasField("key_set"))
        assert broker.key_set().jwks == first.key_set.jwks
        assert first.change.snapshot
        before = verifier.position
        token = broker.issue("payments").token
        version = revoke(broker, token)
        durable = time.monotonic()
        pushed = verifier.wait_for(lambda response: response.change.to_version == version)
        at = next(at for at, response in verifier.responses if response is pushed)
        assert before.revocation_version == pushed.change.from_version
        (entry,) = pushed.change.revocations
        assert trust_pb2.REVOCATION_KIND_TOKEN == entry.kind
        assert at - durable < 0.5
