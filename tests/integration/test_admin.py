"""AdminService against a running broker: who may, what it revokes, who has heard of it; and its commands."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from carnet import Identity
from carnet.claims import certificate_thumbprint, claims_of_payload
from carnet.encoding import decode_base64url
from carnet.revocations import RevocationKind
from carnet.testing import CertificateAuthority
from carnet.tls import channel_options
from carnet.v1 import admin_pb2, admin_pb2_grpc
from carnet.verify import parse_unverified
from carnet_broker.edges.vault import RotationClient
from support.commands import Ended, one_line, run_command, vault_environment
from support.running_broker import (
    BROKER_NAME,
    ORDERS,
    PAYMENTS,
    POLICY,
    RunningBroker,
    reason_of,
    start_broker,
    write_broker_files,
)
from support.vault import VaultPlace, prepare
from support.watching import RawVerifier, hello, watching

ADMIN = "spiffe://prod.example/ns/ops/sa/breakglass"
ELSEWHERE = "spiffe://prod.example/ns/ops/sa/elsewhere"
OTHER = "spiffe://prod.example/ns/ops/sa/other"
WITH_ADMINS = f"""{POLICY}
admins:
  - {{ workload: {ADMIN}, from: [127.0.0.0/8] }}
  - {{ workload: {OTHER} }}
  - {{ workload: {ELSEWHERE}, from: [10.0.0.0/8, "::1/128"] }}
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "trust": {"heartbeat": "1s", "max_staleness": "20s"},
    "keys": {"max_age": "1s", "poller_interval": 0, "replica_lag": "500ms", "skew": "200ms", "min_interval": 0},
    "vault": {"poll_interval": "200ms"},
}
REQUESTS: dict[str, Any] = {
    "Revoke": admin_pb2.RevokeRequest(token_id="3q2-7wAAAAAAAAAAAAAAAA"),
    "GetSpread": admin_pb2.GetSpreadRequest(revocation_version=1),
    "RevokeKey": admin_pb2.RevokeKeyRequest(key_id="A" * 43),
    "GetStatus": admin_pb2.GetStatusRequest(),
}


@pytest.fixture(name="place", scope="module")
def _place(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultPlace]:
    place = prepare(openbao, tmp_path_factory.mktemp("login"))
    yield place
    place.close()


