from __future__ import annotations

import asyncio
import gc
import random
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from carnet.encoding import base64url
from carnet.errors import (
    CarnetError,
    ConfigError,
    InvalidIdentityError,
    InvalidTokenError,
    InvalidTokenReason,
    KeySetUnavailableError,
)
from carnet.identity import Identity
from carnet.keysets import KeySetSnapshot
from carnet.testing.ca import CertificateAuthority
from carnet.trust import AsyncVerifier, Verifier
from carnet.verify import assemble, parse_unverified
from support.broker_stub import ISSUER, BrokerStub
from support.counts import count
from support.measurements import record
from support.verifiers import KINDS, ORDERS, PAYMENTS, SHORT, Scene, stage, until, verifying


@pytest.fixture(name="scene")
def _scene(tmp_path: Path) -> Iterator[Scene]:
    with stage(tmp_path, "poll") as scene:  # What is pushed is in test_trust_stream.py.
        yield scene


def with_unknown_key(payload: bytes, *, name: bytes | None = None) -> str:
    """Return a token of the right form, with this encoded payload, whose key nobody ever published."""
    kid = base64url(secrets.token_bytes(32) if name is None else name)
    header = b'{"alg":"ES256","typ":"at+jwt","kid":"' + kid + b'"}'
    return assemble(base64url(header) + b"." + payload, bytes(64))


def payload_of(token: str) -> bytes:
    """Return the encoded payload of a token."""
    return parse_unverified(token).signing_input.split(b".")[1]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_good_token_is_verified_and_its_near_misses_are_not(kind: str, scene: Scene):
    """The caller's certificate counts in every form it may have; another audience, certificate, time or key is no."""
    token = scene.token()
    async with verifying(kind, scene.settings) as verifier:
        der = scene.orders.certificate.public_bytes(Encoding.DER)
        for certificate in (scene.orders.certificate, der, scene.orders.certificate_chain_pem):
            claims = await verifier.verify(token, peer_certificate=certificate)
            assert (ORDERS, ("charge",)) == (str(claims.subject), claims.scopes)
        near_misses: list[tuple[str, x509.Certificate | None, InvalidTokenReason]] = [
            (token, scene.payments.certificate, InvalidTokenReason.WRONG_CONFIRMATION),
            (token, None, InvalidTokenReason.NO_PEER_CERTIFICATE),
            (scene.broker.mint(), scene.orders.certificate, InvalidTokenReason.MISSING_CLAIM),
            (
                scene.token(audience="bank"),
                scene.orders.certificate,
                InvalidTokenReason.WRONG_AUDIENCE,
            ),
            (with_unknown_key(payload_of(token)), scene.orders.certificate, InvalidTokenReason.UNKNOWN_KEY),
            ("x" + token, scene.orders.certificate, InvalidTokenReason.MALFORMED),
        ]
        for near_miss, near_certificate, reason in near_misses:
            with pytest.raises(InvalidTokenError) as refused:
                await verifier.verify(near_miss, peer_certificate=near_certificate)
            assert reason is refused.value.reason
        with pytest.raises(InvalidIdentityError):
            await verifier.verify(token, peer_certificate=b"no certificate")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_token_is_over_at_its_last_second(kind: str, scene: Scene):
    """`now` is an argument: one second before the end the token is good, at the end it is not."""
    token = scene.token()
    async with verifying(kind, scene.settings) as verifier:
        claims = await verifier.verify(token, peer_certificate=scene.orders.certificate)
        last = claims.expires_at - timedelta(seconds=1)
        assert claims == await verifier.verify(token, peer_certificate=scene.orders.certificate, now=last)
        with pytest.raises(InvalidTokenError) as refused:
            await verifier.verify(token, peer_certificate=scene.orders.certificate, now=claims.expires_at)
        assert InvalidTokenReason.EXPIRED is refused.value.reason


