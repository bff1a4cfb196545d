"""A workload that is blocked and verifies tokens: it is told what to refuse, and no rotation waits for it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import timedelta

import pytest

from carnet.revocations import RevocationKind
from carnet.v1 import trust_pb2, trust_pb2_grpc
from support.running_broker import PAYMENTS, RunningBroker, start_broker
from support.vault import VaultPlace, prepare
from support.watching import hello, revoke_a_token_in_store, revoke_in_store, watching

SETTINGS = {"trust": {"heartbeat": "500ms", "max_staleness": "20s"}}


@pytest.fixture(name="place", scope="module")
def _place(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultPlace]:
    place = prepare(openbao, tmp_path_factory.mktemp("login"))
    yield place
    place.close()


def sessions(broker: RunningBroker) -> set[str]:
    """Return the instances that the store counts."""
    with sqlite3.connect(broker.directory / "store.db") as connection:
        return {row[0] for row in connection.execute("SELECT instance_id FROM verifier_sessions")}


def test_a_blocked_verifier_is_told_everything_and_counted_again_when_it_is_lifted(place, tmp_path):
    """Its streams go on, also new ones, and it may poll; but the store counts it no more: it is not to be trusted."""
    with start_broker(place, tmp_path, settings=SETTINGS) as broker, watching(broker, hello("open")) as verifier:
        verifier.wait_for(lambda response: response.live)
        assert {"open"} == sessions(broker)
        blocked = revoke_in_store(broker, RevocationKind.BLOCK, PAYMENTS, None)
        verifier.wait_for(lambda response: response.position.revocation_version >= blocked and not response.live)
        broker.wait_for(lambda: not sessions(broker), "the session to end")
        version = revoke_a_token_in_store(broker)
        verifier.wait_for(lambda response: response.change.to_version >= version)
        with watching(broker, hello("new")) as other:
            other.wait_for(lambda response: response.answered >= 3)
            assert not any(response.live for _, response in other.responses)
        assert broker.key_set(identity=broker.identity(PAYMENTS)).jwks
        with broker.channel(broker.identity(PAYMENTS), "trust") as channel:
            stub = trust_pb2_grpc.TrustServiceStub(channel)
            answers = list(stub.GetRevocations(trust_pb2.GetRevocationsRequest(), timeout=10))
        assert version == answers[-1].position.revocation_version
        assert set() == sessions(broker)
        lifted = revoke_in_store(broker, RevocationKind.LIFT, PAYMENTS, timedelta(minutes=5))
        verifier.wait_for(lambda response: response.position.revocation_version >= lifted and response.live)
        assert {"open"} == sessions(broker)
