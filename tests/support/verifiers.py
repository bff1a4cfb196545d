"""A broker, a caller and a verifying service, and verifiers of both kinds behind one face."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from carnet.claims import Claims
from carnet.identity import Identity
from carnet.testing.ca import CertificateAuthority
from carnet.trust import AsyncVerifier, Verifier
from support.broker_stub import ISSUER, BrokerStub

__all__ = ["KINDS", "ORDERS", "PAYMENTS", "SHORT", "Scene", "Threaded", "identity", "stage", "until", "verifying"]

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
        self.status = verifier.status
        self.position = verifier.position

    async def verify(self, token: str | bytes, **how: Any) -> Claims:  # noqa: ANN401 - those of Verifier
        """Verify in a thread."""
        return await asyncio.to_thread(self.inner.verify, token, **how)

    async def wait_ready(self, timeout: timedelta = timedelta(seconds=10)) -> None:  # noqa: ASYNC109 - as there
        """Wait in a thread."""
        await asyncio.to_thread(self.inner.wait_ready, timeout)

    async def close(self) -> None:
        """Close in a thread."""
        await asyncio.to_thread(self.inner.close)


@dataclass(frozen=True)
class Scene:
    """A broker, a caller, a verifying service, and what its verifier is made with."""

    broker: BrokerStub
    orders: Identity
    payments: Identity
    settings: dict[str, Any]

    def token(self, **claims: Any) -> str:  # noqa: ANN401 - the arguments of mint
        """Return a good token of the caller, but for `claims`."""
        return self.broker.mint(thumbprint=self.orders.thumbprint, **claims)


def identity(ca: CertificateAuthority, spiffe_id: str) -> Identity:
    """Return a new identity."""
    issued = ca.issue(spiffe_id)
    return Identity.parse(issued.certificate_pem, issued.private_key_pem)


@contextmanager
def stage(directory: Path, mode: str) -> Iterator[Scene]:
    """Run a broker, and give a scene around it whose verifiers are of `mode`."""
    ca = CertificateAuthority.create("prod.example")
    (directory / "ca.pem").write_bytes(ca.root_pem)
    with BrokerStub.start(ca) as broker:
        payments = identity(ca, PAYMENTS)
        settings = {
            "audience": "payments",
            "issuer": ISSUER,
            "trust": broker.target,
            "identity": payments,
            "ca_file": directory / "ca.pem",
            "mode": mode,
        }
        yield Scene(broker, identity(ca, ORDERS), payments, settings)


@asynccontextmanager
async def verifying(
    kind: str,
    settings: dict[str, Any],
    **more: Any,  # noqa: ANN401 - those of Verifier
) -> AsyncIterator[Threaded | AsyncVerifier]:
    """Open a verifier of one kind or the other, and close it."""
    verifier = Threaded(Verifier(**settings | more)) if kind == "sync" else AsyncVerifier(**settings | more)
    try:
        yield verifier
    finally:
        await verifier.close()


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    while not true():  # noqa: ASYNC110 - no event says so
        await asyncio.sleep(0.02)