@pytest.mark.parametrize("kind", KINDS)
async def test_without_binding_an_unbound_token_is_accepted_and_a_bound_one_still_checked(kind: str, scene: Scene):
    """`binding="none"` is for services that do not see the certificate; one that is seen counts."""
    async with verifying(kind, scene.settings, binding="none") as verifier:
        assert (await verifier.verify(scene.broker.mint())).confirmation is None
        with pytest.raises(InvalidTokenError):
            await verifier.verify(scene.token(), peer_certificate=scene.payments.certificate)


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_fetched_before_the_first_use_and_nothing_more_for_a_known_key(kind: str, scene: Scene):
    """One fetch at the first use; then a verifier goes on without any broker."""
    async with verifying(kind, scene.settings) as verifier:
        assert [] == scene.broker.key_set_calls
        assert verifier.staleness() is None
        token = scene.token()
        await verifier.verify(token, peer_certificate=scene.orders.certificate)
        assert [""] == scene.broker.key_set_calls
        scene.broker.down()
        for _ in range(100):
            await verifier.verify(token, peer_certificate=scene.orders.certificate)
        assert verifier.ready()
        assert timedelta() <= verifier.staleness() < timedelta(seconds=30)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_that_was_published_since_is_asked_for_by_name(kind: str, scene: Scene):
    """K12: a token of a key that nobody announced is good at its first use."""
    async with verifying(kind, scene.settings) as verifier:
        await verifier.wait_ready()
        key = scene.broker.rotate(keep_old=False)
        await verifier.verify(scene.token(), peer_certificate=scene.orders.certificate)
        assert ["", key.kid] == scene.broker.key_set_calls


@pytest.mark.parametrize("kind", KINDS)
async def test_a_withdrawn_key_is_refused_once_the_set_is_fetched(kind: str, scene: Scene):
    """J07: the poll learns that a key is gone, with no token that would ask for anything."""
    scene.broker.max_age = timedelta(milliseconds=100)
    token = scene.token()
    async with verifying(kind, scene.settings) as verifier:
        await verifier.verify(token, peer_certificate=scene.orders.certificate)
        scene.broker.rotate(keep_old=False)
        calls = len(scene.broker.key_set_calls)
        await until(lambda: len(scene.broker.key_set_calls) >= calls + 2)
        with pytest.raises(InvalidTokenError) as refused:
            await verifier.verify(token, peer_certificate=scene.orders.certificate)
        assert InvalidTokenReason.UNKNOWN_KEY is refused.value.reason


@pytest.mark.parametrize("kind", KINDS)
async def test_no_and_cannot_tell_differ(kind: str, scene: Scene):
    """The key that was asked for is a "no", each time; another one during the cooldown cannot be told."""
    token = scene.token()
    first, second = with_unknown_key(payload_of(token)), with_unknown_key(payload_of(token))
    async with verifying(kind, scene.settings, cooldown=timedelta(seconds=1)) as verifier:
        for _ in range(2):
            with pytest.raises(InvalidTokenError):
                await verifier.verify(first, peer_certificate=scene.orders.certificate)
        with pytest.raises(KeySetUnavailableError, match="asked for once in 1 s"):
            await verifier.verify(second, peer_certificate=scene.orders.certificate)
        await asyncio.sleep(1.1)
        with pytest.raises(InvalidTokenError):
            await verifier.verify(second, peer_certificate=scene.orders.certificate)
        assert ["", parse_unverified(first).kid, parse_unverified(second).kid] == scene.broker.key_set_calls


@pytest.mark.parametrize("kind", KINDS)
async def test_callers_with_one_new_key_share_one_fetch(kind: str, scene: Scene):
    """32 calls at once with a key that is new: one question, 32 good answers."""
    async with verifying(kind, scene.settings) as verifier:
        await verifier.wait_ready()
        key = scene.broker.rotate()
        scene.broker.trust_faults.slow(0.2)
        token = scene.token()
        calls = [verifier.verify(token, peer_certificate=scene.orders.certificate) for _ in range(32)]
        assert 1 == len(set(await asyncio.gather(*calls)))
        assert ["", key.kid] == scene.broker.key_set_calls


