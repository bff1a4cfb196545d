"""RevokeToken and blocks against a running broker; and what it does while its store is away."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from carnet.encoding import base64url, decode_base64url
from carnet.revocations import RevocationKind
from carnet.v1 import token_pb2, token_pb2_grpc
from carnet.verify import parse_unverified
from support.commands import one_line, run_command
from support.running_broker import (
    ORDERS,
    OUTSIDER,
    PAYMENTS,
    RunningBroker,
    reason_of,
    start_broker,
    write_broker_files,
)
from support.vault import VaultPlace, prepare
from support.watching import hello, revoke_in_store, watching

SETTINGS = {
    "trust": {"heartbeat": "1s", "max_staleness": "4s"},
    "store": {"timeout": "1s"},
    "limits": {"revocation_burst": 5, "revocations_per_second": 1},
}
NOT_ITS_OWN = (grpc.StatusCode.PERMISSION_DENIED, "NOT_GRANTED")


@pytest.fixture(name="place", scope="module")
def _place(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultPlace]:
    place = prepare(openbao, tmp_path_factory.mktemp("login"))
    yield place
    place.close()


@pytest.fixture(name="broker", scope="module")
def _broker(place: VaultPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    settings = SETTINGS | {"limits": {"revocation_burst": 100, "revocations_per_second": 100}}
    with start_broker(place, tmp_path_factory.mktemp("broker"), settings=settings) as running:
        yield running


def revoke(broker: RunningBroker, token: str, spiffe_id: str = ORDERS) -> int:
    """Revoke a token; return the version. Raises `grpc.RpcError`."""
    with broker.channel(broker.identity(spiffe_id)) as channel:
        request = token_pb2.RevokeTokenRequest(token=token)
        answer = token_pb2_grpc.TokenServiceStub(channel).RevokeToken(request, timeout=10)
        return int(answer.revocation_version)


def refusal(broker: RunningBroker, token: str, spiffe_id: str = ORDERS) -> grpc.RpcError:
    """Try to revoke what must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        revoke(broker, token, spiffe_id)
    return caught.value


def test_a_workload_revokes_its_own_token_and_that_is_on_record(broker):
    """Its jti, never its text; the next token says that its issuer knew of it."""
    token = broker.issue("payments").token
    jti = parse_unverified(token).unverified_payload["jti"]
    version = revoke(broker, token)
    assert version > 0
    broker.wait_for(lambda: [one for one in broker.audited() if one["kind"] == "revocation"], "the record")
    (record,) = (one for one in broker.audited() if one["kind"] == "revocation" and one["version"] == version)
    assert ("token", jti, ORDERS) == (record["what"], record["value"], record["by"])
    assert token not in str(broker.audited())
    assert version <= parse_unverified(broker.issue("payments").token).unverified_payload["rv"]


def test_what_is_not_its_own_is_refused_in_one_way(broker):
    """Another's token, one that is no token, one that is signed by somebody else: nobody learns which it was."""
    token = broker.issue("payments").token
    header, payload, signature = token.split(".")
    raw = bytearray(decode_base64url(signature.encode()))
    raw[5] ^= 1
    forged = f"{header}.{payload}.{base64url(bytes(raw)).decode()}"
    errors = [
        refusal(broker, token, PAYMENTS),
        refusal(broker, token, OUTSIDER),
        refusal(broker, "no token"),
        refusal(broker, ""),
        refusal(broker, forged),
        refusal(broker, token + "A" * 9000),
    ]
    assert {NOT_ITS_OWN} == {(error.code(), reason_of(error)) for error in errors}
    assert 1 == len({error.details() for error in errors})
    assert revoke(broker, token) > 0


def test_a_workload_that_revokes_too_often_has_to_wait(place, tmp_path):
    """A bound of its own: each costs a commit that all brokers wait for."""
    with start_broker(place, tmp_path, settings=SETTINGS) as broker:
        token = broker.issue("payments").token
        for _ in range(5):
            revoke(broker, token)
        error = refusal(broker, token)
        assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS") == (error.code(), reason_of(error))