@pytest.fixture(name="broker", scope="module")
def _broker(place: VaultPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    directory = tmp_path_factory.mktemp("broker")
    with start_broker(place, directory, policy=WITH_ADMINS, settings=SETTINGS) as running:
        running.ca.issue(ADMIN).write(directory, "admin")
        running.ca.issue(ORDERS).write(directory, "orders")
        yield running


def ask(broker, method, request, identity: Identity | None = None):
    """Call a method of AdminService. Raises `grpc.RpcError`."""
    with broker.channel(identity or broker.identity(ADMIN), "admin") as channel:
        return getattr(admin_pb2_grpc.AdminServiceStub(channel), method)(request, timeout=20)


def refusal(broker, method, request, identity: Identity) -> grpc.RpcError:
    """Call a method as somebody who must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        ask(broker, method, request, identity)
    return caught.value


def revoke(broker, **target: Any) -> admin_pb2.RevokeResponse:  # noqa: ANN401 - fields of the message
    """Revoke as the admin."""
    answer: admin_pb2.RevokeResponse = ask(broker, "Revoke", admin_pb2.RevokeRequest(**target))
    return answer


def here(instance: str) -> Any:  # noqa: ANN401 - a message
    """Introduce a verifier that nobody waits for once it has been away for some seconds."""
    return hello(instance, max_staleness=4)


def wait_until_alone(broker: RunningBroker) -> None:
    """Wait until the verifiers of other tests do not count any more."""

    def is_alone() -> bool:
        return bool(ask(broker, "GetStatus", admin_pb2.GetStatusRequest()).live_verifiers == 1)

    broker.wait_for(is_alone, "the others to leave", within=20)


def jti_of(token: str) -> str:
    """Return the name of a token."""
    return claims_of_payload(parse_unverified(token).unverified_payload).token_id


def pushed(verifier: RawVerifier, version: int) -> list[Any]:
    """Wait until a verifier has `version`, and return the revocations that came with it."""
    response = verifier.wait_for(lambda response: response.position.revocation_version >= version)
    return list(response.change.revocations)


def command(broker: RunningBroker, *arguments: str, who: str = "admin", **changes: str) -> Ended:
    """Run ``carnet-broker`` with the certificate of the admin, or of another."""
    environment = {
        "CARNET_ADMIN": broker.addresses["admin"],
        "CARNET_CERT_FILE": str(broker.directory / f"{who}.pem"),
        "CARNET_KEY_FILE": str(broker.directory / f"{who}-key.pem"),
        "CARNET_CA_FILE": str(broker.ca_file),
        **changes,
    }
    return run_command("carnet_broker", *arguments, environment=environment)


# -- who may -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", REQUESTS)
@pytest.mark.parametrize("workload", [ORDERS, PAYMENTS, ELSEWHERE])
def test_who_is_no_admin_or_calls_from_another_network_is_refused_and_recorded(broker, method, workload):
    """A workload, a verifier, and an admin from elsewhere read the same text; the record has the cause and the peer."""
    identity = broker.identity(workload)
    error = refusal(broker, method, REQUESTS[method], identity)
    assert (grpc.StatusCode.PERMISSION_DENIED, "NOT_GRANTED") == (error.code(), reason_of(error))
    assert "the policy names no such admin, or not from this address" == error.details()

    def recorded() -> list[dict[str, Any]]:
        return [
            record
            for record in broker.audited()
            if record["kind"] == "refusal" and record.get("certificate") == identity.thumbprint
        ]

    broker.wait_for(recorded, "the record of the refusal")
    (record,) = recorded()
    assert (workload, "NOT_GRANTED") == (record["sub"], record["reason"])
    assert record["peer"].startswith("ipv4:127.0.0.1:")
    assert record["detail"].startswith(f"{method}: ")


@pytest.mark.parametrize("method", REQUESTS)
def test_a_stranger_does_not_get_in(broker, method):
    """No certificate, and one of another authority: there is no connection to ask anything on."""
    other = CertificateAuthority.create("prod.example").issue(ADMIN)
    for key, chain in ((None, None), (other.private_key_pem, other.certificate_pem)):
        credentials = grpc.ssl_channel_credentials(broker.ca.root_pem, key, chain)
        options = channel_options(BROKER_NAME)
        with grpc.secure_channel(broker.addresses["admin"], credentials, options) as channel:
            stub = getattr(admin_pb2_grpc.AdminServiceStub(channel), method)
            with pytest.raises(grpc.RpcError) as caught:
                stub(REQUESTS[method], timeout=5)
        assert grpc.StatusCode.UNAVAILABLE == caught.value.code()


@pytest.mark.parametrize("method", REQUESTS)
def test_an_admin_whose_certificate_is_revoked_is_not_authenticated(broker, method):
    """One admin cuts off the certificate of another, whose next call is refused."""
    identity = broker.identity(OTHER)
    ask(broker, "GetStatus", admin_pb2.GetStatusRequest(), identity)
    revoke(broker, certificate=f"sha256:{identity.thumbprint}")
    error = refusal(broker, method, REQUESTS[method], identity)
    assert grpc.StatusCode.UNAUTHENTICATED == error.code()


def test_an_admin_that_is_blocked_is_refused_until_lifted(broker):
    """A block holds for all that its subject may do."""
    identity = broker.identity(OTHER)
    revoke(broker, subject=OTHER, block=True)
    assert grpc.StatusCode.PERMISSION_DENIED == refusal(broker, "GetStatus", REQUESTS["GetStatus"], identity).code()
    revoke(broker, lift=OTHER)
    ask(broker, "GetStatus", admin_pb2.GetStatusRequest(), identity)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"admin": "0.0.0.0:0"}, "admin_beyond_loopback"),
        ({"admin": "0.0.0.0:0", "admin_beyond_loopback": True}, "the policy names no admins"),
    ],
)
def test_an_admin_port_that_others_reach_needs_its_flag_and_admins(place, tmp_path: Path, settings, says):
    """Without the one or the other the broker does not start; with both the configuration is good."""
    config, ca = write_broker_files(place, tmp_path, settings={"listen": settings})
    assert says in one_line(run_command("carnet_broker", "check-config", "--config", str(config)))
    full = {"listen": {"admin": "0.0.0.0:0", "admin_beyond_loopback": True}}
    config, _ = write_broker_files(place, tmp_path, ca=ca, policy=WITH_ADMINS, settings=full)
    assert 0 == run_command("carnet_broker", "check-config", "--config", str(config)).code


# -- what it revokes ---------------------------------------------------------------------------------------------------


def test_each_kind_is_durable_pushed_to_verifiers_and_on_the_record(broker):
    """What was asked for comes out at a verifier, with its version; the record has who, what and why."""
    leaf = broker.identity(ORDERS)
    ends = (datetime.now(UTC) + timedelta(minutes=3)).replace(microsecond=0)
    kinds = {
        "token": {"token_id": secrets.token_urlsafe(16), "ends_at": ends},
        "root": {"root": secrets.token_urlsafe(16)},
        "certificate": {"certificate": f"sha256:{leaf.thumbprint}"},
        "subject": {"subject": "spiffe://prod.example/ns/shop/sa/gone"},
    }
    with watching(broker, here("kinds")) as verifier:
        verifier.wait_for(lambda response: response.live)
        for kind, target in kinds.items():
            answer = revoke(broker, reason=f"why {kind}", **target)
            value = next(iter(target.values()))
            assert value in [entry.value for entry in pushed(verifier, answer.revocation_version)]
            found = [
                record
                for record in broker.audited()
                if record["kind"] == "revocation" and record["version"] == answer.revocation_version
            ]
            ((who, what, why),) = [(record["by"], record["what"], record["reason"]) for record in found]
            assert (ADMIN, kind, f"why {kind}") == (who, what, why)
            assert answer.HasField("expires_at")
    assert grpc.StatusCode.UNAUTHENTICATED == _issue_error(broker, leaf).code()


def _issue_error(broker: RunningBroker, identity: Identity) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        broker.issue(identity=identity)
    return caught.value


def test_a_block_stops_issuing_and_a_lift_ends_it(broker):
    """Between the two the workload gets nothing; a lift of what is not blocked is an error."""
    broker.issue()
    assert not revoke(broker, subject=ORDERS, block=True).HasField("expires_at")
    error = _issue_error(broker, broker.identity(ORDERS))
    assert (grpc.StatusCode.PERMISSION_DENIED, "BLOCKED") == (error.code(), reason_of(error))
    revoke(broker, lift=ORDERS)
    broker.issue()
    error = refusal(broker, "Revoke", admin_pb2.RevokeRequest(lift=ORDERS), broker.identity(ADMIN))
    assert ("INVALID_REQUEST", "lift: this subject is not blocked") == (reason_of(error), error.details())


@pytest.mark.parametrize(
    "request_",
    [
        admin_pb2.RevokeRequest(),
        admin_pb2.RevokeRequest(token_id="two words"),
        admin_pb2.RevokeRequest(token_id="3q2-7wAAAAAAAAAAAAAAAA", block=True),
        admin_pb2.RevokeRequest(subject="orders"),
        admin_pb2.RevokeRequest(certificate="sha256:short"),
        admin_pb2.RevokeRequest(token_id="3q2-7wAAAAAAAAAAAAAAAA", reason="x" * 201),
        admin_pb2.RevokeRequest(token_id="3q2-7wAAAAAAAAAAAAAAAA", ends_at={"seconds": 1}),
        admin_pb2.RevokeRequest(token_id="3q2-7wAAAAAAAAAAAAAAAA", ends_at={"seconds": 2**62}),
        admin_pb2.RevokeRequest(subject=ORDERS, ends_at={"seconds": 4_000_000_000}),
    ],
)
def test_what_cannot_be_revoked_is_refused_and_changes_nothing(broker, request_):
    """INVALID_ARGUMENT that names the field."""
    before = ask(broker, "GetStatus", admin_pb2.GetStatusRequest()).position.revocation_version
    error = refusal(broker, "Revoke", request_, broker.identity(ADMIN))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST") == (error.code(), reason_of(error))
    assert before == ask(broker, "GetStatus", admin_pb2.GetStatusRequest()).position.revocation_version


def test_the_spread_counts_live_verifiers_and_names_who_has_not_acknowledged(broker):
    """One answers and one is silent: half have it, with times from durable; the other is named."""
    with watching(broker, here("answers")) as quick, watching(broker, here("silent")) as silent:
        for verifier in (quick, silent):
            verifier.wait_for(lambda response: response.live)
        silent.stop_answering()
        version = revoke(broker, token_id=secrets.token_urlsafe(16)).revocation_version
        request = admin_pb2.GetSpreadRequest(revocation_version=version)
        pushed(quick, version)
        broker.wait_for(
            lambda: "answers" not in [one.instance_id for one in ask(broker, "GetSpread", request).missing],
            "the answer",
        )
        spread = ask(broker, "GetSpread", request)
        assert "silent" in [one.instance_id for one in spread.missing]
        assert spread.live - spread.acknowledged == len(spread.missing)
        assert timedelta(0) < spread.p50.ToTimedelta() <= spread.slowest.ToTimedelta() < timedelta(seconds=2)
        status = ask(broker, "GetStatus", admin_pb2.GetStatusRequest())
        assert {"answers", "silent"} <= {one.instance_id for one in status.verifiers}
        assert [True] == [replica.live for replica in status.replicas]
        quick.goodbye()
        silent.goodbye()


def test_the_spread_of_what_was_never_revoked_is_an_error(broker):
    """A version beyond the last one, and 0."""
    for version in (0, 2**40):
        request = admin_pb2.GetSpreadRequest(revocation_version=version)
        assert "INVALID_REQUEST" == reason_of(refusal(broker, "GetSpread", request, broker.identity(ADMIN)))


def test_a_key_is_revoked_at_once_pushed_and_recorded(broker):
    """The standby signs in the same step, and a verifier has the key set without the key within moments."""
    kid = parse_unverified(broker.issue().token).kid
    with watching(broker, here("keys")) as verifier:
        verifier.wait_for(lambda response: response.live)
        started = time.monotonic()
        answer = ask(broker, "RevokeKey", admin_pb2.RevokeKeyRequest(key_id=kid))
        verifier.wait_for(lambda response: response.HasField("key_set") and kid not in response.key_set.jwks)
        assert time.monotonic() - started < 5
        verifier.goodbye()
    assert answer.active_key_id == parse_unverified(broker.issue().token).kid != kid
    (record,) = [record for record in broker.audited() if record["kind"] == "key_revocation"]
    assert (ADMIN, kid, answer.active_key_id) == (record["by"], record["kid"], record["active"])
    error = refusal(broker, "RevokeKey", REQUESTS["RevokeKey"], broker.identity(ADMIN))
    assert (grpc.StatusCode.NOT_FOUND, "UNKNOWN_KEY") == (error.code(), reason_of(error))
    malformed = admin_pb2.RevokeKeyRequest(key_id="no key")
    assert "INVALID_REQUEST" == reason_of(refusal(broker, "RevokeKey", malformed, broker.identity(ADMIN)))


# -- the commands ------------------------------------------------------------------------------------------------------


def test_revoke_with_wait_tells_the_measured_spread(broker):
    """Exit code 0, the version, and the times; with --json the same as members."""
    with watching(broker, here("waited-for")) as verifier:
        verifier.wait_for(lambda response: response.live)
        wait_until_alone(broker)
        jti = jti_of(broker.issue().token)
        ended = command(broker, "revoke", "--jti", jti, "--reason", "stolen", "--wait", "--json")
        assert 0 == ended.code, ended.err
        told = json.loads(ended.out)
        assert (str(RevocationKind.TOKEN), jti) == (told["kind"], told["value"])
        assert told["spread"]["live"] == told["spread"]["acknowledged"] >= 1
        assert 0 < told["spread"]["p50_seconds"] <= told["spread"]["slowest_seconds"] < 2
        plain = command(broker, "revoke", "--root", jti, "--wait")
        assert 0 == plain.code, plain.err
        assert "from durable to acknowledged: p50 " in plain.out
        verifier.goodbye()


def test_revoke_with_wait_names_who_has_not_acknowledged_and_is_durable_all_the_same(broker):
    """Exit code 4, the verifier by identity and instance, and the version on standard output."""
    with watching(broker, here("deaf")) as verifier:
        verifier.wait_for(lambda response: response.live)
        verifier.stop_answering()
        ended = command(broker, "revoke", "--jti", "3q2-7wAAAAAAAAAAAAAAAA", "--wait", "--timeout", "1500ms")
        assert 4 == ended.code
        assert f"missing: {PAYMENTS} deaf: " in ended.err
        assert "It is durable" in ended.err.splitlines()[-1]
        assert ended.out.startswith("revoked: token 3q2-7wAAAAAAAAAAAAAAAA, as version ")
        verifier.goodbye()


def test_revoke_takes_a_certificate_by_file_by_hex_and_by_base64url(broker, tmp_path: Path):
    """All three name the same; a file also says when it ends."""
    issued = broker.ca.issue("spiffe://prod.example/ns/shop/sa/stolen")
    file, _ = issued.write(tmp_path, "stolen")
    name = f"sha256:{certificate_thumbprint(issued.leaf)}"
    thumbprint = name.removeprefix("sha256:")
    forms = [str(file), decode_base64url(thumbprint.encode()).hex(), thumbprint, name]
    told = [json.loads(command(broker, "revoke", "--certificate", form, "--json").out) for form in forms]
    assert [name] * 4 == [one["value"] for one in told]
    assert datetime.fromisoformat(told[0]["expires_at"]) > issued.leaf.not_valid_after_utc


def test_who_is_no_admin_ends_with_3(broker):
    """One line, and nothing is revoked."""
    assert "names no such admin" in one_line(
        command(broker, "revoke", "--jti", "3q2-7wAAAAAAAAAAAAAAAA", who="orders"), 3
    )


def test_a_broker_that_cannot_be_reached_ends_with_1(broker):
    """The line names the variable and the address."""
    line = one_line(command(broker, "revoke", "--jti", "3q2-7wAAAAAAAAAAAAAAAA", CARNET_ADMIN="127.0.0.1:1"), 1)
    assert line.startswith("CARNET_ADMIN 127.0.0.1:1: no answer")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give one of --jti"),
        (["--jti", "3q2-7wAAAAAAAAAAAAAAAA", "--root", "3q2-7wAAAAAAAAAAAAAAAA"], "not 2 of them"),
        (["--jti", "-"], "never the token"),
        (["--jti", "eyJhbGciOiJFUzI1NiJ9.e30.c2ln"], "never the token"),
        (["--root", "two words"], "is no jti"),
        (["--jti", "3q2-7wAAAAAAAAAAAAAAAA", "--block"], "--block goes with --subject"),
        (["--jti", "3q2-7wAAAAAAAAAAAAAAAA", "--lift"], "--lift goes with --subject"),
        (["--subject", ORDERS, "--lift", "--block"], "give one of them"),
        (["--subject", "orders"], "--subject: "),
        (["--certificate", "no-such-file"], "--certificate no-such-file: No such file"),
        (["--jti", "3q2-7wAAAAAAAAAAAAAAAA", "--ends-at", "tomorrow"], "--ends-at 'tomorrow' is no moment"),
        (["--jti", "3q2-7wAAAAAAAAAAAAAAAA", "--ends-at", "2020-01-01T00:00:00Z"], "is over"),
        (["--jti", "3q2-7wAAAAAAAAAAAAAAAA", "--reason", "x" * 201], "reason: at most 200"),
        (["--subject", "spiffe://prod.example/ns/shop/sa/free", "--lift"], "not blocked"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(broker, arguments, says):
    """It says what to write; a token is never taken from a command line, nor shown."""
    line = one_line(command(broker, "revoke", *arguments))
    assert says in line
    assert "eyJ" not in line


def test_keys_revoke_and_status_ask_the_broker_where_it_is_set(broker):
    """A key is revoked with no role in Vault; the status has brokers, verifiers and the standby."""
    kid = parse_unverified(broker.issue().token).kid
    ended = command(broker, "keys", "revoke", kid)
    assert (0, "") == (ended.code, ended.err)
    assert ended.out.startswith("done: the key is revoked, as generation ")
    for unknown in ("A" * 43, "-" + "A" * 42, "-h" + "A" * 41, "--" + "A" * 41):
        assert "no such key" in one_line(command(broker, "keys", "revoke", unknown), 3)
    content = RotationClient(broker.place.session("ci")).keyring()
    assert ["REVOKED"] == [key["state"] for key in content["keys"] if key["jwk"]["kid"] == kid]
    with watching(broker, here("seen")) as verifier:
        verifier.wait_for(lambda response: response.live)
        told = json.loads(command(broker, "keys", "status", "--json", **vault_environment(broker.place, "ci")).out)
        assert "seen" in [one["instance_id"] for one in told["brokers"]["verifiers"]]
        assert [True] == [one["live"] for one in told["brokers"]["replicas"]]
        shown = command(broker, "keys", "status", **vault_environment(broker.place, "ci"))
        assert f"{PAYMENTS} seen: generation " in shown.out
        verifier.goodbye()


def test_keys_revoke_via_vault_needs_vault_although_a_broker_is_set(broker):
    """The choice on the command line counts."""
    assert "VAULT_ADDR is not set" in one_line(command(broker, "keys", "revoke", "A" * 43, "--via", "vault"))