@pytest.mark.parametrize("kind", KINDS)
async def test_a_broker_that_hangs_holds_up_unknown_keys_for_a_bounded_time_and_known_ones_not_at_all(
    kind: str, scene: Scene
):
    """The wait is bounded, ends in "cannot tell", and is nobody else's."""
    token = scene.token()
    async with verifying(kind, scene.settings, fetch_timeout=timedelta(seconds=1)) as verifier:
        await verifier.verify(token, peer_certificate=scene.orders.certificate)
        scene.broker.trust_faults.hang()
        started = time.monotonic()
        unknown = asyncio.create_task(
            verifier.verify(with_unknown_key(payload_of(token)), peer_certificate=scene.orders.certificate)
        )
        slowest = 0.0
        while not unknown.done():
            before = time.monotonic()
            await verifier.verify(token, peer_certificate=scene.orders.certificate)
            slowest = max(slowest, time.monotonic() - before)
            await asyncio.sleep(0.01)
        with pytest.raises(KeySetUnavailableError):
            await unknown
        assert 0.9 < time.monotonic() - started < 2
        assert slowest < 0.5


class Flood:
    """Tokens with keys that nobody published, and what came of them and of the good ones beside them."""

    cooldown = timedelta(seconds=2)

    def __init__(self, scene: Scene) -> None:
        self.broker = scene.broker
        self.good = scene.token()
        self.sent = 0
        self.seconds = 0.0
        self.over = False
        self.outcomes = {InvalidTokenError: 0, KeySetUnavailableError: 0}
        self.latencies: list[float] = []
        self.failures: list[Exception] = []

    def tokens(self) -> Iterator[str]:
        """Yield as many tokens as the count says, and more for as long as two cooldowns are not over.

        Nothing in here calls the kernel, as `secrets` does. Such a call lets the GIL go for an instant and takes it
        back before another thread has woken; and CPython makes the running thread hand it over only if nobody let it go
        for 5 ms. Checking a signature lets go of it too, so a good verification would wait until it is lucky: this test
        would measure that, and not the verifier.
        """
        names = random.Random(11)  # noqa: S311 - names that are new, and guard nothing
        payload = payload_of(self.good)
        started = time.monotonic()
        while self.sent < count("tokens_with_an_unknown_key") or self.seconds < 2 * self.cooldown.total_seconds():
            self.sent += 1
            yield with_unknown_key(payload, name=names.randbytes(32))
            self.seconds = time.monotonic() - started

    @contextmanager
    def refused(self) -> Iterator[None]:
        """Count how the token is refused."""
        try:
            yield
        except (InvalidTokenError, KeySetUnavailableError) as refused:
            self.outcomes[type(refused)] += 1

    @contextmanager
    def beside(self, since: float) -> Iterator[None]:
        """Take the time of a good verification."""
        try:
            yield
        except (AssertionError, CarnetError) as error:
            self.failures.append(error)
        self.latencies.append(time.monotonic() - since)

    def check(self, name: str) -> None:
        """Show that it cost one fetch per cooldown, and that the good verifications were many, all good, and fast."""
        asked = [kid for kid in self.broker.key_set_calls if kid]
        p99 = sorted(self.latencies)[len(self.latencies) * 99 // 100]
        record(
            name,
            {
                "tokens": self.sent,
                "seconds": round(self.seconds, 1),
                "cooldown_seconds": self.cooldown.total_seconds(),
                "fetches": len(asked),
                "good_verifications_beside": len(self.latencies),
                "good_p99_ms": round(p99 * 1000, 2),
            },
        )
        assert self.sent == sum(self.outcomes.values())
        assert 1 <= len(asked) <= self.seconds / self.cooldown.total_seconds() + 1
        assert len(asked) == self.outcomes[InvalidTokenError]
        assert [] == self.failures
        assert len(self.latencies) > 100
        assert p99 < 0.25


@pytest.mark.measured
def test_a_flood_of_unknown_keys_costs_one_fetch_per_cooldown_and_harms_no_good_token(scene: Scene):
    """K11: tokens with keys that do not exist, as fast as they go; the good ones beside them are verified as ever."""
    flood = Flood(scene)
    with Verifier(**scene.settings, cooldown=flood.cooldown) as verifier:
        claims = verifier.verify(flood.good, peer_certificate=scene.orders.certificate)

        def verify_good() -> None:
            while not flood.over:
                time.sleep(0.005)
                with flood.beside(since=time.monotonic()):
                    assert claims == verifier.verify(flood.good, peer_certificate=scene.orders.certificate)

        beside = threading.Thread(target=verify_good)
        beside.start()
        try:
            for token in flood.tokens():
                with flood.refused():
                    verifier.verify(token, peer_certificate=scene.orders.certificate)
        finally:
            flood.over = True
            beside.join()
    flood.check("unknown_keys")


async def test_a_flood_of_unknown_keys_in_one_event_loop_does_no_more_harm(scene: Scene):
    """K11, with tasks: 8 calls at once with keys that do not exist, one after the other, and good ones beside them."""
    flood = Flood(scene)
    async with AsyncVerifier(**scene.settings, cooldown=flood.cooldown) as verifier:
        claims = await verifier.verify(flood.good, peer_certificate=scene.orders.certificate)
        tokens = flood.tokens()

        async def verify_unknown() -> None:
            for token in tokens:
                with flood.refused():
                    await verifier.verify(token, peer_certificate=scene.orders.certificate)
                await asyncio.sleep(0)  # The end of a call, and the turn of the others.

        async def verify_good() -> None:
            while not flood.over:
                due = time.monotonic() + 0.005
                await asyncio.sleep(0.005)
                with flood.beside(since=due):  # Nothing interrupts the call itself: the wait is for its turn.
                    assert claims == await verifier.verify(flood.good, peer_certificate=scene.orders.certificate)

        async with asyncio.TaskGroup() as both:
            both.create_task(verify_good())
            async with asyncio.TaskGroup() as callers:
                for _ in range(8):
                    callers.create_task(verify_unknown())
            flood.over = True
    flood.check("unknown_keys_async")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["down", "unavailable", "hang", "lags", "nonsense"])
