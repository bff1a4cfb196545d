"""The broker as a whole: real process, real OpenBao, real mutual TLS."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from carnet.claims import certificate_thumbprint
from carnet.encoding import decode_base64url
from carnet.jwk import KeySet
from carnet.v1 import token_pb2, token_pb2_grpc
from carnet.verify import Binding, Expectations, verify_token
from support.running_broker import ISSUER, ORDERS, OUTSIDER, POLICY, RunningBroker, reason_of, start_broker
from support.vault import prepare


@pytest.fixture(scope="module", params=["kv", "transit"])
def broker(request, openbao, tmp_path_factory) -> Iterator[RunningBroker]:
    """One broker for each key store."""
    directory = tmp_path_factory.mktemp("broker")
    place = prepare(openbao, directory / "login")
    settings = {"keys": {"store": request.param}, "limits": {"tokens_per_second": 1000, "token_burst": 1000}}
    with start_broker(place, directory / "broker", settings=settings) as running:
        yield running
    place.close()


def refused(broker: RunningBroker, *args: object, **more: object) -> grpc.RpcError:
    """Ask for a token that must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        broker.issue(*args, **more)
    return caught.value


def test_a_token_is_what_the_contract_says(broker):
    """It verifies with the served keys for this caller, and says what was asked for; the answer says until when."""
    identity = broker.identity()
    before = datetime.now(UTC)
    answer = broker.issue("payments", ["charge"], identity=identity)
    keys = KeySet.parse(broker.key_set().jwks)
    claims = verify_token(
        answer.token,
        keys=keys,
        expectations=Expectations(issuer=ISSUER, audience="payments"),
        peer_thumbprint=identity.thumbprint,
        now=datetime.now(UTC),
    )
    assert (ORDERS, ORDERS, ("charge",)) == (str(claims.subject), str(claims.client_id), claims.scopes)
    assert certificate_thumbprint(identity.certificate) == claims.confirmation
    assert timedelta(minutes=5) == claims.expires_at - claims.issued_at
    assert ["charge"] == list(answer.scopes)
    expires_in = answer.expires_in.ToTimedelta()
    assert abs(claims.expires_at - before - expires_in) < timedelta(seconds=2)
    assert timedelta(0) < answer.refresh_in.ToTimedelta() < expires_in
    assert not answer.ttl_shortened


def test_no_scope_asks_for_all_that_the_grant_gives(broker):
    """The answer names them."""
    assert ["charge"] == list(broker.issue("payments").scopes)


def test_an_audience_without_binding_gets_a_token_without_confirmation(broker):
    """Policy says `binding: none`; everything else is alike."""
    answer = broker.issue("reports")
    claims = verify_token(
        answer.token,
        keys=KeySet.parse(broker.key_set().jwks),
        expectations=Expectations(issuer=ISSUER, audience="reports", binding=Binding.NONE),
        peer_thumbprint=None,
        now=datetime.now(UTC),
    )
    assert claims.confirmation is None


