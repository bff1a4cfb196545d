"""Watch against a running broker with its store in SQLite: a verifier on the wire that is told what changes."""

from __future__ import annotations

import itertools
import secrets
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from carnet import Identity
from carnet.certificate_names import certificate_names
from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind, next_digest
from carnet.testing import CertificateAuthority
from carnet.v1 import token_pb2, token_pb2_grpc, trust_pb2, trust_pb2_grpc
from carnet_broker.edges.grpc.watch import UNANSWERED
from support.attacks import connected
from support.http2 import END_HEADERS, FrameType, frame, grpc_message, request_headers, settings
from support.running_broker import ORDERS, OUTSIDER, PAYMENTS, RunningBroker, reason_of, start_broker
from support.vault import VaultPlace, prepare
from support.watching import (
    RawVerifier,
    hello,
    revoke_a_token_in_store,
    revoke_in_store,
    revoke_many_in_store,
    watching,
)

WATCH = "/carnet.v1.TrustService/Watch"
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
    """Revoke a token as `spiffe_id`; return the version."""
    with broker.channel(broker.identity(spiffe_id)) as channel:
        request = token_pb2.RevokeTokenRequest(token=token)
        answer = token_pb2_grpc.TokenServiceStub(channel).RevokeToken(request, timeout=10)
        return int(answer.revocation_version)


def is_version(version: int) -> Callable[[trust_pb2.WatchResponse], bool]:
    """Return what says whether a response leads to that version."""
    return lambda response: response.position.revocation_version >= version


def arrival(verifier: RawVerifier, response: trust_pb2.WatchResponse) -> float:
    """Return when a response came."""
    return next(at for at, one in verifier.responses if one is response)


def refused(broker: RunningBroker, *arguments: object, **more: object) -> grpc.RpcError:
    """Watch as somebody who must be refused."""
    with watching(broker, *arguments, **more) as verifier:  # type: ignore[arg-type] # passed on
        error = verifier.wait_for_end()
    assert error is not None
    return error


def retry_hint(error: grpc.RpcError) -> bool:
    """Say whether the refusal tells how long to wait."""
    status = rpc_status.from_call(error)
    return any(detail.Unpack(error_details_pb2.RetryInfo()) for detail in status.details)


# -- what it is told ---------------------------------------------------------------------------------------------------


def test_a_verifier_gets_keys_and_a_snapshot_and_then_each_revocation_at_once(broker):
    """First all that it needs, then a delta as soon as something is revoked; its digest can be recomputed."""
    with watching(broker) as verifier:
        first = verifier.wait_for(lambda response: response.HasField("key_set"))
        assert broker.key_set().jwks == first.key_set.jwks
        assert first.change.snapshot
        before = verifier.position
        token = broker.issue("payments").token
        started = time.monotonic()
        version = revoke(broker, token)
        pushed = verifier.wait_for(is_version(version))
        assert (before.revocation_version, version) == (pushed.change.from_version, pushed.change.to_version)
        (entry,) = pushed.change.revocations
        assert trust_pb2.REVOCATION_KIND_TOKEN == entry.kind
        revocation = Revocation(
            entry.version, RevocationKind.TOKEN, entry.value, 0, entry.expires_at.ToDatetime(tzinfo=UTC)
        )
        assert next_digest(before.revocation_digest, revocation) == pushed.change.to_digest
        assert arrival(verifier, pushed) - started < 1.0, "with the handshake of the one who revokes"
        assert not pushed.HasField("key_set")


def test_what_another_replica_has_revoked_comes_before_the_next_look_at_the_store(broker):
    """The store tells of changes, so nobody waits for the poll interval."""
    with watching(broker) as verifier:
        verifier.wait_for(lambda response: response.HasField("key_set"))
        version = revoke_a_token_in_store(broker)
        durable = time.monotonic()
        pushed = verifier.wait_for(is_version(version))
        assert arrival(verifier, pushed) - durable < 0.9


def test_heartbeats_come_in_time_and_say_which_answer_the_broker_had(broker):
    """Nothing changes, and there is a response each second at the latest, with an age and the last answer."""
    with watching(broker) as verifier:
        verifier.wait_for(lambda response: response.answered >= 3)
        beats = [response for _, response in verifier.responses if not response.HasField("change")]
        assert all(beat.age.ToTimedelta() < timedelta(seconds=2) for beat in beats)
        assert timedelta(seconds=1) == beats[0].heartbeat.ToTimedelta()
        times = [at for at, _ in verifier.responses]
        assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 1.5