async def test_one_server_that_cannot_answer_is_passed_over(kind: str, fault: str, scene: Scene):
    """Down, without keyring, stopped, behind the generation at hand, or answering rubbish: the other one is asked."""
    with BrokerStub.start(scene.broker.ca) as other:
        async with verifying(kind, scene.settings, trust=[scene.broker.target, other.target]) as verifier:
            await verifier.wait_ready()
            answered, silent = (scene.broker, other) if scene.broker.key_set_calls else (other, scene.broker)
            silent.generation = answered.generation = 5
            match fault:
                case "down":
                    answered.down()
                case "unavailable":
                    answered.trust_faults.unavailable()
                case "hang":
                    answered.trust_faults.hang()
                case "lags":
                    answered.generation = 0
                case _:
                    answered.key_set_text = '{"keys":[]}'
            silent.rotate()
            await verifier.verify(
                silent.mint(thumbprint=scene.orders.thumbprint), peer_certificate=scene.orders.certificate
            )
            assert 1 == len(silent.key_set_calls)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["no keys", "not JSON", "no time", "another issuer", "an older generation"])
async def test_a_set_that_breaks_the_rules_never_replaces_a_good_one(kind: str, fault: str, scene: Scene):
    """J08, K10: the set at hand stays, and what the bad one would have told is "cannot tell"."""
    scene.broker.generation = 7
    good = scene.token()
    async with verifying(kind, scene.settings) as verifier:
        await verifier.wait_ready()
        scene.broker.rotate(keep_old=False)
        new = scene.token()
        match fault:
            case "no keys":
                scene.broker.key_set_text = '{"keys":[]}'
            case "not JSON":
                scene.broker.key_set_text = "<html>"
            case "no time":
                scene.broker.max_age = timedelta()
            case "another issuer":
                scene.broker.issuer = "https://tokens.staging.example"
            case _:
                scene.broker.generation = 6
        with pytest.raises(KeySetUnavailableError):
            await verifier.verify(new, peer_certificate=scene.orders.certificate)
        await verifier.verify(good, peer_certificate=scene.orders.certificate)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_set_that_is_too_old_decides_nothing_until_a_broker_answers_again(kind: str, scene: Scene):
    """Over `max_staleness` it is "cannot tell", with the age in the message; it recovers with no restart."""
    token = scene.token()
    async with verifying(kind, scene.settings, max_staleness=timedelta(seconds=1)) as verifier:
        await verifier.verify(token, peer_certificate=scene.orders.certificate)
        scene.broker.down()
        await asyncio.sleep(1.1)
        assert not verifier.ready()
        with pytest.raises(KeySetUnavailableError, match="over the limit of 1 s"):
            await verifier.verify(token, peer_certificate=scene.orders.certificate)
        scene.broker.up()
        await verifier.wait_ready()
        await verifier.verify(token, peer_certificate=scene.orders.certificate)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_verifier_that_accepts_stale_keys_goes_on(kind: str, scene: Scene):
    """`on_stale="accept"` is a choice: the same outage, and the token is still good."""
    token = scene.token()
    async with verifying(kind, scene.settings, max_staleness=SHORT, on_stale="accept") as verifier:
        await verifier.verify(token, peer_certificate=scene.orders.certificate)
        scene.broker.down()
        await asyncio.sleep(2 * SHORT.total_seconds())
        await verifier.verify(token, peer_certificate=scene.orders.certificate)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_age_that_the_broker_states_counts(kind: str, scene: Scene):
    """A broker that has not read Vault for ten minutes gives a set that decides nothing, and the callers hear it."""
    scene.broker.age = timedelta(minutes=10)
    async with verifying(kind, scene.settings) as verifier:
        with pytest.raises(KeySetUnavailableError, match="over the limit of 300 s"):
            await verifier.verify(scene.token(), peer_certificate=scene.orders.certificate)
        assert verifier.staleness() > timedelta(minutes=10)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_verifier_without_a_broker_is_not_ready_and_says_what_each_server_did(
    kind: str, caplog: pytest.LogCaptureFixture, scene: Scene
):
    """Not ready is raised, not returned; the log names the server."""
    scene.broker.down()
    async with verifying(kind, scene.settings) as verifier:
        assert not verifier.ready()
        with pytest.raises(KeySetUnavailableError, match=r"no key set of https://.*: UNAVAILABLE .*check CARNET_TRUST"):
            await verifier.wait_ready(SHORT)
    assert f"no trust server gave a key set ({scene.broker.target}: UNAVAILABLE" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_with_another_name_or_authority_is_not_asked(kind: str, tmp_path: Path, scene: Scene):
    """T25: neither a workload that poses as the broker nor a broker of another authority gives keys."""
    (tmp_path / "other.pem").write_bytes(CertificateAuthority.create("prod.example").root_pem)
    for wrong in ({"broker_name": "payments.shop.svc.prod.example"}, {"ca_file": tmp_path / "other.pem"}):
        async with verifying(kind, scene.settings, **wrong) as verifier:
            with pytest.raises(KeySetUnavailableError):
                await verifier.wait_ready(SHORT)
    assert [] == scene.broker.key_set_calls


