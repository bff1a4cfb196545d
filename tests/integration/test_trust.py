from __future__ import annotations

import asyncio
import gc
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from support.broker_stub import ISSUER, BrokerStub

from carnet.claims import Claims
from carnet.encoding import base64url
from carnet.errors import (
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
from carnet.verify import assemble, encode_unsigned, parse_unverified

ORDERS = "spiffe://prod.example/ns/shop/sa/orders"
PAYMENTS = "spiffe://prod.example/ns/shop/sa/payments"
SHORT = timedelta(milliseconds=300)
KINDS = ["sync", "async"]


class Threaded:
    """A `Verifier` with the face of an `AsyncVerifier`, so that one test drives both."""

    def __init__(self, verifier: Verifier) -> None:
        self.inner = verifier
        self.ready = verifier.ready
        self.staleness = verifier.staleness

    async def verify(self, token: str | bytes, **how: Any) -> Claims:
        return await asyncio.to_thread(self.inner.verify, token, **how)

    async def wait_ready(self, timeout: timedelta = timedelta(seconds=10)) -> None:
        await asyncio.to_thread(self.inner.wait_ready, timeout)

    async def close(self) -> None:
        await asyncio.to_thread(self.inner.close)


@pytest.fixture(name="ca", scope="module")
def _ca() -> CertificateAuthority:
    return CertificateAuthority.create("prod.example")


@pytest.fixture(name="broker")
def _broker(ca: CertificateAuthority) -> Iterator[BrokerStub]:
    with BrokerStub.start(ca) as broker:
        yield broker


@pytest.fixture(name="orders", scope="module")
def _orders(ca: CertificateAuthority) -> Identity:
    issued = ca.issue(ORDERS)
    return Identity.parse(issued.certificate_pem, issued.private_key_pem)


@pytest.fixture(name="payments", scope="module")
def _payments(ca: CertificateAuthority) -> Identity:
    issued = ca.issue(PAYMENTS)
    return Identity.parse(issued.certificate_pem, issued.private_key_pem)


@pytest.fixture(name="settings")
def _settings(ca: CertificateAuthority, broker: BrokerStub, payments: Identity, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "ca.pem").write_bytes(ca.root_pem)
    return {
        "audience": "payments",
        "issuer": ISSUER,
        "trust": broker.target,
        "identity": payments,
        "ca_file": tmp_path / "ca.pem",
    }


@asynccontextmanager
async def verifying(kind: str, settings: dict[str, Any], **more: Any) -> AsyncIterator[Threaded | AsyncVerifier]:
    """Open a verifier of one kind or the other, and close it."""
    verifier = Threaded(Verifier(**settings | more)) if kind == "sync" else AsyncVerifier(**settings | more)
    try:
        yield verifier
    finally:
        await verifier.close()


def with_unknown_key(token: str) -> str:
    """Return a token of the right form whose key nobody ever published."""
    unverified = parse_unverified(token)
    kid = base64url(secrets.token_bytes(32)).decode()
    header = b'{"alg":"ES256","typ":"at+jwt","kid":"' + kid.encode() + b'"}'
    payload = unverified.signing_input.split(b".")[1]
    return assemble(base64url(header) + b"." + payload, bytes(64))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_good_token_is_verified_and_its_near_misses_are_not(
    kind: str, broker: BrokerStub, orders: Identity, payments: Identity, settings: dict[str, Any]
):
    """The caller's certificate counts in every form it may have; another audience, certificate, time or key is no."""
    token = broker.mint(thumbprint=orders.thumbprint)
    async with verifying(kind, settings) as verifier:
        der = orders.certificate.public_bytes(Encoding.DER)
        for certificate in (orders.certificate, der, orders.certificate_chain_pem):
            claims = await verifier.verify(token, peer_certificate=certificate)
            assert (ORDERS, ("charge",)) == (str(claims.subject), claims.scopes)
        near_misses: list[tuple[str, x509.Certificate | None, InvalidTokenReason]] = [
            (token, payments.certificate, InvalidTokenReason.WRONG_CONFIRMATION),
            (token, None, InvalidTokenReason.NO_PEER_CERTIFICATE),
            (broker.mint(), orders.certificate, InvalidTokenReason.MISSING_CLAIM),
            (
                broker.mint(audience="bank", thumbprint=orders.thumbprint),
                orders.certificate,
                InvalidTokenReason.WRONG_AUDIENCE,
            ),
            (with_unknown_key(token), orders.certificate, InvalidTokenReason.UNKNOWN_KEY),
            ("x" + token, orders.certificate, InvalidTokenReason.MALFORMED),
        ]
        for near_miss, near_certificate, reason in near_misses:
            with pytest.raises(InvalidTokenError) as refused:
                await verifier.verify(near_miss, peer_certificate=near_certificate)
            assert reason is refused.value.reason
        with pytest.raises(InvalidIdentityError):
            await verifier.verify(token, peer_certificate=b"no certificate")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_token_is_over_at_its_last_second(
    kind: str, broker: BrokerStub, orders: Identity, settings: dict[str, Any]
):
    """`now` is an argument: one second before the end the token is good, at the end it is not."""
    token = broker.mint(thumbprint=orders.thumbprint)
    async with verifying(kind, settings) as verifier:
        claims = await verifier.verify(token, peer_certificate=orders.certificate)
        last = claims.expires_at - timedelta(seconds=1)
        assert claims == await verifier.verify(token, peer_certificate=orders.certificate, now=last)
        with pytest.raises(InvalidTokenError) as refused:
            await verifier.verify(token, peer_certificate=orders.certificate, now=claims.expires_at)
        assert InvalidTokenReason.EXPIRED is refused.value.reason


@pytest.mark.parametrize("kind", KINDS)
async def test_without_binding_an_unbound_token_is_accepted_and_a_bound_one_still_checked(
    kind: str, broker: BrokerStub, orders: Identity, payments: Identity, settings: dict[str, Any]
):
    """`binding="none"` is for services that do not see the certificate; one that is seen counts."""
    async with verifying(kind, settings, binding="none") as verifier:
        assert (await verifier.verify(broker.mint())).confirmation is None
        with pytest.raises(InvalidTokenError):
            await verifier.verify(broker.mint(thumbprint=orders.thumbprint), peer_certificate=payments.certificate)


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_fetched_before_the_first_use_and_nothing_more_for_a_known_key(
    kind: str, broker: BrokerStub, orders: Identity, settings: dict[str, Any]
):
    """One fetch at the first use; then a verifier goes on without any broker."""
    async with verifying(kind, settings) as verifier:
        assert [] == broker.key_set_calls
        assert verifier.staleness() is None
        token = broker.mint(thumbprint=orders.thumbprint)
        await verifier.verify(token, peer_certificate=orders.certificate)
        assert [""] == broker.key_set_calls
        broker.down()
        for _ in range(100):
            await verifier.verify(token, peer_certificate=orders.certificate)
        assert verifier.ready()
        assert timedelta() <= verifier.staleness() < timedelta(seconds=30)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_that_was_published_since_is_asked_for_by_name(
    kind: str, broker: BrokerStub, orders: Identity, settings: dict[str, Any]
):
    """K12: a token of a key that nobody announced is good at its first use."""
    async with verifying(kind, settings) as verifier:
        await verifier.wait_ready()
        key = broker.rotate(keep_old=False)
        await verifier.verify(broker.mint(thumbprint=orders.thumbprint), peer_certificate=orders.certificate)
        assert ["", key.kid] == broker.key_set_calls


@pytest.mark.parametrize("kind", KINDS)
async def test_a_withdrawn_key_is_refused_once_the_set_is_fetched(
    kind: str, broker: BrokerStub, orders: Identity, settings: dict[str, Any]
):
    """J07: the poll learns that a key is gone, with no token that would ask for anything."""
    broker.max_age = timedelta(milliseconds=100)
    token = broker.mint(thumbprint=orders.thumbprint)
    async with verifying(kind, settings) as verifier:
        await verifier.verify(token, peer_certificate=orders.certificate)
        broker.rotate(keep_old=False)
        calls = len(broker.key_set_calls)
        while len(broker.key_set_calls) < calls + 2:
            await asyncio.sleep(0.05)
        with pytest.raises(InvalidTokenError) as refused:
            await verifier.verify(token, peer_certificate=orders.certificate)
        assert InvalidTokenReason.UNKNOWN_KEY is refused.value.reason


@pytest.mark.parametrize("kind", KINDS)
async def test_no_and_cannot_tell_differ(kind: str, broker: BrokerStub, orders: Identity, settings: dict[str, Any]):
    """The key that was asked for is a "no", each time; another one during the cooldown cannot be told."""
    token = broker.mint(thumbprint=orders.thumbprint)
    first, second = with_unknown_key(token), with_unknown_key(token)
    async with verifying(kind, settings, cooldown=timedelta(seconds=1)) as verifier:
        for _ in range(2):
            with pytest.raises(InvalidTokenError):
                await verifier.verify(first, peer_certificate=orders.certificate)
        with pytest.raises(KeySetUnavailableError, match="asked for once in 1 s"):
            await verifier.verify(second, peer_certificate=orders.certificate)
        await asyncio.sleep(1.1)
        with pytest.raises(InvalidTokenError):
            await verifier.verify(second, peer_certificate=orders.certificate)
        assert ["", parse_unverified(first).kid, parse_unverified(second).kid] == broker.key_set_calls


@pytest.mark.parametrize("kind", KINDS)
async def test_callers_with_one_new_key_share_one_fetch(
    kind: str, broker: BrokerStub, orders: Identity, settings: dict[str, Any]
):
    """32 calls at once with a key that is new: one question, 32 good answers."""
    async with verifying(kind, settings) as verifier:
        await verifier.wait_ready()
        key = broker.rotate()
        broker.trust_faults.slow(0.2)
        token = broker.mint(thumbprint=orders.thumbprint)
        calls = [verifier.verify(token, peer_certificate=orders.certificate) for _ in range(32)]
        assert 1 == len(set(await asyncio.gather(*calls)))
        assert ["", key.kid] == broker.key_set_calls


@pytest.mark.parametrize("kind", KINDS)
async def test_a_broker_that_hangs_holds_up_an_unknown_key_for_the_time_limit_and_known_keys_not_at_all(
    kind: str, broker: BrokerStub, orders: Identity, settings: dict[str, Any]
):
    """The wait is bounded, ends in "cannot tell", and is nobody else's."""
    token = broker.mint(thumbprint=orders.thumbprint)
    async with verifying(kind, settings, fetch_timeout=timedelta(seconds=1)) as verifier:
        await verifier.verify(token, peer_certificate=orders.certificate)
        broker.trust_faults.hang()
        started = time.monotonic()
        unknown = asyncio.create_task(verifier.verify(with_unknown_key(token), peer_certificate=orders.certificate))
        slowest = 0.0
        while not unknown.done():
            before = time.monotonic()
            await verifier.verify(token, peer_certificate=orders.certificate)
            slowest = max(slowest, time.monotonic() - before)
            await asyncio.sleep(0.01)
        with pytest.raises(KeySetUnavailableError):
            await unknown
        assert 0.9 < time.monotonic() - started < 2
        assert slowest < 0.5


def test_a_flood_of_unknown_keys_costs_one_fetch_per_cooldown_and_harms_no_good_token(
    broker: BrokerStub, orders: Identity, settings: dict[str, Any]
):
    """K11: 100,000 tokens with keys that do not exist; the good ones beside them are verified as ever."""
    good = broker.mint(thumbprint=orders.thumbprint)
    claims = Verifier(**settings)
    cooldown = timedelta(seconds=2)
    flood_over = threading.Event()
    latencies: list[float] = []
    with Verifier(**settings, cooldown=cooldown) as verifier:
        claims = verifier.verify(good, peer_certificate=orders.certificate)

        def verify_good() -> None:
            while not flood_over.is_set():
                before = time.monotonic()
                assert claims == verifier.verify(good, peer_certificate=orders.certificate)
                latencies.append(time.monotonic() - before)
                time.sleep(0.005)

        beside = threading.Thread(target=verify_good)
        beside.start()
        started = time.monotonic()
        outcomes = {InvalidTokenError: 0, KeySetUnavailableError: 0}
        for _ in range(100_000):
            kid = base64url(secrets.token_bytes(32)).decode()
            with pytest.raises((InvalidTokenError, KeySetUnavailableError)) as refused:
                verifier.verify(assemble(encode_unsigned(claims, kid), bytes(64)), peer_certificate=orders.certificate)
            outcomes[refused.type] += 1
        elapsed = time.monotonic() - started
        flood_over.set()
        beside.join()
    asked = [kid for kid in broker.key_set_calls if kid]
    assert 100_000 == sum(outcomes.values())
    assert 1 <= len(asked) <= elapsed / cooldown.total_seconds() + 1
    assert len(asked) == outcomes[InvalidTokenError]
    assert len(latencies) > 100
    assert sorted(latencies)[len(latencies) * 99 // 100] < 0.25
