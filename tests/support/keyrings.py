"""Keys and keyrings for tests: a cheap supply of P-256 keys, and durations small enough to reason about."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache

from cryptography.hazmat.primitives.asymmetric import ec

from carnet.jwk import PublicJWK
from carnet_broker.core.keyring import Keyring, Timing

ISSUER = "https://tokens.prod.example"
T0 = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)

TIMING = Timing(
    max_age=10 * SECOND,
    poller_interval=20 * SECOND,
    replica_lag=5 * SECOND,
    skew=2 * SECOND,
    leeway=3 * SECOND,
    longest_life=60 * SECOND,
    island=30 * SECOND,
    sign_for=3600 * SECOND,
    rotate_every=600 * SECOND,
    min_interval=100 * SECOND,
    acknowledge_within=50 * SECOND,
)


@cache
def jwk(number: int) -> PublicJWK:
    """Return the test key of that number."""
    return PublicJWK.of(ec.derive_private_key(1_000_003 + number, ec.SECP256R1()).public_key())


def jwks() -> Iterator[PublicJWK]:
    """Return test keys without end."""
    number = 0
    while True:
        yield jwk(number)
        number += 1


def running(now: datetime = T0, timing: Timing = TIMING) -> Keyring:
    """Return a keyring with an ACTIVE key (number 0) and a STANDBY (number 1), both of `now`."""
    keyring = Keyring(issuer=ISSUER).with_created(jwk(0), None, now).with_published(jwk(0).kid, now)
    keyring = keyring.with_activated(jwk(0).kid, now, timing)
    return keyring.with_created(jwk(1), None, now).with_published(jwk(1).kid, now)