@pytest.mark.parametrize("kind", KINDS)
async def test_an_own_certificate_that_ended_is_named(kind: str, caplog: pytest.LogCaptureFixture, scene: Scene):
    """gRPC says only that the connection was closed; the likeliest reason is said beside it."""
    ended = datetime.now(UTC) - timedelta(seconds=10)
    issued = scene.broker.ca.issue(PAYMENTS, not_before=ended - timedelta(hours=1), not_after=ended)
    identity = Identity.parse(issued.certificate_pem, issued.private_key_pem)
    async with verifying(kind, scene.settings, identity=identity) as verifier:
        with pytest.raises(KeySetUnavailableError):
            await verifier.wait_ready(timedelta(seconds=1))
    assert "the own certificate ended at" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
async def test_a_closed_verifier_cannot_tell(kind: str, scene: Scene):
    """After `close` nothing is fetched, nothing is decided, and closing again does nothing."""
    token = scene.token()
    async with verifying(kind, scene.settings) as verifier:
        await verifier.verify(token, peer_certificate=scene.orders.certificate)
        await verifier.close()
        with pytest.raises(KeySetUnavailableError, match="closed"):
            await verifier.verify(token, peer_certificate=scene.orders.certificate)
        with pytest.raises(KeySetUnavailableError, match="closed"):
            await verifier.wait_ready(SHORT)
        assert not verifier.ready()