def test_a_verifier_that_is_up_to_date_is_told_nothing_again_and_one_with_a_gap_what_it_lacks(broker):
    """The position of the hello decides: nothing, what came since, or for another digest all of it."""
    with watching(broker) as verifier:
        verifier.wait_for(lambda response: response.HasField("key_set"))
        old = verifier.position
    version = revoke_a_token_in_store(broker)
    with watching(broker, hello(position=old)) as verifier:
        first = verifier.wait_for(is_version(version))
        assert not first.HasField("key_set")
        assert (old.revocation_version, False) == (first.change.from_version, first.change.snapshot)
        current = verifier.position
    with watching(broker, hello(position=current)) as verifier:
        first = verifier.wait_for(lambda _: True)
        assert (False, False) == (first.HasField("key_set"), first.HasField("change"))
    forked = trust_pb2.Position()
    forked.CopyFrom(current)
    forked.revocation_digest = bytes(32)
    with watching(broker, hello(position=forked)) as verifier:
        assert verifier.wait_for(lambda response: response.HasField("change")).change.snapshot


def test_a_verifier_of_an_older_epoch_gets_a_snapshot(broker):
    """What it knows of another life of the store leads nowhere."""
    older = trust_pb2.Position(epoch=1, generation=1, revocation_version=7, revocation_digest=GENESIS_DIGEST)
    with watching(broker, hello(position=older)) as verifier:
        response = verifier.wait_for(lambda response: response.HasField("change"))
        assert response.change.snapshot
        assert response.position.epoch > 1


def test_a_verifier_becomes_live_when_it_has_loaded_what_there_is(broker):
    """The store counts it once it has answered; one that accepts what is stale is not counted."""
    with watching(broker, hello("counted")) as verifier:
        verifier.wait_for(lambda response: response.live)
    with watching(broker, hello("polls", accepts_stale=True)) as verifier:
        verifier.wait_for(lambda response: response.answered >= 2)
        assert not any(response.live for _, response in verifier.responses)


def test_get_revocations_gives_those_that_poll_the_same(broker):
    """A snapshot at first, then what came since; nothing where nothing came."""
    with broker.channel(broker.identity(PAYMENTS), "trust") as channel:
        stub = trust_pb2_grpc.TrustServiceStub(channel)
        (first,) = stub.GetRevocations(trust_pb2.GetRevocationsRequest(), timeout=10)
        assert first.change.snapshot
        jti = secrets.token_urlsafe(16)
        version = revoke_in_store(broker, RevocationKind.TOKEN, jti, timedelta(minutes=5))
        broker.wait_for(lambda: metric(broker, "carnet_revocation_version") >= version, "the revocation")
        request = trust_pb2.GetRevocationsRequest(**{"from": first.position})
        (second,) = stub.GetRevocations(request, timeout=10)
        assert [jti] == [entry.value for entry in second.change.revocations]
        (third,) = stub.GetRevocations(trust_pb2.GetRevocationsRequest(**{"from": second.position}), timeout=10)
        assert not third.HasField("change")
        assert second.position == third.position


# -- who may watch -----------------------------------------------------------------------------------------------------


def test_a_workload_that_served_by_does_not_name_may_not_watch_or_poll(broker):
    """Orders and the outsider are authenticated, and serve nothing; an unknown audience reads the same."""
    for spiffe_id, audience in ((ORDERS, "payments"), (OUTSIDER, "payments"), (PAYMENTS, "unknown")):
        error = refused(broker, hello(audience=audience), identity=broker.identity(spiffe_id))
        assert (grpc.StatusCode.PERMISSION_DENIED, "NOT_GRANTED") == (error.code(), reason_of(error))
    with broker.channel(broker.identity(ORDERS), "trust") as channel, pytest.raises(grpc.RpcError) as caught:
        list(trust_pb2_grpc.TrustServiceStub(channel).GetRevocations(trust_pb2.GetRevocationsRequest(), timeout=10))
    assert grpc.StatusCode.PERMISSION_DENIED == caught.value.code()


