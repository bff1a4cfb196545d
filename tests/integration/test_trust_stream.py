"""Verifiers that are pushed to, against a broker that can fail and lie: real gRPC, real mutual TLS, real signatures."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from carnet.certificate_names import certificate_names
from carnet.errors import ConfigError, InvalidTokenError, InvalidTokenReason, KeySetUnavailableError
from carnet.revocations import Revocation, RevocationKind
from carnet.trust import AsyncVerifier, Verifier
from carnet.v1 import trust_pb2
from carnet.verify import parse_unverified
from support.broker_stub import ISSUER, BrokerStub
from support.verifiers import KINDS, ORDERS, SHORT, Scene, Threaded, stage, until, verifying

WITHIN = 0.25
"""Seconds within which a revocation that was made is in force here."""
SECOND = timedelta(seconds=1)


@pytest.fixture(name="scene")
def _scene(tmp_path: Path) -> Iterator[Scene]:
    with stage(tmp_path, "stream") as scene:
        yield scene


def token_id(token: str) -> str:
    """Return the jti of a token."""
    return str(parse_unverified(token).unverified_payload["jti"])


async def accepted(verifier: Threaded | AsyncVerifier, token: str, scene: Scene, **how: Any) -> bool:  # noqa: ANN401
    """Say whether a token is good (True) or revoked (False); anything else is raised."""
    try:
        await verifier.verify(token, peer_certificate=scene.orders.certificate, **how)
    except InvalidTokenError as error:
        if error.reason is not InvalidTokenReason.REVOKED:
            raise
        return False
    return True


async def until_refused(verifier: Threaded | AsyncVerifier, token: str, scene: Scene) -> float:
    """Wait until a token is refused because it was revoked; return for how many seconds it was not."""
    start = time.monotonic()
    while await accepted(verifier, token, scene):  # noqa: ASYNC110 - no event says so
        await asyncio.sleep(0.002)
    return time.monotonic() - start


async def until_open(verifier: Threaded | AsyncVerifier, target: str) -> None:
    """Wait until the stream to `target` is open."""
    async with asyncio.timeout(15):
        await until(lambda: verifier.status().target == target)


@pytest.mark.parametrize("kind", KINDS)
async def test_keys_are_pushed_and_nothing_is_asked_for(kind: str, scene: Scene):
    """The first token is verified with what the stream brought; the broker knows who watches, and what it has."""
    async with verifying(kind, scene.settings) as verifier:
        assert await accepted(verifier, scene.token(), scene)
        scene.broker.rotate(keep_old=False)
        token = scene.token()
        await until(lambda: verifier.status().generation == 2)
        assert await accepted(verifier, token, scene)
        assert [] == scene.broker.key_set_calls
        await until(lambda: scene.broker.answers[-1].position.generation == 2)
        (hello,) = scene.broker.hellos
        assert ("payments", False, False) == (hello.audience, hello.HasField("position"), hello.accepts_stale)
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", hello.instance_id)
        assert timedelta(minutes=5) == hello.max_staleness.ToTimedelta()
        answers = list(scene.broker.answers)
        assert [*range(1, len(answers) + 1)] == [answer.number for answer in answers]
        assert (1, 2) == (answers[0].position.generation, answers[-1].position.generation)
        status = verifier.status()
        assert (scene.broker.target, True, "push", "") == (
            status.target,
            status.live,
            status.supply,
            status.last_error,
        )
        assert scene.broker.position == verifier.position()
        assert verifier.staleness() < 5 * SECOND
        assert verifier.ready()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_withdrawn_key_is_gone_as_soon_as_it_is_pushed(kind: str, scene: Scene):
    """K12: a token of the old key is refused, and its key is asked for by nobody: the stream has said it all."""
    token = scene.token()
    async with verifying(kind, scene.settings) as verifier:
        assert await accepted(verifier, token, scene)
        scene.broker.rotate(keep_old=False)
        await until(lambda: verifier.status().generation == 2)
        for _ in range(3):
            with pytest.raises(InvalidTokenError) as refused:
                await verifier.verify(token, peer_certificate=scene.orders.certificate)
            assert InvalidTokenReason.UNKNOWN_KEY is refused.value.reason
        assert [] == scene.broker.key_set_calls


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_that_the_stream_did_not_bring_yet_is_asked_for_beside_it(kind: str, scene: Scene):
    """One question for the missing key; the stream goes on, and so do the rules for unknown keys."""
    async with verifying(kind, scene.settings) as verifier:
        assert await accepted(verifier, scene.token(), scene)
        scene.broker.tamper = lambda response: None if response.HasField("key_set") else response
        key = scene.broker.rotate()
        assert await accepted(verifier, scene.token(), scene)
        assert [key.kid] == scene.broker.key_set_calls
        scene.broker.tamper = None
        assert await until_refused(verifier, await _revoked(scene, verifier), scene) < 5


async def _revoked(scene: Scene, verifier: Threaded | AsyncVerifier) -> str:
    token = scene.token()
    assert await accepted(verifier, token, scene)
    scene.broker.revoke(RevocationKind.TOKEN, token_id(token))
    return token


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_revoked_is_refused_at_once_and_nothing_else(kind: str, scene: Scene):
    """Promise B: by jti, by root, by subject; within a quarter of a second."""
    cron = "spiffe://prod.example/ns/shop/sa/cron"
    async with verifying(kind, scene.settings) as verifier:
        other = scene.token(subject=cron)
        for what in (RevocationKind.TOKEN, RevocationKind.ROOT, RevocationKind.SUBJECT):
            token = scene.token()
            assert await accepted(verifier, token, scene)
            scene.broker.revoke(what, ORDERS if what is RevocationKind.SUBJECT else token_id(token))
            assert await until_refused(verifier, token, scene) < WITHIN
            assert await accepted(verifier, other, scene)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["sha256", "spki-sha256", "serial"])
async def test_tokens_of_a_revoked_certificate_are_refused_by_each_of_its_names(kind: str, form: str, scene: Scene):
    """The thumbprint is in the token; the key and the number are in the certificate that the caller shows."""
    name = next(name for name in certificate_names(scene.orders.certificate) if name.startswith(form + ":"))
    token = scene.token()
    async with verifying(kind, scene.settings) as verifier:
        assert await accepted(verifier, token, scene)
        scene.broker.revoke(RevocationKind.CERTIFICATE, name)
        assert await until_refused(verifier, token, scene) < WITHIN
        other = scene.broker.mint(thumbprint=scene.payments.thumbprint)
        await verifier.verify(other, peer_certificate=scene.payments.certificate)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_block_lasts_until_it_is_lifted(kind: str, scene: Scene):
    """Tokens of before the lift stay refused; those that were issued after it are good."""
    async with verifying(kind, scene.settings) as verifier:
        token = scene.token()
        assert await accepted(verifier, token, scene)
        scene.broker.revoke(RevocationKind.BLOCK, ORDERS)
        assert await until_refused(verifier, token, scene) < WITHIN
        lift = scene.broker.revoke(RevocationKind.LIFT, ORDERS)
        await until(lambda: verifier.status().revocation_version == lift.version)
        assert not await accepted(verifier, token, scene)
        assert await accepted(verifier, scene.token(revocation_version=lift.version), scene)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_broker_that_restarts_is_followed_again_from_where_it_was(kind: str, scene: Scene):
    """Tokens are verified meanwhile; what was revoked meanwhile comes as a delta to the same instance."""
    async with verifying(kind, scene.settings) as verifier:
        first, second = scene.token(), scene.token()
        scene.broker.revoke(RevocationKind.TOKEN, token_id(first))
        await verifier.wait_ready()
        await until(lambda: verifier.status().revocation_version == 1)
        scene.broker.down()
        await until(lambda: verifier.status().target is None)
        assert (True, False) == (await accepted(verifier, second, scene), await accepted(verifier, first, scene))
        scene.broker.revoke(RevocationKind.TOKEN, token_id(second))
        scene.broker.up()
        assert await until_refused(verifier, second, scene) < 15
        hellos = scene.broker.hellos
        assert 1 == len({hello.instance_id for hello in hellos})
        assert 1 == hellos[-1].position.revocation_version


@pytest.mark.parametrize("kind", KINDS)
async def test_another_broker_takes_over(kind: str, scene: Scene):
    """The one that was followed goes down for good: the other one is, within seconds, from the same position."""
    with BrokerStub.start(scene.broker.ca, signing_key=scene.broker.signing_key) as other:
        brokers = {broker.target: broker for broker in (scene.broker, other)}
        async with verifying(kind, scene.settings, trust=list(brokers)) as verifier:
            await verifier.wait_ready()
            followed = brokers.pop(verifier.status().target)
            (left,) = brokers.values()
            token = scene.token()
            assert await accepted(verifier, token, scene)
            followed.down()
            await until_open(verifier, left.target)
            left.revoke(RevocationKind.TOKEN, token_id(token))
            assert await until_refused(verifier, token, scene) < WITHIN


@pytest.mark.parametrize("kind", KINDS)
async def test_a_broker_that_says_nothing_for_two_heartbeats_is_left(kind: str, scene: Scene):
    """A process that was stopped keeps its connection; the verifier does not wait for it."""
    scene.broker.heartbeat = SECOND / 2
    with BrokerStub.start(scene.broker.ca, signing_key=scene.broker.signing_key) as other:
        brokers = {broker.target: broker for broker in (scene.broker, other)}
        async with verifying(kind, scene.settings, trust=list(brokers)) as verifier:
            other.heartbeat = SECOND / 2
            await verifier.wait_ready()
            followed = brokers.pop(verifier.status().target)
            (left,) = brokers
            started = time.monotonic()
            followed.watch_faults.hang()
            await until_open(verifier, left)
            assert 1 < time.monotonic() - started < 8


@pytest.mark.parametrize("kind", KINDS)
async def test_knowledge_that_is_too_old_decides_nothing_unless_a_call_accepts_it(kind: str, scene: Scene):
    """`on_stale` of the verifier, and of one call; the message says what is old, and what it died of."""
    token = scene.token()
    scene.broker.heartbeat = SECOND / 5
    async with verifying(kind, scene.settings, max_staleness=SECOND) as verifier:
        assert await accepted(verifier, token, scene)
        scene.broker.down()
        await asyncio.sleep(1.2)
        assert not verifier.ready()
        with pytest.raises(KeySetUnavailableError, match="over the limit of 1 s, and no newer one could be had"):
            await verifier.verify(token, peer_certificate=scene.orders.certificate)
        assert await accepted(verifier, token, scene, on_stale="accept")
        with pytest.raises(ConfigError, match="on_stale is 'shrug'"):
            await verifier.verify(token, peer_certificate=scene.orders.certificate, on_stale="shrug")
        scene.broker.up()
        await verifier.wait_ready()
        assert await accepted(verifier, token, scene)
        await until(lambda: scene.broker.hellos[-1].accepts_stale)  # No rotation waits for such a one.


@pytest.mark.parametrize("kind", KINDS)
async def test_who_begins_to_accept_stale_says_so_to_the_broker_at_once(kind: str, scene: Scene):
    """The stream is opened anew with another Hello."""
    async with verifying(kind, scene.settings) as verifier:
        assert await accepted(verifier, scene.token(), scene)
        assert not scene.broker.hellos[-1].accepts_stale
        assert await accepted(verifier, scene.token(), scene, on_stale="accept")
        await until(lambda: scene.broker.hellos[-1].accepts_stale)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_age_that_the_broker_states_counts_on_a_stream_too(kind: str, scene: Scene):
    """A broker that has not read its store for ten minutes pushes what decides nothing; nobody waits for it."""
    scene.broker.age = timedelta(minutes=10)
    async with verifying(kind, scene.settings) as verifier:
        with pytest.raises(KeySetUnavailableError, match="over the limit of 300 s"):
            await verifier.verify(scene.token(), peer_certificate=scene.orders.certificate)
        started = time.monotonic()
        with pytest.raises(KeySetUnavailableError):
            await verifier.verify(scene.token(), peer_certificate=scene.orders.certificate)
        assert time.monotonic() - started < 1
        assert verifier.staleness() > timedelta(minutes=10)


def _skip_one(response: trust_pb2.WatchResponse) -> None:
    response.change.from_version += 1


def _wrong_digest(response: trust_pb2.WatchResponse) -> None:
    response.change.to_digest = response.position.revocation_digest = bytes(32)


def _unknown_kind(response: trust_pb2.WatchResponse) -> None:
    response.change.revocations[0].kind = 77


def _no_end(response: trust_pb2.WatchResponse) -> None:
    response.change.revocations[0].ClearField("expires_at")


def _half_second(response: trust_pb2.WatchResponse) -> None:
    response.change.revocations[0].expires_at.nanos = 500_000_000


def _end_of_time(response: trust_pb2.WatchResponse) -> None:
    response.change.revocations[0].expires_at.seconds = 2**62


def _answer_not_given(response: trust_pb2.WatchResponse) -> None:
    response.answered = 1000


def _no_position(response: trust_pb2.WatchResponse) -> None:
    response.ClearField("position")


def _long_age(response: trust_pb2.WatchResponse) -> None:
    response.age.seconds = 2**62


def _no_keys(response: trust_pb2.WatchResponse) -> None:
    response.key_set.CopyFrom(trust_pb2.GetKeySetResponse(issuer=ISSUER, generation=1, jwks='{"keys":[]}'))


LIES = [
    _skip_one,
    _wrong_digest,
    _unknown_kind,
    _no_end,
    _half_second,
    _end_of_time,
    _answer_not_given,
    _no_position,
    _long_age,
    _no_keys,
]


def lying(lie: Callable[[trust_pb2.WatchResponse], None]) -> Callable[[trust_pb2.WatchResponse], Any]:
    """Return what makes a broker lie whenever it tells of a revocation.

    A verifier that has seen the lie asks for a snapshot, in which some lies cannot be told. It gets none of use.
    """

    def tamper(response: trust_pb2.WatchResponse) -> trust_pb2.WatchResponse:
        if response.change.snapshot:
            _no_position(response)
        elif response.change.revocations:
            lie(response)
        return response

    return tamper


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lie", LIES)
async def test_k15_a_broker_that_is_wrong_is_not_believed_and_what_is_known_stays(
    kind: str, lie: Callable[[trust_pb2.WatchResponse], None], scene: Scene
):
    """What was revoked stays revoked, good tokens stay good, and once it tells the truth it is followed again."""
    async with verifying(kind, scene.settings) as verifier:
        old = await _revoked(scene, verifier)
        await until_refused(verifier, old, scene)
        scene.broker.tamper = lying(lie)
        scene.broker.revocation_faults.unavailable()
        new = scene.token()
        scene.broker.revoke(RevocationKind.TOKEN, token_id(new))
        await until(lambda: bool(verifier.status().last_error))
        assert (False, True) == (await accepted(verifier, old, scene), await accepted(verifier, new, scene))
        assert 1 == verifier.status().revocation_version
        scene.broker.tamper = None
        assert await until_refused(verifier, new, scene) < 15
        assert not await accepted(verifier, old, scene)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_replica_that_lags_is_left_for_one_that_does_not(kind: str, scene: Scene):
    """Rule 10: keeps its own, and tries another replica."""
    with BrokerStub.start(scene.broker.ca, signing_key=scene.broker.signing_key) as other:
        for number in range(3):
            scene.broker.revoke(RevocationKind.TOKEN, f"token-{number:016d}")
        other.log = scene.broker.log[:1]
        async with verifying(kind, scene.settings, trust=[scene.broker.target, other.target]) as verifier:
            await verifier.wait_ready()
            await until(lambda: verifier.status().revocation_version == 3 or verifier.status().target == other.target)
            if verifier.status().target == other.target:  # It came first, and told what it has.
                other.down()
                await until_open(verifier, scene.broker.target)
                other.up()
            scene.broker.down()
            await asyncio.sleep(1.5)
            assert 3 == verifier.status().revocation_version
            scene.broker.up()
            await until_open(verifier, scene.broker.target)
            assert 3 == verifier.status().revocation_version


@pytest.mark.parametrize("kind", KINDS)
async def test_k07_a_restored_store_loses_no_revocation_and_raises_an_alarm(
    kind: str, caplog: pytest.LogCaptureFixture, scene: Scene
):
    """A new epoch without our revocation: it stays in force here, and the log says that somebody should look."""
    async with verifying(kind, scene.settings) as verifier:
        old = await _revoked(scene, verifier)
        await until_refused(verifier, old, scene)
        scene.broker.restore(scene.broker.epoch + 1)
        await until(lambda: verifier.status().new_epochs == 1)
        assert not await accepted(verifier, old, scene)
        assert "is in a new epoch" in caplog.text
        new = await _revoked(scene, verifier)
        assert await until_refused(verifier, new, scene) < WITHIN
        scene.broker.restore(scene.broker.epoch - 5)
        await until(lambda: bool(verifier.status().last_error))
        assert (False, False) == (await accepted(verifier, old, scene), await accepted(verifier, new, scene))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_large_snapshot_comes_in_parts(kind: str, scene: Scene):
    """Ten thousand entries in parts of a thousand: loaded when the last is there, none missing."""
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    scene.broker.log = [
        Revocation(number, RevocationKind.TOKEN, f"token-{number:016d}", 0, end) for number in range(1, 10_001)
    ]
    async with verifying(kind, scene.settings, fetch_timeout=10 * SECOND) as verifier:
        assert await accepted(verifier, scene.token(), scene)
        assert (10_000, scene.broker.position) == (verifier.status().revocations, verifier.position())
        assert [False] * 9 == [answer.HasField("position") for answer in scene.broker.answers[:9]]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_broker_of_the_version_before_is_asked_for_keys(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """N-1: it knows neither Watch nor GetRevocations, so tokens are verified as they were; the log says so."""
    with stage(tmp_path, "stream") as scene:
        scene.broker.down()
        scene.broker.old = True
        scene.broker.up()
        async with verifying(kind, scene.settings) as verifier:
            assert await accepted(verifier, scene.token(), scene)
            status = verifier.status()
            assert ("poll", 0, True) == (status.supply, status.epoch, status.usable)
            assert "its version knows no stream" in caplog.text
            assert "of a version that does not tell of revocations" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
async def test_who_was_told_of_revocations_is_not_content_without(kind: str, scene: Scene):
    """A replica of the version before does not make knowledge of revocations fresh again."""
    async with verifying(kind, scene.settings, max_staleness=2 * SECOND) as verifier:
        await verifier.wait_ready()
        scene.broker.down()
        scene.broker.old = True
        scene.broker.up()
        await asyncio.sleep(2.5)
        await until(lambda: bool(scene.broker.key_set_calls))
        with pytest.raises(KeySetUnavailableError, match="knowledge of revocations"):
            await verifier.verify(scene.token(), peer_certificate=scene.orders.certificate)


@pytest.mark.parametrize("kind", KINDS)
async def test_who_may_not_watch_asks_and_who_may_not_ask_is_told_what_to_do(
    kind: str, caplog: pytest.LogCaptureFixture, scene: Scene
):
    """PERMISSION_DENIED: named by no served_by. Without revocations nothing is decided: that would undo promise B."""
    scene.broker.watch_faults.deny("NOT_SERVED")
    async with verifying(kind, scene.settings) as verifier:
        token = await _revoked(scene, verifier)
        assert "asking instead: name spiffe://prod.example/ns/shop/sa/payments in the served_by" in caplog.text
        assert ("poll", 1) == (verifier.status().supply, len(scene.broker.key_set_calls))
        del token
    scene.broker.revocation_faults.deny("NOT_SERVED")
    async with verifying(kind, scene.settings) as verifier:
        with pytest.raises(KeySetUnavailableError, match=r"revocations .* could not be had yet: .* in the served_by"):
            await verifier.wait_ready(2 * SECOND)
    async with verifying(kind, scene.settings, mode="keys") as verifier:
        assert await accepted(verifier, scene.token(), scene)


@pytest.mark.parametrize("kind", KINDS)
async def test_one_stream_too_many_is_bridged_by_questions(kind: str, scene: Scene):
    """RESOURCE_EXHAUSTED for Watch: keys and revocations are asked for, and the stream is tried again."""
    scene.broker.watch_faults.deny("TOO_MANY_VERIFIERS", code=grpc.StatusCode.RESOURCE_EXHAUSTED)
    async with verifying(kind, scene.settings) as verifier:
        token = await _revoked(scene, verifier)
        assert "poll" == verifier.status().supply
        scene.broker.watch_faults.clear()
        await until_open(verifier, scene.broker.target)
        assert await until_refused(verifier, token, scene) < WITHIN


@pytest.mark.parametrize("kind", KINDS)
async def test_a_verifier_that_polls_learns_of_revocations_with_the_keys(kind: str, scene: Scene):
    """`mode="poll"`: no stream; a delta with each poll, in parts where it is large."""
    scene.broker.max_age = SECOND
    scene.broker.part_entries = 2
    async with verifying(kind, scene.settings, mode="poll") as verifier:
        tokens = [scene.token() for _ in range(5)]
        assert await accepted(verifier, tokens[0], scene)
        for token in tokens:
            scene.broker.revoke(RevocationKind.TOKEN, token_id(token))
        assert await until_refused(verifier, tokens[4], scene) < 3
        assert [False] * 4 == [await accepted(verifier, token, scene) for token in tokens[:4]]
        assert ([], True) == (scene.broker.hellos, verifier.status().usable)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_poll_that_tells_of_keys_alone_is_followed_by_another_soon(kind: str, scene: Scene):
    """The revocations could not be had: once they were known they count, and the next question comes in a second."""
    async with verifying(kind, scene.settings, mode="poll") as verifier:
        scene.broker.revocation_faults.unavailable()
        with pytest.raises(KeySetUnavailableError, match=r"the revocations of .* could not be had yet"):
            await verifier.wait_ready(SHORT)
        scene.broker.revocation_faults.clear()
        await verifier.wait_ready()
        assert await accepted(verifier, scene.token(), scene)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_verifier_takes_leave(kind: str, scene: Scene):
    """Goodbye: no rotation waits for it any more."""
    async with verifying(kind, scene.settings) as verifier:
        await verifier.wait_ready()
        started = time.monotonic()
        await verifier.close()
        assert time.monotonic() - started < 2
        assert 1 == scene.broker.goodbyes
        with pytest.raises(KeySetUnavailableError, match="closed"):
            await verifier.verify(scene.token(), peer_certificate=scene.orders.certificate)
    await until(lambda: scene.broker.watching == 0)


@pytest.mark.parametrize("kind", KINDS)
async def test_closing_does_not_wait_for_a_broker_that_hangs(kind: str, scene: Scene):
    """A stream that nobody answers is cut after a second."""
    scene.broker.watch_faults.hang()
    async with verifying(kind, scene.settings) as verifier:
        verifier.ready()
        await until(lambda: bool(scene.broker.hellos))
        started = time.monotonic()
        await verifier.close()
        assert time.monotonic() - started < 4


def test_a_verifier_that_is_dropped_takes_leave_and_ends_its_threads(scene: Scene):
    """Nobody closed it, and nothing of it is left."""
    verifier = Verifier(**scene.settings)
    verifier.wait_ready()
    while verifier.status().target is None:
        time.sleep(0.02)
    threads = [verifier._poller._thread, verifier._watcher._thread]
    del verifier
    gc.collect()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert 1 == scene.broker.goodbyes


async def test_each_verifier_is_another_instance(scene: Scene):
    """Two of one workload are told apart."""
    async with verifying("sync", scene.settings) as one, verifying("async", scene.settings) as other:
        await one.wait_ready()
        await other.wait_ready()
        assert 2 == len({hello.instance_id for hello in scene.broker.hellos})


@pytest.mark.parametrize("kind", KINDS)
async def test_a_verifier_begins_with_what_was_kept_while_every_broker_is_down(kind: str, tmp_path: Path, scene: Scene):
    """It verifies, and refuses what was revoked; once the budget is over it says why it cannot tell."""
    state = scene.settings | {"state_dir": tmp_path / "state", "max_staleness": 4 * SECOND}
    async with verifying(kind, state) as verifier:
        good = scene.token()
        revoked = await _revoked(scene, verifier)
        await until_refused(verifier, revoked, scene)
    scene.broker.down()
    async with verifying(kind, state) as verifier:
        assert verifier.ready()
        assert (True, False) == (await accepted(verifier, good, scene), await accepted(verifier, revoked, scene))
        assert 1 == verifier.position().revocation_version
        await asyncio.sleep(4)
        with pytest.raises(KeySetUnavailableError, match=r"over the limit of 4 s.*UNAVAILABLE"):
            await verifier.verify(good, peer_certificate=scene.orders.certificate)
        scene.broker.up()
        await until_open(verifier, scene.broker.target)
        assert await accepted(verifier, good, scene)
        assert 1 == scene.broker.hellos[-1].position.revocation_version


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_kept_for_too_long_is_not_used(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, scene: Scene
):
    """A verifier that starts after the budget knows nothing, and says so."""
    state = scene.settings | {"state_dir": tmp_path / "state", "max_staleness": SECOND}
    async with verifying(kind, state) as verifier:
        await verifier.wait_ready()
        await until(lambda: bool(list((tmp_path / "state").iterdir())))
    scene.broker.down()
    await asyncio.sleep(1.2)
    async with verifying(kind, state) as verifier:
        assert (False, None) == (verifier.ready(), verifier.position())
    assert "too old" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "guess"}, "mode is 'guess': give 'stream' or 'poll' or 'keys'"),
        ({"mode": "stream", "source": object}, "a source of your own knows keys only"),
    ],
)
def test_a_mode_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str, scene: Scene):
    """When the verifier is made, and not at the first token."""
    with pytest.raises(ConfigError, match=message):
        Verifier(**scene.settings | wrong)