async def test_a_verifier_is_open_inside_its_context_and_closed_after_it(scene: Scene):
    """Entering starts to fetch, leaving closes; one that never started closes too."""
    with Verifier(**scene.settings) as verifier:
        await asyncio.to_thread(verifier.wait_ready)
    assert not verifier.ready()
    async with AsyncVerifier(**scene.settings) as async_verifier:
        await async_verifier.wait_ready()
    assert not async_verifier.ready()
    Verifier(**scene.settings).close()
    await AsyncVerifier(**scene.settings).close()


@pytest.mark.parametrize("kind", KINDS)
async def test_closing_ends_those_who_wait(kind: str, scene: Scene):
    """A call that waits for a broker that hangs hears at once that the verifier was closed."""
    scene.broker.trust_faults.hang()
    token = scene.token()
    async with verifying(kind, scene.settings, fetch_timeout=timedelta(seconds=20)) as verifier:
        waiting = asyncio.create_task(verifier.verify(token, peer_certificate=scene.orders.certificate))
        await until(lambda: bool(scene.broker.key_set_calls))
        started = time.monotonic()
        await verifier.close()
        with pytest.raises(KeySetUnavailableError, match="closed"):
            await waiting
        assert time.monotonic() - started < 5


class _Faulty:
    """A source of somebody else's making, that fails in a way that no port allows."""

    calls = 0

    def fetch(self, missing_kid: str | None, *, at_least: int) -> KeySetSnapshot:
        self.calls += 1
        raise ZeroDivisionError

    def close(self) -> None:
        pass


class _AsyncFaulty(_Faulty):
    async def fetch(self, missing_kid: str | None, *, at_least: int) -> KeySetSnapshot:
        return super().fetch(missing_kid, at_least=at_least)

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", KINDS)
async def test_a_source_that_breaks_the_rules_does_not_end_the_fetching(kind: str):
    """Whatever a source raises is a failed fetch; the next one is made when it is due."""
    source = _Faulty() if kind == "sync" else _AsyncFaulty()
    settings = {"audience": "payments", "issuer": ISSUER, "source": lambda: source}
    async with verifying(kind, settings) as verifier:
        verifier.ready()
        await until(lambda: source.calls == 2)


def test_a_verifier_that_is_dropped_ends_its_thread(scene: Scene):
    """No thread and no connection is left behind by a verifier that nobody closed."""
    verifier = Verifier(**scene.settings)
    verifier.start()
    thread = verifier._poller._thread
    del verifier
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


async def test_an_async_verifier_belongs_to_one_event_loop(scene: Scene):
    """In another loop it says so; once its loop is closed the next one may have it."""
    verifier = AsyncVerifier(**scene.settings)
    assert not await asyncio.to_thread(lambda: asyncio.run(_ready(verifier)))
    await verifier.wait_ready()
    with pytest.raises(RuntimeError, match="one event loop"):
        await asyncio.to_thread(lambda: asyncio.run(_ready(verifier)))
    await verifier.close()