@pytest.mark.parametrize(
    "first",
    [
        hello("no spaces"),
        hello(""),
        hello("x" * 65),
        hello(max_staleness=0),
        hello(max_staleness=2 * 86_400),
        hello(position=trust_pb2.Position(epoch=1, revocation_digest=b"short")),
        trust_pb2.WatchRequest(answer=trust_pb2.WatchAnswer(number=1)),
        trust_pb2.WatchRequest(),
    ],
)
def test_a_first_request_that_cannot_be_is_refused(broker, first):
    """Each with the field that is wrong, and none of them begins a stream."""
    error = refused(broker, first)
    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST") == (error.code(), reason_of(error))


def test_answers_out_of_order_end_the_stream(broker):
    """There is one answer to each response: more of them would be work for nothing."""
    with watching(broker, answers=False) as verifier:
        verifier.wait_for(lambda response: response.HasField("key_set"))
        verifier.answer(2)
        error = verifier.wait_for_end()
    assert error is not None
    assert "INVALID_REQUEST" == reason_of(error)


def test_claims_to_be_far_ahead_are_refused_and_one_ahead_in_the_keyring_is_sent_elsewhere(broker):
    """No broker can have told them; or another replica has, and this one says so."""
    with watching(broker) as verifier:
        verifier.wait_for(lambda response: response.HasField("key_set"))
        here = verifier.position
    far = trust_pb2.Position()
    far.CopyFrom(here)
    far.revocation_version += 1_000_001
    error = refused(broker, hello(position=far))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST") == (error.code(), reason_of(error))
    ahead = trust_pb2.Position()
    ahead.CopyFrom(here)
    ahead.generation += 5
    error = refused(broker, hello(position=ahead))
    assert (grpc.StatusCode.UNAVAILABLE, "BEHIND", True) == (error.code(), reason_of(error), retry_hint(error))


def test_a_believable_claim_begins_a_new_epoch_and_everybody_moves_there(place, tmp_path):
    """A verifier has seen more than the store has: that was restored. Versions go on far above what was seen."""
    with start_broker(place, tmp_path, settings=SETTINGS) as broker, watching(broker, hello("stays")) as stays:
        stays.wait_for(lambda response: response.HasField("key_set"))
        here = stays.position
        ahead = trust_pb2.Position()
        ahead.CopyFrom(here)
        ahead.revocation_version += 3
        with watching(broker, hello("was-ahead", position=ahead)) as verifier:
            response = verifier.wait_for(lambda response: response.change.snapshot)
            assert response.position.epoch > here.epoch
            assert response.position.revocation_version >= ahead.revocation_version + 1_000_000
            stays.wait_for(lambda other: other.position.epoch == response.position.epoch and other.change.snapshot)
        assert 1 == metric(broker, "carnet_store_restored_total")
        (told,) = (line for line in broker.log() if line["event"] == "store_restored")
        assert f"{PAYMENTS} was-ahead" == told["claimed_by"]


# -- how a stream ends -------------------------------------------------------------------------------------------------


def test_a_stream_ends_with_the_certificate_behind_it(broker):
    """Nobody acts, and the stream of a certificate that ends is ended, like a call would be refused."""
    identity = broker.identity(PAYMENTS, not_after=datetime.now(UTC) + timedelta(seconds=4))
    with watching(broker, identity=identity) as verifier:
        verifier.wait_for(lambda response: response.HasField("key_set"))
        error = verifier.wait_for_end(within=8)
    assert error is not None
    assert grpc.StatusCode.UNAUTHENTICATED == error.code()


@pytest.mark.parametrize("form", ["sha256:", "spki-sha256:", "serial:"])
def test_a_stream_ends_when_its_certificate_is_revoked_and_so_does_every_call(broker, form):
    """In each of the three forms that name it; its neighbour with another certificate goes on."""
    identity = broker.identity(PAYMENTS)
    name = next(name for name in sorted(certificate_names(identity.certificate)) if name.startswith(form))
    with watching(broker, hello(form.strip(":")), identity=identity) as verifier, watching(broker) as other:
        verifier.wait_for(lambda response: response.HasField("key_set"))
        other.wait_for(lambda response: response.HasField("key_set"))
        version = revoke_in_store(broker, RevocationKind.CERTIFICATE, name, timedelta(hours=1))
        error = verifier.wait_for_end()
        assert error is not None
        assert grpc.StatusCode.UNAUTHENTICATED == error.code()
        other.wait_for(is_version(version))
    with pytest.raises(grpc.RpcError) as caught:
        broker.key_set(identity=identity)
    assert grpc.StatusCode.UNAUTHENTICATED == caught.value.code()