@pytest.mark.parametrize(
    ("audience", "scopes", "code", "reason"),
    [
        ("payments", ["refund"], grpc.StatusCode.PERMISSION_DENIED, "SCOPE_NOT_GRANTED"),
        ("payments", ["charge", "refund"], grpc.StatusCode.PERMISSION_DENIED, "SCOPE_NOT_GRANTED"),
        ("payments", ["*"], grpc.StatusCode.PERMISSION_DENIED, "SCOPE_NOT_GRANTED"),
        ("payments", ["CHARGE"], grpc.StatusCode.PERMISSION_DENIED, "SCOPE_NOT_GRANTED"),
        ("bank", [], grpc.StatusCode.PERMISSION_DENIED, "NOT_GRANTED"),
        ("payment", [], grpc.StatusCode.PERMISSION_DENIED, "NOT_GRANTED"),
        ("Payments", [], grpc.StatusCode.PERMISSION_DENIED, "NOT_GRANTED"),
        ("payments/../reports", [], grpc.StatusCode.PERMISSION_DENIED, "NOT_GRANTED"),
        ("", [], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("pay ments", [], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("a" * 256, [], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("payments", ["charge", "charge"], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("payments", ["charge "], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("payments", [""], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("payments", [f"s{number}" for number in range(65)], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ],
)
def test_b01_b02_what_is_not_granted_is_refused_whole(broker, audience, scopes, code, reason):
    """Never narrowed, never matched by half; what is not well formed is told apart, by the name of the field."""
    error = refused(broker, audience, scopes)
    assert (code, reason) == (error.code(), reason_of(error))


def test_b20_an_unknown_audience_reads_like_one_that_is_not_granted(broker):
    """Nobody finds out by asking which audiences there are."""
    outsider = broker.identity(OUTSIDER)
    known, unknown = refused(broker, "payments", identity=outsider), refused(broker, "bank", identity=outsider)
    assert (known.code(), known.details(), reason_of(known)) == (unknown.code(), unknown.details(), reason_of(unknown))


@pytest.mark.parametrize(
    "ttl",
    [timedelta(0), timedelta(seconds=-1), timedelta(milliseconds=999), timedelta(days=36_500)],
)
def test_b03_a_life_that_makes_no_sense_is_refused(broker, ttl):
    """Zero, negative, under a second, a hundred years."""
    assert "INVALID_REQUEST" == reason_of(refused(broker, "payments", ttl=ttl))


def test_b03_a_longer_life_is_shortened_and_said_so_and_a_shorter_one_granted(broker):
    """The grant's limit holds; what is within it is given to the second."""
    longer = broker.issue("payments", ttl=timedelta(hours=1))
    assert longer.ttl_shortened
    assert timedelta(minutes=9) < longer.expires_in.ToTimedelta() <= timedelta(minutes=10)
    shorter = broker.issue("payments", ttl=timedelta(seconds=60))
    assert not shorter.ttl_shortened
    assert timedelta(seconds=58) < shorter.expires_in.ToTimedelta() <= timedelta(seconds=60)


def test_b03_a_token_never_outlives_the_callers_certificate(broker):
    """It ends with it; and when that leaves too little life, the caller is told to renew."""
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=90)
    answer = broker.issue("payments", identity=broker.identity(not_after=soon))
    assert answer.expires_in.ToTimedelta() <= timedelta(seconds=90)
    ending = refused(broker, "payments", identity=broker.identity(not_after=soon - timedelta(seconds=70)))
    assert (grpc.StatusCode.FAILED_PRECONDITION, "CERTIFICATE_ENDING") == (ending.code(), reason_of(ending))


def test_many_tokens_in_one_call_each_have_their_own_result(broker):
    """Refusals do not spoil the others, and the order is that of the requests."""
    asked = [token_pb2.IssueTokenRequest(audience=name) for name in ("payments", "bank", "reports", "")]
    with broker.channel() as channel:
        stub = token_pb2_grpc.TokenServiceStub(channel)
        results = stub.IssueTokens(token_pb2.IssueTokensRequest(requests=asked), timeout=10).results
        with pytest.raises(grpc.RpcError) as none:
            stub.IssueTokens(token_pb2.IssueTokensRequest(), timeout=10)
        with pytest.raises(grpc.RpcError) as many:
            stub.IssueTokens(token_pb2.IssueTokensRequest(requests=asked[:1] * 65), timeout=10)
    assert ["issued", "refused", "issued", "refused"] == [result.WhichOneof("result") for result in results]
    assert (7, "NOT_GRANTED") == (results[1].refused.code, results[1].refused.reason)
    assert (3, "INVALID_REQUEST") == (results[3].refused.code, results[3].refused.reason)
    assert results[0].issued.token != results[2].issued.token
    assert ["INVALID_REQUEST"] * 2 == [reason_of(none.value), reason_of(many.value)]


def test_every_token_is_in_the_audit_record_and_none_is_its_text(broker):
    """The record names it by its jti before it leaves; refusals are there too."""
    answer = broker.issue("payments")
    claims = json.loads(_payload(answer.token))
    refused(broker, "bank")
    issued = [record for record in broker.audited() if record.get("jti") == claims["jti"]]
    assert [(ORDERS, "payments", ["charge"])] == [(one["sub"], one["aud"], one["scope"]) for one in issued]
    broker.wait_for(
        lambda: [r for r in broker.audited() if r["kind"] == "refusal" and r.get("aud") == "bank"], "the refusal"
    )
    everything = b"".join(file.read_bytes() for file in broker.audit_directory.glob("*"))
    assert answer.token.encode() not in everything
    assert answer.token.rpartition(".")[2].encode() not in everything


def _payload(token: str) -> bytes:
    return decode_base64url(token.split(".")[1].encode())


def test_b11_logs_metrics_and_answers_hold_no_secret(broker):
    """No token, no signature, no login secret of Vault."""
    token = broker.issue("payments").token
    secrets = [
        token.encode(),
        token.rpartition(".")[2].encode(),
        broker.place.bootstrapped.credentials["broker"].secret_id_file.read_bytes().strip(),
        (broker.directory / "broker-key.pem").read_bytes()[60:120],
    ]
    said = (
        (broker.directory / "log").read_bytes() + broker.get("/metrics")[1].encode() + broker.get("/readyz")[1].encode()
    )
    assert [] == [secret for secret in secrets if secret in said]


def test_g12_health_is_for_authenticated_callers_and_nothing_else_is_served(broker):
    """`Check` answers SERVING on both listeners; Watch, reflection and unknown methods are not there."""
    for listener in ("tokens", "trust"):
        with broker.channel(listener=listener) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            assert (
                health_pb2.HealthCheckResponse.SERVING == stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
            )
            with pytest.raises(grpc.RpcError) as watch:
                next(iter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=5)))
            assert grpc.StatusCode.UNIMPLEMENTED == watch.value.code()
            for method in (
                "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                "/carnet.v1.TokenService/Nothing",
            ):
                with pytest.raises(grpc.RpcError) as unknown:
                    channel.unary_unary(method)(b"", timeout=5)
                assert grpc.StatusCode.UNIMPLEMENTED == unknown.value.code()


def test_token_and_trust_listeners_serve_their_own_service_only(broker):
    """A verifier has no business at the token port, and the reverse."""
    with broker.channel(listener="trust") as channel, pytest.raises(grpc.RpcError) as caught:
        token_pb2_grpc.TokenServiceStub(channel).IssueToken(token_pb2.IssueTokenRequest(audience="payments"), timeout=5)
    assert grpc.StatusCode.UNIMPLEMENTED == caught.value.code()


def test_the_plain_port_serves_keys_health_and_metrics(broker):
    """The same keys as over gRPC, with the max-age; nothing else is there."""
    assert (200, "ok\n") == broker.get("/livez")
    status, body = broker.get("/oauth2/jwks")
    assert (200, json.loads(broker.key_set().jwks)) == (status, json.loads(body))
    assert {"ready": True, "problems": [], "degraded": []} == broker.readiness()
    assert "carnet_keyring_generation" in broker.get("/metrics")[1]
    assert 404 == broker.get("/oauth2/token")[0]


def test_g06_a_message_over_the_limit_is_refused(broker):
    """64 KiB is the cap; the process goes on."""
    error = refused(broker, "payments", ["s" * 100 + str(number) for number in range(1000)])
    assert grpc.StatusCode.RESOURCE_EXHAUSTED == error.code()
    assert broker.issue("payments").token


def test_g09_a_request_that_never_comes_is_ended(openbao, tmp_path):
    """A caller that opens a call and sends nothing is told so after `read_within`, and holds nobody up."""
    place = prepare(openbao, tmp_path / "login")
    settings = {"limits": {"read_within": "500ms"}}
    with start_broker(place, tmp_path / "broker", settings=settings) as broker, broker.channel() as channel:
        stalled = channel.stream_unary("/carnet.v1.TokenService/IssueToken")

        def nothing() -> Iterator[bytes]:
            time.sleep(3)
            yield b""

        call = stalled.future(nothing(), timeout=10)
        assert broker.issue("payments").token
        assert grpc.StatusCode.DEADLINE_EXCEEDED == call.exception(timeout=5).code()
        assert "SLOW_REQUEST" == reason_of(call.exception())
    place.close()


def test_b09_too_many_calls_of_one_workload_are_refused_with_the_time_to_wait(openbao, tmp_path):
    """By SPIFFE ID, whatever the connection; another workload is not touched, and waiting as told helps."""
    place = prepare(openbao, tmp_path / "login")
    settings = {"limits": {"tokens_per_second": 2, "token_burst": 4}}
    with start_broker(place, tmp_path / "broker", settings=settings) as broker:
        for _ in range(4):
            broker.issue("payments")
        error = refused(broker, "payments")
        assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS") == (error.code(), reason_of(error))
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in rpc_status.from_call(error).details)
        other = refused(broker, "payments", identity=broker.identity(OUTSIDER))
        assert "NOT_GRANTED" == reason_of(other)
        time.sleep(retry.retry_delay.ToTimedelta().total_seconds() + 0.05)
        assert broker.issue("payments").token
    place.close()


def test_sigterm_drains_and_ends_with_zero(openbao, tmp_path):
    """Calls under way are answered, the exit code is 0, and the log says so."""
    place = prepare(openbao, tmp_path / "login")
    with start_broker(place, tmp_path / "broker") as broker:
        broker.issue("payments")
        assert 0 == broker.stop(signal.SIGTERM)
        assert ["draining", "stopped"] == [entry["event"] for entry in broker.log()[-2:]]
    place.close()


def test_b12_a_new_policy_is_in_force_with_no_restart_and_a_bad_one_never_is(openbao, tmp_path):
    """Within two seconds, or at once with SIGHUP; a bad file leaves the last good one, and says degraded."""
    place = prepare(openbao, tmp_path / "login")
    with start_broker(place, tmp_path / "broker") as broker:
        outsider = broker.identity(OUTSIDER)
        refused(broker, "payments", identity=outsider)
        broker.policy_file.write_text(
            POLICY + f"  - {{ workload: {OUTSIDER}, audience: payments, scopes: [charge] }}\n"
        )
        broker.reload()
        broker.wait_for(lambda: [e for e in broker.log() if e["event"] == "reloaded"], "the reload")
        assert broker.issue("payments", identity=outsider).token
        for bad in (
            "",
            "grants: all",
            POLICY.replace("grants:", "gants:"),
            POLICY.replace(ISSUER, "https://other.example"),
        ):
            failures = len([e for e in broker.log() if e["event"] == "reload_failed"])
            broker.policy_file.write_text(bad)
            broker.wait_for(
                lambda known=failures: len([e for e in broker.log() if e["event"] == "reload_failed"]) > known,
                "the alarm",
            )
            assert broker.issue("payments", identity=outsider).token
            assert broker.readiness()["degraded"]
        broker.policy_file.write_text(POLICY)
        broker.wait_for(lambda: not broker.readiness()["degraded"], "the good policy")
        refused(broker, "payments", identity=outsider)
    place.close()