def test_a_blocked_workload_gets_no_tokens_until_it_is_lifted(broker):
    """By its name; it may still be a verifier."""
    revoke_in_store(broker, RevocationKind.BLOCK, ORDERS, None)

    def blocked() -> bool:
        try:
            broker.issue("payments")
        except grpc.RpcError as error:
            return (grpc.StatusCode.PERMISSION_DENIED, "BLOCKED") == (error.code(), reason_of(error))
        return False

    broker.wait_for(blocked, "the block")
    broker.wait_for(lambda: "BLOCKED" in str(broker.audited()), "the record")
    revoke_in_store(broker, RevocationKind.LIFT, ORDERS, timedelta(hours=1))
    broker.wait_for(lambda: not blocked(), "the block to be lifted")


# -- without the store -------------------------------------------------------------------------------------------------


def database(broker: RunningBroker) -> sqlite3.Connection:
    """Open the store's file behind the broker's back."""
    return sqlite3.connect(broker.directory / "store.db", isolation_level=None, timeout=10)


def test_a_store_that_takes_no_writes_is_reported_and_the_broker_stays_ready(place, tmp_path):
    """Tokens are issued and verifiers told; only revoking has to wait, and is told so."""
    with start_broker(place, tmp_path, settings=SETTINGS) as broker, closing(database(broker)) as held:
        token = broker.issue("payments").token
        held.execute("BEGIN IMMEDIATE")
        broker.wait_for(lambda: any("store" in text for text in broker.readiness()["degraded"]), "degraded")
        assert 200 == broker.get("/readyz")[0]
        assert broker.issue("payments").token
        with watching(broker) as verifier:
            verifier.wait_for(lambda response: response.HasField("key_set"))
            error = refusal(broker, token)
            assert (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE") == (error.code(), reason_of(error))
            held.execute("ROLLBACK")
            broker.wait_for(lambda: not broker.readiness()["degraded"], "all to be well")
            version = revoke(broker, token)
            verifier.wait_for(lambda response: response.position.revocation_version >= version)


def test_a_broker_that_cannot_read_the_store_for_too_long_tells_and_issues_nothing(place, tmp_path):
    """Beyond trust.max_staleness its streams end with a hint, it is not ready, and it comes back by itself."""
    with start_broker(place, tmp_path, settings=SETTINGS) as broker, closing(database(broker)) as behind:
        with watching(broker) as verifier:
            verifier.wait_for(lambda response: response.HasField("key_set"))
            behind.execute("ALTER TABLE revocations RENAME TO away")
            behind.execute("ALTER TABLE revocation_log RENAME TO log_away")
            assert broker.issue("payments").token
            error = verifier.wait_for_end(within=15)
            assert error is not None
            assert (grpc.StatusCode.UNAVAILABLE, "STALE") == (error.code(), reason_of(error))
        assert 503 == broker.get("/readyz")[0]
        with pytest.raises(grpc.RpcError) as caught:
            broker.issue("payments")
        assert "STORE_UNAVAILABLE" == reason_of(caught.value)
        behind.execute("ALTER TABLE away RENAME TO revocations")
        behind.execute("ALTER TABLE log_away RENAME TO revocation_log")
        broker.wait_for(lambda: 200 == broker.get("/readyz")[0], "the broker to be ready")
        with watching(broker, hello("again")) as verifier:
            verifier.wait_for(lambda response: response.live)


@pytest.mark.parametrize(
    "url", ["sqlite:////nowhere/at/all/store.db", "postgresql://carnet@127.0.0.1:1/carnet"], ids=["file", "database"]
)
def test_a_broker_whose_store_cannot_be_used_does_not_start_and_names_the_setting(place, tmp_path: Path, url):
    """One line, after it has waited for a while."""
    settings = {"store": {"url": url, "start_within": "1s", "timeout": "1s"}}
    config, _ = write_broker_files(place, tmp_path, settings=settings)
    assert "store.url" in one_line(run_command("carnet_broker", "serve", "--config", config))