def test_a_stream_ends_when_the_policy_no_longer_names_its_workload(place, tmp_path):
    """A new policy takes effect on streams that are open, too."""
    with start_broker(place, tmp_path, settings=SETTINGS) as broker, watching(broker) as verifier:
        verifier.wait_for(lambda response: response.HasField("key_set"))
        text = broker.policy_file.read_text()
        broker.policy_file.write_text(text.replace(f"served_by: [{PAYMENTS}]", f"served_by: [{ORDERS}]"))
        error = verifier.wait_for_end()
        assert error is not None
        assert (grpc.StatusCode.PERMISSION_DENIED, "NOT_GRANTED") == (error.code(), reason_of(error))


def test_a_stream_ends_when_the_ca_of_its_certificate_leaves_the_bundle(place, tmp_path):
    """Without a restart; one of the new CA begins, and one of the old CA does not any more."""
    newer = CertificateAuthority.create()
    with start_broker(place, tmp_path, settings=SETTINGS) as broker, watching(broker) as verifier:
        verifier.wait_for(lambda response: response.HasField("key_set"))
        broker.ca_file.write_bytes(newer.root_pem)
        error = verifier.wait_for_end()
        assert error is not None
        assert grpc.StatusCode.UNAUTHENTICATED == error.code()
        issued = newer.issue(PAYMENTS)
        identity = Identity.parse(issued.certificate_pem, issued.private_key_pem)
        with watching(broker, hello("newer"), identity=identity) as other:
            other.wait_for(lambda response: response.HasField("key_set"))
        assert refused(broker, hello("again")).code() in {
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.UNAVAILABLE,  # The handshake already refuses it.
        }


def test_a_newer_stream_of_the_same_verifier_takes_the_place_of_the_older(broker):
    """The same identity and instance is one verifier; another instance is another one."""
    with watching(broker, hello("same")) as older, watching(broker, hello("different")) as different:
        for verifier in (older, different):
            verifier.wait_for(lambda response: response.HasField("key_set"))
        with watching(broker, hello("same")) as newer:
            newer.wait_for(lambda response: response.live)
            error = older.wait_for_end()
            assert error is not None
            assert (grpc.StatusCode.ABORTED, "REPLACED") == (error.code(), reason_of(error))
            different.wait_for(lambda response: response.answered >= 2)


def sessions(broker: RunningBroker) -> set[str]:
    """Return the instances that the store counts."""
    with sqlite3.connect(broker.directory / "store.db") as connection:
        return {row[0] for row in connection.execute("SELECT instance_id FROM verifier_sessions")}


def test_a_verifier_that_says_goodbye_is_waited_for_no_more(broker):
    """At once, and its stream ends well."""
    with watching(broker, hello("polite")) as verifier:
        verifier.wait_for(lambda response: response.live)
        assert "polite" in sessions(broker)
        verifier.goodbye()
        assert verifier.wait_for_end() is None
    broker.wait_for(lambda: "polite" not in sessions(broker), "the session to end")


def test_a_verifier_that_falls_silent_is_cut_and_leaves(broker):
    """After its own max_staleness without an answer it refuses all tokens, so nothing has to wait for it."""
    with watching(broker, hello("silent", max_staleness=2), answers=False) as verifier:
        verifier.wait_for(lambda response: response.HasField("key_set"))
        verifier.answer(1)
        verifier.wait_for(lambda response: response.live)
        error = verifier.wait_for_end(within=5)
        assert error is not None
        assert (grpc.StatusCode.DEADLINE_EXCEEDED, "SILENT") == (error.code(), reason_of(error))
    broker.wait_for(lambda: "silent" not in sessions(broker), "the session to end")


def test_a_verifier_whose_stream_breaks_is_counted_until_it_would_be_stale(broker):
    """It may be on its way to another replica, with all that it has loaded."""
    with watching(broker, hello("broken", max_staleness=3)) as verifier:
        verifier.wait_for(lambda response: response.live)
    broken_at = time.monotonic()
    time.sleep(0.5)
    assert "broken" in sessions(broker)
    broker.wait_for(lambda: "broken" not in sessions(broker), "the session to end")
    assert 1.5 < time.monotonic() - broken_at < 5