async def _ready(verifier: AsyncVerifier) -> bool:
    return verifier.ready()


_FORK = """
import os, sys, threading, time
from pathlib import Path
from carnet.trust import Verifier

token, leaf = sys.argv[1], Path(sys.argv[2]).read_bytes()
verifier = Verifier(mode=sys.argv[4])
if sys.argv[3] == "after":
    verifier.verify(token, peer_certificate=leaf)
child = os.fork()
if child == 0:
    verifier.verify(token, peer_certificate=leaf)
    threads = [thread.name for thread in threading.enumerate()]
    assert [threads.count("carnet-key-set"), threads.count("carnet-watch")] == [1, int(sys.argv[4] == "stream")]
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
verifier.verify(token, peer_certificate=leaf)
while sys.argv[4] == "stream" and not verifier.status().live:
    time.sleep(0.01)
verifier.close()
"""


@pytest.mark.parametrize("mode", ["poll", "stream"])
@pytest.mark.parametrize("first_use", ["before", "after"])
def test_a_child_process_has_a_thread_of_its_own(first_use: str, mode: str, tmp_path: Path, scene: Scene):
    """gunicorn: a verifier that was made, or even used, before the fork verifies in parent and child; both end.

    The stream of the parent is open again afterwards.
    """
    (tmp_path / "leaf.pem").write_bytes(scene.orders.certificate_chain_pem)
    (tmp_path / "own.pem").write_bytes(scene.payments.certificate_chain_pem)
    (tmp_path / "own-key.pem").write_bytes(scene.payments.private_key_pem)
    environment = {
        "CARNET_AUDIENCE": "payments",
        "CARNET_ISSUER": ISSUER,
        "CARNET_TRUST": scene.broker.target,
        "CARNET_CA_FILE": str(scene.settings["ca_file"]),
        "CARNET_CERT_FILE": str(tmp_path / "own.pem"),
        "CARNET_KEY_FILE": str(tmp_path / "own-key.pem"),
        "PYTHONPATH": ":".join(sys.path),
        "GRPC_ENABLE_FORK_SUPPORT": "1",
    }
    token = scene.token()
    run = subprocess.run(
        [sys.executable, "-c", _FORK, token, str(tmp_path / "leaf.pem"), first_use, mode],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (run.returncode, run.stderr)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("audience", "CARNET_AUDIENCE is not set: give audience=..."),
        ("issuer", "CARNET_ISSUER is not set: give issuer=..."),
        ("trust", "CARNET_TRUST is not set: give trust=..."),
        ("identity", "CARNET_CERT_FILE is not set"),
        ("ca_file", "CARNET_CA_FILE is not set: give ca_file=..."),
    ],
)
def test_what_is_missing_is_named_when_the_verifier_is_made(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch, scene: Scene
):
    """A service that cannot verify does not start, and says which variable to set."""
    for name in ("AUDIENCE", "ISSUER", "TRUST", "CERT_FILE", "KEY_FILE", "CA_FILE", "BROKER_NAME"):
        monkeypatch.delenv(f"CARNET_{name}", raising=False)
    del scene.settings[missing]
    for make in (Verifier, AsyncVerifier):
        with pytest.raises(ConfigError) as refused:
            make(**scene.settings)
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"binding": "maybe"}, "binding is 'maybe': give 'certificate' or 'none'"),
        ({"on_stale": "shrug"}, "on_stale is 'shrug': give 'refuse' or 'accept'"),
        ({"fetch_timeout": timedelta()}, "fetch_timeout must be longer than nothing"),
        ({"max_staleness": timedelta()}, "max_staleness must be longer than nothing"),
        ({"trust": "nowhere"}, "has no port"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str, scene: Scene):
    """Neither a misspelt binding nor an endless staleness goes unseen."""
    with pytest.raises(ConfigError) as refused:
        Verifier(**scene.settings | wrong)
    assert message in str(refused.value)