def test_streams_of_one_workload_are_bounded_and_leave_its_calls_alone(place, tmp_path):
    """One more than `limits.streams` is refused, and the calls of the workload have a count of their own."""
    few = SETTINGS | {"limits": {"streams": 3, "calls_in_flight": 2}}
    with start_broker(place, tmp_path, settings=few) as broker, ExitStack() as stack:
        for number in range(3):
            verifier = stack.enter_context(watching(broker, hello(f"v{number}")))
            verifier.wait_for(lambda response: response.HasField("key_set"))
        time.sleep(0.2)  # What the limit of calls a second holds back is not what is tried here.
        error = refused(broker, hello("one-too-many"))
        assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS") == (error.code(), reason_of(error))
        assert broker.key_set().jwks


def test_a_broker_that_drains_ends_its_streams_and_says_to_connect_again(place, tmp_path):
    """UNAVAILABLE with a hint, at once; and the verifiers stay counted, because they come back elsewhere."""
    with start_broker(place, tmp_path, settings=SETTINGS) as broker, watching(broker, hello("moves")) as verifier:
        verifier.wait_for(lambda response: response.live)
        broker.process.send_signal(signal.SIGTERM)
        error = verifier.wait_for_end()
        assert error is not None
        assert (grpc.StatusCode.UNAVAILABLE, "DRAINING", True) == (error.code(), reason_of(error), retry_hint(error))
        assert 0 == broker.process.wait(15)
        assert {"moves"} == sessions(broker)


def test_a_verifier_that_takes_nothing_of_what_it_is_sent_is_cut(broker):
    """It gives no window for an answer: it holds up nobody, its stream is ended, and its verifier is not counted."""
    before = metric(broker, "carnet_trust_streams")
    with connected(broker, PAYMENTS, listener="trust", own_settings=settings({4: 0})) as connection:
        stream = connection.next_stream()
        connection.send(
            frame(FrameType.HEADERS, request_headers(WATCH), flags=END_HEADERS, stream=stream),
            frame(FrameType.DATA, grpc_message(hello("stuck").SerializeToString()), stream=stream),
        )
        broker.wait_for(lambda: metric(broker, "carnet_trust_streams") > before, "the stream")
        with watching(broker, hello("beside-it")) as verifier:
            verifier.wait_for(lambda response: response.answered >= 2)
        broker.wait_for(lambda: metric(broker, "carnet_trust_streams") <= before, "the stream to be cut")
    assert any(entry.get("reason") == "SLOW_READER" for entry in broker.log())
    assert "stuck" not in sessions(broker)


def test_a_large_snapshot_comes_in_parts_and_is_loaded_whole(place, tmp_path):
    """Each part fits into the limits of a client; a verifier that answers gets all of them."""
    with start_broker(place, tmp_path, settings=SETTINGS) as broker:
        version = revoke_many_in_store(broker, 9000)
        broker.wait_for(lambda: metric(broker, "carnet_revocation_version") >= version, "the revocations")
        with watching(broker) as verifier:
            verifier.wait_for(lambda response: response.HasField("change") and not response.change.more)
            parts = [response.change for _, response in verifier.responses if response.HasField("change")]
            assert len(parts) > UNANSWERED
            assert 9000 == sum(len(part.revocations) for part in parts)
            verifier.wait_for(lambda response: response.live)


# -- many of them ------------------------------------------------------------------------------------------------------


def test_two_hundred_streams_get_a_revocation_each(broker):
    """A storm of joins, and one push to all of them."""
    with ExitStack() as stack:
        identity = broker.identity(PAYMENTS)
        verifiers = [
            stack.enter_context(watching(broker, hello(f"many-{number}"), identity=identity)) for number in range(200)
        ]
        for verifier in verifiers:
            verifier.wait_for(lambda response: response.HasField("key_set"), within=30)
        for verifier in verifiers:
            verifier.wait_for(lambda response: response.answered >= 1, within=30)
        version = revoke_a_token_in_store(broker)
        for verifier in verifiers:
            verifier.wait_for(is_version(version), within=10)


def metric(broker: RunningBroker, name: str) -> float:
    """Return a metric without labels."""
    for line in broker.get("/metrics")[1].splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise AssertionError(name)
